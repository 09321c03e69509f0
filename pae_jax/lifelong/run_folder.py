"""`Run`: the folder of a lifelong run. Stages, records, events, a table; whatever is killed goes on from here."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from pae_jax import files
from pae_jax.checks import check_choice, check_flag, check_number, local_path
from pae_jax.errors import CheckpointError
from pae_jax.lifelong.metrics import AccuracyMatrix
from pae_jax.lifelong.policy import StageRecord
from pae_jax.lifelong.task_folder import FROZEN, TaskFolder
from pae_jax.processes import Processes
from pae_jax.storage import read_metadata


class Run:
    """A folder that holds a lifelong run; the same calls with the same folder go on where they were stopped.

    The folder has `01-name/` per task with its stages, `stages.csv` with one row per stage in the columns of the
    paper's code, `events.jsonl` with what happened when, `accuracy.json` with the accuracy matrix, `order.json` with
    the order of the tasks of each stream, and TensorBoard scalars in `tensorboard/` if the package tensorboardX is
    installed.

    Each stage has its checksum and the settings that it was made with. All other files are made from the stages:
    `settings.json`, `records.json` and `stages.csv` are made again where they are lost or damaged. Text is UTF-8.
    A run that would go on with another model, loss, data, recipe, key, network before the task, or with other numeric
    settings of JAX is refused by name. Not known are: batches of a factory or an iterator, what a measure reads from
    outside, the attributes of an object that a function has captured, XLA's flags, the machine, and the versions of
    packages other than JAX.

    Several jobs may use one run for different tasks. Of two that learn the same task, the second waits.

    Of the processes of one job, which all make it, process 0 alone writes; all of them must see the folder. A run may
    go on with another number of processes: what is frozen is the same bits, later sums may be in another order.

    Args:
      path: the folder, on this machine; made if need be. `~` is the home folder.
      keep: "frozen" removes the other stages of a task when it is frozen, "all" keeps them.
      wait: seconds to wait for another job that uses the same files; then a `CheckpointError` names that job.
      background: train on while the last stage is written, as by `save(wait=False)`; one stage at a time, which costs
        the bytes of the network in host memory. `learn` returns or raises once all are written, and stages and table
        are the same. A kill also loses the stage that is being written, and the training since then.

    Raises:
      CheckpointError: the path is a file, is remote, or cannot be made.
      ArgumentError: an argument out of its range.

    Example:
      >>> import tempfile, pae_jax as pae
      >>> run = pae.Run(tempfile.mkdtemp())
      >>> run.rows
      []
    """

    def __init__(
        self,
        path: str | Path,
        *,
        keep: Literal["frozen", "all"] = "frozen",
        wait: float = 60.0,
        background: bool = False,
    ):
        check_choice("keep", keep, ("frozen", "all"))
        check_flag("background", background)
        self.path, self.keep, self.wait = local_path(path), keep, check_number("wait", wait, 0.0)
        self.background = background
        self._writer: Any = None
        if not self._writes:
            return
        with files.disk_errors(f"cannot use the run folder {self.path}"):
            if self.path.exists() and not self.path.is_dir():
                raise CheckpointError(f"{self.path} is a file; a run is a folder")
            files.make_folder(self.path)
            files.remove_leftovers(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, keep={self.keep!r})"

    @property
    def _writes(self) -> bool:
        """Whether this process writes."""
        return not jax.process_index()

    @property
    def rows(self) -> list[dict[str, str]]:
        """Rows of `stages.csv`."""
        return [_row(record) for folder in self._folders() for record in folder.records()]

    @property
    def matrix(self) -> AccuracyMatrix | None:
        """Accuracies after each task of the stream that was measured last, None before the first."""
        rows = self._accuracies()
        stages = rows[-1].get("stages") if rows else None
        if stages is not None:
            rows = [row for row in rows if row.get("stages", {"": ""}).items() <= stages.items()]
        elif rows:
            # A row of an earlier version does not say its folder; one of a task with several may be of any of them.
            several = self._tasks_of_several_folders()
            rows = [row for row in rows if "stages" not in row and folder_name("", row["after"]) not in several]
        return matrix_of({row["after"]: row["accuracies"] for row in rows})

    def stage_digest(self, folder: str) -> str:
        """Return the digest of the frozen stage of a task's folder: of its arrays and of what it was made with."""
        return read_metadata(self.path / folder / FROZEN)["sha256"]

    def accuracies(self, folder: str, stages: Mapping[str, str]) -> dict[str, float]:
        """Return which accuracies are known after a task was learned.

        Args:
          folder: of the task.
          stages: `{task: digest of its frozen stage}` of the tasks to measure, this one last. What was measured of
            another stage is not known.
        """
        row = next((row for row in self._accuracies() if row.get("folder") == folder), {"stages": {}})
        known, after = row["stages"], list(stages)[-1]
        if known.get(after) != stages[after]:
            return {}
        return {task: row["accuracies"][task] for task, digest in stages.items() if known.get(task) == digest}

    def record_accuracies(self, folder: str, accuracies: Mapping[str, float], stages: Mapping[str, str]) -> None:
        """Enter a row of the accuracy matrix: the accuracy of each task so far, after the newest was learned.

        Args:
          folder: of the newest task.
          accuracies: of each task, the newest last.
          stages: of the same tasks, as for `accuracies`.
        """
        if not self._writes:
            return
        after = list(accuracies)[-1]
        row = {"after": after, "folder": folder, "accuracies": dict(accuracies), "stages": dict(stages)}
        with self.lock():
            self._write_accuracies([*self._accuracies_but(folder, after), row])

    def _forget_accuracies(self, folder: str, task: str) -> None:
        """Take out what was measured after the task of a folder was learned."""
        if self._writes:
            with self.lock():
                kept = self._accuracies_but(folder, task)
                if kept != self._accuracies():
                    self._write_accuracies(kept)

    def _accuracies_but(self, folder: str, task: str) -> list[dict[str, Any]]:
        """Return the rows but that of a folder of a task, and but one that does not say which folder it is of."""
        return [row for row in self._accuracies() if row["after"] != task or row.get("folder", folder) != folder]

    def _write_accuracies(self, rows: list[dict[str, Any]]) -> None:
        files.write_sealed(self.path / "accuracy.json", {"rows": rows})

    def _tasks_of_several_folders(self) -> set[str]:
        names = [re.sub(r"^\d+-", "", folder.path.name) for folder in self._folders()]
        return {name for name in names if names.count(name) > 1}

    def require_order(self, tasks: list[str] | int, order: list[int]) -> bool:
        """Raise `CheckpointError` if a stream was begun in another order; return whether its order is recorded.

        Args:
          tasks: names in the order in which they were passed, or their number where they are created on access.
          order: their positions in the order of learning.
        """
        known = [stream["order"] for stream in self._streams() if stream["tasks"] == tasks]
        if known and order not in known:
            raise CheckpointError(
                f"{self.path} was begun with other settings: the order of tasks was {known[0]} (by position) and is "
                f"now {order}. Pass the same order=, or another run folder."
            )
        return bool(known)

    def record_order(self, tasks: list[str] | int, order: list[int]) -> None:
        """Record in which order a stream is learned, as for `require_order`."""
        if self._writes and not self.require_order(tasks, order):
            with self.lock():
                streams = [*self._streams(), {"tasks": tasks, "order": order}]
                files.write_sealed(self.path / "order.json", {"streams": streams})

    def _streams(self) -> list[dict[str, Any]]:
        path = self.path / "order.json"
        with files.disk_errors(f"cannot read {path}"):
            if not path.exists():
                return []
        try:
            return list(files.read_sealed(path)["streams"])
        except (CheckpointError, KeyError, TypeError) as error:
            raise CheckpointError(f"{error}. Remove {path}; it only says in which order tasks are learned.") from error

    def log(self, event: str, facts: Mapping[str, str | float | None], *, once: bool = False) -> None:
        """Append a line to `events.jsonl`; numbers that are not finite are null.

        Args:
          event: what happened.
          facts: to which folder, in which stage, and what came of it.
          once: whether a line of the same event, folder and stage is enough.
        """
        if not self._writes:
            return
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}
        if once and _which({"event": event, **known}) in self._events():
            return
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **known}
        with self.lock():
            text = json.dumps({**line, "crc32": _crc(line)}, allow_nan=False)
            files.append_line(self.path / "events.jsonl", text)

    @contextlib.contextmanager
    def task_folder(self, name: str, settings: Mapping[str, Any], processes: Processes) -> Iterator[TaskFolder]:
        """Yield the folder of a task, new or as an earlier process with the same settings left it.

        While it is open no other job can write into it; one of a finished task is only read. It closes once all of its
        stages are on the disk.

        Args:
          name: of the folder, by `folder_name`.
          settings: JSON that decides what the task's stages hold: recipe, key, data, the network before it. Its
            "task" is the name in the table.
          processes: those that learn the task.

        Raises:
          CheckpointError: the folder was begun with other settings, of which the first that differs is named; it is
            damaged; or another job is learning the task.
        """
        folder = TaskFolder(self.path / name, json.loads(json.dumps(settings)), processes, self.background)
        with contextlib.ExitStack() as stack:
            processes.ask(f"folder {name}", lambda: self._open(folder, settings["task"], stack))
            with folder.closing():
                yield folder

    def _open(self, folder: TaskFolder, task: str, stack: contextlib.ExitStack) -> None:
        """Lock the folder of a task for as long as `stack` is open, and make it ready."""
        with files.disk_errors(f"cannot use the folder {folder.path}"):
            in_use = not folder.is_finished() or (folder.path / ".lock").exists()
            if in_use:
                files.make_folder(folder.path)
        if in_use:
            stack.enter_context(files.locked(folder.path / ".lock", self.wait))
        if not folder.resume():
            with self.lock():
                number = 1 + max((one.number for one in self._folders()), default=0)
                folder.begin(number)
            # Whatever the run knows of this folder comes from one that is no longer there.
            self._forget_accuracies(folder.path.name, task)

    def write_table(self) -> None:
        """Write `stages.csv` with a row for each stage that is on disk; nothing if it is as it should be."""
        if not self._writes:
            return
        path = self.path / "stages.csv"
        with contextlib.suppress(CheckpointError):
            if files.read_bytes(path) == _table(self.rows):
                return
        with self.lock():
            files.write_bytes(path, _table(self.rows))

    def scalars(self, record: StageRecord) -> None:
        """Write the epochs of a new stage for TensorBoard, if tensorboardX is installed."""
        if not self._writes:
            return
        if self._writer is None:
            self._writer = _scalars(self.path / "tensorboard")
        if not self._writer:
            return
        task = record.task.encode(errors="backslashreplace").decode()
        with files.disk_errors(f"cannot write {self.path / 'tensorboard'}"):
            first = record.epochs - len(record.history)
            for number, row in enumerate(record.history, first + 1):
                for name, value in row.items():
                    if name != "epoch":
                        self._writer.add_scalar(f"{task}/{name}", value, number)
            self._writer.add_scalar(f"{task}/pruned", record.pruned, record.epochs)
            self._writer.flush()

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the files that all tasks of the run share."""
        return files.locked(self.path / ".lock", self.wait)

    def _folders(self) -> list[TaskFolder]:
        """Return the folders of tasks in the order in which they were begun."""
        with files.disk_errors(f"cannot read the run folder {self.path}"):
            paths = sorted(entry for entry in self.path.iterdir() if entry.is_dir())
        folders = [
            TaskFolder(path, None, Processes(), False) for path in paths if not path.name.startswith(files.ASIDE)
        ]
        return sorted((folder for folder in folders if folder.number), key=lambda folder: folder.number)

    def _accuracies(self) -> list[dict[str, Any]]:
        """Return the rows of `accuracy.json`; those of an earlier version have neither a folder nor stages."""
        path = self.path / "accuracy.json"
        with files.disk_errors(f"cannot read {path}"):
            if not path.exists():
                return []
        try:
            rows = list(files.read_sealed(path)["rows"])
            for row in rows:
                _ = row["after"], dict(row["accuracies"]), dict(row["stages"] if "folder" in row else {})
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{error}. Remove {path}; what it held is measured again.") from error
        return rows

    def _events(self) -> set[tuple[Any, ...]]:
        """Return which events were logged; lines that are damaged were not."""
        path, found = self.path / "events.jsonl", set()
        with files.disk_errors(f"cannot read {path}"):
            lines = files.read_bytes(path).splitlines() if path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):
                event = json.loads(line)
                if event.pop("crc32", None) == _crc(event):
                    found.add(_which(event))
        return found


def folder_name(prefix: str, task: str) -> str:
    """Return the name of a task's folder, in ASCII on any system; a name that had to be changed has a hash, too."""
    kept = re.sub(r"[^A-Za-z0-9_.-]+", "_", task)[:80]
    if kept == task:
        return prefix + task
    return f"{prefix}{kept}-{hashlib.sha256(task.encode(errors='surrogatepass')).hexdigest()[:8]}"


def matrix_of(rows: Mapping[str, Mapping[str, float]]) -> AccuracyMatrix | None:
    """Return the matrix of `{after: {task: accuracy}}`, in order of learning; None if empty."""
    if not rows:
        return None
    matrix = AccuracyMatrix(list(rows))
    for after, accuracies in rows.items():
        for task, value in accuracies.items():
            matrix.record(after, task, value)
    return matrix


def _row(record: StageRecord) -> dict[str, str]:
    before = {"Task": record.task, "Stage": record.stage, "Size ratio": f"{record.width**2:.5g}"}
    before |= {"Pruned rate": f"{record.pruned:.5f}"}
    after = {"Epoch No.": str(record.kept_epoch)} | {name: f"{value:.3f}" for name, value in record.sizes.items()}
    metric = "Acc" if record.metric == "accuracy" else record.metric
    if metric in before | after:
        metric = f"{metric} (metric)"
    return before | {metric: f"{record.value:.5f}"} | after


def _table(rows: list[dict[str, str]]) -> bytes:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")


def _which(event: Mapping[str, Any]) -> tuple[Any, ...]:
    return event.get("event"), event.get("folder"), event.get("stage")


def _crc(line: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(line, sort_keys=True).encode()):08x}"


def _scalars(path: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return SummaryWriter(str(path))
