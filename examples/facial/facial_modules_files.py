"""The folder of a run of facial_modules.py: JSON files that are never half written, and the settings of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pae_jax.errors import CheckpointError
from pae_jax.reports import write_json


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); restore it, or pass another --out") from error


def check_folder(out: Path) -> None:
    """Raise `CheckpointError` unless a folder is new, or holds runs or the images stored for one."""
    known = any((folder / "settings.json").exists() for folder in (out, *out.glob("fold-*")))
    if out.is_file() or (out.is_dir() and not known and any(path.name != "cache" for path in out.iterdir())):
        raise CheckpointError(f"{out}: is a file or holds what this program did not make; pass another --out")


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder of the run, or check that it was started with the same settings."""
    record, mine = out / "settings.json", json.loads(json.dumps(settings))
    if record.exists() and read_json(record) != mine:
        raise CheckpointError(f"{out} was begun with other settings ({record}); pass another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(record, mine)


def open_phases(out: Path, settings: dict[str, dict[str, Any]], begun: dict[str, bool]) -> None:
    """Make the folder of a run, or check that the phases that have begun were started with the same settings."""
    record, mine = out / "settings.json", json.loads(json.dumps(settings))
    before = read_json(record) if record.exists() else mine
    for phase in mine:
        if begun[phase] and before.get(phase) != mine[phase]:
            raise CheckpointError(f"{out}: {phase} was begun with other settings ({record}); pass another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(record, mine)
