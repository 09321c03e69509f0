"""The folder of one task of a run: its stages, and what they were made with."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from pae_jax import files
from pae_jax.comparing import difference
from pae_jax.core import State
from pae_jax.errors import CheckpointError, PaeError
from pae_jax.lifelong.policy import Stage, StageRecord
from pae_jax.nets import Net
from pae_jax.processes import Processes
from pae_jax.storage import Saving, load, read_metadata, save

FROZEN = "frozen"
_LABEL = re.compile(rf"\d+-(trained|retrained|pruned-\d\.\d{{3}})|{FROZEN}")
_BEGUN = ("folder", "number", "settings")


class TaskFolder:
    """Stages of one task on disk.

    Each stage says of which folder it is, the how-manieth folder of its run, and with which settings it was made;
    `settings.json` repeats that, and is made again where it is lost.

    Of several processes that learn together the first one alone reads and writes the files; all of them read the
    arrays of a stage, so they must see the folder.

    Args:
      path: the folder.
      settings: what its stages must have been made with; None to read whatever is there.
      processes: those that learn the task.
      background: whether stages are written in the background, one at a time.
    """

    def __init__(self, path: Path, settings: dict[str, Any] | None, processes: Processes, background: bool):
        self.path, self._settings, self._processes, self._background = path, settings, processes, background
        self._made = 0
        self._saving: Saving | None = None

    @property
    def finished(self) -> bool:
        """Whether the task is frozen."""
        return self._processes.ask(f"{self.path.name} finished", self.is_finished)

    def is_finished(self) -> bool:
        """Return whether the task is frozen, without asking another process."""
        with files.disk_errors(f"cannot read {self.path}"):
            return (self.path / FROZEN).exists()

    @property
    def number(self) -> int:
        """Which folder of its run it is, from 1; 0 for a folder that is none of a task."""
        try:
            begun = self._begun
        except CheckpointError:  # that of another program; or settings and stages are damaged, which `resume` raises
            return 0
        return begun["number"] if begun is not None and begun.get("folder") == self.path.name else 0

    @functools.cached_property
    def _begun(self) -> dict[str, Any] | None:
        """What the folder was begun with: by `settings.json`, or by its stages; None if it was not begun."""
        try:
            return files.read_sealed(self.path / "settings.json", *_BEGUN)
        except CheckpointError:
            labels = [*self._stages(), *self._failures()]
            return self._facts(labels[0])["begun"] if labels else None

    def resume(self) -> bool:
        """Make sure that the settings are those of an earlier process; say whether there was one.

        Of one that has made no stage, the settings do not count.
        """
        files.remove_leftovers(self.path)
        begun = self._begun
        if begun is None:
            return False
        if self._stages() or self._failures():
            self._require_same(begun["settings"], self.path)
        self._begun = begun = {**begun, "settings": self._settings}
        try:
            known = files.read_sealed(self.path / "settings.json", *_BEGUN) == begun
        except CheckpointError:
            known = False
        if not known:
            files.write_sealed(self.path / "settings.json", begun)
        return True

    def begin(self, number: int) -> None:
        """Write down the settings of a folder that is new."""
        begun = {"folder": self.path.name, "number": number, "settings": self._settings}
        files.write_sealed(self.path / "settings.json", begun)
        self._begun = begun

    def find(self, net: Net, label: str, heads: Mapping[str, Any]) -> Stage | None:
        """Return a stage that an earlier process has finished, None if there is none."""
        found = self._processes.ask(f"{self.path.name} {label}", lambda: self._found(label))
        if found is None:
            return None
        record, failed = StageRecord.from_json(found[0]), found[1]
        self._made += 1
        return Stage(record, None if failed else lambda: self._load(net, label, heads))

    def _found(self, label: str) -> tuple[dict[str, Any], bool] | None:
        """Return the record of a stage on disk, and whether it failed."""
        with files.disk_errors(f"cannot read {self.path}"):
            whole, failed = (self.path / label).exists(), (self.path / f"{label}.json").exists()
        return (self._metadata(label)["record"], failed) if whole or failed else None

    def _load(self, net: Net, label: str, heads: Mapping[str, Any]) -> State:
        path = self.path / label
        if not self._processes.alone:
            if not path.is_dir():
                raise CheckpointError(
                    f"process {jax.process_index()} does not see {path}, which another process has written. Put the "
                    "run in a folder that all of them share."
                )
            self._processes.require_same(f"stage {path}", {"sha256": read_metadata(path)["sha256"]})
        return load(net, path, heads=heads)

    def put(self, label: str, record: StageRecord, state: State | None, more: Mapping[str, Any]) -> None:
        """Write a stage, or begin to in the background; without a state, only the record of its failure."""
        self._processes.ask(f"writing {self.path.name} {label}", lambda: self._write(label, record, state, more))
        self._made += 1

    def _write(self, label: str, record: StageRecord, state: State | None, more: Mapping[str, Any]) -> None:
        facts = {"record": record.to_json(), "position": self._made, "begun": self._begun, **more}
        if state is None:
            files.write_sealed(self.path / f"{label}.json", facts)
        elif self._background:
            self._saving = save(self.path / label, state, facts, wait=False)
        else:
            save(self.path / label, state, facts)

    def settle(self) -> None:
        """Return once what is written in the background is on the disk."""
        if self._background:
            self._processes.ask(f"written {self.path.name}", self._written)

    def _written(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.wait()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Wait at the end for what is written; what an error has left unwritten is a note of that error."""
        try:
            yield
        except BaseException as error:
            try:
                self._written()
            except PaeError as unwritten:
                error.add_note(str(unwritten))
            raise
        self._written()

    def metadata(self, label: str) -> dict[str, Any]:
        """Return what was stored beside a stage, or raise `CheckpointError` where that is of another stage or task."""
        return self._processes.ask(f"metadata of {self.path.name} {label}", lambda: self._metadata(label))

    def _metadata(self, label: str) -> dict[str, Any]:
        facts = self._facts(label)
        if self._settings is not None:
            self._require_same(facts["begun"]["settings"], self.path / label)
        return facts

    def records(self) -> list[StageRecord]:
        """Return the records of all stages that were tried, in order; the frozen one is the last."""
        found = self._processes.ask(f"records of {self.path.name}", self._records)
        return [StageRecord.from_json(record) for record in found]

    def _records(self) -> list[dict[str, Any]]:
        if self.is_finished():
            facts = self._metadata(FROZEN)
            return [*facts["records"], facts["record"]]
        try:
            found = [self._metadata(label) for label in (*self._stages(), *self._failures())]
        except CheckpointError:
            if self.is_finished():  # by another job, which has removed what led to the frozen stage
                return self._records()
            raise
        return [facts["record"] for facts in sorted(found, key=lambda facts: facts["position"])]

    def freeze(self, records: list[StageRecord], record: StageRecord, state: State, more: Mapping[str, Any]) -> None:
        """Write the last stage, with the records of all that were tried, which outlive their stages."""
        self.put(FROZEN, record, state, {**more, "records": [one.to_json() for one in records]})
        self.settle()

    def tidy(self, keep: str) -> None:
        """Once after freezing, remove the stages that led there unless all are kept; then write `records.json`."""
        if not self._processes.first:
            return
        path, facts = self.path / "records.json", {"records": self._metadata(FROZEN)["records"]}
        with contextlib.suppress(CheckpointError):
            if files.read_sealed(path) == facts:
                return
        if keep == "frozen":
            for label in self._stages():
                if label != FROZEN:
                    with files.disk_errors(f"cannot remove {self.path / label}"):
                        shutil.rmtree(self.path / label, ignore_errors=True)
        files.write_sealed(path, facts)

    def _facts(self, label: str) -> dict[str, Any]:
        """Return what was stored beside a stage, which must say that it is this one."""
        path = self.path / label
        with files.disk_errors(f"cannot read {path}"):
            whole = path.is_dir()
        facts = read_metadata(path)["metadata"] if whole else files.read_sealed(self.path / f"{label}.json")
        try:
            folder, _, _ = (facts["begun"][key] for key in _BEGUN)
            said = facts["record"]["stage"], folder
        except (KeyError, TypeError):
            raise CheckpointError(
                f"{path} does not say what it was made with: it is of another program or an earlier version. Remove "
                f"{self.path}, or use another run folder."
            ) from None
        if said != (label, self.path.name):
            raise CheckpointError(f"{path} is the stage {said[0]} of {said[1]}. Remove it; it is made again.")
        return facts

    def _require_same(self, found: Any, place: Path) -> None:
        """Raise `CheckpointError` naming the first leaf in which settings differ from those of this call."""
        other = difference(found, self._settings)
        if other is None:
            return
        name, was, now = other
        hint = "Use the same, or another run folder."
        if name == "upcoming":
            hint = f"{hint} To learn more tasks, start from the last network: learn_all(net, stream.state, more, ...)."
        elif not self.is_finished():
            hint = f"{hint[:-1]}, or remove {self.path} to learn this task anew."
        raise CheckpointError(f"{place} was begun with other settings: '{name}' was {was!r} and is now {now!r}. {hint}")

    def _stages(self) -> list[str]:
        with files.disk_errors(f"cannot read {self.path}"):
            entries = sorted(self.path.iterdir()) if self.path.exists() else []
            return [entry.name for entry in entries if entry.is_dir() and _LABEL.fullmatch(entry.name)]

    def _failures(self) -> list[str]:
        with files.disk_errors(f"cannot read {self.path}"):
            found = sorted(self.path.glob("*.json")) if self.path.exists() else []
        return [path.stem for path in found if _LABEL.fullmatch(path.stem)]
