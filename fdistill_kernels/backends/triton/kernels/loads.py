"""Rows of logits as every sweep reads them."""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # a series where 1 - e would lose digits (Cephes' tanhf), exponentials elsewhere
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    e = tl.exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def capped(x, cap):
    """``cap·tanh(x/cap)``."""
    return x if cap is None else cap * _tanh(x / cap)


@triton.jit
def load_logits(row, v, vocabulary, cap):
    """A row's logits at v, capped; −inf beyond the vocabulary."""
    x = tl.load(row + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
    if cap is not None:
        x = tl.where(v < vocabulary, capped(x, cap), float("-inf"))
    return x


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
