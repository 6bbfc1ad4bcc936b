"""The paper's experiment, shortened: every stage and method, and that a second call finds nothing to do."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.paper.run import METHODS

from .test_run import PAIRS


def run(data, out, *more):
    command = [sys.executable, "-m", "benchmarks.paper.run", "--data", data, "--out", out, "--smoke", *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)


def test_every_stage(tmp_path):
    for part in ("train", "test"):
        with gzip.open(tmp_path / f"gettext_en_ro.{part}.tsv.gz", "wt", encoding="utf-8") as file:
            file.write("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    done = run(tmp_path, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"teacher", "predistill", "timing", "run", *METHODS} == results.keys()
    assert results["timing"]["js online ÷ offline"] > 0 and results["teacher"]["teacher_dist"] > 0
    assert (tmp_path / "out" / "table.png").exists() and "| tvd |" in done.stdout
    again = run(tmp_path, tmp_path / "out")
    assert again.returncode == 0 and again.stdout.strip() in done.stdout and "loss" not in again.stdout  # no training
