"""`fdistill bench`: a loss beside eager PyTorch, the memory floor and other libraries; and launches for it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

import torch

from ..options import count
from .common import DTYPES, STUDENTS, Command, add_backend, add_divergences, as_shape, show


def add(command: Command) -> None:
    """The command's arguments."""
    # fmt: off
    parser = command("bench", run, "Time a loss, forward and backward, beside eager PyTorch and the memory floor.")
    parser.add_argument("--shape", type=as_shape, default=(1024, 32000), metavar="N,V",
                        help="rows and vocabulary; default: 1024,32000")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="dtype of the logits; default: float32")
    parser.add_argument("--threads", type=_threads, metavar="N", help="threads of the CPU; default: as torch is set")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the eager loss")
    add_divergences(parser, STUDENTS)
    parser.add_argument("--report", metavar="FILE", help="write an HTML page with charts of time, memory and errors, "
                                                         "beside other installed libraries")
    parser.add_argument("--tune", action="store_true",
                        help="time every launch of the Triton backend for this shape, and save the fastest")
    add_backend(parser, "backend; default: auto")
    # fmt: on


def _threads(text: str) -> int:
    if (asked := count(text)) > (cores := os.cpu_count() or 1):
        raise argparse.ArgumentTypeError(f"must be at most {cores}, the cores of this machine, not {text!r}")
    return asked


def run(args: argparse.Namespace) -> int:
    """Runs it; its exit status."""
    from ..bench import measure

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.tune and args.report:
        raise ValueError("--tune and --report are different runs: give only one of them")
    if args.tune and (args.compile or args.backend not in ("auto", "triton")):
        raise ValueError("--tune times the Triton backend alone: leave out --compile and --backend")
    if args.tune:
        return _tune(args)
    how = args.shape, DTYPES[args.dtype], args.device, args.backend, args.compile
    if args.report:
        from ..report import of_whole_shape, write

        report = write(args.report, args.divergence, *how, say=lambda line: print(line, file=sys.stderr, flush=True))
        show(args, report, ("divergence", "loss", "ms", "÷ floor", "÷ ours", "MB"), of_whole_shape(report, args.shape),
              f"wrote {args.report}")  # fmt: skip
        return 0
    results = [{"divergence": str(divergence), **dataclasses.asdict(timing)}
               for divergence in args.divergence for timing in measure(divergence, *how)]  # fmt: skip
    about = {"shape": args.shape, "dtype": args.dtype, "threads": torch.get_num_threads()}
    ours = {r["divergence"]: r["seconds"] for r in results if r["what"] == "fdistill"}
    rows = [(r["divergence"], r["what"], f"{1e3 * r['seconds']:.1f} ms", f"{r['seconds'] / r['floor']:.2f}",
             f"{r['seconds'] / ours[r['divergence']]:.2f}") for r in results]  # fmt: skip
    if not args.json:
        print("forward and backward, N, V = {shape}, {dtype}, {threads} threads".format(**about))
    show(args, {**about, "torch": torch.__version__, "results": results},
          ("divergence", "what", "median", "÷ floor", "÷ ours"), rows)  # fmt: skip
    return 0


def _tune(args: argparse.Namespace) -> int:
    from ..backends.triton.launch import cache_file
    from ..bench import tune

    found = [{"divergence": str(divergence), "seconds": seconds, **dataclasses.asdict(launch)}
             for divergence in args.divergence
             for launch, seconds in tune(divergence, args.shape, DTYPES[args.dtype], args.device)]  # fmt: skip
    rows = [[f"{x:.3g}" if isinstance(x, float) else x for x in r.values()] for r in found]
    show(args, found, list(found[0]), rows, f"the fastest launch of each divergence is saved in {cache_file()}")
    return 0
