"""Published weights as the variables of a shipped backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from pae_jax.errors import ArgumentError, DataError, StructureError
from pae_jax.models.published import Entry, Naming, namings
from pae_jax.models.weight_files import read_weights
from pae_jax.trees import Tree, describe, flatten, listing


class Weights(NamedTuple):
    """Contents of a weight file.

    Attributes:
      variables: `{collection: nested dict}` of the backbone, float32, for `pae.from_variables`.
      head: variables of the file's linear classifier,
        `{"params": {"kernel": (features, classes), "bias": (classes,)}}`; None if the file has none.
    """

    variables: dict[str, Tree]
    head: dict[str, Tree] | None


def load_weights(module: nn.Module, source: str | Path | Mapping[str, Any], sample: Tree) -> Weights:
    """Load published weights into a shipped backbone.

    | backbone | weights of |
    |---|---|
    | `resnet18`, `resnet34`, `resnet50` | torchvision |
    | `ViT` | timm, torchvision |
    | `EfficientNetLite` | timm; with `padding="even", epsilon=1e-5` those trained in PyTorch |
    | `Bert` | Hugging Face's BERT models, all-MiniLM-L6-v2 among them |

    Args:
      module: the backbone at width 1, of the sizes of the weights.
      source: a .safetensors file, a state dict written by `torch.save` (nothing in it is executed), or the state dict
        itself: a mapping of names to arrays or tensors. A common prefix of the names, such as "bert.", is ignored.
      sample: an input batch, as for `pae.linen`.

    Returns:
      The variables, and the classifier if the file has one.

    Raises:
      ArgumentError: a module for which no published weights are known.
      StructureError: the weights of another network; names what is missing, unexpected or of another shape.
      DataError: a file that cannot be read, or that holds NaN or infinity.

    Example:
      >>> import jax.numpy as jnp, pae_jax as pae
      >>> images = jnp.zeros((1, 224, 224, 3))
      >>> weights = pae.models.load_weights(pae.models.resnet50(), "resnet50.pth", images)  # doctest: +SKIP
      >>> net = pae.linen(pae.models.resnet50, images)  # doctest: +SKIP
      >>> state = pae.from_variables(net, weights.variables)  # doctest: +SKIP
    """
    known = namings(module)
    if not known:
        raise ArgumentError(
            f"no published weights are known for {type(module).__name__}; load_weights is for ResNet with the stem "
            "'imagenet', ViT, EfficientNetLite and Bert. Give other variables to pae.from_variables."
        )
    label = "state dict" if isinstance(source, Mapping) else str(source)
    arrays = source if isinstance(source, Mapping) else read_weights(source)
    naming, prefix = max(
        ((naming, _prefix(arrays, naming.entries[0].name)) for naming in known),
        key=lambda pair: sum(pair[1] + entry.name in arrays for entry in pair[0].entries),
    )
    found = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    _require_names(label, type(module).__name__, naming, found)
    template = flatten(jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), sample))
    leaves = {entry.path: _leaf(label, entry, found[entry.name], template[entry.path]) for entry in naming.entries}
    return Weights(traverse_util.unflatten_dict(leaves, sep="/"), _head(naming, found))


def _prefix(arrays: Mapping[str, Any], first: str) -> str:
    """Return the prefix before the name of the first layer."""
    ends = [name.removesuffix(first) for name in arrays if name.endswith(first)]
    return min((end for end in ends if not end or end.endswith(".")), key=len, default="")


def _require_names(label: str, model: str, naming: Naming, found: Mapping[str, Any]) -> None:
    asked = {entry.name for entry in naming.entries}
    allowed = (*naming.rest, *((f"{naming.head}.",) if naming.head else ()))
    missing = sorted(asked - found.keys())
    extra = [
        name
        for name in found
        if name not in asked and not name.startswith(allowed) and not name.endswith(".num_batches_tracked")
    ]
    if missing or extra:
        text = f"{len(missing)} weights missing{listing(missing)}, {len(extra)} unexpected{listing(extra)}"
        expected = f"all {len(asked)} weights of {model} as {naming.source} names them, and no others"
        raise StructureError(label, "", text, expected, "Are these the weights of another network, or of other sizes?")


def _leaf(label: str, entry: Entry, array: Any, wanted: Any) -> np.ndarray:
    array = _host(array)
    found = describe(array)
    if array.shape[:1] and array.shape[0] % entry.parts == 0:
        array = np.split(array, entry.parts)[entry.part]
    array = array.transpose(entry.axes) if entry.axes and array.ndim == len(entry.axes) else array
    # Heads are a separate axis in our kernels, (size, heads, head size) or (heads, head size, size).
    same = array.shape == wanted.shape or (
        "/attention/" in entry.path and array.size == wanted.size and array.shape[-1:] != () and _merges(array, wanted)
    )
    if not same or array.dtype.kind not in "fV":
        hint = "Give the module the sizes of the weights, and a sample of the images they were trained on."
        raise StructureError(label, entry.name, found, f"what fits {entry.path}, {describe(wanted)}", hint)
    array = np.ascontiguousarray(array.reshape(wanted.shape), np.float32)
    if not np.isfinite(array).all():
        raise DataError(f"{label}: '{entry.name}' holds NaN or infinity; the file is damaged. Get it again.")
    if entry.path.endswith("/var") and array.min() < 0:
        raise DataError(f"{label}: '{entry.name}' holds a negative variance; the file is damaged. Get it again.")
    return array


def _merges(array: np.ndarray, wanted: Any) -> bool:
    """Whether two neighbouring axes of the leaf, heads and head size, are merged into one axis of the array."""
    shape = tuple(wanted.shape)
    merged = [(*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]) for i in range(len(shape) - 1)]
    return array.shape in merged


def _host(array: Any) -> np.ndarray:
    """Return an array, or a tensor of PyTorch on any device, as a NumPy array."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    return np.asarray(array)


def _head(naming: Naming, found: Mapping[str, Any]) -> dict[str, Tree] | None:
    if f"{naming.head}.weight" not in found or f"{naming.head}.bias" not in found:
        return None
    kernel, bias = (_host(found[f"{naming.head}.{name}"]).astype(np.float32) for name in ("weight", "bias"))
    return {"params": {"kernel": np.ascontiguousarray(kernel.T), "bias": bias}}
