"""Logits of a head on chip: a tile of them from hidden states and weights, on tensor cores."""

import triton
import triton.language as tl

from .loads import capped


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a b``."""
    if PRECISION == "interpreted":  # NumPy has no bfloat16 product
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def head_logits(
    hidden, weight, bias, n, v, last, vocabulary, width, hidden_stride, weight_stride, scale, cap,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The logits (BLOCK, BLOCK_V) of rows n and entries v, of hidden states (rows, width) and a weight (vocabulary,
    width); −inf beyond the vocabulary. `last`: the last row. EVEN: BLOCK_D divides the width.
    """
    d = tl.arange(0, BLOCK_D)
    left = hidden + tl.minimum(n, last).to(tl.int64)[:, None] * hidden_stride + d[None, :]
    right = weight + tl.minimum(v, vocabulary - 1).to(tl.int64)[None, :] * weight_stride + d[:, None]
    total = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    for start in tl.range(0, width, BLOCK_D):
        if EVEN:
            a, b = tl.load(left + start), tl.load(right + start)
        else:
            a = tl.load(left + start, mask=d[None, :] < width - start, other=0.0)
            b = tl.load(right + start, mask=d[:, None] < width - start, other=0.0)
        total = dot(a, b, total, PRECISION)
    z = total * scale
    if bias is not None:
        z += tl.load(bias + tl.minimum(v, vocabulary - 1)).to(tl.float32)[None, :]
    return tl.where((v < vocabulary)[None, :], capped(z, cap), float("-inf"))
