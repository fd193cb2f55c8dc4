"""The kernels compile for every supported target, within its registers and its shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

# The most shared memory that one program may use.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def test_kernels_fit_every_target():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_ahead.py")
    process = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert {entry["target"] for entry in report} == set(SHARED)
    assert [entry for entry in report if entry["spilled"] > 0] == []
    assert [entry for entry in report if entry["shared"] > SHARED[entry["target"]]] == []
