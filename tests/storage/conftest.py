"""Programs that are killed, or end, while they write."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import pae_jax as pae


@pytest.fixture(scope="session")
def run_child(tmp_path_factory):
    """Run a program with a folder and a word; return the folder and what it ended with."""

    def run(program, what):
        folder = tmp_path_factory.mktemp("child")
        script = folder / "child.py"
        script.write_text(textwrap.dedent(program))
        done = subprocess.run(
            [sys.executable, str(script), str(folder / "run"), what],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": str(Path(pae.__file__).parent.parent)},
        )
        return folder / "run", done

    return run
