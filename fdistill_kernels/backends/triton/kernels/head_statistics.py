"""Sweep 1 of the cut path: hidden states and a head to shares of a row's log-sum-exp."""

import triton
import triton.language as tl

from .heads import OfHead, head_logits
from .softmaxes import LOWEST
from .terms import exp
from .tiles import block_of_rows


@triton.jit
def _grown(top, total, new, z, rate):
    """Σ exp(rate·(z − top)) with a tile's entries added and the maximum moved to `new`."""
    return total * exp((top - new) * rate) + tl.sum(exp((z - new[:, None]) * rate[:, None]), 1)


@triton.jit
def statistics_kernel(
    hidden,  # (rows, width)
    weight, bias,  # (vocabulary, width), (vocabulary)
    row_scale, rates, labels,  # (rows); rates are 1/T
    partials,  # (4, splits, rows) float32
    rows, vocabulary, width, hidden_stride, weight_stride, scale, cap, span,
    PLAIN: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Into partials: one model's maximum, total, total at temperature 1 (PLAIN) and label's logit.

    Grid: (blocks of rows in a group, splits, groups); a split is a span of the vocabulary. Blocks of masked rows alone
    do nothing.
    """
    model = OfHead(hidden, weight, bias, width, hidden_stride, weight_stride, scale, cap)
    n = block_of_rows() * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    rate = tl.load(rates + n, mask=inside, other=1.0)
    top = tl.zeros([BLOCK], tl.float32) + LOWEST
    total, plain, label_logit = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), 0.0 * rate
    label = n
    if labels is not None:
        label = tl.load(labels + n, mask=inside, other=-1)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, vocabulary)
    if tl.max((tl.load(row_scale + n, mask=inside, other=0.0) != 0).to(tl.int32), 0) == 0:
        end = begin
    for start in tl.range(begin, end, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = head_logits(model, n, v, rows, vocabulary, EVEN, PRECISION, BLOCK, BLOCK_V, BLOCK_D)
        new = tl.maximum(top, tl.max(z, 1))
        total = _grown(top, total, new, z, rate)
        if PLAIN:
            plain = _grown(top, plain, new, z, tl.zeros([BLOCK], tl.float32) + 1.0)
        if labels is not None:
            label_logit += tl.sum(tl.where(v[None, :] == label[:, None], z, 0.0), 1)
        top = new
    field = rows * tl.num_programs(1)
    to = partials + tl.program_id(1) * rows + n
    tl.store(to, top, mask=inside)
    tl.store(to + field, total, mask=inside)
    tl.store(to + 2 * field, plain, mask=inside)
    tl.store(to + 3 * field, label_logit, mask=inside)
