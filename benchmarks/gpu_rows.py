"""Row losses on a GPU, beside the floor and the peers that are installed, in one run.

    python -m benchmarks.gpu_rows --out results.json [--dry]

The floor is three passes over N·V at the copy rate measured first. --dry runs toy shapes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
import triton

from benchmarks.peers import row_losses
from fdistill_kernels import f_divergence
from fdistill_kernels.bench import floor_seconds, make_logits, median_seconds, training_step

SHAPES = {"kl": [(8192, 128256), (4096, 32000), (8192, 50257)], "js": [(8192, 128256), (4096, 32000), (8192, 50257)],
          "tvd": [(8192, 128256), (4096, 32000)], "rkl": [(8192, 128256)], "engine": [(8192, 128256)],
          "cross_entropy": [(8192, 128256)]}  # fmt: skip


def matrix_rate(device: str, n: int) -> float:
    """FLOP a second of an n×n×n bfloat16 product of random matrices."""
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b)


def measure(step, floor, what, name, shape):
    """Time and peak memory above what was there before."""
    cuda = torch.cuda.is_available()
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = median_seconds(step, 0.3)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"what": what, "divergence": name, "shape": shape, "out_of_memory": True}
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    return {"what": what, "divergence": name, "shape": shape, "milliseconds": 1e3 * seconds,
            "over_floor": seconds / floor, "peak_bytes": peak}  # fmt: skip


def main() -> None:
    """Measures, writes the file, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.dry else "cuda"
    results = []
    for name, shapes in SHAPES.items():
        for shape in [(2, 500)] if args.dry else shapes:
            student, teacher = make_logits(shape, torch.bfloat16, device)
            floor = floor_seconds(teacher)
            ours = training_step(lambda s, t, d=name: f_divergence(s, t, d, backend="triton"), student, teacher)
            results.append(measure(ours, floor, "fdistill", name, shape))
            for peer, loss in ({} if args.dry else row_losses(name)).items():
                torch._dynamo.reset()
                results.append(measure(training_step(loss, student, teacher), floor, peer, name, shape))
            del student, teacher, ours
    like = torch.empty(2**16 if args.dry else 2**29, dtype=torch.bfloat16, device=device)
    report = {
        "device": "interpreter" if args.dry else torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "command": " ".join(sys.argv), "dtype": "bfloat16",
        "copy_bytes_per_second": 3 * like.nbytes / floor_seconds(like),
        "matrix_flop_per_second": matrix_rate(device, 64 if args.dry else 8192), "results": results,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for r in results:
        print(
            f"{r['divergence']:14s} {r['shape']!s:16s} {r['what']:14s}",
            f"{r['milliseconds']:9.3f} ms  {r['over_floor']:6.2f} floors" if "milliseconds" in r else "out of memory",
        )


if __name__ == "__main__":
    main()
