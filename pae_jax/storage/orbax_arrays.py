"""Arrays on disk, by Orbax. The only file that imports it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as orbax
from orbax.checkpoint import v1 as ocp

from pae_jax.errors import CheckpointError, PaeError
from pae_jax.trees import Tree

JSON = "_CHECKPOINT_METADATA"
HALF = ".orbax-checkpoint-tmp"
_ONE_AT_A_TIME = threading.Lock()  # Orbax numbers the saves of a process: two at once remove each other's folders


def write(path: Path, arrays: Tree, facts: dict[str, Any]) -> None:
    """Write arrays and JSON to a new folder; in a job of several processes one of them does, and waits for none."""
    if jax.process_count() == 1:
        with _ONE_AT_A_TIME, _folders_first():
            ocp.save(str(path), arrays, custom_metadata=facts)
        return
    # Orbax's present interface waits for all processes; its older one, of the same format, can be told not to.
    alone = orbax.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="pae")
    handler = orbax.CompositeCheckpointHandler(
        state=orbax.StandardCheckpointHandler(multiprocessing_options=alone),
        composite_options=orbax.CompositeOptions(multiprocessing_options=alone),
    )
    with _ONE_AT_A_TIME, orbax.Checkpointer(handler, multiprocessing_options=alone) as writer:
        writer.save(path, args=orbax.args.Composite(state=orbax.args.StandardSave(arrays)), custom_metadata=facts)


def _folders_first() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which Orbax makes its folders before it writes into them, in no other thread."""
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    return context


def write_together(path: Path, arrays: Tree, facts: dict[str, Any], members: Collection[int]) -> None:
    """Write arrays that are spread over processes: each of them makes this call, and writes what it has."""
    context = ocp.Context()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = min(members), set(members)
    with _ONE_AT_A_TIME, context:
        ocp.save(str(path), arrays, custom_metadata=facts)


def read(path: Path, stored: Tree) -> Tree:
    """Return arrays, in the memory of the host or, where `stored` has a sharding, on its devices."""
    with _alone():
        return ocp.load(str(path), jax.tree.map(_target, stored))


def shapes(path: Path) -> Tree:
    """Return shapes and dtypes as Orbax has stored them."""
    with errors(f"{path} is not a complete Orbax checkpoint"), _alone():
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), ocp.metadata(str(path)).metadata)


def _target(leaf: jax.ShapeDtypeStruct) -> Any:
    """Return what asks Orbax for an array in the memory of the host, or on the devices of a sharding."""
    return np.empty(leaf.shape, leaf.dtype) if leaf.sharding is None else leaf


def _alone() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which Orbax waits for no other process."""
    context, me = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
    return context


@contextlib.contextmanager
def errors(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever Orbax and TensorStore raise for a full disk or a damaged file into a `CheckpointError`."""
    try:
        yield
    except PaeError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {error}. {advice}".rstrip()) from error
