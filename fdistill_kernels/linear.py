"""Losses from hidden states: projection and divergence in chunks of rows, without ever holding N×V.

A chunk's logits are made in a buffer, the row kernel leaves their gradient in their place, and two more products take
it to the hidden states and the weight. The loss is the end of the graph, so all of it happens in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, products
from .backends.rows import RowCall
from .divergences import Divergence, by_key, resolve
from .tokens import Temperature, once, scaled, token_loss

#: Bytes of the chunk's logits, both models together: what keeps a CPU's products near their full speed.
CPU_CHUNK_BYTES = 55_000_000
#: The most that is taken of a GPU; a quarter of its free memory if that is less.
GPU_CHUNK_BYTES = 512_000_000

Teacher = Tensor | Callable[[int, int], Tensor] | None


def linear_f_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Callable[[int, int], Tensor],
    teacher_weight: Tensor | None = None,
    divergence: str | Divergence | Callable[[Tensor], Tensor] = "js",
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float | None = None,
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
    chunk_bytes: int | None = None,
    backend: str = "auto",
    return_parts: bool = False,
) -> Any:
    """`f_divergence` of the logits ``logit_scale·hidden weightᵀ + bias`` of both models, which are never held at once.

    Args:
        student_hidden: (..., D_s), float32, bfloat16 or float16 (float64 on the torch backend).
        student_weight, student_bias: the student's head, (V, D_s) and (V), in the hidden states' dtype. A head that
            does not require grad costs no product for its gradient.
        teacher_hidden: (..., D_t) with `teacher_weight`; or without it the teacher's logits (..., V), or a function
            ``(begin, end) -> logits (end − begin, V)`` of a range of the flattened rows.
        teacher_weight, teacher_bias: the teacher's head, (V, D_t) and (V), in its hidden states' dtype; may be the
            student's own. The teacher gets no gradient from here.
        logit_scale, teacher_logit_scale: a factor on hidden weightᵀ (Cohere, Granite); the teacher's defaults to the
            student's.
        vocab_size: use only the first rows of both heads, where they are padded differently.
        chunk_bytes: what the chunk's logits of both models may take together. Default: 55 MB on a CPU; 512 MB on a GPU,
            or a quarter of its free memory if that is less.
        The rest: as in `f_divergence`.

    Returns:
        As `f_divergence`. The weight's gradient is accumulated in float32 over the chunks, and handed over by the first
        backward pass: a second one through a retained graph raises. ``reduction="none"`` computes the chunks again in
        the backward pass, since each row's upstream gradient is not known before.

    Raises:
        ValueError, TypeError: as `f_divergence`; heads that are not plain tensors (LoRA, quantised, sharded).

    Source: Wen et al., ACL 2023, eq. (4)-(11), for the loss.
    """
    heads = _heads(student_hidden, student_weight, student_bias, "student", vocab_size)
    chosen = resolve(divergence)
    student_hidden, student_weight, student_bias = heads
    teacher, teacher_weight, teacher_bias = _teacher(
        teacher_hidden, teacher_weight, teacher_bias, student_hidden, student_weight.shape[0], vocab_size
    )
    return _linear(
        student_hidden, student_weight, student_bias, teacher, teacher_weight, teacher_bias, logit_scale,
        logit_scale if teacher_logit_scale is None else teacher_logit_scale, chosen, chunk_bytes, labels=labels,
        ce_weight=ce_weight, label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index,
        token_weight=token_weight, temperature=temperature, teacher_temperature=teacher_temperature,
        temperature_squared=temperature_squared, reduction=reduction, num_items=num_items, backend=backend,
        return_parts=return_parts,
    )  # fmt: skip


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    return_parts: bool = False,
) -> Any:
    """`cross_entropy` of the logits ``logit_scale·input linear_weightᵀ + linear_bias``, which are never held at once.

    Args:
        input: hidden states (..., D).
        linear_weight, linear_bias: the head, (V, D) and (V).
        target: class indices (...), in [0, V) or `ignore_index`.
        weight: (V) a factor on each class.
        The rest: as in `linear_f_divergence` and `cross_entropy`.

    Raises:
        ValueError, TypeError: as `linear_f_divergence`.
    """
    input, linear_weight, linear_bias = _heads(input, linear_weight, linear_bias, "linear", vocab_size)
    checks.check_labels(target, input, "target")
    checks.check_class_weight(weight, linear_weight.shape[0], input.device)
    return _linear(
        input, linear_weight, linear_bias, None, None, None, logit_scale, 1.0, None, chunk_bytes, labels=target,
        ce_weight=1.0, label_smoothing=label_smoothing, z_loss=z_loss, class_weight=weight, ignore_index=ignore_index,
        reduction=reduction, num_items=num_items, backend=backend, return_parts=return_parts,
    )  # fmt: skip


def _heads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, whose: str, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    checks.check_hidden(f"{whose}_hidden", hidden)
    weight, bias = checks.check_head(whose, weight, bias, hidden, vocab_size)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise TypeError(f"{whose}_hidden is {hidden.dtype} but {whose}_weight {weight.dtype}; cast one of them")
    return hidden, weight, bias


def _teacher(
    teacher: Any, weight: Tensor | None, bias: Tensor | None, student: Tensor, vocabulary: int, vocab_size: int | None
) -> tuple[Teacher, Tensor | None, Tensor | None]:
    """The teacher as rows of hidden states, rows of logits, or a function of a range of rows."""
    if isinstance(teacher, Tensor):
        if teacher.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "teacher_hidden requires grad, but linear_f_divergence trains the student alone; detach it, or give "
                "both models' logits to f_divergence"
            )
        if teacher.shape[:-1] != student.shape[:-1] or teacher.device != student.device:
            raise ValueError(
                f"teacher_hidden must have student_hidden's leading shape {tuple(student.shape[:-1])} on "
                f"{student.device}, not {tuple(teacher.shape[:-1])} on {teacher.device}"
            )
    elif not callable(teacher):
        raise TypeError(
            f"teacher_hidden must be a tensor or a function of a range of rows, not {type(teacher).__name__}"
        )
    if weight is None:
        if bias is not None:
            raise ValueError("teacher_bias needs teacher_weight")
        if isinstance(teacher, Tensor):
            teacher = checks.shared_vocabulary("teacher_hidden", teacher, vocab_size)
            checks.check_logits("teacher_hidden", teacher)
            checks.check_vocabularies(vocabulary, teacher.shape[-1])
            return teacher.detach().reshape(-1, vocabulary), None, None
        return teacher, None, None
    if not isinstance(teacher, Tensor):
        raise TypeError("teacher_weight is for hidden states; a function gives logits itself")
    teacher, weight, bias = _heads(teacher, weight, bias, "teacher", vocab_size)
    checks.check_vocabularies(vocabulary, weight.shape[0])
    return teacher.detach().reshape(-1, teacher.shape[-1]), weight.detach(), None if bias is None else bias.detach()


def _linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, teacher_weight: Tensor | None,
    teacher_bias: Tensor | None, logit_scale: float, teacher_logit_scale: float, divergence: Divergence | None,
    chunk_bytes: int | None, **token_arguments: Any,
) -> Any:  # fmt: skip
    rows = hidden.numel() // hidden.shape[-1]
    step = _chunk_rows(rows, weight, teacher is not None, chunk_bytes)

    def run(row_arguments: tuple[Any, ...], name: str) -> tuple[Tensor, Tensor]:
        return _LinearLoss.apply(
            hidden.reshape(rows, -1), weight, bias, teacher, teacher_weight, teacher_bias, float(logit_scale),
            float(teacher_logit_scale), step, name, token_arguments["reduction"] == "none", *row_arguments,
        )  # fmt: skip

    return token_loss(hidden, run, divergence, **token_arguments)


def _chunk_rows(rows: int, weight: Tensor, two_models: bool, chunk_bytes: int | None) -> int:
    """Rows of a chunk: as many as the budget holds, in whole tiles of the matrix product."""
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES
        if weight.is_cuda:
            chunk_bytes = min(GPU_CHUNK_BYTES, torch.cuda.mem_get_info(weight.device)[0] // 4)
    elif chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be positive, not {chunk_bytes!r}")
    most = max(1, chunk_bytes // ((2 if two_models else 1) * weight.shape[0] * weight.element_size()))
    tile = 128 if weight.is_cuda else 16
    return min(rows, most // tile * tile or most)


def _in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, teacher_weight: Tensor | None,
    teacher_bias: Tensor | None, logit_scale: float, teacher_logit_scale: float, step: int, backend: str,
    row_scale: Tensor, student_rate: Tensor, teacher_rate: Tensor, divergence_scale: Tensor, labels: Tensor | None,
    class_weight: Tensor | None, divergence: str, parameter: float, ce_weight: float, label_smoothing: float,
    z_loss: float, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Parts (3, N), and the gradients of hidden states, weight and bias; one not wanted is empty."""
    backends.check_label_range(labels, row_scale, weight.shape[0])
    wide = row_scale.dtype
    gradients = want_hidden or want_weight or want_bias
    parts = torch.zeros(3, hidden.shape[0], dtype=wide, device=hidden.device)
    of_hidden = torch.zeros_like(hidden) if want_hidden else hidden.new_empty(0)
    of_weight = products.empty(row_scale, *(weight.shape if want_weight else (0,)))
    of_bias = torch.zeros(weight.shape[:1] if want_bias else (0,), dtype=wide, device=hidden.device)
    chosen = by_key(divergence, parameter) if divergence else None
    live = None if callable(teacher) else _live_rows(row_scale, labels)
    count = hidden.shape[0] if live is None else len(live)
    step = min(step, max(1, count))
    student_buffer = products.empty(hidden, step, weight.shape[0])
    teacher_buffer = products.empty(hidden, step, weight.shape[0]) if teacher is not None else None
    if not count:
        of_weight.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, count, step):
            end = min(begin + step, count)
            rows = slice(begin, end) if live is None else live[begin:end]
            n = end - begin
            logits = student_buffer[:n]
            products.logits_(hidden[rows], weight, bias, logit_scale, logits)
            teacher_logits = None
            if teacher_buffer is not None:
                teacher_logits = teacher_buffer[:n]
                if callable(teacher):
                    teacher_logits.copy_(checks.check_chunk(teacher(begin, end), teacher_logits))
                elif teacher_weight is None:
                    teacher_logits.copy_(teacher[rows])  # type: ignore[index]
                else:
                    states = teacher[rows]  # type: ignore[index]
                    products.logits_(states, teacher_weight, teacher_bias, teacher_logit_scale, teacher_logits)
                teacher_logits = teacher_logits.unsqueeze(0)
            call = RowCall(
                logits.unsqueeze(0), teacher_logits, row_scale[rows], student_rate[rows], teacher_rate[rows],
                divergence_scale[rows], None if labels is None else labels[rows], class_weight, chosen, ce_weight,
                label_smoothing, z_loss, gradients, False, inplace=gradients,
            )  # fmt: skip
            parts[:, rows] = backends.BACKENDS[backend].divergence_rows(call)[0]
            if want_hidden:
                of_hidden[rows] = products.hidden_gradient(logits, weight, logit_scale)
            if want_weight:
                keep = 1.0 if begin else 0.0
                products.add_weight_gradient_(logits, hidden[rows], logit_scale, keep, of_weight)
            if want_bias:
                of_bias += logits.sum(0, dtype=wide)
    return parts, of_hidden, of_weight.to(weight.dtype), of_bias.to(weight.dtype)


def _live_rows(row_scale: Tensor, labels: Tensor | None) -> Tensor | None:
    """Indices of the rows that count, or None for all; a GPU is asked only where labels may have masked some."""
    if row_scale.is_cuda and (labels is None or torch.cuda.is_current_stream_capturing()):
        return None
    live = row_scale.nonzero().squeeze(1)
    return None if len(live) == len(row_scale) else live


@torch.library.custom_op("fdistill_kernels::linear_rows", mutates_args=())
def linear_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor | None, teacher_weight: Tensor | None,
    teacher_bias: Tensor | None, logit_scale: float, teacher_logit_scale: float, step: int, backend: str,
    row_scale: Tensor, student_rate: Tensor, teacher_rate: Tensor, divergence_scale: Tensor, labels: Tensor | None,
    class_weight: Tensor | None, divergence: str, parameter: float, ce_weight: float, label_smoothing: float,
    z_loss: float, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `_in_chunks`; teachers that are functions go there directly."""
    return _in_chunks(
        hidden, weight, bias, teacher, teacher_weight, teacher_bias, logit_scale, teacher_logit_scale, step, backend,
        row_scale, student_rate, teacher_rate, divergence_scale, labels, class_weight, divergence, parameter, ce_weight,
        label_smoothing, z_loss, want_hidden, want_weight, want_bias,
    )  # fmt: skip


@linear_rows.register_fake
def _(hidden, weight, *args):  # type: ignore[no-untyped-def]
    row_scale, (want_hidden, want_weight, want_bias) = args[8], args[-3:]
    return (
        row_scale.new_empty(3, hidden.shape[0]),
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,)),
        weight.new_empty(weight.shape[:1] if want_bias else (0,)),
    )


class _LinearLoss(torch.autograd.Function):
    """Gradients are made in the forward pass; where each row has its own upstream gradient, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, *args: Any) -> Any:
        teacher_weight, teacher_bias, scale, teacher_scale, step, name, per_row, *row_arguments = args
        call: Any = _in_chunks if callable(teacher) else linear_rows
        fixed = (teacher_weight, teacher_bias, scale, teacher_scale, step, name)
        wants = [not per_row and ctx.needs_input_grad[i] for i in range(3)]
        detached: list[Any] = [x if x is None else x.detach() for x in (hidden, weight, bias)]
        parts, *gradients = call(*detached, teacher, *fixed, *row_arguments, *wants)
        ctx.per_row = per_row
        if per_row:
            ctx.save_for_backward(hidden, weight, bias)
            ctx.again = (call, teacher, fixed, row_arguments)
        elif torch.compiler.is_compiling():
            ctx.save_for_backward(*gradients)
        else:  # kept so that nothing else holds them in the backward pass: a leaf then takes them without a copy
            ctx.gradients = gradients
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        rows = parts[0]
        for factor, part in ((row_arguments[-3], parts[1]), (row_arguments[-1], parts[2])):
            rows = rows + factor * part if factor else rows  # 0 times an infinite part is not NaN
        return (rows if per_row else rows.sum()), parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        results: list[Tensor | None] = [None, None, None]
        wants = ctx.needs_input_grad[:3]
        if upstream is not None and ctx.per_row:
            call, teacher, fixed, (row_scale, *row_arguments) = ctx.again
            scale = row_scale * upstream.detach()
            detached: list[Any] = [x if x is None else x.detach() for x in ctx.saved_tensors]
            _, *gradients = call(*detached, teacher, *fixed, scale, *row_arguments, *wants)
            results = [once(g) if want else None for g, want in zip(gradients, wants, strict=True)]
        elif upstream is not None:
            gradients = _handed_over(ctx)
            for i in range(3):
                gradient, gradients[i] = gradients[i], None
                if wants[i]:
                    flat = scaled(gradient.view(1, -1, gradient.shape[-1]), upstream.detach())
                    results[i] = flat.view(gradient.shape) if torch.compiler.is_compiling() else once(gradient)
        return (*results, *[None] * (len(ctx.needs_input_grad) - 3))


def _handed_over(ctx: Any) -> list[Any]:
    """The gradients, out of the graph's hands."""
    if torch.compiler.is_compiling():
        return list(ctx.saved_tensors)
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise RuntimeError("the linear losses hand their gradients over once: no second backward pass")
    return gradients
