"""Sweep 2 of the cut path, and the gradient's tiles of sweeps 3 and 4: both models' logits on chip, never written.

Tiles are BLOCK × BLOCK. `facts` holds a row of floats for each of FACTS, what the sweeps before left of it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .heads import OfHead, head_logits
from .loads import cap_slope
from .terms import LOG2E, exp, pair, times

BLOCK = 128
TOTALS, GRADIENT = tl.constexpr(0), tl.constexpr(1)
FACTS = ("scale", "student_top", "student_rate", "student_log_total", "plain_log_total", "teacher_top", "teacher_rate",
         "teacher_log_total", "weight", "of_divergence", "of_q", "of_label", "of_weight")  # fmt: skip
(SCALE, STUDENT_TOP, STUDENT_RATE, STUDENT_LOG_TOTAL, PLAIN_LOG_TOTAL, TEACHER_TOP, TEACHER_RATE, TEACHER_LOG_TOTAL,
 WEIGHT, OF_DIVERGENCE, OF_Q, OF_LABEL, OF_WEIGHT) = (tl.constexpr(i) for i in range(len(FACTS)))  # fmt: skip


class Facts(NamedTuple):
    """Of a block's rows n, of so many in all."""

    facts: Any
    n: Any
    rows: Any


class Student(NamedTuple):
    """The student's softmaxes of a block's rows: FACTS."""

    top: Any
    rate: Any
    log_total: Any
    plain_log_total: Any


@triton.jit
def _fact(of, FACT: tl.constexpr):
    return tl.load(of.facts + FACT * of.rows + tl.minimum(of.n, of.rows - 1))[:, None]


@triton.jit
def block_of_rows():
    """Of a grid (blocks of rows in a group, spans, groups): neighbours in time share both rows and entries in L2."""
    return tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _half(x, NUMBER: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))[NUMBER]


@triton.jit
def _part(x, NUMBER: tl.constexpr, PARTS: tl.constexpr):
    """The columns of one of 1 or 4 parts; a thread has as many of each."""
    if PARTS == 4:
        x = _half(_half(x, NUMBER // 2), NUMBER % 2)
    return x


@triton.jit
def _is_hot(z, log_p, label, student, start, log_threshold, BLOCK: tl.constexpr):
    """Whether rows have a log-probability above the threshold here, or NaN, or their label in the tile."""
    most = tl.max(z, 1)[:, None] - student.top
    hot = ~(most * student.rate - student.log_total < log_threshold)
    if log_p is not None:
        hot |= ~(tl.max(log_p, 1)[:, None] < log_threshold)
    if label is not None:
        hot |= (label >= start) & (label < start + BLOCK) | ~(most - student.plain_log_total < log_threshold)
    return hot


@triton.jit
def _weights(class_weight, v, vocabulary):
    """Of classes, in label smoothing."""
    if class_weight is None:
        return (v < vocabulary)[None, :].to(tl.float32)
    else:
        return tl.load(class_weight + tl.minimum(v, vocabulary - 1))[None, :].to(tl.float32)


@triton.jit
def _of_labels(log_plain, weights, v, label, facts, SMOOTHED: tl.constexpr):
    """The label terms' gradient."""
    gradient = _fact(facts, OF_Q) * exp(log_plain)
    if SMOOTHED:
        gradient -= _fact(facts, OF_WEIGHT) * weights
    return gradient - tl.where(v[None, :] == label, _fact(facts, OF_LABEL), 0.0)


@triton.jit
def _terms_of(log_p, log_q, own, TERMS: tl.constexpr, FACTORS: tl.constexpr, EXCHANGED: tl.constexpr):
    """The student's terms, the values, and q as the terms' factors have it, with what its sum is multiplied by."""
    log2_p, log2_q, of_q = log_p * LOG2E, log_q * LOG2E, 1.0
    if FACTORS is not None:
        factors = FACTORS(own)
        log2_p, log2_q, of_q = log2_p + factors[0], log2_q + factors[1], factors[3]
    p, q = tl.exp2(log2_p), tl.exp2(log2_q)
    # without the row's peak, which no sweep looks for, and series, for which there are no registers
    entry = (p, q, log2_p, log2_q, log_p - log_q, log_p, log_q, 0.0, False)
    of_student, value, _ = pair(entry, own, own, 0.0, None, None, TERMS, EXCHANGED, False)
    return of_student, value, q, of_q


@triton.jit
def tile_kernel(
    student, student_weight, student_bias,  # hidden states (rows, width); its head's (vocabulary, width), (vocabulary)
    teacher, teacher_weight, teacher_bias,  # the same, of another width; no teacher: the label terms alone
    facts,  # (FACTS, rows) float32
    labels,  # (rows)
    class_weight,  # (vocabulary)
    live,  # (blocks of rows, blocks of the vocabulary) int8: whether a tile matters to the gradient; None: all do
    partials,  # of TOTALS: (3, splits, rows) float32
    gradient,  # of GRADIENT: (blocks · BLOCK, gradient_stride)
    rows, vocabulary,
    student_width, student_stride, student_weight_stride, student_scale, student_cap,
    teacher_width, teacher_stride, teacher_weight_stride, teacher_scale, teacher_cap,
    parameter, rest, log_parameter, log_rest, c2, c3, c4, c5, c6, c7, c8,  # `Formula.constants`
    log_threshold, first_row, first_entry, span, gradient_stride,
    TERMS: tl.constexpr, FACTORS: tl.constexpr, EXCHANGED: tl.constexpr, SMOOTHED: tl.constexpr, PHASE: tl.constexpr,
    STUDENT_EVEN: tl.constexpr, STUDENT_PRECISION: tl.constexpr, STUDENT_D: tl.constexpr, TEACHER_EVEN: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr, TEACHER_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Tiles of both models, which need not be of one dtype. Grid: (blocks of rows in a group, spans of the vocabulary,
    groups), from first_row and first_entry.

    TOTALS: partials get the shares of D, of S and of Σ w·log q for smoothing, and `live` whether a log-probability is
    above `log_threshold` or a row's label here.
    GRADIENT: the span is one tile; it goes to `gradient`, rows and entries from the first ones, zeros where not live
    and beyond the ends.
    """
    of_student = OfHead(student, student_weight, student_bias, student_width, student_stride, student_weight_stride,
                        student_scale, student_cap)  # fmt: skip
    of_teacher = OfHead(teacher, teacher_weight, teacher_bias, teacher_width, teacher_stride, teacher_weight_stride,
                        teacher_scale, teacher_cap)  # fmt: skip
    own = (parameter, rest, log_parameter, log_rest, c2, c3, c4, c5, c6, c7, c8)
    block = block_of_rows()
    i = block * BLOCK + tl.arange(0, BLOCK)
    n = first_row + i
    of_rows = Facts(facts, n, rows)
    counts = (n < rows)[:, None] & (_fact(of_rows, SCALE) != 0)
    begin = first_entry + tl.program_id(1) * span
    end = tl.minimum(begin + span, vocabulary)
    needed = tl.max(tl.max(counts.to(tl.int32), 1), 0) != 0
    flags = live
    if live is not None:
        flags = live + (first_row // BLOCK + block) * tl.cdiv(vocabulary, BLOCK)
        if PHASE == GRADIENT:
            needed = needed & (tl.load(flags + begin // BLOCK) != 0)
    value, weight, linear = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if not needed:
        if PHASE == GRADIENT:
            j = begin - first_entry + tl.arange(0, BLOCK)
            tl.store(gradient + i[:, None] * gradient_stride + j[None, :], tl.zeros([BLOCK, BLOCK], tl.float32))
        end = begin
    PARTS: tl.constexpr = 4 if BLOCK_V == BLOCK else 1
    PART: tl.constexpr = BLOCK_V // PARTS
    for start in tl.range(begin, end, BLOCK):
        hot = tl.zeros([BLOCK, 1], tl.int32)
        for offset in tl.range(0, BLOCK, BLOCK_V):
            entries = start + offset + tl.arange(0, BLOCK_V)
            if teacher is not None:
                beside = head_logits(of_teacher, n, entries, rows, vocabulary, TEACHER_EVEN, TEACHER_PRECISION, BLOCK,
                                     BLOCK_V, TEACHER_D)  # fmt: skip
            whole = head_logits(of_student, n, entries, rows, vocabulary, STUDENT_EVEN, STUDENT_PRECISION, BLOCK,
                                BLOCK_V, STUDENT_D)  # fmt: skip
            for number in tl.static_range(0, PARTS):  # beside whole tiles a part at a time has its terms in registers
                z = _part(whole, number, PARTS)
                v = start + offset + number * PART + tl.arange(0, PART)
                inside, log_p, label = (v < vocabulary)[None, :], None, None
                # facts are loaded where they are used: registers that products could not spare
                softmaxes = Student(_fact(of_rows, STUDENT_TOP), _fact(of_rows, STUDENT_RATE),
                                    _fact(of_rows, STUDENT_LOG_TOTAL), _fact(of_rows, PLAIN_LOG_TOTAL))  # fmt: skip
                if teacher is not None:
                    y = _part(beside, number, PARTS)
                    log_p = (y - _fact(of_rows, TEACHER_TOP)) * _fact(of_rows, TEACHER_RATE)
                    log_p -= _fact(of_rows, TEACHER_LOG_TOTAL)
                if labels is not None:
                    label = tl.load(labels + tl.minimum(n, rows - 1))[:, None]
                if PHASE == TOTALS and live is not None:
                    hot |= _is_hot(z, log_p, label, softmaxes, start, log_threshold, BLOCK)
                result = tl.zeros([BLOCK, PART], tl.float32)
                if labels is not None:
                    log_plain, weights = z - softmaxes.top - softmaxes.plain_log_total, None
                    if SMOOTHED:
                        weights = _weights(class_weight, v, vocabulary)
                    if PHASE == TOTALS and SMOOTHED:
                        linear += tl.sum(tl.where(inside, times(weights, log_plain), 0.0), 1)
                    if PHASE == GRADIENT:
                        result = _of_labels(log_plain, weights, v, label, of_rows, SMOOTHED)
                if teacher is not None:
                    log_q = (z - softmaxes.top) * softmaxes.rate - softmaxes.log_total
                    term, here, q, of_q = _terms_of(log_p, log_q, own, TERMS, FACTORS, EXCHANGED)
                    if PHASE == TOTALS:
                        value += tl.sum(tl.where(inside, here, 0.0), 1)
                        weight += tl.sum(tl.where(inside, term, 0.0), 1)
                    else:
                        result += times(_fact(of_rows, OF_DIVERGENCE), term - q * (_fact(of_rows, WEIGHT) * of_q))
                if PHASE == GRADIENT:
                    result *= cap_slope(z, student_cap)
                    to = gradient + i[:, None] * gradient_stride + (v - first_entry)[None, :]
                    tl.store(to, tl.where(counts & inside, result, 0.0))
        if PHASE == TOTALS and live is not None:
            tl.store(flags + start // BLOCK, tl.max(tl.max((hot & counts).to(tl.int8), 1), 0))
    if PHASE == TOTALS:
        field = rows * tl.num_programs(1)
        to = partials + tl.program_id(1) * rows + n
        tl.store(to, value, mask=n < rows)
        tl.store(to + field, weight, mask=n < rows)
        tl.store(to + 2 * field, linear, mask=n < rows)
