"""Weights of a foreign file in the places of our variables: every one of them, of the right shape, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from pae_jax.errors import DataError, StructureError
from pae_jax.faces.naming import LAYERS
from pae_jax.trees import PARAMS, Tree, describe, flatten

STATS = "batch_stats"


class Entry(NamedTuple):
    """Where a leaf comes from.

    Attributes:
      path: of the leaf in our variables, such as "params/Conv2d_1a/conv/kernel".
      name: of the array in the source.
      axes: `leaf = array.transpose(axes)`; None where both have the same layout.
    """

    path: str
    name: str
    axes: tuple[int, ...] | None = None


class Weights(NamedTuple):
    """What a source holds.

    Attributes:
      variables: `{"params": ..., "batch_stats": ...}` of the backbone, float32.
      classifier: kernel (512, identities) and bias (identities,) of the layer that was trained on top, if it is there.
    """

    variables: dict[str, Tree]
    classifier: tuple[np.ndarray, np.ndarray] | None = None


def gather(
    source: str,
    arrays: Mapping[str, Any],
    entries: Iterable[Entry],
    template: Tree,
    ignored: Callable[[str], bool],
) -> dict[str, np.ndarray]:
    """Take the arrays of all entries out of a source.

    Args:
      source: what to call the source in messages.
      arrays: its arrays by name.
      entries: what to take.
      template: our variables, concrete or abstract, for the shapes.
      ignored: says of a name whether the source may hold it although no entry asks for it.

    Returns:
      `{path: float32 array}` in our layout.

    Raises:
      StructureError: an array is missing, unexpected, no float or of another shape.
      DataError: an array holds NaN, infinity or a negative variance.
    """
    entries = list(entries)
    asked = {entry.name for entry in entries}
    missing = [entry.name for entry in entries if entry.name not in arrays]
    unexpected = [name for name in arrays if name not in asked and not ignored(name)]
    if missing or unexpected:
        found = f"{len(missing)} weights missing{_listing(missing)}, {len(unexpected)} unexpected{_listing(unexpected)}"
        expected = f"all {len(entries)} weights of InceptionResnetV1 and no others"
        raise StructureError(source, "", found, expected, "These look like the weights of another network.")
    leaves = flatten(template)
    for layer in LAYERS:  # only sources have scales, one per channel like the biases
        if layer.norm is not None:
            leaves[f"{PARAMS}/{layer.norm}/scale"] = leaves[f"{PARAMS}/{layer.norm}/bias"]
    return {entry.path: _leaf(source, entry, np.asarray(arrays[entry.name]), leaves[entry.path]) for entry in entries}


def fold_scales(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Move the scales of batch norms, which ours have not, into the kernels before them.

    `scale (w x - mean) / s + bias = ((scale w) x - scale mean) / s + bias`, with `s = sqrt(var + epsilon)` as it was.
    A scale of 1 changes no bit.
    """
    leaves = dict(leaves)
    for layer in LAYERS:
        scale = leaves.pop(f"{PARAMS}/{layer.norm}/scale", None)
        if scale is not None:
            for path in (f"{PARAMS}/{layer.kernel}/kernel", f"{STATS}/{layer.norm}/mean"):
                leaves[path] = leaves[path] * scale
    return leaves


def nest(leaves: Mapping[str, np.ndarray]) -> dict[str, Tree]:
    """Return `{path: leaf}` as nested dicts."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def _leaf(source: str, entry: Entry, array: np.ndarray, wanted: Any) -> np.ndarray:
    shape = list(wanted.shape)
    for axis, target in enumerate(entry.axes or ()):
        shape[target] = wanted.shape[axis]
    if array.shape != tuple(shape) or not np.issubdtype(array.dtype, np.floating):
        expected = f"{wanted.dtype}[{','.join(map(str, shape))}]"
        raise StructureError(source, entry.name, describe(array), expected, "Is it another variant of the network?")
    if not np.isfinite(array).all():
        raise DataError(f"{source}: '{entry.name}' holds NaN or infinity; the file is damaged. Get it again.")
    if entry.path.startswith(STATS) and entry.path.endswith("/var") and array.min() < 0:
        raise DataError(f"{source}: '{entry.name}' holds a negative variance; the file is damaged. Get it again.")
    return np.ascontiguousarray(array.transpose(entry.axes) if entry.axes else array, np.float32)


def _listing(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f" ({shown}{', ...' if len(names) > 3 else ''})" if names else ""
