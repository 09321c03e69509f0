"""`Run`: the folder of a lifelong run. Stages, records, events, a table; whatever is killed goes on from here."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from pae_jax.checks import check_choice
from pae_jax.core import State, find, integrity, names
from pae_jax.errors import ArgumentError, CheckpointError
from pae_jax.lifelong.metrics import AccuracyMatrix
from pae_jax.lifelong.policy import Stage, StageRecord
from pae_jax.lifelong.recipes import Recipe, plain
from pae_jax.lifelong.task import Task
from pae_jax.nets import Net, heads
from pae_jax.storage import checkpoint
from pae_jax.trees import describe, flatten

FROZEN = "frozen"


class Run:
    """A folder that holds a lifelong run; the same calls with the same folder go on where they were stopped.

    The folder has `01-name/` per task with its stages, `stages.csv` with one row per stage in the columns of the
    paper's code, `events.jsonl` with what happened when, `accuracy.json` with the accuracy matrix, and TensorBoard
    scalars in `tensorboard/` if the package tensorboardX is installed.

    Args:
      path: the folder; made if need be.
      keep: "frozen" removes the other stages of a task once it is frozen, "all" keeps them.

    Raises:
      CheckpointError: the path is a file.
      ArgumentError: several processes of a distributed run.

    Example:
      >>> import tempfile, pae_jax as pae
      >>> run = pae.Run(tempfile.mkdtemp())
      >>> run.rows
      []
    """

    def __init__(self, path: str | Path, *, keep: Literal["frozen", "all"] = "frozen"):
        check_choice("keep", keep, ("frozen", "all"))
        self.path, self.keep = Path(path).absolute(), keep
        if jax.process_count() > 1:
            raise ArgumentError(f"a run is written by one process, found {jax.process_count()}; learn without run=")
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; a run is a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._rows: dict[tuple[str, str], dict[str, str]] = {}
        self._accuracies: list[tuple[str, dict[str, float]]] = []
        table, saved = self.path / "stages.csv", self.path / "accuracy.json"
        if table.exists():
            # A process that is stopped before it has met all stages again must not make the table shorter.
            rows = csv.DictReader(io.StringIO(table.read_text()))
            self._rows = {(row["Task"], row["Stage"]): {k: v for k, v in row.items() if v} for row in rows}
        if saved.exists():
            self._accuracies = [(row["after"], row["accuracies"]) for row in json.loads(saved.read_text())]
        self._writer: Any = None

    @property
    def rows(self) -> list[dict[str, str]]:
        """Rows of `stages.csv`."""
        return [dict(row) for row in self._rows.values()]

    @property
    def matrix(self) -> AccuracyMatrix | None:
        """Accuracies after each task, None before the first."""
        return matrix_of(dict(self._accuracies))

    def accuracies(self, after: str) -> dict[str, float] | None:
        """Return what `record_accuracies` was given after a task, None if nothing."""
        return next((dict(row) for name, row in self._accuracies if name == after), None)

    def record_accuracies(self, after: str, accuracies: Mapping[str, float]) -> None:
        """Enter a row of the accuracy matrix: the accuracy of each task so far, after the newest was learned."""
        self._accuracies = [row for row in self._accuracies if row[0] != after] + [(after, dict(accuracies))]
        rows = [{"after": name, "accuracies": row} for name, row in self._accuracies]
        write_text(self.path / "accuracy.json", _dumps(rows, indent=1))

    def log(self, event: str, facts: Mapping[str, str | float | None]) -> None:
        """Append a line to `events.jsonl`; numbers that are not finite are null."""
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}
        with (self.path / "events.jsonl").open("a") as file:
            file.write(_dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **known}))

    def task_folder(self, name: str, settings: Mapping[str, Any]) -> TaskFolder:
        """Return the folder of a task, new or as an earlier process with the same settings left it.

        Args:
          name: of the folder, such as "02-gender".
          settings: JSON that decides what the task's stages hold: recipe, key, data, the network before it. Its
            "task" is the name in the table.

        Raises:
          CheckpointError: the folder was begun with other settings; names the first that differs.
        """
        folder = self.path / re.sub(r"[^\w.-]+", "_", name)
        record, text = folder / "settings.json", _dumps(settings, indent=1)
        if record.exists():
            _require_same(json.loads(record.read_text()), json.loads(text), folder, "")
            for left in folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left)
        else:
            # Whatever the run knows of this task comes from a folder that is no longer there.
            self._rows = {key: row for key, row in self._rows.items() if key[0] != settings.get("task")}
            self._accuracies = [row for row in self._accuracies if row[0] != settings.get("task")]
            folder.mkdir(parents=True, exist_ok=True)
            write_text(record, text)
        return TaskFolder(self, folder)

    def enter(self, record: StageRecord) -> None:
        """Enter a stage into the table and write it."""
        metric = "Acc" if record.metric == "accuracy" else record.metric
        row = {"Task": record.task, "Stage": record.stage, "Size ratio": f"{record.width**2:.5g}"}
        row |= {"Pruned rate": f"{record.pruned:.5f}", metric: f"{record.value:.5f}"}
        row |= {"Epoch No.": str(record.kept_epoch)}
        row |= {name: f"{value:.3f}" for name, value in record.sizes.items()}
        if self._rows.get((record.task, record.stage)) == row:
            return
        self._rows[record.task, record.stage] = row
        columns = list(dict.fromkeys(name for known in self._rows.values() for name in known))
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self._rows.values())
        write_text(self.path / "stages.csv", text.getvalue())

    def scalars(self, record: StageRecord) -> None:
        """Write the epochs of a new stage for TensorBoard, if tensorboardX is installed."""
        if self._writer is None:
            self._writer = _scalars(self.path / "tensorboard")
        if not self._writer:
            return
        first = record.epochs - len(record.history)
        for number, row in enumerate(record.history, first + 1):
            for name, value in row.items():
                if name != "epoch":
                    self._writer.add_scalar(f"{record.task}/{name}", value, number)
        self._writer.add_scalar(f"{record.task}/pruned", record.pruned, record.epochs)
        self._writer.flush()


class TaskFolder:
    """Stages of one task on disk."""

    def __init__(self, run: Run, path: Path):
        self.run, self.path = run, path

    @property
    def finished(self) -> bool:
        """Whether the task is frozen."""
        return (self.path / FROZEN).exists()

    def find(self, net: Net, label: str, heads: Mapping[str, Any]) -> Stage | None:
        """Return a stage that an earlier process has finished, None if there is none."""
        folder, failure = self.path / label, self.path / f"{label}.json"
        if failure.exists():
            return Stage(StageRecord.from_json(json.loads(failure.read_text())), None)
        if not folder.exists():
            return None
        record = StageRecord.from_json(self.metadata(label)["record"])
        return Stage(record, lambda: checkpoint.load(net, folder, heads=heads))

    def put(self, label: str, record: StageRecord, state: State | None, more: Mapping[str, Any]) -> None:
        """Write a stage; without a state, only the record of its failure."""
        if state is None:
            write_text(self.path / f"{label}.json", _dumps(record.to_json()))
        else:
            checkpoint.save(self.path / label, state, {"record": record.to_json(), **more})

    def metadata(self, label: str) -> dict[str, Any]:
        """Return what was stored beside a stage."""
        return checkpoint.read_metadata(self.path / label)["metadata"]

    def write_records(self, records: list[StageRecord]) -> None:
        """Write the records of all stages that were tried, which outlive the stages."""
        write_text(self.path / "records.json", _dumps([record.to_json() for record in records], indent=1))

    def read_records(self) -> list[StageRecord]:
        """Return what `write_records` wrote."""
        return [StageRecord.from_json(record) for record in json.loads((self.path / "records.json").read_text())]

    def tidy(self) -> None:
        """Remove the stages that led to the frozen one, unless the run keeps them."""
        if self.run.keep == "all":
            return
        for entry in self.path.iterdir():
            if entry.is_dir() and entry.name != FROZEN:
                shutil.rmtree(entry)


def settings_of(
    state: State,
    task: Task,
    recipe: Recipe,
    key: jax.Array,
    goal: float | None,
    upcoming: int | None,
    title: str | None = None,
) -> dict[str, Any]:
    """Return what decides the stages of a task; a resumed run must have the same.

    Functions are known by their names alone; data that only iterating would show is not looked at.
    """
    older = {
        name: {p: row.hex() for p, row in integrity.recorded(state, find(state, name)).items()} for name in names(state)
    }
    network = {"tasks": older, "shared": _checksums(state.shared), "local": _checksums(state.local)}
    ladder = recipe.ladder
    counts_upcoming = ladder is not None and (ladder.equal_share or goal is not None or ladder.choose != "last")
    return {
        "task": title or task.name,
        "head": heads.describe(task.head),
        "loss": plain(task.loss),
        "loss_per": task.loss_per,
        "metric": plain(task.metric),
        "augment": plain(task.augment),
        "recipe": recipe.to_json(),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "goal": goal,
        "upcoming": upcoming if counts_upcoming else None,
        "width": state.width,
        "earlier network": zlib.crc32(json.dumps(network, sort_keys=True).encode()),
        "data": {name: _checksums(_arrays(getattr(task, name))) for name in ("train", "val", "test")},
    }


def matrix_of(rows: Mapping[str, Mapping[str, float]]) -> AccuracyMatrix | None:
    """Return the matrix of `{after: {task: accuracy}}`, in order of learning; None if empty."""
    if not rows:
        return None
    matrix = AccuracyMatrix(list(rows))
    for after, accuracies in rows.items():
        for task, value in accuracies.items():
            matrix.record(after, task, value)
    return matrix


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"


def _arrays(data: Any) -> Any:
    """Return data with its labels as an array, which lists may be."""
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], (list, tuple)):
        return data[0], np.asarray(data[1])
    return data


def _checksums(data: Any) -> Any:
    """Return `{path: dtype, shape and CRC-32}` of trees of arrays; None for anything else."""
    if not isinstance(data, (tuple, dict)):
        return None
    leaves = {name: leaf for name, leaf in flatten(data).items() if hasattr(leaf, "dtype")}
    flat = {name: np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for name, leaf in leaves.items()}
    return {name: f"{describe(leaves[name])} {zlib.crc32(found.data):08x}" for name, found in flat.items()}


def _require_same(found: Any, mine: Any, folder: Path, name: str) -> None:
    """Raise `CheckpointError` naming the first leaf in which two settings differ."""
    if isinstance(found, dict) and isinstance(mine, dict):
        for entry in [*mine, *(entry for entry in found if entry not in mine)]:
            _require_same(found.get(entry), mine.get(entry), folder, f"{name}.{entry}" if name else entry)
    elif isinstance(found, list) and isinstance(mine, list) and len(found) == len(mine):
        for position, pair in enumerate(zip(found, mine, strict=True)):
            _require_same(*pair, folder, f"{name}[{position}]")
    elif found != mine:
        raise CheckpointError(
            f"{folder} was begun with other settings: '{name}' was {found!r} and is now {mine!r}. Use the same, or "
            "another run folder."
        )


def _scalars(path: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return SummaryWriter(str(path))
