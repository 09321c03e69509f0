"""Tables as text, and pages that say what they were given."""

import json

import pytest

from pae_jax.reports import Picture, text_table, write_page


def test_a_table_is_aligned_whatever_is_wider_the_name_or_the_cells():
    text = text_table(["task", "accuracy", "s"], [["a long name", "0.9", "1,234"], ["b", "0.1234567", ""]])
    assert text.splitlines() == [
        "task          accuracy      s",
        "a long name        0.9  1,234",
        "b            0.1234567",
    ]
    assert text_table(["task"], []) == "task"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        text_table(["task", "accuracy"], [["a"]])


def test_a_page_holds_the_text_the_pictures_and_the_numbers(tmp_path):
    page = write_page(tmp_path / "report", "A & B", "<1>", {"curve": ('"heights"', Picture(2, 1))}, {"value": 0.5})
    text = page.read_text("utf-8")
    assert "<h1>A &amp; B</h1>" in text and "<pre>&lt;1&gt;</pre>" in text
    assert 'src="curve.png" alt="&quot;heights&quot;"' in text
    assert (page.parent / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((page.parent / "results.json").read_text()) == {"value": 0.5}
