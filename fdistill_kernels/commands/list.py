"""`fdistill list`."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import backends
from ..divergences import TABLE, Divergence
from .common import Command, show


def add(command: Command) -> None:
    """The command's arguments."""
    command("list", run, "List the divergences and their parameters.")


def run(args: argparse.Namespace) -> int:
    """Runs it; its exit status."""

    def ready(divergence: Divergence) -> list[str]:
        cpu = torch.device("cpu")
        return [name for name, m in backends.BACKENDS.items() if m.why_not(cpu, torch.float32, divergence) is None]

    found: list[dict[str, Any]] = [
        {"name": d.name, "parameters": d.named, "backends": ready(d)} for d in TABLE.values()
    ]
    rows = [(r["name"], " ".join(f"{k}={v if isinstance(v, str) else f'{v:g}'}" for k, v in r["parameters"].items()),
             " ".join(r["backends"])) for r in found]  # fmt: skip
    show(args, found, ("divergence", "parameters", "backends here"), rows)
    return 0
