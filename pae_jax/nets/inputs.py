"""Check inputs of a network, and process them whole or in chunks of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.checks import check_count, is_traced
from pae_jax.errors import ArgumentError, DataError, StructureError
from pae_jax.nets.network import Net, batch_size
from pae_jax.trees import Tree, abstract, describe, flatten, path_name, sketch


def read_inputs(net: Net, x: Tree, *, values: bool = True) -> Tree:
    """Return inputs as arrays that fit the sample: same tree, same shape after the batch axis, same kind of dtype.

    A list in place of an array is converted to one. Axes in the net's `free_axes` may have any size. A narrower or
    wider dtype of the same kind (NumPy's float64 for float32) passes, if integers keep their values; integers for
    floats do not, because an image of 0..255 instead of 0..1 would train without an error. Without `values` only
    shapes and dtypes are read, and nothing is fetched from the device.
    """
    structure = jax.tree.structure(net.sample)
    hint = "(x, y) is one pair of arrays; several batches go into a list." if isinstance(x, tuple) else ""
    try:
        leaves = [_array(leaf) for leaf in structure.flatten_up_to(x)]
    except ValueError as error:
        raise StructureError("input", "", sketch(x), sketch(net.sample), hint) from error
    arrays = jax.tree.unflatten(structure, leaves)
    for (path, wanted), leaf in zip(flatten(net.sample).items(), leaves, strict=True):
        refuse_masks(leaf, f"input {path}".strip())
        found, expected = describe(leaf), _batch_of(net, path, wanted)
        shape = list(leaf.shape)
        for axis in net.free_axes.get(path, ()):
            if axis < len(shape):
                shape[axis] = wanted.shape[axis]
        if not leaf.shape or tuple(shape[1:]) != wanted.shape[1:]:
            raise StructureError("input", path, found, expected, hint or "The batch axis comes first.")
        if not _same_kind(leaf.dtype, wanted.dtype):
            raise StructureError("input", path, found, expected, "Convert and scale the data as the model expects.")
        if values:
            require_range(leaf, wanted.dtype, f"input {path}".strip())
    return arrays


def as_inputs(net: Net, x: Tree) -> Tree:
    """Convert checked inputs to the sample's dtypes."""
    return jax.tree.map(lambda leaf, wanted: jnp.asarray(leaf, wanted.dtype), x, net.sample)


def owned(tree: Tree) -> Tree:
    """Return arrays without those that the caller may write to; JAX may read them after the call has returned."""
    return jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)


def require_range(leaf: Any, dtype: Any, name: str) -> None:
    """Raise `DataError` if an array of numbers holds a value that is out of the range of a dtype."""
    if np.can_cast(leaf.dtype, dtype) or is_traced(leaf) or not leaf.size:
        return
    if all(jnp.issubdtype(kind, jnp.integer) for kind in (leaf.dtype, dtype)):
        number, limits, finite = int, jnp.iinfo(dtype), leaf
    elif all(jnp.issubdtype(kind, jnp.floating) for kind in (leaf.dtype, dtype)):
        number, limits, module = float, jnp.finfo(dtype), jnp if isinstance(leaf, jax.Array) else np
        finite = module.where(module.isfinite(leaf), leaf, module.zeros((), leaf.dtype))
    else:
        return
    low, high = number(finite.min()), number(finite.max())
    least, most = number(limits.min), number(limits.max)
    if low < least or high > most:
        raise DataError(
            f"{name} has values in {low}..{high}, but {np.dtype(dtype)} holds {least}..{most}. Scale the "
            "data, or make the net with a sample of the wider dtype."
        )


def checked(net: Net, x: Tree) -> tuple[Tree, int]:
    """Return inputs as arrays of the sample's dtypes, and the number of examples; raise unless they fit the sample.

    NumPy arrays that fit are the caller's own: see `owned`.
    """
    leaves, structure = jax.tree.flatten(x)
    wanted, expected = jax.tree.flatten(net.sample)
    count = len(leaves[0]) if leaves and np.ndim(leaves[0]) else 0
    exact = structure == expected and all(
        isinstance(leaf, (np.ndarray, jax.Array))
        and leaf.dtype == w.dtype
        and leaf.shape == (count, *w.shape[1:])
        and not isinstance(leaf, np.ma.MaskedArray)
        for leaf, w in zip(leaves, wanted, strict=True)
    )
    if exact:
        return x, count
    x = read_inputs(net, x)
    # A conversion copies; arrays of the right dtype would be taken as they are.
    own = jax.tree.map(lambda leaf, wanted: owned(leaf) if leaf.dtype == wanted.dtype else leaf, x, net.sample)
    return as_inputs(net, own), examples({"x": x})


def examples(parts: Tree) -> int:
    """Return the number of examples of a batch; raise `DataError` unless all parts have the same number."""
    lengths = {path: len(leaf) for path, leaf in flatten(parts).items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the parts of a batch have different numbers of examples: {lengths}; they must be equal")
    return next(iter(lengths.values()))


def _array(leaf: Any) -> Any:
    if isinstance(leaf, (np.ndarray, jax.Array, jax.ShapeDtypeStruct)):
        return leaf
    if isinstance(leaf, (dict, tuple)):
        raise ValueError(f"a {type(leaf).__name__} where the sample has an array")
    array = np.asarray(leaf)
    if array.dtype == object:
        raise ValueError("not an array")
    return array


def refuse_masks(leaf: Any, name: str) -> None:
    """Raise `DataError` for an array of which some entries are marked as invalid."""
    if isinstance(leaf, np.ma.MaskedArray):
        raise DataError(f"{name} is a masked array, {describe(leaf)}; fill its invalid entries, or drop their examples")


def _batch_of(net: Net, path: str, wanted: Any) -> str:
    free = net.free_axes.get(path, ())
    sizes = ["batch", *("any" if axis in free else str(size) for axis, size in enumerate(wanted.shape) if axis)]
    return f"{wanted.dtype}[{','.join(sizes)}]"


def _same_kind(found: Any, expected: Any) -> bool:
    return any(
        jnp.issubdtype(found, kind) and jnp.issubdtype(expected, kind)
        for kind in (jnp.floating, jnp.integer, jnp.bool_, jnp.complexfloating)
    )


def input_sizes(
    net: Net, function: Callable[[Tree, Tree], Any], variables: Tree, batches: Sequence[int] = ()
) -> list[Tree]:
    """Return the sample's shapes and others that the net takes, as far as a function traces on them.

    An analysis of a program that was traced at all of them sees what depends on the sizes of the inputs.

    Args:
      net: the network description.
      function: pure function of `(variables, inputs)`.
      variables: its variables, concrete or abstract.
      batches: other batch sizes; free axes are changed at the sample's, and with `batches` also at 1 and at one more.
        Where there are several, each is also changed alone.

    Returns:
      Trees of `ShapeDtypeStruct`; the sample's shapes come first.
    """
    known = abstract(net.sample)
    whole = batch_size(known)

    def sized(rows: int, scale: Callable[[int], int], axes: Mapping[str, Sequence[int]] = net.free_axes) -> Tree:
        def leaf(path: Any, known: Any) -> jax.ShapeDtypeStruct:
            free = axes.get(path_name(path), ())
            sizes = [scale(size) if axis in free else size for axis, size in enumerate(known.shape)]
            return jax.ShapeDtypeStruct((rows, *sizes[1:]), known.dtype)

        return jax.tree_util.tree_map_with_path(leaf, known)

    wanted = [sized(rows, lambda size: size) for rows in batches if rows != whole]
    if net.free_axes:
        twice, half = (lambda size: 2 * size), (lambda size: -(-size // 2))
        near = (lambda size: size + 1), (lambda size: max(size - 1, 1))
        wanted += [sized(whole, scale) for scale in (twice, half, *near)]
        wanted += [sized(rows, scale) for rows in (1, whole + 1) if batches for scale in (twice, half)]
        counts = (1, whole + 1) if batches else (whole,)
        apart = _apart(net.free_axes)
        wanted += [sized(rows, scale, axes) for axes in apart for rows in counts for scale in (twice, half)]
    return [known, *(shapes for shapes in wanted if traces(function, variables, shapes))]


def _apart(free: Mapping[str, Sequence[int]]) -> list[dict[str, tuple[int, ...]]]:
    """Return each free axis alone, and the axes of one number of all inputs together; nothing if that is all."""
    numbers = sorted({axis for axes in free.values() for axis in axes})
    alone = [{path: (axis,)} for path, axes in free.items() for axis in axes]
    joint = [{path: (axis,) for path, axes in free.items() if axis in axes} for axis in numbers]
    every = {path: tuple(axes) for path, axes in free.items() if axes}
    return [axes for axes in (*alone, *(one for one in joint if one not in alone)) if axes != every]


def traces(function: Callable[..., Any], *operands: Any) -> bool:
    """Return whether a function of a user's model can be traced on abstract operands of these sizes."""
    try:
        jax.eval_shape(function, *operands)
    except Exception:  # whatever the model raises for a size that it does not take
        return False
    return True


def in_pieces(net: Net, x: Tree, batch_size: int | None, apply: Callable[[Tree], Any]) -> Any:
    """Apply a function to a batch, whole or in chunks of one size, the last one padded with its first example."""
    x, count = checked(net, x)
    size = None if batch_size is None else check_count("batch_size", batch_size, 1)
    if size is None or count == 0:
        return apply(owned(x))
    if is_traced(x):
        raise ArgumentError("batch_size cuts a batch into chunks on the host; leave batch_size out inside jit")
    host = jax.tree.map(np.asarray, x)
    pieces = [apply(filled_rows(host, range(start, min(start + size, count)), size)) for start in range(0, count, size)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:count], *pieces)


def powers_of_two(rows: list[int], limit: int | None) -> Iterator[tuple[list[int], int]]:
    """Yield `(rows, size)`: at most `limit` rows at a time, and the size to pad them to, a power of two or `limit`."""
    step = limit or len(rows)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        size = 1 << (len(piece) - 1).bit_length()
        yield piece, min(size, limit or size)


def filled_rows(host: Tree, rows: Sequence[int], size: int) -> Tree:
    """Select examples of a batch and pad to a size by repeating the first of them."""
    index = np.asarray([*rows, *[rows[0]] * (size - len(rows))])
    return jax.tree.map(lambda leaf: leaf[index], host)
