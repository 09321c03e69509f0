"""Which faces to compare: the pairs of an LFW `pairs.txt`, or pairs drawn the same way from any labelled faces."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from numpy.typing import ArrayLike

from pae_jax.checks import check_key
from pae_jax.data import read_file
from pae_jax.errors import ArgumentError, DataError

LFW_PAIRS_PER_FOLD = 300
EXTENSIONS = (".jpg", ".png")
LARGEST = 64 << 20  # largest size of a pairs file in bytes; LFW's has 152,000


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of images with a fold each; `first` and `second` are rows of the images, embeddings or paths they name.

    Attributes:
      first: int64 (n,), row of the first image of each pair.
      second: int64 (n,), row of the second image.
      same: bool (n,), whether both show one person.
      folds: int64 (n,), fold of each pair, from 0.
      images: the images in the order of their rows, "Name/Name_0001" without extension; empty where the rows are those
        of the caller's own arrays.
      skipped: one text for each pair left out because an image is missing.
    """

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    images: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def read_pairs(path: str | Path) -> Pairs:
    r"""Read a pairs file in the format of Labeled Faces in the Wild.

    The first line is `folds<TAB>pairs` (10 and 300 in LFW; a single number means one fold). For each fold follow that
    many lines `name i j`, images i and j of one person, then as many `name1 i name2 j`, of two people.

    Args:
      path: the file. Fields are separated by tabs, or by any white space in lines without a tab.

    Returns:
      All pairs in the order of the file, and the images they name.

    Raises:
      DataError: not readable, or lines that are no such pairs; all of them are counted and the first ones shown.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "pairs.txt"
      ...     _ = path.write_text("1\t1\nZoe\t1\t2\nAnn\t1\tZoe\t2\n")
      ...     pairs = read_pairs(path)
      >>> pairs.images, pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist()
      (('Zoe/Zoe_0001', 'Zoe/Zoe_0002', 'Ann/Ann_0001'), [0, 2], [1, 1], [True, False])

    Source: G. B. Huang et al., "Labeled Faces in the Wild", 2007, view 2.
    """
    path = Path(path)
    content = read_file(path, "a pairs file", LARGEST)
    try:
        lines = [line for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as a pairs file ({error}); expected UTF-8 text.") from error
    folds, size = _header(path, lines)
    body = lines[1:]
    if len(body) != folds * size * 2:
        raise DataError(
            f"{path}: found {len(body):,} pairs, expected {folds * size * 2:,}: for each of {folds} folds {size} of "
            f"one person, then {size} of two. Is the file complete?"
        )
    position = np.arange(len(body))
    same, numbers = position % (2 * size) < size, position // (2 * size)
    rows: dict[str, int] = {}
    ends, wrong = [], []
    for number, (line, one_person) in enumerate(zip(body, same, strict=True), 2):
        images = _images(line, bool(one_person))
        if images is None:
            wrong.append(f"line {number}: {line!r}, expected {_ONE if one_person else _TWO}")
            continue
        ends.append([rows.setdefault(image, len(rows)) for image in images])
    if wrong:
        raise DataError(f"{path}: {len(wrong):,} of {len(body):,} lines are no such pairs.\n{_first(wrong)}")
    first, second = np.asarray(ends, np.int64).T
    return Pairs(first, second, same, numbers.astype(np.int64), tuple(rows))


def find_images(pairs: Pairs, folder: str | Path) -> tuple[Pairs, list[Path]]:
    """Find the images of a pairs file in class folders; leave out the pairs whose image is missing.

    An image is `folder/Name/Name_0001.jpg`, or `.png` if there is no `.jpg`. If alignment found no face, the image is
    missing; its pair is left out and listed in `skipped`. Folds are kept, so a missing pair makes its own fold smaller
    and moves no other pair. A name without a folder is treated as an error. Links are followed.

    Args:
      pairs: from `read_pairs`.
      folder: holds one folder per person.

    Returns:
      The pairs that are left, with new rows, and the files in the order of these rows.

    Raises:
      DataError: people without a folder, listed; or no pair is left.

    Example:
      >>> import tempfile
      >>> pairs = Pairs(*np.array([[0, 0], [1, 2], [1, 0], [0, 0]]), images=("Zoe/Zoe_1", "Zoe/Zoe_2", "Ann/Ann_1"))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for name in ("Zoe/Zoe_1.jpg", "Zoe/Zoe_2.png", "Ann/Ann_2.jpg"):
      ...         (Path(folder) / name).parent.mkdir(exist_ok=True)
      ...         (Path(folder) / name).touch()
      ...     left, files = find_images(pairs, folder)
      >>> [file.name for file in files], left.skipped
      (['Zoe_1.jpg', 'Zoe_2.png'], ('fold 1: Zoe/Zoe_1 and Ann/Ann_1, no file Ann/Ann_1',))
    """
    folder = Path(folder)
    names = dict.fromkeys(image.split("/")[0] for image in pairs.images)
    unknown = [name for name in names if not (folder / name).is_dir()]
    if unknown:
        raise DataError(
            f"{folder}: no folder for {len(unknown):,} of {len(names):,} people of the pairs file. "
            f"Is it the file of these images?\n{_first(unknown)}"
        )
    found = [_find(folder, image) for image in pairs.images]
    missing = np.array([file is None for file in found], bool)
    keep = ~(missing[pairs.first] | missing[pairs.second])
    if not keep.any():
        raise DataError(
            f"{folder}: none of the {len(keep):,} pairs has both images; expected files such as "
            f"{pairs.images[0]}{EXTENSIONS[0]}."
        )
    skipped = []
    for pair in np.flatnonzero(~keep):
        ends = [int(pairs.first[pair]), int(pairs.second[pair])]
        first, second = (pairs.images[row] for row in ends)
        absent = " and ".join(pairs.images[row] for row in ends if missing[row])
        skipped.append(f"fold {pairs.folds[pair] + 1}: {first} and {second}, no file {absent}")
    rows, ends = np.unique(np.stack([pairs.first[keep], pairs.second[keep]]), return_inverse=True)
    first, second = ends.reshape(2, -1)
    left = dataclasses.replace(
        pairs,
        first=first,
        second=second,
        same=pairs.same[keep],
        folds=pairs.folds[keep],
        images=tuple(pairs.images[row] for row in rows),
        skipped=(*pairs.skipped, *skipped),
    )
    return left, [file for row in rows if (file := found[row]) is not None]


def generate_pairs(
    identities: ArrayLike,
    *,
    key: jax.Array,
    folds: int = 10,
    per_fold: int | None = None,
    disjoint: bool = True,
) -> Pairs:
    """Draw pairs from labelled faces as in LFW: each fold has as many pairs of one person as of two.

    No pair is repeated. With `disjoint` no person is in two folds, so a threshold chosen on nine folds is tested on
    other people. People are assigned to the folds by their number of images, in random order.

    Args:
      identities: (n,) the person that image i shows; any labels.
      key: random key of the draw.
      folds: at least 2.
      per_fold: pairs of one person in each fold, and as many of two; None takes as many as the folds allow, at most
        300 as in LFW.
      disjoint: whether folds share no people; False draws each fold from all people.

    Returns:
      Pairs whose rows are those of `identities`, sorted by fold.

    Raises:
      ArgumentError: there are not that many pairs; says how many there are.
      DataError: identities are not one label per image, or of fewer than 2 people.

    Example:
      >>> identities = np.repeat(np.arange(40), 10)
      >>> pairs = generate_pairs(identities, key=jax.random.key(0))
      >>> len(pairs.same), int(pairs.same.sum())
      (3600, 1800)
    """
    labels = np.asarray(identities)
    if labels.ndim != 1 or len(np.unique(labels)) < 2:
        raise DataError(f"identities: found shape {labels.shape}, expected one label per image, of 2 people or more.")
    if isinstance(folds, bool) or not isinstance(folds, (int, np.integer)) or folds < 2:
        raise ArgumentError(f"folds must be an integer of at least 2, found {folds!r}")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(check_key(key))))
    people = [np.flatnonzero(labels == person) for person in np.unique(labels)]
    people = sorted((people[i] for i in rng.permutation(len(people))), key=len, reverse=True)
    groups = [_Group(people[fold::folds]) for fold in range(folds)] if disjoint else [_Group(people)]
    share = 1 if disjoint else folds
    most = min(int(counts.sum()) for group in groups for counts in group.partners.values()) // share
    amount = min(most, LFW_PAIRS_PER_FOLD) if per_fold is None else per_fold
    if isinstance(amount, bool) or not isinstance(amount, (int, np.integer)) or not 1 <= amount <= most:
        raise ArgumentError(
            f"per_fold: found {per_fold!r}, but {len(people)} people in {folds} folds "
            f"{'with people of their own ' if disjoint else ''}give at most {most} pairs of one person and as many of "
            f"two to each fold. Ask for fewer folds or pairs{', or pass disjoint=False' if disjoint else ''}."
        )
    kinds = []
    for kind in ("same", "different"):
        ends = [group.draw(rng, kind, amount * share).reshape(2, share, amount) for group in groups]
        kinds.append(np.concatenate(ends, axis=1))
    first, second = np.concatenate(kinds, axis=2).reshape(2, -1)
    same = np.tile(np.repeat([True, False], amount), folds)
    return Pairs(first, second, same, np.repeat(np.arange(folds), 2 * amount))


class _Group:
    """All pairs among some people, numbered: each image, person after person, paired with the images after it.

    Attributes:
      rows: the images, person after person.
      partners: for each image how many later ones show its own person ("same") or another ("different").
      start: the first of these partners.
    """

    def __init__(self, people: list[np.ndarray]):
        sizes = np.array([len(rows) for rows in people], np.int64)
        self.rows = np.concatenate([np.zeros(0, np.int64), *people])
        end, following = np.repeat(np.cumsum(sizes), sizes), np.arange(1, len(self.rows) + 1)
        self.start = {"same": following, "different": end}
        self.partners = {"same": end - following, "different": len(self.rows) - end}

    def draw(self, rng: np.random.Generator, kind: str, amount: int) -> np.ndarray:
        """Return the rows (2, amount) of distinct pairs."""
        partners = self.partners[kind]
        after = np.cumsum(partners)
        numbers = rng.choice(after[-1], amount, replace=False)
        first = np.searchsorted(after, numbers, side="right")
        second = self.start[kind][first] + numbers - (after[first] - partners[first])
        return self.rows[np.stack([first, second])]


def _header(path: Path, lines: list[str]) -> tuple[int, int]:
    fields = lines[0].split() if lines else []
    numbers = [number for number in map(_number, fields) if number]
    if not 1 <= len(fields) <= 2 or len(numbers) != len(fields):
        found = repr(lines[0][:80]) if lines else "nothing"
        raise DataError(f"{path}: found {found} as the first line, expected the numbers of folds and pairs: 10<TAB>300")
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (1, numbers[0])


def _images(line: str, one_person: bool) -> tuple[str, str] | None:
    fields = [field.strip() for field in (line.split("\t") if "\t" in line else line.split())]
    if len(fields) != (3 if one_person else 4):
        return None
    name, i, other, j = (fields[0], fields[1], fields[0], fields[2]) if one_person else fields
    numbers = [_number(n) for n in (i, j)]
    if min(numbers) < 1 or not (_is_name(name) and _is_name(other)):
        return None
    if numbers[0] == numbers[1] if one_person else name == other:
        return None
    first, second = (f"{n}/{n}_{number:04d}" for n, number in zip((name, other), numbers, strict=True))
    return first, second


def _number(text: str) -> int:
    """Return a positive number, 0 where there is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _is_name(name: str) -> bool:
    # A name becomes part of a path and must not lead out of the folder.
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _find(folder: Path, image: str) -> Path | None:
    files = (folder / f"{image}{extension}" for extension in EXTENSIONS)
    return next((file for file in files if file.is_file()), None)


def _first(texts: list[str], count: int = 10) -> str:
    more = [f"... and {len(texts) - count:,} more"] if len(texts) > count else []
    return "\n".join(f"  {text}" for text in [*texts[:count], *more])


_ONE = "two images of one person: name, i, j with i and j different"
_TWO = "images of two people: name1, i, name2, j with different names"
