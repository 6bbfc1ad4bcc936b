"""Linear losses on a GPU, ours or the peers' that are installed, beside the FLOP floor.

    python -m benchmarks.gpu_linear --who ours|peers --out results.json [--first] [--dry]

The floor is 2·N·V·(3·D_s + D_t) FLOP at the matrix rate measured first; "products" are those four alone, in chunks as
ours. Memory is the peak above inputs and gradients, the float32 accumulator of ∂weight included. The hidden
states' gradient is held beside float64 on a few rows. --first takes the two shapes that matter most; --dry toy shapes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Device, Results, arguments, error_of_mean, few_rows, loss_measured, measured, rates
from benchmarks.gpu_rows import emulate
from benchmarks.peers import Loss, running
from fdistill_kernels import linear_f_divergence, products
from fdistill_kernels.backends import BACKENDS
from fdistill_kernels.reference import f_divergence_rows
from fdistill_kernels.values import Head

FIRST = [(8192, 128256, 2048, 4096), (8192, 128256, 4096, 4096)]
FULL = [
    *FIRST,
    (4096, 32000, 2048, 4096),
    (4096, 151936, 1024, 2048),
    (4096, 50257, 768, 1600),
]
PRODUCTS_ROWS = 1024


def problem(n: int, v: int, d_s: int, d_t: int, device: str) -> tuple[Tensor, ...]:
    """Hidden states and heads in bfloat16; the student's require grad."""
    torch.manual_seed(0)
    sizes = ((n, d_s), (v, d_s), (n, d_t), (v, d_t))
    made = [(torch.randn(s, device=device) / (s[1] ** 0.5 if s[0] == v else 1)).bfloat16() for s in sizes]
    return *(x.requires_grad_() for x in made[:2]), *made[2:]


def our_losses(name: str, device: Device, first: bool, room: int) -> dict[str, Loss]:
    """Ours by both paths and both row kernels; the cut path also with so many bytes, which hold ∂hidden in float32."""
    losses: dict[str, Loss] = {}
    for backend in ("triton", "cuda"):
        if BACKENDS[backend].why_not(torch.device(device.type), torch.bfloat16, None) is None:
            losses[f"fdistill {backend}"] = functools.partial(linear_f_divergence, divergence=name, backend=backend)
    minimal = functools.partial(linear_f_divergence, divergence=name, memory="minimal", backend="triton")
    losses["fdistill minimal"] = minimal
    losses["fdistill minimal, eight products"] = functools.partial(minimal, chunk_bytes=room)
    if not first:
        losses["fdistill minimal, all tiles"] = functools.partial(minimal, skip_tiles=False)
    return losses


def four_products(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> None:
    """The floor's products, nothing between them."""
    with torch.no_grad():
        logits = hidden.new_empty(min(PRODUCTS_ROWS, len(hidden)), len(weight))
        total = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for begin in range(0, len(hidden), PRODUCTS_ROWS):
            rows = slice(begin, begin + PRODUCTS_ROWS)
            here = logits[: len(hidden[rows])]
            products.logits_(teacher[rows], Head(teacher_weight), here)
            products.logits_(hidden[rows], Head(weight), here)
            products.hidden_gradient(here, weight, 1.0)
            products.add_weight_gradient_(here, hidden[rows], 1.0, 1.0 if begin else 0.0, total)


def gradient_error(name: str, hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> float:
    """Of the gradient in hidden.grad, on a few rows, from the float64 reference."""
    rows = few_rows(hidden)
    exact, head = hidden.detach()[rows].double().requires_grad_(), weight.detach().double()
    logits = teacher[rows].double() @ teacher_weight.double().T
    (wanted,) = torch.autograd.grad(f_divergence_rows(exact @ head.T, logits, name).sum(), exact)
    return error_of_mean(hidden.grad, rows, wanted)


def measure(name: str, loss: Loss, inputs: tuple[Tensor, ...], device: Device, floor: float,
            seconds: float) -> dict[str, Any]:  # fmt: skip
    """See `loss_measured`; memory above the gradients too."""
    hidden, weight, *_ = inputs

    def clear() -> None:
        hidden.grad = weight.grad = None

    def step() -> None:
        clear()
        loss(*inputs).backward()

    error = functools.partial(gradient_error, name, *inputs)
    found = loss_measured(step, clear, error, device, floor, seconds)
    return {**found, "peak_bytes": max(0, found["peak_bytes"] - hidden.nbytes - weight.nbytes)}


def main() -> None:
    """Measures, writes the file after each, and fails if one of ours did."""
    args = arguments(__doc__, ["ours", "peers"])
    device, ours, seconds = Device(args.dry), args.who == "ours", 0.02 if args.dry else 0.4
    if args.dry and ours:
        emulate()
    found_rates = rates(device)
    results = Results(args.out, device, **found_rates)
    for n, v, d_s, d_t in [(5, 130, 16, 24)] if args.dry else FIRST if args.first else FULL:
        floor = 2 * n * v * (3 * d_s + d_t) / found_rates["matrix_flop_per_second"]
        inputs = problem(n, v, d_s, d_t, device.type)
        shape = [n, v, d_s, d_t]
        if ours:
            alone = functools.partial(
                measured, functools.partial(four_products, *inputs), lambda: None, device, seconds
            )
            results.add(alone, ours, what="products", shape=shape)
        for name in ("js",) if args.first else ("js", "kl"):
            for what, loss in (
                our_losses(name, device, args.first, 4 * n * d_s + (64 << 20))
                if ours
                else running("linear", name, device.type)
            ).items():
                found = functools.partial(measure, name, loss, inputs, device, floor, seconds)
                results.add(found, ours, what=what, divergence=name, shape=shape)
                inputs[0].grad = inputs[1].grad = None
        del inputs
    raise SystemExit(results.failed)


if __name__ == "__main__":
    main()
