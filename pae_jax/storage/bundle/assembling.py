"""The state that a bundle describes, alone or on top of the state it was made for; checked before anything is made."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.core import Growth, Picking, State, TaskState, integrity, layout_of, names, ownership
from pae_jax.errors import ArgumentError, CheckpointError, PaeError
from pae_jax.large_arrays import in_threads, place
from pae_jax.storage.bundle import coding, file
from pae_jax.storage.bundle.parts import Places, by_dtype, growth_digest, laid_out, older_places, places, task_digest
from pae_jax.storage.bundle.tasks import cleaned, restricted
from pae_jax.storage.bundle.values import Stored, groups, restore, scaled, stored_dtype
from pae_jax.trees import Tree, flatten
from pae_jax.widening import WidenMaps

Tensors = Mapping[str, np.ndarray]


class Placeholder:
    """Stands for a head module where only its name is known; nothing can be computed with it."""

    @staticmethod
    def of(name: str) -> Any:
        """Return an object whose class has the name of a module."""
        return type(name, (Placeholder,), {})()


@contextlib.contextmanager
def understood() -> Iterator[None]:
    """Turn what Python raises for a header that makes no sense into `CheckpointError`."""
    try:
        yield
    except PaeError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"what the file says of itself makes no sense, so it is damaged: {type(error).__name__}: {error}"
        ) from error


@understood()
def layouts(header: Mapping[str, Any]) -> tuple[Tree, dict[float, Tree], dict[str, Tree]]:
    """Return shapes and dtypes of the shared weights, of local variables by width, and of heads by task."""
    local = {float(width): _abstract(tree) for width, tree in header["local"].items()}
    variables = {entry["name"]: _abstract(entry["head_variables"]) for entry in header["tasks"]}
    return _abstract(header["shared"]), local, variables


def _abstract(tree: Any) -> Tree:
    """Return shapes and dtypes from texts such as "float32[3,3,1,8]"."""
    if isinstance(tree, dict):
        return {name: _abstract(child) for name, child in tree.items()}
    dtype, _, shape = tree.removesuffix("]").partition("[")
    sizes = tuple(int(size) for size in shape.split(",") if size)
    if min(sizes, default=0) < 0:
        raise ValueError(f"shape {tree!r}")
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


@understood()
def assembled(header: Mapping[str, Any], tensors: Tensors, onto: State | None, specs: Mapping[str, Any]) -> State:
    """Return the state that a bundle describes; digests are recomputed and compared.

    Args:
      header: of the bundle.
      tensors: of the bundle.
      onto: the state that a delta was made for; None for a whole bundle.
      specs: `{task: head}` of the bundle's tasks.
    """
    base = _base(header, onto)
    shared, local, variables = layouts(header)
    growth = tuple(Growth(g["narrow"], g["wide"], WidenMaps.from_json(g["maps"])) for g in header["growth"])
    have = 0 if base is None else len(base.tasks)
    known = None if base is None else [laid_out(growth, tree) for tree in (base.shared, base.owner)]
    spots = places(shared if known is None else known[1], have)
    _require_tensors(header, tensors, shared, local, variables, spots)
    owner, weights = _weights(header, tensors, shared, spots, known, have)
    state = State(
        shared=weights,
        owner=owner,
        tasks={} if base is None else base.tasks,
        width=header["width"],
        growth=growth if base is None else (*base.growth, *growth),
        layout=layout_of(shared=weights),
    )
    for entry in header["tasks"]:
        parts = local[float(entry["width"])], variables[entry["name"]]
        state = _with_task(state, entry, header, tensors, parts, specs[entry["name"]])
    _require_digests(header, state, base)
    return state


def _base(header: Mapping[str, Any], onto: State | None) -> State | None:
    """Return the part of a state that a delta adds to, or say how it differs."""
    wanted = header["base"]
    if wanted is None:
        if onto is not None:
            raise ArgumentError("the bundle holds all that its tasks need; read it without onto=")
        return None
    tasks = [entry["name"] for entry in wanted["tasks"]]
    if onto is None:
        raise ArgumentError(f"the bundle only adds to a state with the tasks {tasks}; pass that state as onto=")
    integrity.check(onto)
    found = names(onto)
    if found != tasks:
        pair = next(pair for pair in itertools.zip_longest(tasks, found) if pair[0] != pair[1])
        raise CheckpointError(
            f"the bundle adds to tasks {tasks}, the state has {found}: task {pair[0] or pair[1]!r} differs"
        )
    _require_base_tasks(wanted, onto)
    base = cleaned(restricted(onto, tasks))
    if [growth_digest(growth) for growth in base.growth] != wanted["growth"]:
        raise CheckpointError("the state was widened otherwise than the one that the bundle adds to")
    return base


def _require_base_tasks(wanted: Mapping[str, Any], onto: State) -> None:
    """Raise unless the tasks are, all of them, those of one of the states that a delta may go onto."""
    differing: list[str] = []
    for digests in wanted["digests"].values():
        differing = [name for name, sha in digests.items() if _digest(onto, name) != sha]
        if not differing:
            return
    raise CheckpointError(
        f"the bundle was made for another state: task {differing[0]!r} differs in its weights, variables or settings. "
        "Use a delta for this state, or a whole bundle."
    )


def _digest(state: State, task: str) -> str | None:
    entry = state.tasks[task]
    return task_digest(state, entry) if entry.frozen else None


def _require_tensors(
    header: Mapping[str, Any], tensors: Tensors, shared: Tree, local: Any, variables: Any, spots: Mapping[str, Places]
) -> None:
    """Raise unless the tensors are those that the header speaks of, each of the size that follows from it."""
    wanted: dict[str, int | None] = {"owners": None}
    kernels = flatten(shared)
    for path, counts in header["owners"].items():
        if sum(counts) != spots[path].size or min(counts) < 0 or len(counts) != len(header["tasks"]) + 1:
            raise CheckpointError(f"the bundle is damaged: '{path}' has {spots[path].size} places, not {sum(counts)}")
        wanted[f"values/{path}"] = sum(counts[1:])
        if sum(counts[1:]) and scaled(np.dtype(kernels[path].dtype), header["weights"]):
            wanted[f"scales/{path}"] = None
    for entry in header["tasks"]:
        for dtype, leaves in by_dtype([local[float(entry["width"])], variables[entry["name"]]]).items():
            wanted[f"tasks/{entry['id']}/{dtype}"] = sum(math.prod(leaf.shape) for leaf in leaves)
        if str(entry["id"]) in header["picks"]:
            wanted[f"picks/{entry['id']}"] = None
    wanted = {name: size for name, size in wanted.items() if size != 0}
    coded = {name for name in wanted if name == "owners" or name.startswith("picks/")}
    differing = sorted((wanted.keys() - coded - tensors.keys()) | (tensors.keys() - wanted.keys()))
    differing = differing or sorted(header["owners"].keys() ^ kernels.keys())
    if differing:
        raise CheckpointError(f"the bundle is damaged: '{differing[0]}' is missing or not expected")
    for name in wanted.keys() & tensors.keys():
        size = wanted[name]
        if tensors[name].ndim != 1 or (size is not None and tensors[name].size != size):
            raise CheckpointError(f"the bundle is damaged: '{name}' has {tensors[name].size} entries, expected {size}")


def _weights(
    header: Mapping[str, Any],
    tensors: Tensors,
    shared: Tree,
    spots: Mapping[str, Places],
    known: list[Tree] | None,
    have: int,
) -> tuple[Tree, Tree]:
    """Return owners and weights of the whole bundle."""
    counts = [np.asarray(header["owners"][path]) for path in spots]
    symbols = coding.decode(_coded(tensors, "owners"), [spot.size for spot in spots.values()], counts)
    old, kernels = [{}, {}] if known is None else [flatten(tree) for tree in known], flatten(shared)

    def leaf(path: str, spot: Places, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        dtype, shape = np.dtype(kernels[path].dtype), kernels[path].shape
        weights, owner = _zeros(math.prod(shape), dtype), new.view(np.int8)
        if known is not None:
            weights[:] = np.asarray(old[0][path]).reshape(-1)
            owner = np.where(owner > 0, owner + np.int8(have), np.int8(0))
            owner = spot.scatter(np.asarray(old[1][path]).reshape(-1), owner)
        group = groups(shape, owner, have) if scaled(dtype, header["weights"]) else None
        stored = _stored(path, header["weights"], tensors, dtype, group)
        place(weights, lambda block: owner[block] > have, restore(stored, group, dtype))
        return owner.reshape(shape), weights.reshape(shape)

    work = [lambda item=item: leaf(*item) for item in zip(spots, spots.values(), symbols, strict=True)]
    leaves = in_threads(work, [spot.size for spot in spots.values()])
    tree = jax.tree.structure(shared)
    owners, weights = (jax.tree.unflatten(tree, _on_device(spots, column)) for column in zip(*leaves, strict=True))
    return owners, weights


def _coded(tensors: Tensors, name: str) -> np.ndarray:
    """Return a code, which is left out of the file if it is empty."""
    return tensors.get(name, np.zeros(0, np.uint8))


def _stored(path: str, precision: str, tensors: Tensors, dtype: np.dtype, group: np.ndarray | None) -> Stored:
    kind = stored_dtype(dtype, precision)
    if f"values/{path}" not in tensors:
        return Stored(np.zeros(0, kind), None if group is None else np.zeros(0, jnp.bfloat16))
    data = file.as_stored(tensors[f"values/{path}"], kind)
    if group is None:
        return Stored(data)
    scales = file.as_stored(tensors[f"scales/{path}"], np.dtype(jnp.bfloat16))
    if scales.size != int(group.max(initial=-1)) + 1:
        raise CheckpointError(f"the bundle is damaged: 'scales/{path}' has {scales.size} entries")
    return Stored(data, scales)


def _zeros(size: int, dtype: np.dtype) -> np.ndarray:
    """Return zeros that begin where JAX need not copy them."""
    memory = np.zeros(size * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size * dtype.itemsize].view(dtype)


def _on_device(paths: Iterable[str], leaves: Sequence[np.ndarray]) -> list[jax.Array]:
    """Return arrays of JAX; the memory of those that begin at a multiple of 64 bytes is theirs from now on."""
    arrays = jax.device_put(list(leaves))
    for path, array, leaf in zip(paths, arrays, leaves, strict=True):
        if array.dtype != leaf.dtype:
            raise CheckpointError(f"'{path}' is {leaf.dtype}, which JAX would make {array.dtype}; set jax_enable_x64")
    return arrays


def _with_task(
    state: State, entry: Mapping[str, Any], header: Mapping[str, Any], tensors: Tensors, parts: Any, spec: Any
) -> State:
    """Return the state with the next task of a bundle."""
    if entry["name"] in state.tasks or entry["id"] != len(state.tasks) + 1:
        raise CheckpointError(f"the bundle is damaged: task {entry['name']!r} has id {entry['id']}")
    local, head = _variables(entry["id"], tensors, parts, header["local_values"])
    task = TaskState(
        local=local,
        head=head,
        digests=jnp.zeros((0, 32), jnp.uint8),
        pick=None,
        id=entry["id"],
        width=entry["width"],
        head_spec=spec,
        layout=layout_of(local=local, head=head),
        sharing=entry["sharing"],
        picking=None if entry["picking"] is None else Picking(**entry["picking"]),
        program=entry.get("program", ""),
    )
    counts = header["picks"].get(str(entry["id"]))
    if counts is not None:
        task = task.replace(pick=_pick(state, task, _coded(tensors, f"picks/{entry['id']}"), counts))
    task = task.replace(digests=integrity.as_rows(integrity.task_digests(state, task)))
    return state.replace(tasks={**state.tasks, entry["name"]: task})


def _variables(number: int, tensors: Tensors, parts: Any, precision: str) -> Any:
    """Return local variables and head of a task."""
    flat: dict[str, Iterator[np.ndarray]] = {}
    for dtype, leaves in by_dtype(list(parts)).items():
        kind = np.dtype(leaves[0].dtype)
        name, stored = f"tasks/{number}/{dtype}", stored_dtype(kind, precision)
        values = file.as_stored(tensors[name], stored) if name in tensors else np.zeros(0, stored)
        values = values.astype(kind, copy=False)
        ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
        flat[dtype] = iter(np.split(values, ends[:-1]))
    wanted, tree = jax.tree_util.tree_flatten_with_path(list(parts))
    found = [next(flat[str(leaf.dtype)]).reshape(leaf.shape) for _, leaf in wanted]
    return jax.tree.unflatten(tree, _on_device((jax.tree_util.keystr(path) for path, _ in wanted), found))


def _pick(state: State, task: TaskState, stream: np.ndarray, counts: list[list[int]]) -> Tree:
    """Return the picks of a task."""
    owner = ownership.at_width(state, state.owner, task.width)
    masks = older_places(state, task)
    signs = coding.decode(stream, [int(mask.sum()) for mask in masks], [np.asarray(leaf) for leaf in counts])
    if task.picking is None:
        raise CheckpointError(f"the bundle is damaged: it has picks of task {task.id}, which does not pick")
    kind = np.int8 if task.picking.ternary else np.bool_
    leaves = []
    for ids, mask, found in zip(jax.tree.leaves(owner), masks, signs, strict=True):
        leaf = np.zeros(mask.size, kind)
        place(leaf, mask.__getitem__, (found.view(np.int8) - 1).astype(kind))
        leaves.append(jnp.asarray(leaf.reshape(ids.shape)))
    return jax.tree.unflatten(jax.tree.structure(owner), leaves)


def _require_digests(header: Mapping[str, Any], state: State, base: State | None) -> None:
    """Raise unless new tasks are what was written, and older ones what they were."""
    for entry in header["tasks"]:
        if task_digest(state, state.tasks[entry["name"]]) != entry["sha256"]:
            raise CheckpointError(f"the bundle is damaged: task {entry['name']!r} is not what was written")
    if base is not None:
        integrity.verify(state.replace(tasks=base.tasks))
