"""Sweep 1 of the row kernel: both models' softmaxes, online and lane by lane, and spans as one.

A lane takes a group of entries at a time, those that one 16-byte load brings to a thread, and keeps the largest so far
and the sum of exponentials below it. Where one entry has almost all of a row's mass, the largest's own 1 would hide the
others: at the end the lane that holds it is looked at once more, for its `rest`, the sum without that 1.
"""

import triton
import triton.language as tl

from .loads import LINE_BYTES, load_block, load_within, logits_of, within
from .stretches import ANYWHERE, NOWHERE, clear_until, fetched_of, first_two, start_of
from .terms import LARGEST, LOG2E, exp, times

LOWEST = tl.constexpr(-LARGEST.value)  # a maximum to start from: finite, so that −inf − maximum is −inf
BEYOND = tl.constexpr(2147483647)  # every place


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
    student, teacher, class_weight, begin, end, bounds, student_rate, teacher_rate, student_cap, teacher_cap, pivot,
    LABELS: tl.constexpr, SMOOTHED: tl.constexpr, TRAINED: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Sweep 1 over [begin, end), to scalars.

    top and rest of the student and its sum at temperature 1; Σ w·(z − pivot) for label smoothing; top and rest of the
    teacher; the teacher's logit at the student's top, and of a TRAINED teacher the student's at its; and the place of
    the student's top, or ANYWHERE of several.
    """
    PLAIN: tl.constexpr = LABELS and teacher is not None
    zeros = no_sums(student, BLOCK)
    top, total, plain_total, linear, other_top, other_total = zeros + LOWEST, zeros, zeros, zeros, zeros + LOWEST, zeros
    rows = (student, teacher)
    k, count = 0, tl.cdiv(end - begin, BLOCK)
    while k < count:
        stop = clear_until(k, begin, end, bounds, NOWHERE, NOWHERE, True, BLOCK)
        here, after = first_two(rows, k, stop, begin, end, True, BLOCK, LINE)
        for two in tl.range(k, stop, 2):
            start = start_of(two, begin, end, True, BLOCK)
            ahead = start_of(tl.minimum(two + 2, stop - 2), begin, end, True, BLOCK)
            for i in tl.static_range(2):
                x, y = logits_of(here[0], student_cap), logits_of(here[1], teacher_cap)
                here, after = after, fetched_of(rows, ahead + i * BLOCK, None, BLOCK, LINE)
                top, total, plain_total = taken(x, top, total, plain_total, student_rate, PLAIN, LINE)
                if SMOOTHED:
                    linear = _smoothed(linear, x, start + i * BLOCK, bounds, class_weight, pivot, BLOCK, LINE)
                if teacher is not None:
                    other_top, other_total, _ = taken(y, other_top, other_total, 0.0, teacher_rate, False, LINE)
        if stop < count:
            start = start_of(stop, begin, end, True, BLOCK)
            x = load_block(student, start, bounds, student_cap, False, BLOCK, LINE)
            y = x
            if teacher is not None:
                y = load_block(teacher, start, bounds, teacher_cap, False, BLOCK, LINE)
            top, total, plain_total = taken(x, top, total, plain_total, student_rate, PLAIN, LINE)
            if SMOOTHED:
                linear = _smoothed(linear, x, start, bounds, class_weight, pivot, BLOCK, LINE)
            if teacher is not None:
                other_top, other_total, _ = taken(y, other_top, other_total, 0.0, teacher_rate, False, LINE)
        k = stop + 1
    top, lane, alone, rest, plain_rest = but_one(top, total, plain_total, student_rate, PLAIN)
    other_top, other_lane, _, other_rest, _ = but_one(other_top, other_total, 0.0, teacher_rate, False)
    equal, place, other_equal, teacher_there, student_there = 0, BEYOND, 0, -float("inf"), -float("inf")
    LANES: tl.constexpr = zeros.shape[0]
    own = bounds[0], end
    for at in tl.range(0, count * (BLOCK // LANES), LANES):  # of both lanes
        v = entries_of(lane, at, begin, LANES, BLOCK, LINE)
        x = load_within(student, v, own, student_cap)
        if teacher is not None:
            beside = load_within(teacher, v, own, teacher_cap)
            w = entries_of(other_lane, at, begin, LANES, BLOCK, LINE)
            y = load_within(teacher, w, own, teacher_cap)
            if TRAINED:
                other_beside = load_within(student, w, own, student_cap)
                student_there = tl.maximum(student_there, _there(y, other_top, other_beside))
            teacher_there = tl.maximum(teacher_there, _there(x, top, beside))
            other_rest += below(y, other_top, teacher_rate * LOG2E)
            other_equal += count_of(y, other_top)
        rest += below(x, top, student_rate * LOG2E)
        if PLAIN:
            plain_rest += below(x, top, LOG2E)
        equal += count_of(x, top)
        place = tl.minimum(place, tl.min(tl.where(x == top, v, BEYOND), 0))
    rest, plain_rest, other_rest = rest + (equal - 1), plain_rest + (equal - 1), other_rest + (other_equal - 1)
    place = tl.where((equal == 1) & alone, place, ANYWHERE)
    return top, rest, plain_rest, tl.sum(linear, 0), other_top, other_rest, teacher_there, student_there, place


@triton.jit
def _of_spans(top, rest, all_top, rate):
    """Spans' rests to that of all."""
    highest = top == all_top
    rests = tl.where(highest, rest, (rest + 1) * exp((top - all_top) * rate))
    return tl.sum(rests, 0) + (tl.sum(highest.to(tl.float32), 0) - 1)


@triton.jit
def save(partials, step, statistics):
    """A span's statistics, a step apart."""
    for i in tl.static_range(8):
        tl.store(partials + i * step, statistics[i])


@triton.jit
def met(partials, step, student_rate, teacher_rate, SPLITS: tl.constexpr):
    """The statistics of all spans."""
    at = partials + tl.arange(0, SPLITS)
    student_top, teacher_top = tl.load(at), tl.load(at + 4 * step)
    top, other_top = tl.max(student_top, 0), tl.max(teacher_top, 0)
    rest = _of_spans(student_top, tl.load(at + step), top, student_rate)
    plain_rest = _of_spans(student_top, tl.load(at + 2 * step), top, 1.0)
    other_rest = _of_spans(teacher_top, tl.load(at + 5 * step), other_top, teacher_rate)
    teacher_there = tl.max(tl.where(student_top == top, tl.load(at + 6 * step), -float("inf")), 0)
    student_there = tl.max(tl.where(teacher_top == other_top, tl.load(at + 7 * step), -float("inf")), 0)
    linear = tl.sum(tl.load(at + 3 * step), 0)
    return top, rest, plain_rest, linear, other_top, other_rest, teacher_there, student_there, ANYWHERE
