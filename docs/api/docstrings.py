"""Griffe extension for the API pages: writes the docstrings as the parser reads them best."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_REMARK = re.compile(r"^(Source|Reference|Example): (?=\S)", re.MULTILINE)
_SECTION = re.compile(r"^(?:Args|Attributes|Raises):\n(?:(?: .*)?\n?)+", re.MULTILINE)
_SEVERAL = re.compile(r"^  (\w+(?:, \w+)+): (.*(?:\n   +.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Name the section of examples, set remarks in bold, and give names that share a line one each."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            text = _REMARK.sub(r"**\1.** ", text)
            obj.docstring.value = _SECTION.sub(lambda section: _SEVERAL.sub(_one_each, section[0]), text)


def _one_each(entry: re.Match[str]) -> str:
    return "\n".join(f"  {name}: {entry[2]}" for name in entry[1].split(", "))
