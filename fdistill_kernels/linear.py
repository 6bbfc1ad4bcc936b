"""Losses from hidden states: projection and divergence in chunks of rows, without ever holding N×V.

A chunk's logits are made in a buffer, the row kernel leaves their gradient in their place, and two more products take
it to the hidden states and the weight. The loss is the end of the graph, so all of it happens in the forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, products
from .backends.rows import LinearCall, RowCall, TokenTerms, schema, split
from .divergences import CROSS_ENTROPY, Divergence, resolve
from .functional import soft_loss, soft_targets, softcaps
from .tokens import Temperature, graph_is_kept, of_parts, once, token_loss

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
        As `f_divergence`. Gradients are summed in float32 and rounded to the inputs' dtype in the backward pass, once,
        with the upstream factor. ``reduction="none"`` computes the chunks again in the backward pass, since each row's
        upstream gradient is not known before. Inside torch.compile a teacher that is a function, or a user's own
        divergence, breaks the graph.

    Raises:
        ValueError, TypeError: as `f_divergence`; heads that are not plain tensors (LoRA, quantised, sharded).

    Source: Wen et al., ACL 2023, eq. (4)-(11), for the loss.
    """
    heads = _heads(student_hidden, student_weight, student_bias, STUDENT, vocab_size)
    chosen = resolve(divergence)
    student_hidden, student_weight, student_bias = heads
    teacher, teacher_weight, teacher_bias = _teacher(
        teacher_hidden, teacher_weight, teacher_bias, student_hidden, student_weight.shape[0], vocab_size
    )
    checks.check_number("logit_scale", logit_scale)
    if teacher_logit_scale is not None:
        checks.check_number("teacher_logit_scale", teacher_logit_scale)
    if teacher_logit_softcap is not None and teacher_weight is None:
        raise ValueError("teacher_logit_softcap needs teacher_weight: logits given as such are taken as they are")
    model = (
        teacher, teacher_weight, teacher_bias, float(logit_scale),
        float(logit_scale if teacher_logit_scale is None else teacher_logit_scale),
        *softcaps(logit_softcap, teacher_logit_softcap),
    )  # fmt: skip
    return _linear(
        student_hidden, student_weight, student_bias, model, (memory, skip_tiles, chunk_bytes), chosen, labels=labels,
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
    token_weight: Tensor | None = None,
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
        linear_weight, linear_bias: the head, (V, D) and (V). Or (V, d1, ..., D) and (V, d1, ...), for input (N, D) a
            head for each of d1, ..., and targets (N, d1, ...), as `torch.nn.functional.linear_cross_entropy` has it.
        target: class indices (...), in [0, V) or `ignore_index`; or class probabilities (..., V), as in
            `cross_entropy`.
        weight: (V) a factor on each class, as in `cross_entropy`.
        token_weight: (...) a factor on each token's loss, not in the denominator.
        The rest: as in `linear_f_divergence` and `cross_entropy`.

    Raises:
        ValueError, TypeError: as `linear_f_divergence`.
    """
    shared: dict[str, Any] = dict(
        z_loss=z_loss, token_weight=token_weight, reduction=reduction, num_items=num_items, backend=backend,
        return_parts=return_parts,
    )  # fmt: skip
    hard: dict[str, Any] = dict(class_weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing)
    checks.check_hidden("input", input)
    checks.check_tensor("target", target, floating=False)
    if isinstance(linear_weight, Tensor) and linear_weight.dim() > 2:
        return _many_heads(
            input, linear_weight, target, linear_bias, logit_scale=logit_scale, logit_softcap=logit_softcap,
            vocab_size=vocab_size, memory=memory, skip_tiles=skip_tiles, chunk_bytes=chunk_bytes, weight=weight,
            ignore_index=ignore_index, label_smoothing=label_smoothing, **shared,
        )  # fmt: skip
    input, linear_weight, linear_bias = _heads(input, linear_weight, linear_bias, LINEAR, vocab_size)
    vocabulary = linear_weight.shape[0]
    checks.check_class_weight(weight, vocabulary, input.device)
    checks.check_number("logit_scale", logit_scale)
    path = memory, skip_tiles, chunk_bytes
    model: tuple[Any, ...]
    caps = softcaps(logit_softcap, None)
    if target.is_floating_point():
        if memory == "minimal":
            raise ValueError("memory='minimal' is for class indices as target")
        like = input[..., :1].expand(*input.shape[:-1], vocabulary)
        teacher, mass = soft_targets(target, like, weight, ignore_index, label_smoothing)
        model = teacher.reshape(-1, vocabulary), None, None, float(logit_scale), 1.0, *caps
        return _linear(input, linear_weight, linear_bias, model, path, CROSS_ENTROPY, mass=mass, **shared)
    checks.check_labels(target, input, "target")
    model = None, None, None, float(logit_scale), 1.0, *caps
    return _linear(input, linear_weight, linear_bias, model, path, None, labels=target, labels_name="target",
                   ce_weight=1.0, **hard, **shared)  # fmt: skip


def _many_heads(
    input: Tensor, weights: Tensor, target: Tensor, biases: Tensor | None, *, weight: Tensor | None, reduction: str,
    num_items: Any, return_parts: bool, z_loss: float, token_weight: Tensor | None, ignore_index: int, **keywords: Any,
) -> Tensor:  # fmt: skip
    """A head (V, D) for each of the places (d1, ...) of weights (V, d1, ..., D), and their losses' common reduction."""
    checks.check_reduction(reduction)
    checks.check_integer("ignore_index", ignore_index)
    if return_parts or (z_loss and weight is not None) or reduction == "batchmean":
        raise ValueError("linear_weight of more than two dimensions goes without return_parts, without batchmean, and "
                         "without z_loss beside weight")  # fmt: skip
    places = weights.shape[1:-1]
    for name, value, shape in (("linear_bias", biases, weights.shape[:-1]),
                               ("token_weight", token_weight, (*input.shape[:1], *places))):  # fmt: skip
        if value is not None:
            checks.check_tensor(name, value, floating=False)
            if value.shape != shape:
                raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(value.shape)}")
    soft = target.is_floating_point()
    wanted = (input.shape[0], *([weights.shape[0]] if soft else []), *places)
    if input.dim() != 2 or target.shape != wanted:
        raise ValueError(f"linear_weight of shape {tuple(weights.shape)} needs input (N, D) and target {wanted}, not "
                         f"{tuple(input.shape)} and {tuple(target.shape)}")  # fmt: skip
    mask = torch.ones_like(target, dtype=torch.bool)[:, 0] if soft else target != ignore_index
    tokens = mask.sum()
    items = None if num_items is None else checks.checked_items(num_items, reduction, tokens)
    heads = weights.flatten(1, -2).unbind(1)
    each_bias = [None] * len(heads) if biases is None else biases.flatten(1).unbind(1)
    each_target = target.flatten(2 if soft else 1).unbind(-1)
    each_weight = [None] * len(heads) if token_weight is None else token_weight.flatten(1).unbind(-1)
    each = [
        linear_cross_entropy(input, head, of_head, linear_bias=bias, weight=weight, token_weight=factor, z_loss=z_loss,
                             ignore_index=ignore_index, reduction="none", **keywords)
        for head, of_head, bias, factor in zip(heads, each_target, each_bias, each_weight, strict=True)
    ]  # fmt: skip
    losses = torch.stack(each, -1).reshape(input.shape[0], *places)
    if items is not None:
        return losses.sum() / torch.where(tokens == 0, 1, items)
    if reduction in ("none", "sum"):
        return losses if reduction == "none" else losses.sum()
    if weight is not None and not soft:
        of_targets = torch.where(mask, weight.to(losses.dtype)[torch.where(mask, target, 0).long()], 0)
        return losses.sum() / torch.where((of_targets == 0).all(), 1, of_targets.sum())
    return losses.sum() / tokens.clamp_min(1)


#: What the arguments of a head are called: hidden states, weight and bias.
STUDENT, TEACHER, LINEAR = (
    ("student_hidden", "student_weight", "student_bias"),
    ("teacher_hidden", "teacher_weight", "teacher_bias"),
    ("input", "linear_weight", "linear_bias"),
)


def _heads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str], vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    checks.check_hidden(names[0], hidden)
    weight, bias = checks.check_head(names[1], weight, names[2], bias, hidden, vocab_size)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight, bias  # the head is cast later, so that its gradient stays in its own dtype
    for name, value in zip(names[1:], (weight, bias), strict=True):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(f"{names[0]} is {hidden.dtype} but {name} {value.dtype}; cast one of them")
    return hidden, weight, bias


def _teacher(
    teacher: Any, weight: Tensor | None, bias: Tensor | None, student: Tensor, vocabulary: int, vocab_size: int | None
) -> tuple[Teacher, Tensor | None, Tensor | None]:
    """The teacher as rows of hidden states, rows of logits, or a function of a range of rows."""
    if isinstance(teacher, Tensor):
        checks.check_tensor("teacher_hidden", teacher)
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
            checks.check_vocabularies(vocabulary, teacher.shape[-1])
            return teacher.detach().reshape(-1, vocabulary), None, None
        return teacher, None, None
    if not isinstance(teacher, Tensor):
        raise TypeError("teacher_weight is for hidden states; a function gives logits itself")
    teacher, weight, bias = _heads(teacher, weight, bias, TEACHER, vocab_size)
    checks.check_vocabularies(vocabulary, weight.shape[0])
    weight, bias = weight.detach().to(teacher.dtype), None if bias is None else bias.detach().to(teacher.dtype)
    return teacher.detach().reshape(-1, teacher.shape[-1]), weight, bias


def _linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, model: tuple[Any, ...],
    path: tuple[str, bool, int | None], divergence: Divergence | None, mass: Tensor | None = None,
    **token_arguments: Any,
) -> Any:  # fmt: skip
    """model: the fields of `LinearCall` from `teacher` to `teacher_softcap`; path: memory, skip_tiles, chunk_bytes."""
    memory, skip_tiles, chunk_bytes = path
    checks.check_flag("skip_tiles", skip_tiles)
    if memory not in ("chunks", "minimal"):
        raise ValueError(f"memory must be 'chunks' or 'minimal', not {memory!r}")
    if memory == "minimal" and model[0] is not None and model[1] is None:
        raise ValueError("memory='minimal' makes the teacher's logits on chip: give teacher_hidden and teacher_weight")
    if chunk_bytes is not None:
        checks.check_integer("chunk_bytes", chunk_bytes)
        if chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes must be positive, not {chunk_bytes!r}")
    if memory == "minimal" and chunk_bytes is None:
        chunk_bytes = MINIMAL_CHUNK_BYTES
    per_row = token_arguments["reduction"] == "none"
    rows = hidden.reshape(-1, hidden.shape[-1])

    def run(terms: TokenTerms, name: str) -> tuple[Tensor, Tensor]:
        cut_path = memory == "minimal" and name in ("triton", "cuda")
        how = (*model, cut_path, skip_tiles, chunk_bytes or 0)
        objects = callable(model[0]) or isinstance(terms.divergence, Divergence)
        call = _outside_graphs if objects and torch.compiler.is_compiling() else _linear_loss
        return call(rows, weight, bias, how, terms, per_row, name)

    if mass is not None:
        return soft_loss(hidden, run, weight.shape[0], mass, **token_arguments)
    return token_loss(hidden, run, divergence, weight.shape[0], **token_arguments)


def _linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...], terms: TokenTerms, per_row: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, summed or of each row, and the parts (3, N); how: the fields of `LinearCall` before those of terms."""
    trained = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    if trained and torch.is_grad_enabled():
        return _LinearLoss.apply(hidden, weight, bias, per_row, backend, len(how), *how, *terms)
    parts, *_ = _rows_of([hidden, weight, bias], how, terms, (False, False, False), backend)
    losses = of_parts(parts, terms)
    return (losses if per_row else losses.sum()), parts


#: A teacher's function and a user's own divergence are Python objects, which no graph holds.
_outside_graphs = torch.compiler.disable(_linear_loss)


def _chunk_rows(call: LinearCall) -> int:
    """Rows of a chunk: as many as the budget (0: the default) holds, in whole tiles of the matrix product."""
    device, chunk_bytes = call.hidden.device, call.chunk_bytes
    if not chunk_bytes:
        chunk_bytes = CPU_CHUNK_BYTES
        if call.hidden.is_cuda:
            chunk_bytes = GPU_CHUNK_BYTES
            if not torch.cuda.is_current_stream_capturing():
                chunk_bytes = min(chunk_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    models = 1 if call.teacher is None else 2
    most = max(1, chunk_bytes // (models * call.weight.shape[0] * _buffer_dtype(call).itemsize))
    tile = 128 if call.hidden.is_cuda else 16
    return most // tile * tile or most


def _buffer_dtype(call: LinearCall) -> torch.dtype:
    """Of a chunk's logits: the hidden states', but a teacher's logits are not narrowed; float64's to float32 alone."""
    if not isinstance(call.teacher, Tensor) or call.teacher_weight is not None:
        return call.hidden.dtype
    wide = torch.promote_types(call.hidden.dtype, call.teacher.dtype)
    return wide if call.hidden.dtype == torch.float64 or wide != torch.float64 else torch.float32


def _in_chunks(call: LinearCall, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts (3, N), and the gradients of hidden states, weight and bias in float32, one not wanted empty."""
    hidden, weight, teacher, labels = call.hidden, call.weight, call.teacher, call.labels
    wide = call.row_scale.dtype
    row_scale, power, most = call.row_scale, None, None
    if hidden.dtype == torch.float16:  # a row's gradient in the buffer must not underflow, however little it weighs
        row_scale, power = split(row_scale)
        most = torch.where(row_scale == 0, 0, power).amax() if len(power) else power.new_ones(())
        most = torch.where(most == 0, 1, most)
    parts = torch.zeros(3, hidden.shape[0], dtype=wide, device=hidden.device)
    of_hidden = torch.zeros(hidden.shape if call.want_hidden else (0,), dtype=wide, device=hidden.device)
    of_weight = products.empty(call.row_scale, *(weight.shape if call.want_weight else (0,)))
    of_bias = torch.zeros(weight.shape[:1] if call.want_bias else (0,), dtype=wide, device=hidden.device)
    gradients = call.want_hidden or call.want_weight or call.want_bias
    live = None if callable(teacher) else _live_rows(call.row_scale, labels)
    count = hidden.shape[0] if live is None else len(live)
    step = min(_chunk_rows(call), max(1, count))
    like = hidden.new_empty(0, dtype=_buffer_dtype(call))
    student_buffer = products.empty(like, step, weight.shape[0])
    teacher_buffer = products.empty(like, step, weight.shape[0]) if teacher is not None else None
    if not count:
        of_weight.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, count, step):
            end = min(begin + step, count)
            rows = slice(begin, end) if live is None else live[begin:end]
            logits, states = student_buffer[: end - begin], hidden[rows]
            if live is None:  # 0 times a masked row's NaN would be NaN in the weight's gradient
                states = states.masked_fill((row_scale[rows] == 0).unsqueeze(1), 0)
            products.logits_(states, weight, call.bias, call.logit_scale, logits)
            teacher_logits = None
            if teacher_buffer is not None:
                teacher_logits = teacher_buffer[: end - begin]
                if callable(teacher):
                    teacher_logits.copy_(checks.check_chunk(teacher(begin, end), teacher_logits))
                elif call.teacher_weight is None:
                    teacher_logits.copy_(teacher[rows])  # type: ignore[index]
                else:
                    products.logits_(teacher[rows], call.teacher_weight, call.teacher_bias,  # type: ignore[index]
                                     call.teacher_logit_scale, teacher_logits)  # fmt: skip
                teacher_logits = teacher_logits.unsqueeze(0)
            row_call = RowCall(
                logits.unsqueeze(0), teacher_logits, row_scale[rows], call.student_inverse_temperature[rows],
                call.teacher_inverse_temperature[rows], call.divergence_scale[rows], call.cross_entropy_scale[rows],
                call.z_loss_scale[rows], None if labels is None else labels[rows], call.class_weight, call.divergence,
                call.label_smoothing, gradients, False, inplace=gradients, student_softcap=call.student_softcap,
                teacher_softcap=call.teacher_softcap,
            )  # fmt: skip
            parts[:, rows] = backends.BACKENDS[backend].divergence_rows(row_call)[0]
            if not gradients:
                continue
            logits = logits.to(hidden.dtype)
            if call.want_hidden:
                of_hidden[rows] = products.hidden_gradient(logits, weight, call.logit_scale).to(wide)
            if power is not None and most is not None:
                share = torch.where(row_scale[rows] == 0, 0, power[rows] / most).unsqueeze(1)
                states = states * share.to(states.dtype) if states.is_cuda else states.float() * share
            if call.want_weight:
                products.add_weight_gradient_(logits, states, call.logit_scale, 1.0 if begin else 0.0, of_weight)
            if call.want_bias:
                of_bias += logits.sum(0, dtype=wide) if power is None else (logits.to(wide) * share).sum(0)
    if power is not None and most is not None:
        parts = parts * power
        of_hidden = of_hidden * power.unsqueeze(1) if call.want_hidden else of_hidden
        of_weight, of_bias = of_weight.mul_(most), of_bias * most
    return parts, of_hidden, of_weight, of_bias


def _live_rows(row_scale: Tensor, labels: Tensor | None) -> Tensor | None:
    """Indices of the rows that count, or None for all; a GPU is asked only where labels may have masked some."""
    if row_scale.is_cuda and (labels is None or torch.cuda.is_current_stream_capturing()):
        return None
    live = row_scale.nonzero().squeeze(1)
    return None if len(live) == len(row_scale) else live


def _rows_of(
    inputs: list[Any], how: tuple[Any, ...], terms: TokenTerms,
    wants: tuple[bool, bool, bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Parts and gradients of hidden states, weight and bias; through the operator, but for what only Python holds."""
    arguments = (*inputs, *how, *terms, *wants)
    if callable(how[0]) or isinstance(terms.divergence, Divergence):
        return _linear_rows(*arguments, backend)
    return linear_rows(*arguments, backend)


def _linear_rows(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, backend = LinearCall(*arguments[:-1]).checked(), arguments[-1]
    dtype = call.hidden.dtype
    call = dataclasses.replace(call, weight=call.weight.to(dtype), bias=None if call.bias is None else
                               call.bias.to(dtype))  # fmt: skip
    backends.check_label_range(call.labels, call.row_scale, call.weight.shape[0])
    backend = backends.choose(backend, call.hidden.device, dtype, call.divergence, call.weight.shape[0])
    if call.cut_path and call.hidden.shape[0]:
        from .backends.triton import cut

        return cut.linear_rows(call, call.skip_tiles)
    return _in_chunks(call, backend)


#: The operator's arguments are the fields of `LinearCall`, and the backend's name.
linear_rows: Any = torch.library.custom_op(
    "fdistill_kernels::linear_rows", _linear_rows, mutates_args=(),
    schema=f"({schema(LinearCall)}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@linear_rows.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = LinearCall(*arguments[:-1])
    wide = call.row_scale
    hidden, weight = (call.hidden, call.hidden) if call.cut_path else (wide, wide)
    return (
        wide.new_empty(3, call.hidden.shape[0]),
        hidden.new_empty(call.hidden.shape if call.want_hidden else (0,)),
        weight.new_empty(call.weight.shape if call.want_weight else (0,)),
        wide.new_empty(call.weight.shape[:1] if call.want_bias else (0,)),
    )


class _LinearLoss(torch.autograd.Function):
    """Gradients are made in the forward pass; where each row has its own upstream gradient, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, per_row: bool, backend: str,
                count: int, *fields: Any) -> Any:  # fmt: skip
        how, terms = fields[:count], TokenTerms(*fields[count:])
        needed = ctx.needs_input_grad
        wants = (False, False, False) if per_row else (needed[0], needed[1], needed[2])
        detached: list[Any] = [x if x is None else x.detach() for x in (hidden, weight, bias)]
        parts, *gradients = _rows_of(detached, how, terms, wants, backend)
        ctx.per_row, ctx.dtypes = per_row, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        if per_row:
            ctx.save_for_backward(hidden, weight, bias)
            ctx.again = (how, terms, backend)
        elif torch.compiler.is_compiling():
            ctx.save_for_backward(terms.row_scale, *gradients)
        else:  # kept so that nothing else holds them in the backward pass: a leaf then takes them without a copy
            ctx.gradients = gradients
            ctx.save_for_backward(terms.row_scale)
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        losses = of_parts(parts, terms)
        return (losses if per_row else losses.sum()), parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        wants, nothing = ctx.needs_input_grad[:3], (None,) * (len(ctx.needs_input_grad) - 3)
        if upstream is None:
            return (None, None, None, *nothing)
        factor: Tensor | None = upstream.detach()
        gradients: list[Any]
        if ctx.per_row:
            how, terms, backend = ctx.again
            terms = terms.replaced(row_scale=torch.where(terms.row_scale == 0, 0, terms.row_scale * factor))
            detached: list[Any] = [x if x is None else x.detach() for x in ctx.saved_tensors]
            gradients = list(_rows_of(detached, how, terms, wants, backend)[1:])
            factor = None
        else:
            assert factor is not None
            factor = torch.where((ctx.saved_tensors[0] != 0).any(), factor, 1)  # zeros stay, whatever comes for them
            gradients = _handed_over(ctx)
        results: list[Tensor | None] = [None, None, None]
        for i, (want, dtype) in enumerate(zip(wants, ctx.dtypes, strict=True)):
            gradient, gradients[i] = gradients[i], None
            if want:
                results[i] = _rounded(gradient, factor, dtype)
        return (*results, *nothing)


def _rounded(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gradient·factor in an input's dtype, rounded once."""
    if torch.compiler.is_compiling():
        return (gradient if factor is None else gradient * factor).to(dtype)
    if factor is not None and graph_is_kept():
        gradient = gradient * factor
    elif factor is not None and not (factor.device.type == "cpu" and bool(factor == 1)):
        gradient = gradient.mul_(factor)
    return once(gradient.to(dtype))


def _handed_over(ctx: Any) -> list[Any]:
    """The gradients, out of the graph's hands unless it is kept for another backward pass."""
    if torch.compiler.is_compiling():
        return list(ctx.saved_tensors[1:])
    gradients = ctx.gradients
    if gradients is None:
        raise RuntimeError(
            "a second backward pass through a linear loss, whose gradients were handed over by the first: give that "
            "one retain_graph=True"
        )
    if not graph_is_kept():
        ctx.gradients = None
    return list(gradients)
