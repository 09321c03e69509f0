"""SphereNet-20, the face network of SphereFace and of CPG's experiment with faces."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pae_jax.errors import StructureError
from pae_jax.models.conv import Conv
from pae_jax.models.scaling import scaled

# Channels of each stage, and how many residual pairs follow its strided convolution.
_STAGES = ((64, 1), (128, 2), (256, 4), (512, 1))


class SphereNet20(nn.Module):
    """Twenty 3×3 convolutions with PReLU and without norms: 11,650,752 shared weights at width 1.

    Each of four stages halves the map by a strided convolution; then come pairs of convolutions, whose output is added
    to their input. The last map is flattened. A layer of c channels has floor(c · width) of them. Biases and PReLU
    slopes, one per channel, are local: each task has its own.

    Call it as `module(images)`; training and evaluation are the same.

    Attributes:
      width: channel factor, above 0.
      dtype: dtype of the computation and of the features; None means float32. Parameters are always float32.

    Args:
      images: (batch, height, width, channels), floating point, at least 16 pixels high and wide; published: 112×112
        RGB, in [-1, 1].

    Returns:
      (batch, last height · last width · floor(512 · width)); 25,088 features at the published size and width 1.

    Example:
      >>> backbone = SphereNet20(width=0.125)
      >>> images = jax.ShapeDtypeStruct((2, 112, 112, 3), jnp.float32)
      >>> jax.eval_shape(lambda x: backbone.init_with_output(jax.random.key(0), x)[0], images).shape
      (2, 3136)

    Reference: Liu et al., CVPR 2017 (SphereFace); CPG (Hung et al., NeurIPS 2019), which gives the last dense layer to
    the head. Initial values as in CPG: convolutions normal with variance 2 / (9 · channels out), slopes 0.25.
    """

    width: float = 1.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the features of `images`."""
        if images.ndim != 4 or min(images.shape[1:3]) < 16:
            raise StructureError("images", "", images.shape, "(batch, height, width, channels), 16 pixels or more")
        x = images
        for stage, (channels, pairs) in enumerate(_STAGES, start=1):
            x = self._layer(x, channels, f"{stage}_1", stride=2)
            for pair in range(pairs):
                first = self._layer(x, channels, f"{stage}_{2 * pair + 2}")
                x = x + self._layer(first, channels, f"{stage}_{2 * pair + 3}")
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))

    def _layer(self, x: jax.Array, channels: int, name: str, stride: int = 1) -> jax.Array:
        count, init = scaled(channels, self.width), nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        padding = ((1, 1), (1, 1))  # not "SAME", which pads a strided layer on one side only
        conv = Conv(count, (3, 3), (stride, stride), padding, kernel_init=init, dtype=self.dtype, name=f"Conv_{name}")
        x = conv(x)
        slope = self.param(f"slope_{name}", nn.initializers.constant(0.25), (count,), jnp.float32)
        return jnp.where(x >= 0, x, slope.astype(x.dtype)[None, None, None] * x)
