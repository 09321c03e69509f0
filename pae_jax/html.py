"""Small tables for notebooks: plain HTML without scripts, readable in dark and light themes."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_LAYERS = 60


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as an HTML table; numbers are shortened."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(value))}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def cell(value: Any) -> str:
    """Return a value as text for a table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ownership(tasks: Sequence[str], leaves: Mapping[str, np.ndarray]) -> str:
    """Return one bar per layer, with one part per task, as long as its share of the weights; the free share is empty.

    Args:
      tasks: names in order of learning.
      leaves: per layer the number of weights of each owner, free ones first.
    """
    legend = " ".join(_key(task, i, len(tasks)) for i, task in enumerate(tasks))
    shown = list(leaves.items())[:_LAYERS]
    rows = "".join(f"<tr><td>{html.escape(path)}</td><td>{_bar(counts)}</td></tr>" for path, counts in shown)
    more = f"<div>and {len(leaves) - len(shown)} more layers</div>" if len(leaves) > len(shown) else ""
    return f"<div>{legend}</div><table><tbody>{rows}</tbody></table>{more}"


def _bar(counts: np.ndarray) -> str:
    total, tasks = max(int(counts.sum()), 1), len(counts) - 1
    parts = "".join(
        f'<span style="display:inline-block;height:100%;width:{100 * counts[i] / total:.2f}%;'
        f'background:{_colour(i - 1, tasks)}"></span>'
        for i in range(1, tasks + 1)
        if counts[i]
    )
    return f'<div style="width:16em;height:0.8em;border:1px solid #8888;font-size:inherit;line-height:0">{parts}</div>'


def _key(task: str, index: int, count: int) -> str:
    return f'<span style="color:{_colour(index, count)}">&#9632;</span> {html.escape(task)}'


def _colour(index: int, count: int) -> str:
    return f"hsl({round(220 - 220 * index / max(count - 1, 1))} 65% 55%)"
