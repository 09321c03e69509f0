"""A stage or a bundle as a state without its network: everything can be checked, nothing computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pae_jax.checks import local_path
from pae_jax.core import Growth, Picking, State, TaskState, integrity, layout_of
from pae_jax.errors import ArgumentError
from pae_jax.storage import checkpoint, stage
from pae_jax.storage.bundle.assembling import Placeholder, understood
from pae_jax.storage.bundle.reading import open_bundle
from pae_jax.trees import Tree
from pae_jax.widening import WidenMaps


def open_any(path: str | Path, onto: State | None = None) -> tuple[dict[str, Any], State]:
    """Return what a stage or a bundle says of itself, and its state; heads that are modules are known by name alone.

    Args:
      path: the folder of a stage or the file of a bundle.
      onto: the state that a delta adds to.
    """
    place = local_path(path)
    if place.is_file():
        return open_bundle(place, onto)
    refuse_onto(place, onto)
    return _open_stage(place)


def refuse_onto(path: Path, onto: State | None) -> None:
    """Raise `ArgumentError` if a stage, which is whole, is read as a delta."""
    if onto is not None:
        raise ArgumentError(f"{path} is a stage, which holds all of its tasks; read it without a base")


@understood()
def _open_stage(path: Path) -> tuple[dict[str, Any], State]:
    info, stored = checkpoint.contents(path)
    arrays, tasks = jax.tree.map(jnp.asarray, checkpoint.read_arrays(path, info, stored)), {}
    for entry in info["tasks"]:
        tasks[entry["name"]] = _task(entry, arrays["shared"], arrays.get("tasks", {}).get(str(entry["id"]), {}))
    local = arrays.get("local", {}) if info.get("backbone_local", info.get("pretrained_local")) else None
    state = State(
        shared=arrays["shared"],
        owner=arrays["owner"],
        tasks=tasks,
        width=info["width"],
        growth=tuple(Growth(g["narrow"], g["wide"], WidenMaps.from_json(g["maps"])) for g in info["growth"]),
        local=local,
        layout=layout_of(shared=arrays["shared"], local=local or {}),
    )
    state = stage.join(state, info, arrays)
    integrity.check(state)
    return info, state


def _task(entry: dict[str, Any], shared: Tree, parts: dict[str, Tree]) -> TaskState:
    """Return the record of a task before its arrays are joined to it."""
    local, head, pick = (parts.get(part, {}) for part in ("local", "head", "pick"))
    spec = entry["head"]
    return TaskState(
        local=local,
        head=head,
        digests=integrity.no_digests(shared, local, head, shared if "pick" in parts else None),
        pick=pick if "pick" in parts else None,
        id=entry["id"],
        width=entry["width"],
        head_spec=Placeholder.of(spec) if isinstance(spec, str) else spec,
        layout=layout_of(local=local, head=head),
        sharing=entry["sharing"],
        picking=None if entry.get("picking") is None else Picking(**entry["picking"]),
        program=entry.get("program", ""),
    )
