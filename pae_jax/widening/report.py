"""What the analysis found out beside the maps."""

from __future__ import annotations

import dataclasses

from pae_jax.widening.values import Reason


@dataclasses.dataclass(frozen=True)
class WidenReport:
    """Whether widening preserves the narrow function, and under which condition.

    Attributes:
      reasons: one per place where it does not; empty if it does.
      zero_leaves: paths of local leaves (biases, norm scales, ...) whose new entries must be 0; those of others may be
        any finite numbers that are not negative. Empty for most networks, and without meaning if there are reasons.
    """

    reasons: tuple[Reason, ...] = ()
    zero_leaves: tuple[str, ...] = ()

    @property
    def preserved(self) -> bool:
        return not self.reasons
