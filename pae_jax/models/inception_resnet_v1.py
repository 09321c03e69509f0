"""InceptionResnetV1, the face network of FaceNet and of PAE."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pae_jax.errors import StructureError
from pae_jax.models.conv import Conv
from pae_jax.models.scaling import scaled

_XAVIER = nn.initializers.xavier_uniform()
_BatchNorm = functools.partial(nn.BatchNorm, momentum=0.995, epsilon=1e-3, use_scale=False)
_max_pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding="VALID")


class InceptionResnetV1(nn.Module):
    """Inception with residual connections: features of faces, 133 kernels, 23.4 million shared weights at width 1.

    Every convolution of c filters has floor(c · width) of them, except the residual projections, which have as many
    as their block has inputs, and the last layer, which always has `features`. A head gets these features unnormalised;
    a face embedding is the features divided by their L2 norm.

    Call it as `module(images, train)`. Training uses batch statistics and dropout, so it mutates `batch_stats` and,
    unless `dropout` is 0, draws from the stream "dropout".

    Attributes:
      width: channel factor, above 0.
      features: length of the feature vector, the same at every width.
      dropout: share of the pooled features that training drops, in [0, 1).
      dtype: dtype of the computation and of the features; None means float32. Parameters are always float32.

    Args:
      images: (batch, height, width, channels), floating point, at least 75 pixels high and wide (published: 160×160
        RGB, standardised per image).
      train: whether to train (batch statistics, dropout) or to evaluate (running statistics).

    Returns:
      (batch, features).

    Example:
      >>> backbone = InceptionResnetV1(width=0.25)
      >>> images = jax.ShapeDtypeStruct((2, 160, 160, 3), jnp.float32)
      >>> jax.eval_shape(lambda x: backbone.init_with_output(jax.random.key(0), x, train=False)[0], images).shape
      (2, 512)

    Reference: Szegedy et al. 2017 (Inception-v4), in FaceNet's variant (Schroff et al. 2015; D. Sandberg's facenet),
    which PAE packs (Hung et al., ICMR 2019).
    """

    width: float = 1.0
    features: int = 512
    dropout: float = 0.2
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return the features of `images`."""
        if images.ndim != 4 or min(images.shape[1:3]) < 75:
            raise StructureError("images", "", images.shape, "(batch, height, width, channels), 75 pixels or more")
        unit = functools.partial(_Unit, train=train, width=self.width, dtype=self.dtype)
        block = functools.partial(_Residual, unit)

        x = unit(32, 3, 2, "VALID", name="Conv2d_1a")(images)
        x = unit(32, 3, 1, "VALID", name="Conv2d_2a")(x)
        x = unit(64, 3, name="Conv2d_2b")(x)
        x = _max_pool(x)
        x = unit(80, 1, name="Conv2d_3b")(x)
        x = unit(192, 3, 1, "VALID", name="Conv2d_4a")(x)
        x = unit(256, 3, 2, "VALID", name="Conv2d_4b")(x)
        for i in range(1, 6):
            x = block(_BLOCK35, scale=0.17, name=f"Block35_{i}")(x)
        x = _Reduction(unit, _MIXED_6A, name="Mixed_6a")(x)
        for i in range(1, 11):
            x = block(_BLOCK17, scale=0.10, name=f"Block17_{i}")(x)
        x = _Reduction(unit, _MIXED_7A, name="Mixed_7a")(x)
        for i in range(1, 6):
            x = block(_BLOCK8, scale=0.20, name=f"Block8_{i}")(x)
        x = block(_BLOCK8, scale=1.0, activate=False, name="Block8_6")(x)

        x = x.mean(axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(self.features, use_bias=False, kernel_init=_XAVIER, dtype=self.dtype, name="Bottleneck")(x)
        return _BatchNorm(not train, dtype=self.dtype, name="Bottleneck_bn")(x)


class _Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    channels: int
    kernel: int | tuple[int, int]
    stride: int = 1
    padding: str = "SAME"
    _: dataclasses.KW_ONLY
    train: bool
    width: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel
        channels, strides = scaled(self.channels, self.width), (self.stride, self.stride)
        convolution = functools.partial(Conv, use_bias=False, kernel_init=_XAVIER, dtype=self.dtype, name="conv")
        x = convolution(channels, size, strides, self.padding)(x)
        return nn.relu(_BatchNorm(not self.train, dtype=self.dtype, name="bn")(x))


# Units of a branch, in order: (channels, kernel size[, stride, padding]).
_Chain = tuple[tuple[Any, ...], ...]
_BLOCK35: tuple[_Chain, ...] = (((32, 1),), ((32, 1), (32, 3)), ((32, 1), (32, 3), (32, 3)))
_BLOCK17: tuple[_Chain, ...] = (((128, 1),), ((128, 1), (128, (1, 7)), (128, (7, 1))))
_BLOCK8: tuple[_Chain, ...] = (((192, 1),), ((192, 1), (192, (1, 3)), (192, (3, 1))))
_MIXED_6A: tuple[_Chain, ...] = (((384, 3, 2, "VALID"),), ((192, 1), (192, 3), (256, 3, 2, "VALID")))
_MIXED_7A: tuple[_Chain, ...] = (
    ((256, 1), (384, 3, 2, "VALID")),
    ((256, 1), (256, 3, 2, "VALID")),
    ((256, 1), (256, 3), (256, 3, 2, "VALID")),
)


class _Branch(nn.Module):
    """One unit after the other: Conv2d_0a, Conv2d_0b, ..."""

    unit: Callable[..., _Unit]
    chain: _Chain

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for letter, unit in zip("abc", self.chain, strict=False):
            x = self.unit(*unit, name=f"Conv2d_0{letter}")(x)
        return x


class _Residual(nn.Module):
    """Add to the input a scaled projection of the concatenated branches."""

    unit: Callable[..., _Unit]
    branches: tuple[_Chain, ...]
    scale: float
    activate: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mixed = [_Branch(self.unit, chain, name=f"Branch_{i}")(x) for i, chain in enumerate(self.branches)]
        project = Conv(x.shape[-1], (1, 1), kernel_init=_XAVIER, dtype=x.dtype, name="Projection")
        x = x + self.scale * project(jnp.concatenate(mixed, axis=-1))
        return nn.relu(x) if self.activate else x


class _Reduction(nn.Module):
    """Halve the map: concatenate strided branches and a max pool of the input."""

    unit: Callable[..., _Unit]
    branches: tuple[_Chain, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mixed = [_Branch(self.unit, chain, name=f"Branch_{i}")(x) for i, chain in enumerate(self.branches)]
        return jnp.concatenate([*mixed, _max_pool(x)], axis=-1)
