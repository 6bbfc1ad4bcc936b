"""How many digits a loss and its gradients keep: float32 logits against float64, where rows are hard.

The truth is the torch backend in float64, whose formulas keep all but a few of its digits in every case (a test holds
them against 60-digit arithmetic). An error of a gradient is relative to its row's largest entry, that of a loss to the
loss; rows whose float32 loss or gradient is beyond float32 are left out.
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
#: Largest errors of the loss and of both gradients.
TOLERANCES = (1e-4, 2e-5, 2e-5)


def _one_hot(logits: Tensor, rest: float, at: int = 5) -> Tensor:
    """Rows with all but `rest` of their mass at one entry."""
    logits = logits.clone()
    logits[:, at] = logits.logsumexp(1) - math.log(rest)
    return logits


def cases(vocabulary: int, seed: int = 0) -> Iterator[tuple[str, Pair]]:
    """Student's and teacher's logits (ROWS, V): independent ones of growing scale, almost one-hot rows, near models."""
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
    """Worst errors of a case, of the loss and both gradients: ours, and eager PyTorch's."""

    divergence: str
    case: str
    ours: tuple[float, float, float]
    eager: tuple[float, float, float]

    @property
    def ok(self) -> bool:
        """Within `TOLERANCES`."""
        return all(error <= most for error, most in zip(self.ours, TOLERANCES, strict=True))


def results(rows: RowsFunction, logits: Pair) -> tuple[Tensor, ...]:
    """Losses (n), and gradients (n, V) of both models, in float64."""
    leaves = [x.detach().requires_grad_() for x in logits]
    losses = rows(*leaves)
    return tuple(x.detach().double() for x in (losses, *torch.autograd.grad(losses.sum(), leaves)))


def errors(rows: RowsFunction, truth: tuple[Tensor, ...], logits: Pair) -> tuple[float, float, float]:
    """Worst errors of losses and gradients over the rows whose truth float32 holds."""
    found = []
    for got, exact in zip(results(rows, logits), truth, strict=True):
        size = exact.abs().reshape(len(exact), -1).amax(1)
        held = (truth[0].abs() < 1e30) & (size < 1e30) & (size > 0)
        distance = (got - exact).abs().reshape(len(exact), -1).amax(1)
        found.append(float((distance / size)[held].nan_to_num(math.inf).max()) if held.any() else 0.0)
    return found[0], found[1], found[2]


def precision(divergence: Divergence, device: str, backend: str, vocabulary: int) -> Iterator[Precision]:
    """The errors in every case, on a device."""
    for name, (student, teacher) in cases(vocabulary):
        logits = student.to(device), teacher.to(device)
        labels = example_labels(divergence, logits[0])

        def ours(s: Tensor, t: Tensor, backend: str = backend, labels: Tensor | None = labels) -> Tensor:
            return f_divergence(s, t, divergence, labels=labels, reduction="none", backend=backend)

        truth = results(lambda s, t: ours(s, t, "torch"), (logits[0].double(), logits[1].double()))
        eager = errors(functools.partial(f_divergence_rows, divergence=divergence, labels=labels), truth, logits)
        yield Precision(str(divergence), name, errors(ours, truth, logits), eager)
