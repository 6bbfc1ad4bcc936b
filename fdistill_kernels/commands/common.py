"""What several commands share: types of their arguments, and tables."""

from __future__ import annotations

import argparse
import importlib.util
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import backends
from ..divergences import TABLE, Divergence
from ..own import resolve
from ..provenance import as_json, install

#: The default divergences of demo and bench.
STUDENTS = ("kl", "js", "tvd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
#: The packages that the commands of `sequence` need.
NEEDED = ("transformers", "accelerate", "datasets", "sacrebleu", "yaml", "matplotlib", "rich")
#: Makes the parser of a command of a name, what runs it and a line of help.
Command = Callable[[str, Any, str], argparse.ArgumentParser]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show(
    args: argparse.Namespace, found: Any, header: Sequence[str], rows: Sequence[Sequence[object]], *after: str
) -> None:
    """Prints `found` as JSON with --json, and otherwise a table followed by the lines in `after`."""
    if args.json:
        return print(as_json(found, 1))
    _table(header, rows)
    for line in after:
        print(line)


def as_divergence(text: str) -> Divergence:
    """The divergence of a name, or of a name with parameters as in alpha=0.3 and ab=0.2,0.7."""
    try:
        return resolve(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def as_shape(text: str) -> tuple[int, int]:
    """Rows and vocabulary of N,V."""
    found = re.fullmatch(r"0*([1-9]\d*),\s*0*([1-9]\d*)", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"shape must be N,V, such as 1024,32000, not {text!r}")
    n, v = int(found[1]), int(found[2])
    if n * v >= 2**60:
        raise argparse.ArgumentTypeError(f"no tensor has {n}·{v} entries")
    return n, v


def as_device(text: str) -> str:
    """The name of a device on which torch can make a tensor."""
    try:
        if torch.zeros(1, device=text).is_meta:
            raise ValueError("its tensors have a shape and no data")
    except Exception as error:  # torch raises different types for a missing driver, a missing card and a wrong name
        reason = str(error).splitlines()[0].split(". ")[0]  # of a device that torch was not built for, a page
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {textwrap.shorten(reason, 200)}") from error
    return text


def add_divergences(
    parser: argparse.ArgumentParser, default: Sequence[str] = (), read: Callable[[str], Any] = as_divergence
) -> None:
    """The argument --divergence."""
    help = f"names, with parameters as in alpha=0.3 (see `fdistill list`); default: {' '.join(default) or 'all'}"
    parser.add_argument("--divergence", nargs="+", type=read, metavar="NAME", help=help,
                        default=[TABLE[name] for name in default] or None)  # fmt: skip


def add_backend(parser: argparse.ArgumentParser, help: str, *, several: bool = False) -> None:
    """The arguments --device, of which there may be several, and --backend."""
    nargs, default, said = ("+", devices(), "all that are here") if several else (None, devices()[-1], "cuda, or cpu")
    parser.add_argument("--device", nargs=nargs, type=as_device, default=default,
                        help=f"cpu, cuda, cuda:1, ...; default: {said}")  # fmt: skip
    parser.add_argument("--backend", default="auto", choices=("auto", *backends.BACKENDS), help=help)


def devices() -> list[str]:
    """The kinds of devices that are here."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def missing(*names: str) -> list[str]:
    """Which of these packages are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def to_install(missing: Sequence[str], extra: str) -> str:
    """What is missing, and the command that installs it."""
    return f"{', '.join(missing)} missing: {install(extra)}"
