"""The command line: what each command finds, in words and as JSON; errors are one line and end with 2."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pae_jax as pae
from pae_jax.cli import main


@pytest.fixture(scope="module")
def state(net, frozen):
    """Tasks "a" and "b"; "b" is wider and has a head module."""
    wide = pae.expand(net, frozen, width=1.5, key=jax.random.key(0))
    state = pae.pack(net, wide, "b", head=nn.Dense(3), key=jax.random.key(1), sharing="picked")
    return pae.freeze(pae.prune(state, "b", 0.5), "b")


@pytest.fixture(scope="module")
def folder(net, frozen, state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    pae.save(folder / "1-a", frozen, {"note": "first"})
    pae.save(folder / "2-b", state)
    pae.write_bundle(folder / "a.bundle", net, frozen)
    pae.write_bundle(folder / "b.delta", net, state, after="a")
    x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=np.arange(12) % 2)
    return folder


@pytest.fixture
def run(capsys):
    """Run a command; return its status, output and error line."""

    def call(*words):
        status = main([str(word) for word in words])
        found = capsys.readouterr()
        return status, found.out, found.err

    return call


@pytest.fixture
def run_json(run):
    def call(*words):
        status, out, err = run(*words, "--json")
        assert err == ""
        return status, json.loads(out)

    return call


def test_apply_keeps_the_local_variables_of_a_base_of_equal_width(run, net, frozen, folder, tmp_path):
    after = pae.freeze(pae.pack(net, frozen, "b", head=2, key=jax.random.key(1)), "b")
    pae.write_bundle(tmp_path / "delta", net, after, after="a")
    status, _, err = run("apply", folder / "1-a", tmp_path / "delta", tmp_path / "stage")
    assert (status, err) == (0, "")
    applied = pae.load(net, tmp_path / "stage")
    assert jax.tree.all(jax.tree.map(np.array_equal, applied.local, frozen.local))
    pae.pack(net, applied, "c", head=2, key=jax.random.key(2), allow_empty=True)


def test_report_tells_of_stages_bundles_and_deltas_without_their_net(run, run_json, folder, state):
    status, out, _ = run("report", folder / "2-b")
    assert status == 0
    assert str(pae.report(state)) in out
    status, found = run_json("report", folder / "1-a")
    assert (found["delta"], found["metadata"], found["width"]) == (False, {"note": "first"}, 1.0)
    assert [row["task"] for row in found["rows"]] == ["a", "(free)"]
    _, bundle = run_json("report", folder / "a.bundle")
    assert bundle["bytes"] == (folder / "a.bundle").stat().st_size
    assert [row["weights"] for row in bundle["rows"]] == [row["weights"] for row in found["rows"]]
    _, delta = run_json("report", folder / "b.delta")
    assert (delta["delta"], delta["onto"], [task["name"] for task in delta["tasks"]]) == (True, ["a"], ["b"])
    assert run("report", folder / "b.delta")[1].startswith("a delta of ")
    _, whole = run_json("report", folder / "b.delta", "--onto", folder / "1-a")
    assert [row["task"] for row in whole["rows"]] == ["a", "b", "(free)"]


def test_verify_recomputes_every_digest(run, run_json, folder):
    assert run_json("verify", folder / "2-b") == (0, {"verified": ["a", "b"], "not_frozen": []})
    assert run("verify", folder / "a.bundle")[1] == "1 frozen tasks are what was frozen: a\n"
    assert run_json("verify", folder / "b.delta", "--onto", folder / "a.bundle")[1]["verified"] == ["a", "b"]


def test_a_stage_is_bundled_and_a_delta_applied_without_the_net(run, run_json, net, folder, state, tmp_path):
    status, found = run_json("bundle", folder / "2-b", tmp_path / "b", "--after", "a", "--weights", "int8")
    assert (status, found["tasks"], found["onto"]) == (0, ["b"], ["a"])
    assert found["bytes"] == (tmp_path / "b").stat().st_size
    assert run("bundle", folder / "2-b", tmp_path / "a", "--tasks", "a")[0] == 0
    status, out, _ = run("apply", tmp_path / "a", folder / "b.delta", tmp_path / "stage")
    assert status == 0
    assert "1 of 1 frozen tasks are bit-identical" in out
    heads = {"b": nn.Dense(3)}
    loaded = pae.load(net, tmp_path / "stage", heads=heads)
    x = jnp.ones((3, 4))
    for task in "ab":
        np.testing.assert_array_equal(pae.predict(net, loaded, task, x), pae.predict(net, state, task, x))


def test_certificate_ends_with_1_if_a_task_is_not_identical(run, run_json, folder, tmp_path):
    assert run_json("certificate", folder / "1-a", folder / "2-b")[1]["holds"]
    run("bundle", folder / "1-a", tmp_path / "rounded", "--weights", "int8")
    status, out, _ = run("certificate", folder / "1-a", tmp_path / "rounded")
    assert status == 1
    assert "- a: NOT identical" in out


BUILDER = """
import jax.numpy as jnp, pae_jax as pae
from flax import linen as nn
from {module} import {name} as Vector
def plain(): return pae.linen(Vector, jnp.zeros((1, 4)))
def both(): return plain(), dict(b=nn.Dense(3))
def other(): return pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
def nothing(): return 3
def ends():
    raise SystemExit(0)


def fails(): raise OSError("no such\\nmodel")
"""


@pytest.fixture
def builder(tmp_path, monkeypatch, vector_module):
    """A module of the user's in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "users_vector", type(sys)("users_vector"))
    sys.modules["users_vector"].Vector = vector_module
    (tmp_path / "builder.py").write_text(BUILDER.format(module="users_vector", name="Vector"))
    yield
    sys.modules.pop("builder", None)


@pytest.mark.usefixtures("builder")
def test_evaluate_needs_the_net_and_measures_stages_bundles_and_deltas(run, run_json, net, folder, frozen):
    with np.load(folder / "data.npz") as data:
        wanted = pae.evaluate(net, frozen, "a", (data["x"], data["y"]))
    rest = ("--task", "a", "--data", folder / "data.npz", "--net", "builder:both")
    assert run_json("evaluate", folder / "a.bundle", *rest)[1] == {"task": "a", **wanted}
    assert run_json("evaluate", folder / "2-b", *rest)[1] == {"task": "a", **wanted}
    assert run_json("evaluate", folder / "b.delta", "--onto", folder / "a.bundle", *rest)[1]["count"] == 12
    assert run("evaluate", folder / "2-b", *rest)[1].startswith("a: accuracy ")
    assert run("verify", folder / "2-b", "--net", "builder:both")[0] == 0


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_data_is_one_line_and_ends_with_2(run, folder, tmp_path, save, damage):
    path = tmp_path / "data.npz"
    save(path, x=np.random.default_rng(0).normal(size=(64, 4)), y=np.arange(64))
    whole = path.read_bytes()
    middle = len(whole) // 4
    path.write_bytes(
        whole[: len(whole) // 2] if damage == "cut" else whole[:middle] + b"\x55" * 99 + whole[middle + 99 :]
    )
    words = ("evaluate", folder / "1-a", "--task", "a", "--data", path, "--net", "builder:plain")
    status, out, err = run(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "data.npz is no .npz file with arrays x and y" in err


@pytest.mark.usefixtures("builder")
def test_errors_are_one_line_and_end_with_2(run, folder, tmp_path):
    (tmp_path / "text").write_text("no archive")
    rest = ("--task", "a", "--data", folder / "data.npz")
    for message, words in {
        "the folder does not exist": ("report", folder / "missing"),
        "is not a bundle of pae_jax": ("verify", tmp_path / "text"),
        "pass that state as onto=": ("verify", folder / "b.delta"),
        "unknown task 'z'": ("bundle", folder / "2-b", tmp_path / "out", "--tasks", "z"),
        "weights must be one of": ("bundle", folder / "2-b", tmp_path / "out", "--weights", "int4"),
        "exists; a bundle is written once": ("bundle", folder / "2-b", folder / "a.bundle"),
        "without onto=": ("apply", folder / "1-a", folder / "a.bundle", tmp_path / "out"),
        "task 'b' differs": ("apply", folder / "2-b", folder / "b.delta", tmp_path / "out"),
        "pass --net": ("evaluate", folder / "1-a", *rest),
        "cannot be made: OSError: no such model": ("evaluate", folder / "1-a", *rest, "--net", "builder:fails"),
        "cannot be made: SystemExit: 0": ("verify", folder / "1-a", "--net", "builder:ends"),
        "cannot be made: ModuleNotFoundError": ("evaluate", folder / "1-a", *rest, "--net", "nowhere:net"),
        "cannot be made: ValueError": ("evaluate", folder / "1-a", *rest, "--net", ""),
        "returned int": ("evaluate", folder / "1-a", *rest, "--net", "builder:nothing"),
        "Was the state made with this net": ("verify", folder / "1-a", "--net", "builder:other"),
        "is no .npz file": (
            "evaluate",
            folder / "1-a",
            "--task",
            "a",
            "--data",
            tmp_path / "text",
            "--net",
            "builder:both",
        ),
        "invalid choice": ("destroy", folder / "1-a"),
        "required": ("report",),
    }.items():
        status, out, err = run(*words)
        assert (status, out) == (2, ""), words
        assert message in err, words
        assert err.startswith("pae_jax: ") and err.count("\n") == 1, words
    assert not (tmp_path / "out").exists()


def test_the_package_runs_as_a_program(folder):
    done = subprocess.run(
        [sys.executable, "-m", "pae_jax", "verify", folder / "a.bundle"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1 frozen tasks are what was frozen: a\n"), done.stderr


def test_names_that_a_terminal_cannot_show_are_escaped(net, frozen, tmp_path):
    state = pae.freeze(pae.pack(net, frozen, "名", head=2, key=jax.random.key(1), allow_empty=True), "名")
    pae.save(tmp_path / "stage", state)
    done = subprocess.run(
        [sys.executable, "-m", "pae_jax", "verify", tmp_path / "stage"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout) == (0, "2 frozen tasks are what was frozen: a, \\u540d\n"), done.stderr


def test_a_stage_is_no_delta_and_a_command_that_is_missing_names_no_other(run, folder, tmp_path):
    for words in (
        ["apply", folder / "1-a", folder / "2-b", tmp_path / "new"],
        ["verify", folder / "2-b", "--onto", folder / "1-a"],
        ["report", folder / "2-b", "--onto", folder / "1-a"],
    ):
        status, _, err = run(*words)
        assert status == 2
        assert "is a stage, which holds all of its tasks" in err
    assert not (tmp_path / "new").exists()
    assert run()[2].strip().endswith("see python -m pae_jax --help")
    assert run("verify")[2].strip().endswith("see python -m pae_jax verify --help")
