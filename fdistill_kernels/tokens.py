"""What every loss shares: arguments of tokens checked and made rows, reductions, and gradients handed back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks
from .divergences import Divergence

Temperature = float | Tensor


class LossParts(NamedTuple):
    """What a loss is made of, reduced like it, detached: loss = divergence + ce_weight·cross_entropy + z_loss.

    ``tokens`` is the number of unmasked tokens, a 0-dim tensor.
    """

    divergence: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    tokens: Tensor


def token_loss(
    student: Tensor, run: Callable[[tuple[Any, ...], str], tuple[Tensor, Tensor]], divergence: Divergence | None,
    vocabulary: int, *,
    labels: Tensor | None, ce_weight: float = 0.0, label_smoothing: float = 0.0, z_loss: float = 0.0,
    class_weight: Tensor | None = None, ignore_index: int = -100, token_weight: Tensor | None = None,
    temperature: Temperature = 1.0, teacher_temperature: Temperature | None = None, temperature_squared: bool = False,
    reduction: str = "mean", num_items: float | Tensor | None = None, backend: str = "auto",
    return_parts: bool = False,
) -> Any:  # fmt: skip
    """The loss of the tokens of `student`, (..., V) logits or (..., D) hidden states, as `f_divergence` describes it.

    ``run(row_arguments, backend)`` gives the loss, summed or of each row, and the parts (3, rows); `row_arguments` are
    the operators' from `row_scale` to `z_loss`.
    """
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        raise NotImplementedError(
            "torch.func transforms (vmap, grad) do not reach into the fused losses; batch by leading dimensions, "
            "differentiate with torch.autograd"
        )
    if (ce_weight or z_loss) and labels is None:
        raise ValueError("ce_weight and z_loss need labels")
    for argument, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        _check_temperature(argument, value, student)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    checks.check_reduction(reduction, num_items)
    checks.check_number("label_smoothing", label_smoothing, 0, 1)
    checks.check_number("z_loss", z_loss, 0)
    if labels is not None:
        checks.check_labels(labels, student)
    if token_weight is not None:
        checks.check_tokens("token_weight", token_weight, student)
    name = backends.choose(backend, student.device, student.dtype, divergence, vocabulary)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    shape = student.shape[:-1]

    def per_token(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(dtype).reshape(-1)
        return torch.full((shape.numel(),), value, dtype=dtype, device=student.device)

    mask = torch.ones(shape.numel(), dtype=torch.bool, device=student.device)
    if labels is not None:
        labels = labels.reshape(-1).long()
        mask = labels != ignore_index
    tokens = mask.sum()
    row_scale = torch.where(mask, per_token(1.0 if token_weight is None else token_weight), 0)
    denominator = _denominator(reduction, num_items, tokens, student, labels, mask, class_weight)
    # a float16 gradient divided in the kernel would underflow before a GradScaler's factor reaches it
    divided_late = student.dtype == torch.float16 and reduction not in ("sum", "none")
    if not divided_late:
        row_scale = row_scale / denominator
    t = per_token(temperature)
    has_label_terms = labels is not None and bool(ce_weight or z_loss)
    row_arguments = (
        row_scale, 1 / t, 1 / per_token(teacher_temperature), t * t if temperature_squared else torch.ones_like(t),
        labels if has_label_terms else None, None if class_weight is None else class_weight.to(dtype).contiguous(),
        divergence.name if divergence else "", divergence.parameter if divergence else 0.0, float(ce_weight),
        float(label_smoothing), float(z_loss),
    )  # fmt: skip
    loss, parts = run(row_arguments, name)
    if divided_late:
        loss, parts = loss / denominator, parts / denominator
    if reduction == "none":
        loss = loss.reshape(shape)
    if not return_parts:
        return loss
    reduced = parts.reshape(3, *shape) if reduction == "none" else parts.sum(1)
    return loss, LossParts(reduced[0], reduced[1], z_loss * reduced[2], tokens)


def _check_temperature(name: str, value: Temperature | None, logits: Tensor) -> None:
    if isinstance(value, Tensor):
        checks.check_tokens(name, value, logits)
        if not torch.compiler.is_compiling() and value.device.type == "cpu" and not (value > 0).all():
            raise ValueError(f"{name} must be positive in every token")
    elif value is not None:
        checks.check_number(name, value, 0, open_low=True)


def _denominator(
    reduction: str, num_items: float | Tensor | None, tokens: Tensor, student: Tensor, labels: Tensor | None,
    mask: Tensor, class_weight: Tensor | None,
) -> float | Tensor:  # fmt: skip
    if reduction in ("sum", "none"):
        return 1.0
    if num_items is not None:
        return num_items
    if reduction == "batchmean":
        return student.shape[0] if student.dim() > 1 else 1
    if class_weight is not None and labels is not None:
        total = torch.where(mask, class_weight[torch.where(mask, labels, 0)], 0).sum()
        return torch.where(total == 0, 1, total)
    return tokens.clamp_min(1)


def once(gradient: Tensor) -> Tensor:
    """The gradient; under create_graph=True one that raises when it is differentiated in turn."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    message = b"fdistill_kernels: the fused losses have no second derivative (double backward)"
    return torch._C._functions.DelayedError(message, 1)(gradient.detach().requires_grad_())


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient·factor. Nothing is done for a factor of 1, the usual; else in place, to make no second N×V.

    gradient: (outer, inner, V); factor: a number, or (outer, inner, 1).
    """
    if torch.compiler.is_compiling():
        return gradient * factor.to(gradient.dtype)
    if factor.device.type == "cpu" and bool((factor == 1).all()):
        return gradient
    if gradient.is_cuda and backends.triton.why_not(gradient.device, gradient.dtype, None) is None:
        backends.triton.scale_(gradient, factor)
        torch.autograd.graph.increment_version(gradient)  # as mul_ does: a second backward must not see it
        return gradient
    return gradient.mul_(factor)
