"""The `fdistill` command."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__
from .commands import bench, demo, doctor, list, teacher, verify
from .commands.common import NEEDED, missing, to_install
from .options import OnceParser
from .provenance import install

#: The commands that `sequence` runs.
SEQUENCE = {
    "train": "Distil a Hugging Face model: draw samples from the teacher, train the student, evaluate it and write a "
             "report.",
    "sample-teacher": "Draw the teacher's samples that train would draw first, and store them.",
    "evaluate": "Measure a student on held-out data: perplexity, likelihood and coverage risk, BLEU, chrF and TER.",
}  # fmt: skip


def _sequence(argv: Sequence[str]) -> int | None:
    """Runs a command of `sequence`, which parses its own options, and returns its exit status.

    Returns None for the other commands, whose options `parser` has.
    """
    name, *rest = argv or [""]
    if name not in (*SEQUENCE, "teacher"):
        return None
    if lacking := missing(*NEEDED):
        if {"-h", "--help"} & set(argv):
            return None
        print(f"fdistill: {to_install(lacking, 'sequence')}", file=sys.stderr)
        return 2
    if name == "teacher":
        action = next((i for i, word in enumerate(rest) if word != "--json"), 0)  # which may also stand before it
        if rest[action : action + 1] != ["build"]:
            return None
        del rest[action]
    from .sequence import build, run

    return run.main("teacher build", rest, build.build) if name == "teacher" else run.main(name, rest)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. The options of `SEQUENCE` and of `teacher build` are not in it."""
    top = OnceParser("fdistill", description="Fused f-divergence losses for language-model distillation.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return sub

    for one in (demo, verify, bench):
        one.add(command)
    needs = f" (needs {install('sequence')})" if missing(*NEEDED) else ""
    for name, help in SEQUENCE.items():
        command(name, None, help + needs)  # `_sequence` runs it
    teacher.add(command, needs)
    for last in (doctor, list):
        last.add(command)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    It is 0; 1 if a check failed; 2 for bad input, after one line; 130 after Ctrl-C; 141 if nobody reads the output.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows ? in place of ÷
    try:
        try:
            return _main(argv)
        finally:
            if sys.stdout is not None:  # as it is in `fdistill list >&-`
                sys.stdout.flush()
    except OSError as error:  # of the output alone: `_main` tells the others
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end
        if isinstance(error, BrokenPipeError):  # as in `fdistill list | head -1`
            return 141
        print(f"fdistill: the output cannot be written: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _main(argv: Sequence[str]) -> int:
    try:
        if (status := _sequence(argv)) is not None:
            return status
        args = parser().parse_args(argv)
        return int(args.run(args))
    except BrokenPipeError:
        raise
    except Exception as error:
        if (told := _told(error)) is None:
            raise
        print(f"fdistill {argv[0]}: {told}", file=sys.stderr)
        return 2


def _told(error: Exception) -> str | None:
    """What a user can make of an error, in one line; None for those that are faults of the program."""
    text = " ".join(str(error).split())
    if isinstance(error, (OSError, ValueError)):  # a missing file, a read-only folder, a call that is refused
        return text
    asked = re.search(r"can't allocate memory: you (tried to allocate \d+ bytes)|(Tried to allocate [\d.]+ \w+)", text)
    if asked or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"there is not enough memory ({(asked[1] or asked[2]).lower() if asked else text})"
    if "there is no such kernel" in text:
        return text  # which says how to build it again
    return None


if __name__ == "__main__":
    sys.exit(main())
