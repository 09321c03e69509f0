"""The first difference of two pieces of JSON."""

from __future__ import annotations

from typing import Any


def difference(found: Any, mine: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Return `(path, found, mine)` of the first leaf in which two pieces of JSON differ; None if they are equal."""
    if isinstance(found, dict) and isinstance(mine, dict):
        for entry in [*mine, *(entry for entry in found if entry not in mine)]:
            inner = difference(found.get(entry), mine.get(entry), f"{name}.{entry}" if name else entry)
            if inner is not None:
                return inner
        return None
    if isinstance(found, list) and isinstance(mine, list) and len(found) == len(mine):
        pairs = enumerate(zip(found, mine, strict=True))
        return next((one for n, pair in pairs if (one := difference(*pair, f"{name}[{n}]")) is not None), None)
    return None if found == mine or (found != found and mine != mine) else (name, found, mine)
