"""Losses of logits: rows of them through a backend, and autograd around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .backends.collectives import Collectives
from .backends.rows import NO_LIST, WHOLE, RowCall, Shard, Targets, TokenTerms, cap_slope, capped, split
from .backends.sharded import rows_at_once
from .carried import built, flat, keep, kept, replaced
from .divergences import KL, Divergence
from .own import FDivergence
from .tokens import Known, divergence_of, has_metrics, is_power_of_two, of_parts, once, reduced, scaled, token_terms
from .values import Logits, LossTerms


def loss_of_logits(
    student: Logits, teacher: Logits | None, terms: LossTerms, backend: str, return_parts: bool | str,
    inplace: bool = False, targets: Targets = NO_LIST, shard: Shard = WHOLE,
) -> Any:  # fmt: skip
    """The loss of logits (..., V) of one dtype, all of it checked; with its parts, if asked for."""
    values = student.values
    backend = backends.choose(backend, values.device, values.dtype, divergence_of(terms))
    of_rows, tokens, known = token_terms(terms, values, has_metrics(return_parts, targets))
    loss, parts = rows_loss(
        student, teacher, of_rows, backend, terms.reduction == "none", inplace, known, targets, shard
    )
    return reduced(loss, parts, terms, tokens, values, return_parts)


def rows_loss(
    student: Logits, teacher: Logits | None, terms: TokenTerms, backend: str, per_row: bool, inplace: bool = False,
    known: Known | None = None, targets: Targets = NO_LIST, shard: Shard = WHOLE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, summed or of each row, and the parts (3 or more, N)."""
    if isinstance(terms.divergence, Divergence) and checks.traced():
        generated = isinstance(terms.divergence, FDivergence)
        if generated and teacher is not None and not shard.group:
            return _traced_loss(student, teacher, terms, backend, per_row)
        if torch.compiler.is_dynamo_compiling() and (generated or backend != "torch"):
            return _outside_graphs(student, teacher, terms, backend, per_row, targets, shard)
        if backend != "torch" or (generated and torch.compiler.is_compiling()):
            checks.check_unrecorded("divergence, one of your own with a kernel or beside a list,")
    of_student, of_teacher, cap = _rows(student.values, inplace), None, None
    if teacher is not None:
        of_teacher, cap = _rows(teacher.values), teacher.softcap
    enabled = torch.is_grad_enabled()
    call = RowCall(
        of_student, of_teacher, terms, student.softcap, cap, enabled and of_student.requires_grad,
        enabled and of_teacher is not None and of_teacher.requires_grad, inplace, targets, shard,
    )  # fmt: skip
    if call.student_gradient or call.teacher_gradient:
        # a graph takes tensors alone, and plain values; autograd any object, which costs less than its 40 leaves
        leaves = flat(call) if torch.compiler.is_compiling() else (of_student, of_teacher, call)
        return _RowsLoss.apply(per_row, backend, known, *leaves)
    parts, _, _ = backends.divergence_rows(call, backend)
    return of_parts(parts, terms, per_row, known), parts


@checks.outside_graphs
def _outside_graphs(
    student: Logits, teacher: Logits | None, terms: TokenTerms, backend: str, per_row: bool, targets: Targets,
    shard: Shard,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A user's generator, which no graph holds, beside a list or over ranks, or a kernel of theirs; the labels no
    compiler has looked at.
    """
    vocabulary = shard.size if shard.group else student.values.shape[-1]
    backends.check_label_range(terms.labels, terms.row_scale, vocabulary)
    return rows_loss(student, teacher, terms, backend, per_row, targets=targets, shard=shard)


def _rows(logits: Tensor, inplace: bool = False) -> Tensor:
    """(..., V) as (outer, inner, V), dense in V; a view wherever strides allow, as for logits[:, :-1]."""
    shape = logits.shape if logits.dim() == 3 else (1, -1, logits.shape[-1])
    if (logits.stride(-1) == 1 or logits.shape[-1] == 1) and _one_stride(logits):
        return logits.view(shape)
    if inplace:
        raise ValueError(f"inplace=True needs student_logits of dense rows, not strides {logits.stride()}")
    return logits.clone(memory_format=torch.contiguous_format).view(shape)  # of an empty one too


def _one_stride(logits: Tensor) -> bool:
    """Whether one stride walks all rows; not asked by trying a view, whose error no compiler lets be caught, and of one
    leading dimension not asked at all, whose size may be of the data.
    """
    if logits.dim() <= 3:
        return True
    leading = [i for i in range(logits.dim() - 1) if logits.shape[i] != 1]
    steps = {i: logits.stride(i) for i in leading}
    followed = all(steps[leading[n - 1]] == logits.shape[i] * steps[i] for n, i in enumerate(leading) if n)
    return followed or not logits.numel()


def _traced_loss(
    student: Logits, teacher: Logits, terms: TokenTerms, backend: str, per_row: bool
) -> tuple[Tensor, Tensor]:
    """A user's generator inside a compiler: f itself is traced, so that the program needs no object beside it."""
    divergence, scale = terms.divergence, torch.where(terms.row_scale == 0, 0, terms.row_scale * terms.divergence_scale)
    live = scale.unsqueeze(1) != 0
    assert isinstance(divergence, FDivergence)

    def log_probabilities(logits: Logits, rate: Tensor) -> Tensor:
        z = torch.where(live, logits.values.reshape(-1, logits.values.shape[-1]).to(rate.dtype), 0)
        return (capped(z, logits.softcap) * rate.unsqueeze(1)).log_softmax(1)

    log_q = log_probabilities(student, terms.student_inverse_temperature)
    log_p = log_probabilities(teacher, terms.teacher_inverse_temperature)
    value = divergence.value(log_p.exp(), log_q.exp(), log_p, log_q).sum(1)
    losses = scale * value
    nothing = torch.zeros_like(losses.detach())
    parts = torch.stack([losses.detach(), nothing, nothing])
    if terms.metrics:
        still = Logits(student.values.detach(), student.softcap), Logits(teacher.values.detach(), teacher.softcap)
        _, beside = rows_loss(*still, replaced(terms, divergence=KL.key), "auto", True)
        parts = torch.cat([parts, beside[3:]])
    if terms.labels is not None:
        alone = replaced(terms, divergence=None, metrics=False)
        of_labels, label_parts = rows_loss(student, None, alone, backend, True)
        losses, parts = losses + of_labels, torch.cat([parts[:3] + label_parts, parts[3:]])
    return (losses if per_row else losses.sum()), parts


class _RowsLoss(torch.autograd.Function):
    """The loss is the end of the graph, so its gradient is made in the forward pass, in the same kernel.

    leaves: those of a `RowCall`, or its first two, which gradients are of, and itself.
    """

    @staticmethod
    def forward(ctx: Any, per_row: bool, backend: str, known: Known | None, *leaves: Any) -> tuple[Tensor, Tensor]:
        call = leaves[2] if isinstance(leaves[2], RowCall) else built(RowCall, leaves)
        student, inplace, later, power = call.student, call.inplace, False, None
        if student.dtype == torch.float16:
            # what underflows no factor brings back: the gradient waits for a scaler's, or is made of a mantissa
            later = not inplace
            if later:
                call = replaced(call, student_gradient=False, teacher_gradient=False)
            else:
                terms, power = split(call.terms)
                call = replaced(call, terms=terms)
        terms = call.terms
        parts, of_student, of_teacher = backends.divergence_rows(call, backend)
        if inplace:
            of_student = student.detach()
        if power is not None:
            parts = parts * power
        again = later or (student.dtype == torch.bfloat16 and not inplace and checks.readable(student))
        keep(ctx, (of_student, of_teacher, power, terms.row_scale, *(flat(call) if again else ())))
        ctx.later, ctx.again, ctx.backend, ctx.every_row = later, again, backend, known is not None and known.every_row
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return of_parts(parts, terms, per_row, known), parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        wants, others = ctx.needs_input_grad[3:5], [None] * (len(ctx.needs_input_grad) - 5)
        if upstream is None:
            return (None, None, None, None, None, *others)
        of_student, of_teacher, power, row_scale, *leaves = kept(ctx)
        upstream = once(upstream)
        if ctx.later or (ctx.again and not is_power_of_two(upstream)):
            call = built(RowCall, leaves)
            now = replaced(
                call, student=call.student.detach(), teacher=None if call.teacher is None else call.teacher.detach(),
                terms=call.terms.without_metrics(upstream),  # rounded once, the factor included
                student_gradient=wants[0], teacher_gradient=wants[1],
            )  # fmt: skip
            _, *gradients = backends.divergence_rows(now, ctx.backend)
        else:
            factor, masked = upstream if power is None else upstream * power, None if ctx.every_row else row_scale
            gradients = [scaled(g, factor, masked) if want else g
                         for g, want in zip((of_student, of_teacher), wants, strict=True)]  # fmt: skip
        student, teacher = (g if want else None for g, want in zip(gradients, wants, strict=True))
        return (None, None, None, student, teacher, *others)


def log_sum_exp_of(logits: Tensor, softcap: float | None, backend: str, shard: Shard = WHOLE) -> Tensor:
    """``log Σ_v exp z_v`` of logits (..., V), differentiable."""
    if shard.group:
        return torch.compiler.disable(_SplitLogSumExp.apply)(logits, softcap, shard)
    backend = backends.choose(backend, logits.device, logits.dtype, None)
    if not checks.needs_gradient(logits):  # no graph, which a transform of other tensors would not take
        return _log_sum_exp(logits.detach(), softcap, backend)[0]
    return _LogSumExp.apply(checks.in_graph(logits), softcap, backend)


class _SplitLogSumExp(torch.autograd.Function):
    """That of rows split over ranks, of which each sends that of its entries."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cap: float | None, shard: Shard) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        found = [torch.logsumexp(capped(z.to(wide), cap), 1, keepdim=True) for z in _in_pieces(logits)]
        wire = Collectives(shard.group)
        wire.agree(logits.device, None, dtype=str(logits.dtype), rows=logits[..., 0].numel())
        value = wire.gathered(torch.cat(found) if found else logits.new_empty(0, 1, dtype=wide)).logsumexp(0)[:, 0]
        ctx.save_for_backward(logits, value.clone())
        ctx.cap = cap
        return value.view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, value = ctx.saved_tensors
        scale, begin, pieces = once(upstream).reshape(-1), 0, []
        for z in _in_pieces(logits):
            some = slice(begin, begin := begin + len(z))
            pieces.append(_scaled_softmax(z, ctx.cap, scale[some], value[some]))
        return torch.cat(pieces).view(logits.shape) if pieces else torch.zeros_like(logits), None, None


def _in_pieces(logits: Tensor) -> tuple[Tensor, ...]:
    """(..., V) as rows, so many at a time that what is made of them stays small."""
    rows = logits.detach().reshape(-1, logits.shape[-1])
    return rows.split(rows_at_once(logits, logits.shape[-1])) if len(rows) else ()


def _log_sum_exp(logits: Tensor, cap: float | None, backend: str) -> tuple[Tensor, Tensor]:
    """The value, and as the kernel has it: 0 where its square, which is a z-loss, has lost it."""
    at_top, top = logits.max(-1)  # of 16 bits argmax takes eight times as long
    at_top = at_top.to(torch.promote_types(logits.dtype, torch.float32))
    terms = LossTerms(None, labels=top, ce_weight=1.0, z_loss=1.0, reduction="none")
    _, parts = loss_of_logits(Logits(logits, cap), None, terms, backend, True)
    at_top = capped(at_top, cap)
    value = torch.where(at_top.isinf(), at_top, parts.cross_entropy + at_top)
    of_kernel = parts.z_loss.sqrt().copysign(value)  # z_loss is its square
    size = value.abs()  # near 0 its sign is rounding; of the ends float32 does not hold the square
    held = (size > 1e-4 * at_top.abs()) & (size > 1e-18) & (size < 1e18)
    return value, torch.where(held, of_kernel, 0)


class _LogSumExp(torch.autograd.Function):
    """Its gradient is the softmax: made whole by the kernel, since that of a label's cross-entropy, which lacks a 1 at
    the label, has lost the last digits there.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cap: float | None, backend: str) -> Tensor:
        value, of_kernel = _log_sum_exp(logits, cap, backend)
        keep(ctx, (logits, of_kernel))
        ctx.call = cap, backend
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse = kept(ctx)
        (cap, backend), scale, lse = ctx.call, once(upstream).reshape(-1).contiguous(), lse.reshape(-1)
        flat_logits = logits.detach().reshape(-1, logits.shape[-1])
        if checks.imagined(logits):  # compilers make one kernel of it
            return _scaled_softmax(flat_logits, cap, scale).view(logits.shape), None, None
        ones, labels = torch.ones_like(scale), torch.zeros_like(scale, dtype=torch.long)
        # 2 lse softmax is the kernel's gradient of lse^2
        terms = TokenTerms(scale, ones, ones, ones, 0 * ones, 0.5 / lse, labels, None, None, 0.0)
        call = RowCall(_rows(logits.detach()), None, terms, cap, student_gradient=True)
        gradient = backends.divergence_rows(call, backend)[1].view(flat_logits.shape)
        few = (lse == 0).nonzero().squeeze(1)
        if len(few):  # as of normalised logits
            gradient[few] = _scaled_softmax(flat_logits[few], cap, scale[few])
        return gradient.view(logits.shape), None, None


def _scaled_softmax(logits: Tensor, cap: float | None, scale: Tensor, lse: Tensor | None = None) -> Tensor:
    """The softmax of rows of logits, capped or not, times each row's factor; by the lse of more than is here."""
    z = capped(logits.to(scale.dtype), cap)
    q = z.softmax(1) if lse is None else (z - lse.unsqueeze(1)).exp()
    return (q * cap_slope(z, cap) * scale.unsqueeze(1)).to(logits.dtype)
