"""A sweep's order of blocks, and its stretches of CLEAR ones: whole, and without what asks for choices.

A stretch has a loop of its own without a test or a branch. Its blocks are none or a thousand, and even: two are on
their way from memory while one is worked on, which alone would wait some 760 cycles for its logits, as long as a sweep
takes for it. What lies between two stretches is one block: a row's edge, or one with the row's peak or its label, or an
odd one.
"""

import triton
import triton.language as tl

from .loads import fetched

#: The places of an entry that several blocks may hold, and of one that no block of the span does.
ANYWHERE, NOWHERE = tl.constexpr(-1), tl.constexpr(-2)


@triton.jit
def start_of(k, begin, end, FORWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Where the k-th block of a sweep over [begin, end) starts."""
    return begin + k * BLOCK if FORWARD else begin + (tl.cdiv(end - begin, BLOCK) - 1 - k) * BLOCK


@triton.jit
def fetched_of(rows, start, left, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """A block of both rows on its way, or of one row twice."""
    block = fetched(rows[0], start, left, BLOCK, LINE)
    if rows[1] is None:
        return block, block
    else:
        return block, fetched(rows[1], start, left, BLOCK, LINE)


@triton.jit
def first_two(
    rows, k, stop, begin, end, FORWARD: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr
):  # fmt: skip
    """The first blocks of a stretch from the k-th on, on their way; nothing of one without blocks."""
    start = start_of(k, begin, end, FORWARD, BLOCK)
    second = start + BLOCK if FORWARD else start - BLOCK
    return fetched_of(rows, start, stop - k, BLOCK, LINE), fetched_of(rows, second, stop - k, BLOCK, LINE)


@triton.jit
def _nearest(found, k, place, begin, end, FORWARD: tl.constexpr, BLOCK: tl.constexpr):
    """The block of a place, if it comes before the one found and not before k."""
    at = (place - begin) // BLOCK
    at = at if FORWARD else tl.cdiv(end - begin, BLOCK) - 1 - at
    there = (place >= begin) & (place < end) & (at >= k) & (at < found)
    return tl.where(there, at, found)


@triton.jit
def clear_until(k, begin, end, bounds, peak, label, FORWARD: tl.constexpr, BLOCK: tl.constexpr):
    """An even number of blocks after the k-th, before all that are not clear."""
    found = tl.cdiv(end - begin, BLOCK)
    edge = tl.where(begin < bounds[0], begin, NOWHERE)
    found = _nearest(found, k, edge, begin, end, FORWARD, BLOCK)
    edge = tl.where((end - begin) % BLOCK != 0, end - 1, NOWHERE)
    found = _nearest(found, k, edge, begin, end, FORWARD, BLOCK)
    found = _nearest(found, k, label, begin, end, FORWARD, BLOCK)
    found = tl.where(peak == ANYWHERE, k, _nearest(found, k, peak, begin, end, FORWARD, BLOCK))
    return k + (found - k) // 2 * 2
