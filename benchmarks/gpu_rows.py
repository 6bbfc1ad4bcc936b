"""Row losses on a GPU, by every backend of ours, beside the floor and the peers that are installed, in one run.

    python -m benchmarks.gpu_rows --out results.json [--dry]

The floor is three passes over N·V at the copy rate measured first; two for labels alone, which have no teacher. --dry
runs toy shapes, Triton in its interpreter and the CUDA kernels emulated.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks.peers import labels_of, row_losses
from benchmarks.report import save
from fdistill_kernels import cross_entropy, f_divergence
from fdistill_kernels.backends import BACKENDS, cuda
from fdistill_kernels.bench import floor_seconds, make_logits, median_seconds, training_step

PEERS_TOO = [(8192, 128256), (4096, 32000), (8192, 50257)]
OURS_ALONE = [(8192, v) for v in (32000, 151936, 262144)]
SHAPES = {"kl": PEERS_TOO + OURS_ALONE, "js": PEERS_TOO + OURS_ALONE, "tvd": PEERS_TOO + OURS_ALONE,
          "rkl": PEERS_TOO[:1], "engine": PEERS_TOO[:1], "labels": PEERS_TOO[:1] + OURS_ALONE}  # fmt: skip


def our_losses(name, device):
    """The loss by each backend that runs there, as functions of logits of student and teacher."""

    def loss(student, teacher, backend, blocks=cuda.BLOCKS):
        cuda.BLOCKS = blocks
        if name == "labels":
            return cross_entropy(student, labels_of(student), backend=backend)
        return f_divergence(student, teacher, name, backend=backend)

    able = [n for n in ("triton", "cuda") if BACKENDS[n].why_not(torch.device(device), torch.bfloat16, None) is None]
    losses = {f"fdistill {n}": functools.partial(loss, backend=n) for n in able}
    if "cuda" in able:
        for blocks in ((1,), (3, 2, 1)):
            losses[f"fdistill cuda {blocks[0]}"] = functools.partial(loss, backend="cuda", blocks=blocks)
    return losses


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
    if args.dry:
        folder = tempfile.TemporaryDirectory()
        subprocess.run(["csrc/cuda/build.sh", "--emulated", f"{folder.name}/emulated.so"], check=True)
        cuda.LIBRARY = cuda.Library(Path(folder.name, "emulated.so"))
    like = torch.empty(2**16 if args.dry else 2**29, dtype=torch.bfloat16, device=device)
    rates = {"copy_bytes_per_second": 3 * like.nbytes / floor_seconds(like),
             "matrix_flop_per_second": matrix_rate(device, 64 if args.dry else 8192)}  # fmt: skip
    del like
    results: list[dict[str, object]] = []
    for name, shapes in SHAPES.items():
        for shape in [(2, 500)] if args.dry else shapes:
            student, teacher = make_logits(shape, torch.bfloat16, device)
            floor = floor_seconds(teacher) * (2 / 3 if name == "labels" else 1)
            ours, peers = our_losses(name, device), row_losses(name) if shape in PEERS_TOO else {}
            for what, loss in {**ours, **peers}.items():
                torch._dynamo.reset()
                step = training_step(loss, student, teacher)
                try:
                    results.append(measure(step, floor, what, name, shape))
                except Exception as error:  # of a peer
                    if what in ours:
                        raise
                    results.append({"what": what, "divergence": name, "shape": shape, "error": str(error)[:500]})
            save(args.out, results, args.dry, **rates)
            del student, teacher
    for r in results:
        found = r.get("error", "out of memory")
        if "milliseconds" in r:
            found = f"{r['milliseconds']:9.3f} ms  {r['over_floor']:6.2f} floors"
        print(f"{r['divergence']:14s} {r['shape']!s:16s} {r['what']:18s}", found)


if __name__ == "__main__":
    main()
