"""A sweep's order of blocks, and its stretches of CLEAR ones: whole, and without what asks for choices.

A stretch has a loop of its own without a test or a branch. Its blocks are few or a thousand; what lies between two
stretches is one block: a row's edge, or one with the row's peak or its label.
"""

import triton
import triton.language as tl

#: The places of an entry that several blocks may hold, and of one that no block of the span does.
ANYWHERE, NOWHERE = tl.constexpr(-1), tl.constexpr(-2)


@triton.jit
def start_of(k, begin, end, FORWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Where the k-th block of a sweep over [begin, end) starts."""
    return begin + k * BLOCK if FORWARD else begin + (tl.cdiv(end - begin, BLOCK) - 1 - k) * BLOCK


@triton.jit
def _nearest(found, k, place, begin, end, FORWARD: tl.constexpr, BLOCK: tl.constexpr):
    """The block of a place, if it comes before the one found and not before k."""
    at = (place - begin) // BLOCK
    at = at if FORWARD else tl.cdiv(end - begin, BLOCK) - 1 - at
    there = (place >= begin) & (place < end) & (at >= k) & (at < found)
    return tl.where(there, at, found)


@triton.jit
def clear_until(k, begin, end, bounds, peak, label, FORWARD: tl.constexpr, BLOCK: tl.constexpr):
    """The first block from the k-th on that is not clear, or how many blocks there are."""
    found = tl.cdiv(end - begin, BLOCK)
    edge = tl.where(begin < bounds[0], begin, NOWHERE)
    found = _nearest(found, k, edge, begin, end, FORWARD, BLOCK)
    edge = tl.where((end - begin) % BLOCK != 0, end - 1, NOWHERE)
    found = _nearest(found, k, edge, begin, end, FORWARD, BLOCK)
    found = _nearest(found, k, label, begin, end, FORWARD, BLOCK)
    return tl.where(peak == ANYWHERE, k, _nearest(found, k, peak, begin, end, FORWARD, BLOCK))
