"""The cut path of the linear losses: no logits in memory, however large N and V are (cf. Cut Cross-Entropy, ICLR 2025).

Four sweeps over tiles of logits, each making them anew from hidden states and heads:
    1. log-sum-exps of both models
    2. D and S of each row, and which tiles matter to the gradient
    3. tiles of the logits' gradient for a band of rows, through all the vocabulary: ∂hidden of the band
    4. the same for a band of the vocabulary, through all the rows: ∂weight and ∂bias of the band
A band's gradient is summed in float32, in a tile for each of the card's processors, or as many as MEMORY holds; the
logits' gradient passes through a buffer, of what is left of it: sweeps 3 and 4 are pairs of launches, one that fills
the buffer and one that adds its product to the sum, with nothing between. Where more memory is given, and holds all of
∂hidden in float32, sweep 4 adds to that, too, and there is no sweep 3. No atomics: the same inputs give the same bits.
Ten products, or eight, where the chunked path has four; a tile that does not matter costs those of the first two
sweeps alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ...formulas import times
from ...values import Head
from .. import triton as triton_backend
from ..rows import LinearCall, gpu_symbol, log_sum_exp, split
from . import launch
from .compiled import kind_of
from .kernels.head_statistics import statistics_kernel
from .kernels.tile_products import product_kernel
from .kernels.tiles import BLOCK, FACTS, GRADIENT, TOTALS, tile_kernel

#: Bytes of a call's facts of its rows, of a band's sum, and of the buffer of its gradient's tiles, if none are given:
#: the fewer, the shorter are launches, each of which starts anew and takes its sums from memory and back.
MEMORY = 14 << 20
SMALLEST = torch.finfo(torch.float32).tiny
#: Of the buffer, which 32 bits index; and of a band's part, whose blocks' flags and shares a program has in registers.
MOST_TILES, LONGEST = (1 << 31) // BLOCK**2 - 1, 256
#: Blocks of rows that share a span's entries in L2 while others share theirs, and waves of programs in such a sweep.
GROUP, WAVES = 8, 8
#: Symbols whose totals' registers would spill beside two whole tiles.
HEAVY_TOTALS = ("Jeffreys", "SkewKl", "SkewRkl", "Alpha", "Triangular", "Todi")
#: Symbols whose gradient of entries with p, q < ε/V has an L1 norm under 2ε: |q·(g − S)| ≤ 2·max(p, q).
SKIPPABLE = ("Kl", "CrossEntropy", "Gjs", "SkewKl", "Tvd")


def linear_rows(call: LinearCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts (3, N), and the gradients of hidden states, weight and bias, one not wanted empty."""
    with launch.on(call.hidden.device):
        return _Sweeps(call).run()


class _Sweeps:
    """A call's facts of each row, gathered sweep by sweep."""

    def __init__(self, call: LinearCall):
        # float16 tiles of a row's gradient must not underflow, however little it weighs; a masked row counts 0 times
        terms = call.terms
        self.power, self.most = terms.row_scale.new_ones(1), terms.row_scale.new_ones(())
        self.share = (terms.row_scale != 0).to(call.hidden.dtype)
        if call.hidden.dtype == torch.float16:
            terms, self.power = split(terms)
            self.most = (self.power * self.share).amax().clamp_min(SMALLEST)
            self.share = self.share * (self.power / self.most)
            call = call._replace(terms=terms)
        self.call = call
        self.rows, self.vocabulary = call.hidden.shape[0], call.head.weight.shape[0]
        self.facts = terms.row_scale.new_zeros(len(FACTS), self.rows)
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
        self.card = card = launch.device_of(call.hidden.device)
        self.options = {"num_warps": 8 * 32 // card.lanes, "num_stages": stages(card), **launch.ALWAYS}
        # whole waves: a last one of a few programs would take as long as the others
        blocks = _blocks(self.rows)
        widest = statistics_width(card)
        splits = min(max(1, WAVES * card.processors // blocks), math.ceil(self.vocabulary / widest))
        self.span = math.ceil(self.vocabulary / (splits * widest)) * widest
        self.splits, groups = -(-self.vocabulary // self.span), -(-blocks // GROUP)
        self.grid = (-(-blocks // groups), self.splits, groups)
        held = self.facts.nbytes + (0 if self.live is None else self.live.nbytes)
        memory = (call.path.chunk_bytes or MEMORY) - held
        wide, sum_tile, tile = _blocks(call.hidden.shape[1]), 4 * BLOCK**2, self.student.itemsize * BLOCK**2
        sums = 2 * card.processors
        left = memory - (blocks * wide + sums) * sum_tile
        self.in_one = all(call.wants[:2]) and left >= sums * tile
        if not self.in_one:
            sums = max(1, min(card.processors, memory // (sum_tile + tile)))
            left = memory - max(sums, wide) * sum_tile
        tiles = min(max(1, left // tile), MOST_TILES)
        self.height = max(1, sums // wide)  # of a band, in blocks
        self.tiles_at_once = tiles // card.processors * card.processors or tiles  # whole waves

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        call, parts = self.call, self.parts()
        of_hidden, of_weight = (torch.empty_like(x) if want else x.new_empty(0) for x, want in (
            (call.hidden, call.wants.hidden), (call.head.weight, call.wants.weight)))  # fmt: skip
        of_bias = self.facts.new_zeros(_blocks(self.vocabulary) * BLOCK if call.wants.bias else 0)
        total = self.facts.new_empty(_blocks(self.rows) * BLOCK, of_hidden.shape[1]) if self.in_one else None
        if call.wants.hidden and total is None:
            self.hidden_gradient(of_hidden)
        if call.wants.weight or call.wants.bias:
            self.weight_gradient(of_weight, of_bias, total)
        if total is not None:
            of_hidden.copy_(total[: self.rows].mul_(self.row_factors))
        return parts.mul_(self.power), of_hidden, of_weight, of_bias[: self.vocabulary].mul_(self.most)

    def parts(self) -> Tensor:
        """Sweeps 1 and 2: the parts, and all the facts."""
        call, terms, fact = self.call, self.call.terms, self.fact
        fact["scale"].copy_(terms.row_scale)
        label_logit = self.statistics()
        divergence, linear = self.totals()
        scale = terms.divergence_scale * (call.divergence.scale if call.divergence else 1)
        cross_entropy, squared_lse = self.label_terms(label_logit, linear)
        fact["of_divergence"].copy_(terms.row_scale * scale * fact["student_rate"])
        values = (times(scale, divergence), cross_entropy, squared_lse)
        return torch.stack([torch.where(terms.row_scale != 0, terms.row_scale * x, 0) for x in values])

    def statistics(self) -> Tensor:
        """Sweep 1, into facts; the label's logit of each row."""
        terms, fact = self.call.terms, self.fact
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
            partials = self.facts.new_empty(4, self.splits, self.rows)
            statistics_kernel[self.grid](
                head.hidden, head.weight, head.bias, terms.row_scale, rate, terms.labels if of_student else None,
                partials, self.rows, self.vocabulary, *head.shape, self.span, PLAIN=plain and of_student,
                EVEN=head.even, PRECISION=head.precision, BLOCK_D=head.depth, BLOCK=BLOCK,
                BLOCK_V=tile_width(None, None, False, False, head.itemsize, self.card), **self.options,
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
        partials = self.facts.new_empty(3, self.splits, self.rows)
        self.tiles(TOTALS, partials=partials)(self.grid, span=self.span, first_row=0, first_entry=0, gradient_stride=0)
        divergence, weight, linear = partials.sum(1)
        if self.call.divergence is not None and not self.call.divergence.centred:
            self.fact["weight"].copy_(weight)
        return divergence, linear

    def label_terms(self, label_logit: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and lse² of each row; their gradient's factors into facts."""
        terms, fact = self.call.terms, self.fact
        if terms.labels is None:
            return torch.zeros_like(linear), torch.zeros_like(linear)
        spread = terms.label_smoothing / self.vocabulary
        of_label = torch.full_like(linear, 1 - terms.label_smoothing)
        weight_sum: Any = self.vocabulary
        if terms.class_weight is not None:
            known = torch.where(terms.row_scale != 0, terms.labels, 0)
            of_label, weight_sum = of_label * terms.class_weight[known], terms.class_weight.sum()
        cross_entropy = times(of_label, fact["student_top"] - label_logit + fact["plain_log_total"]) - spread * linear
        lse = log_sum_exp(fact["student_top"], fact["plain_log_total"])
        weight = terms.row_scale * terms.cross_entropy_scale
        of_spread = spread * weight_sum if spread else 0
        fact["of_q"].copy_(weight * (of_label + of_spread) + terms.row_scale * 2 * terms.z_loss_scale * lse)
        fact["of_label"].copy_(weight * of_label)
        fact["of_weight"].copy_(weight * spread)
        return cross_entropy, lse**2

    def tiles(self, phase: Any, partials: Tensor | None = None, gradient: Tensor | None = None) -> Callable[..., None]:
        """A launch of `tile_kernel`, but for its grid and where it is; made once a sweep."""
        call, terms, student, teacher = self.call, self.call.terms, self.student, self.teacher
        symbol = gpu_symbol(call.divergence) if call.divergence else None
        kind = triton_backend.kind_of(call.divergence, teacher_gradient=False)
        log_threshold = math.log(torch.finfo(call.hidden.dtype).eps / self.vocabulary)
        widest = max(model.itemsize for model in (student, teacher) if model)
        return _launch(
            tile_kernel,
            student.hidden, student.weight, student.bias, teacher and teacher.hidden, teacher and teacher.weight,
            teacher and teacher.bias, self.facts, terms.labels, terms.class_weight if self.smoothed else None,
            self.live, partials, gradient, self.rows, self.vocabulary, *student.shape, *(teacher or student).shape,
            log_threshold=log_threshold, **triton_backend.constants(call.divergence), TERMS=kind.TERMS,
            FACTORS=kind.FACTORS, EXCHANGED=kind.EXCHANGED, SMOOTHED=self.smoothed, PHASE=phase,
            STUDENT_EVEN=student.even, STUDENT_PRECISION=student.precision, STUDENT_D=student.depth,
            TEACHER_EVEN=(teacher or student).even, TEACHER_PRECISION=(teacher or student).precision,
            TEACHER_D=(teacher or student).depth, BLOCK=BLOCK,
            BLOCK_V=tile_width(phase, symbol, terms.labels is not None, self.smoothed, widest, self.card),
            **self.options,
        )  # fmt: skip

    @property
    def row_factors(self) -> Tensor:
        """(N, 1), of the sums of ∂hidden."""
        return (self.power * self.call.head.scale).expand(self.rows).unsqueeze(1)

    def hidden_gradient(self, of_hidden: Tensor) -> None:
        """Sweep 3."""
        factors = self.row_factors
        for rows, total in self.sums(self.rows, self.vocabulary, of_hidden.shape[1]):
            of_hidden[rows] = total.mul_(factors[rows])

    def weight_gradient(self, of_weight: Tensor, of_bias: Tensor, of_hidden: Tensor | None) -> None:
        """Sweep 4; with the sums of ∂hidden, in place of sweep 3."""
        factor = self.most * self.call.head.scale
        width = self.call.hidden.shape[1]
        for entries, total in self.sums(self.vocabulary, self.rows, width, of_bias, of_hidden):
            if self.call.wants.weight:
                of_weight[entries] = total.mul_(factor)

    def product(self, buffer: Tensor, by_row: bool, of_bias: Tensor | None = None) -> Callable[..., None]:
        """A launch of `product_kernel` with the head's weights, for ∂hidden, or with the hidden states and their
        shares, for ∂weight and ∂bias.
        """
        student, vertical = self.student, _blocks(self.vocabulary)
        other, share = (student.weight, None) if by_row else (student.hidden, self.share)
        return _launch(
            product_kernel, buffer, other, share, out_bias=of_bias if self.call.wants.bias and not by_row else None,
            live=self.live, k_last=len(other) - 1, width=other.shape[1], other_stride=other.stride(0),
            i_live=vertical if by_row else 1, k_live=1 if by_row else vertical,
            SHARED=share is not None and other.dtype == torch.float16, PRECISION=student.precision,
            STAGES=stages(self.card), BLOCK=BLOCK, BLOCK_K=student.depth, **self.options,
        )  # fmt: skip

    def sums(self, across: int, along: int, width: int, of_bias: Tensor | None = None,
             of_hidden: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
        """Bands across, and the sum of each along the other dimension: sweep 4; without of_bias sweep 3, of rows."""
        by_row, wide = of_bias is None, _blocks(width)
        height = min(self.height, _blocks(across), self.tiles_at_once)
        total = self.facts.new_empty(height * BLOCK, width)
        buffer = self.student.hidden.new_empty(self.tiles_at_once * BLOCK * BLOCK)
        tiles, multiply = self.tiles(GRADIENT, gradient=buffer), self.product(buffer, by_row, of_bias)
        multiply_weight = self.product(buffer, True) if of_hidden is not None else None
        for band in _bands(across, height * BLOCK):
            high = _blocks(band.stop - band.start)
            long = min(max(1, self.tiles_at_once // high), _blocks(along), LONGEST)
            for part in _bands(along, long * BLOCK):
                size = high, _blocks(part.stop - part.start)
                rows, entries = (band, part) if by_row else (part, band)
                stride = _blocks(entries.stop - entries.start) * BLOCK
                tiles(size if by_row else size[::-1], span=BLOCK, first_row=rows.start, first_entry=entries.start,
                      gradient_stride=stride)  # fmt: skip
                multiply((high, wide), out=total, i_first=band.start, k_first=part.start, k_count=size[1] * BLOCK,
                         i_stride=stride if by_row else 1, k_stride=1 if by_row else stride,
                         BLOCKS=triton.next_power_of_2(long))  # fmt: skip
                if multiply_weight is not None and of_hidden is not None:
                    multiply_weight((size[1], wide), out=of_hidden[part], i_first=part.start, k_first=band.start,
                                    k_count=high * BLOCK, i_stride=stride, k_stride=1,
                                    BLOCKS=triton.next_power_of_2(height))  # fmt: skip
            yield band, total[: band.stop - band.start]


def _launch(kernel: Any, *arguments: Any, **keywords: Any) -> Callable[..., None]:
    """``kernel[grid](*arguments, **keywords, **more)`` as a function of grid and more; what stays is made once.

    So is Triton's search for what it has compiled for such arguments, which takes the host longer than the kernel runs:
    that is kept for launches that it does not tell apart. Its interpreter compiles nothing.
    """
    every = {**dict.fromkeys(kernel.arg_names), **dict(zip(kernel.arg_names, arguments, strict=False))}
    every |= {name: x for name, x in keywords.items() if name in every}
    compiled: dict[Any, Any] = {}

    def run(grid: tuple[int, ...], **more: Any) -> None:
        kind = tuple([x if name.isupper() else kind_of(x) for name, x in more.items()])  # constants by value
        whole = (*grid, 1)  # of three dimensions
        if compiled.get(kind) is None:
            compiled[kind] = kernel[grid](*arguments, **keywords, **more)
        else:
            compiled[kind][whole](*(every | more).values())

    return run


class _Model:
    """Hidden states and their head as the kernels take them."""

    def __init__(self, hidden: Any, head: Head):
        self.hidden, self.weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, head.weight))
        self.bias = None if head.bias is None else head.bias.contiguous()
        self.itemsize = hidden.element_size()
        self.depth = 128 // self.itemsize
        exact = hidden.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        self.precision = "interpreted" if triton_backend.interpreting() else "ieee" if exact else "tf32"
        self.even = hidden.shape[1] % self.depth == 0
        self.shape = (hidden.shape[1], self.hidden.stride(0), self.weight.stride(0), head.scale, head.softcap or None)


def stages(card: launch.Device) -> int:
    """Tiles of operands in flight: more where whole tiles leave the card one program a multiprocessor."""
    return 4 if card.generation == 9 else 3 if card.lanes == 32 else 2


def statistics_width(card: launch.Device) -> int:
    """Entries of sweep 1's tiles of 16-bit models, of which its spans are whole ones; wide products hold more."""
    return 2 * BLOCK if card.generation == 9 else BLOCK


def tile_width(phase: Any, symbol: str | None, labels: bool, smoothed: bool, itemsize: int, card: launch.Device) -> int:
    """Entries of the logits' tiles: as many as registers hold without spilling. Narrow tiles load their rows again.

    phase: TOTALS, GRADIENT, or None for the statistics. symbol: the divergence's, None without a teacher. itemsize: of
    the wider model's inputs.
    """
    if phase is None or itemsize == 4:
        narrow = 64 if phase is None else 32
        return narrow if itemsize == 4 else statistics_width(card)
    width, older, totals = BLOCK, card.without_wide_products, phase.value == TOTALS.value
    light = not totals or (card.generation == 9 and symbol not in HEAVY_TOTALS)
    if card.generation and light and not smoothed and symbol not in ("Ab", "own"):
        return width
    if totals or labels or symbol:
        width = 32 if symbol == "Alpha" or (labels and symbol) or (smoothed and older) else 64
    return max(32 if symbol == "Alpha" else 16, width // 2) if older and symbol else width


def _blocks(count: int) -> int:
    return math.ceil(count / BLOCK)


def _bands(count: int, step: int) -> Iterator[slice]:
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))
