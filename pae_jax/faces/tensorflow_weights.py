"""Map weights with TensorFlow names, from a frozen graph or a checkpoint, to our variables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pae_jax.faces.naming import LAYERS, SCOPE
from pae_jax.faces.placing import STATS, Entry, Weights, classifier, fold_scales, gather, nest
from pae_jax.trees import PARAMS, Tree

EPSILON = np.float32(1e-3)
"""What the batch norms of InceptionResnetV1 add to a variance."""

UNIT_VARIANCE = np.float32(1) - EPSILON
"""The running variance that a batch norm divides by exactly 1 with: in float32, it and epsilon add up to 1."""


def place(source: str, arrays: Mapping[str, np.ndarray], template: Tree) -> Weights:
    """Map arrays with TensorFlow names to our variables.

    A unit is either in its training form (kernel; offset, mean and variance of its batch norm) or folded for inference:
    `w' = w / s`, `b' = offset - mean / s`. A folded one gets mean 0, a variance that divides by 1, and the offset b',
    which computes the same bits as the folded layer.

    Args:
      source: what to call the source in messages.
      arrays: its float arrays by name.
      template: our variables, concrete or abstract, for the shapes.

    Raises:
      StructureError: the arrays of another network.
      DataError: an array contains invalid numbers.
    """
    entries, folded = [], []
    for layer in LAYERS:
        scope, bias = layer.tensorflow, f"{PARAMS}/{layer.norm or layer.kernel}/bias"
        entries.append(Entry(f"{PARAMS}/{layer.kernel}/kernel", f"{scope}/weights"))
        if layer.norm is None:
            entries.append(Entry(bias, f"{scope}/biases"))
            continue
        if f"{scope}/{_FOLDED}" in arrays:
            entries.append(Entry(bias, f"{scope}/{_FOLDED}"))
            folded.append(layer.norm)
            continue
        entries.append(Entry(bias, f"{scope}/BatchNorm/beta"))
        entries.append(Entry(f"{STATS}/{layer.norm}/mean", f"{scope}/BatchNorm/moving_mean"))
        entries.append(Entry(f"{STATS}/{layer.norm}/var", f"{scope}/BatchNorm/moving_variance"))
        scales = (f"{scope}/BatchNorm/{name}" for name in _SCALES)
        entries.extend(Entry(f"{PARAMS}/{layer.norm}/scale", name) for name in scales if name in arrays)
    known = {entry.name for entry in entries}

    def ignored(name: str) -> bool:
        # A training checkpoint also contains counters, and optimizer slots and averages under the weights' names.
        return not name.startswith(f"{SCOPE}/") or any(name.startswith(f"{weight}/") for weight in known)

    leaves = fold_scales(gather(source, arrays, entries, template, ignored))
    for norm in folded:
        channels = leaves[f"{PARAMS}/{norm}/bias"].shape
        leaves[f"{STATS}/{norm}/mean"] = np.zeros(channels, np.float32)
        leaves[f"{STATS}/{norm}/var"] = np.full(channels, UNIT_VARIANCE, np.float32)
    features = leaves[f"{PARAMS}/Bottleneck/kernel"].shape[-1]
    return Weights(nest(leaves), classifier(source, arrays, "Logits/weights", "Logits/biases", (0, 1), features))


_FOLDED = "Conv2D_bn_offset"
_SCALES = ("gamma", "Const")  # trained, or the constant scale of a fused batch norm without one
