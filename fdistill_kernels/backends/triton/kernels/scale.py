"""The upstream factor of a gradient that is already there."""

import triton
import triton.language as tl

from .loads import row_at


@triton.jit
def scale_kernel(gradient, factors, rows, inner, vocabulary, outer_stride, inner_stride, PER_ROW: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Multiplies rows by their factor, in place; nothing is read or written where it is 1, as it nearly always is."""
    factor = tl.load(factors)
    for n in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        if PER_ROW:
            factor = tl.load(factors + n)
        if factor != 1:
            row = row_at(gradient, n, inner, outer_stride, inner_stride)
            for start in tl.range(0, vocabulary, BLOCK):
                v = start + tl.arange(0, BLOCK)
                value = tl.load(row + v, mask=v < vocabulary).to(tl.float32)
                tl.store(row + v, value * factor, mask=v < vocabulary)
