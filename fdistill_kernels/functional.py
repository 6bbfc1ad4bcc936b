"""The public functions of logits: arguments in, a differentiable loss out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .divergences import Divergence, resolve
from .tokens import Temperature, once, scaled, token_loss


def f_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str | Divergence | Callable[[Tensor], Tensor] = "js",
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature | None = None,
    temperature_squared: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    backend: str = "auto",
    return_parts: bool = False,
) -> Any:
    """``Σ_v q_v f(p_v/q_v)`` of q = softmax(student/T) and p = softmax(teacher/T_t), token by token.

    Args:
        student_logits, teacher_logits: (..., V), any strides; float32, bfloat16, float16, or float64. Arithmetic is in
            float32 (float64 for float64). Either may require grad.
        divergence: a name (`fdistill list`), a `Divergence` such as ``Alpha(0.3)``, or a convex f(t) with f(1) = 0.
        labels: (...) integers in [0, V). A token whose label is `ignore_index` is left out of every term.
        ce_weight: weight of the cross-entropy to `labels`, at temperature 1, added to the divergence.
        label_smoothing: of that cross-entropy, in [0, 1], as in `torch.nn.functional.cross_entropy`.
        z_loss: weight of log_sum_exp(student_logits)², at temperature 1 (PaLM, Chowdhery et al. 2022); needs `labels`.
        token_weight: (...) a factor on each token's loss. It does not enter the denominator of the mean.
        temperature, teacher_temperature: > 0, a number or one a token (...). The teacher's defaults to the student's.
        temperature_squared: multiply the divergence by temperature² (Hinton et al. 2015).
        reduction: "mean" over unmasked tokens, "sum", "none" (...), or "batchmean" over the first dimension's size.
        num_items: the denominator instead, for "mean" and "batchmean" (gradient accumulation).
        vocab_size: compare only the first entries, where the models' vocabularies are padded differently.
        inplace: let the gradient overwrite `student_logits`, which then must not be used again.
        backend: "auto", or a backend's name (`fdistill doctor`).
        return_parts: also return `LossParts`.

    Returns:
        The float32 loss, () or (...); float64 for float64 logits. Tokens all masked: 0, with zero gradient. A
        divergence that is infinite is inf, and a token with a NaN logit is NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, ranges or names that do not fit, before any kernel starts.

    Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023, eq. (4)-(11).
    """
    chosen = resolve(divergence)
    student = checks.shared_vocabulary("student_logits", student_logits, vocab_size)
    teacher = checks.shared_vocabulary("teacher_logits", teacher_logits, vocab_size)
    checks.check_pair(student, teacher)
    if inplace and not torch.compiler.is_compiling() and _share_memory(student, teacher):
        raise ValueError("inplace=True would overwrite teacher_logits, which share memory with student_logits")

    def run(row_arguments: tuple[Any, ...], name: str) -> tuple[Tensor, Tensor]:
        rows = _rows(student, inplace), _rows(teacher)
        return _RowLoss.apply(*rows, *row_arguments, name, inplace, reduction == "none")

    return token_loss(
        student, run, chosen, student.shape[-1], labels=labels, ce_weight=ce_weight, label_smoothing=label_smoothing,
        z_loss=z_loss, ignore_index=ignore_index, token_weight=token_weight, temperature=temperature,
        teacher_temperature=teacher_temperature, temperature_squared=temperature_squared, reduction=reduction,
        num_items=num_items, backend=backend, return_parts=return_parts,
    )  # fmt: skip


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    return_parts: bool = False,
) -> Any:
    """`torch.nn.functional.cross_entropy` for class indices, fused, with z-loss.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...).
        target: class indices (), (N) or (N, d1, ...), in [0, C) or `ignore_index`.
        weight: (C) a factor on each class; "mean" divides by the targets' weights.
        size_average, reduce: deprecated in torch and refused here; use `reduction`.
        z_loss: weight of log_sum_exp(input)², added to each token's loss.
        num_items, inplace, backend, return_parts: as in `f_divergence`.

    Returns:
        The float32 loss; () or the target's shape. With every target ignored it is 0, where torch's mean is NaN.

    Raises:
        ValueError, TypeError: as in `f_divergence`; class probabilities as target are refused.
    """
    if size_average is not None or reduce is not None:
        raise ValueError("size_average and reduce are deprecated; use reduction='mean', 'sum' or 'none'")
    checks.check_logits("input", input)
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(
            f"target must be class indices, not {target.dtype} probabilities; for those, "
            "f_divergence(input, probabilities.log(), 'cross_entropy')"
        )
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    checks.check_labels(target, logits, "target")
    checks.check_class_weight(weight, logits.shape[-1], logits.device)

    def run(row_arguments: tuple[Any, ...], name: str) -> tuple[Tensor, Tensor]:
        return _RowLoss.apply(_rows(logits, inplace), None, *row_arguments, name, inplace, reduction == "none")

    return token_loss(
        logits, run, None, logits.shape[-1], labels=target, ce_weight=1.0, label_smoothing=label_smoothing,
        z_loss=z_loss, class_weight=weight, ignore_index=ignore_index, reduction=reduction, num_items=num_items,
        backend=backend, return_parts=return_parts,
    )  # fmt: skip


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _rows(logits: Tensor, inplace: bool = False) -> Tensor:
    """(..., V) as (outer, inner, V), dense in V; a view wherever strides allow, as for logits[:, :-1]."""
    shape = logits.shape if logits.dim() == 3 else (1, -1, logits.shape[-1])
    if logits.stride(-1) == 1 or logits.shape[-1] == 1:
        try:
            return logits.view(shape)
        except RuntimeError:  # leading dimensions that no single stride walks
            pass
    if inplace:
        raise ValueError(f"inplace=True needs student_logits of dense rows, not strides {logits.stride()}")
    return logits.contiguous().view(shape)


class _RowLoss(torch.autograd.Function):
    """The loss is the end of the graph, so its gradient is made in the forward pass, in the same kernel."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        *call, ce_weight, label_smoothing, z_loss, backend, inplace, per_row = args
        call = [*call, ce_weight, label_smoothing, z_loss]
        want_student, want_teacher = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        if inplace and want_student:
            parts, of_teacher = backends.divergence_rows_(student, teacher, *call, want_teacher, backend)
            of_student = student.detach()
        else:
            parts, of_student, of_teacher = backends.divergence_rows(
                student, teacher, *call, want_student, want_teacher, backend
            )
        ctx.save_for_backward(of_student, of_teacher)
        ctx.per_row = per_row
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        rows = parts[0]
        for weight, part in ((ce_weight, parts[1]), (z_loss, parts[2])):
            rows = rows + weight * part if weight else rows  # 0 times an infinite part is not NaN
        return (rows if per_row else rows.sum()), parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None, None]
        for i, gradient in enumerate(ctx.saved_tensors):
            if upstream is not None and ctx.needs_input_grad[i]:
                factor = upstream.detach().view(*gradient.shape[:2], 1) if ctx.per_row else upstream.detach()
                gradients[i] = once(scaled(gradient, factor))
        return (*gradients, *[None] * 14)
