"""Inputs of a network: checked, and computed whole or in pieces of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.errors import DataError
from pae_jax.network import Net, as_inputs, check_batch_size, check_inputs
from pae_jax.trees import Tree, flatten


def checked(net: Net, x: Tree) -> tuple[Tree, int]:
    """Return inputs as arrays of the sample's dtypes, and the number of examples; raise unless they fit the sample."""
    leaves, structure = jax.tree.flatten(x)
    wanted, expected = jax.tree.flatten(net.sample)
    count = len(leaves[0]) if leaves and np.ndim(leaves[0]) else 0
    exact = structure == expected and all(
        isinstance(leaf, (np.ndarray, jax.Array)) and leaf.dtype == w.dtype and leaf.shape == (count, *w.shape[1:])
        for leaf, w in zip(leaves, wanted, strict=True)
    )
    if exact:
        return x, count
    x = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else np.asarray(leaf), x)
    check_inputs(net, x)
    lengths = {path: len(leaf) for path, leaf in flatten(x).items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the parts of x have different numbers of examples: {lengths}; they must be equal")
    return as_inputs(net, x), max(lengths.values())


def in_pieces(net: Net, x: Tree, batch_size: int | None, apply: Callable[[Tree], Any]) -> Any:
    """Apply a function to a batch, whole or in pieces of one size, the last one filled up by its first example."""
    x, count = checked(net, x)
    size = None if batch_size is None else check_batch_size(batch_size)
    if size is None or count == 0:
        return apply(x)
    host = jax.tree.map(np.asarray, x)
    pieces = [apply(filled_rows(host, range(start, min(start + size, count)), size)) for start in range(0, count, size)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:count], *pieces)


def powers_of_two(rows: list[int], limit: int | None) -> Iterator[tuple[list[int], int]]:
    """Yield `(rows, size)`: at most `limit` rows at a time, and the power of two, or limit, to fill them up to."""
    step = limit or len(rows)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        size = 1 << (len(piece) - 1).bit_length()
        yield piece, min(size, limit or size)


def filled_rows(host: Tree, rows: Sequence[int], size: int) -> Tree:
    """Take examples out of a batch and fill up to a size by repeating the first of them."""
    index = np.asarray([*rows, *[rows[0]] * (size - len(rows))])
    return jax.tree.map(lambda leaf: leaf[index], host)
