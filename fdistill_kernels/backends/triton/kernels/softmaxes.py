"""Sweep 1 of the row kernel: both models' softmaxes, online and lane by lane, and lanes or spans as one."""

import triton
import triton.language as tl

from .loads import load_logits
from .terms import LARGEST, LOG2E, exp, times

LOWEST = tl.constexpr(-LARGEST.value)  # a maximum to start from: finite, so that −inf − maximum is −inf


@triton.jit
def _advance(top, rest, x, rate2):
    """Takes x into 1 + rest = Σ 2^(rate2·(x − top)), whose 1 is the maximum's own. An empty sum has rest −1."""
    e = tl.exp2(-tl.abs(x - top) * rate2)
    return tl.maximum(top, x), tl.where(x >= top, rest * e + e, rest + e)


@triton.jit
def softmaxes_of(
    student, teacher, class_weight, begin, end, vocabulary, student_rate, teacher_rate, student_cap, teacher_cap, pivot,
    LABELS: tl.constexpr, SMOOTHED: tl.constexpr, TRAINED: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr = 1,
):  # fmt: skip
    """Sweep 1 over [begin, end), to scalars.

    top and rest of the student and its sum at temperature 1; Σ w·(z − pivot) for label smoothing; top and rest of the
    teacher; the teacher's logit at the student's top, and of a TRAINED teacher the student's at its.
    """
    zeros = tl.zeros([BLOCK], tl.float32)
    student_top, student_rest, plain_rest, linear = zeros + LOWEST, zeros - 1, zeros - 1, zeros
    teacher_top, teacher_rest = zeros + LOWEST, zeros - 1
    teacher_there, student_there = zeros - float("inf"), zeros - float("inf")
    for start in tl.range(begin, end, BLOCK):
        v = start + tl.arange(0, BLOCK)
        edge = start + BLOCK > vocabulary
        x = load_logits(student, v, vocabulary, student_cap, edge, LINE)
        if LABELS and teacher is not None:
            _, plain_rest = _advance(student_top, plain_rest, x, LOG2E)
        if SMOOTHED:
            w = (v < vocabulary).to(tl.float32)
            if class_weight is not None:
                w = tl.load(class_weight + v, mask=v < vocabulary, other=0.0)
            linear += times(w, x - pivot)
        if teacher is not None:
            y = load_logits(teacher, v, vocabulary, teacher_cap, edge, LINE)
            # not only above: a row may have no logit above LOWEST
            teacher_there = tl.where(x >= student_top, y, teacher_there)
            if TRAINED:
                student_there = tl.where(y >= teacher_top, x, student_there)
            teacher_top, teacher_rest = _advance(teacher_top, teacher_rest, y, teacher_rate * LOG2E)
        student_top, student_rest = _advance(student_top, student_rest, x, student_rate * LOG2E)
    return combined(student_top, student_rest, plain_rest, linear, teacher_top, teacher_rest, teacher_there,
                    student_there, student_rate, teacher_rate)  # fmt: skip


@triton.jit
def _sum_of_rests(top, rest, all_top, rate):
    """Rests of lanes, or of spans, to that of all."""
    highest = top == all_top
    rests = tl.where(highest, rest, (rest + 1) * exp((top - all_top) * rate))
    return tl.sum(rests, 0) + (tl.sum(highest.to(tl.float32), 0) - 1)


@triton.jit
def combined(
    student_top, student_rest, plain_rest, linear, teacher_top, teacher_rest, teacher_there, student_there,
    student_rate, teacher_rate,
):  # fmt: skip
    """Statistics of lanes, or of spans, to those of all."""
    top, other_top = tl.max(student_top, 0), tl.max(teacher_top, 0)
    return (
        top,
        _sum_of_rests(student_top, student_rest, top, student_rate),
        _sum_of_rests(student_top, plain_rest, top, 1.0),
        tl.sum(linear, 0),
        other_top,
        _sum_of_rests(teacher_top, teacher_rest, other_top, teacher_rate),
        tl.max(tl.where(student_top == top, teacher_there, -float("inf")), 0),
        tl.max(tl.where(teacher_top == other_top, student_there, -float("inf")), 0),
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
    return combined(
        tl.load(at), tl.load(at + step), tl.load(at + 2 * step), tl.load(at + 3 * step), tl.load(at + 4 * step),
        tl.load(at + 5 * step), tl.load(at + 6 * step), tl.load(at + 7 * step), student_rate, teacher_rate,
    )  # fmt: skip
