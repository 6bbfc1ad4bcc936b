"""What every loss shares: arguments of tokens checked and made rows, reductions, and gradients handed back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks
from .backends.rows import TokenTerms
from .divergences import Divergence

Temperature = float | Tensor
#: Temperatures whose square and inverse float32 holds.
TEMPERATURES = (1e-18, 1e18)


class LossParts(NamedTuple):
    """What a loss is made of, reduced like it, detached: loss = divergence + ce_weight·cross_entropy + z_loss.

    ``tokens`` is the number of unmasked tokens, a 0-dim tensor.
    """

    divergence: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    tokens: Tensor


def token_loss(
    student: Tensor, run: Callable[[TokenTerms, str], tuple[Tensor, Tensor]], divergence: Divergence | None,
    vocabulary: int, *,
    labels: Tensor | None, labels_name: str = "labels", ce_weight: float = 0.0, label_smoothing: float = 0.0,
    z_loss: float = 0.0, class_weight: Tensor | None = None, ignore_index: int = -100,
    token_weight: Tensor | None = None, temperature: Temperature = 1.0, teacher_temperature: Temperature | None = None,
    temperature_squared: bool = False, divergence_weight: Tensor | None = None, reduction: str = "mean",
    num_items: float | Tensor | None = None, backend: str = "auto", return_parts: bool = False,
) -> Any:  # fmt: skip
    """The loss of the tokens of `student`, (..., V) logits or (..., D) hidden states, as `f_divergence` describes it.

    ``run(terms, backend)`` gives the loss, summed or of each row, and the parts (3, rows). divergence_weight: (...) a
    factor on each token's divergence alone.
    """
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        raise NotImplementedError(
            "torch.func transforms (vmap, grad) do not reach into the fused losses; batch by leading dimensions, "
            "differentiate with torch.autograd"
        )
    for name, flag in (("temperature_squared", temperature_squared), ("return_parts", return_parts)):
        checks.check_flag(name, flag)
    checks.check_number("ce_weight", ce_weight)
    checks.check_number("label_smoothing", label_smoothing, 0, 1)
    checks.check_number("z_loss", z_loss, 0)
    checks.check_integer("ignore_index", ignore_index)
    if (ce_weight or z_loss) and labels is None:
        raise ValueError("ce_weight and z_loss need labels")
    if divergence is not None and label_smoothing and not ce_weight:
        raise ValueError("label_smoothing is of the labels' cross-entropy: give ce_weight")
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        checks.check_temperature(name, value, student, *TEMPERATURES)
    checks.check_reduction(reduction)
    if labels is not None:
        checks.check_labels(labels, student, labels_name)
    if token_weight is not None:
        checks.check_tokens("token_weight", token_weight, student)
    backend = backends.choose(backend, student.device, student.dtype, divergence, vocabulary)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    shape = student.shape[:-1]
    ones = torch.ones(shape, dtype=dtype, device=student.device).reshape(-1)

    def per_token(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor) and value.dim():
            return value.to(dtype).reshape(-1)
        return ones * value  # a float that changes each step stays an input of a compiled graph

    mask = ones > 0
    if labels is not None:
        labels = labels.reshape(-1).long()
        mask = labels != ignore_index
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # with its name; the operator asks too
            backends.check_label_range(labels, mask, vocabulary, labels_name)
    tokens = mask.sum()
    denominator = _denominator(reduction, num_items, tokens, student)
    if class_weight is not None and labels is not None and reduction == "mean" and num_items is None:
        class_weight = class_weight.to(dtype)
        class_weight = class_weight * _over_target_weights(class_weight, labels, mask, tokens)
    row_scale = torch.where(mask, (ones if token_weight is None else per_token(token_weight)) / denominator, 0)
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        checks.check_temperature_of(name, value, row_scale != 0, *TEMPERATURES)
    t = per_token(temperature)
    divergence_scale = t * t if temperature_squared else ones
    if divergence_weight is not None:
        divergence_scale = divergence_scale * per_token(divergence_weight)
    has_label_terms = labels is not None and bool(ce_weight or z_loss)
    terms = TokenTerms(
        row_scale, 1 / t, 1 / per_token(teacher_temperature), divergence_scale, per_token(ce_weight),
        per_token(z_loss), labels if has_label_terms else None,
        None if class_weight is None else class_weight.to(dtype).contiguous(),
        divergence.key if divergence is not None and divergence.kernel else divergence, float(label_smoothing),
    )  # fmt: skip
    loss, parts = run(terms, backend)
    if reduction == "none":
        loss = loss.reshape(shape)
    if not return_parts:
        return loss
    reduced = parts.reshape(3, *shape) if reduction == "none" else parts.sum(1)
    return loss, LossParts(reduced[0], reduced[1], z_loss * reduced[2], tokens)


def _denominator(reduction: str, num_items: float | Tensor | None, tokens: Tensor, student: Tensor) -> float | Tensor:
    """What each token's loss is divided by."""
    if num_items is not None:
        return checks.checked_items(num_items, reduction, tokens)
    if reduction in ("sum", "none"):
        return 1.0
    if reduction == "batchmean":
        return max(1, student.shape[0]) if student.dim() > 1 else 1
    return tokens.clamp_min(1)


def _over_target_weights(class_weight: Tensor, labels: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """What makes a mean over tokens, as the z-loss is, a mean over the targets' class weights, as the cross-entropy is.

    Targets that all weigh 0 give 0, as no targets do: a batch without a live label must not poison the weights.
    """
    known = labels.clamp(0, class_weight.shape[0] - 1)
    of_targets = torch.where(mask, class_weight[known], 0)
    return tokens / torch.where((of_targets == 0).all(), 1, of_targets.sum())


def of_parts(parts: Tensor, terms: TokenTerms) -> Tensor:
    """Each row's loss (N,) of its parts (3, N)."""
    if terms.labels is None:
        return parts[0].clone()  # a view of the parts could not be changed in place
    scales = terms.cross_entropy_scale, terms.z_loss_scale
    of_labels = (torch.where(s == 0, 0, s * part) for s, part in zip(scales, parts[1:], strict=True))  # not 0·inf
    return parts[0] + sum(of_labels)


def is_power_of_two(factor: Tensor) -> bool:
    """Whether to multiply by it rounds nothing."""
    return bool(((torch.frexp(factor).mantissa.abs() == 0.5) | (factor == 0)).all())


def graph_is_kept() -> bool:
    """Whether the running backward pass leaves the graph for another one (retain_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def once(gradient: Tensor) -> Tensor:
    """The gradient; under create_graph=True one that raises when it is differentiated in turn."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    message = b"fdistill_kernels: the fused losses have no second derivative (double backward)"
    return torch._C._functions.DelayedError(message, 1)(gradient.detach().requires_grad_())


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient·factor, in place unless the graph is kept, to make no second N×V; nothing is done for a factor of 1.

    gradient: (outer, inner, V); factor: (outer, inner, 1).
    """
    if torch.compiler.is_compiling() or graph_is_kept():
        return (gradient * factor).to(gradient.dtype)
    if factor.device.type == "cpu" and bool((factor == 1).all()):
        return gradient
    if gradient.is_cuda and backends.triton.why_not(gradient.device, gradient.dtype, None) is None:
        backends.triton.scale_(gradient, factor)
        torch.autograd.graph.increment_version(gradient)  # as mul_ does: a second backward must not see it
        return gradient
    return gradient.mul_(factor)
