"""`python -m pae_jax`: look at stages and bundles, check them, make bundles and apply them."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn
from zipfile import BadZipFile

import numpy as np

from pae_jax.core import State, integrity, names
from pae_jax.errors import ArgumentError, DataError, PaeError
from pae_jax.nets import Net
from pae_jax.reports import report
from pae_jax.storage import (
    bundle_header,
    certificate,
    load,
    open_any,
    read_bundle,
    read_metadata,
    refuse_onto,
    save,
    write_state,
)
from pae_jax.training import evaluate

Answer = tuple[dict[str, Any], str]
"""What a command found, as JSON and in words."""

_NET = "module:function that returns the net, or (net, {task: head module}); a path is a folder of Python's search path"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it went well, 1 if a certificate does not hold, 2 after an error, said in one line.

    Args:
      arguments: words of the command line; None takes those of this process.
    """
    try:
        options = _parser().parse_args(arguments)
        found, words = options.run(options)
        _print(json.dumps(found, indent=1, default=_plain) if options.json else words, sys.stdout)
        return 0 if found.get("holds", True) else 1
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (PaeError, OSError, MemoryError) as error:
        _print(f"pae_jax: {' '.join(str(error).split()) or type(error).__name__}", sys.stderr)
        return 2


def _print(text: str, stream: Any) -> None:
    """Print a text; characters that the stream cannot show are escaped."""
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        raise ArgumentError(f"{message}; see python -m pae_jax {command + ' ' if command else ''}--help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pae_jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[Any], Answer], about: str, *places: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        for place in places:
            added.add_argument(place, type=Path)
        added.add_argument("--json", action="store_true", help="print JSON instead of words")
        added.add_argument("--net", metavar="MODULE:FUNCTION", help=_NET)
        return added

    onto = {"type": Path, "metavar": "BASE", "help": "the stage or bundle that a delta adds to"}
    command("report", _report, "Say who owns what.", "path").add_argument("--onto", **onto)
    command("verify", _verify, "Recompute every digest.", "path").add_argument("--onto", **onto)
    made = command("bundle", _bundle, "Write a bundle of a stage, or of another bundle.", "path", "out")
    made.add_argument("--tasks", nargs="+", metavar="TASK", help="these tasks alone")
    made.add_argument("--after", metavar="TASK", help="a delta: only what later tasks add")
    made.add_argument("--weights", default="float32", help="float32 (as they are), bfloat16, float16 or int8")
    made.add_argument("--local", default="float32", help="biases, norms, heads: float32, bfloat16 or float16")
    command("apply", _apply, "Write the stage that a delta makes of its base.", "base", "delta", "out")
    command("certificate", _certificate, "Say which tasks are bit-identical.", "before", "after")
    measured = command("evaluate", _evaluate, "Measure a task on data; needs --net.", "path")
    measured.add_argument("--task", required=True, help="name of the task")
    measured.add_argument("--data", required=True, type=Path, metavar="FILE.npz", help="arrays x and y")
    measured.add_argument("--onto", **onto)
    return parser


def _report(options: Any) -> Answer:
    header = bundle_header(options.path) if options.path.is_file() else {}
    if header.get("base") is not None and options.onto is None:
        return _delta(header, _bytes(options.path))
    facts, state = _opened(options, options.path, options.onto)
    table = report(state)
    kind = {"weights": facts["weights"]} if header else {"metadata": facts["metadata"]}
    found = {"delta": False, "bytes": _bytes(options.path), "width": state.width, **kind, "rows": table.rows}
    return found, f"{table}\n{found['bytes']:,} bytes on disk"


def _delta(header: dict[str, Any], size: int) -> Answer:
    """Say what a delta adds, as far as that is known without its base."""
    tasks = [{key: task[key] for key in ("name", "id", "weights", "width", "measured")} for task in header["tasks"]]
    base = [task["name"] for task in header["base"]["tasks"]]
    added = "\n".join(f"{task['name']}: {task['weights']:,} weights" for task in tasks)
    words = f"a delta of {size:,} bytes, {header['weights']}, for a state with {', '.join(base)}; it adds\n{added}"
    return {"delta": True, "onto": base, "weights": header["weights"], "bytes": size, "tasks": tasks}, words


def _verify(options: Any) -> Answer:
    _, state = _opened(options, options.path, options.onto)
    integrity.verify(state)
    frozen = [name for name in names(state) if state.tasks[name].frozen]
    others = [name for name in names(state) if not state.tasks[name].frozen]
    words = f"{len(frozen)} frozen tasks are what was frozen: {', '.join(frozen) or 'none'}"
    return {"verified": frozen, "not_frozen": others}, words + (f"; not frozen: {', '.join(others)}" if others else "")


def _bundle(options: Any) -> Answer:
    _, state = _opened(options, options.path)
    header = write_state(options.out, state, options.tasks, options.after, options.weights, options.local)
    tasks = [task["name"] for task in header["tasks"]]
    found = {"path": str(options.out), "bytes": _bytes(options.out), "tasks": tasks, "weights": options.weights}
    found["onto"] = None if header["base"] is None else [task["name"] for task in header["base"]["tasks"]]
    base = "" if found["onto"] is None else f", for a state with {', '.join(found['onto'])}"
    return found, f"{options.out}: {found['bytes']:,} bytes, {', '.join(tasks)}{base}"


def _apply(options: Any) -> Answer:
    _, before = _opened(options, options.base)
    _, after = _opened(options, options.delta, before)
    proof = certificate(before, after)
    save(options.out, after)
    added = [name for name in names(after) if name not in before.tasks]
    found = {"path": str(options.out), "added": added, **proof.to_json()}
    return found, f"{options.out}: {', '.join(added)} added\n{proof}"


def _certificate(options: Any) -> Answer:
    states = [_opened(options, path)[1] for path in (options.before, options.after)]
    proof = certificate(*states)
    return proof.to_json(), str(proof)


def _evaluate(options: Any) -> Answer:
    if options.net is None:
        raise ArgumentError("evaluate computes, which a stage or bundle alone cannot: pass --net MODULE:FUNCTION")
    net, heads = _net(options.net)
    onto = None if options.onto is None else _loaded(net, options.onto, heads)
    state = _loaded(net, options.path, heads, onto)
    scores = evaluate(net, state, options.task, _data(options.data))
    words = ", ".join(f"{name} {value:.6g}" for name, value in scores.items())
    return {"task": options.task, **scores}, f"{options.task}: {words}"


def _opened(options: Any, path: Path, onto: Path | State | None = None) -> tuple[dict[str, Any], State]:
    """Return what a path holds, compared with the net if there is one."""
    base = onto if onto is None or isinstance(onto, State) else open_any(onto)[1]
    facts, state = open_any(path, base)
    if options.net is not None:
        net, heads = _net(options.net)
        specs = {name: heads.get(name, entry.head_spec) for name, entry in state.tasks.items()}
        tasks = {name: entry.replace(head_spec=specs[name]) for name, entry in state.tasks.items()}
        integrity.check(state.replace(tasks=tasks), net)
    return facts, state


def _loaded(net: Net, path: Path, heads: dict[str, Any], onto: State | None = None) -> State:
    """Return the state of a stage or a bundle, its head modules taken from all that the user has."""
    facts = bundle_header(path) if path.is_file() else read_metadata(path)
    chosen = {task["name"]: heads[task["name"]] for task in facts["tasks"] if task["name"] in heads}
    if path.is_file():
        return read_bundle(net, path, onto=onto, heads=chosen)
    refuse_onto(path, onto)
    return load(net, path, heads=chosen)


def _net(text: str) -> tuple[Net, dict[str, Any]]:
    """Return the net, and the head modules, that a function of the user's makes."""
    module, _, function = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), function)()
    except (Exception, SystemExit) as error:  # a script that ends Python, maybe with 0
        raise ArgumentError(f"--net {text} cannot be made: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    net, heads = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    if not isinstance(net, Net) or not isinstance(heads, dict):
        raise ArgumentError(f"--net {text} returned {type(made).__name__}, expected a net of pae.linen or pae.nnx")
    return net, heads


def _data(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is no .npz file with arrays x and y: {error}") from error


def _bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
