"""Face images from files to arrays: reading, size, and the two standardisations of FaceNet.

Random crops and flips for training, and image decoding, are in `pae_jax.data`. Reading needs Pillow: the `faces` or the
`data` extra.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from pae_jax.data import LARGEST_IMAGE, MAX_PIXELS, as_size, centre_crop, decode_rgb, read_file, resized
from pae_jax.errors import DataError

Images = TypeVar("Images", bound=Any)


def standardise_fixed(images: Images) -> Images:
    """Map pixels to about [-1, 1], all images alike: (x - 127.5) / 128.

    Args:
      images: (..., height, width, channels), values in 0..255 of any dtype, NumPy or JAX.

    Returns:
      float32, the same shape.

    Example:
      >>> standardise_fixed(np.array([[[0, 255]]], np.uint8)).tolist()
      [[[-0.99609375, 0.99609375]]]

    Source: D. Sandberg's facenet, fixed image standardisation; PAE trains and tests with it.
    """
    return (images.astype(np.float32) - 127.5) / 128.0


def standardise_each(images: Images) -> Images:
    """Give each image mean 0 and standard deviation 1: (x - mean(x)) / max(std(x), 1 / sqrt(n)), n values an image.

    Args:
      images: (..., height, width, channels) of any dtype, NumPy or JAX; statistics are over the last three axes.

    Returns:
      float32, the same shape; a constant image becomes 0.

    Example:
      >>> standardise_each(np.array([[[0, 255]]], np.uint8)).tolist()
      [[[-1.0, 1.0]]]

    Source: D. Sandberg's facenet, prewhitening; the pretrained graphs were trained with it.
    """
    axes = (-3, -2, -1)
    values = images.astype(np.float32)
    values = values - values.mean(axis=axes, keepdims=True)
    spread = values.std(axis=axes, keepdims=True)
    return values / spread.clip(min=1.0 / math.sqrt(math.prod(images.shape[-3:])))


def read_image(source: str | Path | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    r"""Read an encoded image as RGB.

    Grey values are repeated, an alpha channel is dropped, the first frame of an animation is taken, and EXIF
    orientation is applied.

    Args:
      source: path of a file, or its bytes: JPEG, PNG, WebP, BMP, PPM or PGM, GIF, TIFF.
      name: name of the image in messages; default its path.
      max_pixels: larger images are refused before they are decoded.

    Returns:
      uint8 (height, width, 3).

    Raises:
      DataError: the image is missing, not a regular file, empty, larger than 256 MiB, damaged, has too many pixels or
        more than 8 bits per channel, or is in none of these formats; names it.

    Example:
      >>> read_image(b"P5 2 1 255 \x00\xff").tolist()
      [[[0, 0, 0], [255, 255, 255]]]
    """
    if isinstance(source, bytes):
        return decode_rgb(source, name or "image", max_pixels=max_pixels)
    return decode_rgb(read_file(source, "an image", LARGEST_IMAGE), name or str(source), max_pixels=max_pixels)


def load_images(
    paths: Sequence[str | Path],
    size: int,
    *,
    crop: int | None = None,
    progress: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Read image files into one array, several in parallel.

    Args:
      paths: the files.
      size: height and width of the result.
      crop: height and width of the middle part to take before scaling to `size`; PAE evaluates the middle 160 of an
        aligned 182 with crop 160 and size 160. None takes the whole image.
      progress: show a progress bar.
      max_pixels: as in `read_image`.

    Returns:
      uint8 (n, size, size, 3).

    Raises:
      DataError: images that `read_image` refuses or that are smaller than `crop`; all are counted, the first named.
      ArgumentError: `size` or `crop` is not a positive integer.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "face.ppm"
      ...     _ = path.write_bytes(b"P6 4 2 255 " + bytes(24))
      ...     load_images([path, path], 2).shape
      (2, 2, 2, 3)
    """
    check_sizes(size, crop)

    def image(number: int) -> np.ndarray:
        path = paths[number]
        return to_square(read_image(path, max_pixels=max_pixels), size, crop, str(path))

    return stacked(image, len(paths), size, progress)


def to_square(image: np.ndarray, size: int, crop: int | None, place: str) -> np.ndarray:
    """Crop the middle `crop` pixels of an image and scale them to `size`, keeping the aspect ratio."""
    if crop is not None:
        if min(image.shape[:2]) < crop:
            raise DataError(f"{place}: found {image.shape[0]} x {image.shape[1]} pixels, too small to cut out {crop}.")
        image = centre_crop(image[None], crop)[0]
    return resized(image, size)


def check_sizes(size: int, crop: int | None = None) -> None:
    """Raise `ArgumentError` unless both are positive integers, the second if it is given."""
    for side in (size,) if crop is None else (size, crop):
        as_size((side, side))


def stacked(image: Callable[[int], np.ndarray], count: int, size: int, progress: bool) -> np.ndarray:
    """Return images 0..count-1 as one array, made in several threads; raise one `DataError` for all that fail."""
    try:
        images = np.empty((count, size, size, 3), np.uint8)
    except MemoryError as error:
        raise DataError(
            f"{count:,} images of {size} x {size} pixels take {3 * count * size**2 / 1e9:,.0f} GB, more than there is. "
            "Take fewer or smaller ones, or stream them with pae.data.image_folder."
        ) from error
    failures: dict[int, str] = {}

    def attempt(number: int) -> None:
        try:
            images[number] = image(number)
        except DataError as error:
            failures[number] = str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(attempt, range(count))
        for _ in tqdm(done, total=count, desc="images", unit="image", disable=not progress):
            pass
    if failures:
        first = "".join(f"\n  {failures[number]}" for number in sorted(failures)[:10])
        raise DataError(f"{len(failures):,} of {count:,} images cannot be used:{first}")
    return images
