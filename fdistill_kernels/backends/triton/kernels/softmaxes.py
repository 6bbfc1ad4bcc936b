"""Sweep 1 of the row kernel: both models' softmaxes, online and lane by lane, and spans as one.

A lane takes a group of entries at a time, those that one 16-byte load brings to a thread, and keeps the largest so far
and the sum of exponentials below it. Where one entry has almost all of a row's mass, the largest's own 1 would hide the
others: at the end the lane that holds it is looked at once more, for its `rest`, the sum without that 1.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loads import LINE_BYTES, load_within, within
from .stretches import ANYWHERE, NOWHERE, blocks_of, clear_until, fetched_of, first_two, read, read_at, start_of
from .terms import LARGEST, LOG2E, exp, times

LOWEST = tl.constexpr(-LARGEST.value)  # a maximum to start from: finite, so that −inf − maximum is −inf
BEYOND = tl.constexpr(2147483647)  # every place


class Softmaxes(NamedTuple):
    """A row's statistics.

    Attributes:
        student_top, student_rest: the largest logit, and Σ exp(rate·(z − top)) without the 1 of the largest.
        plain_rest: the student's at temperature 1, for labels beside a divergence.
        linear: Σ w·(z − pivot), for label smoothing.
        teacher_top, teacher_rest: as the student's.
        teacher_there, student_there: the teacher's logit at the student's top, and the student's at a trained
            teacher's.
        place: of the student's top, or ANYWHERE of several.
    """

    student_top: Any
    student_rest: Any
    plain_rest: Any
    linear: Any
    teacher_top: Any
    teacher_rest: Any
    teacher_there: Any
    student_there: Any
    place: Any


@triton.jit
def no_sums(row, BLOCK: tl.constexpr):
    """A zero for each lane of a block: the entries that one line of `row` brings to a thread."""
    ENTRIES: tl.constexpr = LINE_BYTES * 8 // row.dtype.element_ty.primitive_bitwidth
    return tl.zeros([BLOCK // ENTRIES if BLOCK > ENTRIES else 1], tl.float32)


@triton.jit
def by_lane(x, LANES: tl.constexpr, LINE: tl.constexpr):
    """A block's entries, a row of them a lane: those that a thread loads, a line of neighbours, or LANES apart."""
    if LINE == 1:
        return tl.trans(tl.reshape(x, [x.shape[0] // LANES, LANES]))
    else:
        return tl.reshape(x, [LANES, x.shape[0] // LANES])


@triton.jit
def added(sums, x, LINE: tl.constexpr):
    """The lanes' sums with a block's entries: a register a lane, where one an entry would leave too few."""
    return sums + tl.sum(by_lane(x, sums.shape[0], LINE), 1)


@triton.jit
def _worth(x, top, rate2):
    """``2^(rate2·(x − top))``."""
    return tl.exp2((x - top) * rate2)


@triton.jit
def _advanced(total, top, new, lanes, rate2):
    """Σ 2^(rate2·(x − top)) with more entries, and to a new top."""
    return total * _worth(top, new, rate2) + tl.sum(_worth(lanes, new[:, None], rate2), 1)


@triton.jit
def taken(x, top, total, plain_total, rate, PLAIN: tl.constexpr, LINE: tl.constexpr):
    """The lanes' tops and sums with a block of logits x. PLAIN: those of temperature 1, too."""
    lanes = by_lane(x, top.shape[0], LINE)
    new = tl.maximum(top, tl.max(lanes, 1))
    if PLAIN:
        plain_total = _advanced(plain_total, top, new, lanes, LOG2E)
    return new, _advanced(total, top, new, lanes, rate * LOG2E), plain_total


@triton.jit
def _smoothed(linear, x, start, bounds, class_weight, pivot, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """What label smoothing needs of the lanes, with a block of logits x."""
    v = start + tl.arange(0, BLOCK)
    inside = within(v, bounds)
    w = inside.to(tl.float32)
    if class_weight is not None:
        w = tl.load(class_weight + v, mask=inside, other=0.0)
    return added(linear, times(w, x - pivot), LINE)


@triton.jit
def but_one(top, total, plain_total, rate, PLAIN: tl.constexpr):
    """The lanes' top; a lane that has it, and whether no other does; and the other lanes' sums relative to it."""
    k, all_top = tl.arange(0, top.shape[0]), tl.max(top, 0)
    has = (top == all_top) & (total != 0)  # a lane of nothing has LOWEST, which may be a logit
    first, last = tl.min(tl.where(has, k, BEYOND), 0), tl.max(tl.where(has, k, 0), 0)
    lane = tl.minimum(first, last)  # none has it in a row of −inf
    rest = tl.sum(tl.where(k == lane, 0.0, total * _worth(top, all_top, rate * LOG2E)), 0)
    plain_rest = 0.0
    if PLAIN:
        plain_rest = tl.sum(tl.where(k == lane, 0.0, plain_total * _worth(top, all_top, LOG2E)), 0)
    return all_top, lane, first == last, rest, plain_rest


@triton.jit
def below(x, top, rate2):
    """The sum of exponentials of what is below the top; none of an infinite one."""
    return tl.sum(tl.where(x == top, 0.0, _worth(x, top, rate2)), 0) + (top - top)


@triton.jit
def entries_of(lane, at, begin, LANES: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """Of a lane (`by_lane`) LANES entries, from its at-th on."""
    GROUP: tl.constexpr = BLOCK // LANES
    entry = at + tl.arange(0, LANES)
    within_block = lane + entry % GROUP * LANES if LINE == 1 else lane * GROUP + entry % GROUP
    return begin + entry // GROUP * BLOCK + within_block


@triton.jit
def count_of(x, top):
    """How many logits are the top."""
    return tl.sum((x == top).to(tl.int32), 0)


@triton.jit
def _there(x, top, y):
    """The other model's logit at the top."""
    return tl.max(tl.where(x == top, y, -float("inf")), 0)


@triton.jit
def softmaxes_of(
    swept, rates, class_weight, pivot, LABELS: tl.constexpr, SMOOTHED: tl.constexpr,
    TRAINED: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Sweep 1, to scalars: the `Softmaxes` of what is swept. TRAINED: the teacher is, too."""
    student, teacher = swept.rows[0], swept.rows[1]
    PLAIN: tl.constexpr = LABELS and teacher is not None
    zeros = no_sums(student, BLOCK)
    top, total, plain_total, linear, other_top, other_total = zeros + LOWEST, zeros, zeros, zeros, zeros + LOWEST, zeros
    k, count = 0, blocks_of(swept, BLOCK)
    while k < count:
        stop = clear_until(k, swept, NOWHERE, NOWHERE, True, BLOCK)
        here, after = first_two(k, stop, swept, True, BLOCK, LINE)
        for two in tl.range(k, stop, 2):
            start = start_of(two, swept, True, BLOCK)
            ahead = start_of(tl.minimum(two + 2, stop - 2), swept, True, BLOCK)
            for i in tl.static_range(2):
                x, y = read(here, swept)
                here, after = after, fetched_of(swept.rows, ahead + i * BLOCK, None, BLOCK, LINE)
                top, total, plain_total = taken(x, top, total, plain_total, rates[0], PLAIN, LINE)
                if SMOOTHED:
                    linear = _smoothed(linear, x, start + i * BLOCK, swept.bounds, class_weight, pivot, BLOCK, LINE)
                if teacher is not None:
                    other_top, other_total, _ = taken(y, other_top, other_total, 0.0, rates[1], False, LINE)
        if stop < count:
            start = start_of(stop, swept, True, BLOCK)
            x, y = read_at(start, swept, False, BLOCK, LINE)
            top, total, plain_total = taken(x, top, total, plain_total, rates[0], PLAIN, LINE)
            if SMOOTHED:
                linear = _smoothed(linear, x, start, swept.bounds, class_weight, pivot, BLOCK, LINE)
            if teacher is not None:
                other_top, other_total, _ = taken(y, other_top, other_total, 0.0, rates[1], False, LINE)
        k = stop + 1
    top, lane, alone, rest, plain_rest = but_one(top, total, plain_total, rates[0], PLAIN)
    other_top, other_lane, _, other_rest, _ = but_one(other_top, other_total, 0.0, rates[1], False)
    equal, place, other_equal, teacher_there, student_there = 0, BEYOND, 0, -float("inf"), -float("inf")
    LANES: tl.constexpr = zeros.shape[0]
    own = swept.bounds[0], swept.end
    for at in tl.range(0, count * (BLOCK // LANES), LANES):  # of both lanes
        v = entries_of(lane, at, swept.begin, LANES, BLOCK, LINE)
        x = load_within(student, v, own, swept.caps[0])
        if teacher is not None:
            beside = load_within(teacher, v, own, swept.caps[1])
            w = entries_of(other_lane, at, swept.begin, LANES, BLOCK, LINE)
            y = load_within(teacher, w, own, swept.caps[1])
            if TRAINED:
                other_beside = load_within(student, w, own, swept.caps[0])
                student_there = tl.maximum(student_there, _there(y, other_top, other_beside))
            teacher_there = tl.maximum(teacher_there, _there(x, top, beside))
            other_rest += below(y, other_top, rates[1] * LOG2E)
            other_equal += count_of(y, other_top)
        rest += below(x, top, rates[0] * LOG2E)
        if PLAIN:
            plain_rest += below(x, top, LOG2E)
        equal += count_of(x, top)
        place = tl.minimum(place, tl.min(tl.where(x == top, v, BEYOND), 0))
    rest, plain_rest, other_rest = rest + (equal - 1), plain_rest + (equal - 1), other_rest + (other_equal - 1)
    place = tl.where((equal == 1) & alone, place, ANYWHERE)
    return Softmaxes(top, rest, plain_rest, tl.sum(linear, 0), other_top, other_rest, teacher_there, student_there,
                     place)  # fmt: skip


@triton.jit
def _of_spans(top, rest, all_top, rate):
    """Spans' rests to that of all."""
    highest = top == all_top
    rests = tl.where(highest, rest, (rest + 1) * exp((top - all_top) * rate))
    return tl.sum(rests, 0) + (tl.sum(highest.to(tl.float32), 0) - 1)


@triton.jit
def save(partials, step, found, label_logit):
    """A span's statistics, a step apart; behind the totals of sweep 2 what only the span itself asks for."""
    for i in tl.static_range(8):
        tl.store(partials + i * step, found[i])
    tl.store(partials + 8 * step, label_logit)
    tl.store(partials + 12 * step, found.place.to(tl.float32, bitcast=True))
    tl.store(partials + 13 * step, found.student_top)


@triton.jit
def place_here(partials, step, top):
    """The place of the student's top, if it is in this span."""
    place = tl.load(partials + 12 * step).to(tl.int32, bitcast=True)
    return tl.where(tl.load(partials + 13 * step) == top, place, NOWHERE)


@triton.jit
def met(partials, step, rates, SPLITS: tl.constexpr):
    """The statistics of all spans."""
    at = partials + tl.arange(0, SPLITS)
    student_top, teacher_top = tl.load(at), tl.load(at + 4 * step)
    top, other_top = tl.max(student_top, 0), tl.max(teacher_top, 0)
    rest = _of_spans(student_top, tl.load(at + step), top, rates[0])
    plain_rest = _of_spans(student_top, tl.load(at + 2 * step), top, 1.0)
    other_rest = _of_spans(teacher_top, tl.load(at + 5 * step), other_top, rates[1])
    teacher_there = tl.max(tl.where(student_top == top, tl.load(at + 6 * step), -float("inf")), 0)
    student_there = tl.max(tl.where(teacher_top == other_top, tl.load(at + 7 * step), -float("inf")), 0)
    linear = tl.sum(tl.load(at + 3 * step), 0)
    return Softmaxes(top, rest, plain_rest, linear, other_top, other_rest, teacher_there, student_there, ANYWHERE)
