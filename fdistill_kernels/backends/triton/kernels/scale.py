"""The upstream factor of a gradient that is already there."""

import triton
import triton.language as tl

from .loads import row_at


@triton.jit
def scale_kernel(
    gradient,  # (outer, inner, vocabulary)
    factors, row_scale,  # (rows), or (1) without PER_ROW; (rows)
    rows, inner, vocabulary, outer_stride, inner_stride, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiplies rows by their factor, in place; nothing is read or written where it is 1, as it nearly always is, or
    where a row_scale is 0.
    """
    for n in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        factor = tl.load(factors + n) if PER_ROW else tl.load(factors)
        if row_scale is not None:
            factor = tl.where(tl.load(row_scale + n) == 0, 1.0, factor)
        if factor != 1:
            row = row_at(gradient, n, inner, outer_stride, inner_stride)
            for start in tl.range(0, vocabulary, BLOCK):
                v = start + tl.arange(0, BLOCK)
                value = tl.load(row + v, mask=v < vocabulary).to(tl.float32)
                tl.store(row + v, value * factor, mask=v < vocabulary)
