"""Small symbols, such as owner ids, in hardly more bits than their entropy: interleaved range coding (rANS) in NumPy.

Each leaf has its own symbol frequencies, which the file keeps as counts. Many coders (lanes) take turns, so that every
operation is one over arrays; each lane ends in a state of 4 bytes, and there are so few lanes that these are about 1 %
of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pae_jax.errors import CheckpointError

_BITS = 16  # a leaf's frequencies sum to 2**16, a lane's state lies in [2**16, 2**32), a word has 16 bits
_TOTAL = 1 << _BITS
_LANES = 8192


class _Table(NamedTuple):
    """How often each symbol of a leaf comes, scaled to a sum of 2**16, and the sums of those before it."""

    frequencies: np.ndarray
    starts: np.ndarray


def counts_of(symbols: np.ndarray, size: int) -> np.ndarray:
    """Return how often each of the symbols 0..size - 1 comes; int64 (size,)."""
    return np.bincount(symbols, minlength=size).astype(np.int64)


def entropy_bits(counts: Sequence[np.ndarray]) -> float:
    """Return the least number of bits for symbols of these counts, leaf by leaf: `sum n log2(total / n)`."""
    bits = 0.0
    for leaf in counts:
        found = np.asarray(leaf, np.float64)
        found = found[found > 0]
        bits += float(np.sum(found * (np.log2(found.sum()) - np.log2(found)))) if found.size else 0.0
    return bits


def encode(leaves: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> np.ndarray:
    """Code symbols leaf after leaf.

    Args:
      leaves: uint8 (symbols,) of each leaf.
      counts: int64 (number of symbols,) of each leaf, as `counts_of` returns them.

    Returns:
      uint8: the number of lanes, their last states and the words, little-endian; empty where nothing is left to say.

    Example:
      >>> leaf = np.asarray([0, 1, 1, 0, 2, 1] * 100, np.uint8)
      >>> stream = encode([leaf], [counts_of(leaf, 3)])
      >>> bool((decode(stream, [leaf.size], [counts_of(leaf, 3)])[0] == leaf).all()), stream.size < 120
      (True, True)

    Source: Duda, "Asymmetric numeral systems", 2013; Giesen, "Interleaved entropy coders", 2014.
    """
    bits = entropy_bits(counts)
    if not bits:
        return np.zeros(0, np.uint8)
    lanes = max(1, min(_LANES, int(bits / 3200)))  # 32 bits each
    states = np.full(lanes, _TOTAL, np.uint64)
    words: list[np.ndarray] = []
    for symbols, found in zip(reversed(leaves), reversed(counts), strict=True):
        if np.count_nonzero(found) > 1:  # one symbol alone changes no state
            table = _table(found)
            for start in reversed(range(0, symbols.size, lanes)):
                words.append(_push(states, symbols[start : start + lanes], table))
    parts = [np.asarray([lanes], "<u4"), states.astype("<u4"), *reversed(words)]
    return np.concatenate([part.view(np.uint8) for part in parts])


def _push(states: np.ndarray, symbols: np.ndarray, table: _Table) -> np.ndarray:
    """Put one symbol into each of the first lanes, in place; return the words that they give off, in their order."""
    x = states[: symbols.size]
    f = table.frequencies[symbols]
    full = np.flatnonzero(x >= f << np.uint64(_BITS))
    words = x[full].astype("<u2")
    x[full] >>= np.uint64(_BITS)
    quotient = x // f
    x += (quotient << np.uint64(_BITS)) - quotient * f + table.starts[symbols]
    return words


def decode(stream: np.ndarray, sizes: Sequence[int], counts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Undo `encode`.

    Args:
      stream: uint8, what `encode` returned.
      sizes: number of symbols of each leaf.
      counts: as for `encode`.

    Returns:
      uint8 (symbols,) of each leaf.

    Raises:
      CheckpointError: the stream does not hold these symbols; nothing larger than they and it are is allocated.
    """
    for size, found in zip(sizes, counts, strict=True):
        if int(np.sum(found)) != size or np.min(found, initial=0) < 0:
            raise CheckpointError(
                f"the symbol counts sum to {int(np.sum(found))}, expected {size}; the file is damaged"
            )
    if not stream.size and not entropy_bits(counts):
        return [_constant(size, found) for size, found in zip(sizes, counts, strict=True)]
    states, words = _opened(stream)
    position, leaves = 0, []
    for size, found in zip(sizes, counts, strict=True):
        if np.count_nonzero(found) < 2:
            leaves.append(_constant(size, found))
            continue
        table, symbols = _table(found), np.empty(size, np.uint8)
        lookup = np.repeat(np.arange(found.size, dtype=np.uint8), table.frequencies.astype(np.int64))
        for start in range(0, size, states.size):
            position = _pop(states, symbols[start : start + states.size], table, lookup, words, position)
        leaves.append(symbols)
    if position != words.size or not (states == _TOTAL).all():  # as they were before the first symbol
        raise CheckpointError("coded owners or picks are not what was written; the file is damaged")
    return leaves


def _opened(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the states and the words of a stream."""
    lanes = int(stream[:4].view("<u4")[0]) if stream.size >= 4 else 0
    if not 0 < lanes <= (stream.size - 4) // 4 or stream.size % 2:
        raise CheckpointError(f"{stream.size} coded bytes cannot hold {lanes} coders; the file is damaged")
    return stream[4 : 4 + 4 * lanes].view("<u4").astype(np.uint64), stream[4 + 4 * lanes :].view("<u2")


def _pop(
    states: np.ndarray, out: np.ndarray, table: _Table, lookup: np.ndarray, words: np.ndarray, position: int
) -> int:
    """Take one symbol out of each of the first lanes, in place; return how many words are read by then."""
    x = states[: out.size]
    slots = x & np.uint64(_TOTAL - 1)
    out[:] = lookup[slots]
    x >>= np.uint64(_BITS)
    x *= table.frequencies[out]
    x += slots - table.starts[out]
    empty = np.flatnonzero(x < _TOTAL)
    end = position + empty.size
    if end > words.size:
        raise CheckpointError("the coded owners or picks end too early; the file is damaged")
    x[empty] = (x[empty] << np.uint64(_BITS)) | words[position:end]
    return end


def _constant(size: int, counts: np.ndarray) -> np.ndarray:
    return np.full(size, int(np.argmax(counts)) if size else 0, np.uint8)


def _table(counts: np.ndarray) -> _Table:
    """Scale counts to a sum of 2**16, at least 1 for each symbol that comes; whole numbers, equal on every machine."""
    total = int(counts.sum())
    scaled = [max(1, int(n) * _TOTAL // total) if n else 0 for n in counts]
    scaled[int(np.argmax(scaled))] += _TOTAL - sum(scaled)
    frequencies = np.asarray(scaled, np.uint64)
    return _Table(frequencies, np.cumsum(frequencies) - frequencies)


def code_length(stream: np.ndarray, counts: Sequence[np.ndarray]) -> float:
    """Return coded bits over their entropy; 1 where there is nothing to say."""
    bits = entropy_bits(counts)
    return 8 * stream.size / bits if bits and math.isfinite(bits) else 1.0
