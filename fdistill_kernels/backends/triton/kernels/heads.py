"""Logits of a head on chip: a tile of them from hidden states and weights, on tensor cores."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loads import capped


class OfHead(NamedTuple):
    """What logits are made of: hidden states (rows, width), a head's weight (vocabulary, width), its bias (vocabulary),
    the strides of rows, the logits' scale and their cap. There may be no bias and no cap: None.
    """

    hidden: Any
    weight: Any
    bias: Any
    width: Any
    hidden_stride: Any
    weight_stride: Any
    scale: Any
    cap: Any


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a b``."""
    if PRECISION == "interpreted":  # NumPy has no bfloat16 product
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def head_logits(
    model, n, v, rows, vocabulary, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The logits (BLOCK, BLOCK_V) of rows n and entries v, of the last row beyond them and −inf beyond the vocabulary.
    EVEN: BLOCK_D divides the width.
    """
    d = tl.arange(0, BLOCK_D)
    left = model.hidden + tl.minimum(n, rows - 1).to(tl.int64)[:, None] * model.hidden_stride + d[None, :]
    right = model.weight + tl.minimum(v, vocabulary - 1).to(tl.int64)[None, :] * model.weight_stride + d[:, None]
    total = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    for start in tl.range(0, model.width, BLOCK_D):
        if EVEN:
            a, b = tl.load(left + start), tl.load(right + start)
        else:
            a = tl.load(left + start, mask=d[None, :] < model.width - start, other=0.0)
            b = tl.load(right + start, mask=d[:, None] < model.width - start, other=0.0)
        total = dot(a, b, total, PRECISION)
    z = total * model.scale
    if model.bias is not None:
        z += tl.load(model.bias + tl.minimum(v, vocabulary - 1)).to(tl.float32)[None, :]
    return tl.where((v < vocabulary)[None, :], capped(z, model.cap), float("-inf"))
