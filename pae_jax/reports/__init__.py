"""Tables and pictures: who owns what, and how large it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pae_jax.reports.ownership_table import report as report

if TYPE_CHECKING:
    from pae_jax.reports.plotting import Picture as Picture


def __getattr__(name: str) -> Any:
    """Import what needs matplotlib only when it is asked for."""
    if name == "Picture":
        from pae_jax.reports.plotting import Picture

        return Picture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
