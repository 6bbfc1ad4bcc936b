"""What every loss shares: terms checked and made numbers of each row, reductions, and gradients handed back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .backends.rows import TokenTerms
from .divergences import Divergence
from .values import LossParts, LossTerms, Metrics

#: Temperatures whose square and inverse float32 holds.
TEMPERATURES = (1e-18, 1e18)


def checked_terms(terms: LossTerms, student: Tensor, vocabulary: int, labels_name: str = "labels") -> None:
    """The terms fit the tokens of `student`, (..., V) logits or (..., D) hidden states.

    Raises:
        ValueError, TypeError: one does not, by its name.
    """
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        raise NotImplementedError(
            "torch.func transforms (vmap, grad) do not reach into the fused losses; batch by leading dimensions, "
            "differentiate with torch.autograd"
        )
    checks.check_flag("temperature_squared", terms.temperature_squared)
    checks.check_number("ce_weight", terms.ce_weight)
    checks.check_number("label_smoothing", terms.label_smoothing, 0, 1)
    checks.check_number("z_loss", terms.z_loss, 0)
    checks.check_integer("ignore_index", terms.ignore_index)
    if (terms.ce_weight or terms.z_loss) and terms.labels is None:
        raise ValueError("ce_weight and z_loss need labels")
    if isinstance(terms.divergence, Divergence) and terms.divergence.needs_labels and terms.labels is None:
        raise ValueError(f"{terms.divergence} needs labels")
    if terms.divergence is not None and terms.label_smoothing and not terms.ce_weight:
        raise ValueError("label_smoothing is of the labels' cross-entropy: give ce_weight")
    checks.check_per_token("temperature", terms.temperature, student, *TEMPERATURES)
    checks.check_per_token("teacher_temperature", _teacher_temperature(terms), student, *TEMPERATURES)
    checks.check_reduction(terms.reduction)
    checks.check_class_weight(terms.class_weight, vocabulary, student.device)
    if terms.labels is not None:
        checks.check_labels(terms.labels, student, labels_name)
        # with its name; the operator asks too
        if terms.labels.device.type == "cpu" and not torch.compiler.is_compiling():
            labels = terms.labels.reshape(-1).long()
            backends.check_label_range(labels, labels != terms.ignore_index, vocabulary, labels_name)
    if terms.token_weight is not None:
        checks.check_tokens("token_weight", terms.token_weight, student)
    checks.check_per_token("divergence_weight", terms.divergence_weight, student)


def token_terms(terms: LossTerms, student: Tensor, metrics: bool = False) -> tuple[TokenTerms, Tensor]:
    """The terms as numbers of each row, and the number of tokens that count.

    Raises:
        ValueError: a denominator or a temperature of a token that counts is out of range.
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    ones = torch.ones(student.shape[:-1], dtype=dtype, device=student.device).reshape(-1)

    def per_token(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor) and value.dim():
            return value.to(dtype).reshape(-1)
        return ones * value  # a float that changes each step stays an input of a compiled graph

    mask, labels = ones > 0, None
    if terms.labels is not None:
        labels = terms.labels.reshape(-1).long()
        mask = labels != terms.ignore_index
    tokens = mask.sum()
    share = ones if terms.token_weight is None else per_token(terms.token_weight)
    row_scale = torch.where(mask, share / _denominator(terms, tokens, student), 0)
    for name, value in (("temperature", terms.temperature), ("teacher_temperature", _teacher_temperature(terms))):
        checks.check_temperature_of(name, value, row_scale != 0, *TEMPERATURES)
    t, weight = per_token(terms.temperature), per_token(terms.divergence_weight)
    divergence, class_weight = divergence_of(terms), terms.class_weight
    needed = divergence is not None and divergence.needs_labels
    if class_weight is not None:
        class_weight = class_weight.to(dtype).contiguous()
        if labels is not None and terms.reduction == "mean" and terms.num_items is None:
            class_weight = class_weight * _over_target_weights(class_weight, labels, mask, tokens)
    return TokenTerms(
        row_scale=row_scale,
        student_inverse_temperature=1 / t,
        teacher_inverse_temperature=1 / per_token(_teacher_temperature(terms)),
        divergence_scale=weight * t * t if terms.temperature_squared else weight,
        cross_entropy_scale=per_token(terms.ce_weight),
        z_loss_scale=per_token(terms.z_loss),
        labels=labels if terms.ce_weight or terms.z_loss or metrics or needed else None,
        class_weight=class_weight,
        divergence=divergence.key if divergence is not None and divergence.kernel else divergence,
        label_smoothing=float(terms.label_smoothing),
        metrics=metrics,
    ), tokens


def divergence_of(terms: LossTerms) -> Divergence | None:
    """The divergence of checked terms."""
    assert terms.divergence is None or isinstance(terms.divergence, Divergence)
    return terms.divergence


def _teacher_temperature(terms: LossTerms) -> float | Tensor:
    return terms.temperature if terms.teacher_temperature is None else terms.teacher_temperature


def _denominator(terms: LossTerms, tokens: Tensor, student: Tensor) -> float | Tensor:
    """What each token's loss is divided by."""
    if terms.num_items is not None:
        return checks.checked_items(terms.num_items, terms.reduction, tokens)
    if terms.reduction in ("sum", "none"):
        return 1.0
    if terms.reduction == "batchmean":
        return max(1, student.shape[0]) if student.dim() > 1 else 1
    return tokens.clamp_min(1)


def _over_target_weights(class_weight: Tensor, labels: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """What makes a mean over tokens, as the z-loss is, a mean over the targets' class weights, as the cross-entropy is.

    Targets that all weigh 0 give 0, as no targets do: a batch without a live label must not poison the weights.
    """
    known = labels.clamp(0, class_weight.shape[0] - 1)
    of_targets = torch.where(mask, class_weight[known], 0)
    return tokens / torch.where((of_targets == 0).all(), 1, of_targets.sum())


def of_parts(parts: Tensor, terms: TokenTerms, per_row: bool) -> Tensor:
    """The loss of parts (3 or more, N), summed or of each row (N,)."""
    losses = parts[0]
    if terms.labels is not None:
        scales = terms.cross_entropy_scale, terms.z_loss_scale
        of_labels = (torch.where(s == 0, 0, s * part) for s, part in zip(scales, parts[1:3], strict=True))  # not 0·inf
        losses = losses + sum(of_labels)
    if not per_row:
        return losses.sum()
    return losses.clone() if terms.labels is None else losses  # a view of the parts could not be changed in place


def reduced(
    loss: Tensor, parts: Tensor, terms: LossTerms, tokens: Tensor, student: Tensor, return_parts: bool | str
) -> Any:
    """The loss in its tokens' shape where each has its own; with its parts (3 or more, N), reduced like it, if asked
    for.
    """
    per_token = terms.reduction == "none"
    if per_token:
        loss = loss.reshape(student.shape[:-1])
    if not return_parts:
        return loss
    parts = parts.reshape(len(parts), *student.shape[:-1]) if per_token else parts.sum(1)
    made_of = LossParts(parts[0], parts[1], terms.z_loss * parts[2], tokens)
    return loss, Metrics(*made_of, *parts[3:]) if return_parts == "metrics" else made_of


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
