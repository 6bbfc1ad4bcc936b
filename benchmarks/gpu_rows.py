"""Row losses on a GPU, by a backend of ours or by the peers that are installed, beside the floor.

    python -m benchmarks.gpu_rows --who triton|cuda|teams|peers --out results.json [--first] [--dry]

The floor is three passes over N·V at the copy rate measured first; two for labels alone, which have no teacher. All
are held beside float64 on a few rows as they are measured: `gradient_error` is the difference's norm over the norm.
Models are independent, or `alike`, as a trained student's is to its teacher. --first takes the shapes and losses that
matter most; --dry toy shapes, Triton in its interpreter and CUDA emulated. `teams` is Triton's kernel with a row to
several programs at once, which no call takes yet: of 2 to 16, two and three programs a multiprocessor.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Device, Results, arguments, error_of_mean, few_rows, loss_measured, rates
from benchmarks.peers import Loss, ours, running
from fdistill_kernels.backends import BACKENDS, cuda
from fdistill_kernels.backends.triton import launch
from fdistill_kernels.bench import make_logits, training_step
from fdistill_kernels.reference import f_divergence_rows

LARGE, ODD, SMALL = (8192, 128256), (8192, 50257), (8192, 32000)
MORE = [(4096, 32000), (8192, 151936), (8192, 262144)]
FIRST = {"js": [LARGE, SMALL, ODD], "kl": [LARGE, SMALL], "tvd": [LARGE, SMALL], "labels": [LARGE]}
FULL = {"js": [LARGE, SMALL, ODD, *MORE], "kl": [LARGE, SMALL, ODD, *MORE], "tvd": [LARGE, SMALL, ODD, *MORE],
        "labels": [LARGE, SMALL, ODD, *MORE], "rkl": [LARGE, SMALL], "engine": [LARGE], "skew_kl": [LARGE],
        "tail_aware": [LARGE]}  # fmt: skip
TEAMS = {"js": [LARGE], "kl": [LARGE, SMALL], "tvd": [LARGE], "labels": [LARGE]}
PEERS_TOO = (LARGE, SMALL, ODD)
#: Of ours also with a teacher that a trained student has come near to: rows about p = q take other formulas.
ALIKE_TOO, NOISE = ("js", "kl", "tvd"), 0.4


def gradient_error(name: str, student: Tensor, teacher: Tensor) -> float:
    """Of the gradient in student.grad, on a few rows, from the float64 reference."""
    rows = few_rows(student)
    exact = student.detach()[rows].double().requires_grad_()
    if name == "labels":
        loss = torch.nn.functional.cross_entropy(exact, teacher[rows], reduction="sum")
    else:
        loss = f_divergence_rows(exact, teacher[rows].double(), name).sum()
    return error_of_mean(student.grad, rows, torch.autograd.grad(loss, exact)[0])


def measure(name: str, loss: Loss, student: Tensor, teacher: Tensor, device: Device, floor: float,
            seconds: float) -> dict[str, Any]:  # fmt: skip
    """See `loss_measured`."""

    def clear() -> None:
        student.grad = None

    error = functools.partial(gradient_error, name, student, teacher)
    return loss_measured(training_step(loss, student, teacher), clear, error, device, floor, seconds)


def emulate() -> None:
    """The CUDA kernels on the CPU, as the tests have them."""
    from tests.conftest import emulated_library

    cuda.LIBRARY = emulated_library()


def teams(loss: Loss, rows: int, device: Device) -> dict[str, Loss]:
    """The loss by launches of teams."""
    card, found = launch.device_of(torch.device(device.type)), {}

    def by(chosen: launch.Launch, *models: Tensor) -> Tensor:
        with launch.forced(chosen):
            return loss(*models)

    for members, programs in itertools.product((2, 4, 8, 12, 16), (2, 3)):
        count = max(1, min(rows, programs * card.processors // members))
        chosen = launch.Launch(2048, 8, count, members, launch.registers_of(card, 8, programs), together=True)
        found[f"fdistill triton, teams of {members}, {programs} a multiprocessor"] = functools.partial(by, chosen)
    return found


def main() -> None:
    """Measures, writes the file after each, and fails if one of ours did."""
    args = arguments(__doc__, ["triton", "cuda", "teams", "peers"])
    device, is_ours, seconds = Device(args.dry), args.who != "peers", 0.02 if args.dry else 0.3
    backend = "triton" if args.who == "teams" else args.who
    if args.dry and args.who == "cuda":
        emulate()
    if is_ours and (reason := BACKENDS[backend].why_not(torch.device(device.type), torch.bfloat16, None)):
        raise SystemExit(f"the {backend} backend does not run: {reason}")
    alike_too = ALIKE_TOO if is_ours and args.who != "teams" else ()
    measured_first = rates(device)
    results = Results(args.out, device, **measured_first)
    for name, shapes in (TEAMS if args.who == "teams" else FIRST if args.first else FULL).items():
        for shape, alike in itertools.product([(2, 500)] if args.dry else shapes, (False, True)):
            if not (is_ours or args.dry or shape in PEERS_TOO) or (alike and name not in alike_too):
                continue
            student, teacher = make_logits(shape, torch.bfloat16, device.type)
            if alike:
                teacher = student.detach() + NOISE * torch.randn_like(student)
            if name == "labels":
                teacher = torch.arange(shape[0], device=device.type) % shape[1]
            floor = (2 if name == "labels" else 3) * student.nbytes / measured_first["copy_bytes_per_second"]
            mine = {f"fdistill {backend}": ours("rows", name, backend=backend)}
            if args.who == "teams":  # beside the launch that calls take
                mine |= teams(*mine.values(), shape[0], device)
            losses = mine if is_ours else running("rows", name, device.type)
            for what, loss in losses.items():
                found = functools.partial(measure, name, loss, student, teacher, device, floor, seconds)
                results.add(found, is_ours, what=what, divergence=name, shape=list(shape), alike=alike)
                student.grad = None
            del student, teacher
    raise SystemExit(results.failed)


if __name__ == "__main__":
    main()
