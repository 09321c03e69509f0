"""Figures that show themselves in a notebook; needs the `plot` extra, so it is imported where a plot is made."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A matplotlib figure apart from pyplot's global state, with the PNG that notebooks ask for."""

    def __init__(self, width: float, height: float):
        super().__init__(figsize=(width, height), layout="constrained")

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=100)
        return data.getvalue()
