"""Shared measurement code: interleaved timing in one process, medians, quartiles, ratios, compilations, memory, JSON.

Seconds depend on the machine and its load. So the variants are timed in turn, round by round, and compared by the ratio
of their medians. The quartiles of the ratio within single rounds show how reliable it is. `load_average` in the result
shows whether the machine was idle.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from pae_jax.version import __version__

WARM_UP = 3
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_COMPILED: list[float] = []

Way = Callable[[], Any]
"""One round of what is measured; the arrays that it returns are waited for."""


def _note_compilation(event: str, duration_secs: float, **_: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


@contextmanager
def compilations() -> Iterator[SimpleNamespace]:
    """Count the programs that XLA compiles in the block: `.count`, and their compile time in `.seconds` at its end."""
    found = SimpleNamespace(count=0, seconds=0.0)
    before = len(_COMPILED)
    yield found
    found.count, found.seconds = len(_COMPILED) - before, round(sum(_COMPILED[before:]), 2)


def in_turn(ways: Mapping[str, Way], repeats: int, warm_up: int = WARM_UP, calls: int = 1) -> dict[str, list[float]]:
    """Return the seconds per call of each variant in each round, after warm-up rounds that are not counted.

    Args:
      ways: the variants to time, in this order in every round.
      repeats: rounds that count.
      warm_up: uncounted rounds before, at least 1: the first compiles.
      calls: calls per round; only the last is waited for, so that they overlap on an accelerator, as in a training
        loop.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(calls - 1):
                way()
            jax.block_until_ready(way())
            if number >= warm_up:
                times[name].append((time.perf_counter() - start) / calls)
    return times


def compare(times: Mapping[str, Sequence[float]], base: str) -> dict[str, Any]:
    """Return the median seconds of each variant, and its ratio to the base.

    Returns:
      `{"seconds": {way: median}, "ratios": {"way / base": {"median": ratio of the medians, "quartiles": [low, high] of
      the ratios within rounds}}}`.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {}
    for name in times:
        if name != base:
            rounds = [a / b for a, b in zip(times[name], times[base], strict=True)]
            ratio = {"median": round(medians[name] / medians[base], 3), "quartiles": quartiles(rounds)}
            ratios[f"{name} / {base}"] = ratio
    return {"seconds": {name: significant(value) for name, value in medians.items()}, "ratios": ratios}


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the first and the third quartile."""
    if len(values) < 2:
        return [round(value, 3) for value in (*values, *values)]
    low, _, high = statistics.quantiles(values, method="inclusive")
    return [round(low, 3), round(high, 3)]


def significant(value: float, digits: int = 4) -> float:
    """Round a number to a given number of significant digits."""
    return float(f"{value:.{digits}g}")


def program_bytes(compiled: Any) -> dict[str, int]:
    """Return the memory of a compiled program: arguments and results (shared where donated), and temporaries."""
    found = compiled.memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {"arguments_and_results": kept, "temporaries": found.temp_size_in_bytes}


def array_bytes(tree: Any) -> int:
    """Return the bytes of the arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def live_bytes() -> int:
    """Return the bytes of all arrays that this process holds."""
    return sum(array.nbytes for array in jax.live_arrays())


def options(doc: str | None, repeats: int, *extra: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """Parse the command line of a benchmark: `--repeats`, `--only`, `--out`, and the benchmark's own options."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds that are timed (default {repeats})")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose name contains this")
    script = Path(sys.argv[0])
    out = script.parent / "results" / f"{script.stem}.json"
    parser.add_argument("--out", type=Path, default=out, help="result file (default: in results/)")
    for name, settings in extra:
        parser.add_argument(name, **settings)
    return parser.parse_args()


def publish(
    settings: argparse.Namespace,
    cases: Mapping[str, Callable[[], dict[str, Any]]],
    seconds: float = float("inf"),
    **more: Any,
) -> None:
    """Run the requested cases; print and write each result, with command and versions, as soon as it is available.

    A case that fails is recorded as failed and does not stop the others; the exit status is then 1.

    Args:
      settings: from `options`.
      cases: name and measurement.
      seconds: no case starts later than this many seconds from now; the result names those left out.
      **more: further entries of the result file.
    """
    chosen = {name: run for name, run in cases.items() if settings.only in name}
    if not chosen:
        raise SystemExit(f"no case contains {settings.only!r}; cases: {', '.join(cases)}")
    result: dict[str, Any] = {**_made_by(settings), **more, "cases": {}}
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for name, run in chosen.items():
        if time.perf_counter() - start > seconds:
            result.setdefault("out_of_time", []).append(name)
        else:
            began = time.perf_counter()
            try:
                result["cases"][name] = run() | {"whole_case_seconds": round(time.perf_counter() - began, 1)}
                print(f"{name}: {json.dumps(result['cases'][name], indent=2)}", flush=True)
            except Exception as error:
                traceback.print_exc()
                result.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        settings.out.write_text(json.dumps(result, indent=2) + "\n")
    if "failed" in result:
        raise SystemExit(f"failed: {', '.join(result['failed'])}")


def publish_on_disk(
    doc: str | None, cases: Mapping[str, Sequence[Any]], measure: Callable[..., dict[str, Any]]
) -> None:
    """Run the cases of a benchmark of the disk, `measure(*case, repeats, folder)`, and write the result file."""
    folder = ("--folder", {"type": Path, "default": None, "help": "where to write (default: the temporary folder)"})
    settings = options(doc, 5, folder)
    publish(
        settings,
        {name: functools.partial(measure, *case, settings.repeats, settings.folder) for name, case in cases.items()},
    )


def publish_kills(script: str, settings: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Write the result of a campaign that kills programs; the exit status is 1 if their ends differ.

    Args:
      script: name of the benchmark.
      settings: `kills`, `seed` and `out`.
      found: `kills`, `runs`, `equal`, and whatever else was found.
    """
    device = jax.devices()[0]
    result = {
        "command": f"python benchmarks/{script} --kills {settings.kills} --seed {settings.seed}",
        "hardware": {"device": device.device_kind, "cores": os.cpu_count(), "machine": platform.machine()},
        "load_average": round(os.getloadavg()[0], 2),
        "versions": _versions(),
        "seed": settings.seed,
        **found,
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{found['kills']} kills in {found['runs']} runs: {'equal' if found['equal'] else 'DIFFERENT'}")
    if not found["equal"]:
        raise SystemExit(1)


def _made_by(settings: argparse.Namespace) -> dict[str, Any]:
    """Return command, hardware, versions and load of this run."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if not (word.startswith("--out") and ("=" in word or next(words)))]
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept]),
        "hardware": {
            "device": device.device_kind,
            "devices": jax.device_count(),
            "device_bytes": memory.get("bytes_limit"),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
        },
        "load_average": round(os.getloadavg()[0], 2),
        "versions": _versions(),
        "repeats": settings.repeats,
    }


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "pae-jax": __version__, **packages}
