"""Every Triton kernel compiled ahead of time, for every target, held to the committed tables of tests/aot."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import WHOLE

TABLES = {path.stem: json.loads(path.read_text()) for path in sorted(Path(__file__).with_name("aot").glob("*.json"))}


def faults(table):
    """What no kernel may have: spills, double precision by accident, narrow loads, products without tensor cores. Where
    programs share a multiprocessor's registers, a tenth of a loop's instructions may move what is put aside.
    """
    for name, found in table.items():
        spilled = found["aside"] > 0.1 if "aside" in found else found["spill_bytes"]
        if spilled or found["double"] or not found["wide_loads"]:
            yield name, found
        if "_kernel/" in name and "fp32" not in name and not found["matrix"]:
            yield name, "no tensor-core instruction", found


@pytest.mark.parametrize("version", TABLES)
def test_tables_of_every_version(version):
    assert {name.rpartition(" @ ")[2] for name in TABLES[version]} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert not list(faults(TABLES[version]))


def run(module, *arguments):
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_nothing_is_worse_than_the_tables(tmp_path):
    """One test: what both compile is compiled once."""
    no_spills_wide_loads_and_nothing_worse_than_the_table()
    instructions_of_an_entry_are_those_of_the_table(tmp_path / "counts.json")


def no_spills_wide_loads_and_nothing_worse_than_the_table():
    assert importlib.util.find_spec("triton"), "the test extra brings triton"
    measured = json.loads(run("tests.aot", "--json", *([] if WHOLE else ["--part"])).splitlines()[-1])
    wrong = list(faults(measured["kernels"]))
    committed = TABLES.get(measured["triton"])
    for name, now in measured["kernels"].items() if committed else ():
        before = committed[name]
        worse = any(now.get(kind, 0) > before.get(kind, 0) for kind in ("registers", "shared", "aside"))
        if worse or now["wide_loads"] < before["wide_loads"] or now["wide_stores"] < before["wide_stores"]:
            wrong.append((name, before, now))
    assert not wrong


def instructions_of_an_entry_are_those_of_the_table(path):
    """What benchmarks/counts.py predicts from: Hopper's row kernels, sweep by sweep."""
    run("benchmarks.counts", "--out", path)
    now, committed = (json.loads(p.read_text()) for p in (path, Path(__file__).with_name("counts.json")))
    for name, found in now["table"].items():
        before = committed["table"][name]
        assert found["sweeps"] and all(s["loads"].get("128") or "views" in name for s in found["sweeps"]), (name, found)
        if now["triton"] == committed["triton"]:
            assert all(found[way] <= before[way] for way in ("instructions", "close", "mufu")), (name, before, found)


def test_what_is_launched_is_what_triton_would_launch():
    run("tests.launches", *(["--all"] if WHOLE else []))
