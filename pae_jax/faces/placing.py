"""Map the weights of a foreign file to our variables; raise unless every array is present with the right shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from pae_jax.errors import DataError, StructureError
from pae_jax.faces.naming import LAYERS
from pae_jax.trees import PARAMS, Tree, describe, flatten, listing

STATS = "batch_stats"


class Entry(NamedTuple):
    """Source of a leaf.

    Attributes:
      path: of the leaf in our variables, such as "params/Conv2d_1a/conv/kernel".
      name: of the array in the source.
      axes: `leaf = array.transpose(axes)`; None if both have the same layout.
    """

    path: str
    name: str
    axes: tuple[int, ...] | None = None


class Weights(NamedTuple):
    """Contents of a source.

    Attributes:
      variables: `{"params": ..., "batch_stats": ...}` of the backbone, float32.
      classifier: kernel (512, identities) and bias (identities,) of the source's classifier; None if it has none.
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
    """Read the arrays of all entries from a source.

    Args:
      source: what to call the source in messages.
      arrays: its arrays by name.
      entries: what to take.
      template: our variables, concrete or abstract, for the shapes.
      ignored: predicate of names that the source may contain without an entry.

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
        found = f"{len(missing)} weights missing{listing(missing)}, {len(unexpected)} unexpected{listing(unexpected)}"
        expected = f"all {len(entries)} weights of InceptionResnetV1 and no others"
        raise StructureError(source, "", found, expected, "These look like the weights of another network.")
    leaves = flatten(template)
    for layer in LAYERS:  # only sources have scales, with one number per channel like the biases
        if layer.norm is not None:
            leaves[f"{PARAMS}/{layer.norm}/scale"] = leaves[f"{PARAMS}/{layer.norm}/bias"]
    return {entry.path: converted(source, entry, arrays[entry.name], leaves[entry.path]) for entry in entries}


def classifier(
    source: str, arrays: Mapping[str, Any], kernel: str, bias: str, axes: tuple[int, int], features: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Read the classifier of a source, with the same checks as for all other weights.

    Args:
      source: what to call the source in messages.
      arrays: its arrays by name.
      kernel: name of the kernel.
      bias: name of the bias.
      axes: `kernel = array.transpose(axes)`, (features, identities).
      features: outputs of the backbone.

    Returns:
      Kernel (features, identities) and bias (identities,), float32; None if the source has neither.

    Raises:
      StructureError: one without the other, or no floats, or other shapes.
      DataError: NaN or infinity.
    """
    if kernel not in arrays and bias not in arrays:
        return None
    for name, other in ((kernel, bias), (bias, kernel)):
        if name not in arrays:
            raise StructureError(source, name, "nothing", f"an array, since there is '{other}'", "Get the file again.")
    identities = math.prod(_shape(arrays[bias]))
    shapes = ((features, identities), (identities,))
    leaves = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    entries = (Entry("kernel", kernel, axes), Entry("bias", bias))
    found = [converted(source, entry, arrays[entry.name], leaf) for entry, leaf in zip(entries, leaves, strict=True)]
    if not identities:
        raise StructureError(source, bias, "float32[0]", "one value for each identity", "Get the file again.")
    return found[0], found[1]


def fold_scales(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fold the scales of batch norms, which our variables do not have, into the kernels before them.

    `scale (w x - mean) / s + bias = ((scale w) x - scale mean) / s + bias`, with an unchanged
    `s = sqrt(var + epsilon)`. A scale of 1 changes no bit.
    """
    leaves = dict(leaves)
    for layer in LAYERS:
        scale = leaves.pop(f"{PARAMS}/{layer.norm}/scale", None)
        if scale is not None:
            for path in (f"{PARAMS}/{layer.kernel}/kernel", f"{STATS}/{layer.norm}/mean"):
                leaves[path] = leaves[path] * scale
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Tree]:
    """Return `{path: leaf}` as nested dicts."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def converted(source: str, entry: Entry, value: Any, wanted: Any) -> np.ndarray:
    """Return an array of a source in our layout, float32: its shape is the wanted one, all its numbers are valid."""
    shape = list(wanted.shape)
    for axis, target in enumerate(entry.axes or ()):
        shape[target] = wanted.shape[axis]
    expected, hint = f"{wanted.dtype}[{','.join(map(str, shape))}]", "Is it another variant of the network?"
    if _shape(value) != tuple(shape):  # checked before the copy: a few bytes of a file may describe a huge tensor
        found = f"{getattr(value, 'dtype', 'array')}[{','.join(map(str, _shape(value)))}]"
        raise StructureError(source, entry.name, found, expected, hint)
    array = _host(source, entry.name, value)
    if array.shape != tuple(shape) or not np.issubdtype(array.dtype, np.floating):
        raise StructureError(source, entry.name, describe(array), expected, hint)
    with np.errstate(over="ignore"):  # values outside the range of float32 become infinite and are refused
        array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise DataError(f"{source}: '{entry.name}' holds NaN or infinity; the file is damaged. Get it again.")
    if entry.path.startswith(STATS) and entry.path.endswith("/var") and array.min() < 0:
        raise DataError(f"{source}: '{entry.name}' holds a negative variance; the file is damaged. Get it again.")
    return np.ascontiguousarray(array.transpose(entry.axes) if entry.axes else array)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if hasattr(value, "shape") else np.shape(value)


def _host(source: str, name: str, value: Any) -> np.ndarray:
    """Return an array, or a tensor of PyTorch on any device, as a NumPy array."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value  # NumPy has no bfloat16
        return np.asarray(value)
    except Exception as error:  # sparse, quantised and meta tensors raise TypeError, NotImplementedError, RuntimeError
        raise DataError(
            f"{source}: '{name}' is no plain array ({type(error).__name__}: {error}). Save it dense, in floats."
        ) from error
