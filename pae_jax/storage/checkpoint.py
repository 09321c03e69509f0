"""Stages on disk.

A stage is one folder, written aside, synced and renamed, so it is there completely or not at all. Arrays are Orbax's;
what they mean is readable JSON in the file `_CHECKPOINT_METADATA`. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax import files
from pae_jax.checks import check_flag, check_mapping, check_number, local_path
from pae_jax.core import Placement, State, check_values, integrity, placement, spread_arrays
from pae_jax.errors import ArgumentError, CheckpointError, PaeError
from pae_jax.nets import Net, check_net, require_program
from pae_jax.storage import joint_saving, orbax_arrays, stage
from pae_jax.storage.background import Saving, wait_for_last
from pae_jax.storage.shield import Decision, shielded
from pae_jax.trees import Tree, describe, flatten, require_match
from pae_jax.version import __version__

_HALF = (orbax_arrays.HALF, files.ASIDE)


@overload
def save(
    path: str | Path,
    state: State,
    metadata: Mapping[str, Any] | None = None,
    *,
    timeout: float = 60.0,
    wait: Literal[True] = True,
) -> None: ...


@overload
def save(
    path: str | Path,
    state: State,
    metadata: Mapping[str, Any] | None = None,
    *,
    timeout: float = 60.0,
    wait: Literal[False],
) -> Saving: ...


def save(
    path: str | Path,
    state: State,
    metadata: Mapping[str, Any] | None = None,
    *,
    timeout: float = 60.0,
    wait: bool = True,
) -> Saving | None:
    """Write a stage: one new folder that holds the whole state.

    It is there completely or not at all, whatever stops the process, and on the disk when this returns. Of two that
    write one path at once, one wins; the other raises. Ctrl-C stops it: no stage is written then.

    With `wait=False` it returns once it has checked the state and copied it to the memory of the host, and writes the
    copy in a thread. Whatever happens to the state's arrays then, such as a step that takes their buffers as its own
    (`donate_argnums`), does not reach the stage. It costs the bytes of the state in host memory until it is written.

    Args:
      path: the folder, on this machine; it must not exist, its parent is made if need be. `~` is the home folder.
      state: the network; its structural laws are checked first.
      metadata: anything JSON can say, such as metrics; `read_metadata` gives it back.
      timeout: seconds, in a job of several processes. Of arrays that all have whole process 0 writes, whether the
        others call or not; another one waits so long for what process 0 writes. Arrays that are spread over several
        processes they write together: each makes this call, with the same folder, within so many seconds.
      wait: whether to return only once the stage is on the disk.

    Returns:
      With `wait=False` a `Saving`: its `wait()` returns once the stage is on the disk, or raises. Otherwise None.

    Raises:
      ArgumentError: metadata is not JSON, or `wait=False` for arrays that are spread over several processes.
      StructureError: the state breaks a structural law.
      ProcessError: arrays are spread over several processes, and one of them failed or did not make the call.
      CheckpointError: the folder exists, has a name that `load` refuses, cannot be written, the disk is full, or
        process 0 did not write the same stage in time; other stages are untouched. Or an earlier stage that this
        thread saved with `wait=False` could not be written and nobody had waited for it; then this one is not either.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> stage = tempfile.mkdtemp() + "/0-empty"
      >>> pae.save(stage, state, {"note": "no task yet"})
      >>> equal = jax.tree.map(lambda a, b: bool((a == b).all()), pae.load(net, stage), state)
      >>> all(jax.tree.leaves(equal))
      True

      In the background, while training goes on:

      >>> saving = pae.save(stage + "-again", state, wait=False)
      >>> saving.wait()
    """
    check_values("save", state)
    path, timeout = _stage_path(path), check_number("timeout", timeout, 0.0)
    check_flag("wait", wait)
    try:
        extra = json.loads(json.dumps(dict(metadata or {}), allow_nan=True))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"metadata must be what JSON can say: {error}") from error
    if spread_arrays.over_processes(state):
        if not wait:
            raise ArgumentError("wait=False cannot save arrays that are spread over several processes; leave it out")
        wait_for_last(path)
        return joint_saving.save_together(path, state, extra, timeout)
    integrity.check(state)
    wait_for_last(path)
    if not jax.process_index():
        files.require_new(path, "stage")
    if wait:
        put, decision = _writer(path, state, extra, timeout), Decision()
        return put(decision) if jax.process_index() else shielded(lambda: put(decision), decision.stop)
    copy = jax.tree.map(np.array, state)
    return Saving(path, lambda decision: _writer(path, copy, extra, timeout)(decision))


def _writer(path: Path, state: State, extra: dict[str, Any], timeout: float) -> Callable[[Decision], None]:
    """Take what a stage holds to the host, with its digests; return what writes it, or waits for process 0."""
    arrays = jax.tree.map(np.asarray, stage.arrays_of(state))
    facts = files.sealed(stage.describe(state, arrays, extra))
    if jax.process_index():
        return lambda decision: _wait_for(path, facts, timeout)
    return lambda decision: _write(path, arrays, facts, decision)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the JSON of a stage without reading its arrays.

    Args:
      path: a folder written by `save`.

    Returns:
      `schema_version`, `versions` of packages, `width`, `tasks` by id with their digests, `growth`, `arrays` with
      shapes and checksums, and `metadata` as given to `save`.

    Raises:
      CheckpointError: no complete stage of this library, or one of a newer schema.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> folder = tempfile.mkdtemp()
      >>> pae.save(f"{folder}/0-empty", pae.init(net, jax.random.key(0)), {"note": "no task yet"})
      >>> pae.read_metadata(f"{folder}/0-empty")["metadata"]
      {'note': 'no task yet'}
    """
    return _facts(local_path(path))


def load(
    net: Net,
    path: str | Path,
    *,
    heads: Mapping[str, Any] | None = None,
    sharding: Placement | None = None,
    same_program: bool = True,
) -> State:
    """Read a stage. Strict: every leaf must have the path, shape, dtype and checksum that was saved.

    Args:
      net: the same network description as at `save`.
      path: a folder written by `save`.
      heads: `{task: Flax module}` for tasks whose head is not a plain number of classes.
      sharding: where the arrays lie, as for `init`; None reads them onto one device. Each device reads its own part,
        and one block of rows of one array at a time is in the memory of the host, for its checksum.
      same_program: refuse a model or head that computes otherwise than the one that a task was packed with; known only
        under the same versions of JAX, Flax and NumPy, kind of machine, settings of JAX and sizes of the sample.

    Returns:
      The state, equal to the saved one bit for bit.

    Raises:
      CheckpointError: missing, half-written or damaged; not a stage of this library; a newer schema.
      StructureError: the stage belongs to another model; names the leaf, or the task whose program differs.
      ArgumentError: a head module is missing, or `sharding` is refused as by `init`.

    Example: see `save`.
    """
    check_net(net)
    modules = check_mapping("heads", heads, "{task: Flax module}")
    path = local_path(path)
    with _understood(path):
        facts, stored = contents(path)
        template = stage.template(net, facts, modules)
        require_match(f"stage {path.name}", stored, stage.arrays_of(template), "Is it a stage of this model?")
        for name, entry in template.tasks.items() if same_program else ():
            require_program(net, entry.width, entry.head_spec, name, entry.program)
        if sharding is not None:
            plan = placement.planned(net, template, sharding)
            stored = jax.tree.map(_with_sharding, stored, stage.arrays_of(plan))
        state = stage.join(template, facts, jax.tree.map(jnp.asarray, read_arrays(path, facts, stored)))
        state = placement.place(net, state, sharding)
        integrity.check(state)
        return state


def contents(path: Path) -> tuple[dict[str, Any], Tree]:
    """Return the JSON of a stage, and shapes and dtypes of its arrays, which are those that the JSON lists."""
    facts = _facts(path)
    _require_regular(path)
    stored = shielded(lambda: orbax_arrays.shapes(path))
    _require_listed(path, facts, stored)
    return facts, stored


def read_arrays(path: Path, facts: dict[str, Any], stored: Tree) -> Tree:
    """Return the arrays of a stage as they were saved; arguments as from `contents`.

    They are in the memory of the host, or where `stored` has a sharding, on its devices.
    """
    return shielded(lambda: _arrays(path, facts, stored))


def _stage_path(path: str | Path) -> Path:
    path = local_path(path)
    if any(part in path.name for part in _HALF):
        raise CheckpointError(f"{path} has the name of a half-written stage, which does not load. Use another name.")
    return path


def _wait_for(path: Path, facts: dict[str, Any], timeout: float) -> None:
    """Return once process 0 has written the same stage; only it can write."""
    end = time.monotonic() + timeout
    while not path.is_dir():
        if time.monotonic() >= end:
            raise CheckpointError(
                f"process {jax.process_index()} waited {timeout:g} s for process 0 to write {path}. Call save in "
                "process 0 too, or there alone."
            )
        time.sleep(0.05)
    if _facts(path)["sha256"] != facts["sha256"]:
        raise CheckpointError(f"{path} holds another state, or other metadata, than process {jax.process_index()} has")


def _write(path: Path, arrays: Tree, facts: dict[str, Any], decision: Decision) -> None:
    """Write a stage under a name of its own, sync it, and give it its name unless that was stopped."""
    with orbax_arrays.errors(f"cannot write the stage {path}", "Earlier stages are untouched."):
        files.make_folder(path.parent)
        with files.folder_aside(path.parent) as aside:
            orbax_arrays.write(aside / "stage", arrays, facts)
            files.sync_tree(aside / "stage")
            _require_whole(aside / "stage", facts)
            if not decision.publish(lambda: files.rename_new(aside / "stage", path, "stage")):
                raise CheckpointError(f"an interrupt has stopped the writing of {path}; there is no stage. Save again.")
            files.sync_folder(path.parent)


def _facts(path: Path) -> dict[str, Any]:
    """Return the JSON of a stage, complete and as it was saved."""
    with files.disk_errors(f"cannot read the stage {path}"):
        if not path.is_dir():
            there = "it is a file; pae.read_bundle reads a bundle" if path.is_file() else "the folder does not exist"
            raise CheckpointError(f"no stage at {path}: {there}")
        if any(part in path.name for part in _HALF):
            raise CheckpointError(f"{path} is a half-written stage; it can be removed. Use the stage before it.")
        if not (path / orbax_arrays.JSON).exists():
            inside = sorted(
                found.parent for depth in ("*", "*/*") for found in path.glob(f"{depth}/{orbax_arrays.JSON}")
            )
            hint = f"; it holds stages, such as {inside[-1]}" if inside else ""
            raise CheckpointError(f"{path} is not a complete Orbax checkpoint: it has no {orbax_arrays.JSON}{hint}")
    whole = files.as_json(path / orbax_arrays.JSON, files.read_bytes(path / orbax_arrays.JSON))
    facts = whole.get("custom_metadata") if isinstance(whole, dict) else None
    if not isinstance(facts, dict) or facts.get("format") != stage.FORMAT:
        raise CheckpointError(f"{path} was not written by pae_jax.save")
    schema = facts.get("schema_version")
    if not isinstance(schema, int):
        raise CheckpointError(f"{path} is damaged: its schema version is {schema!r}")
    if schema > stage.SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {schema}; this pae_jax {__version__} reads up to {stage.SCHEMA_VERSION}. "
            "Update pae_jax."
        )
    if not files.is_sealed(facts):
        raise CheckpointError(f"{path} is damaged: its metadata is not what was saved. Use another stage.")
    return facts


def _require_regular(path: Path) -> None:
    for folder, _, names in os.walk(path):
        for name in names:
            files.require_regular(Path(folder, name))


def _arrays(path: Path, facts: dict[str, Any], stored: Tree) -> Tree:
    """Return the arrays of a stage, as they were saved."""
    with orbax_arrays.errors(f"the arrays of stage {path} cannot be read; it is damaged"):
        arrays = orbax_arrays.read(path, stored)
    for name, leaf in flatten(arrays).items():
        if integrity.array_digest(leaf) != facts["arrays"][name]["sha256"]:
            raise CheckpointError(f"stage {path} is damaged: '{name}' is not what was saved. Use another stage.")
    return arrays


def _with_sharding(leaf: Any, plan: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=plan.sharding)


def _require_whole(path: Path, facts: dict[str, Any]) -> None:
    """Read back what was written: Orbax does not notice every call of the system that fails."""
    try:
        if _facts(path)["sha256"] != facts["sha256"]:
            raise CheckpointError("its metadata is not what was given")
        stored = orbax_arrays.shapes(path)
        _require_listed(path, facts, stored)
        _arrays(path, facts, stored)
    except CheckpointError as error:
        raise OSError(errno.EIO, f"it was read back otherwise than it was written: {error}") from error


def _require_listed(path: Path, facts: dict[str, Any], stored: Tree) -> None:
    """Raise `CheckpointError` unless the arrays of a stage are those that its JSON lists."""
    listed = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in facts["arrays"].items()}
    for name, leaf in flatten(stored).items():
        if listed.pop(name, None) != f"{leaf.dtype}{list(leaf.shape)}":
            raise CheckpointError(f"{path} is damaged: array '{name}' is {describe(leaf)}, not what its metadata lists")
    if listed:
        raise CheckpointError(f"{path} is damaged: the array '{min(listed)}' is missing")


@contextlib.contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Turn what sealed metadata of another meaning would cause into a `CheckpointError`."""
    try:
        yield
    except PaeError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the metadata of stage {path} is not what this pae_jax writes: {type(error).__name__}: {error}"
        ) from error
