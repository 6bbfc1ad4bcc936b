"""Every Triton kernel compiled ahead of time for every target, held to the committed table of tests/aot.json."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

COMMITTED = json.loads(Path(__file__).with_name("aot.json").read_text())


def test_no_spills_wide_loads_and_nothing_worse_than_the_table():
    assert importlib.util.find_spec("triton"), "the test extra brings triton"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    process = subprocess.run([sys.executable, "-m", "tests.aot", "--json"], cwd=Path(__file__).parent.parent,
                             env=environment, capture_output=True, text=True)  # fmt: skip
    assert process.returncode == 0, process.stderr
    measured = json.loads(process.stdout.splitlines()[-1])
    assert measured["kernels"].keys() == COMMITTED["kernels"].keys()
    wrong = []
    for name, now in measured["kernels"].items():
        if now["spill_bytes"] or now["double"] or not now["wide_loads"]:
            wrong.append((name, now))
        if "_kernel/" in name and "fp32" not in name and not now["matrix"]:
            wrong.append((name, "no tensor-core instruction", now))
        before = COMMITTED["kernels"][name]
        if measured["triton"] == COMMITTED["triton"]:
            worse = now["registers"] > before["registers"] or now["shared"] > before["shared"]
            if worse or now["wide_loads"] < before["wide_loads"] or now["wide_stores"] < before["wide_stores"]:
                wrong.append((name, before, now))
    assert not wrong
