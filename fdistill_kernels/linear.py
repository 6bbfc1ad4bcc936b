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
from .backends.rows import LinearCall, RowCall
from .divergences import Divergence, by_key, resolve
from .tokens import Temperature, once, scaled, token_loss

#: Bytes of the chunk's logits, both models together: what keeps a CPU's products near their full speed.
CPU_CHUNK_BYTES = 55_000_000
#: The most that is taken of a GPU; a quarter of its free memory if that is less.
GPU_CHUNK_BYTES = 512_000_000
#: A chunk of memory="minimal" where the Triton kernels of that path do not run.
MINIMAL_CHUNK_BYTES = 8_000_000

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
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
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
    memory: str = "chunks",
    skip_tiles: bool = True,
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
        logit_softcap, teacher_logit_softcap: c > 0 makes each logit z, scaled and biased, c·tanh(z/c) (Gemma 2, Gemma
            Team 2024, §2); each model its own, without one by default. Logits given as such are taken as they are.
        vocab_size: use only the first rows of both heads, where they are padded differently.
        memory: "chunks", or "minimal": on Triton the logits of both models stay on chip and are made again in the
            backward sweeps, for a memory of O(N) + 16 MB beyond the gradients and twice the products (`backends.triton.
            cut`); elsewhere chunks of 8 MB.
        skip_tiles: with memory="minimal", leave out of the gradient the tiles whose every probability, of both models,
            is below ε/V, ε the dtype's resolution. What a row's gradient by the logits loses has an L1 norm under 2ε
            times the row's weight. Divergences whose gradient has no such bound (rkl, jeffreys, engine, alpha) and
            smoothed labels skip nothing.
        chunk_bytes: what the chunk's logits of both models may take together. Default: 55 MB on a CPU; 512 MB on a GPU,
            or a quarter of its free memory if that is less (the last bits of the gradients then depend on it).
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
        logit_scale if teacher_logit_scale is None else teacher_logit_scale, logit_softcap, teacher_logit_softcap,
        chosen, memory, skip_tiles, chunk_bytes, labels=labels,
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
    logit_softcap: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    memory: str = "chunks",
    skip_tiles: bool = True,
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
        input, linear_weight, linear_bias, None, None, None, logit_scale, 1.0, logit_softcap, None, None, memory,
        skip_tiles, chunk_bytes, labels=target, ce_weight=1.0, label_smoothing=label_smoothing, z_loss=z_loss,
        class_weight=weight, ignore_index=ignore_index, reduction=reduction, num_items=num_items, backend=backend,
        return_parts=return_parts,
    )  # fmt: skip


def _heads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, whose: str, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    checks.check_hidden(f"{whose}_hidden", hidden)
    weight, bias = checks.check_head(whose, weight, bias, hidden, vocab_size)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight, bias  # the head is cast later, so that its gradient stays in its own dtype
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
    weight, bias = weight.detach().to(teacher.dtype), None if bias is None else bias.detach().to(teacher.dtype)
    return teacher.detach().reshape(-1, teacher.shape[-1]), weight, bias


def _linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, teacher_weight: Tensor | None,
    teacher_bias: Tensor | None, logit_scale: float, teacher_logit_scale: float, softcap: float | None,
    teacher_softcap: float | None, divergence: Divergence | None, memory: str,
    skip_tiles: bool, chunk_bytes: int | None, **token_arguments: Any,
) -> Any:  # fmt: skip
    rows = hidden.numel() // hidden.shape[-1]
    if memory not in ("chunks", "minimal"):
        raise ValueError(f"memory must be 'chunks' or 'minimal', not {memory!r}")
    if memory == "minimal" and teacher is not None and teacher_weight is None:
        raise ValueError("memory='minimal' makes the teacher's logits on chip: give teacher_hidden and teacher_weight")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be positive, not {chunk_bytes!r}")
    if memory == "minimal" and chunk_bytes is None:
        chunk_bytes = MINIMAL_CHUNK_BYTES
    for name, cap in (("logit_softcap", softcap), ("teacher_logit_softcap", teacher_softcap)):
        if cap is not None:
            checks.check_number(name, cap, 0, open_low=True)
    if teacher_softcap and teacher_weight is None:
        raise ValueError("teacher_logit_softcap needs teacher_weight: logits given as such are taken as they are")
    heads = (teacher_weight, teacher_bias, float(logit_scale), float(teacher_logit_scale), float(softcap or 0),
             float(teacher_softcap or 0))  # fmt: skip

    def run(row_arguments: tuple[Any, ...], name: str) -> tuple[Tensor, Tensor]:
        per_row = token_arguments["reduction"] == "none"
        path = memory == "minimal" and name in ("triton", "cuda"), skip_tiles, chunk_bytes or 0
        return _LinearLoss.apply(hidden.reshape(rows, -1), weight, bias, teacher, per_row, *heads, *path, name,
                                 *row_arguments)  # fmt: skip

    return token_loss(hidden, run, divergence, weight.shape[0], **token_arguments)


def _chunk_rows(call: LinearCall, chunk_bytes: int) -> int:
    """Rows of a chunk: as many as the budget (0: the default) holds, in whole tiles of the matrix product."""
    device = call.hidden.device
    if not chunk_bytes:
        chunk_bytes = CPU_CHUNK_BYTES
        if call.hidden.is_cuda:
            chunk_bytes = GPU_CHUNK_BYTES
            if not torch.cuda.is_current_stream_capturing():
                chunk_bytes = min(chunk_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    models = 1 if call.teacher is None else 2
    most = max(1, chunk_bytes // (models * call.weight.shape[0] * call.hidden.element_size()))
    tile = 128 if call.hidden.is_cuda else 16
    return most // tile * tile or most


def _in_chunks(call: LinearCall, chunk_bytes: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts (3, N), and the gradients of hidden states, weight and bias, one not wanted empty."""
    hidden, weight, teacher, labels = call.hidden, call.weight, call.teacher, call.labels
    wide = call.row_scale.dtype
    parts = torch.zeros(3, hidden.shape[0], dtype=wide, device=hidden.device)
    of_hidden = torch.zeros_like(hidden) if call.want_hidden else hidden.new_empty(0)
    of_weight = products.empty(call.row_scale, *(weight.shape if call.want_weight else (0,)))
    of_bias = torch.zeros(weight.shape[:1] if call.want_bias else (0,), dtype=wide, device=hidden.device)
    gradients = call.want_hidden or call.want_weight or call.want_bias
    live = None if callable(teacher) else _live_rows(call.row_scale, labels)
    count = hidden.shape[0] if live is None else len(live)
    step = min(_chunk_rows(call, chunk_bytes), max(1, count))
    student_buffer = products.empty(hidden, step, weight.shape[0])
    teacher_buffer = products.empty(hidden, step, weight.shape[0]) if teacher is not None else None
    if not count:
        of_weight.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, count, step):
            end = min(begin + step, count)
            rows = slice(begin, end) if live is None else live[begin:end]
            logits = student_buffer[: end - begin]
            products.logits_(hidden[rows], weight, call.bias, call.logit_scale, logits)
            teacher_logits = None
            if teacher_buffer is not None:
                teacher_logits = teacher_buffer[: end - begin]
                if callable(teacher):
                    teacher_logits.copy_(checks.check_chunk(teacher(begin, end), teacher_logits))
                elif call.teacher_weight is None:
                    teacher_logits.copy_(teacher[rows])  # type: ignore[index]
                else:
                    states = teacher[rows]  # type: ignore[index]
                    products.logits_(
                        states, call.teacher_weight, call.teacher_bias, call.teacher_logit_scale, teacher_logits
                    )
                teacher_logits = teacher_logits.unsqueeze(0)
            row_call = RowCall(
                logits.unsqueeze(0), teacher_logits, call.row_scale[rows], call.student_inverse_temperature[rows],
                call.teacher_inverse_temperature[rows], call.divergence_scale[rows],
                None if labels is None else labels[rows], call.class_weight, call.divergence,
                call.cross_entropy_weight, call.label_smoothing, call.z_loss, gradients, False, inplace=gradients,
                student_softcap=call.student_softcap, teacher_softcap=call.teacher_softcap,
            )  # fmt: skip
            parts[:, rows] = backends.BACKENDS[backend].divergence_rows(row_call)[0]
            if call.want_hidden:
                of_hidden[rows] = products.hidden_gradient(logits, weight, call.logit_scale)
            if call.want_weight:
                keep = 1.0 if begin else 0.0
                products.add_weight_gradient_(logits, hidden[rows], call.logit_scale, keep, of_weight)
            if call.want_bias:
                of_bias += logits.sum(0, dtype=wide)
    return parts, of_hidden, of_weight, of_bias


def _live_rows(row_scale: Tensor, labels: Tensor | None) -> Tensor | None:
    """Indices of the rows that count, or None for all; a GPU is asked only where labels may have masked some."""
    if row_scale.is_cuda and (labels is None or torch.cuda.is_current_stream_capturing()):
        return None
    live = row_scale.nonzero().squeeze(1)
    return None if len(live) == len(row_scale) else live


def _linear_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor | None, teacher_weight: Tensor | None,
    teacher_bias: Tensor | None, logit_scale: float, teacher_logit_scale: float, softcap: float, teacher_softcap: float,
    cut_path: bool, skip_tiles: bool, chunk_bytes: int, backend: str, row_scale: Tensor, student_rate: Tensor,
    teacher_rate: Tensor, divergence_scale: Tensor, labels: Tensor | None, class_weight: Tensor | None, divergence: str,
    parameter: float, ce_weight: float, label_smoothing: float, z_loss: float, want_hidden: bool, want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `LinearCall`, as plain arguments. A teacher that is a function can only be given outside the operator."""
    backends.check_label_range(labels, row_scale, weight.shape[0])
    call = LinearCall(
        hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype), teacher, teacher_weight,
        teacher_bias, logit_scale, teacher_logit_scale, softcap, teacher_softcap, row_scale, student_rate, teacher_rate,
        divergence_scale, labels, class_weight, by_key(divergence, parameter) if divergence else None, ce_weight,
        label_smoothing, z_loss, want_hidden, want_weight, want_bias,
    )  # fmt: skip
    if cut_path:
        from .backends.triton import cut

        parts, of_hidden, of_weight, of_bias = cut.linear_rows(call, skip_tiles)
    else:
        parts, of_hidden, of_weight, of_bias = _in_chunks(call, chunk_bytes, backend)
    return parts, of_hidden, of_weight.to(weight.dtype), of_bias.to(weight.dtype)


linear_rows = torch.library.custom_op("fdistill_kernels::linear_rows", _linear_rows, mutates_args=())


@linear_rows.register_fake
def _(hidden, weight, *args):  # type: ignore[no-untyped-def]
    row_scale, (want_hidden, want_weight, want_bias) = args[12], args[-3:]
    return (
        row_scale.new_empty(3, hidden.shape[0]),
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,)),
        weight.new_empty(weight.shape[:1] if want_bias else (0,)),
    )


#: `_LinearLoss`'s arguments after the teacher up to the backend's name: those of the heads and of the path.
FIXED = 11


class _LinearLoss(torch.autograd.Function):
    """Gradients are made in the forward pass; where each row has its own upstream gradient, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, *args: Any) -> Any:
        per_row, fixed, row_arguments = args[0], args[1:FIXED], args[FIXED:]
        call: Any = _linear_rows if callable(teacher) else linear_rows
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
