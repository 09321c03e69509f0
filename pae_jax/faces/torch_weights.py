"""FaceNet as a state dict of facenet-pytorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pae_jax.errors import DataError, StructureError
from pae_jax.faces.naming import LAYERS
from pae_jax.faces.placing import STATS, Entry, Weights, fold_scales, gather, nest
from pae_jax.trees import PARAMS, Tree


def read(path: Path, template: Tree) -> Weights:
    """Read a state dict from a file that `torch.save` wrote; only arrays are unpickled.

    Args:
      path: the file.
      template: our variables, concrete or abstract, for the shapes.

    Raises:
      DataError: the file cannot be read, or torch is not installed.
      StructureError: the weights of another network.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"{path}: reading a PyTorch file needs the package torch ({error}). Install it with pip install torch, or "
            "give the state dict itself: a mapping of names to arrays."
        ) from error
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign or damaged file shows itself in many types
        raise DataError(f"{path}: cannot be read as a state dict of PyTorch: {error}") from error
    return place(path.name, weights, template)


def place(source: str, weights: Any, template: Tree) -> Weights:
    """Place the arrays of a state dict; the scales of its batch norms go into the kernels.

    Args:
      source: what to call the source in messages.
      weights: `{name: array or tensor}`.
      template: our variables, concrete or abstract, for the shapes.

    Raises:
      StructureError: no mapping of names to arrays, or the arrays of another network.
      DataError: an array holds numbers that no network could have.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise StructureError(source, "", type(weights).__name__, "a state dict: a mapping of names to arrays")
    arrays = {name: _host(array) for name, array in weights.items()}
    entries = []
    for layer in LAYERS:
        # Torch has (out, in, height, width) and (out, in).
        axes = (1, 0) if layer.kernel == "Bottleneck" else (2, 3, 1, 0)
        entries.append(Entry(f"{PARAMS}/{layer.kernel}/kernel", f"{layer.torch}.weight", axes))
        if layer.norm is None:
            entries.append(Entry(f"{PARAMS}/{layer.kernel}/bias", f"{layer.torch}.bias"))
            continue
        entries.append(Entry(f"{PARAMS}/{layer.norm}/scale", f"{layer.torch_norm}.weight"))
        entries.append(Entry(f"{PARAMS}/{layer.norm}/bias", f"{layer.torch_norm}.bias"))
        entries.append(Entry(f"{STATS}/{layer.norm}/mean", f"{layer.torch_norm}.running_mean"))
        entries.append(Entry(f"{STATS}/{layer.norm}/var", f"{layer.torch_norm}.running_var"))

    def ignored(name: str) -> bool:
        return name.startswith("logits.") or name.endswith(".num_batches_tracked")

    leaves = fold_scales(gather(source, arrays, entries, template, ignored))
    return Weights(nest(leaves), _classifier(arrays))


def _classifier(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    kernel, bias = arrays.get("logits.weight"), arrays.get("logits.bias")
    return None if kernel is None or bias is None else (kernel.T, bias)


def _host(array: Any) -> np.ndarray:
    """Return an array, or a tensor of PyTorch on any device, as a NumPy array."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    return np.asarray(array)
