"""Records where the numbers of a result file come from, so that they can be reproduced."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import __version__

ROOT = Path(__file__).parents[1]


def install(extra: str) -> str:
    """The command that installs an extra. The package is on no index, so that its name alone would not be found."""
    return f'pip install ".[{extra}]" in a clone'


def finite(found: Any) -> Any:
    """What JSON can hold of dicts, lists and numbers: it has no infinity and no NaN, which are None."""
    return json.loads(json.dumps(found), parse_constant=lambda _: None)


def as_json(found: Any, indent: int | None = None) -> str:
    """JSON of what is `finite`, with null for the rest."""
    return json.dumps(finite(found), indent=indent)


def _git(*arguments: str) -> str | None:
    """git's answer about this checkout; None if this is no checkout, or if git is missing or fails."""
    if not (ROOT / ".git").exists():  # an installed package, which may lie inside another repository
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
    """The versions of the packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def provenance(command: str, device: str = "cpu", dtype: str | None = None) -> dict[str, Any]:
    """Device, dtype, versions, command, commit, and whether files had changes that are not committed (`dirty`).

    Changed files in benchmarks/results do not count, because nothing is measured with them. $FDISTILL_COMMIT names the
    commit of a tree that was copied without its git folder; then, and without git, `dirty` is None. dtype: of all
    that is measured; None where the cases say theirs.
    """
    named = os.environ.get("FDISTILL_COMMIT")
    status = ("status", "--porcelain", "--untracked-files=no", ":/", ":(top,exclude)benchmarks/results")
    changes = None if named else _git(*status)
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, "fdistill_kernels": __version__,
        "commit": named or _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes), "command": command, **({"dtype": dtype} if dtype else {}),
    }  # fmt: skip
