"""The public functions of logits: arguments in, a differentiable loss out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .backends.rows import VECTORS, TokenTerms, cap_slope, capped, split
from .divergences import CROSS_ENTROPY, Divergence, FDivergence, resolve
from .tokens import LossParts, Temperature, is_power_of_two, of_parts, once, scaled, token_loss


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
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
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
            float32 (float64 for float64). Either may require grad. Where their dtypes differ both are widened first,
            which takes a copy, and each gradient is in its own.
        divergence: a name (`fdistill list`), a `Divergence` such as ``Alpha(0.3)``, or a convex f(t) with f(1) = 0.
        labels: (...) integers in [0, V). A token whose label is `ignore_index` is left out of every term.
        ce_weight: weight of the cross-entropy to `labels`, at temperature 1, added to the divergence.
        label_smoothing: of that cross-entropy, in [0, 1], as in `torch.nn.functional.cross_entropy`.
        z_loss: weight of log_sum_exp(student_logits)², at temperature 1 (PaLM, Chowdhery et al. 2022); needs `labels`.
        token_weight: (...) a factor on each token's loss. It does not enter the denominator of the mean.
        temperature, teacher_temperature: in [1e-18, 1e18], a number, a 0-dim tensor or one a token (...). The
            teacher's defaults to the student's.
        temperature_squared: multiply the divergence by temperature² (Hinton et al. 2015).
        logit_softcap, teacher_logit_softcap: c > 0 makes each logit z c·tanh(z/c) first (Gemma 2, Gemma Team 2024,
            §2), for logits given without their cap; each model its own.
        reduction: "mean" over unmasked tokens, "sum", "none" (...), or "batchmean" over the first dimension's size (1
            for one vector of logits).
        num_items: the denominator instead, for "mean" and "batchmean" (gradient accumulation): a number or a tensor of
            one, on any device. 0 is for batches without a token that counts.
        vocab_size: compare only the first entries, where the models' vocabularies are padded differently.
        inplace: let the gradient overwrite `student_logits`, which then must not be used again. Rows that share memory,
            with each other or another argument, are refused. Where no gradient is wanted nothing is overwritten.
        backend: "auto", or a backend's name (`fdistill doctor`).
        return_parts: also return `LossParts`.

    Returns:
        The float32 loss, () or (...); float64 for float64 logits. Tokens all masked, or none: 0, with zero gradient. A
        divergence that is infinite is inf, and a token with a NaN logit is NaN. 16-bit gradients are rounded once, the
        upstream factor included: float16 ones are made in the backward pass alone; bfloat16 ones on a CPU again there,
        where the factor is not a power of two. The graph keeps the logits for it. With `inplace`, and for bfloat16 on a
        GPU or inside torch.compile, such a factor rounds a second time.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, ranges or names that do not fit, before any kernel starts.

    Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023, eq. (4)-(11).
    """
    chosen = resolve(divergence)
    student = checks.shared_vocabulary("student_logits", student_logits, vocab_size)
    teacher = checks.shared_vocabulary("teacher_logits", teacher_logits, vocab_size)
    checks.check_pair(student, teacher)
    checks.check_flag("inplace", inplace)
    if student.dtype != teacher.dtype:
        if inplace:
            raise ValueError(f"inplace=True needs logits of one dtype, not {student.dtype} and {teacher.dtype}")
        wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
        student, teacher = student.to(wide), teacher.to(wide)
    overwritten = inplace and student.requires_grad and torch.is_grad_enabled()
    if overwritten and not torch.compiler.is_compiling():
        given = dict(teacher_logits=teacher, labels=labels, token_weight=token_weight, temperature=temperature,
                     teacher_temperature=teacher_temperature, num_items=num_items)  # fmt: skip
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        checks.check_overwritten("student_logits", student, tensors)
    caps = softcaps(logit_softcap, teacher_logit_softcap)

    def run(terms: TokenTerms, name: str) -> tuple[Tensor, Tensor]:
        return _row_loss(student, teacher, terms, overwritten, reduction == "none", caps, name)

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
    token_weight: Tensor | None = None,
    logit_softcap: float | None = None,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    return_parts: bool = False,
) -> Any:
    """`torch.nn.functional.cross_entropy`, fused, with z-loss.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...).
        target: class indices (), (N) or (N, d1, ...), in [0, C) or `ignore_index`; or class probabilities of the
            input's shape, not negative, whose gradient is not made. Those are made logarithms first, in the wider
            dtype of both, which takes copies.
        weight: (C) a factor on each class. "mean" of class indices divides the cross-entropy by the targets' weights,
            and the z-loss by their number. Targets that all weigh 0 give 0, where torch's mean is NaN: they are a batch
            without a live target.
        size_average, reduce: deprecated in torch and refused here; use `reduction`.
        z_loss: weight of log_sum_exp(input)², added to each token's loss.
        token_weight: the target's shape of indices, a factor on each token's loss, not in the denominator.
        logit_softcap, num_items, inplace, backend, return_parts: as in `f_divergence`.

    Returns:
        The float32 loss; () or the shape of class indices. With every target ignored, or none, it is 0, where torch's
        mean is NaN.

    Raises:
        ValueError, TypeError: as in `f_divergence`.
    """
    if size_average is not None or reduce is not None:
        raise ValueError("size_average and reduce are deprecated; use reduction='mean', 'sum' or 'none'")
    checks.check_flag("inplace", inplace)
    logits = input.movedim(1, -1) if isinstance(input, Tensor) and input.dim() > 2 else input
    checks.check_logits("input", logits)
    shared: dict[str, Any] = dict(
        z_loss=z_loss, token_weight=token_weight, reduction=reduction, num_items=num_items, backend=backend,
        return_parts=return_parts,
    )  # fmt: skip
    checks.check_class_weight(weight, logits.shape[-1], logits.device)
    checks.check_tensor("target", target, floating=False)
    if target.is_floating_point():
        if inplace:
            raise ValueError("inplace=True is for class indices as target")
        probabilities = target.movedim(1, -1) if target.dim() > 2 else target
        teacher, mass = soft_targets(probabilities, logits, weight, ignore_index, label_smoothing)
        wide = logits.to(teacher.dtype)

        def run_soft(terms: TokenTerms, name: str) -> tuple[Tensor, Tensor]:
            return _row_loss(wide, teacher, terms, False, reduction == "none", softcaps(logit_softcap, None), name)

        return soft_loss(wide, run_soft, wide.shape[-1], mass, **shared)
    checks.check_labels(target, logits, "target")
    overwritten = inplace and logits.requires_grad and torch.is_grad_enabled()
    if overwritten and not torch.compiler.is_compiling():
        given = dict(target=target, weight=weight, token_weight=token_weight)
        checks.check_overwritten("input", logits, given)

    def run(terms: TokenTerms, name: str) -> tuple[Tensor, Tensor]:
        return _row_loss(logits, None, terms, overwritten, reduction == "none", softcaps(logit_softcap, None), name)

    return token_loss(
        logits, run, None, logits.shape[-1], labels=target, labels_name="target", ce_weight=1.0,
        label_smoothing=label_smoothing, class_weight=weight, ignore_index=ignore_index, **shared,
    )  # fmt: skip


def log_sum_exp(logits: Tensor, *, logit_softcap: float | None = None, backend: str = "auto") -> Tensor:
    """``log Σ_v exp z_v`` of logits (..., V), differentiable, as float32 (...): cross-entropy and the label's logit.

    Args:
        logits, logit_softcap, backend: as in `f_divergence`.
    """
    checks.check_logits("logits", logits)
    return _LogSumExp.apply(logits, softcaps(logit_softcap, None)[0], backend)


class _LogSumExp(torch.autograd.Function):
    """Its gradient is the softmax: made whole by the kernel, since that of a label's cross-entropy, which lacks a 1 at
    the label, has lost the last digits there.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cap: float, backend: str) -> Tensor:
        top = logits.argmax(-1)
        at_top = logits.gather(-1, top.unsqueeze(-1)).squeeze(-1).to(torch.promote_types(logits.dtype, torch.float32))

        def run(terms: TokenTerms, name: str) -> tuple[Tensor, Tensor]:
            return _row_loss(logits, None, terms, False, True, (cap, 0.0), name)

        _, parts = token_loss(logits, run, None, logits.shape[-1], labels=top, ce_weight=1.0, z_loss=1.0,
                              reduction="none", backend=backend, return_parts=True)  # fmt: skip
        at_top = capped(at_top, cap)
        value = torch.where(at_top == -torch.inf, at_top, parts.cross_entropy + at_top)
        of_kernel = parts.z_loss.sqrt().copysign(value)  # z_loss is its square
        # near 0 its sign is rounding; a copy of the value, which may be changed in place
        ctx.save_for_backward(logits, value.clone(), torch.where(value.abs() > 1e-4 * at_top.abs(), of_kernel, 0))
        ctx.call = cap, backend
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, value, lse = ctx.saved_tensors
        (cap, backend), scale, value, lse = ctx.call, upstream.reshape(-1), value.reshape(-1), lse.reshape(-1)
        flat = logits.detach().reshape(-1, logits.shape[-1])
        if torch.compiler.is_compiling():  # which makes one kernel of it
            return once(_scaled_softmax(flat, cap, value, scale).view(logits.shape)), None, None
        ones, labels = torch.ones_like(scale), torch.zeros_like(scale, dtype=torch.long)
        # 2 lse softmax is the kernel's gradient of lse^2
        terms = TokenTerms(scale, ones, ones, ones, 0 * ones, 0.5 / lse, labels, None, None, 0.0)
        rows = _rows(logits.detach())
        gradient = backends.divergence_rows(rows, None, terms, (True, False), False, (cap, 0.0), backend)[1]
        gradient, few = gradient.view(flat.shape), (lse == 0).nonzero().squeeze(1)
        if len(few):  # as of normalised logits
            gradient[few] = _scaled_softmax(flat[few], cap, value[few], scale[few])
        return once(gradient.view(logits.shape)), None, None


def _scaled_softmax(logits: Tensor, cap: float, lse: Tensor, scale: Tensor) -> Tensor:
    """The softmax of rows of logits, capped or not, times each row's factor."""
    z = capped(logits.to(lse.dtype), cap)
    return ((z - lse.unsqueeze(1)).exp() * cap_slope(z, cap) * scale.unsqueeze(1)).to(logits.dtype)


def soft_targets(
    target: Tensor, logits: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Class probabilities as a teacher's logits (..., V), and each token's mass (...): ``−Σ w p log q`` is the mass
    times the cross-entropy to w p over the mass.
    """
    if target.shape != logits.shape or target.device != logits.device:
        raise ValueError(f"target of class probabilities must have the logits' shape {tuple(logits.shape)} on "
                         f"{logits.device}, not {tuple(target.shape)} on {target.device}")  # fmt: skip
    checks.check_tensor("target", target)
    checks.check_constant("target", target)
    checks.check_number("label_smoothing", label_smoothing, 0, 1)
    checks.check_integer("ignore_index", ignore_index)
    if ignore_index >= 0:
        raise ValueError("ignore_index is for class indices, and target holds class probabilities")
    if _known_negative(target):
        raise ValueError("target holds negative class probabilities")
    wide = torch.promote_types(torch.promote_types(target.dtype, logits.dtype), torch.float32)
    p = target.detach().to(wide)
    if label_smoothing:
        p = p * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
    if weight is not None and _known_negative(weight):
        raise ValueError("weight must not be negative where target holds class probabilities")
    p = p if weight is None else p * weight.to(wide)
    mass = p.sum(-1)
    return torch.where(mass.unsqueeze(-1) == 0, 0, p.log()), mass


def _known_negative(x: Tensor) -> bool:
    """Whether an entry is below 0; a GPU is not asked."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and bool((x < 0).any())


def soft_loss(
    student: Tensor, run: Any, vocabulary: int, mass: Tensor, *, z_loss: float, return_parts: bool, **keywords: Any
) -> Any:
    """The cross-entropy to `soft_targets`, which `run` compares with: a divergence by its kernel."""
    labels = torch.zeros(student.shape[:-1], dtype=torch.long, device=student.device)  # for the z-loss: all count
    loss, parts = token_loss(student, run, CROSS_ENTROPY, vocabulary, labels=labels, z_loss=z_loss,
                             divergence_weight=mass, return_parts=True, **keywords)  # fmt: skip
    parts = LossParts(torch.zeros_like(parts.divergence), parts.divergence, parts.z_loss, parts.tokens)
    return (loss, parts) if return_parts else loss


def softcaps(student: float | None, teacher: float | None) -> tuple[float, float]:
    """Both models' caps as kernels take them: 0 for none."""
    for name, cap in (("logit_softcap", student), ("teacher_logit_softcap", teacher)):
        if cap is not None:
            checks.check_number(name, cap, 0, open_low=True)
    return float(student or 0), float(teacher or 0)


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
    return logits.clone(memory_format=torch.contiguous_format).view(shape)  # of an empty one too


def _row_loss(
    student: Tensor, teacher: Tensor | None, terms: TokenTerms, inplace: bool, per_row: bool, caps: tuple[float, float],
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, summed or of each row, and the parts (3, N), of logits (..., V)."""
    if isinstance(terms.divergence, FDivergence) and torch.compiler.is_compiling():
        return _traced_loss(student, teacher, terms, per_row, caps, backend)
    rows = _rows(student, inplace), None if teacher is None else _rows(teacher)
    if torch.is_grad_enabled() and (student.requires_grad or (teacher is not None and teacher.requires_grad)):
        return _RowLoss.apply(*rows, per_row, inplace, caps, backend, *terms)
    parts, _, _ = backends.divergence_rows(*rows, terms, (False, False), False, caps, backend)
    losses = of_parts(parts, terms)
    return (losses if per_row else losses.sum()), parts


def _traced_loss(
    student: Tensor, teacher: Tensor | None, terms: TokenTerms, per_row: bool, caps: tuple[float, float], backend: str
) -> tuple[Tensor, Tensor]:
    """A user's generator inside a compiler: f itself is traced, so that the program needs no object beside it."""
    divergence, live = terms.divergence, terms.row_scale.unsqueeze(1) != 0
    assert isinstance(divergence, FDivergence) and teacher is not None

    def log_probabilities(logits: Tensor, cap: float, rate: Tensor) -> Tensor:
        z = torch.where(live, logits.reshape(-1, logits.shape[-1]).to(rate.dtype), 0)
        return (capped(z, cap) * rate.unsqueeze(1)).log_softmax(1)

    log_q = log_probabilities(student, caps[0], terms.student_inverse_temperature)
    log_p = log_probabilities(teacher, caps[1], terms.teacher_inverse_temperature)
    value = divergence.value(log_p.exp(), log_q.exp(), log_p, log_q).sum(1)
    losses = terms.row_scale * terms.divergence_scale * value
    parts = torch.stack([losses.detach(), torch.zeros_like(losses.detach()), torch.zeros_like(losses.detach())])
    if terms.labels is not None:
        alone = terms.replaced(divergence=None)
        of_labels, label_parts = _row_loss(student, None, alone, False, True, caps, backend)
        losses, parts = losses + of_labels, parts + label_parts
    return (losses if per_row else losses.sum()), parts


class _RowLoss(torch.autograd.Function):
    """The loss is the end of the graph, so its gradient is made in the forward pass, in the same kernel."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, per_row: bool, inplace: bool, caps: tuple[float, float],
        backend: str, *fields: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        terms, power = TokenTerms(*fields), None
        inplace = inplace and ctx.needs_input_grad[0]
        # what underflows in float16 no factor brings back: the gradient waits for a scaler's, or is made of a mantissa
        later = student.dtype == torch.float16 and not inplace
        if student.dtype == torch.float16 and inplace:
            mantissa, power = split(terms.row_scale)
            terms = terms.replaced(row_scale=mantissa)
        wants = (False, False) if later else ctx.needs_input_grad[:2]
        parts, of_student, of_teacher = backends.divergence_rows(student, teacher, terms, wants, inplace, caps, backend)
        if inplace:
            of_student = student.detach()
        if power is not None:
            parts = parts * power
        on_cpu = student.device.type == "cpu" and not torch.compiler.is_compiling()
        keep = later or (student.dtype == torch.bfloat16 and on_cpu and not inplace)
        kept = (student, teacher) if keep else (None, None)
        ctx.save_for_backward(of_student, of_teacher, power, *kept, *fields[: len(VECTORS)])
        ctx.later, ctx.rest, ctx.call = later, fields[len(VECTORS) :], (inplace, caps, backend)
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        losses = of_parts(parts, terms)
        return (losses if per_row else losses.sum()), parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing, wants = (None,) * (len(ctx.needs_input_grad) - 2), ctx.needs_input_grad[:2]
        if upstream is None:
            return (None, None, *nothing)
        of_student, of_teacher, power, student, teacher, row_scale, *vectors = ctx.saved_tensors
        upstream = upstream.detach()
        if ctx.later or (student is not None and not is_power_of_two(upstream)):
            teacher = None if teacher is None else teacher.detach()
            scale = torch.where(row_scale == 0, 0, row_scale * upstream)  # rounded once, the factor included
            terms = TokenTerms(scale, *vectors, *ctx.rest)
            _, *gradients = backends.divergence_rows(student.detach(), teacher, terms, wants, *ctx.call)
        else:
            factor = upstream if power is None else upstream * power
            factor = torch.where(row_scale == 0, 1, factor)  # a masked row's zeros stay, whatever comes for them
            factor = factor.view(*(of_student if of_student.dim() == 3 else of_teacher).shape[:2], 1)
            gradients = [scaled(g, factor) if want else g
                         for g, want in zip((of_student, of_teacher), wants, strict=True)]  # fmt: skip
        return (*(once(g) if want else None for g, want in zip(gradients, wants, strict=True)), *nothing)
