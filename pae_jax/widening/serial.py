"""Maps as JSON: a table of distinct axis maps, and indices into it.

{"format": 1,
 "maps":    [[wide size, [start, length], ...], ...]      growing axes only, each distinct one once
 "leaves":  {path: [entry, ...]}                          per axis: a number into "maps", or "n": unchanged, size n
 "outputs": {"maps": [[entry, ...], ...], "tree": outline}
 "reasons": [{...}], "zero_leaves": [path, ...]}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pae_jax.errors import CheckpointError
from pae_jax.widening.axismaps import ArrayMap, AxisMap
from pae_jax.widening.trees import Skeleton
from pae_jax.widening.values import Reason

FORMAT = 1

Leaves = Sequence[tuple[str, ArrayMap]]


def encode(
    leaves: Leaves,
    outputs: Sequence[ArrayMap],
    outline: Skeleton,
    reasons: Sequence[Reason],
    zero_leaves: Sequence[str],
) -> dict[str, Any]:
    """The fields of a `WidenMaps` as a JSON-able dict."""
    table: dict[AxisMap, int] = {}

    def entry(axis: AxisMap) -> int | str:
        return str(axis.wide) if axis.is_identity else table.setdefault(axis, len(table))

    coded = {path: [entry(axis) for axis in leaf.axes] for path, leaf in leaves}
    coded_outputs = [[entry(axis) for axis in output.axes] for output in outputs]
    return {
        "format": FORMAT,
        "maps": [[axis.wide, *([start, length] for start, length in axis.runs)] for axis in table],
        "leaves": coded,
        "outputs": {"maps": coded_outputs, "tree": _lists(outline)},
        "reasons": [dataclasses.asdict(reason) for reason in reasons],
        "zero_leaves": list(zero_leaves),
    }


def decode(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `WidenMaps`, as `encode` wrote them."""
    if data.get("format") != FORMAT:
        raise CheckpointError(f"widening maps of format {data.get('format')!r}; this version reads format {FORMAT}.")
    table = [AxisMap(wide, tuple((start, length) for start, length in runs)) for wide, *runs in data["maps"]]

    def leaf(entries: Sequence[int | str]) -> ArrayMap:
        return ArrayMap(tuple(_unchanged(int(e)) if isinstance(e, str) else table[e] for e in entries))

    return {
        "leaves": tuple((path, leaf(entries)) for path, entries in data["leaves"].items()),
        "output_maps": tuple(leaf(entries) for entries in data["outputs"]["maps"]),
        "output_skeleton": _tuples(data["outputs"]["tree"]),
        "reasons": tuple(Reason(**reason) for reason in data["reasons"]),
        "zero_leaves": tuple(data["zero_leaves"]),
    }


def _unchanged(size: int) -> AxisMap:
    return AxisMap(size, ((0, size),) if size else ())


def _lists(outline: Any) -> Any:
    return [_lists(part) for part in outline] if isinstance(outline, tuple) else outline


def _tuples(outline: Any) -> Any:
    return tuple(_tuples(part) for part in outline) if isinstance(outline, list) else outline
