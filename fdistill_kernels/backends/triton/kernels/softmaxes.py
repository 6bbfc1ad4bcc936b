"""Sweep 1 of the row kernel: both models' softmaxes, online and lane by lane, and lanes or spans as one.

A lane takes a group of entries at a time, those that one 16-byte load brings to a thread, as a tournament whose winner
plays against the lane's largest so far. Only losers have an exponential: the largest entry's own 1 never enters a sum
that may be far below it.
"""

import triton
import triton.language as tl

from .loads import LINE_BYTES, load_block, load_within, within
from .stretches import ANYWHERE, NOWHERE, clear_until
from .terms import LARGEST, LOG2E, exp, times

LOWEST = tl.constexpr(-LARGEST.value)  # a maximum to start from: finite, so that −inf − maximum is −inf
BEYOND = tl.constexpr(2147483647)  # every place


@triton.jit
def no_sums(row, BLOCK: tl.constexpr):
    """A zero for each lane of a block: the entries that one line of `row` brings to a thread."""
    ENTRIES: tl.constexpr = LINE_BYTES * 8 // row.dtype.element_ty.primitive_bitwidth
    return tl.zeros([BLOCK // ENTRIES if BLOCK > ENTRIES else 1], tl.float32)


@triton.jit
def by_lane(x, LANES: tl.constexpr):
    """A block's entries, a row of them a lane."""
    return tl.reshape(x, [LANES, x.shape[0] // LANES])


@triton.jit
def added(sums, x):
    """The lanes' sums with a block's entries: a register a lane, where one an entry would leave too few."""
    return sums + tl.sum(by_lane(x, sums.shape[0]), 1)


@triton.jit
def _round(x):
    """Of neighbours the larger, or what is not a number, and the smaller."""
    one, other = tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL), tl.minimum(one, other)


@triton.jit
def played(top, x, GROUP: tl.constexpr):
    """The lanes' new tops, their groups' own, and the losers: of a lane one in the last round and the one before it,
    two and four in those before.
    """
    winners = x
    none = tl.zeros([x.shape[0] // GROUP], tl.float32)
    last, two, four = none, none, none
    if GROUP == 8:
        winners, four = _round(winners)
    if GROUP >= 4:
        winners, two = _round(winners)
    if GROUP >= 2:
        winners, last = _round(winners)
    new = tl.maximum(top, winners, propagate_nan=tl.PropagateNan.ALL)
    return new, winners, (tl.minimum(top, winners), last, two, four)


@triton.jit
def _worth(losers, top, rate2):
    """``2^(rate2·(loser − top))``."""
    return tl.exp2((losers - top) * rate2)


@triton.jit
def _worth_of_two(losers, top, rate2):
    """Its sum over two losers a lane."""
    one, other = tl.split(tl.reshape(losers, [losers.shape[0] // 2, 2]))
    return _worth(one, top, rate2) + _worth(other, top, rate2)


@triton.jit
def _worth_of_four(losers, top, rate2):
    """Its sum over four losers a lane."""
    one, other = tl.split(tl.reshape(losers, [losers.shape[0] // 2, 2]))
    return _worth_of_two(one, top, rate2) + _worth_of_two(other, top, rate2)


@triton.jit
def advanced(rest, top, new, losers, rate2, GROUP: tl.constexpr):
    """1 + rest = Σ 2^(rate2·(x − top)), whose 1 is the maximum's own, with a group's losers; of nothing rest is −1."""
    rest = rest * _worth(top, new, rate2) + _worth(losers[0], new, rate2)
    if GROUP >= 2:
        rest += _worth(losers[1], new, rate2)
    if GROUP >= 4:
        rest += _worth_of_two(losers[2], new, rate2)
    if GROUP == 8:
        rest += _worth_of_four(losers[3], new, rate2)
    return rest


@triton.jit
def _place(top, lanes_top, lanes_rest, at, GROUP: tl.constexpr):
    """The group of a row's top, the first of several; and whether it is known to hold the only entry that large.

    at: where the group of each lane's own top starts; a lane whose rest is below 1 holds no second one. The first lane
    holds an entry of the row, if any does: others may have LOWEST of nothing.
    """
    EVEN: tl.constexpr = 2 if GROUP == 1 else 1  # makes the lowest bit free, as it is of larger groups' starts
    key = at * EVEN + (lanes_rest >= 1).to(tl.int32)
    first = tl.min(tl.where(lanes_top == top, key, BEYOND), 0)
    last = tl.max(tl.where(lanes_top == top, key, 0), 0)
    alone = (first == last) & (first % 2 == 0)
    first = tl.minimum(first, last)  # no lane has a top that is not a number
    return (first - first % 2) // EVEN, alone


@triton.jit
def _there(group, top, row, other_row, bounds, cap, other_cap, GROUP: tl.constexpr):
    """The other model's logit at a row's top, which is in that group."""
    v = group + tl.arange(0, GROUP)
    x, y = load_within(row, v, bounds, cap), load_within(other_row, v, bounds, other_cap)
    return tl.max(tl.where(x == top, y, -float("inf")), 0)


@triton.jit
def _taken(
    top, rest, plain_rest, at, linear, row, start, bounds, class_weight, rate, cap, pivot, CLEAR: tl.constexpr,
    PLAIN: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """One model's statistics, lane by lane, with a block added. PLAIN: that of temperature 1, too."""
    x = load_block(row, start, bounds, cap, CLEAR, BLOCK, LINE)
    if SMOOTHED:
        v = start + tl.arange(0, BLOCK)
        inside = within(v, bounds)
        w = inside.to(tl.float32)
        if class_weight is not None:
            w = tl.load(class_weight + v, mask=inside, other=0.0)
        linear = added(linear, times(w, x - pivot))
    new, winners, losers = played(top, x, GROUP)
    if PLAIN:
        plain_rest = advanced(plain_rest, top, new, losers, LOG2E, GROUP)
    rest = advanced(rest, top, new, losers, rate * LOG2E, GROUP)
    # not only above: a row may have no logit above LOWEST
    at = tl.where(winners >= top, start + tl.arange(0, BLOCK // GROUP) * GROUP, at)
    return new, rest, plain_rest, at, linear


@triton.jit
def softmaxes_of(
    student, teacher, class_weight, begin, end, bounds, student_rate, teacher_rate, student_cap, teacher_cap, pivot,
    LABELS: tl.constexpr, SMOOTHED: tl.constexpr, TRAINED: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Sweep 1 over [begin, end), to scalars.

    top and rest of the student and its sum at temperature 1; Σ w·(z − pivot) for label smoothing; top and rest of the
    teacher; the teacher's logit at the student's top, and of a TRAINED teacher the student's at its; and the start of
    the group that holds the student's top and is known to be alone with it, or ANYWHERE.
    """
    PLAIN: tl.constexpr = LABELS and teacher is not None
    zeros = no_sums(student, BLOCK)
    GROUP: tl.constexpr = BLOCK // zeros.shape[0]
    at = begin + tl.arange(0, BLOCK // GROUP) * GROUP
    top, rest, plain_rest, linear = zeros + LOWEST, zeros - 1, zeros - 1, zeros
    other_top, other_rest, other_at = top, rest, at
    k, count = 0, tl.cdiv(end - begin, BLOCK)
    while k < count:
        stop = clear_until(k, begin, end, bounds, NOWHERE, NOWHERE, True, BLOCK)
        for start in tl.range(begin + k * BLOCK, begin + stop * BLOCK, BLOCK):
            top, rest, plain_rest, at, linear = _taken(
                top, rest, plain_rest, at, linear, student, start, bounds, class_weight, student_rate, student_cap,
                pivot, True, PLAIN, SMOOTHED, BLOCK, GROUP, LINE,
            )  # fmt: skip
            if teacher is not None:
                other_top, other_rest, _, other_at, _ = _taken(
                    other_top, other_rest, 0.0, other_at, 0.0, teacher, start, bounds, None, teacher_rate, teacher_cap,
                    0.0, True, False, False, BLOCK, GROUP, LINE,
                )  # fmt: skip
        if stop < count:
            start = begin + stop * BLOCK
            top, rest, plain_rest, at, linear = _taken(
                top, rest, plain_rest, at, linear, student, start, bounds, class_weight, student_rate, student_cap,
                pivot, False, PLAIN, SMOOTHED, BLOCK, GROUP, LINE,
            )  # fmt: skip
            if teacher is not None:
                other_top, other_rest, _, other_at, _ = _taken(
                    other_top, other_rest, 0.0, other_at, 0.0, teacher, start, bounds, None, teacher_rate, teacher_cap,
                    0.0, False, False, False, BLOCK, GROUP, LINE,
                )  # fmt: skip
        k = stop + 1
    found = combined(top, rest, plain_rest, linear, other_top, other_rest, student_rate, teacher_rate)
    teacher_there, student_there, place = -float("inf"), -float("inf"), tl.full([], ANYWHERE, tl.int32)
    if teacher is not None:
        group, alone = _place(found[0], top, rest, at, GROUP)
        teacher_there = _there(group, found[0], student, teacher, bounds, student_cap, teacher_cap, GROUP)
        place = tl.where(alone, group, place)
        if TRAINED:
            group, _ = _place(found[4], other_top, other_rest, other_at, GROUP)
            student_there = _there(group, found[4], teacher, student, bounds, teacher_cap, student_cap, GROUP)
    return (found[0], found[1], found[2], found[3], found[4], found[5], teacher_there, student_there,
            place)  # fmt: skip


@triton.jit
def sum_of_rests(top, rest, all_top, rate):
    """Rests of lanes, or of spans, to that of all."""
    highest = top == all_top
    rests = tl.where(highest, rest, (rest + 1) * exp((top - all_top) * rate))
    return tl.sum(rests, 0) + (tl.sum(highest.to(tl.float32), 0) - 1)


@triton.jit
def combined(
    student_top, student_rest, plain_rest, linear, teacher_top, teacher_rest, student_rate, teacher_rate
):  # fmt: skip
    """Statistics of lanes, or of spans, to those of all."""
    top, other_top = tl.max(student_top, 0), tl.max(teacher_top, 0)
    return (
        top,
        sum_of_rests(student_top, student_rest, top, student_rate),
        sum_of_rests(student_top, plain_rest, top, 1.0),
        tl.sum(linear, 0),
        other_top,
        sum_of_rests(teacher_top, teacher_rest, other_top, teacher_rate),
    )


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
    found = combined(
        student_top, tl.load(at + step), tl.load(at + 2 * step), tl.load(at + 3 * step), teacher_top,
        tl.load(at + 5 * step), student_rate, teacher_rate,
    )  # fmt: skip
    teacher_there = tl.max(tl.where(student_top == found[0], tl.load(at + 6 * step), -float("inf")), 0)
    student_there = tl.max(tl.where(teacher_top == found[4], tl.load(at + 7 * step), -float("inf")), 0)
    return (found[0], found[1], found[2], found[3], found[4], found[5], teacher_there, student_there,
            ANYWHERE)  # fmt: skip
