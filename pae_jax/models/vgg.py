"""VGG16 with batch norm, as CPG and its PackNet and PAE runs on CIFAR-100 use it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from pae_jax.errors import StructureError
from pae_jax.models.conv import Conv
from pae_jax.models.scaling import scaled

# Channels of the 3×3 convolutions; a 2×2 max pool ends each block.
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Thirteen 3×3 convolutions with batch norm and two dense layers: 33,584,832 shared weights at width 1.

    Every convolution of c channels and every dense layer of c units has floor(c · width) of them, the dense layers
    included. There is no dropout. The shared weights are counted for 32×32 RGB images, whose last map is 1×1; a larger
    last map is flattened, so the first dense layer grows with the image.

    Call it as `module(images, train)`. Training uses batch statistics, so it mutates `batch_stats`.

    Attributes:
      width: channel factor, above 0. The published sizes are at sqrt(1.5) (50,350,644 weights) and sqrt(2)
        (67,152,663).
      dense: units of the dense layers at width 1; empty for a purely convolutional backbone.
      dtype: dtype of the computation and of the features; None means float32. Parameters are always float32.

    Args:
      images: (batch, height, width, channels), floating point, at least 32 pixels high and wide.
      train: whether to train (batch statistics) or to evaluate (running statistics).

    Returns:
      (batch, floor(dense[-1] · width)), after the ReLU.

    Example:
      >>> import jax.numpy as jnp
      >>> backbone = VGG16(width=0.125)
      >>> images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
      >>> variables = jax.eval_shape(lambda x: backbone.init(jax.random.key(0), x, train=False), images)
      >>> jax.eval_shape(lambda v, x: backbone.apply(v, x, train=False), variables, images).shape
      (2, 512)

    Reference: Simonyan and Zisserman 2015; CPG (Hung et al., NeurIPS 2019), CIFAR-100 in 20 tasks. Initial values as
    there: convolutions normal with variance 2 / (9 · channels out), dense layers normal with deviation 0.01.
    """

    width: float = 1.0
    dense: Sequence[int] = (4096, 4096)
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return the features of `images`."""
        if images.ndim != 4 or min(images.shape[1:3]) < 32:
            raise StructureError("images", "", images.shape, "(batch, height, width, channels), 32 pixels or more")
        x = images
        for block, layers in enumerate(_BLOCKS, start=1):
            for layer, channels in enumerate(layers, start=1):
                x = Conv(
                    scaled(channels, self.width),
                    (3, 3),
                    use_bias=False,
                    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
                    dtype=self.dtype,
                    name=f"Conv_{block}_{layer}",
                )(x)
                norm = nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name=f"BatchNorm_{block}_{layer}")
                x = nn.relu(norm(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        for layer, units in enumerate(self.dense, start=1):
            init = nn.initializers.normal(0.01)
            x = nn.Dense(scaled(units, self.width), kernel_init=init, dtype=self.dtype, name=f"Dense_{layer}")(x)
            x = nn.relu(x)
        return x
