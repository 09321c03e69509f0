"""A convolution that XLA's CPU compiler runs at full speed for every kernel and map size.

Three kinds of convolution miss that compiler's fast path. The first is the 1×1 convolution, which is 2 to 5 times
slower than the equivalent matrix product. The second has a kernel with more pixels than the map it slides over: the 3×3
convolutions on the 2×2 maps of VGG16's last block take 45 to 120 times as long as they should, three quarters of a
training step. A gradient slides over the output map, so the output map counts as well. These two are computed here as a
matrix product over patches (a training step of VGG16 then takes 0.37 s instead of 1.58 s, of InceptionResnetV1 0.60 s
instead of 0.71 s). The third is the depthwise convolution, which is 15 to 50 times slower than a sum over its taps of
shifted images times one row of the kernel; here it is computed as that sum. Of this sum both gradients are again slow
there. That by the kernel is a sum over all pixels for each tap; it is added up example by example, which is 4 to 8
times faster. That by the images would pad one image per tap; here it pads one image and shifts it (where only kernels
are trained, a step of EfficientNet then takes a fifth of the time).

All other convolutions use `lax.conv_general_dilated`.

The choice depends on spatial shapes and on whether there is one group per channel. It does not depend on the number of
channels, so a network has the same structure at every width, nor on the backend, so it has the same structure on every
machine; only gradients differ between backends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Pads = Sequence[tuple[int, int]]
Pair = tuple[jax.Array, jax.Array]


def convolve(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str | Pads, **options: Any
) -> jax.Array:
    """Return `lax.conv_general_dilated` of the same arguments, by a product or a sum over taps where that is faster.

    Args:
      images: (batch, height, width, channels in), floating point.
      kernel: (kernel height, kernel width, channels in, channels out), of the dtype of `images`.
      strides: pixels between neighbouring windows, one number per spatial axis.
      padding: "SAME", "VALID", or (low, high) pixels of zeros per spatial axis.
      **options: as in `lax.conv_general_dilated`. It always handles dilation, groups of several channels, other than
        two spatial axes, layouts other than NHWC and unknown options.

    Returns:
      (batch, new height, new width, channels out), equal to the convolution up to the order of summation.

    Example:
      >>> layout = ("NHWC", "HWIO", "NHWC")
      >>> convolve(jnp.ones((1, 2, 2, 3)), jnp.ones((3, 3, 3, 4)), (1, 1), "SAME", dimension_numbers=layout)[0, 0, 0]
      Array([12., 12., 12., 12.], dtype=float32)
    """
    groups = options.get("feature_group_count", 1)
    depthwise = groups > 1 and images.shape[-1] == kernel.shape[-1] == groups
    if not _is_plain(images, options) or (groups > 1 and not depthwise):
        return lax.conv_general_dilated(images, kernel, strides, padding, **options)
    image, window = images.shape[1:3], kernel.shape[:2]
    pads = lax.padtype_to_pads(image, window, strides, padding) if isinstance(padding, str) else padding
    steps = [(n + sum(pad) - k) // stride + 1 for n, k, stride, pad in zip(image, window, strides, pads, strict=True)]
    if depthwise:
        return _depthwise(_padded(images, pads), kernel, tuple(strides), tuple(steps))
    smallest_map = min(math.prod(image), math.prod(steps))
    if math.prod(window) == 1 or math.prod(window) >= smallest_map > 0:
        numeric = {name: options[name] for name in _NUMERIC if name in options}
        return _patch_product(images, kernel, strides, pads, steps, numeric)
    return lax.conv_general_dilated(images, kernel, strides, pads, **options)


Conv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: convolve)
"""`flax.linen.Conv` itself, with the same arguments, names, parameters and initial values, that calls `convolve`."""


def _is_plain(images: jax.Array, options: dict[str, Any]) -> bool:
    """Whether this is an ordinary two-dimensional NHWC convolution, in groups or not: no dilation, no batch groups."""
    if images.ndim != 4 or not options.keys() <= {*_NUMERIC, *_GEOMETRIC}:
        return False
    dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    layout = lax.conv_dimension_numbers(images.shape, images.shape, options.get("dimension_numbers"))
    return set(dilations) <= {1} and options.get("batch_group_count", 1) == 1 and layout == _NHWC


_NUMERIC = ("precision", "preferred_element_type")
_GEOMETRIC = ("lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count", "batch_group_count")
_NHWC = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def _patch_product(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], pads: Pads, steps: list[int], numeric: dict[str, Any]
) -> jax.Array:
    """Convolve as the product of patches (batch, steps, steps, taps, channels in) with the kernel's taps."""
    # The taps get an axis of their own instead of being merged with the channels: only axes of fixed size are reshaped,
    # and the channel axis is contracted directly. This keeps the widening analysis simple.
    patches = jnp.stack(_shifted(_padded(images, pads), kernel.shape[:2], strides, steps), axis=3)
    taps = kernel.reshape(-1, *kernel.shape[2:])
    return lax.dot_general(patches, taps, (((3, 4), (0, 1)), ((), ())), **numeric)


def _tap_sum(images: jax.Array, kernel: jax.Array, strides: Sequence[int], steps: Sequence[int]) -> jax.Array:
    """Convolve each channel by itself, as the sum over the kernel's taps of shifted images times one row of it."""
    rows = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
    shifted = _shifted(images, kernel.shape[:2], strides, steps)
    products = [part * lax.index_in_dim(rows, tap, keepdims=False) for tap, part in enumerate(shifted)]
    return functools.reduce(jnp.add, products)


def _tap_sum_by_example(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], steps: Sequence[int]
) -> jax.Array:
    """Return the same with a transpose by the kernel that adds maps example by example, and sums their pixels last."""
    rows = [jnp.broadcast_to(row, (*steps, row.shape[-1])) for row in kernel.reshape(-1, kernel.shape[-1])]

    @functools.partial(jax.checkpoint, prevent_cse=False)  # or the loop would store the shifted images of all examples
    def one(_: None, image: jax.Array) -> tuple[None, jax.Array]:
        shifted = _shifted(image[None], kernel.shape[:2], strides, steps)
        return None, functools.reduce(jnp.add, [part[0] * row for part, row in zip(shifted, rows, strict=True)])

    return lax.scan(one, None, images)[1]


_depthwise = jax.custom_jvp(_tap_sum, nondiff_argnums=(2, 3))


@_depthwise.defjvp
def _depthwise_tangent(strides: Sequence[int], steps: Sequence[int], primals: Pair, tangents: Pair) -> Pair:
    images, kernel = primals
    plain, by_example = (functools.partial(f, strides=strides, steps=steps) for f in (_tap_sum, _tap_sum_by_example))
    of_kernel = lax.platform_dependent(images, tangents[1], cpu=by_example, default=plain)
    of_images = _sum_of_moved(tangents[0], kernel, strides, steps)
    return _depthwise(images, kernel, strides, steps), of_images + of_kernel


def _sum_of_moved(images: jax.Array, kernel: jax.Array, strides: Sequence[int], steps: Sequence[int]) -> jax.Array:
    """Return `_tap_sum`, moving the images before they are added up, so that the transpose pads one image alone."""
    height, width = kernel.shape[:2]
    moved = [
        _padded(images * kernel[y, x, 0][None, None, None], ((height - 1 - y, y), (width - 1 - x, x)))
        for y in range(height)
        for x in range(width)
    ]
    return _window(functools.reduce(jnp.add, moved), height - 1, width - 1, strides, steps)


def _padded(images: jax.Array, pads: Pads) -> jax.Array:
    """Return images with a border of zeros, (low, high) pixels per spatial axis."""
    config = ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0))
    return lax.pad(images, jnp.zeros((), images.dtype), config)


def _shifted(images: jax.Array, window: Sequence[int], strides: Sequence[int], steps: Sequence[int]) -> list[jax.Array]:
    """Return the shifted image of each tap of a kernel, row by row: arrays (batch, steps, steps, channels)."""
    return [_window(images, y, x, strides, steps) for y in range(window[0]) for x in range(window[1])]


def _window(images: jax.Array, y: int, x: int, strides: Sequence[int], steps: Sequence[int]) -> jax.Array:
    """Return every `strides`-th pixel from (y, x) on, `steps` of them."""
    batch, _, _, channels = images.shape
    (rows, columns), (down, right) = steps, strides
    stop = (batch, y + (rows - 1) * down + 1, x + (columns - 1) * right + 1, channels)
    return lax.slice(images, (0, y, x, 0), stop, (1, down, right, 1))
