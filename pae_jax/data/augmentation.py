"""Data augmentation: once in the arrays, or randomly in every training step on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.data.decoding import as_size
from pae_jax.errors import ArgumentError, DataError

Examples = tuple[np.ndarray, np.ndarray]


def augmented(examples: Examples, pixels: int = 4, mirror: bool = True) -> Examples:
    """Return all images with nine shifts each, and optionally mirrored copies of these.

    A shift is by -pixels, 0 or +pixels along each axis; pixels shifted in repeat the border.

    Args:
      examples: images (n, height, width, channels) of any dtype, and labels (n, ...).
      pixels: size of a shift, from 0 (no shifts) to less than the height and the width.
      mirror: whether to add mirrored images, left and right exchanged. Mirror faces, but not digits.

    Returns:
      The images, 9 or 18 times as many (1 or 2 times without shifts), unchanged ones included, and their labels.

    Raises:
      DataError: images or labels are not of that shape.
      ArgumentError: `pixels` is outside its range.

    Example:
      >>> images, labels = augmented((np.zeros((25, 112, 92, 1), np.float32), np.arange(25)))
      >>> images.shape, labels.shape
      ((450, 112, 92, 1), (450,))

    Reference: Simard et al. 2003 (translations as training data).
    """
    images, labels = (np.asarray(part) for part in examples)
    if images.ndim != 4 or labels.shape[:1] != images.shape[:1]:
        raise DataError(
            f"examples: found images {images.shape} and labels {labels.shape}, "
            "expected (n, height, width, channels) and one label per image."
        )
    height, width = images.shape[1:3]
    if not 0 <= pixels < min(height, width):
        raise ArgumentError(
            f"pixels: found {pixels}, expected 0 to {min(height, width) - 1} for {height}x{width} pixels."
        )
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    offsets = (pixels, 0, 2 * pixels) if pixels else (0,)
    variants = [padded[:, y : y + height, x : x + width] for y in offsets for x in offsets]
    if mirror:
        variants += [variant[:, :, ::-1] for variant in variants]
    return np.concatenate(variants), np.concatenate([labels] * len(variants))


@dataclass(frozen=True)
class CropAndFlip:
    """A random crop of the padded images at their own size, and a random flip; made by `crop_and_flip`.

    Attributes:
      pad: pixels added on every side.
      fill: value of the added pixels, one for all channels or one for each.
      flip: whether left and right are exchanged in half of the images.
    """

    pad: int = 4
    fill: float | tuple[float, ...] = 0.0
    flip: bool = True

    def __call__(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Return augmented images (n, height, width, channels), drawn by `key`."""
        _require_images(x)
        x = jnp.asarray(x)
        count, height, width, channels = x.shape
        fill = jnp.asarray(self.fill, x.dtype).reshape(1, 1, 1, -1)
        if fill.size not in (1, channels):
            raise ArgumentError(f"fill: found {fill.size} values, expected 1 or one per channel, {channels}.")
        canvas = jnp.broadcast_to(fill, (count, height + 2 * self.pad, width + 2 * self.pad, channels))
        padded = canvas.at[:, self.pad : self.pad + height, self.pad : self.pad + width].set(x)
        return _random_crop(key, padded, height, width, self.flip)


@dataclass(frozen=True)
class RandomCropTo:
    """A random crop to a smaller size, and a random flip; made by `random_crop_to`.

    Attributes:
      size: (height, width) of the crop.
      flip: whether left and right are exchanged in half of the images.
    """

    size: tuple[int, int]
    flip: bool = True

    def __call__(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Return augmented images (n, *size, channels), drawn by `key`."""
        _require_images(x)
        _require_room(x, self.size)
        return _random_crop(key, jnp.asarray(x), *self.size, self.flip)


def crop_and_flip(pad: int = 4, *, fill: float | Sequence[float] | np.ndarray = 0.0, flip: bool = True) -> CropAndFlip:
    """Return the augmentation of small images: a random crop of the padded image and a random flip.

    Each image is padded by `pad` pixels on every side, cut back to its own size at a uniformly drawn place, and
    flipped with probability 1/2. The augmentation is one gather inside the compiled step. Equal settings make equal
    objects, so that a step with the same settings is compiled once.

    Args:
      pad: pixels on every side, at least 0; 0 only flips.
      fill: value of the padding in the images as they arrive: a number, or one per channel. Black is
        `-mean / std` in normalised images.
      flip: whether to flip. Do not flip digits or text.

    Returns:
      A pure function `(key, x) -> x` of images (n, height, width, channels) that keeps shape and dtype.

    Raises:
      ArgumentError: `pad` is no integer of at least 0, or `fill` neither a number nor a list of them.

    Example:
      >>> augment = crop_and_flip(2, fill=(-1.9, -2.0, -1.7))
      >>> x = jnp.ones((5, 8, 8, 3))
      >>> augment(jax.random.key(0), x).shape
      (5, 8, 8, 3)
      >>> augment == crop_and_flip(2, fill=np.array([-1.9, -2.0, -1.7]))
      True

    Source: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2; the published
    CIFAR-100 runs of CPG use it with a padding of 4.
    """
    if isinstance(pad, bool) or not isinstance(pad, (int, np.integer)) or pad < 0:
        raise ArgumentError(f"pad: found {pad!r}, expected an integer of at least 0 pixels.")
    values = np.asarray(fill)
    if values.ndim > 1 or not values.size or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ArgumentError(f"fill: found {fill!r}, expected a finite number or a list of one per channel.")
    level = tuple(map(float, values)) if values.ndim else float(values)
    return CropAndFlip(int(pad), level, bool(flip))


def random_crop_to(size: int | tuple[int, int], flip: bool = True) -> RandomCropTo:
    """Return the augmentation of larger images: a random crop to the network's input size and a random flip.

    Args:
      size: pixels of both sides, or (height, width); at most the images' own.
      flip: whether to flip half of the images. Digits and text may not be flipped.

    Returns:
      A pure function `(key, x) -> crops` of images (n, height, width, channels) that keeps the dtype.

    Raises:
      ArgumentError: `size` is not one or two positive integers.

    Example:
      >>> random_crop_to(160)(jax.random.key(0), jnp.ones((2, 182, 182, 3))).shape
      (2, 160, 160, 3)

    Source: Hung et al., "Packing and Expanding", ICMR 2019: faces of 182 pixels are cut to 160.
    """
    return RandomCropTo(as_size(size), bool(flip))


ImageArray = TypeVar("ImageArray", np.ndarray, jax.Array)


def centre_crop(x: ImageArray, size: int | tuple[int, int]) -> ImageArray:
    """Cut out the middle of images, for evaluation where training crops at random.

    Rows start at `(height - h) // 2`, columns likewise.

    Args:
      x: images (n, height, width, channels), NumPy or JAX.
      size: pixels of both sides, or (height, width); at most the images' own.

    Returns:
      Images (n, *size, channels), of the same dtype; a view where x is NumPy.

    Raises:
      ArgumentError: images of another rank or smaller than `size`.

    Example:
      >>> centre_crop(np.arange(16).reshape(1, 4, 4, 1), 2)[0, :, :, 0].tolist()
      [[5, 6], [9, 10]]
    """
    _require_images(x)
    height, width = as_size(size)
    _require_room(x, (height, width))
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]


def _random_crop(key: jax.Array, x: jax.Array, height: int, width: int, flip: bool) -> jax.Array:
    """Cut every image at its own place; a flip reads the columns backwards, so both are one gather."""
    count = x.shape[0]
    places, flips = jax.random.split(key)
    spare = jnp.asarray([x.shape[1] - height, x.shape[2] - width])
    corner = jax.random.randint(places, (count, 2), 0, (spare + 1)[None])
    columns = jnp.broadcast_to(jnp.arange(width), (count, width))
    if flip:
        columns = jnp.where(jax.random.bernoulli(flips, shape=(count, 1)), columns[:, ::-1], columns)
    rows = corner[:, :1] + jnp.arange(height)[None]
    columns = corner[:, 1:] + columns
    return x[jnp.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _require_images(x: Any) -> None:
    if getattr(x, "ndim", None) != 4:
        raise ArgumentError(f"x: found shape {getattr(x, 'shape', None)}, expected (n, height, width, channels).")


def _require_room(x: Any, size: tuple[int, int]) -> None:
    if x.shape[1] < size[0] or x.shape[2] < size[1]:
        raise ArgumentError(f"size: found {size}, expected at most the images' own {tuple(x.shape[1:3])}.")
