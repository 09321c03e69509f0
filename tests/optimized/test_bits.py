"""The law above all once more, with every optimization of the compiler that users get."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "three_tasks.py"


@pytest.mark.parametrize(
    ("sharing", "chain"), [("all", "adamw"), ("all", "momentum"), ("picked", "momentum"), ("picked", "MultiSteps")]
)
def test_old_tasks_keep_every_bit_through_train_prune_grow_save_and_load(sharing, chain, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    words = [sys.executable, "-W", "error", str(SCRIPT), sharing, chain, str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("3 tasks unchanged\n"), done.stderr[-2000:]
