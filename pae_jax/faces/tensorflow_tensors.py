"""Tensors of a TensorFlow checkpoint (format V2), read without TensorFlow.

NAME.index is a table of LevelDB: sorted keys in blocks, each with a checksum. The key "" holds the header of the
checkpoint; every other key is the name of a tensor and holds its dtype, shape and place. The files
NAME.data-0000I-of-0000N hold the values, little-endian, one tensor after the other, each with a checksum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from pae_jax.data import open_file, read_file
from pae_jax.errors import DataError
from pae_jax.faces.crc32c import masked_crc32c

_MAGIC = 0xDB4775248B80FB57  # of LevelDB's tables
_FOOTER = 48
_TRAILER = 5  # of a block: its compression and its checksum
_DTYPES = {
    1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 5: np.int16, 6: np.int8, 9: np.int64, 10: np.bool_,
    14: jnp.bfloat16, 19: np.float16,
}  # fmt: skip
LARGEST_INDEX = 64 << 20


class _Damaged(Exception):
    """What a file holds makes no sense; the message says where."""


class _Entry(NamedTuple):
    """Where a tensor lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


def read_tensors(prefix: Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Read the tensors of a checkpoint; their lengths and checksums are checked.

    Args:
      prefix: path of the checkpoint without ".index".
      wanted: predicate of the names to read.

    Returns:
      `{name: array}` of the wanted tensors of numbers.

    Raises:
      DataError: a file is missing, cut, damaged or of another format; names the file, and the tensor if it is one.
    """
    index = prefix.with_name(f"{prefix.name}.index")
    raw = read_file(index, "the index of a TensorFlow checkpoint", LARGEST_INDEX)
    try:
        entries = _entries(raw)
        shards = _shards(entries)
        tensors = {name: _entry(value) for name, value in entries.items() if name and wanted(name)}
    except (_Damaged, IndexError, UnicodeDecodeError) as error:
        raise DataError(
            f"{index}: is damaged, or no index of a TensorFlow checkpoint: {error or 'cut'}. Get it again."
        ) from error
    read: dict[str, np.ndarray] = {}
    for shard in sorted({entry.shard for entry in tensors.values()}):
        path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")
        with open_file(path, "the values of a TensorFlow checkpoint") as file:
            inside = {name: entry for name, entry in tensors.items() if entry.shard == shard and entry.dtype in _DTYPES}
            read |= {name: _tensor(path, file, name, entry) for name, entry in inside.items()}
    return {name: read[name] for name in tensors if name in read}


def _tensor(path: Path, file: BinaryIO, name: str, entry: _Entry) -> np.ndarray:
    """Read one tensor; nothing is allocated that does not lie in the file."""
    dtype = np.dtype(_DTYPES[entry.dtype])
    if entry.sliced:
        raise DataError(f"{path}: '{name}' is stored in slices. Save it whole, without a partitioner.")
    if entry.size != math.prod(entry.shape) * dtype.itemsize:
        raise DataError(f"{path}: '{name}' has {entry.size} bytes for {dtype}{list(entry.shape)}. Get the files again.")
    if entry.offset + entry.size > file.seek(0, 2):
        raise DataError(f"{path}: ends before '{name}' does; it is cut. Get it again.")
    file.seek(entry.offset)
    data = file.read(entry.size)
    if masked_crc32c(data) != entry.crc:
        raise DataError(f"{path}: '{name}' is damaged, its checksum is not that of its values. Get the file again.")
    return np.frombuffer(data, dtype.newbyteorder("<") if dtype.kind in "iuf" else dtype).reshape(entry.shape)


def _shards(entries: dict[str, bytes]) -> int:
    """Return the number of data files that the header names."""
    if "" not in entries:
        raise _Damaged("it has no header")
    header = _fields(entries[""])
    shards = _last(header, 1, 1)
    if _last(header, 2, 0) != 0:
        raise _Damaged("its numbers are big-endian")
    if not 1 <= shards <= 99_999:
        raise _Damaged(f"it names {shards} data files")
    return shards


def _entry(value: bytes) -> _Entry:
    fields = _fields(value)
    dims = _fields(_last(fields, 2, b"")).get(2, [])
    shape = tuple(_last(_fields(dim), 1, 0) for dim in dims)
    numbers = [_last(fields, number, 0) for number in (1, 3, 4, 5, 6)]
    if any(size >= 1 << 62 for size in (*shape, *numbers)):
        raise _Damaged("a size is negative")
    dtype, shard, offset, size, crc = numbers
    return _Entry(dtype, shape, shard, offset, size, crc, 7 in fields)


def _entries(raw: bytes) -> dict[str, bytes]:
    """Return the keys and values of a table."""
    if len(raw) < _FOOTER or int.from_bytes(raw[-8:], "little") != _MAGIC:
        raise _Damaged("it does not end as a table")
    footer = raw[-_FOOTER:]
    _block(raw, footer)  # of filters, which nothing here needs
    _, at = _varint(footer, 0)
    _, at = _varint(footer, at)
    found: dict[str, bytes] = {}
    for _, handle in _pairs(_block(raw, footer[at:])):
        found |= {key.decode(): value for key, value in _pairs(_block(raw, handle))}
    return found


def _block(raw: bytes, handle: bytes) -> bytes:
    """Return a block by its handle, which is its offset and its size; its checksum is right."""
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    end = offset + size
    if end + _TRAILER > len(raw) - _FOOTER:
        raise _Damaged("it is cut")
    if masked_crc32c(raw[offset : end + 1]) != int.from_bytes(raw[end + 1 : end + _TRAILER], "little"):
        raise _Damaged(f"the checksum of the block at byte {offset} is wrong")
    if raw[end]:
        raise _Damaged("it is compressed, which TensorFlow's own are not")
    return raw[offset:end]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block; a key repeats the beginning of the one before it."""
    if len(block) < 4:
        raise _Damaged("a block is cut")
    end = len(block) - 4 * (1 + int.from_bytes(block[-4:], "little"))  # the places where no key is shortened
    if end < 0:
        raise _Damaged("a block is cut")
    at, key = 0, b""
    while at < end:
        kept, at = _varint(block, at)
        more, at = _varint(block, at)
        size, at = _varint(block, at)
        if kept > len(key) or at + more + size > end:
            raise _Damaged("a key or a value does not lie in its block")
        key, at = key[:kept] + block[at : at + more], at + more
        yield key, block[at : at + size]
        at += size


def _fields(message: bytes) -> dict[int, list]:
    """Return the fields of a protocol buffer by number: integers, and bytes."""
    found: dict[int, list] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(message[at : at + size], "little"), at + size
        elif kind == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            raise _Damaged(f"a message has a field of kind {kind}")
        if at > len(message):
            raise _Damaged("a message is cut")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _last(fields: dict[int, list], number: int, default):
    """Return the last value of a field, which must be of the default's type."""
    value = fields.get(number, [default])[-1]
    if type(value) is not type(default):
        raise _Damaged(f"field {number} of a message is of another kind")
    return value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return an integer of 7 bits a byte, and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise _Damaged("a number has more than 64 bits")
