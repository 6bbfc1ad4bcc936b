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
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence
from .functional import f_divergence
from .reference import example_labels, f_divergence_rows

Pair = tuple[Tensor, Tensor]
RowsFunction = Callable[[Tensor, Tensor], Tensor]
ROWS = 4
#: The largest allowed errors of the loss, the student's gradient and the teacher's; `EXCEPTIONS` has others.
TOLERANCES = (1e-4, 2e-5, 2e-5)
#: With fewer entries almost all of a row of large logits is below what float32 holds, and few digits are left of it.
LEAST_VOCABULARY = 1000


class Allowance(NamedTuple):
    """A larger error of gradients, of divergences by name in cases whose names contain one of some words."""

    names: tuple[str, ...]
    cases: tuple[str, ...]
    gradient: float
    backends: tuple[str, ...] = ("cpu", "torch", "triton", "cuda")


_SUMS = ("kl", "rkl", "engine", "cross_entropy")
#: What float32 cannot do better, with a margin of about 3 over the worst error that was found, at vocabularies from
#: 1000 to 128256. docs/precision.md names the exceptions.
EXCEPTIONS = (
    # q − p of near models is as small as a rounding of the sum of exponentials is beside 1e-4: half a unit is 6e-4
    Allowance((*_SUMS, "dkd"), ("0.0001 apart",), 1e-3),
    # the gradient jumps where p = q; float32 cannot tell the sign of a difference below a rounding
    Allowance(("tvd", "lk"), ("apart", "randn·0.01"), 3.0),
    # the last entry of the head is another one, if two are as near
    Allowance(("akl",), ("apart",), 0.1),
    # the peak's gradient is the sum of all others', as everywhere, and w falls short of it in the last digits
    Allowance(("akl",), ("peak",), 1e-4),
    # the peak's gradient is minus the sum of all others, which cancel more than a divergence's of one sum
    Allowance(("ab",), ("peak", "apart"), 4e-4),
    Allowance(("dkd", "csd"), ("peak",), 2e-4),
    Allowance(("dkd", "csd"), ("apart",), 1e-3),
    # the same, of a rest that is renormalised: its share of a one-hot row has few digits, fewer in large vocabularies
    Allowance(("tail_aware",), ("peak", "apart"), 5e-3),
    # on a GPU the sums of exponentials keep the 1 of their maximum (two equal rests beside one peak, and near models)
    Allowance((*_SUMS, "tvd"), ("one peak", "apart"), 1e-3, ("triton", "cuda")),
    Allowance(_SUMS, ("0.0001 apart",), 1e-2, ("triton", "cuda")),
    # in logits of scale 15 and 30 some have a sum just above 2e-5 there, with a thousand entries
    Allowance(("rkl", "engine", "entropy_gated", "skew_rkl"), ("randn·15", "randn·30"), 5e-5, ("triton", "cuda")),
)


def tolerances(divergence: Divergence, backend: str, case: str) -> tuple[float, float, float]:
    """The largest allowed errors of a divergence in a case, by a backend: `TOLERANCES`, or as `EXCEPTIONS` say."""
    loss, *gradients = TOLERANCES
    allowed = [e.gradient for e in EXCEPTIONS if divergence.name in e.names and backend in e.backends
               and any(words in case for words in e.cases)]  # fmt: skip
    student, teacher = (max(most, *allowed) if allowed else most for most in gradients)
    return loss, student, teacher


def _one_hot(logits: Tensor, rest: float, at: int = 5) -> Tensor:
    """The logits (N, V), changed at one entry so that it has all but `rest` of the probability."""
    logits = logits.clone()
    logits[:, at] = logits.logsumexp(1) - math.log(rest)
    return logits


def cases(vocabulary: int, seed: int = 0) -> Iterator[tuple[str, Pair]]:
    """Yields the name of each case, and the logits (ROWS, V) of student and teacher.

    The cases are independent logits of growing scale, rows that are almost one-hot, and models that nearly agree.

    Raises:
        ValueError: the vocabulary has less than 8 entries, of which two are peaks.
    """
    if vocabulary < 8:
        raise ValueError(f"the hard rows have at least 8 entries, not {vocabulary}")
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
        """Whether our errors are within `TOLERANCES`, which not all are: see `tolerances`."""
        return self.within(TOLERANCES)

    def within(self, limits: tuple[float, float, float]) -> bool:
        """Whether our errors are within limits, such as those of `tolerances`."""
        return all(error <= most for error, most in zip(self.ours, limits, strict=True))


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
    """Yields the errors of a backend on a device, case by case.

    Raises:
        ValueError: the vocabulary is smaller than `LEAST_VOCABULARY`.
    """
    if vocabulary < LEAST_VOCABULARY:
        raise ValueError(f"the limits are for rows of at least {LEAST_VOCABULARY} entries, not {vocabulary}")
    for name, (student, teacher) in cases(vocabulary):
        logits = student.to(device), teacher.to(device)
        labels = example_labels(divergence, logits[0])

        def ours(s: Tensor, t: Tensor, backend: str = backend, labels: Tensor | None = labels) -> Tensor:
            return f_divergence(s, t, divergence, labels=labels, reduction="none", backend=backend)

        truth = results(lambda s, t: ours(s, t, "torch"), (logits[0].double(), logits[1].double()))
        eager = errors(functools.partial(f_divergence_rows, divergence=divergence, labels=labels), truth, logits)
        yield Precision(str(divergence), name, errors(ours, truth, logits), eager)
