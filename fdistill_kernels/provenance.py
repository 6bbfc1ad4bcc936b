"""What a result file says of where its numbers come from, so that they can be had again."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import __version__

ROOT = Path(__file__).parents[1]


def _git(*arguments: str) -> str | None:
    """git's answer about the checkout that this is; None where it is none, or git is missing or refuses."""
    if not (ROOT / ".git").exists():  # installed, and perhaps inside of somebody's repository
        return None
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def provenance(command: str, device: str = "cpu") -> dict[str, Any]:
    """Device, versions, command, commit, and whether the tree had changes besides (`dirty`). $FDISTILL_COMMIT names the
    commit of a tree that was copied without its git, or beside another's; then, and without git, dirty is None.

    Results that an earlier command has written anew are no change: nothing is measured with them.
    """
    named = os.environ.get("FDISTILL_COMMIT")
    changes = (
        None
        if named
        else _git("status", "--porcelain", "--untracked-files=no", ":/", ":(top,exclude)benchmarks/results")
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, "fdistill_kernels": __version__,
        "commit": named or _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes), "command": command,
    }  # fmt: skip
