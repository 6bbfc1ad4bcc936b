"""`fdistill list`."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import backends
from ..divergences import TABLE, Divergence
from .common import Command, devices, show


def add(command: Command) -> None:
    """The command's arguments."""
    command("list", run, "List the divergences and their parameters.")


def run(args: argparse.Namespace) -> int:
    """Runs it; its exit status."""

    def ready(divergence: Divergence) -> list[str]:
        here = [torch.device(name) for name in devices()]
        return [name for name, backend in backends.BACKENDS.items()
                if any(backend.why_not(device, torch.float32, divergence) is None for device in here)]  # fmt: skip

    found: list[dict[str, Any]] = [
        {"name": d.name, "parameters": d.named, "backends": ready(d)} for d in TABLE.values()
    ]
    rows = [(r["name"], " ".join(f"{k}={v if isinstance(v, str) else f'{v:g}'}" for k, v in r["parameters"].items()),
             " ".join(r["backends"])) for r in found]  # fmt: skip
    show(args, found, ("divergence", "parameters", "backends here"), rows)
    return 0
