"""The linear losses in chunks of rows: a chunk's logits are made in a buffer, the row kernel leaves their gradient in
their place, and two more products take it to the hidden states and the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends, checks, products
from .backends import sharded
from .backends.collectives import Collectives
from .backends.rows import LinearCall, RowCall, TokenTerms, split

#: Bytes of the chunk's logits, both models together: what keeps a CPU's products near their full speed.
CPU_CHUNK_BYTES = 55_000_000
#: The most that is taken of a GPU, or a quarter of what it could still give if that is less; but for GPU_FEWEST_ROWS,
#: below which the weight's gradient is bound by its accumulator's traffic, half.
GPU_CHUNK_BYTES = 1_100_000_000
GPU_FEWEST_ROWS = 1024
#: Rows of a chunk on a GPU are whole tiles of the matrix products, entries of a row in its buffer whole 128-byte lines:
#: of 50257 entries rows would start anywhere, and products read them in small pieces.
GPU_TILE, GPU_LINE = 128, 64
#: A chunk of memory="minimal" where the Triton kernels of that path do not run.
MINIMAL_CHUNK_BYTES = 8_000_000


def linear_rows(call: LinearCall, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts (3 or more, N), and the gradients of hidden states, weight and bias in float32, one not wanted empty."""
    hidden, head, wants, wide = call.hidden, call.head, call.wants, call.terms.row_scale.dtype
    terms, powers, most = _without_underflow(call.terms, hidden.dtype)
    parts = torch.zeros(call.parts, hidden.shape[0], dtype=wide, device=hidden.device)
    of_hidden = torch.zeros(hidden.shape if wants.hidden else (0,), dtype=wide, device=hidden.device)
    of_weight = products.empty(terms.row_scale, *(head.weight.shape if wants.weight else (0,)))
    of_bias = torch.zeros(head.weight.shape[:1] if wants.bias else (0,), dtype=wide, device=hidden.device)
    live = None if callable(call.teacher.rows) else _live_rows(call.terms)
    count = hidden.shape[0] if live is None else len(live)
    vocabulary, models = head.weight.shape[0], 1 if call.teacher.rows is None else 2
    like, row = hidden.new_empty(0, dtype=_buffer_dtype(call)), _buffer_row(vocabulary, backend)
    step = _chunk_rows(call, count, models * row * like.element_size())
    wire = Collectives(call.shard.group) if call.shard.group else None
    if wire is not None:
        step = min(sharded.agree(call, step, rows=len(hidden)))
    under_way: tuple[Any, Any, Tensor] | None = None  # a chunk's sum over ranks, while the next one's products are made
    buffers = [products.empty(like, step, row)[:, :vocabulary] for _ in range(models)]
    if not count:
        of_weight.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, count, step):
            end = min(begin + step, count)
            rows = slice(begin, end) if live is None else live[begin:end]
            states, of_rows = hidden[rows], terms.of_rows(rows)
            logits, *others = (buffer[: end - begin] for buffer in buffers)
            products.logits_(states, head, logits)
            teacher_logits, cap = None, call.teacher.softcap
            if call.teacher.itself:  # a kernel reads an entry of both before it writes the gradient there
                teacher_logits, cap = logits.unsqueeze(0), head.softcap
            elif others:
                teacher_logits = _teacher_logits_(call, begin, end, rows, others[0]).unsqueeze(0)
            row_call = RowCall(logits.unsqueeze(0), teacher_logits, of_rows, head.softcap, cap,
                               student_gradient=any(wants), inplace=any(wants),
                               targets=call.teacher.targets.of_rows(rows), shard=call.shard)  # fmt: skip
            parts[:, rows] = backends.rows_by(backend, row_call)[0]
            if not any(wants):
                continue
            gradient = logits.to(hidden.dtype)
            if wants.hidden:
                of_states = products.hidden_gradient(gradient, head.weight, head.scale).to(wide)
                if wire is not None and call.shard.sum_hidden:
                    _end_sum(wire, under_way, of_hidden)
                    under_way = wire.begin(dist.all_reduce, of_states), rows, of_states
                else:
                    of_hidden[rows] = of_states
            if live is None or terms.metrics:  # 0 times an ignored row's NaN would be NaN in the weight's gradient
                made = of_rows.without_metrics() if terms.metrics else of_rows
                states = states.masked_fill((made.row_scale == 0).unsqueeze(1), 0)
            if powers is not None:
                share = torch.where(of_rows.row_scale == 0, 0, powers[rows] / most).unsqueeze(1)
                states = states * share.to(states.dtype) if states.is_cuda else states.float() * share
            if wants.weight:
                keep = 1.0 if begin else 0.0
                products.add_weight_gradient_(gradient, states, head.scale, keep, of_weight)
            if wants.bias:
                of_bias += gradient.sum(0, dtype=wide) if powers is None else (gradient.to(wide) * share).sum(0)
    _end_sum(wire, under_way, of_hidden)
    if powers is not None:
        parts = parts * powers
        of_hidden = of_hidden * powers.unsqueeze(1) if wants.hidden else of_hidden
        of_weight, of_bias = of_weight.mul_(most), of_bias * most
    return parts, of_hidden, of_weight, of_bias


def _end_sum(wire: Collectives | None, under_way: tuple[Any, Any, Tensor] | None, of_hidden: Tensor) -> None:
    if wire is not None and under_way is not None:
        work, rows, of_states = under_way
        wire.end(work)
        of_hidden[rows] = of_states


def _without_underflow(terms: TokenTerms, dtype: torch.dtype) -> tuple[TokenTerms, Tensor | None, Any]:
    """float16 gradients of a row in the buffer must not underflow, however little it weighs: the terms as `split` has
    them, the powers, and the largest power of a row that counts.
    """
    if dtype != torch.float16:
        return terms, None, None
    terms, powers = split(terms)
    most = torch.where(terms.row_scale == 0, 0, powers).amax() if len(powers) else powers.new_ones(())
    return terms, powers, torch.where(most == 0, 1, most)


def _teacher_logits_(call: LinearCall, begin: int, end: int, rows: slice | Tensor, out: Tensor) -> Tensor:
    """The teacher's logits of a chunk's rows, into a buffer."""
    teacher = call.teacher
    if callable(teacher.rows):
        made, shard = teacher.rows(begin, end), call.shard
        if shard.group and isinstance(made, Tensor) and made.shape[-1] == shard.size:  # whole, beside a split student
            made = made[..., shard.begin : shard.begin + out.shape[1]]
        return out.copy_(checks.check_chunk(made, out))
    assert teacher.rows is not None
    if teacher.weight is None:
        return out.copy_(teacher.rows[rows])
    products.logits_(teacher.rows[rows], teacher.head, out)
    return out


def _chunk_rows(call: LinearCall, count: int, row_bytes: int) -> int:
    """Rows of a chunk: as many as the budget (0: the default) holds, in whole tiles of the matrix product; see
    `even_step`.
    """
    given, tile = call.path.chunk_bytes, 16
    chunk_bytes = given or CPU_CHUNK_BYTES
    if call.hidden.is_cuda:
        tile = GPU_TILE
        chunk_bytes = given or gpu_chunk_bytes(row_bytes, _available(call.hidden.device))
    most = max(1, chunk_bytes // row_bytes)
    return even_step(count, most // tile * tile or most, tile)


def _available(device: torch.device) -> int | None:
    """Bytes a GPU could still give: what the driver has free, and what torch holds unused. None while capturing."""
    if torch.cuda.is_current_stream_capturing():
        return None
    held = torch.cuda.memory_stats_as_nested_dict(device)  # a part of the time of memory_reserved and memory_allocated
    unused = held["reserved_bytes"]["all"]["current"] - held["allocated_bytes"]["all"]["current"]
    return torch.cuda.mem_get_info(device)[0] + unused


def gpu_chunk_bytes(row_bytes: int, available: int | None) -> int:
    """The budget of a chunk on a GPU that could give so many bytes."""
    if available is None:
        return GPU_CHUNK_BYTES
    return max(min(GPU_CHUNK_BYTES, available // 4), min(GPU_FEWEST_ROWS * row_bytes, available // 2))


def even_step(count: int, most: int, tile: int) -> int:
    """Rows of a chunk that cuts `count` evenly, in whole tiles, into no more chunks than `most` would: no thin last."""
    chunks = max(1, -(-count // most))
    even = -(-count // chunks)
    return max(1, min(most, -(-even // tile) * tile, count))


def _buffer_row(vocabulary: int, backend: str) -> int:
    """Entries from a row of the buffer to the next."""
    return -(-vocabulary // GPU_LINE) * GPU_LINE if backend in ("triton", "cuda") else vocabulary


def _buffer_dtype(call: LinearCall) -> torch.dtype:
    """Of a chunk's logits: the hidden states', but a teacher's logits are not narrowed; float64's to float32 alone."""
    hidden, teacher = call.hidden, call.teacher
    if not isinstance(teacher.rows, Tensor) or teacher.weight is not None:
        return hidden.dtype
    wide = torch.promote_types(hidden.dtype, teacher.rows.dtype)
    return wide if hidden.dtype == torch.float64 or wide != torch.float64 else torch.float32


def _live_rows(terms: TokenTerms) -> Tensor | None:
    """Indices of the rows that count, or None for all; a GPU is asked only where labels may have masked some."""
    if terms.row_scale.is_cuda and (terms.labels is None or torch.cuda.is_current_stream_capturing()):
        return None
    live = terms.row_scale.nonzero().squeeze(1)
    return None if len(live) == len(terms.row_scale) else live
