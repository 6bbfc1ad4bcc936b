"""benchmarks/gpu_check.sh as far as a machine without a card can take it, and with a fault in every step."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu_check import Step, main, run_all, steps

from .conftest import WHOLE, emulated_library

ROOT = Path(__file__).parent.parent
#: Of each step, what happens in the middle of it. A benchmark ends each measurement with a profile; the first is of
#: the machine's rates.
FAULTS = """
import os, time, torch
import torch.profiler

def after(count, function, fault):
    def called(*a, **kw):
        nonlocal count
        count -= 1
        return fault() if count < 0 else function(*a, **kw)
    return called

def illegal():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

step = os.environ.get("FDISTILL_STEP", "")
faults = {"rows triton": lambda: os._exit(139), "rows cuda": lambda: time.sleep(1000), "linear ours": illegal,
          "rows peers": lambda: os._exit(139), "linear peers": illegal,
          "peers": lambda: os._exit(139), "rows teams": lambda: os._exit(139)}
if step in faults:
    torch.profiler.profile = after(3 if step == "linear ours" else 2, torch.profiler.profile, faults[step])
if step.startswith("tests"):
    torch.nn.functional.cross_entropy = lambda *a, **kw: os._exit(139)
if step.endswith("check"):
    os._exit(9)
"""
#: Steps that fail as others do: `make test` leaves them out. One that hangs is in the test below them all.
ALIKE = ("rows cuda", "tests triton", "tests cuda", "rows peers", "peers", "rows teams", "racecheck")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """What torch.compile makes of a peer takes most of a minute, and is not ours."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0" if WHOLE else "1")


def test_runs_dry(tmp_path):
    """What will run on a card is known to work. `make test` takes the longest steps; the test below begins every one."""
    few = [] if WHOLE else ["--first", "--only", "linear ours", "tests cuda"]
    command = [ROOT / "benchmarks" / "gpu_check.sh", "--dry", tmp_path.name, *few]
    environment = {**os.environ, "PYTHON": sys.executable}
    process = subprocess.run(command, cwd=tmp_path.parent, env=environment, capture_output=True, text=True)
    assert process.returncode == 0 and "gpu_check: all passed" in process.stdout, process.stdout + process.stderr
    ran = json.loads((tmp_path / "check.json").read_text())["command"]
    assert ran == " ".join(["benchmarks/gpu_check.sh", *map(str, command[1:])])
    log = (tmp_path / "check.log").read_text()
    assert " passed" in log and "skipped" not in log, log
    for who in ("linear_ours", *(("rows_triton", "rows_cuda") if WHOLE else ())):
        entries = json.loads((tmp_path / f"{who}.json").read_text())["results"]
        assert len(entries) > 2 and all(e["milliseconds"] > 0 and "peak_bytes" in e for e in entries), who
        assert all(e["right"] for e in entries if e["what"] != "products"), who


def test_a_fault_in_each_step_loses_nobody_elses_results(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    for name, value in dict(FDISTILL_DRY="1", TRITON_INTERPRET="1", NVCC="false").items():
        monkeypatch.setenv(name, value)
    chosen = [replace(s, seconds=45) if s.name == "rows cuda" else s for s in steps(tmp_path, dry=True, first=True)]
    chosen = [s for s in chosen if WHOLE or s.name not in ALIKE]
    if WHOLE:
        emulated_library()  # built before, since its step is to hang in the middle, not at the beginning
    said = []
    assert not run_all(chosen, tmp_path, float("inf"), said.append)
    outcomes = {k: v["status"] for k, v in json.loads((tmp_path / "check.json").read_text())["steps"].items()}
    assert list(outcomes) == [s.name for s in chosen] and len(said) == len(chosen), "each step had its turn"
    assert outcomes.pop("rows cuda", "stopped after 45 s") == "stopped after 45 s"
    assert outcomes.pop("linear peers") == 0, "a peer's failure is written down, and is not ours"
    assert all(status not in (0, "no time left") for status in outcomes.values()), outcomes
    found = {who: json.loads((tmp_path / f"{who}.json").read_text())["results"]
             for who in (s.name.replace(" ", "_") for s in chosen if s.name.startswith(("rows", "linear")))}  # fmt: skip
    for entries in found.values():
        assert "milliseconds" in entries[0], found
    assert (
        "illegal memory" in found["linear_ours"][-1]["error"] and "illegal memory" in found["linear_peers"][-1]["error"]
    )


@pytest.mark.parametrize("more, said", [(["--dry", "--only", "row cuda"], "'row cuda'; known: build, rows triton"),
                                        (["--first", "--only", "memcheck"], "no step 'memcheck'"),
                                        ([], "no GPU here; --dry"), (["--dry", "--minutes", "0"], "not '0'"),
                                        (["--dry", "--minutes", "nan"], "not 'nan'")])  # fmt: skip
def test_what_cannot_run_is_refused_before_any_work(more, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.sh", str(tmp_path / "results"), *more])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


def ends(process, seconds=30):
    """Whether a process that is not ours ends; its parent may leave it a zombie."""
    until, state = time.monotonic() + seconds, Path(f"/proc/{process}/stat")
    while time.monotonic() < until:
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_time_that_is_up_is_said(tmp_path):
    assert not run_all([Step("late", ["true"], 10)], tmp_path, 0.0)
    assert json.loads((tmp_path / "check.json").read_text())["steps"]["late"]["status"] == "no time left"
    gone = Step("gone", ["there-is-no-such-program"], 10)
    hangs = Step("hangs", ["bash", "-c", f"echo begun; sleep 1000 & echo $! > {tmp_path}/child; wait"], 5)
    assert not run_all([gone, hangs, Step("there", ["true"], 10)], tmp_path, float("inf"))
    outcomes = json.loads((tmp_path / "check.json").read_text())["steps"]
    assert outcomes["hangs"]["status"] == "stopped after 5 s" and outcomes["there"]["status"] == 0
    assert "begun" in (tmp_path / "check.log").read_text()
    assert ends(int((tmp_path / "child").read_text())), "what it waited for is gone with it"


def test_told_to_end_it_ends_its_step_too(tmp_path):
    """As `timeout` or a queue tells it."""
    compiler, child = tmp_path / "nvcc", tmp_path / "child"
    compiler.write_text(f"#!/bin/sh\necho $$ > {child}.new && mv {child}.new {child}\nexec sleep 1000\n")
    compiler.chmod(0o755)
    environment = {**os.environ, "PYTHON": sys.executable, "NVCC": str(compiler)}
    command = [ROOT / "benchmarks" / "gpu_check.sh", "--dry", "--only", "build", "--", tmp_path / "results"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not child.exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and "told to end" in said
    assert ends(int(child.read_text())), "the step is gone with it"
