"""Linear losses on a GPU, beside the FLOP floor and the peers that are installed, in one run.

    python -m benchmarks.gpu_linear --out results.json [--dry]

The floor is 2·N·V·(3·D_s + D_t) FLOP at the matrix rate measured first. Memory is the peak above inputs and gradients,
the float32 accumulator of ∂weight included. --dry runs toy shapes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.gpu_rows import matrix_rate
from benchmarks.peers import linear_losses
from benchmarks.report import save
from fdistill_kernels import linear_f_divergence
from fdistill_kernels.bench import eager_loss, median_seconds
from fdistill_kernels.divergences import TABLE

SHAPES = [(8192, 128256, 2048, 4096), (8192, 128256, 4096, 4096), (4096, 32000, 2048, 4096), (4096, 151936, 1024, 2048)]


def problem(n, v, d_s, d_t, device):
    """Hidden states and heads in bfloat16; the student's require grad."""
    sizes = ((n, d_s), (v, d_s), (n, d_t), (v, d_t))
    made = [(torch.randn(s, device=device) / (s[1] ** 0.5 if s[0] == v else 1)).bfloat16() for s in sizes]
    return *(x.requires_grad_() for x in made[:2]), *made[2:]


def measure(loss, inputs, floor):
    """Time of forward and backward, and peak memory above inputs and gradients."""
    hidden, weight, *_ = inputs

    def step():
        hidden.grad = weight.grad = None
        loss(*inputs).backward()

    cuda = torch.cuda.is_available()
    try:
        step()
        hidden.grad = weight.grad = None
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes if cuda else None
        seconds = median_seconds(step, 0.5)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"out_of_memory": True}
    finally:
        hidden.grad = weight.grad = None
    return {"milliseconds": 1e3 * seconds, "over_floor": seconds / floor, "peak_bytes": peak}


def losses(name):
    """Ours by both paths, eager, compiled, and the peers that have this divergence."""
    row_loss = eager_loss(TABLE[name])

    def eager(h, w, t, u):
        return row_loss(h @ w.T, t @ u.T)

    ours = {
        "fdistill": lambda *x: linear_f_divergence(*x, name, backend="triton"),
        "fdistill minimal": lambda *x: linear_f_divergence(*x, name, memory="minimal", backend="triton"),
        "fdistill minimal, all tiles": lambda *x: linear_f_divergence(
            *x, name, memory="minimal", skip_tiles=False, backend="triton"
        ),
    }
    return {**ours, "eager": eager, "torch.compile": torch.compile(eager), **linear_losses(name)}


def main() -> None:
    """Measures, writes the file, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.dry else "cuda"
    rate = matrix_rate(device, 64 if args.dry else 8192)
    results = []
    for n, v, d_s, d_t in [(5, 130, 16, 24)] if args.dry else SHAPES:
        floor = 2 * n * v * (3 * d_s + d_t) / rate
        for name in ("js", "kl"):
            for what, loss in losses(name).items():
                if args.dry and not what.startswith("fdistill"):
                    continue
                torch._dynamo.reset()
                found = measure(loss, problem(n, v, d_s, d_t, device), floor)
                results.append({"what": what, "divergence": name, "shape": [n, v, d_s, d_t], **found})
                print(results[-1], flush=True)
            save(args.out, results, args.dry, matrix_flop_per_second=rate)


if __name__ == "__main__":
    main()
