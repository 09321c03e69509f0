"""What the documents show must run: the Python blocks of each document in order, and the cells of every notebook."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import pae_jax as pae

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").rglob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {path: re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL) for path in PAGES}
DOCUMENTS = [path for path in PAGES if BLOCKS[path]]  # pages of prose alone, and of the API, have nothing to run


def run_blocks(blocks, name):
    namespace = {"__name__": name}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number}", "exec"), namespace)


def with_few_steps(source):
    """Return a notebook's cell with 3 epochs, and 3 rounds of its long loops: the same calls in less time."""
    source = re.sub(r'(\bepochs(?:=|": ))\d+', r"\g<1>3", source)
    return re.sub(r"(\bin range\()\d{2,}\)", r"\g<1>3)", source)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_python_block_of_a_document_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(BLOCKS[path], path.stem)


def test_every_public_name_is_in_the_api_reference():
    pages = [path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")]
    listed = [name for text in pages for name in re.findall(r"^::: pae_jax\.(\S+)$", text, re.MULTILINE)]
    assert len(listed) == len(set(listed))
    assert set(pae.__all__) == {name for name in listed if "." not in name}


@pytest.mark.filterwarnings("default")  # those of the kernel's own packages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs_in_a_kernel(path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "raise")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parent), str(ROOT)]))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = with_few_steps(cell.source)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()


def test_the_quickstart_learns_two_tasks_and_checks_their_bits_in_under_40_lines():
    lines = [
        line for cell in code_cells(ROOT / "examples" / "quickstart.ipynb")[:3] for line in cell.source.splitlines()
    ]
    assert len([line for line in lines if line.strip() and not line.lstrip().startswith("#")]) < 40


def test_no_notebook_is_committed_with_an_error_or_without_its_output():
    for path in NOTEBOOKS:
        cells = code_cells(path)
        assert any(cell.outputs for cell in cells)
        assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
        assert not any(output.get("name") == "stderr" for cell in cells for output in cell.outputs)
