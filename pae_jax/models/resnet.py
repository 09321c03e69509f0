"""Residual networks: ResNet-18, ResNet-34, ResNet-50 and the small ones for CIFAR."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from pae_jax.errors import ArgumentError, StructureError
from pae_jax.models.conv import Conv
from pae_jax.models.scaling import scaled


class ResNet(nn.Module):
    """Stages of residual blocks; the features are the mean over the last map.

    `x <- relu(block(x) + shortcut(x))`. A basic block is two 3×3 convolutions with batch norm; a bottleneck is a 1×1, a
    3×3 and a 1×1 convolution, the last with four times the channels. The first block of every stage but the first
    halves the map by the stride of its (first) 3×3 convolution. Where map or channels change, the shortcut is a 1×1
    convolution with batch norm, otherwise the identity. A layer of c channels has floor(c · width) of them.

    Call it as `module(images, train)`. Training uses batch statistics, so it mutates `batch_stats`.

    Attributes:
      width: channel factor, above 0.
      stages: blocks per stage; `resnet18`, `resnet34` and `resnet50` fill this in.
      channels: channels per stage at width 1, one number per stage.
      stem: "imagenet" is a 7×7 convolution of stride 2 and a 3×3 max pool of stride 2, for images of about 100 pixels
        and more; "cifar" is one 3×3 convolution, for about 32 pixels.
      block: "basic" or "bottleneck".
      momentum: share of the running statistics that one step keeps.
      dtype: dtype of the computation and of the features; None means float32. Parameters are always float32.

    Args:
      images: (batch, height, width, image channels), floating point, standardised.
      train: whether to train (batch statistics) or to evaluate (running statistics).

    Returns:
      (batch, floor(channels[-1] · width)); with bottlenecks (batch, floor(4 · channels[-1] · width)).

    Example:
      >>> import jax.numpy as jnp
      >>> backbone = resnet18(width=0.5)
      >>> images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
      >>> variables = jax.eval_shape(lambda x: backbone.init(jax.random.key(0), x, train=False), images)
      >>> jax.eval_shape(lambda v, x: backbone.apply(v, x, train=False), variables, images).shape
      (2, 256)

    Reference: He et al. 2016. With the stem "imagenet", layer for layer torchvision's resnet18, resnet34 and
    resnet50 without their last layer (11,176,512, 21,284,672 and 23,508,032 parameters); `pae.models.load_weights`
    reads theirs.
    """

    width: float = 1.0
    stages: Sequence[int] = (2, 2, 2, 2)
    channels: Sequence[int] = (64, 128, 256, 512)
    stem: Literal["imagenet", "cifar"] = "imagenet"
    block: Literal["basic", "bottleneck"] = "basic"
    momentum: float = 0.9
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return the features of `images`."""
        if images.ndim != 4:
            raise StructureError("images", "", images.shape, "(batch, height, width, channels)")
        if len(self.stages) != len(self.channels):
            raise ArgumentError(
                f"ResNet: found stages {self.stages} and channels {self.channels}; expected one number of channels per "
                "stage."
            )
        for name, value, choices in (("stem", self.stem, _STEMS), ("block", self.block, _BLOCKS)):
            if value not in choices:
                raise ArgumentError(f"ResNet: found {name} {value!r}; expected one of {', '.join(map(repr, choices))}.")
        # Half of the padding on each side, as in the paper: 'SAME' would put all of an odd padding at the far side.
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        conv = functools.partial(Conv, use_bias=False, kernel_init=init, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, not train, momentum=self.momentum, epsilon=1e-5, dtype=self.dtype)
        bottleneck = self.block == "bottleneck"
        layers = functools.partial(_Block, conv, norm, bottleneck)

        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        stem = conv(scaled(self.channels[0], self.width), (size, size), stride, size // 2, name="Conv_stem")
        x = nn.relu(norm(name="BatchNorm_stem")(stem(images)))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]  (flax annotates str only)
        for stage, (blocks, channels) in enumerate(zip(self.stages, self.channels, strict=True), start=1):
            for block in range(1, blocks + 1):
                halve = stage > 1 and block == 1
                counts = (scaled(channels, self.width), scaled(4 * channels if bottleneck else channels, self.width))
                x = layers(*counts, halve, block == 1, name=f"Block_{stage}_{block}")(x)
        return x.mean(axis=(1, 2))


resnet18 = functools.partial(ResNet, stages=(2, 2, 2, 2))
resnet34 = functools.partial(ResNet, stages=(3, 4, 6, 3))
resnet50 = functools.partial(ResNet, stages=(3, 4, 6, 3), block="bottleneck")

_STEMS = ("imagenet", "cifar")
_BLOCKS = ("basic", "bottleneck")


class _Block(nn.Module):
    """Two or three convolutions with a residual connection."""

    conv: Callable[..., Any]
    norm: Callable[..., Any]
    bottleneck: bool
    channels: int
    out: int
    halve: bool
    first: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the map of the next block."""
        stride = 2 if self.halve else 1
        # (channels, kernel size, stride, padding) of each convolution
        if self.bottleneck:
            layers = ((self.channels, 1, 1, 0), (self.channels, 3, stride, 1), (self.out, 1, 1, 0))
        else:
            layers = ((self.out, 3, stride, 1), (self.out, 3, 1, 1))
        y = x
        for number, (channels, size, step, padding) in enumerate(layers, start=1):
            y = nn.relu(y) if number > 1 else y
            y = self.conv(channels, (size, size), step, padding, name=f"Conv_{number}")(y)
            y = self.norm(name=f"BatchNorm_{number}")(y)
        if self.halve or (self.bottleneck and self.first):
            x = self.conv(self.out, (1, 1), stride, 0, name="Conv_shortcut")(x)
            x = self.norm(name="BatchNorm_shortcut")(x)
        return nn.relu(x + y)
