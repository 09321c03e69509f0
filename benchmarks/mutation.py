"""Do the tests notice when the code that guards the laws is changed? Small changes by cosmic-ray, one at a time.

Command:   pip install "cosmic-ray>=8.4,<9"; python benchmarks/mutation.py --mutants 30
Expected:  every change is noticed, but for those that the results file argues are no change of behaviour
Writes:    benchmarks/results/mutation.json; 10 to 30 seconds a change on 2 CPU cores; stopped and started, it goes on

For each file, positions are drawn by a seed, and at each of them one of the changes that cosmic-ray knows: another
operator, number, comparison or constant, `not` added, a branch or loop changed, a decorator removed. Annotations are
left out. The tests named for the file then run on a copy of the repository.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_item import MutationSpec, TestOutcome

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "mutation.json"
TESTS = {
    "pae_jax/core/ownership.py": " ".join(
        f"tests/core/test_{name}.py" for name in ("ownership", "picking", "laws", "drop")
    ),
    "pae_jax/core/pruning.py": "tests/core/test_pruning.py tests/core/test_laws.py",
    "pae_jax/core/selection.py": "tests/core/test_selection.py tests/core/test_pruning.py",
    "pae_jax/core/flax.py": "tests/core/test_flax.py",
    "pae_jax/core/gating.py": "tests/core/test_flax.py",
    "pae_jax/core/committing.py": "tests/core/test_flax.py",
    "pae_jax/core/integrity.py": "tests/core/test_integrity.py tests/core/test_laws.py",
    "pae_jax/core/packing.py": " ".join(
        f"tests/core/test_{name}.py" for name in ("packing", "claiming", "starting_weights", "drop", "laws")
    ),
    "pae_jax/storage/checkpoint.py": "tests/storage/test_checkpoint.py",
}
LIMIT = 600.0
"""Seconds after which a change counts as noticed: the tests hang."""


def main() -> None:
    """Try the changes that are not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=30, help="changes per file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="+", choices=TESTS, default=list(TESTS))
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.exists() else []
    done = {(row["file"], row["operator"], row["occurrence"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        _copy(Path(folder))
        for file in options.files:
            command = f"{shlex.quote(sys.executable)} -m pytest -x -q -p no:xdist {TESTS[file]}"
            for mutation in drawn(file, options.mutants, options.seed):
                if (file, mutation.operator_name, mutation.occurrence) not in done:
                    rows.append(_tried(mutation, file, command, Path(folder)))
                    _write(rows, options.seed)
    survived = [row for row in rows if row["outcome"] == "survived"]
    print(f"{len(rows)} changes, {len(survived)} not noticed")


def drawn(file: str, count: int, seed: int) -> list[MutationSpec]:
    """Return changes of a file at different positions, drawn by a seed."""
    source = (ROOT / file).read_text("utf-8")
    ignored, at = _annotations(source), {}
    nodes = list(ast_nodes(get_ast_from_path(ROOT / file)))
    for name in cosmic_ray.plugins.operator_names():
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments():
            continue
        places = [place for node in nodes for place in kind().mutation_positions(node)]
        for occurrence, (start, end) in enumerate(places):
            if start[0] not in ignored:
                at.setdefault(start, []).append(MutationSpec(Path(file), name, occurrence, start, end))
    rng = random.Random(f"{seed} {file}")
    chosen = rng.sample(sorted(at), min(count, len(at)))
    return [rng.choice(at[place]) for place in chosen]


def _annotations(source: str) -> set[int]:
    """Return the lines of signatures and of annotated fields, where a change changes nothing."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines |= set(range(node.lineno, node.body[0].lineno))
        elif isinstance(node, ast.AnnAssign) and node.value is None:
            lines.add(node.lineno)
    return lines


def _copy(folder: Path) -> None:
    """Copy the files that git knows of."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).exists() and name.startswith(("pae_jax/", "tests/", "examples/", "pyproject")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def _tried(mutation: MutationSpec, file: str, command: str, folder: Path) -> dict[str, Any]:
    own = MutationSpec(folder / file, mutation.operator_name, mutation.occurrence, mutation.start_pos, mutation.end_pos)
    result = mutate_and_test([own], f"env -C {shlex.quote(str(folder))} {command}", LIMIT)
    outcome = "survived" if result.test_outcome == TestOutcome.SURVIVED else "noticed"
    changed = [line for line in (result.diff or "").splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    print(f"{outcome:9} {file}:{mutation.start_pos[0]} {' => '.join(line.strip() for line in changed)}", flush=True)
    return {
        "file": file,
        "line": mutation.start_pos[0],
        "operator": mutation.operator_name,
        "occurrence": mutation.occurrence,
        "outcome": outcome,
        "change": changed,
        "why it is no fault": "",
    }


def _write(rows: list[dict[str, Any]], seed: int) -> None:
    survived = sum(row["outcome"] == "survived" for row in rows)
    facts = {
        "command": " ".join(["python benchmarks/mutation.py", *sys.argv[1:]]),
        "seed": seed,
        "changes": len(rows),
        "survived": survived,
    }
    RESULTS.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
