"""Result files of the GPU benchmarks, written anew after every shape: a run that is stopped leaves what it has."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton


def save(path: Path, results: list[dict[str, Any]], dry: bool, **rates: float) -> None:
    """The results with the device, versions, commit, command and the rates measured in the same run."""
    report = {
        "device": "interpreter" if dry else torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "command": " ".join(sys.argv), "dtype": "bfloat16", **rates, "results": results,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
