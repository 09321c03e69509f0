"""The rule by which every shipped backbone scales with the width: floor(channels · width)."""

from __future__ import annotations

import math

from pae_jax.errors import ArgumentError


def scaled(channels: int, width: float) -> int:
    """Return floor(channels · width), the channel count of a layer at `width`.

    Args:
      channels: channels of the layer at width 1, at least 1.
      width: channel factor, finite and above 0. A network of r times the parameters has a width of about sqrt(r).

    Returns:
      The number of channels, at least 1.

    Raises:
      ArgumentError: `width` is not a positive finite number, or so small that no channel is left.

    Example:
      >>> [scaled(64, width) for width in (0.5, 1.0, 1.5**0.5, 2.0**0.5)]
      [32, 64, 78, 90]

    Reference: PAE (Hung et al., ICMR 2019) and CPG (Hung et al., NeurIPS 2019) floor in the same way.
    """
    if not (math.isfinite(width) and width > 0):
        raise ArgumentError(f"width: found {width!r}, expected a positive finite channel factor, such as 1.0 or 1.5.")
    count = math.floor(channels * width)
    if count < 1:
        raise ArgumentError(
            f"width: {width!r} leaves no channel in a layer of {channels}; expected at least {1 / channels:g}."
        )
    return count
