"""Decode images into uint8 arrays, height x width x RGB, with EXIF orientation applied."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from typing import Any

import numpy as np

from pae_jax.data.optional import require
from pae_jax.errors import ArgumentError, DataError

MAX_PIXELS = 80_000_000
LARGE = 16_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
"""What photographs come in. Some other formats that Pillow knows start programs (EPS starts Ghostscript)."""

_LARGE_ONES = threading.Lock()


def decode_rgb(encoded: bytes, place: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image: JPEG, PNG, WebP, BMP, PPM or PGM, GIF, TIFF.

    Grey, palette and CMYK images become RGB; transparency is dropped and the stored colours are kept; EXIF orientation
    is applied; the first frame of an animation is taken. Images of more than 16 million pixels are decoded one at a
    time, so that several threads do not multiply the memory use.

    Args:
      encoded: the content of an image file.
      place: where the image comes from, for error messages.
      max_pixels: larger images are refused before they are decoded, and so are images of more than 179 million pixels,
        which Pillow rejects as a decompression bomb.

    Returns:
      uint8 array (height, width, 3).

    Raises:
      DataError: the image is empty, damaged, truncated, of another format, too large or has more than 8 bits per
        channel; or Pillow is missing.

    Example:
      >>> import io
      >>> from PIL import Image
      >>> file = io.BytesIO()
      >>> Image.new("L", (4, 2), 7).save(file, "png")
      >>> image = decode_rgb(file.getvalue(), "grey.png")
      >>> image.shape, image[0, 0].tolist()
      ((2, 4, 3), [7, 7, 7])
    """
    require("PIL.Image", "Decoding images")
    from PIL import Image, UnidentifiedImageError

    if not encoded:
        raise DataError(f"{place}: found 0 bytes, expected an image. Remove or replace it.")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height <= max_pixels:
                _require_8_bits(opened, place)
                with _LARGE_ONES if width * height > LARGE else contextlib.nullcontext():
                    return _upright_rgb(opened)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{place}: {error} At most {max_pixels:,} pixels are decoded; make it smaller.") from error
    except Exception as error:  # on damaged files Pillow's decoders raise almost any exception
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({type(error).__name__}: {error})"
        raise DataError(
            f"{place}: cannot be decoded as an image{reason}; expected one of {', '.join(FORMATS)}. Remove or replace "
            "it."
        ) from error
    raise DataError(
        f"{place}: found {width} x {height} pixels. At most {max_pixels:,} pixels are decoded; make it smaller."
    )


def _upright_rgb(opened: Any) -> np.ndarray:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(opened)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns on direct conversion from a transparent palette
    return np.asarray(image.convert("RGB"))


def _require_8_bits(image: Any, place: str) -> None:
    """Refuse more than 8 bits per channel: for colour images, Pillow would silently keep the upper 8 bits."""
    deep = image.mode[0] in "IF"
    for tile in image.tile if image.format != "BMP" else ():  # 16 bits of a BMP are those of all three channels
        form, *rest = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        deep |= _DEEP.search(str(form)) is not None
        deep |= str(tile[0]).startswith("ppm") and rest[0] > 255
    if deep:
        raise DataError(
            f"{place}: found more than 8 bits per channel, expected 8. Scaling them down is a choice that only you can "
            "make; convert the file."
        )


_DEEP = re.compile(r";(16|32|64)")  # Pillow's names of pixel layouts: "RGB;16B", "I;16", "F;32F"


def resized(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Scale an image to cover a size, keeping its aspect ratio, and crop the centre.

    Args:
      image: uint8 (height, width, 3) of any height and width.
      size: pixels of both sides, or (height, width); at least 1.

    Returns:
      uint8 (height, width, 3) of that size, by bilinear interpolation with antialiasing; the same array if it already
      has the size.

    Raises:
      ArgumentError: another shape or dtype, or a size below 1.
      DataError: Pillow is missing.

    Example:
      >>> resized(np.zeros((300, 200, 3), np.uint8), 160).shape
      (160, 160, 3)
    """
    height, width = as_size(size)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ArgumentError(f"image: found {image.dtype}{list(image.shape)}, expected uint8 (height, width, 3).")
    if image.shape[:2] == (height, width):
        return image
    require("PIL.Image", "Scaling images")
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.BILINEAR))


def as_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return a size as (height, width), or raise `ArgumentError` unless both are positive integers.

    Args:
      size: pixels of both sides, or (height, width).

    Returns:
      (height, width).

    Raises:
      ArgumentError: not one or two positive integers.

    Example:
      >>> as_size(160)
      (160, 160)
    """
    pair = (size, size) if isinstance(size, (int, np.integer)) else size
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) and side >= 1 for side in pair)
    ):
        raise ArgumentError(f"size: found {size!r}, expected pixels of both sides or (height, width), at least 1.")
    return int(pair[0]), int(pair[1])
