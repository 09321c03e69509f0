"""The benchmark for accelerators runs on a CPU as its command says, with tiny networks."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_small_run_measures_every_case_and_every_bit_is_the_same(tmp_path):
    words = [sys.executable, "benchmarks/accelerator.py", "--small", "--minutes", "9", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "accelerator.json").read_text())
    assert found["command"] == "python benchmarks/accelerator.py --small --minutes 9"
    assert found["hardware"]["device"] == "cpu" and {"jax", "flax", "pae-jax"} <= found["versions"].keys()
    assert "out_of_time" not in found and "failed" not in found
    cases = found["cases"]
    steps = [case for name, case in cases.items() if name.startswith("step, SmallCNN")]
    assert len(steps) == 1 and all({"plain", "packed", "user"} <= case["seconds"].keys() for case in steps)
    assert all(0 < case["share_of_roofline"] and case["ratios"] for case in steps)
    assert cases["paper protocol, size ratio 1.0"]["minutes_of_20_tasks"] > 0
    assert cases["prune"]["ratios"]["prune / step"] and cases["serving 8 tasks"]["one task"]
    same = {name: value for name, value in cases["bits"].items() if name != "whole_case_seconds"}
    assert len(same) == 5 and all(same.values())
