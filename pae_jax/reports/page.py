"""A text table, an HTML page with a table, plots and their numbers, and JSON files that are never half written."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pae_jax import files


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text: the first column left-aligned, all others right-aligned.

    Args:
      columns: names of the columns.
      rows: their cells, as many as there are columns.

    Returns:
      One line for the names and one for each row.

    Example:
      >>> print(text_table(["task", "accuracy"], [["age", "0.573"], ["gender", "0.9"]]))
      task    accuracy
      age        0.573
      gender       0.9
    """
    lines = [columns, *rows]
    first, *rest = (max(map(len, cells)) for cells in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, rest, strict=True))]).rstrip()
        for name, *cells in lines
    )


def write_page(
    folder: str | Path, title: str, text: str, pictures: Mapping[str, tuple[str, Any]], facts: Mapping[str, Any]
) -> Path:
    """Write `index.html` with a text and pictures, a PNG of each picture, and `results.json`.

    Args:
      folder: output folder; created if needed.
      title: heading of the page.
      text: shown unchanged, such as a table.
      pictures: matplotlib figures by the name of their file, each with a heading.
      facts: JSON data for `results.json`.

    Returns:
      Path of the page.

    Example:
      >>> import tempfile
      >>> write_page(tempfile.mkdtemp(), "Results", "accuracy 0.9", {}, {"accuracy": 0.9}).name
      'index.html'
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shown = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(text)}</pre>"]
    for name, (heading, figure) in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
        heading = html.escape(heading, quote=True)
        shown.append(f'<h2>{heading}</h2>\n<img src="{name}.png" alt="{heading}">')
    write_json(folder / "results.json", facts)
    page = folder / "index.html"
    style = "body{font-family:sans-serif;max-width:60em;margin:2em auto}img{max-width:100%}"
    page.write_text(
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{style}</style>\n" + "\n".join(shown) + "\n</html>\n",
        "utf-8",
    )
    return page


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as a JSON file that has all its bytes or stays what it was.

    Args:
      path: the file; replaced if it exists. Its folder exists.
      value: what `json.dumps` takes.

    Raises:
      CheckpointError: it cannot be written.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "results.json"
      >>> write_json(file, {"accuracy": 0.9})
      >>> json.loads(file.read_text())
      {'accuracy': 0.9}
    """
    files.write_bytes(Path(path), (json.dumps(value, indent=1) + "\n").encode())
