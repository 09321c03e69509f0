"""A stage of arrays that are spread over several processes: all of them write it together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from pae_jax import files
from pae_jax.core import State, integrity, spread_arrays
from pae_jax.errors import CheckpointError
from pae_jax.processes import Processes, together
from pae_jax.storage import orbax_arrays, stage
from pae_jax.trees import Tree, flatten


def save_together(path: Path, state: State, extra: dict[str, Any], timeout: float) -> None:
    """Write a stage; every process that has a part of the arrays makes this call.

    Each writes, syncs and reads back what it has; then the first gives the stage its name. Before that there is no
    stage, whatever stops one of them.

    Args:
      path: the folder, which all of them see.
      state: the network; its structural laws are checked first.
      extra: JSON that is kept with it.
      timeout: seconds in which all of them must make the call.

    Raises:
      StructureError: the state breaks a structural law.
      CheckpointError: the folder exists or cannot be written, or the disk is full.
      ProcessError: another process failed, does not make the call, or saves something else.
    """
    with together("save", spread_arrays.over_processes(state), timeout) as processes:
        processes.ask("folder", lambda: files.require_new(path, "stage"))
        integrity.check(state)
        arrays = jax.tree.map(_global, stage.arrays_of(state))
        facts = stage.describe(state, arrays, extra)
        processes.require_same("the stage", {"path": str(path), **facts})
        with orbax_arrays.errors(f"cannot write the stage {path}", "Earlier stages are untouched."):
            _write(processes, path, arrays, files.sealed(facts))


def _write(processes: Processes, path: Path, arrays: Tree, facts: dict[str, Any]) -> None:
    if not processes.first:
        _part(processes, Path(processes.ask("aside", str)), arrays, facts)
        processes.ask("name", lambda: None)
        return
    files.make_folder(path.parent)
    with files.folder_aside(path.parent) as aside:
        folder = aside / "stage"
        _part(processes, Path(processes.ask("aside", lambda: str(folder))), arrays, facts)
        processes.ask("name", lambda: files.rename_new(folder, path, "stage"))
        files.sync_folder(path.parent)


def _part(processes: Processes, folder: Path, arrays: Tree, facts: dict[str, Any]) -> None:
    """Write and check what this process has, and wait for the others."""
    orbax_arrays.write_together(folder, arrays, facts, processes.members)
    files.sync_tree(folder)
    found = flatten(orbax_arrays.read(folder, jax.tree.map(_like, arrays)))
    for name, leaf in flatten(arrays).items():
        if not _same(leaf, found[name]):
            raise CheckpointError(f"{folder} was read back otherwise than it was written: '{name}' differs")
    processes.meet("written")


def _global(leaf: Any) -> Any:
    """Return an array as Orbax takes it: spread over processes, or in the memory of each host."""
    return leaf if spread_arrays.is_elsewhere(leaf) else np.asarray(leaf)


def _like(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _same(one: Any, other: Any) -> bool:
    """Return whether what this process has of two arrays has the same bits."""
    if isinstance(one, np.ndarray):
        return one.tobytes() == np.asarray(other).tobytes()
    pairs = zip(one.addressable_shards, other.addressable_shards, strict=True)
    return all(np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes() for a, b in pairs)
