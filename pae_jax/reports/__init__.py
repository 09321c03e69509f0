"""Tables and plots of weight ownership and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pae_jax.reports.ownership_table import report as report
from pae_jax.reports.page import text_table as text_table
from pae_jax.reports.page import write_json as write_json
from pae_jax.reports.page import write_page as write_page
from pae_jax.reports.transfer_table import Transfer as Transfer
from pae_jax.reports.transfer_table import transfer as transfer

if TYPE_CHECKING:
    from pae_jax.reports.plotting import Picture as Picture


def __getattr__(name: str) -> Any:
    """Import modules that need matplotlib only on access."""
    if name == "Picture":
        from pae_jax.reports.plotting import Picture

        return Picture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
