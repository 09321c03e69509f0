"""`Run`: the folder of a lifelong run. Stages, records, events, a table; whatever is killed goes on from here."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pae_jax import checkpoint
from pae_jax.controller import StageRecord
from pae_jax.errors import ArgumentError, CheckpointError
from pae_jax.metrics import AccuracyMatrix
from pae_jax.network import Net
from pae_jax.pruning import check_choice
from pae_jax.state import State

FROZEN = "frozen"


@dataclass
class Stage:
    """A stage of a task: its record, and the network, read from disk only when asked for."""

    record: StageRecord
    load: Callable[[], State]


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

    Example:
      >>> import tempfile, pae_jax as pae
      >>> run = pae.Run(tempfile.mkdtemp())
      >>> run.rows
      []
    """

    def __init__(self, path: str | Path, *, keep: Literal["frozen", "all"] = "frozen"):
        check_choice("keep", keep, ("frozen", "all"))
        self.path, self.keep = Path(path).absolute(), keep
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; a run is a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        self._accuracies: list[tuple[str, dict[str, float]]] = []
        saved = self.path / "accuracy.json"
        if saved.exists():
            self._accuracies = [(row["after"], row["accuracies"]) for row in json.loads(saved.read_text())]
        self._writer = _scalars(self.path / "tensorboard")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of `stages.csv` that this process has made or met again."""
        return list(self._rows.values())

    @property
    def matrix(self) -> AccuracyMatrix | None:
        """Accuracies after each task, None before the first."""
        if not self._accuracies:
            return None
        matrix = AccuracyMatrix([after for after, _ in self._accuracies])
        for after, accuracies in self._accuracies:
            for task, value in accuracies.items():
                matrix.record(after, task, value)
        return matrix

    def accuracies(self, after: str) -> dict[str, float] | None:
        """Return what `record_accuracies` was given after a task, None if nothing."""
        return next((dict(row) for name, row in self._accuracies if name == after), None)

    def record_accuracies(self, after: str, accuracies: Mapping[str, float]) -> None:
        """Enter a row of the accuracy matrix: the accuracy of each task so far, after the newest was learned."""
        self._accuracies = [row for row in self._accuracies if row[0] != after] + [(after, dict(accuracies))]
        rows = [{"after": name, "accuracies": row} for name, row in self._accuracies]
        write_text(self.path / "accuracy.json", json.dumps(rows, indent=1) + "\n")

    def log(self, event: str, **facts: Any) -> None:
        """Append a line to `events.jsonl`."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **facts})
        with (self.path / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    def task_folder(self, name: str, settings: Mapping[str, Any]) -> TaskFolder:
        """Return the folder of a task, new or as an earlier process with the same settings left it.

        Args:
          name: of the folder, such as "02-gender".
          settings: JSON that decides what the task's stages hold: recipe, key, data, the network before it.

        Raises:
          CheckpointError: the folder was begun with other settings; names the first that differs.
        """
        folder = self.path / re.sub(r"[^\w.-]+", "_", name)
        record, mine = folder / "settings.json", json.loads(json.dumps(settings))
        if record.exists():
            _require_same(json.loads(record.read_text()), mine, folder)
            for left in folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(record, json.dumps(mine, indent=1) + "\n")
        return TaskFolder(self, folder)

    def enter(self, record: StageRecord) -> None:
        """Enter a stage into the table and write it."""
        row = {"Task": record.task, "Stage": record.stage, "Size ratio": f"{record.width**2:.5g}"}
        row |= {"Pruned rate": f"{record.pruned:.5f}", "Acc": f"{record.value:.5f}", "Epoch No.": record.kept_epoch}
        row |= {name: f"{value:.3f}" for name, value in record.sizes.items()}
        self._rows[record.task, record.stage] = row
        names = list(dict.fromkeys(name for known in self._rows.values() for name in known))
        text = io.StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(self._rows.values())
        write_text(self.path / "stages.csv", text.getvalue())

    def scalars(self, record: StageRecord) -> None:
        """Write the epochs of a new stage for TensorBoard."""
        if self._writer is None:
            return
        first = record.epochs - len(record.history)
        for number, row in enumerate(record.history, first + 1):
            for name, value in row.items():
                self._writer.add_scalar(f"{record.task}/{name}", value, number)
        self._writer.add_scalar(f"{record.task}/pruned", record.pruned, record.epochs)
        self._writer.flush()


class TaskFolder:
    """Stages of one task on disk."""

    def __init__(self, run: Run, path: Path):
        self.run, self.path = run, path

    def find(self, net: Net, label: str, heads: Mapping[str, Any]) -> Stage | None:
        """Return a stage that an earlier process has finished, None if there is none."""
        folder, failure = self.path / label, self.path / f"{label}.json"
        if failure.exists():
            return Stage(StageRecord.from_json(json.loads(failure.read_text())), _no_network)
        if not folder.exists():
            return None
        metadata = checkpoint.read_metadata(folder)["metadata"]
        return Stage(StageRecord.from_json(metadata["record"]), lambda: checkpoint.load(net, folder, heads=heads))

    def put(self, label: str, record: StageRecord, state: State | None, more: Mapping[str, Any]) -> None:
        """Write a stage; without a state, only the record of its failure."""
        if state is None:
            write_text(self.path / f"{label}.json", json.dumps(record.to_json()) + "\n")
        else:
            checkpoint.save(self.path / label, state, {"record": record.to_json(), **more})

    def metadata(self, label: str) -> dict[str, Any]:
        """Return what was stored beside a stage."""
        return checkpoint.read_metadata(self.path / label)["metadata"]

    def write_records(self, records: list[StageRecord]) -> None:
        """Write the records of all stages that were tried, which outlive the stages."""
        write_text(self.path / "records.json", json.dumps([record.to_json() for record in records], indent=1) + "\n")

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


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def _no_network() -> State:
    raise ArgumentError("a diverged stage has no network")


def _require_same(found: Any, mine: Any, folder: Path) -> None:
    if isinstance(found, dict) and isinstance(mine, dict):
        for name in sorted(found.keys() | mine.keys()):
            if found.get(name) != mine.get(name):
                raise CheckpointError(
                    f"{folder} was begun with other settings: '{name}' was {found.get(name)!r} and is now "
                    f"{mine.get(name)!r}. Use the same, or another run folder."
                )


def _scalars(path: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return SummaryWriter(str(path))
