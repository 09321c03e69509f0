"""Tortures stages and runs, ten thousand times: is anything lost, silently wrong, untyped or blocked?

Command:   python benchmarks/torture.py                 (--trials 0.1 for a tenth; --only TEXT for some kinds)
Expected:  "bad": 0. Every trial ends in the right bits or in a typed error, and the same call works afterwards
Writes:    benchmarks/results/torture.json, again after every hundred trials; started again, it goes on from there

Each trial is drawn from a seed of its own, so that `--kind KIND --number N` repeats one. The kinds:

damaged stage      one bit, a cut, zeros, more bytes, a deletion, another file's content, a pipe: `load` and `verify`
damaged run        the same with every file of a finished run: open it, read all of it, learn the task again
hostile metadata   values of a stage's JSON replaced, and sealed again: `load`
failing call       one call of the file system fails with an errno during `save`, `load` or a run; then the call again
snapshot           what is on disk when a call of the file system begins, as a kill would leave it: `save`, resume
interrupt          Ctrl-C at a random moment of `save`, `load` or `learn`; then the call again in the same process
two writers        two threads save different networks to one path, or learn one task in one run, at once

Outcomes: "right" the bits that were asked for; "typed" a `PaeError`, nothing changed; "interrupted"; "one won" and
the other was told. All others are bad: "silent", "untyped", "blocked" (longer than 30 s), "lost" (the same call does
not work afterwards).
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import copy
import errno
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pae_jax as pae
from pae_jax import files
from pae_jax.lifelong.recipes import Adam, Ladder, Phase, Rate
from pae_jax.trees import flatten

GOOD = ("right", "typed", "interrupted", "one won", "accepted")
TRIALS = {
    "damaged stage": 3500,
    "damaged run": 1000,
    "hostile metadata": 1500,
    "failing call: save": 1200,
    "failing call: load": 800,
    "failing call: run": 150,
    "snapshot: save": 1000,
    "snapshot: run": 100,
    "interrupt: save": 500,
    "interrupt: load": 500,
    "interrupt: learn": 80,
    "two writers: save": 300,
    "two writers: learn": 30,
}
LONGEST = 30.0
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EMFILE, errno.ESTALE, errno.ENOMEM)
CALLS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "stat", "lstat", "scandir", "listdir", "rmdir")


class Torture:
    """What all trials share: a stage, a finished run, and what both must stay."""

    def __init__(self, folder: Path):
        self.folder = folder
        x = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
        data = (x, (x[:, 0] > 0).astype(np.int32))
        self.net = pae.linen(lambda width: pae.models.MLP(width, (6,)), jnp.zeros((1, 4)))
        self.empty = pae.init(self.net, jax.random.key(0))
        self.task = pae.Task("t", 2, data, data, data)
        phase = Phase(1, Rate(0.03), Adam())
        self.recipe = pae.Recipe("tiny", phase, 16, ladder=Ladder((0.5,), phase, ramp=0.0, choose="last"))
        state = pae.pack(self.net, self.empty, "a", head=2, key=jax.random.key(1))
        state = pae.freeze(pae.prune(state, "a", 0.5), "a")
        self.state = pae.pack(self.net, state, "b", head=3, key=jax.random.key(2))
        self.other = pae.pack(self.net, self.empty, "c", head=2, key=jax.random.key(3))
        self.facts = bits(self.state)
        pae.save(folder / "stage", self.state, {"note": "whole"})
        self.learned = self.outcome(folder / "run")
        self.files = {"stage": contents(folder / "stage"), "run": contents(folder / "run")}

    def outcome(self, path: Path, wait: float = 10.0) -> Any:
        """Learn the task in a run folder, or read it there; return everything that must not differ."""
        run = pae.Run(path, wait=wait)
        found = pae.learn_all(self.net, self.empty, [self.task], self.recipe, key=jax.random.key(4), run=run)
        one = found.outcomes[0]
        matrix = None if run.matrix is None else run.matrix.values.tolist()
        return bits(found.state), one.records, one.status, one.value, one.test, run.rows, matrix

    def loaded(self, path: Path) -> str:
        """Load and verify a stage; return the outcome."""
        state = pae.load(self.net, path)
        pae.verify(state)
        return "right" if bits(state) == self.facts else "silent"

    def fresh(self, rng: random.Random) -> Path:
        """Return a new empty folder."""
        path = self.folder / f"trial-{rng.getrandbits(64):016x}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path


def bits(state: pae.State) -> dict[str, Any]:
    """Return every array of a state by path, as bytes, and what it says of its tasks."""
    arrays = {path: (str(leaf.dtype), np.asarray(leaf).tobytes()) for path, leaf in flatten(state).items()}
    tasks = {name: (entry.id, entry.width, str(entry.head_spec)) for name, entry in state.tasks.items()}
    return {**arrays, "tasks": tasks}


def contents(path: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def damage(rng: random.Random, folder: Path, known: dict[str, bytes]) -> None:
    """Damage one file of a folder in one way."""
    name = rng.choice(sorted(known))
    path, content, spot = folder / name, known[name], rng.randrange(max(1, len(known[name])))
    way = rng.choice(["bit", "bit", "bit", "cut", "emptied", "zeros", "more", "deleted", "another", "pipe", "folder"])
    if way == "bit" and content:
        changed = bytearray(content)
        changed[spot] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    elif way == "zeros":
        end = min(len(content), spot + rng.choice([1, 16, len(content)]))
        path.write_bytes(content[:spot] + bytes(end - spot) + content[end:])
    elif way == "more":
        path.write_bytes(content + rng.randbytes(rng.choice([1, 64])))
    elif way == "another":
        path.write_bytes(known[rng.choice(sorted(known))])
    elif way in ("deleted", "pipe", "folder"):
        path.unlink()
        if way != "deleted":
            os.mkfifo(path) if way == "pipe" else path.mkdir()
    else:
        path.write_bytes(b"" if way == "emptied" else content[:spot])


def damaged_stage(torture: Torture, rng: random.Random) -> str:
    """Damage a file of a stage and load it."""
    path = torture.fresh(rng)
    shutil.copytree(torture.folder / "stage", path, dirs_exist_ok=True)
    damage(rng, path, torture.files["stage"])
    return torture.loaded(path)


def damaged_run(torture: Torture, rng: random.Random) -> str:
    """Damage a file of a finished run, then ask for all that it holds."""
    path = torture.fresh(rng)
    shutil.copytree(torture.folder / "run", path, dirs_exist_ok=True)
    damage(rng, path, torture.files["run"])
    return "right" if torture.outcome(path, 0.2) == torture.learned else "silent"


def hostile_metadata(torture: Torture, rng: random.Random) -> str:
    """Change values of a stage's JSON, seal it again, and load it."""
    path = torture.fresh(rng)
    shutil.copytree(torture.folder / "stage", path, dirs_exist_ok=True)
    file = path / "_CHECKPOINT_METADATA"
    whole = json.loads(file.read_text())
    facts = copy.deepcopy(whole["custom_metadata"])
    del facts["sha256"]
    for _ in range(rng.choice([1, 1, 3])):
        holder, place = rng.choice([spot for spot in places(facts)])
        values = [None, True, -1, 0, 2**70, 1e308, "", "x" * 999, [], {}, [[[]]], {"a": {}}, float("nan"), "../../etc"]
        if rng.random() < 0.2:
            del holder[place]
        else:
            holder[place] = rng.choice(values)
    whole["custom_metadata"] = files.sealed(facts)
    file.write_text(json.dumps(whole))
    found = pae.load(torture.net, path)
    same = bits(found) == torture.facts
    return "right" if same else "accepted"  # a seal is no signature: whoever writes one may name a task otherwise


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place of a JSON value as its container and key."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


class Calls:
    """Counts the calls of the file system under a folder; before one of them something happens."""

    def __init__(self, folder: Path, at: int, act: Callable[[], None]):
        self.folder, self.at, self.act, self.count, self.lock = str(folder), at, act, 0, threading.Lock()

    def before(self, path: Any) -> None:
        """Count a call, if it is about a path in the folder or about an open file."""
        inside = isinstance(path, int) or str(path).startswith(self.folder)
        with self.lock:
            self.count += inside
            now = inside and self.count == self.at
        if now:
            self.act()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the calls that Python makes; those of TensorStore are its own."""
        originals = {name: getattr(os, name) for name in CALLS}
        opens = builtins.open

        def wrapped(function: Any) -> Any:
            def call(path: Any = ".", *rest: Any, **options: Any) -> Any:
                self.before(path)
                return function(path, *rest, **options)

            return call

        for name, function in originals.items():
            setattr(os, name, wrapped(function))
        builtins.open = io.open = wrapped(opens)
        try:
            yield
        finally:
            for name, function in originals.items():
                setattr(os, name, function)
            builtins.open = io.open = opens


def failing(rng: random.Random, folder: Path, most: int) -> Calls:
    """Return calls of which one fails."""
    code = rng.choice(ERRORS)

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return Calls(folder, rng.randint(1, most), fail)


def failing_save(torture: Torture, rng: random.Random) -> str:
    """Fail one call of a save; a stage is there if and only if nothing was raised; then save again."""
    path = torture.fresh(rng) / "runs" / "stage"
    try:
        with failing(rng, path.parent.parent, 120).watched():
            pae.save(path, torture.state)
    except pae.CheckpointError:
        return again_saved(torture, path, "typed")
    return torture.loaded(path)


def again_saved(torture: Torture, path: Path, outcome: str) -> str:
    """Return the outcome if the stage is whole or can be saved now, and nothing half is left by then; else "lost"."""
    pae.save(path.with_name("next") if path.exists() else path, torture.state)
    left = [entry for entry in path.parent.iterdir() if entry.name.startswith(files.ASIDE)]
    return outcome if torture.loaded(path) == "right" and not left else "lost"


def failing_load(torture: Torture, rng: random.Random) -> str:
    """Fail one call of a load; then load again."""
    path = torture.folder / "stage"
    try:
        with failing(rng, path, 60).watched():
            return torture.loaded(path)
    except pae.CheckpointError:
        return "typed" if torture.loaded(path) == "right" else "lost"


def failing_run(torture: Torture, rng: random.Random) -> str:
    """Fail one call of a run; then learn again."""
    path = torture.fresh(rng)
    try:
        with failing(rng, path, 700).watched():
            return "right" if torture.outcome(path) == torture.learned else "silent"
    except pae.CheckpointError:
        return "typed" if torture.outcome(path) == torture.learned else "lost"


def snapshots(torture: Torture, rng: random.Random, path: Path, most: int, work: Callable[[], Any]) -> Path:
    """Do some work in a folder; return a copy of the folder as it was before some call of the file system."""
    aside = torture.fresh(rng)

    def copied() -> None:
        # A process of its own, whose calls are not counted.
        os.system(f"cp -a {path}/. {aside}/")

    with Calls(path, rng.randint(1, most), copied).watched():
        work()
    return aside


def snapshot_save(torture: Torture, rng: random.Random) -> str:
    """Save as after a kill in the middle of a save."""
    path = torture.fresh(rng)
    aside = snapshots(torture, rng, path, 120, lambda: pae.save(path / "stage", torture.state))
    return again_saved(torture, aside / "stage", "right")


def snapshot_run(torture: Torture, rng: random.Random) -> str:
    """Resume as after a kill in the middle of a run."""
    path = torture.fresh(rng)
    aside = snapshots(torture, rng, path, 700, lambda: torture.outcome(path))
    return "right" if torture.outcome(aside) == torture.learned else "silent"


@contextlib.contextmanager
def interrupted(delay: float) -> Iterator[None]:
    """Press Ctrl-C after some seconds."""

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-4))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt_save(torture: Torture, rng: random.Random) -> str:
    """Interrupt a save, then save again."""
    path = torture.fresh(rng) / "stage"
    try:
        with interrupted(rng.uniform(0, 0.12)):
            pae.save(path, torture.state)
    except KeyboardInterrupt:
        return again_saved(torture, path, "interrupted")
    return torture.loaded(path)


def interrupt_load(torture: Torture, rng: random.Random) -> str:
    """Interrupt a load, then load again."""
    try:
        with interrupted(rng.uniform(0, 0.06)):
            return torture.loaded(torture.folder / "stage")
    except KeyboardInterrupt:
        return "interrupted" if torture.loaded(torture.folder / "stage") == "right" else "lost"


def interrupt_learn(torture: Torture, rng: random.Random) -> str:
    """Interrupt a run, then learn again."""
    path = torture.fresh(rng)
    try:
        with interrupted(rng.uniform(0, 2.0)):
            return "right" if torture.outcome(path) == torture.learned else "silent"
    except KeyboardInterrupt:
        return "interrupted" if torture.outcome(path) == torture.learned else "lost"


def both(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls at once in threads; return what they return or raise."""
    found: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(number: int) -> None:
        start.wait()
        try:
            found[number] = calls[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def two_saves(torture: Torture, rng: random.Random) -> str:
    """Save two networks to one path at once."""
    path, states = torture.fresh(rng) / "stage", (torture.state, torture.other)
    found = both(*[lambda state=state: pae.save(path, state) for state in states])
    won = [number for number, error in enumerate(found) if error is None]
    if len(won) != 1 or not isinstance(found[1 - won[0]], pae.CheckpointError):
        return "lost" if not won else "silent"
    return "one won" if bits(pae.load(torture.net, path)) == bits(states[won[0]]) else "silent"


def two_learn(torture: Torture, rng: random.Random) -> str:
    """Learn one task twice at once; the second waits and reads, or says that the first is at it."""
    path, wait = torture.fresh(rng), rng.choice([0.1, 20.0])
    found = both(*[lambda: torture.outcome(path, wait)] * 2)
    errors = [one for one in found if isinstance(one, BaseException)]
    if any(not isinstance(error, pae.CheckpointError) for error in errors) or len(errors) == 2:
        return "untyped" if len(errors) < 2 else "lost"
    whole = all(one == torture.learned for one in found if one not in errors) and torture.outcome(path)
    return "silent" if whole != torture.learned else "one won" if errors else "right"


KINDS: dict[str, Callable[[Torture, random.Random], str]] = {
    "damaged stage": damaged_stage,
    "damaged run": damaged_run,
    "hostile metadata": hostile_metadata,
    "failing call: save": failing_save,
    "failing call: load": failing_load,
    "failing call: run": failing_run,
    "snapshot: save": snapshot_save,
    "snapshot: run": snapshot_run,
    "interrupt: save": interrupt_save,
    "interrupt: load": interrupt_load,
    "interrupt: learn": interrupt_learn,
    "two writers: save": two_saves,
    "two writers: learn": two_learn,
}


def trial(torture: Torture, kind: str, number: int) -> tuple[str, str]:
    """Make one trial; return its outcome, and what was raised where that is bad."""
    rng, began, detail = random.Random(f"{kind} {number}"), time.monotonic(), ""
    try:
        outcome = KINDS[kind](torture, rng)
    except pae.PaeError as error:
        outcome = "typed" if kind in ("damaged stage", "damaged run", "hostile metadata") else "lost"
        detail = "" if outcome == "typed" else f"{type(error).__name__}: {error}"
    except Exception as error:
        outcome, detail = "untyped", "".join(traceback.format_exception(error)[-3:])
    if time.monotonic() - began > LONGEST:
        outcome = "blocked"
    for left in torture.folder.glob("trial-*"):
        shutil.rmtree(left, ignore_errors=True)
    return outcome, detail


def main() -> None:
    """Make all trials that the result file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=float, default=1.0, metavar="SHARE", help="share of the trials of each kind")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the kinds whose name contains this")
    parser.add_argument("--minutes", type=float, default=600.0, help="make no trial later; start again to go on")
    parser.add_argument("--kind", choices=KINDS, help="repeat one trial of this kind")
    parser.add_argument("--number", type=int, default=0, help="which one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "torture.json")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    # Orbax abandons coroutines and threads where a file is damaged, and writes about it.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sys.unraisablehook = threading.excepthook = lambda _: None
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(Path(folder))
        if options.kind:
            raise SystemExit("\n".join(trial(torture, options.kind, options.number)))
        result = json.loads(options.out.read_text()) if options.out.exists() else {"kinds": {}, "bad": []}
        for kind, full in TRIALS.items():
            counts = Counter(result["kinds"].get(kind, {}))
            while options.only in kind and counts.total() < full * options.trials and time.monotonic() < end:
                outcome, detail = trial(torture, kind, counts.total())
                if outcome not in GOOD:
                    result["bad"].append({"kind": kind, "number": counts.total(), "outcome": outcome, "error": detail})
                    print(result["bad"][-1], flush=True)
                counts[outcome] += 1
                result["kinds"][kind] = dict(counts)
                if counts.total() % 100 == 0:
                    write(options.out, result)
            print(kind, dict(counts), flush=True)
        write(options.out, result)


def write(out: Path, result: dict[str, Any]) -> None:
    """Write the result file with the sums by outcome."""
    sums = sum((Counter(counts) for counts in result["kinds"].values()), Counter())
    whole = {
        "command": "python benchmarks/torture.py",
        "trials": sums.total(),
        "outcomes": dict(sums),
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__, "pae_jax": pae.__version__},
        "kinds": result["kinds"],
        "bad": result["bad"],
    }
    files.write_bytes(out, (json.dumps(whole, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
