"""Sweeps 3 and 4 of the cut path: tiles of the logits' gradient to the gradient of hidden states or weights."""

import triton
import triton.language as tl

from .heads import dot


@triton.jit
def product_kernel(
    gradient, other, out, order, counts, k_count, k_last, width, i_stride, k_stride, other_stride, order_stride,
    FRESH: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out (I, width) += gradient (I, K) other (K, width)`` in float32; FRESH: without the old out.

    Strides make the gradient's buffer a matrix or its transpose; I and K are whole tiles. With `order`, (I's blocks,
    K's blocks), block i meets only the first counts[i] of its K's blocks. Grid: (I's blocks, the width's blocks).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    steps = k_count // BLOCK_K
    if order is not None:
        steps = tl.load(counts + tl.program_id(0)) * (BLOCK // BLOCK_K)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in tl.range(0, steps):
        first = step * BLOCK_K
        if order is not None:
            block = tl.load(order + tl.program_id(0) * order_stride + first // BLOCK)
            first = block.to(tl.int32) * BLOCK + first % BLOCK
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(gradient + i[:, None] * i_stride + k[None, :] * k_stride)
        rows_of_other = tl.minimum(k, k_last).to(tl.int64)[:, None] * other_stride
        b = tl.load(other + rows_of_other + j[None, :], mask=j[None, :] < width, other=0.0)
        total = dot(a, b, total, PRECISION)
    to = out + i[:, None] * width + j[None, :]
    if not FRESH:
        total += tl.load(to, mask=j[None, :] < width, other=0.0)
    tl.store(to, total, mask=j[None, :] < width)
