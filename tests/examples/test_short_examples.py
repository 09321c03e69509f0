"""The three examples that a user reads first: short, they run, and show that nothing is forgotten."""

from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ("own_model", "recipe", "own_loop")


@pytest.mark.parametrize("name", SHORT)
def test_an_example_fits_a_screen_or_two(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 80


def test_a_model_of_your_own_learns_two_tasks_and_the_first_keeps_its_bits(program, tmp_path, capsys):
    found = program("own_model.py").main(tmp_path)
    assert min(found["stripes"], found["spots"]) > 0.9
    assert found["bit-identical"]
    assert (tmp_path / "02-spots").is_dir()
    assert "bit-identical: True" in capsys.readouterr().out


def test_a_stream_by_a_recipe_forgets_nothing_and_goes_on_where_it_was(program, tmp_path, capsys):
    main = program("recipe.py").main
    matrix = main(tmp_path)
    assert matrix.forgetting() == 0.0
    assert matrix.average_accuracy() > 0.85
    assert "goal" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/frozen")}
    np.testing.assert_array_equal(main(tmp_path).values, matrix.values)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/frozen")} == before


def test_a_loop_of_your_own_learns_two_functions_and_the_first_keeps_its_bits(program, capsys):
    found = program("own_loop.py").main()
    assert max(found["wave"], found["hill"]) < 0.1
    assert found["bit-identical"]
    assert "wave: step 1500" in capsys.readouterr().out


def test_the_table_of_the_cifar100_example_has_a_row_for_every_method(program):
    script = program("cifar100/cifar100_20tasks.py")
    results = script.report.collect(EXAMPLES.parent / "benchmarks" / "results" / "cifar100_small.json")
    head, *rows = script.report.table(results).splitlines()
    assert head.split()[:3] == ["method", "tasks", "seeds"]
    assert {row.split()[0] for row in rows} == set(script.METHODS)
    assert set(script.report.METHODS) == set(script.METHODS)
    assert set(script.PRESETS) == {"small", "medium", "paper"}
    for preset in script.PRESETS.values():
        assert {"own", *script.RECIPES} == set(preset().recipes)
