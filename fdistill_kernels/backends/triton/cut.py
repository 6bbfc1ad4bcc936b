"""The cut path of the linear losses: no logits in memory, however large N and V are (cf. Cut Cross-Entropy, ICLR 2025).

Four sweeps over tiles of logits, each making them anew from hidden states and heads:
    1. log-sum-exps of both models
    2. D and S of each row, and which tiles matter to the gradient
    3. tiles of the logits' gradient for a band of rows, through all the vocabulary: ∂hidden of the band
    4. the same for a band of the vocabulary, through all the rows: ∂weight and ∂bias of the band
A band is what fits a float32 accumulator of ACCUMULATOR_BYTES; its gradient's tiles pass through a buffer of
GRADIENT_BYTES, which stays in L2. No atomics: the same inputs give the same bits. Ten products where the chunked path
has four; a tile that does not matter costs those of the first two sweeps alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...formulas import times
from ...values import Head
from .. import triton as triton_backend
from ..rows import LinearCall, split
from . import launch
from .kernels.head_statistics import statistics_kernel
from .kernels.tile_products import product_kernel
from .kernels.tiles import BLOCK, FACTS, GRADIENT, TOTALS, tile_kernel

ACCUMULATOR_BYTES = 8 << 20
SMALLEST = torch.finfo(torch.float32).tiny
GRADIENT_BYTES = 2 << 20
STATES_BYTES = 1 << 20
STAGES = 2 if torch.version.hip else 3
#: Symbols whose gradient of entries with p, q < ε/V has an L1 norm under 2ε: |q·(g − S)| ≤ 2·max(p, q).
SKIPPABLE = ("Kl", "CrossEntropy", "Gjs", "SkewKl", "Tvd")


def linear_rows(call: LinearCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts (3, N), and the gradients of hidden states, weight and bias, one not wanted empty."""
    with torch.cuda.device(call.hidden.device) if call.hidden.is_cuda else contextlib.nullcontext():
        return _Sweeps(call).run()


class _Sweeps:
    """A call's facts of each row, gathered sweep by sweep."""

    def __init__(self, call: LinearCall):
        # float16 tiles of a row's gradient must not underflow, however little it weighs; a masked row counts 0 times
        terms = call.terms
        self.power, self.most = terms.row_scale.new_ones(1), terms.row_scale.new_ones(())
        self.share = (terms.row_scale != 0).to(call.hidden.dtype)
        if call.hidden.dtype == torch.float16:
            mantissa, self.power = split(terms.row_scale)
            self.most = (self.power * self.share).amax().clamp_min(SMALLEST)
            self.share = self.share * (self.power / self.most)
            call = call._replace(terms=terms._replace(row_scale=mantissa))
        self.call = call
        self.rows, self.vocabulary = call.hidden.shape[0], call.head.weight.shape[0]
        self.facts = torch.zeros(len(FACTS), self.rows, device=call.hidden.device)
        self.fact = dict(zip(FACTS, self.facts, strict=True))
        self.student = _Model(call.hidden, call.head)
        self.teacher = None
        if call.teacher.weight is not None:
            self.teacher = _Model(call.teacher.rows, call.teacher.head)
        self.gradients = any(call.wants)
        self.smoothed = terms.labels is not None and terms.label_smoothing > 0
        skippable = call.divergence is None or call.divergence.kernel in SKIPPABLE
        self.live = None
        if call.path.skip_tiles and skippable and self.gradients and not self.smoothed:
            shape = _blocks(self.rows), _blocks(self.vocabulary)
            self.live = torch.zeros(shape, dtype=torch.int8, device=call.hidden.device)
        # enough spans to fill the card a few times over, where the blocks of rows do not
        card = launch.device_of(call.hidden.device)
        processors, self.older = card.processors, card.without_wide_products
        self.options = {"num_warps": 8 * 32 // card.lanes, "num_stages": STAGES, **launch.ALWAYS}
        splits = min(-(-4 * processors // _blocks(self.rows)), _blocks(self.vocabulary))
        self.span = -(-_blocks(self.vocabulary) // splits) * BLOCK
        self.splits = -(-self.vocabulary // self.span)

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        call, parts = self.call, self.parts()
        of_hidden, of_weight = (torch.empty_like(x) if want else x.new_empty(0) for x, want in (
            (call.hidden, call.wants.hidden), (call.head.weight, call.wants.weight)))  # fmt: skip
        of_bias = torch.zeros(self.vocabulary if call.wants.bias else 0, device=call.hidden.device)
        if call.wants.hidden:
            self.hidden_gradient(of_hidden)
        if call.wants.weight or call.wants.bias:
            self.weight_gradient(of_weight, of_bias)
        return parts.mul_(self.power), of_hidden, of_weight, of_bias.mul_(self.most)

    def parts(self) -> Tensor:
        """Sweeps 1 and 2: the parts, and all the facts."""
        call, terms, fact = self.call, self.call.terms, self.fact
        fact["scale"].copy_(terms.row_scale)
        label_logit = self.statistics()
        divergence, linear = self.totals()
        scale = terms.divergence_scale * (call.divergence.scale if call.divergence else 1)
        cross_entropy, squared_lse = self.label_terms(label_logit, linear)
        fact["of_divergence"].copy_(terms.row_scale * scale * fact["student_rate"])
        values = (scale * divergence, cross_entropy, squared_lse)
        return torch.stack([torch.where(terms.row_scale != 0, terms.row_scale * x, 0) for x in values])

    def statistics(self) -> Tensor:
        """Sweep 1, into facts; the label's logit of each row."""
        call, terms, fact = self.call, self.call.terms, self.fact
        plain = self.teacher is not None and terms.labels is not None
        ones = torch.ones_like(terms.row_scale)
        rates = terms.student_inverse_temperature if self.teacher else ones
        label_logit = ones
        for name, head, rate in (
            ("student", self.student, rates), ("teacher", self.teacher, terms.teacher_inverse_temperature)
        ):  # fmt: skip
            if head is None:
                continue
            of_student = name == "student"
            partials = torch.empty(4, self.splits, self.rows, device=call.hidden.device)
            statistics_kernel[(_blocks(self.rows), self.splits)](
                head.hidden, head.weight, head.bias, terms.row_scale, rate, terms.labels if of_student else None,
                partials, self.rows, self.vocabulary, *head.shape, self.span, PLAIN=plain and of_student,
                EVEN=head.even, PRECISION=head.precision, BLOCK_D=head.depth, BLOCK=BLOCK,
                BLOCK_V=tile_width(None, None, False, False, head.itemsize, self.older), **self.options,
            )  # fmt: skip
            tops, totals, plain_totals, label_logits = partials
            top = tops.amax(0)
            fact[f"{name}_top"].copy_(top)
            fact[f"{name}_rate"].copy_(rate)
            fact[f"{name}_log_total"].copy_((totals * ((tops - top) * rate).exp()).sum(0).log())
            if of_student:
                label_logit = label_logits.sum(0)
                fact["plain_log_total"].copy_(
                    (plain_totals * (tops - top).exp()).sum(0).log() if plain else fact["student_log_total"]
                )
        return label_logit

    def totals(self) -> tuple[Tensor, Tensor]:
        """Sweep 2: D of each row, S into facts, Σ w·log q for label smoothing, and which tiles are live."""
        if self.teacher is None and not self.smoothed and self.live is None:
            return self.facts.new_zeros(self.rows), self.facts.new_zeros(self.rows)
        partials = torch.empty(3, self.splits, self.rows, device=self.facts.device)
        self.tiles(TOTALS, (_blocks(self.rows), self.splits), self.span, partials=partials)
        divergence, weight, linear = partials.sum(1)
        if self.call.divergence is not None and not self.call.divergence.centred:
            self.fact["weight"].copy_(weight)
        return divergence, linear

    def label_terms(self, label_logit: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and lse² of each row; their gradient's factors into facts."""
        terms, fact = self.call.terms, self.fact
        if terms.labels is None:
            return torch.zeros_like(linear), torch.zeros_like(linear)
        known = torch.where(terms.row_scale != 0, terms.labels, 0)
        of_label = (1 - terms.label_smoothing) * (1 if terms.class_weight is None else terms.class_weight[known])
        spread = terms.label_smoothing / self.vocabulary
        weight_sum = self.vocabulary if terms.class_weight is None else terms.class_weight.sum()
        of_label = of_label * torch.ones_like(linear)
        cross_entropy = times(of_label, fact["student_top"] - label_logit + fact["plain_log_total"]) - spread * linear
        lse = fact["student_top"] + fact["plain_log_total"]
        weight = terms.row_scale * terms.cross_entropy_scale
        of_spread = spread * weight_sum if spread else 0
        fact["of_q"].copy_(weight * (of_label + of_spread) + terms.row_scale * 2 * terms.z_loss_scale * lse)
        fact["of_label"].copy_(weight * of_label)
        fact["of_weight"].copy_(weight * spread)
        return cross_entropy, lse**2

    def tiles(self, phase: Any, grid: tuple[int, int], span: int, first: tuple[int, int] = (0, 0),
              partials: Tensor | None = None, gradient: Tensor | None = None) -> None:  # fmt: skip
        """Launches `tile_kernel`."""
        call, terms, student, teacher = self.call, self.call.terms, self.student, self.teacher
        symbol = (call.divergence.kernel or "own") if call.divergence else None
        functions = triton_backend.functions(call.divergence, teacher_gradient=False)
        log_threshold = math.log(torch.finfo(call.hidden.dtype).eps / self.vocabulary)
        widest = max(model.itemsize for model in (student, teacher) if model)
        tile_kernel[grid](
            student.hidden, student.weight, student.bias, teacher and teacher.hidden, teacher and teacher.weight,
            teacher and teacher.bias, self.facts, terms.labels, terms.class_weight if self.smoothed else None,
            self.live, partials, gradient, self.rows, self.vocabulary, *student.shape, *(teacher or student).shape,
            log_threshold=log_threshold, first_row=first[0], first_entry=first[1], span=span,
            gradient_stride=gradient.stride(0) if gradient is not None else 0,
            **triton_backend.constants(call.divergence), TERMS=functions["TERMS"], EXCHANGED=functions["EXCHANGED"],
            SMOOTHED=self.smoothed, PHASE=phase, STUDENT_EVEN=student.even, STUDENT_PRECISION=student.precision,
            STUDENT_D=student.depth, TEACHER_EVEN=(teacher or student).even,
            TEACHER_PRECISION=(teacher or student).precision, TEACHER_D=(teacher or student).depth, BLOCK=BLOCK,
            BLOCK_V=tile_width(phase, symbol, terms.labels is not None, self.smoothed, widest, self.older),
            **self.options,
        )  # fmt: skip

    def gradient_tiles(self, rows: slice, entries: slice, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits' gradient of a range of rows and entries, in whole tiles of the buffer, and their live flags."""
        height, width = _blocks(rows.stop - rows.start), _blocks(entries.stop - entries.start)
        gradient = buffer[: height * BLOCK * width * BLOCK].view(height * BLOCK, width * BLOCK)
        self.tiles(GRADIENT, (height, width), BLOCK, (rows.start, entries.start), gradient=gradient)
        if self.live is None:
            return gradient, None
        row, entry = rows.start // BLOCK, entries.start // BLOCK
        return gradient, self.live[row : row + height, entry : entry + width]

    def hidden_gradient(self, of_hidden: Tensor) -> None:
        """Sweep 3."""
        height, length, total, buffer = self.buffers(self.rows, self.vocabulary)
        for rows in _bands(self.rows, height):
            for entries in _bands(self.vocabulary, length):
                gradient, live = self.gradient_tiles(rows, entries, buffer)
                self.multiply(gradient, live, self.student.weight[entries], total, entries.start == 0)
            total = total[: rows.stop - rows.start].mul_(self.call.head.scale)
            of_hidden[rows] = total.mul_(self.power.expand(self.rows)[rows].unsqueeze(1))

    def weight_gradient(self, of_weight: Tensor, of_bias: Tensor) -> None:
        """Sweep 4."""
        row_bytes = self.student.hidden.element_size() * self.student.hidden.shape[1]
        most = max(1, STATES_BYTES // (row_bytes * BLOCK))
        height, length, total, buffer = self.buffers(self.vocabulary, self.rows, most)
        for entries in _bands(self.vocabulary, height):
            for rows in _bands(self.rows, length):
                gradient, live = self.gradient_tiles(rows, entries, buffer)
                if self.call.wants.bias:
                    share = torch.nn.functional.pad(self.share[rows], (0, gradient.shape[0] - (rows.stop - rows.start)))
                    of_tiles = (gradient.float() * share.unsqueeze(1)).sum(0)
                    of_bias[entries] += of_tiles[: entries.stop - entries.start]
                if self.call.wants.weight:
                    live = None if live is None else live.t()
                    share, hidden = self.share[rows].unsqueeze(1), self.student.hidden[rows]
                    states = hidden.masked_fill(share == 0, 0).mul_(share)  # without a masked row's NaN
                    self.multiply(gradient.t(), live, states, total, rows.start == 0)
            if self.call.wants.weight:
                of_weight[entries] = total[: entries.stop - entries.start].mul_(self.call.head.scale * self.most)

    def buffers(self, across: int, along: int, most: int | None = None) -> tuple[int, int, Tensor, Tensor]:
        """A band's height, how far a buffer of its gradient goes, the band's accumulator, and that buffer."""
        hidden = self.student.hidden
        height = min(_blocks(across), max(1, ACCUMULATOR_BYTES // (4 * hidden.shape[1] * BLOCK))) * BLOCK
        blocks = min(_blocks(along), max(1, GRADIENT_BYTES // (hidden.element_size() * height * BLOCK)))
        length = min(blocks, most or blocks) * BLOCK
        total = torch.empty(height, hidden.shape[1], device=hidden.device)
        return height, length, total, hidden.new_empty(height * length)

    def multiply(self, gradient: Tensor, live: Tensor | None, other: Tensor, total: Tensor, fresh: bool) -> None:
        """``total += gradient other`` by the tiles that are live."""
        order, counts = None, None
        if live is not None:
            order = live.contiguous().argsort(dim=1, descending=True, stable=True).int()
            counts = live.sum(1, dtype=torch.int32)
        width = other.shape[1]
        product_kernel[(gradient.shape[0] // BLOCK, _blocks(width))](
            gradient, other, total, order, counts, gradient.shape[1], other.shape[0] - 1, width,
            *gradient.stride(), other.stride(0), 0 if order is None else order.stride(0), FRESH=fresh,
            PRECISION=self.student.precision, BLOCK=BLOCK, BLOCK_K=self.student.depth, **self.options,
        )  # fmt: skip


class _Model:
    """Hidden states and their head as the kernels take them."""

    def __init__(self, hidden: Any, head: Head):
        self.hidden, self.weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, head.weight))
        self.bias = None if head.bias is None else head.bias.contiguous()
        self.itemsize = hidden.element_size()
        self.depth = 128 // self.itemsize
        exact = hidden.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        self.precision = "interpreted" if not hidden.is_cuda else "ieee" if exact else "tf32"
        self.even = hidden.shape[1] % self.depth == 0
        self.shape = (hidden.shape[1], self.hidden.stride(0), self.weight.stride(0), head.scale, head.softcap or None)


def tile_width(phase: Any, symbol: str | None, labels: bool, smoothed: bool, itemsize: int, older: bool) -> int:
    """Entries of the logits' tiles: as many as registers hold without spilling.

    phase: TOTALS, GRADIENT, or None for the statistics. symbol: the divergence's, None without a teacher. itemsize: of
    the wider model's inputs. older: see `launch.Device.without_wide_products`.
    """
    if phase is None or itemsize == 4:
        return BLOCK if itemsize == 2 else 64 if phase is None else 32
    width = BLOCK
    if phase.value == TOTALS.value or labels or symbol:
        width = 32 if symbol == "Alpha" or (labels and symbol) or (smoothed and older) else 64
    return max(32 if symbol == "Alpha" else 16, width // 2) if older and symbol else width


def _blocks(count: int) -> int:
    return math.ceil(count / BLOCK)


def _bands(count: int, step: int) -> Iterator[slice]:
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))
