"""`fdistill doctor --report`: what a bug report needs in addition to the state of the backends, on one screen."""

from __future__ import annotations

import os
import platform
import subprocess
import textwrap
from typing import Any

from .backends import native
from .provenance import provenance, versions

WIDTH, LOG_LINES = 118, 6
PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate", "tokenizers", "datasets", "peft", "trl",
            "liger-kernel", "deepspeed", "vllm")  # fmt: skip
#: The environment variables that decide which kernels are built, found and run. No other variable is shown.
PREFIXES = ("FDISTILL_", "TRITON_", "OMP_", "MKL_", "KMP_", "CUDA_", "PYTORCH_", "TORCH_", "TORCHDYNAMO_",
            "TORCHINDUCTOR_", "ACCELERATE_", "NCCL_")  # fmt: skip
NAMES = ("ATEN_CPU_CAPABILITY", "CXX", "NVCC", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "RANK", "WORLD_SIZE")
SECRET = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


def details() -> dict[str, Any]:
    """Collects the system, commit, versions, devices, last lines of failed builds and environment variables."""
    origin = provenance("fdistill doctor --report")
    return {
        "system": f"{platform.platform()}, {platform.python_implementation()} {platform.python_version()}",
        "commit": origin["commit"] and origin["commit"] + ", changed" * bool(origin["dirty"]),
        "versions": versions(PACKAGES),
        "devices": [f"{origin['device']}, {os.cpu_count()} cores", *_cards()],
        "build_logs": {name: _last_lines(name) for name in ("cpu", "cuda") if native.log_of(name).exists()},
        "environment": {name: value for name, value in sorted(os.environ.items()) if _matters(name)},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The text of `details`, in lines of at most WIDTH characters."""
    installed = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    shown = [f"system: {found['system']}", f"commit: {found['commit']}"]
    shown += textwrap.wrap(f"versions: {installed}", WIDTH, subsequent_indent="    ")
    shown += [f"device: {device}" for device in found["devices"]]
    for name, log in found["build_logs"].items():
        shown += [f"last lines of the {name} library's failed build:", *(f"    {line}" for line in log)]
    shown += [f"{name}={value}" for name, value in found["environment"].items()]
    return [line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in shown]


def _cards() -> list[str]:
    """The GPUs that the driver lists, including those that torch cannot use."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _last_lines(library: str) -> list[str]:
    text = native.log_of(library).read_text(encoding="utf-8", errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LOG_LINES:]


def _matters(name: str) -> bool:
    return (name in NAMES or name.startswith(PREFIXES)) and not any(word in name for word in SECRET)
