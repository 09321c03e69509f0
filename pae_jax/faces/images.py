"""Face images from files to arrays: reading, size, and the two standardisations of FaceNet.

Random crops and flips for training, and what decoding makes of an image, are in `pae_jax.data`. Reading needs Pillow:
the `faces` or the `data` extra.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from pae_jax.data import as_size, centre_crop, decode_rgb, require, resized
from pae_jax.errors import DataError

MAX_PIXELS = 80_000_000
# What faces come in. Other formats that Pillow knows start programs (EPS) or are never photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF")

Images = TypeVar("Images", bound=Any)
T = TypeVar("T")


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

    Grey values are repeated, an alpha channel is left off, of an animation the first picture is taken, and a camera's
    note of how it was held is obeyed.

    Args:
      source: path of a file, or its bytes: JPEG, PNG, WebP, BMP, PPM or PGM, GIF, TIFF.
      name: what to call the image in messages; default its path.
      max_pixels: larger images are refused before they are decoded.

    Returns:
      uint8 (height, width, 3).

    Raises:
      DataError: missing, empty, damaged, too large, of more than 8 bits per channel, or no image of these formats;
        names it.

    Example:
      >>> read_image(b"P5 2 1 255 \x00\xff").tolist()
      [[[0, 0, 0], [255, 255, 255]]]
    """
    if isinstance(source, bytes):
        place, data = name or "image", source
    else:
        place = name or str(source)
        try:
            data = Path(source).read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"{place}: cannot be read ({error}).") from error
    if data:
        _check_header(data, place, max_pixels)
    return decode_rgb(data, place)


def load_images(
    paths: Sequence[str | Path],
    size: int,
    *,
    crop: int | None = None,
    progress: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Read image files as one array, several at a time.

    Args:
      paths: the files.
      size: height and width of the result.
      crop: height and width of the middle part to take before scaling to `size`; 160 with size 160 is what PAE
        evaluates of an aligned 182. None takes all of it.
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
    images = np.empty((len(paths), size, size, 3), np.uint8)

    def read(number: int) -> None:
        path = paths[number]
        images[number] = to_square(read_image(path, max_pixels=max_pixels), size, crop, str(path))

    for_all(read, len(paths), progress)
    return images


def to_square(image: np.ndarray, size: int, crop: int | None, place: str) -> np.ndarray:
    """Cut the middle `crop` pixels out of an image and scale it to `size`; the sides keep their proportion."""
    if crop is not None:
        if min(image.shape[:2]) < crop:
            raise DataError(f"{place}: found {image.shape[0]} x {image.shape[1]} pixels, too small to cut out {crop}.")
        image = centre_crop(image[None], crop)[0]
    return resized(image, size)


def check_sizes(size: int, crop: int | None = None) -> None:
    """Raise `ArgumentError` unless both are positive integers, the second if it is given."""
    for side in (size,) if crop is None else (size, crop):
        as_size((side, side))


def for_all(act: Callable[[int], None], count: int, progress: bool) -> None:
    """Do something for 0..count-1 in several threads; raise one `DataError` for all that fail with one."""
    failures: dict[int, str] = {}

    def attempt(number: int) -> None:
        try:
            act(number)
        except DataError as error:
            failures[number] = str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(attempt, range(count))
        for _ in tqdm(done, total=count, desc="images", unit="image", disable=not progress):
            pass
    if failures:
        first = "".join(f"\n  {failures[number]}" for number in sorted(failures)[:10])
        raise DataError(f"{len(failures):,} of {count:,} images cannot be used:{first}")


def _check_header(data: bytes, place: str, max_pixels: int) -> None:
    """Refuse an image by its first bytes, before memory is taken for it."""
    require("PIL.Image", "Decoding images")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{place}: {error} At most {max_pixels:,} pixels are decoded; make it smaller.") from error
    except Exception as error:  # damaged files make the readers of Pillow raise nearly everything
        raise DataError(f"{place}: cannot be decoded as an image; expected one of {', '.join(FORMATS)}.") from error
    if width * height > max_pixels:
        raise DataError(
            f"{place}: found {width} x {height} pixels. At most {max_pixels:,} pixels are decoded; make it smaller."
        )
