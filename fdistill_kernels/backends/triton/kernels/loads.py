"""Rows of logits as every sweep reads them."""

import triton
import triton.language as tl

from .terms import exp


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
    return x if cap is None else cap * _tanh(x / cap)


@triton.jit
def load_logits(row, v, vocabulary, cap, edge=False, LINE: tl.constexpr = 1):
    """A row's logits at v, capped; −inf beyond the vocabulary.

    LINE: entries that are read at once, or not, as one: more than 1 only where rows start on whole lines, so that
    the last line lies in memory, though the vocabulary may end in it; `edge`: whether it may end within v.
    """
    x = tl.load(row + v, mask=v // LINE * LINE < vocabulary, other=float("-inf")).to(tl.float32)
    if LINE > 1:  # noqa: SIM102  (one is known to the compiler, the other to the card)
        if edge:
            x = tl.where(v < vocabulary, x, float("-inf"))
    if cap is not None:
        x = tl.where(v < vocabulary, capped(x, cap), float("-inf"))
    return x


@triton.jit
def store_gradient(row, v, vocabulary, gradient, edge, LINE: tl.constexpr):
    """Whole lines at once, what the vocabulary leaves of its last one entry by entry."""
    if LINE > 1:
        whole = v // LINE * LINE + LINE <= vocabulary
        tl.store(row + v, gradient, mask=whole)
        if edge:
            tl.store(row + v, gradient, mask=(v < vocabulary) & (v // LINE * LINE + LINE > vocabulary))
    else:
        tl.store(row + v, gradient, mask=v < vocabulary)


@triton.jit
def zero_row(row, begin, end, vocabulary, BLOCK: tl.constexpr):
    """Zeros in [begin, end) of an ignored row's gradient."""
    if row is not None:
        for start in tl.range(begin, end, BLOCK):
            v = start + tl.arange(0, BLOCK)
            tl.store(row + v, tl.zeros([BLOCK], tl.float32), mask=v < vocabulary)


@triton.jit
def row_at(base, n, inner, outer_stride, inner_stride):
    """Where row n of (outer, inner, V) starts; 64 bits, since N·V may be beyond 2³¹."""
    n = tl.cast(n, tl.int64)
    return base + (n // inner) * outer_stride + (n % inner) * inner_stride
