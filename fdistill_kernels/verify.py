"""`fdistill verify`: compares every backend that can run on this machine with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends
from .divergences import Divergence
from .functional import f_divergence
from .own import resolve
from .reference import example_labels, f_divergence_rows

#: The largest allowed errors of the loss and of the gradients, relative to the reference's largest entry. Gradients in
#: bfloat16 and float16 may be off by one rounding.
TOLERANCES = {
    torch.float64: (1e-11, 1e-11),
    torch.float32: (1e-5, 2e-5),
    torch.bfloat16: (1e-5, 2**-8),
    torch.float16: (1e-5, 2**-10),
}
#: What of a loss's difference is the reference's own: it sums numbers around 1 in float64, whose total may be 0.
ROUNDING = 2.0**-50


@dataclass(frozen=True)
class Outcome:
    """The result of one comparison. Errors are relative to the reference's largest entry."""

    backend: str
    divergence: str
    dtype: str
    loss_error: float
    student_gradient_error: float
    teacher_gradient_error: float
    loss_tolerance: float
    gradient_tolerance: float

    @property
    def ok(self) -> bool:
        """Whether all three errors are within their tolerances; NaN is not."""
        gradient_error = max(self.student_gradient_error, self.teacher_gradient_error)
        return self.loss_error <= self.loss_tolerance and gradient_error <= self.gradient_tolerance


def _error(value: Tensor, expected: Tensor, rounding: float = 0.0) -> float:
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    beyond = ((value.double() - expected).abs() - rounding).clamp_min(0)
    return float(beyond.nan_to_num(nan=torch.inf).max() / scale)


def verify(
    device: str, dtypes: Iterable[torch.dtype], shape: tuple[int, int],
    divergences: Iterable[str | Divergence | Callable[[Tensor], Tensor]], seed: int = 0,
) -> Iterator[Outcome]:  # fmt: skip
    """Compares the loss and both gradients of each divergence, dtype and backend, on random logits of a shape (N, V).

    Divergences are given as `f_divergence` takes them.

    Yields:
        An `Outcome` for each, as soon as it is known.

    Raises:
        ValueError: the shape has no rows, or no vocabulary.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"the shape (N, V) must have at least one row and one entry, not {tuple(shape)}")
    generator = torch.Generator().manual_seed(seed)
    student64, teacher64 = (1.5 * torch.randn(shape, generator=generator) for _ in range(2))
    for divergence in map(resolve, divergences):
        for dtype in dtypes:
            student, teacher = (x.to(device, dtype).requires_grad_() for x in (student64, teacher64))
            # the reference computes in float64, from the rounded logits that the kernel gets
            exact = [x.detach().double().requires_grad_() for x in (student, teacher)]
            labels = example_labels(divergence, student)
            expected = f_divergence_rows(exact[0], exact[1], divergence, labels=labels).mean()
            expected_gradients = torch.autograd.grad(expected, exact)
            for name, module in backends.BACKENDS.items():
                if module.why_not(student.device, dtype, divergence) is not None:
                    continue
                alone = f_divergence(student, teacher.detach(), divergence, labels=labels, backend=name)
                loss = f_divergence(student, teacher, divergence, labels=labels, backend=name)
                gradients = torch.autograd.grad(loss, (student, teacher))
                loss_tolerance, gradient_tolerance = TOLERANCES[dtype]
                if name == "triton" and student.device.type == "cpu" and dtype == torch.bfloat16:
                    gradient_tolerance *= 2  # Triton's interpreter truncates to bfloat16
                errors = [_error(g, e) for g, e in zip(gradients, expected_gradients, strict=True)]
                # a teacher without gradient, the usual case, may use another kernel
                errors[0] = max(errors[0], _error(torch.autograd.grad(alone, student)[0], expected_gradients[0]))
                loss_error = max(_error(x.detach(), expected.detach(), ROUNDING) for x in (loss, alone))
                yield Outcome(
                    name, str(divergence), str(dtype).removeprefix("torch."), loss_error, errors[0], errors[1],
                    loss_tolerance, gradient_tolerance,
                )  # fmt: skip
