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
    chunks = _Chunks(call, backend)
    with torch.autocast(call.hidden.device.type, enabled=False):
        for begin in range(0, chunks.count, chunks.step):
            chunks.add(begin, min(begin + chunks.step, chunks.count))
    return chunks.sums()


class _Chunks:
    """The sums of a call over its chunks.

    Attributes:
        live: indices of the rows that count, `count` of them; None: all.
        terms, powers, most: as `_without_underflow` has them.
        buffers: the logits (step, V) of a chunk, of each model.
        under_way: a chunk's sum over the ranks of a split vocabulary, while the next one's products are made.
    """

    def __init__(self, call: LinearCall, backend: str) -> None:
        hidden, head, wants = call.hidden, call.head, call.wants
        self.call, self.backend = call, backend
        self.terms, self.powers, self.most = _without_underflow(call.terms, hidden.dtype)
        self.wide = wide = self.terms.row_scale.dtype
        self.parts = torch.zeros(call.parts, hidden.shape[0], dtype=wide, device=hidden.device)
        self.of_hidden = torch.zeros(hidden.shape if wants.hidden else (0,), dtype=wide, device=hidden.device)
        self.of_weight = products.empty(self.terms.row_scale, *(head.weight.shape if wants.weight else (0,)))
        self.of_bias = torch.zeros(head.weight.shape[:1] if wants.bias else (0,), dtype=wide, device=hidden.device)
        self.live = None if callable(call.teacher.rows) else _live_rows(call.terms)
        self.count = hidden.shape[0] if self.live is None else len(self.live)
        vocabulary, models = head.weight.shape[0], 1 if call.teacher.rows is None else 2
        like, row = hidden.new_empty(0, dtype=_buffer_dtype(call)), _buffer_row(vocabulary, backend)
        self.step = _chunk_rows(call, self.count, models * row * like.element_size())
        self.wire = Collectives(call.shard.group) if call.shard.group else None
        self.under_way: tuple[Any, Any, Tensor] | None = None
        if self.wire is not None:
            self.step = min(sharded.agree(call, self.step, rows=len(hidden)))
        self.buffers = [products.empty(like, self.step, row)[:, :vocabulary] for _ in range(models)]

    def add(self, begin: int, end: int) -> None:
        """A chunk of the rows that count."""
        call, wants = self.call, self.call.wants
        rows = slice(begin, end) if self.live is None else self.live[begin:end]
        states, of_rows = call.hidden[rows], self.terms.of_rows(rows)
        gradient = self._add_parts(begin, end, rows, states, of_rows)
        if not any(wants):
            return
        if wants.hidden:
            self._add_hidden(rows, products.hidden_gradient(gradient, call.head.weight, call.head.scale).to(self.wide))
        if self.live is None or of_rows.metrics:  # 0 times an ignored row's NaN would be NaN in the weight's gradient
            made = of_rows.without_metrics() if of_rows.metrics else of_rows
            states = states.masked_fill((made.row_scale == 0).unsqueeze(1), 0)
        share = None
        if self.powers is not None:
            share = torch.where(of_rows.row_scale == 0, 0, self.powers[rows] / self.most).unsqueeze(1)
            states = states * share.to(states.dtype) if states.is_cuda else states.float() * share
        if wants.weight:
            keep = 1.0 if begin else 0.0
            products.add_weight_gradient_(gradient, states, call.head.scale, keep, self.of_weight)
        if wants.bias:
            self.of_bias += gradient.sum(0, dtype=self.wide) if share is None else (
                gradient.to(self.wide) * share).sum(0)  # fmt: skip

    def _add_parts(self, begin: int, end: int, rows: slice | Tensor, states: Tensor, of_rows: TokenTerms) -> Tensor:
        """The gradient of the chunk's logits (rows, V), in their buffer."""
        call = self.call
        logits, *others = (buffer[: end - begin] for buffer in self.buffers)
        products.logits_(states, call.head, logits)
        teacher_logits, cap = None, call.teacher.softcap
        if call.teacher.itself:  # a kernel reads an entry of both before it writes the gradient there
            teacher_logits, cap = logits.unsqueeze(0), call.head.softcap
        elif others:
            teacher_logits = _teacher_logits_(call, begin, end, rows, others[0]).unsqueeze(0)
        trained = any(call.wants)
        of_logits = RowCall(logits.unsqueeze(0), teacher_logits, of_rows, call.head.softcap, cap,
                            student_gradient=trained, inplace=trained, targets=call.teacher.targets.of_rows(rows),
                            shard=call.shard)  # fmt: skip
        self.parts[:, rows] = backends.rows_by(self.backend, of_logits)[0]
        return logits.to(states.dtype) if trained else logits

    def _add_hidden(self, rows: slice | Tensor, of_states: Tensor) -> None:
        """The gradient of the chunk's hidden states, which ranks of a split vocabulary sum."""
        if self.wire is None or not self.call.shard.sum_hidden:
            self.of_hidden[rows] = of_states
        else:
            self._end_sum()
            self.under_way = self.wire.begin(dist.all_reduce, of_states), rows, of_states

    def _end_sum(self) -> None:
        if self.wire is not None and self.under_way is not None:
            work, rows, of_states = self.under_way
            self.wire.end(work)
            self.of_hidden[rows] = of_states

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `linear_rows` returns, of the chunks that were added."""
        self._end_sum()
        if not self.count:
            self.of_weight.zero_()
        if self.powers is None:
            return self.parts, self.of_hidden, self.of_weight, self.of_bias
        of_hidden = self.of_hidden * self.powers.unsqueeze(1) if self.call.wants.hidden else self.of_hidden
        return self.parts * self.powers, of_hidden, self.of_weight.mul_(self.most), self.of_bias * self.most


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
