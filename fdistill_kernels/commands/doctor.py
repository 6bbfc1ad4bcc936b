"""`fdistill doctor`: what can run here."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from typing import Any

import torch

from .. import __version__, backends
from ..backends import cuda
from ..divergences import TABLE
from ..doctor import details, lines, remedy, shareable
from ..provenance import as_json
from .common import Command, devices


def add(command: Command) -> None:
    """The command's arguments."""
    parser = command("doctor", run, "Show which backends can run here, which are used, and why others cannot.")
    parser.add_argument("--report", action="store_true", help="also show what a bug report needs")


def _state(backend: str, device: torch.device) -> str:
    """Whether a backend can compute js of float32 logits on a device, and why `auto` would not choose it."""
    reason = backends.BACKENDS[backend].why_not(device, torch.float32, TABLE["js"])
    passed_over = backends.why_not_auto(backend, device)
    return reason or (f"ready, but only if named: {passed_over}" if passed_over else "ready")


def run(args: argparse.Namespace) -> int:
    """Runs it; its exit status."""
    remedies = [line for library in ("cpu", "cuda") for line in remedy(library)]
    report: dict[str, Any] = {
        "fdistill_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "triton": importlib.util.find_spec("triton") is not None,
        "cuda_library": cuda.LIBRARY.version if cuda.LIBRARY else None,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "auto": {d: backends.choose("auto", torch.device(d), torch.float32, TABLE["js"]) for d in devices()},
        "backends": {name: {d: _state(name, torch.device(d)) for d in devices()} for name in backends.BACKENDS},
        "remedies": remedies,
    }
    more = shareable(details() if args.report else {})
    report = shareable(report) | more
    if args.json:
        print(as_json(report, 1))
        return 0
    for key in ("fdistill_kernels", "torch", "python", "threads", "instruction_set", "triton", "cuda_library", "cuda"):
        print(f"{key}: {report[key]}")
    for name, states in report["backends"].items():
        for device, state in states.items():
            print(f"backend {name} on {device}: {state}")
    for device, name in report["auto"].items():
        print(f"auto on {device} logits: {name}")
    for line in (*report["remedies"], *(lines(more) if more else ())):
        print(line)
    return 0
