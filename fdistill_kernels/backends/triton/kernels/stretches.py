"""A sweep's order of blocks, and its stretches of CLEAR ones: whole, and without what asks for choices.

A stretch has a loop of its own without a test or a branch. Its blocks are none or a thousand, and even: two are on
their way from memory while one is worked on, which alone would wait some 760 cycles for its logits, as long as a sweep
takes for it. What lies between two stretches is one block: a row's edge, or one with the row's peak or its label, or an
odd one.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loads import fetched, load_block, logits_of

#: The places of an entry that several blocks may hold, and of one that no block of the span does.
ANYWHERE, NOWHERE = tl.constexpr(-1), tl.constexpr(-2)


class Swept(NamedTuple):
    """What a sweep reads.

    Attributes:
        rows: the student's and the teacher's; without one the second is None, and its logits are the student's.
        caps: of both.
        begin, end: of the entries that are read.
        bounds: of the row's own (loads.py).
    """

    rows: Any
    caps: Any
    begin: Any
    end: Any
    bounds: Any


@triton.jit
def blocks_of(swept, BLOCK: tl.constexpr):
    """How many there are."""
    return tl.cdiv(swept.end - swept.begin, BLOCK)


@triton.jit
def start_of(k, swept, FORWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Where the k-th block of a sweep starts."""
    return swept.begin + k * BLOCK if FORWARD else swept.begin + (blocks_of(swept, BLOCK) - 1 - k) * BLOCK


@triton.jit
def fetched_of(rows, start, left, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """A block of both rows on its way, or of one row twice."""
    block = fetched(rows[0], start, left, BLOCK, LINE)
    if rows[1] is None:
        return block, block
    else:
        return block, fetched(rows[1], start, left, BLOCK, LINE)


@triton.jit
def first_two(k, stop, swept, FORWARD: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """The first blocks of a stretch from the k-th on, on their way; nothing of one without blocks."""
    start = start_of(k, swept, FORWARD, BLOCK)
    second = start + BLOCK if FORWARD else start - BLOCK
    return fetched_of(swept.rows, start, stop - k, BLOCK, LINE), fetched_of(swept.rows, second, stop - k, BLOCK, LINE)


@triton.jit
def read(block, swept):
    """The logits of a block of both rows that has come."""
    return logits_of(block[0], swept.caps[0]), logits_of(block[1], swept.caps[1])


@triton.jit
def read_at(start, swept, CLEAR: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """The logits of a block of both rows from `start`, as load_block has them."""
    x = load_block(swept.rows[0], start, swept.bounds, swept.caps[0], CLEAR, BLOCK, LINE)
    y = x
    if swept.rows[1] is not None:
        y = load_block(swept.rows[1], start, swept.bounds, swept.caps[1], CLEAR, BLOCK, LINE)
    return x, y


@triton.jit
def _nearest(found, k, place, swept, FORWARD: tl.constexpr, BLOCK: tl.constexpr):
    """The block of a place, if it comes before the one found and not before k."""
    at = (place - swept.begin) // BLOCK
    at = at if FORWARD else blocks_of(swept, BLOCK) - 1 - at
    there = (place >= swept.begin) & (place < swept.end) & (at >= k) & (at < found)
    return tl.where(there, at, found)


@triton.jit
def clear_until(k, swept, peak, label, FORWARD: tl.constexpr, BLOCK: tl.constexpr):
    """An even number of blocks after the k-th, before all that are not clear."""
    found = blocks_of(swept, BLOCK)
    edge = tl.where(swept.begin < swept.bounds[0], swept.begin, NOWHERE)
    found = _nearest(found, k, edge, swept, FORWARD, BLOCK)
    edge = tl.where((swept.end - swept.begin) % BLOCK != 0, swept.end - 1, NOWHERE)
    found = _nearest(found, k, edge, swept, FORWARD, BLOCK)
    found = _nearest(found, k, label, swept, FORWARD, BLOCK)
    found = tl.where(peak == ANYWHERE, k, _nearest(found, k, peak, swept, FORWARD, BLOCK))
    return k + (found - k) // 2 * 2
