"""Sweeps 3 and 4 of the cut path: tiles of the logits' gradient to the gradient of hidden states or weights."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .heads import dot


class Operands(NamedTuple):
    """What is multiplied: `product_kernel`'s arguments of the same names, and

    Attributes:
        i, j: entries of the output's tile.
        steps: blocks along K.
        reached: the number of live tiles up to each; None: all are.
    """

    gradient: Any
    other: Any
    share: Any
    i: Any
    j: Any
    k_first: Any
    k_last: Any
    width: Any
    i_stride: Any
    k_stride: Any
    other_stride: Any
    steps: Any
    reached: Any


@triton.jit
def _products(
    of, BIASED: tl.constexpr, EVERY: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum over all steps, and the gradient's own. EVERY: each tile is live and each row counts, so that no load
    waits for another to say where it is, or whether.
    """
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for step in tl.range(0, of.steps, num_stages=STAGES):
        first = step * BLOCK_K
        if not EVERY and of.reached is not None:  # a live tile comes after as many as have not reached its number
            first = tl.sum((of.reached <= first // BLOCK).to(tl.int32), 0) * BLOCK + first % BLOCK
        k = first + tl.arange(0, BLOCK_K)
        row = tl.minimum(of.k_first + k, of.k_last)
        a = tl.load(of.gradient + of.i[:, None] * of.i_stride + k[None, :] * of.k_stride)
        inside, weight = of.j[None, :] < of.width, tl.full([BLOCK_K], 1.0, tl.float32)
        if not EVERY and of.share is not None:
            weight = tl.load(of.share + row).to(tl.float32)
            inside = inside & (weight != 0)[:, None]
        b = tl.load(of.other + row.to(tl.int64)[:, None] * of.other_stride + of.j[None, :], mask=inside, other=0.0)
        if SHARED:
            b = (b * weight[:, None]).to(b.dtype)
        if BIASED:
            of_bias += a.to(tl.float32) * weight[None, :]
        total = dot(a, b, total, PRECISION)
    return total, tl.sum(of_bias, 1)


@triton.jit
def product_kernel(
    gradient,  # (I, K), at strides i_stride, k_stride
    other, share,  # (K, width), (K): sweep 3's weight, without shares; or sweep 4's hidden states
    out, out_bias,  # (I, width), (I's blocks · BLOCK) float32
    live,  # as `tile_kernel`'s, at strides i_live, k_live
    i_first, k_first, k_count, k_last, width, i_stride, k_stride, other_stride, i_live, k_live,
    SHARED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """``out += gradient (share · other)`` in float32, without the old out where K begins; out_bias, where given,
    ``+= gradient share``, zeros before.

    Strides make the gradient's buffer a matrix or its transpose; I and K are whole tiles from i_first and k_first on,
    in entries. A row of `other` whose share is 0 is not read: it may be NaN. Shares but 0 and 1 count only if SHARED.
    With `live` only such tiles are read, found in a vector of BLOCKS of them. Grid: (I's blocks, the width's blocks).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    steps, reached, every = tl.cdiv(k_count, BLOCK_K), None, True
    block = tl.arange(0, BLOCKS)
    if live is not None:
        flags = live + (i_first // BLOCK + tl.program_id(0)) * i_live + (k_first // BLOCK + block) * k_live
        reached = tl.cumsum((tl.load(flags, mask=block < k_count // BLOCK, other=0) != 0).to(tl.int32), 0)
        steps = tl.max(reached, 0) * (BLOCK // BLOCK_K)
        every = steps == tl.cdiv(k_count, BLOCK_K)
    if share is not None:
        shares = tl.load(share + tl.minimum(k_first + tl.arange(0, BLOCKS * BLOCK), k_last))
        every = every & (tl.min((shares != 0).to(tl.int32), 0) != 0)
    BIASED: tl.constexpr = out_bias is not None
    # of 16-bit operands, whose two loops the registers hold
    CHOICE: tl.constexpr = STAGES > 3 and BLOCK_K > 32 and not SHARED and (live is not None or share is not None)
    of = Operands(
        gradient, other, share, i, j, k_first, k_last, width, i_stride, k_stride, other_stride, steps, reached
    )
    if CHOICE and every:
        total, of_bias = _products(of, BIASED, True, SHARED, PRECISION, STAGES, BLOCK, BLOCK_K)
    else:
        total, of_bias = _products(of, BIASED, False, SHARED, PRECISION, 2 if CHOICE else STAGES, BLOCK, BLOCK_K)
    to = out + i[:, None] * width + j[None, :]
    if k_first != 0:
        total += tl.load(to, mask=j[None, :] < width, other=0.0)
    tl.store(to, total, mask=j[None, :] < width)
    if out_bias is not None:  # noqa: SIM102  (one is known to the compiler, the other to the card)
        if tl.program_id(1) == 0:
            to_bias = out_bias + i_first + i
            tl.store(to_bias, tl.load(to_bias) + of_bias)
