"""Progress bars for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def progress_bar(
    items: Iterable[Any] | None = None, *, title: str, unit: str, shown: bool, total: int | None = None
) -> Any:
    """Return tqdm's bar over items, or over a total that is updated by hand.

    Args:
      items: what to iterate over; None with `update`.
      title: text before the bar.
      unit: name of the counted items.
      shown: whether to show a bar.
      total: number of items; None takes their length.
    """
    if shown:
        from tqdm.auto import tqdm  # warns in a notebook without widgets, so imported only if a bar is shown
    else:
        from tqdm import tqdm
    return tqdm(items, desc=title, unit=unit, total=total, disable=not shown, leave=False)
