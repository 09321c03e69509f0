"""More training images from few, made once and in the arrays: nothing to draw, nothing to repeat in a training step."""

from __future__ import annotations

import numpy as np

from pae_jax.errors import ArgumentError, DataError

Examples = tuple[np.ndarray, np.ndarray]


def augmented(examples: Examples, pixels: int = 4, mirror: bool = True) -> Examples:
    """Return all images shifted in nine ways, and these once more mirrored.

    A shift is by -pixels, 0 or +pixels along each axis; what comes in at a border repeats the border.

    Args:
      examples: images (n, height, width, channels) of any dtype, and labels (n, ...).
      pixels: size of a shift, from 0 (no shifts) to less than the height and the width.
      mirror: whether to add mirrored images, left and right exchanged. Faces may be mirrored, digits may not.

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
