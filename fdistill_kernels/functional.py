"""The public functions: arguments in, a differentiable loss out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks
from .divergences import Divergence, resolve

Temperature = float | Tensor


class LossParts(NamedTuple):
    """What a loss is made of, reduced like it, detached: loss = divergence + ce_weight·cross_entropy + z_loss.

    ``tokens`` is the number of unmasked tokens, a 0-dim tensor.
    """

    divergence: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    tokens: Tensor


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
    if (ce_weight or z_loss) and labels is None:
        raise ValueError("ce_weight and z_loss need labels")
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        _check_temperature(name, value, student)
    if inplace and not torch.compiler.is_compiling() and _share_memory(student, teacher):
        raise ValueError("inplace=True would overwrite teacher_logits, which share memory with student_logits")
    return _loss(
        student, teacher, chosen, labels=labels, ce_weight=ce_weight, label_smoothing=label_smoothing, z_loss=z_loss,
        class_weight=None, ignore_index=ignore_index, token_weight=token_weight, temperature=temperature,
        teacher_temperature=temperature if teacher_temperature is None else teacher_temperature,
        temperature_squared=temperature_squared, reduction=reduction, num_items=num_items, inplace=inplace,
        backend=backend, return_parts=return_parts,
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
    if weight is not None:
        if weight.shape != logits.shape[-1:]:
            raise ValueError(f"weight must have shape ({logits.shape[-1]},), not {tuple(weight.shape)}")
        if weight.requires_grad or weight.device != logits.device or not weight.is_floating_point():
            raise ValueError("weight must be floating point, on the logits' device, and not require grad")
    return _loss(
        logits, None, None, labels=target, ce_weight=1.0, label_smoothing=label_smoothing, z_loss=z_loss,
        class_weight=weight, ignore_index=ignore_index, token_weight=None, temperature=1.0, teacher_temperature=1.0,
        temperature_squared=False, reduction=reduction, num_items=num_items, inplace=inplace, backend=backend,
        return_parts=return_parts,
    )  # fmt: skip


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _check_temperature(name: str, value: Temperature | None, logits: Tensor) -> None:
    if isinstance(value, Tensor):
        checks.check_tokens(name, value, logits)
        if not torch.compiler.is_compiling() and value.device.type == "cpu" and not (value > 0).all():
            raise ValueError(f"{name} must be positive in every token")
    elif value is not None:
        checks.check_number(name, value, 0, open_low=True)


def _loss(
    student: Tensor, teacher: Tensor | None, divergence: Divergence | None, *, labels: Tensor | None, ce_weight: float,
    label_smoothing: float, z_loss: float, class_weight: Tensor | None, ignore_index: int,
    token_weight: Tensor | None, temperature: Temperature, teacher_temperature: Temperature,
    temperature_squared: bool, reduction: str, num_items: float | Tensor | None, inplace: bool, backend: str,
    return_parts: bool,
) -> Any:  # fmt: skip
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        raise NotImplementedError(
            "torch.func transforms (vmap, grad) do not reach into the fused losses; batch by leading dimensions, "
            "differentiate with torch.autograd"
        )
    checks.check_reduction(reduction, num_items)
    checks.check_number("label_smoothing", label_smoothing, 0, 1)
    checks.check_number("z_loss", z_loss, 0)
    if labels is not None:
        checks.check_labels(labels, student)
    if token_weight is not None:
        checks.check_tokens("token_weight", token_weight, student)
    name = backends.choose(backend, student.device, student.dtype, divergence)
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
    loss, parts = _RowLoss.apply(
        _rows(student, inplace), None if teacher is None else _rows(teacher), row_scale, 1 / t,
        1 / per_token(teacher_temperature), t * t if temperature_squared else torch.ones_like(t),
        labels if has_label_terms else None, None if class_weight is None else class_weight.to(dtype).contiguous(),
        divergence.name if divergence else "", divergence.parameter if divergence else 0.0, float(ce_weight),
        float(label_smoothing), float(z_loss), name, inplace, reduction == "none",
    )  # fmt: skip
    if divided_late:
        loss, parts = loss / denominator, parts / denominator
    if reduction == "none":
        loss = loss.reshape(shape)
    if not return_parts:
        return loss
    reduced = parts.reshape(3, *shape) if reduction == "none" else parts.sum(1)
    return loss, LossParts(reduced[0], reduced[1], z_loss * reduced[2], tokens)


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
                gradients[i] = _once(_scaled(ctx, gradient, upstream.detach()))
        return (*gradients, *[None] * 14)


def _once(gradient: Tensor) -> Tensor:
    """The gradient; under create_graph=True one that raises when it is differentiated in turn."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    message = b"fdistill_kernels: the fused losses have no second derivative (double backward)"
    return torch._C._functions.DelayedError(message, 1)(gradient.detach().requires_grad_())


def _scaled(ctx: Any, gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient·upstream. Nothing is done for an upstream of 1, the usual; else in place, to make no second N×V."""
    factor = upstream.view(*gradient.shape[:2], 1) if ctx.per_row else upstream
    if torch.compiler.is_compiling():
        return gradient * factor.to(gradient.dtype)
    if factor.device.type == "cpu" and bool((factor == 1).all()):
        return gradient
    if gradient.is_cuda and backends.triton.why_not(gradient.device, gradient.dtype, None) is None:
        backends.triton.scale_(gradient, factor)
        torch.autograd.graph.increment_version(gradient)  # as mul_ does: a second backward must not see it
        return gradient
    return gradient.mul_(factor)
