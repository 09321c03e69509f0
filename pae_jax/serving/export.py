"""Tasks as programs that run with JAX alone: StableHLO for any batch size, by `jax.export`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from pae_jax import files
from pae_jax.checks import check_choice, check_count, check_names, local_path
from pae_jax.core import State, check_values, find, integrity, names, ownership, spread_arrays
from pae_jax.errors import ArgumentError, CheckpointError, StructureError
from pae_jax.nets import Net, task_function, traces
from pae_jax.serving.all_tasks import at_widths
from pae_jax.trees import Tree, flatten

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class TaskProgram:
    """A task, or several, as a program without this library.

    Elsewhere it runs with `jax.export.deserialize(bytearray(file.read_bytes())).call(x)`, or, with the weights beside
    it, `.call(dict(np.load(file + ".npz")), x)`.

    Attributes:
      exported: what `jax.export` made.
      arrays: with the weights beside the program, `{name: array}` of all that it takes; None if they are inside.
      tasks: names of its tasks.
    """

    exported: jax.export.Exported
    arrays: dict[str, np.ndarray] | None
    tasks: tuple[str, ...]

    def __repr__(self) -> str:
        beside = "" if self.arrays is None else f", {sum(a.nbytes for a in self.arrays.values()):,} bytes beside it"
        return f"TaskProgram({', '.join(self.tasks)}; {', '.join(self.exported.platforms)}{beside})"

    def call(self, x: Tree) -> Tree:
        """Run the program, the same bits as `predict` on this machine with this batch size.

        Args:
          x: inputs (batch, ...), dtypes as in the net's sample, at least 1 example.

        Raises:
          StructureError: inputs of a wrong shape or dtype.
        """
        try:
            inputs = jax.tree.map(jnp.asarray, x)
            return self._compiled(*((inputs,) if self.arrays is None else (self.arrays, inputs)))
        except (TypeError, ValueError) as error:
            wanted = ", ".join(map(str, self.exported.in_avals[len(self.arrays or ()) :]))
            text = str(error).splitlines()[0].partition(" Please see ")[0].rstrip(".")
            raise StructureError("input", "", text, wanted) from error

    def write(self, path: str | Path) -> None:
        """Write the program to a new file, and weights that are beside it to `path` + ".npz"; both or neither.

        Args:
          path: the file, on this machine; it must not exist, its folder is made if need be. `~` is the home folder.

        Raises:
          CheckpointError: one of them exists, is remote or cannot be written.
        """
        file = local_path(path)
        try:
            contents = {file: bytes(self.exported.serialize())}
            if self.arrays is not None:
                weights = io.BytesIO()
                np.savez(weights, **self.arrays)  # pyright: ignore[reportArgumentType]
                contents = {file.with_name(file.name + ".npz"): weights.getvalue()} | contents
        except ValueError as error:  # a name that files cannot hold
            raise CheckpointError(f"cannot write the program {file}: {error}") from error
        for place in contents:
            files.require_new(place, "program")
        with files.disk_errors(f"cannot write the program {file}"), contextlib.ExitStack() as undone:
            files.make_folder(file.parent)
            for place, content in contents.items():
                undone.callback(place.unlink, missing_ok=True)
                files.write_bytes(place, content)
            undone.pop_all()

    @functools.cached_property
    def _compiled(self) -> Callable[..., Tree]:
        return jax.jit(self.exported.call)


def export(
    net: Net,
    state: State,
    task: str | None = None,
    *,
    platforms: Iterable[str] | None = None,
    weights: Literal["inside", "beside"] = "inside",
    batch_size: int | None = None,
) -> TaskProgram:
    """Make a program of a task that runs with JAX alone, on any batch size, and any size of the net's free axes.

    Args:
      net: the network description the state was made with.
      state: the network.
      task: name of a task; None takes all of them in one program, which holds shared weights and owners once and whose
        result is `{task: output}`.
      platforms: any of "cpu", "cuda", "rocm", "tpu"; None takes the one this runs on.
      weights: "inside" the program, which copies them at every call, or "beside" it: a program that takes them as its
        first argument.
      batch_size: the only batch size, for a model that cannot be traced without one; None allows any.

    Returns:
      A `TaskProgram`, to call or to write.

    Raises:
      UnknownTaskError: no task of this name.
      ArgumentError: no task at all, or an option unknown.
      StructureError: the state is not one of this net, or the model does not trace with an open batch size or open
        sizes of free axes, as with a table of positions; a net without free_axes exports it for its sample's size.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> program = pae.export(net, state, "a")
      >>> program.call(jnp.ones((3, 4))).shape, program.call(jnp.ones((5, 4))).shape
      ((3, 2), (5, 2))
    """
    check_choice("weights", weights, ("inside", "beside"))
    places = _platforms(platforms)
    listed = names(state) if task is None else [task]
    entries = {name: find(state, name) for name in listed}
    if not entries:
        raise ArgumentError("export needs at least one task, found none; pae.pack adds one")
    check_values("export", state)
    spread_arrays.require_here("export", state)
    integrity.require_own_net(net, state, entries.values())
    function, operands = _all(net, state, listed) if task is None else _one(net, state, task)
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(operands).items()}
    structure = jax.tree.structure(operands)
    if spread_arrays.is_spread(operands):  # the program is for one device
        operands = jax.tree.unflatten(structure, list(map(jnp.asarray, arrays.values())))

    def inside(x: Tree) -> Tree:
        return function(_as_unknown(operands, x), x)

    def beside(plain: dict[str, jax.Array], x: Tree) -> Tree:
        leaves = [_restored(plain[path], array.dtype) for path, array in arrays.items()]
        return function(jax.tree.unflatten(structure, leaves), x)

    size = None if batch_size is None else check_count("batch_size", batch_size, 1)
    if weights == "inside":
        return TaskProgram(_exported(net, inside, (), places, size), None, tuple(listed))
    plain = {path: _plain(array) for path, array in arrays.items()}
    return TaskProgram(_exported(net, beside, (plain,), places, size), plain, tuple(listed))


def _platforms(platforms: Iterable[str] | None) -> list[str] | None:
    if platforms is None:
        return None
    found = [platforms] if isinstance(platforms, str) else check_names("platforms", platforms)
    for name in found:
        check_choice("platforms", name, _PLATFORMS)
    if not found:
        raise ArgumentError(f"platforms must name at least one of {', '.join(_PLATFORMS)}, found none")
    return found


def _one(net: Net, state: State, task: str) -> tuple[Callable[[Any, Tree], Tree], Any]:
    entry = state.tasks[task]
    apply = task_function(net, entry.width, entry.head_spec)
    operands = {"weights": ownership.task_weights(state, entry), "local": entry.local, "head": entry.head}
    return lambda given, x: apply(given["weights"], given["local"], given["head"], x), operands


def _all(net: Net, state: State, listed: list[str]) -> tuple[Callable[[Any, Tree], Tree], Any]:
    entries = {name: state.tasks[name] for name in listed}
    applies = {name: task_function(net, entry.width, entry.head_spec) for name, entry in entries.items()}
    widths = {str(width): one for width, one in at_widths(state, entries.values()).items()}
    operands = {
        "shared": {width: one.shared for width, one in widths.items()},
        "owner": {width: one.owner for width, one in widths.items()},
        "local": {name: entry.local for name, entry in entries.items()},
        "head": {name: entry.head for name, entry in entries.items()},
        "signs": {name: ownership.signs(entry) for name, entry in entries.items() if entry.pick is not None},
    }

    def run(given: Any, x: Tree) -> Tree:
        found = {}
        for name, entry in entries.items():
            width, task_id = str(entry.width), ownership.id_array(entry.id)
            seen = ownership.effective(
                given["shared"][width], given["owner"][width], task_id, entry.seeing, given["signs"].get(name)
            )
            seen = jax.lax.optimization_barrier(seen)
            found[name] = applies[name](seen, given["local"][name], given["head"][name], x)
        return found

    return run, operands


def _exported(
    net: Net, function: Callable[..., Tree], before: tuple[Any, ...], platforms: list[str] | None, size: int | None
) -> jax.export.Exported:
    """Trace a function of what comes before the inputs, and of inputs of any batch size."""
    known = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), before)
    cause: Exception | None = None
    for together in (False, True):  # free axes of several inputs may be the same one, as a text and its mask are
        try:
            return jax.export.export(jax.jit(function), platforms=platforms)(*known, _inputs(net, size, together))
        except Exception as error:  # whatever a user's model raises for a size that is a symbol
            cause = error
    assert cause is not None
    text = (str(cause).splitlines() or [type(cause).__name__])[0]
    hint = "Give the one batch size it runs with: batch_size=." if size is None else ""
    if net.free_axes and traces(function, *known, _inputs(dataclasses.replace(net, free_axes={}), size, False)):
        axes = ", ".join(f"{path} {axes}".strip() for path, axes in net.free_axes.items())
        hint = (
            f"It does not trace with open sizes of the free axes, {axes}: export it with a net made without free_axes, "
            "with a sample of the one size it runs with."
        )
    raise StructureError(net.source, "", text, "a model that jax.export can trace", hint) from cause


def _as_unknown(tree: Tree, x: Tree) -> Tree:
    """Return constants as values that no compiler knows, so that it makes of them the very program of `predict`.

    From constants it computes beforehand, with other last bits: the rsqrt of a norm, the layout of a kernel. A barrier
    is taken away before that; a loop that could change them, and is never entered, is not.
    """

    def impossible(leaf: jax.Array) -> jax.Array:
        number = leaf.astype(jnp.float32)
        return jnp.any((number != number) & (number == number))

    started = functools.reduce(jnp.logical_or, map(impossible, jax.tree.leaves(x)))
    changed = lambda leaf: ~leaf if leaf.dtype == bool else leaf + jnp.ones((), leaf.dtype)  # noqa: E731
    return jax.lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros((), bool), jax.tree.map(changed, carry[1])), (started, tree)
    )[1]


def _inputs(net: Net, size: int | None, together: bool) -> Tree:
    """Return inputs whose batch size, and free axes, are symbols."""
    scope = jax.export.SymbolicScope()
    found = []
    for number, (path, leaf) in enumerate(flatten(net.sample).items()):
        sizes = [str(extent) for extent in leaf.shape]
        sizes[0] = "batch" if size is None else str(size)
        for axis in net.free_axes.get(path, ()):
            sizes[axis] = f"free{axis}" if together else f"free{number}_{axis}"
        shape = jax.export.symbolic_shape(",".join(sizes), scope=scope)
        found.append(jax.ShapeDtypeStruct(shape, leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(net.sample), found)


def _plain(array: np.ndarray) -> np.ndarray:
    """Return an array that NumPy's own files can hold: dtypes that are not NumPy's become integers of their size."""
    return array if array.dtype.isbuiltin == 1 else array.view(f"uint{8 * array.dtype.itemsize}")


def _restored(array: jax.Array, dtype: Any) -> jax.Array:
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)
