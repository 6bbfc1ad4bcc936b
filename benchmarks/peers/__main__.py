"""Measures our losses and other libraries' in one run: time, peak memory, and errors by the scale of the logits.

    python -m benchmarks.peers --out benchmarks/results/peers_cpu.json [--device cuda] [--shape 1024,32000]

A peer is timed only after it has been shown to compute the same loss. For the others, the result file says why they
were left out. The file is written after each measurement.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch

from fdistill_kernels.commands.common import DTYPES, as_device, as_shape
from fdistill_kernels.options import amount, count, written
from fdistill_kernels.provenance import as_json, provenance, versions

from . import FORMS, PACKAGES, found
from .measure import DIVERGENCES, errors_by_scale, losses, measured


def main() -> None:
    """Measures all losses and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=written, required=True, help="the result file")
    parser.add_argument("--device", type=as_device, default="cpu", help="default: cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--shape", type=as_shape, default=(1024, 32000), metavar="N,V",
                        help="rows and vocabulary; default: 1024,32000")  # fmt: skip
    parser.add_argument("--depth", type=count, default=512, help="features of the hidden states")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS), help="default: all")
    parser.add_argument("--divergence", nargs="+", choices=DIVERGENCES, default=DIVERGENCES, help="default: all")
    parser.add_argument("--seconds", type=amount, default=1.0, help="for how long each loss is timed")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    content: dict[str, Any] = {
        **provenance(" ".join(["python -m benchmarks.peers", *sys.argv[1:]]), args.device),
        "versions": versions(PACKAGES), "shape": args.shape, "depth": args.depth, "dtype": args.dtype,
        "results": [], "left_out": [],
    }  # fmt: skip

    def save() -> None:
        args.out.write_text(as_json(content, 1) + "\n")

    for form, name in itertools.product(args.form, args.divergence):
        if not found(form, name):
            continue
        chosen, left_out = losses(form, name, args.device, dtype)
        content["left_out"] += left_out
        of_scales = list(errors_by_scale(form, name, chosen, args.shape, dtype, args.device))
        for what, loss in chosen.items():
            torch._dynamo.reset()
            entry = measured(form, name, loss, args.shape, dtype, args.device, args.seconds, args.depth)
            entry["errors"] = [e for e in of_scales if e["what"] == what]
            content["results"].append({"what": what, "form": form, "divergence": name, **entry})
            save()
            print(f"{form:7s}{name:7s}{what:22s}{1e3 * entry['seconds']:10.1f} ms{entry['peak_bytes'] / 1e6:10.1f} MB",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
