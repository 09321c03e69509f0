"""Augmentation of larger images on the device: crops of random size and shape, and squares cut out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pae_jax.checks import check_count, check_number
from pae_jax.data.decoding import as_size
from pae_jax.errors import ArgumentError


@dataclass(frozen=True)
class RandomSizedCrop:
    """A crop of random area and shape, resized, and a random flip; made by `random_sized_crop`.

    Attributes:
      size: (height, width) of the result.
      area: smallest and largest area of the crop, as a share of the image's.
      ratio: smallest and largest width over height of the crop.
      flip: whether left and right are exchanged in half of the images.
    """

    size: tuple[int, int]
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __call__(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Return augmented images (n, *size, channels), drawn by `key`."""
        x = _images(x)
        count, height, width, channels = x.shape
        areas, ratios, tops, lefts, flips = jax.random.split(key, 5)
        area = height * width * jax.random.uniform(areas, (count,), minval=self.area[0], maxval=self.area[1])
        low, high = map(math.log, self.ratio)
        ratio = jnp.exp(jax.random.uniform(ratios, (count,), minval=low, maxval=high))
        sides = jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=1)
        sides = jnp.clip(sides, 1.0, jnp.asarray([[height, width]], sides.dtype))
        draws = jnp.stack([jax.random.uniform(tops, (count,)), jax.random.uniform(lefts, (count,))], axis=1)
        corners = draws * (jnp.asarray([[height, width]], sides.dtype) - sides)
        shape = (*self.size, channels)

        def one(image: jax.Array, side: jax.Array, corner: jax.Array) -> jax.Array:
            scale = jnp.asarray(self.size, side.dtype) / side
            return jax.image.scale_and_translate(image, shape, (0, 1), scale, -corner * scale, "linear")

        crops = jax.vmap(one)(x.astype(jnp.float32), sides, corners)
        if self.flip:
            chosen = jax.random.bernoulli(flips, shape=(count, 1, 1, 1))
            crops = jnp.where(chosen, crops[:, :, ::-1], crops)
        if jnp.issubdtype(x.dtype, jnp.integer):
            bounds = jnp.iinfo(x.dtype)
            crops = jnp.clip(jnp.round(crops), bounds.min, bounds.max)
        return crops.astype(x.dtype)


def random_sized_crop(
    size: int | tuple[int, int],
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> RandomSizedCrop:
    """Return the augmentation of ImageNet networks: a crop of random size and shape, resized, and a random flip.

    The area is drawn uniformly, width over height log-uniformly, and the place uniformly; a side longer than the
    image's is cut to the image's. The crop is resized by linear interpolation, with antialiasing when it shrinks.

    Args:
      size: pixels of both sides of the result, or (height, width).
      area: smallest and largest share of the image's area, in (0, 1].
      ratio: smallest and largest width over height, positive.
      flip: whether to flip half of the images. Digits and text may not be flipped.

    Returns:
      A pure function `(key, x) -> crops` of images (n, height, width, channels) that keeps the dtype.

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> pae.data.random_sized_crop(24)(jax.random.key(0), jnp.ones((2, 40, 32, 3))).shape
      (2, 24, 24, 3)

    Source: C. Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6; the fine-grained runs of PackNet
    and CPG train with it.
    """
    for name, (low, high), top in (("area", area, 1.0), ("ratio", ratio, math.inf)):
        check_number(f"smallest {name}", low, 0.0)
        check_number(f"largest {name}", high, 0.0, top)
        if not 0.0 < low <= high:
            raise ArgumentError(f"{name}: found ({low:g}, {high:g}), expected two positive numbers, smallest first")
    return RandomSizedCrop(as_size(size), (float(area[0]), float(area[1])), (float(ratio[0]), float(ratio[1])), flip)


@dataclass(frozen=True)
class Cutout:
    """Set a square at a random place to one value; made by `cutout`.

    Attributes:
      size: pixels of its sides.
      fill: value it is set to.
    """

    size: int
    fill: float = 0.0

    def __call__(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Return augmented images of the same shape, drawn by `key`."""
        x = _images(x)
        count, height, width, _ = x.shape
        rows, columns = jax.random.split(key)

        def hidden(key: jax.Array, length: int) -> jax.Array:
            start = jax.random.randint(key, (count, 1), 0, length) - self.size // 2
            places = jnp.arange(length)[None]
            return (places >= start) & (places < start + self.size)

        square = hidden(rows, height)[:, :, None, None] & hidden(columns, width)[:, None, :, None]
        return jnp.where(square, jnp.asarray(self.fill, x.dtype), x)


def cutout(size: int, fill: float = 0.0) -> Cutout:
    """Return the augmentation that sets a square of every image to one value.

    Its centre is any pixel, so that at the border a part of the square lies outside.

    Args:
      size: pixels of its sides, at least 1.
      fill: value in the images as they arrive; the mean, which is 0 in normalised images.

    Returns:
      A pure function `(key, x) -> x` of images (n, height, width, channels) that keeps shape and dtype.

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> x = pae.data.cutout(4)(jax.random.key(0), jnp.ones((2, 8, 8, 1)))
      >>> bool((x == 0).any()), x.shape
      (True, (2, 8, 8, 1))

    Source: T. DeVries and G. W. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """
    return Cutout(check_count("size", size, 1), check_number("fill", fill))


def _images(x: jax.Array) -> jax.Array:
    if getattr(x, "ndim", None) != 4:
        raise ArgumentError(f"x: found shape {getattr(x, 'shape', None)}, expected (n, height, width, channels).")
    return jnp.asarray(x)
