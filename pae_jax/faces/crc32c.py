"""CRC-32C of large arrays of bytes, and the masked form that TensorFlow stores."""

from __future__ import annotations

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # of Castagnoli, reflected
_MASK_DELTA = 0xA282EAD8
_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)


def masked_crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """Return the CRC-32C of bytes as TensorFlow and LevelDB store it: rotated by 15 bits, plus a constant.

    Example:
      >>> hex(crc32c(b"123456789")), hex(masked_crc32c(b""))
      ('0xe3069283', '0xa282ead8')
    """
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """Return the CRC-32C of bytes.

    A CRC without its initial and final inversion is linear, `crc(a + b) = shift(crc(a), len(b)) ^ crc(b)`, and leading
    zeros do not change it. So the bytes are split into rows, computed side by side and then combined in pairs.

    Source: Castagnoli et al. 1993; the reflected polynomial 0x82F63B78.
    """
    values = np.frombuffer(data, np.uint8)
    if len(values) < 1024:
        return _one_by_one(values.tobytes())
    columns = 64 if len(values) < 1 << 16 else 1024
    rows = -(-len(values) // columns)
    padded = np.zeros((rows, columns), np.uint8)
    padded.reshape(-1)[rows * columns - len(values) :] = values
    crc, table = np.zeros(rows, np.uint32), _byte_table()
    for column in np.ascontiguousarray(padded.T):
        crc = table[(crc ^ column) & 0xFF] ^ (crc >> 8)
    while len(crc) > 1:
        crc = np.concatenate([np.zeros(len(crc) % 2, np.uint32), crc])
        crc, columns = _apply(_shift(columns), crc[0::2]) ^ crc[1::2], 2 * columns
    start = _apply(_shift(len(values)), np.full(1, 0xFFFFFFFF, np.uint32))
    return int(np.bitwise_xor.reduce(np.concatenate([crc, start]))) ^ 0xFFFFFFFF


def _one_by_one(values: bytes) -> int:
    crc, table = 0xFFFFFFFF, _byte_list()
    for value in values:
        crc = table[(crc ^ value) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


@functools.cache
def _byte_list() -> list[int]:
    return _byte_table().tolist()


@functools.cache
def _byte_table() -> np.ndarray:
    """Return the effect of one byte, for each of its values."""
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, crc >> 1 ^ np.uint32(_POLYNOMIAL), crc >> 1)
    return crc


@functools.lru_cache(256)
def _shift(length: int) -> np.ndarray:
    """Return the effect of that many zero bytes as a linear map: its values for the 32 single bits."""
    if length == 0:
        return _BITS
    if length == 1:
        return _byte_table()[_BITS & 0xFF] ^ (_BITS >> 8)
    half = _shift(length // 2)
    return _apply(_shift(length % 2), _apply(half, half))


def _apply(linear: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Apply a linear map of 32 bits to each value."""
    found = np.zeros_like(values)
    for bit in range(32):
        found ^= np.where(values >> bit & 1, linear[bit], np.uint32(0))
    return found
