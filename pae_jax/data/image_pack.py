"""Packs: .npz files of encoded images with labels or names. Only this module reads them."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pae_jax.data.files import open_file
from pae_jax.errors import DataError

# Encoded images hardly compress in an archive, labels do: the unpacked size of a pack must stay below this.
UNPACKED_SHARE, UNPACKED_MORE = 4, 64 << 20
_KINDS = {"uint8": "u", "integers": "iu", "text": "U"}


@dataclass(frozen=True, eq=False)
class ImagePack:
    """Encoded images by index, with arrays of labels and of names; made by `read_pack`.

    Attributes:
      path: the file.
      labels: integers (n,) by name.
      names: texts by name.
    """

    path: Path
    labels: dict[str, np.ndarray]
    names: dict[str, tuple[str, ...]]
    _encoded: np.ndarray
    _offsets: np.ndarray

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def encoded(self, number: int) -> bytes:
        """Return an encoded image."""
        return self._encoded[self._offsets[number] : self._offsets[number + 1]].tobytes()

    def place(self, number: int) -> str:
        """Return the location of an image, for error messages."""
        return f"{self.path}, image {number}"


def read_pack(
    path: str | Path,
    labels: Mapping[str, tuple[int, int, str] | str],
    names: Sequence[str] = (),
) -> ImagePack:
    """Read a pack: a file of `numpy.savez` whose arrays each have one dimension.

    `bytes` uint8 holds all encoded images one after the other; `offsets` integers (n + 1,) are their boundaries: image
    i is `bytes[offsets[i]:offsets[i + 1]]`. Nothing is unpickled. Memory is limited to four times the file's size plus
    64 MiB: a file that unpacks to more is refused before it is unpacked.

    Args:
      path: the .npz file.
      labels: the arrays of integers, one for each image: smallest and largest value and their meaning; or the array of
        names that they index.
      names: the arrays of texts.

    Returns:
      The images, still encoded, with their labels and names.

    Raises:
      DataError: not a regular file or such an archive, or arrays are missing, of another type or out of range; says
        which.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "two.npz"
      ...     np.savez(path, bytes=np.frombuffer(b"onetwo", np.uint8), offsets=[0, 3, 6], age=[4, 71])
      ...     pack = read_pack(path, {"age": (0, 130, "years")})
      >>> len(pack), pack.encoded(1), pack.labels["age"].tolist()
      (2, b'two', [4, 71])
    """
    path = Path(path)
    wanted = {"bytes": "uint8", "offsets": "integers"}
    wanted |= dict.fromkeys(labels, "integers") | dict.fromkeys(names, "text")
    arrays = _read_arrays(path, wanted)
    encoded, offsets = arrays["bytes"], arrays["offsets"]
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(encoded) or (offsets[1:] < offsets[:-1]).any():
        raise DataError(
            f"{path}: offsets is {offsets.dtype}{list(offsets.shape)}, expected integers (images + 1,) that rise from "
            f"0 to the length of bytes, {len(encoded):,}. Is the file complete?"
        )
    texts = {name: tuple(map(str, arrays[name])) for name in names}
    for name, known in labels.items():
        span = (0, len(texts[known]) - 1, f"numbers of {known}") if isinstance(known, str) else known
        _check_labels(path, name, arrays[name], len(offsets) - 1, *span)
    return ImagePack(path, {name: arrays[name] for name in labels}, texts, encoded, offsets.astype(np.int64))


def _check_labels(path: Path, name: str, labels: np.ndarray, count: int, low: int, high: int, meaning: str) -> None:
    if len(labels) != count:
        raise DataError(
            f"{path}: {name} is {labels.dtype}{list(labels.shape)}, expected integers, one for each of {count:,} images"
        )
    wrong = np.flatnonzero((labels < low) | (labels > high))
    if wrong.size:
        raise DataError(
            f"{path}: {name} is {labels[wrong[0]]} for image {wrong[0]}, expected {low}..{high} ({meaning}); "
            f"{wrong.size:,} such labels"
        )


def _read_arrays(path: Path, wanted: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return arrays of an archive, each of one dimension, not empty, and of the wanted kind."""
    expected = f"an .npz file of arrays with {', '.join(wanted)}"
    with open_file(path, expected) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = _members(path, archive, file.seek(0, io.SEEK_END), wanted)
                contents = {name: _content(path, archive, members[name]) for name in wanted}
            return {name: _array(path, name, contents[name], kind) for name, kind in wanted.items()}
        except DataError:
            raise
        except Exception as error:  # damaged archives raise OSError, ValueError, EOFError, BadZipFile, zlib.error, ...
            raise DataError(
                f"{path}: cannot be read as an .npz file of arrays ({error}); expected {expected}."
            ) from error


def _members(path: Path, archive: zipfile.ZipFile, size: int, wanted: Mapping[str, str]) -> dict[str, Any]:
    """Return the entries of an archive by array name; raise if one unpacks to too much."""
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    missing = [name for name in wanted if name not in members]
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}; found {', '.join(members) or 'nothing'}.")
    if len(members) < len(archive.infolist()):
        raise DataError(f"{path}: holds arrays of one name twice, found {archive.namelist()}. Write it anew.")
    unpacked, most = sum(members[name].file_size for name in wanted), UNPACKED_SHARE * size + UNPACKED_MORE
    if unpacked > most:
        raise DataError(
            f"{path}: {size:,} bytes that unpack to {unpacked:,}, expected at most {most:,}. No pack of encoded images "
            "is like that; get it from its source again, or write it with numpy.savez."
        )
    return members


def _content(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return the content of an entry; unpack at most the declared size."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{path}: '{info.filename}' is packed in a way that NumPy never uses. Write it with numpy.savez."
        )
    with archive.open(info) as member:
        return member.read(info.file_size)  # a read without a size would unpack everything


def _array(path: Path, name: str, content: bytes, kind: str) -> np.ndarray:
    """Return the array in the content of a .npy file, in the byte order of this machine."""
    header = io.BytesIO(content)
    version = np.lib.format.read_magic(header)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(header)
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds Python objects, which are never unpickled. Expected {kind}.")
    if dtype.kind not in _KINDS[kind] or (kind == "uint8" and dtype.itemsize > 1) or len(shape) != 1 or not shape[0]:
        raise DataError(f"{path}: {name} is {dtype}{list(shape)}, expected {kind} in one dimension, not empty.")
    if math.prod(shape) * dtype.itemsize != len(content) - header.tell():
        raise DataError(
            f"{path}: {name} has {len(content) - header.tell():,} bytes, expected {math.prod(shape) * dtype.itemsize:,}"
            f" of {dtype}{list(shape)}. The file is damaged; get it again."
        )
    array = np.frombuffer(content, dtype, offset=header.tell())
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))
