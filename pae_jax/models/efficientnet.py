"""EfficientNet-Lite0: inverted residuals with depthwise convolutions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike

from pae_jax.errors import ArgumentError, StructureError
from pae_jax.models.conv import Conv
from pae_jax.models.scaling import scaled
from pae_jax.trees import flatten

# Per stage: (channels after, factor of the channels inside, kernel size, stride of the first block, blocks).
STAGES = (
    (16, 1, 3, 1, 1),
    (24, 6, 3, 2, 2),
    (40, 6, 5, 2, 2),
    (80, 6, 3, 2, 3),
    (112, 6, 5, 1, 3),
    (192, 6, 5, 2, 4),
    (320, 6, 3, 1, 1),
)


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0: features are the mean over the last map, 1280 at width 1.

    A block widens its input by a 1×1 convolution, filters every channel by itself and projects back by another 1×1
    convolution; `x <- x + block(x)` from the second block of a stage on. Batch norms and ReLU6 throughout, no
    squeeze-and-excitation. A layer of c channels has floor(c · width) of them.

    Call it as `module(images, train)`. Training uses batch statistics, so it mutates `batch_stats`.

    Attributes:
      width: channel factor, above 0.
      inner: further factor of the channels inside the blocks that widen; a network that grows by it alone keeps its
        number of features.
      padding: of strided convolutions: "same" as TensorFlow, in which the network was published, or "even", half on
        each side, as weights trained in PyTorch have it.
      epsilon: of the batch norms: 1e-3 as published, 1e-5 for weights trained in PyTorch.
      momentum: share of the running statistics that one step keeps.
      folded: a scale and an offset per channel instead of the batch norms; `fold_norms` makes the variables.
      stages: per stage (channels, expansion, kernel size, stride, blocks).
      dtype: dtype of the computation and of the features; None means float32. Parameters are always float32.

    Args:
      images: (batch, height, width, image channels), floating point, standardised; published for 224×224.
      train: whether to train (batch statistics) or to evaluate (running statistics).

    Returns:
      (batch, floor(1280 · width)).

    Example:
      >>> import jax.numpy as jnp
      >>> backbone = EfficientNetLite(width=0.5)
      >>> images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
      >>> jax.eval_shape(lambda x: backbone.init_with_output(jax.random.key(0), x, train=False)[0], images).shape
      (2, 640)

    Reference: Tan and Le, ICML 2019 (EfficientNet), in the variant without squeeze-and-excitation of the TPU models
    repository; 3,371,024 parameters without the classifier. `pae.models.load_weights` reads timm's.
    """

    width: float = 1.0
    inner: float = 1.0
    padding: Literal["same", "even"] = "same"
    epsilon: float = 1e-3
    momentum: float = 0.99
    folded: bool = False
    stages: tuple[tuple[int, int, int, int, int], ...] = STAGES
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return the features of `images`."""
        if images.ndim != 4:
            raise StructureError("images", "", images.shape, "(batch, height, width, channels)")
        if self.padding not in ("same", "even"):
            raise ArgumentError(f"EfficientNetLite: padding must be 'same' or 'even', found {self.padding!r}.")
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        conv = functools.partial(Conv, use_bias=False, kernel_init=init, dtype=self.dtype)
        batch_norm = functools.partial(nn.BatchNorm, not train, momentum=self.momentum, epsilon=self.epsilon)
        norm = functools.partial(_Affine if self.folded else batch_norm, dtype=self.dtype)
        even = self.padding == "even"
        stem = conv(scaled(32, self.width), (3, 3), 2, 1 if even else "SAME", name="Conv_stem")
        x = nn.relu6(norm(name="BatchNorm_stem")(stem(images)))
        for stage, (channels, factor, size, stride, blocks) in enumerate(self.stages, start=1):
            block = functools.partial(_Block, conv, norm, even, scaled(channels, self.width), factor, self.inner, size)
            for number in range(1, blocks + 1):
                x = block(stride if number == 1 else 1, number > 1, name=f"Block_{stage}_{number}")(x)
        x = nn.relu6(norm(name="BatchNorm_last")(conv(scaled(1280, self.width), (1, 1), name="Conv_last")(x)))
        return x.mean(axis=(1, 2))


class _Block(nn.Module):
    """Expansion, depthwise convolution, projection; added to the input from the second block of a stage on."""

    conv: Callable[..., Any]
    norm: Callable[..., Any]
    even: bool
    channels: int
    factor: int
    inner: float
    size: int
    stride: int
    residual: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the map of the next block."""
        inside, y = x.shape[-1] * self.factor, x
        if self.factor > 1:
            inside = scaled(inside, self.inner)
            y = nn.relu6(self.norm(name="BatchNorm_expand")(self.conv(inside, (1, 1), name="Conv_expand")(y)))
        padding = self.size // 2 if self.even else "SAME"
        window = (self.size, self.size)
        depthwise = self.conv(inside, window, self.stride, padding, feature_group_count=inside, name="Conv_depthwise")
        y = nn.relu6(self.norm(name="BatchNorm_depthwise")(depthwise(y)))
        y = self.norm(name="BatchNorm_project")(self.conv(self.channels, (1, 1), name="Conv_project")(y))
        return x + y if self.residual else y


class _Affine(nn.Module):
    """A scale and an offset per channel, with the names of a batch norm's."""

    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the scaled map."""
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        return (x * scale[None, None, None] + bias[None, None, None]).astype(self.dtype or x.dtype)


def fold_norms(module: EfficientNetLite, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of `module.clone(folded=True)` that computes the same features in evaluation.

    Kernels are divided by the standard deviation after them, and offsets take the mean: K' = K / sqrt(var + epsilon),
    bias' = bias - scale · mean / sqrt(var + epsilon). Running statistics then neither move in a training nor have to be
    stored with a task.

    Args:
      module: the network with batch norms.
      variables: its variables, `params` and `batch_stats`.

    Returns:
      `{"params": ...}`, of the same names and shapes; equal features to rounding.

    Raises:
      StructureError: `variables` have no running statistics of a batch norm.

    Example:
      >>> import jax.numpy as jnp
      >>> module = EfficientNetLite(stages=((8, 1, 3, 1, 1),))
      >>> images = jnp.ones((1, 8, 8, 3))
      >>> variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), images)
      >>> sorted(variables), sorted(jax.eval_shape(lambda v: fold_norms(module, v), variables))
      (['batch_stats', 'params'], ['params'])

    Source: the folding of batch norms for inference (Jacob et al., CVPR 2018), with the scale kept apart.
    """
    params, statistics = dict(flatten(variables["params"])), flatten(variables.get("batch_stats", {}))
    for norm in [path.removesuffix("/scale") for path in params if path.endswith("/scale")]:
        kernel = norm.replace("BatchNorm_", "Conv_") + "/kernel"
        if f"{norm}/var" not in statistics:
            hint = "Give the variables of a network with batch norms."
            raise StructureError("variables", f"batch_stats/{norm}/var", "nothing", "running variances", hint)
        deviation = jnp.sqrt(statistics[f"{norm}/var"] + module.epsilon)
        params[f"{norm}/bias"] -= params[f"{norm}/scale"] * statistics[f"{norm}/mean"] / deviation
        params[kernel] = params[kernel] / deviation[None, None, None]
    return {"params": traverse_util.unflatten_dict(params, sep="/")}
