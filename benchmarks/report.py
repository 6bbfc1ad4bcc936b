"""Result files of the GPU benchmarks, written anew after every shape: a run that is stopped leaves what it has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton

from fdistill_kernels.provenance import provenance


def save(path: Path, results: list[dict[str, Any]], dry: bool, **rates: float) -> None:
    """The results with the device, versions, commit, command and the rates measured in the same run."""
    report = {
        **provenance(" ".join(sys.argv), "cpu" if dry else "cuda"), **({"device": "interpreter"} if dry else {}),
        "triton": triton.__version__, "dtype": "bfloat16", **rates, "results": results,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
