"""Encoded images to arrays of one kind: uint8, height x width x RGB, upright."""

from __future__ import annotations

import io

import numpy as np

from pae_jax.data.optional import require
from pae_jax.errors import ArgumentError, DataError


def decode_rgb(encoded: bytes, place: str) -> np.ndarray:
    """Decode an image of any format that Pillow reads.

    Grey, palette and CMYK images become RGB; transparency is dropped, the stored colours stay; an orientation in the
    EXIF data is applied; of an animation the first frame is taken.

    Args:
      encoded: the content of an image file.
      place: where the image stands, for errors.

    Returns:
      uint8 array (height, width, 3).

    Raises:
      DataError: empty, damaged, cut off, not an image, more than 8 bits per channel, or Pillow is missing.

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
    from PIL import Image, ImageOps

    if not encoded:
        raise DataError(f"{place}: found 0 bytes, expected an image. Remove or replace it.")
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode[0] not in "IF":
                if "transparency" in image.info:
                    image = image.convert("RGBA")  # Pillow warns on the direct way from a transparent palette
                return np.asarray(image.convert("RGB"))
    except Exception as error:  # damaged files make the decoders of Pillow raise nearly everything
        raise DataError(
            f"{place}: cannot be decoded as an image ({type(error).__name__}: {error}). Remove or replace it."
        ) from error
    raise DataError(
        f"{place}: found more than 8 bits per channel (mode {image.mode}), expected 8. Scaling them down is a choice "
        "that only you can make; convert the file."
    )


def resized(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Scale an image until it covers a size, and cut out its centre; the sides keep their proportion.

    Args:
      image: uint8 (height, width, 3) of any height and width.
      size: pixels of both sides, or (height, width); at least 1.

    Returns:
      uint8 (height, width, 3) of that size, the same array where nothing is to do; bilinear with antialiasing.

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
