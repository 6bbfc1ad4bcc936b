"""Rows of logits as every sweep reads them, and their gradients as it writes them.

A row lies in lines of 16 bytes, LINE entries each, and need not start with one: it is read and written by lines from
the one that it starts in, where its entries are `bounds`, [first, last), and what is beside them is somebody else's.
LINE is 1 where rows of the models, or of a gradient, start at different places of lines: each entry is then by itself.
"""

import triton
import triton.language as tl

from ..launch import LINE_BYTES as _LINE_BYTES
from .terms import exp

LINE_BYTES = tl.constexpr(_LINE_BYTES)


@triton.jit
def _tanh(x):
    # a series where 1 - e would lose digits (Cephes' tanhf), exponentials elsewhere
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    e = exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def capped(x, cap):
    """``cap·tanh(x/cap)``."""
    if cap is None:
        return x
    else:
        # a choice, so that the product is no part of a sum's instruction: logits of equal models are equal
        return tl.where(x == x, cap * _tanh(x / cap), x)


@triton.jit
def cap_slope(z, cap):
    """``∂ capped / ∂z`` of what is capped already."""
    return 1.0 if cap is None else 1 - (z / cap) * (z / cap)


@triton.jit
def row_at(base, n, inner, outer_stride, inner_stride):
    """Where row n of (outer, inner, V) starts; 64 bits, since N·V may be beyond 2³¹."""
    n = tl.cast(n, tl.int64)
    return base + (n // inner) * outer_stride + (n % inner) * inner_stride


@triton.jit
def first_of(row, LINE: tl.constexpr):
    """How many entries of its first line lie before a row."""
    if LINE == 1:
        return 0
    else:
        return (row.to(tl.int64) % LINE_BYTES).to(tl.int32) // (LINE_BYTES // LINE)


@triton.jit
def line_of(row, first, LINE: tl.constexpr):
    """Where a row's first line starts."""
    if LINE == 1:
        return row
    else:
        return tl.multiple_of(row - first, LINE_BYTES)


@triton.jit
def line_at(base, n, inner, outer_stride, inner_stride, first, LINE: tl.constexpr):
    """Where the first line of row n starts."""
    return line_of(row_at(base, n, inner, outer_stride, inner_stride), first, LINE)


@triton.jit
def within(v, bounds):
    """Whether entries are the row's own."""
    return (v >= bounds[0]) & (v < bounds[1])


@triton.jit
def is_whole(start, bounds, BLOCK: tl.constexpr):
    """Whether all of the block from `start` is the row's own."""
    return (start >= bounds[0]) & (start + BLOCK <= bounds[1])


@triton.jit
def load_logits(row, v, vocabulary, cap):
    """A row's logits at v, capped; −inf beyond the vocabulary."""
    x = tl.load(row + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
    return x if cap is None else tl.where(v < vocabulary, capped(x, cap), float("-inf"))


@triton.jit
def fetched(row, start, left, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """A block of a row's own entries as it lies in memory, for `logits_of`. left: how many there are; None: some.

    bfloat16 comes by pairs: an instruction each to float32, where one by one the second of a pair takes two.
    """
    PAIRS: tl.constexpr = LINE > 1 and row.dtype.element_ty == tl.bfloat16
    COUNT: tl.constexpr = BLOCK // 2 if PAIRS else BLOCK
    at = tl.arange(0, COUNT)
    mask = None if left is None else at < left * COUNT
    if PAIRS:
        return tl.load((row + start).to(tl.pointer_type(tl.int32)) + at, mask=mask)
    else:
        return tl.load(row + start + at, mask=mask)


@triton.jit
def logits_of(block, cap):
    """A fetched block's logits, capped."""
    if block.dtype == tl.int32:
        low, high = (block << 16).to(tl.float32, bitcast=True), (block & -65536).to(tl.float32, bitcast=True)
        return capped(tl.reshape(tl.join(low, high), [2 * block.shape[0]]), cap)
    else:
        return capped(block.to(tl.float32), cap)


@triton.jit
def load_within(row, v, bounds, cap):
    """A row's logits at v, capped; −inf out of bounds."""
    inside = within(v, bounds)
    x = tl.load(row + v, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(inside, capped(x, cap), float("-inf"))


@triton.jit
def _in_whole_lines(v, bounds, LINE: tl.constexpr):
    """Whether entries are in lines that are all the row's own."""
    line = v // LINE * LINE
    return (line >= bounds[0]) & (line + LINE <= bounds[1])


@triton.jit
def load_block(row, start, bounds, cap, CLEAR: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """Logits from `start`, capped; −inf out of bounds. CLEAR: none of the block is; else whole lines, and of lines that
    are not all the row's own what is: a tensor may end there.
    """
    v = start + tl.arange(0, BLOCK)
    if CLEAR:
        return logits_of(fetched(row, start, None, BLOCK, LINE), cap)
    elif LINE == 1:
        return load_within(row, v, bounds, cap)
    else:
        whole, inside = _in_whole_lines(v, bounds, LINE), within(v, bounds)
        x = tl.load(row + v, mask=whole, other=float("-inf"))
        if not is_whole(start, bounds, BLOCK):
            x = tl.where(whole, x, tl.load(row + v, mask=inside & (whole == 0), other=float("-inf")))
        x = x.to(tl.float32)
        return x if cap is None else tl.where(inside, capped(x, cap), float("-inf"))


@triton.jit
def store_block(row, start, bounds, x, CLEAR: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """CLEAR: all of it; else as `load_block`."""
    v = start + tl.arange(0, BLOCK)
    if CLEAR:
        tl.store(row + v, x)
    else:
        inside = within(v, bounds)
        if LINE > 1:
            whole = _in_whole_lines(v, bounds, LINE)
            tl.store(row + v, x, mask=whole)
            inside = inside & (whole == 0)
        tl.store(row + v, x, mask=inside)


@triton.jit
def zero_row(row, begin, end, bounds, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """Zeros in [begin, end) of an ignored row's gradient."""
    if row is not None:
        for start in tl.range(begin, end, BLOCK):
            store_block(row, start, bounds, tl.zeros([BLOCK], tl.float32), False, BLOCK, LINE)
