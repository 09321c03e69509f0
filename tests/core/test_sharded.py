"""Networks spread over several devices; the laws are in `eight_devices.py`, which runs in a process with 8 of them."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parent / "eight_devices.py"
LAWS = [node.name for node in ast.parse(SCRIPT.read_text()).body if getattr(node, "name", "").startswith("test_")]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """`{law: what it raised in each of its cases}` for the laws that ran."""
    report = tmp_path_factory.mktemp("eight") / "report.xml"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(SCRIPT)]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        raised = [child.text for child in case if child.tag in ("failure", "error", "skipped")]
        found.setdefault(case.get("name").partition("[")[0], []).extend(raised)
    return found


@pytest.mark.parametrize("law", LAWS)
def test_on_eight_devices(failures, law):
    assert failures[law] == [], "\n".join(map(str, failures[law]))
