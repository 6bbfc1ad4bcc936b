"""Measures how many digits a loss and its gradients keep in numerically hard rows: float32 against float64.

The exact values come from the torch backend in float64, whose formulas keep nearly all digits in every case (a test
compares them with 60-digit arithmetic). The error of a gradient is relative to its row's largest entry, and that of a
loss to the loss. Rows whose loss or gradient overflows float32 are left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .divergences import Divergence
from .functional import f_divergence
from .reference import example_labels, f_divergence_rows

Pair = tuple[Tensor, Tensor]
RowsFunction = Callable[[Tensor, Tensor], Tensor]
ROWS = 4
#: The largest allowed errors of the loss, the student's gradient and the teacher's.
TOLERANCES = (1e-4, 2e-5, 2e-5)


def _one_hot(logits: Tensor, rest: float, at: int = 5) -> Tensor:
    """The logits (N, V), changed at one entry so that it has all but `rest` of the probability."""
    logits = logits.clone()
    logits[:, at] = logits.logsumexp(1) - math.log(rest)
    return logits


def cases(vocabulary: int, seed: int = 0) -> Iterator[tuple[str, Pair]]:
    """Yields the name of each case, and the logits (ROWS, V) of student and teacher.

    The cases are independent logits of growing scale, rows that are almost one-hot, and models that nearly agree.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn() -> Tensor:
        return torch.randn(ROWS, vocabulary, generator=generator)

    for scale in (0.01, 0.1, 1, 4, 8, 15, 30):
        yield f"randn·{scale:g}", (scale * randn(), scale * randn())
    student, teacher = randn(), randn()
    for rest in (1e-5, 1.5e-7):
        yield f"student's peak 1 − {rest:g}", (_one_hot(student, rest), teacher)
        yield f"teacher's peak 1 − {rest:g}", (student, _one_hot(teacher, rest))
        yield f"one peak 1 − {rest:g}", (_one_hot(student, rest), _one_hot(teacher, rest))
        yield f"two peaks 1 − {rest:g}", (_one_hot(student, rest), _one_hot(teacher, rest, at=7))
    for distance in (0.1, 0.01, 0.001, 0.0001):
        yield f"{distance:g} apart", (student, student + distance * teacher)


@dataclass(frozen=True)
class Precision:
    """The worst errors of one case, of the loss and both gradients: ours, and those of eager PyTorch."""

    divergence: str
    case: str
    ours: tuple[float, float, float]
    eager: tuple[float, float, float]

    @property
    def ok(self) -> bool:
        """Whether our errors are within `TOLERANCES`."""
        return all(error <= most for error, most in zip(self.ours, TOLERANCES, strict=True))


def results(rows: RowsFunction, logits: Pair) -> tuple[Tensor, ...]:
    """The losses (n,) and the gradients (n, V) to both models' logits, converted to float64."""
    leaves = [x.detach().requires_grad_() for x in logits]
    losses = rows(*leaves)
    return tuple(x.detach().double() for x in (losses, *torch.autograd.grad(losses.sum(), leaves)))


def errors(rows: RowsFunction, truth: tuple[Tensor, ...], logits: Pair) -> tuple[float, float, float]:
    """The worst errors of the losses and of both gradients, over the rows whose exact values fit into float32."""
    found = []
    for got, exact in zip(results(rows, logits), truth, strict=True):
        size = exact.abs().reshape(len(exact), -1).amax(1)
        held = (truth[0].abs() < 1e30) & (size < 1e30) & (size > 0)
        distance = (got - exact).abs().reshape(len(exact), -1).amax(1)
        found.append(float((distance / size)[held].nan_to_num(math.inf).max()) if held.any() else 0.0)
    return found[0], found[1], found[2]


def precision(divergence: Divergence, device: str, backend: str, vocabulary: int) -> Iterator[Precision]:
    """Yields the errors of a backend on a device, case by case."""
    for name, (student, teacher) in cases(vocabulary):
        logits = student.to(device), teacher.to(device)
        labels = example_labels(divergence, logits[0])

        def ours(s: Tensor, t: Tensor, backend: str = backend, labels: Tensor | None = labels) -> Tensor:
            return f_divergence(s, t, divergence, labels=labels, reduction="none", backend=backend)

        truth = results(lambda s, t: ours(s, t, "torch"), (logits[0].double(), logits[1].double()))
        eager = errors(functools.partial(f_divergence_rows, divergence=divergence, labels=labels), truth, logits)
        yield Precision(str(divergence), name, errors(ours, truth, logits), eager)
