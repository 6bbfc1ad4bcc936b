"""`fdistill demo`: a teacher and its students on real text, in minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..options import count, seed
from .common import STUDENTS, Command, add_divergences, missing, to_install


def add(command: Command) -> None:
    """The command's arguments."""
    # fmt: off
    parser = command("demo", run, "Train a small GPT-2 teacher on real text, distil a student from it by each of "
                                  "several divergences, and compare them with a student that has no teacher.")
    add_divergences(parser, STUDENTS)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to train on; default: Python's language reference")
    parser.add_argument(
        "--out", default="demo-output", metavar="DIR", help="folder of the results; default: demo-output"
    )
    for name, steps, of in (("teacher", 320, "the teacher"), ("start", 60, "the start that all students share"),
                            ("student", 150, "each student")):
        parser.add_argument(f"--{name}-steps", type=count, default=steps, metavar="N",
                            help=f"training steps of {of}; default: {steps}")
    parser.add_argument("--expect", type=Path, metavar="FILE",
                        help="exit with status 1 unless the results are close to those of this results.json")
    parser.add_argument("--seed", type=seed, default=0, help="seed of weights and batches; default: 0")
    parser.add_argument("--restart", action="store_true", help="ignore the checkpoint in the folder, if there is one")
    # fmt: on


def run(args: argparse.Namespace) -> int:
    """Runs it; its exit status."""
    if lacking := missing("transformers", "tokenizers", "matplotlib", "rich"):
        raise ValueError(to_install(lacking, "demo"))
    from ..demo import main

    return main(args)
