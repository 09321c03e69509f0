"""Small symbols, such as owner ids, in hardly more bits than their entropy: several to a byte, then Huffman's code.

zlib does the coding: a million symbols take milliseconds. A byte of several symbols has so much entropy that whole bits
per byte lose little. A symbol so frequent that this does not hold is coded first, as the gaps between all others.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pae_jax.errors import CheckpointError
from pae_jax.large_arrays import blocks, in_threads

_LENGTH = 4  # bytes of the number before each coded piece, which is its length
_OWN_CODE = 800  # bits that codes of their own cost some leaves
_GROUP = 1 << 20  # symbols; more are not put together, so that threads have something to share
_ESCAPE = 255  # a byte of a gap: so much, and more follows
_FREQUENT = {1: 917, 2: 840, 4: 707, 8: 500}  # thousandths, by bits: beyond, most bytes hold the one symbol alone
_DAMAGED = "coded owners or picks are not what was written; the file is damaged"


class _Step(NamedTuple):
    """How the next symbols of a leaf are coded.

    Attributes:
      size: number of symbols.
      top: the frequent symbol, of which the gaps are coded; None to code all symbols, after which nothing is left.
      bits: of each gap that are coded as they are, or of each symbol.
    """

    size: int
    top: int | None
    bits: int


def counts_of(symbols: np.ndarray, size: int) -> np.ndarray:
    """Return how often each of the symbols 0..size - 1 comes; int64 (size,)."""
    if size > 32:  # below, comparing is faster
        return np.bincount(symbols, minlength=size).astype(np.int64)
    counts = np.zeros(size, np.int64)
    for block in blocks(symbols.size):
        counts += [np.count_nonzero(symbols[block] == symbol) for symbol in range(size)]
    return counts


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
      uint8: pieces, each after its length, little-endian. The first says which leaves begin new codes, the others are
      zlib streams. Empty where nothing is left to say.

    Example:
      >>> leaf = np.asarray([0, 1, 1, 0, 2, 1] * 100, np.uint8)
      >>> stream = encode([leaf], [counts_of(leaf, 3)])
      >>> bool((decode(stream, [leaf.size], [counts_of(leaf, 3)])[0] == leaf).all()), stream.size < 160
      (True, True)

    Source: Huffman, "A method for the construction of minimum-redundancy codes", 1952; Golomb, "Run-length encodings",
    1966; RFC 1950 and 1951.
    """
    if not entropy_bits(counts):
        return np.zeros(0, np.uint8)
    groups = _grouped(counts)
    joined = [
        np.concatenate([leaves[number] for number in group]) if len(group) > 1 else leaves[group[0]] for group in groups
    ]
    found = [np.sum([counts[number] for number in group], 0) for group in groups]
    coded = in_threads(
        [lambda x=x, n=n: list(_encoded(x, n)) for x, n in zip(joined, found, strict=True)], [x.size for x in joined]
    )
    begins = np.isin(np.arange(len(leaves)), [group[0] for group in groups])
    pieces = [np.packbits(begins).tobytes(), *itertools.chain.from_iterable(coded)]
    return np.frombuffer(b"".join(len(piece).to_bytes(_LENGTH, "little") + piece for piece in pieces), np.uint8)


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
    if not entropy_bits(counts):
        if stream.size:
            raise CheckpointError(_DAMAGED)
        return [_decoded(iter(()), found, *_plan(found)) for found in counts]
    pieces = _pieces(stream)
    groups = _read_groups(next(pieces, b""), len(counts))
    joined = [np.sum([counts[number] for number in group], 0) for group in groups]
    work: list[Callable[[], np.ndarray]] = []
    for found in joined:
        steps, last = _plan(found)
        own = list(itertools.islice(pieces, sum(1 if step.top is None or not step.bits else 2 for step in steps)))
        work.append(lambda n=found, steps=steps, last=last, own=own: _decoded(iter(own), n, steps, last))
    whole = in_threads(work, [int(found.sum()) for found in joined])
    leaves = [
        leaf
        for symbols, group in zip(whole, groups, strict=True)
        for leaf in np.split(symbols, np.cumsum([sizes[number] for number in group])[:-1])
    ]
    counted = in_threads([lambda x=x, n=n: counts_of(x, len(n)) for x, n in zip(leaves, counts, strict=True)], sizes)
    if next(pieces, None) is not None or not all(map(np.array_equal, counted, counts)):
        raise CheckpointError(_DAMAGED)
    return leaves


def code_length(stream: np.ndarray, counts: Sequence[np.ndarray]) -> float:
    """Return coded bits over their entropy; 1 where there is nothing to say."""
    bits = entropy_bits(counts)
    return 8 * stream.size / bits if bits and math.isfinite(bits) else 1.0


def _grouped(counts: Sequence[np.ndarray]) -> list[list[int]]:
    """Return which neighbouring leaves share their codes: those for which codes of their own would not pay."""

    def cost(found: np.ndarray) -> float:
        bits = entropy_bits([found])
        return bits and bits + _OWN_CODE

    groups, total = [[0]], counts[0]
    for number, found in enumerate(counts[1:], 1):
        joined = total + found
        if joined.sum() <= _GROUP and cost(joined) <= cost(total) + cost(found):
            groups[-1].append(number)
            total = joined
        else:
            groups.append([number])
            total = found
    return groups


def _read_groups(piece: bytes, leaves: int) -> list[list[int]]:
    """Return which leaves share their codes, as a stream says it."""
    if len(piece) != math.ceil(leaves / 8):
        raise CheckpointError(_DAMAGED)
    begins = np.unpackbits(np.frombuffer(piece, np.uint8), count=leaves)
    begins[0] = 1
    return [group.tolist() for group in np.split(np.arange(leaves), np.flatnonzero(begins)[1:])]


def _plan(counts: np.ndarray) -> tuple[list[_Step], int]:
    """Return how a leaf of these counts is coded, and the symbol that all places have to which no step says more."""
    left, steps = [int(n) for n in counts], []
    while sum(n > 0 for n in left) > 1:
        size, largest = sum(left), max(left)
        bits = next(bits for bits in (1, 2, 4, 8) if not any(left[1 << bits :]))
        if 1000 * largest <= _FREQUENT[bits] * size:
            return [*steps, _Step(size, None, bits)], 0
        top = left.index(largest)
        gap = size // (size - largest)
        steps.append(_Step(size, top, max(0, gap.bit_length() - 5)))
        left[top] = 0
    return steps, next((symbol for symbol, n in enumerate(left) if n), 0)


def _encoded(symbols: np.ndarray, counts: np.ndarray) -> Iterator[bytes]:
    """Yield the pieces of a leaf."""
    for step in _plan(counts)[0]:
        if step.top is None:
            yield _deflated(_packed(symbols, step.bits))
            return
        places = np.flatnonzero(symbols != step.top)
        gaps = np.diff(places, prepend=-1) - 1
        more, rest = np.divmod(gaps >> step.bits, _ESCAPE)
        plane = np.full(places.size + int(more.sum()), _ESCAPE, np.uint8)
        plane[np.cumsum(more + 1) - 1] = rest
        yield _deflated(plane)
        if step.bits:
            yield _deflated(np.packbits((gaps[:, None] >> np.arange(step.bits)) & 1))
        symbols = symbols[places]


def _decoded(pieces: Iterator[bytes], counts: np.ndarray, steps: Sequence[_Step], last: int) -> np.ndarray:
    """Return a leaf of which the pieces are given."""
    if not steps:
        return np.full(int(np.sum(counts)), last, np.uint8)
    step, *later = steps
    if step.top is None:
        return _unpacked(_inflated(pieces, math.ceil(step.size * step.bits / 8)), step.size, step.bits)
    left = np.where(np.arange(len(counts)) == step.top, 0, counts)
    places = _places(pieces, step, int(left.sum()))
    symbols = np.full(step.size, step.top, np.uint8)
    symbols[places] = _decoded(pieces, left, later, last)
    return symbols


def _places(pieces: Iterator[bytes], step: _Step, count: int) -> np.ndarray:
    """Return where the symbols are that are not the frequent one."""
    plane = _inflated(pieces, count + (step.size >> step.bits) // _ESCAPE + 1, exact=False)
    ends = np.flatnonzero(plane != _ESCAPE)
    if ends.size != count or ends[-1] != plane.size - 1:
        raise CheckpointError(_DAMAGED)
    gaps = (_ESCAPE * (np.diff(ends, prepend=-1) - 1) + plane[ends]) << step.bits
    if step.bits:
        bits = np.unpackbits(_inflated(pieces, math.ceil(count * step.bits / 8)), count=count * step.bits)
        gaps |= (bits.reshape(count, step.bits).astype(np.int64) << np.arange(step.bits)).sum(1)
    places = np.cumsum(gaps + 1) - 1
    if places[-1] >= step.size:
        raise CheckpointError(_DAMAGED)
    return places


def _packed(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Return symbols of 1, 2, 4 or 8 bits, as many to a byte as it holds."""
    each = 8 // bits
    if bits == 1:
        return np.packbits(symbols)
    packed = np.empty(math.ceil(symbols.size / each), np.uint8)
    for block in blocks(symbols.size):
        part = symbols[block]
        words = np.pad(part, (0, -part.size % each)).view(f"<u{each}")
        joined = words.copy()
        for place in range(1, each):
            joined |= words >> (place * (8 - bits))
        packed[block.start // each :][: words.size] = joined
    return packed


def _unpacked(packed: np.ndarray, size: int, bits: int) -> np.ndarray:
    """Undo `_packed`."""
    each = 8 // bits
    if bits == 1:
        return np.unpackbits(packed, count=size)
    symbols = np.empty(packed.size * each, np.uint8)
    lowest = sum(((1 << bits) - 1) << (8 * place) for place in range(each))
    for block in blocks(packed.size):
        words = packed[block].astype(f"<u{each}")
        spread = words.copy()
        for place in range(1, each):
            spread |= words << (place * (8 - bits))
        symbols[block.start * each : block.stop * each] = (spread & lowest).view(np.uint8)
    return symbols[:size]


def _deflated(piece: np.ndarray) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(piece.data) + coder.flush()


def _inflated(pieces: Iterator[bytes], size: int, exact: bool = True) -> np.ndarray:
    """Return the next piece, of so many bytes or at most so many; zlib compares its checksum."""
    decoder = zlib.decompressobj()
    try:
        found = decoder.decompress(next(pieces, b""), size + 1)
    except zlib.error as error:
        raise CheckpointError(_DAMAGED) from error
    if not decoder.eof or decoder.unused_data or len(found) > size or (exact and len(found) != size):
        raise CheckpointError(_DAMAGED)
    return np.frombuffer(found, np.uint8)


def _pieces(stream: np.ndarray) -> Iterator[bytes]:
    """Yield the coded pieces of a stream."""
    start = 0
    while start < stream.size:
        begin = start + _LENGTH
        length = int.from_bytes(stream[start:begin].tobytes(), "little")
        start = begin + length
        if start > stream.size:
            raise CheckpointError("the coded owners or picks end too early; the file is damaged")
        yield stream[begin:start].tobytes()
