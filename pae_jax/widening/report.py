"""The result of the analysis as readable text."""

from __future__ import annotations

import dataclasses

from pae_jax.widening.axismaps import ArrayMap
from pae_jax.widening.values import Reason


@dataclasses.dataclass(frozen=True)
class WidenReport:
    """Which leaves grow and how, whether the narrow function is preserved, and under which condition.

    `str(report)` is a text with one line per growing leaf and per reason.

    Attributes:
      leaves: pairs (leaf path, its map), every leaf.
      reasons: one per place where the function is not preserved; empty if it is.
      zero_leaves: paths of local leaves (biases, norm scales, ...) whose new entries must be 0; new entries of the
        other local leaves may be any finite numbers that are not negative. Empty for most networks, and meaningless if
        there are reasons.
    """

    leaves: tuple[tuple[str, ArrayMap], ...]
    reasons: tuple[Reason, ...]
    zero_leaves: tuple[str, ...]

    @property
    def preserved(self) -> bool:
        return not self.reasons

    @property
    def headline(self) -> str:
        """One line: how many leaves grow, by how many distinct maps, and whether the function is preserved."""
        growing = [leaf for _, leaf in self.leaves if not leaf.is_identity]
        distinct = len({axis for leaf in growing for axis in leaf.axes if not axis.is_identity})
        found = "preserved" if self.preserved else f"not preserved in {_count(len(self.reasons), 'place', 'places')}"
        return (
            f"{_count(len(self.leaves), 'leaf', 'leaves')}, {len(growing)} {'grows' if len(growing) == 1 else 'grow'}; "
            f"{_count(distinct, 'distinct map', 'distinct maps')}; {found}"
        )

    def __str__(self) -> str:
        lines = [self.headline]
        lines += [f"  {path} {leaf}" for path, leaf in self.leaves if not leaf.is_identity]
        lines += [f"  not preserved: {reason}" for reason in self.reasons]
        if self.zero_leaves:
            lines.append(f"  new entries must be 0: {', '.join(self.zero_leaves)}")
        return "\n".join(lines)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
