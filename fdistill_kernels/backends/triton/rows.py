"""The row kernel: logits in, losses and gradients out, one skeleton for every divergence.

A row is swept at most three times, block by block, with all running values kept lane by lane so that no sweep waits for
a reduction before its end:
    1. statistics: maximum and sum of exponentials of both models, online
    2. totals: the divergence D and S = Σ q·g
    3. gradient: q·(g − S), and p·(f′ − (D − S)) for the teacher
Sweep 2 falls away where the divergence is centred (S = 0; D is summed in sweep 3), where it comes out of sweep 1 (D = S
= Σ q·(c·log q − log p), `CROSSED` = c: reverse KL and ENGINE), and for label terms alone. Each sweep runs over the row
in the opposite direction of the one before: what was read last is still in L2.

A program takes whole rows, or one span of each row (few rows, a huge vocabulary); spans meet in `partials`, one launch
a phase.
"""

import triton
import triton.language as tl

from .terms import _times

WHOLE, STATISTICS, TOTALS, GRADIENT = (tl.constexpr(phase) for phase in range(4))
PARTIALS = 10  # values a span leaves: eight of sweep 1, two of sweep 2
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum to start from: finite, so that −inf − maximum is −inf


@triton.jit
def _tanh(x):
    # a series where 1 - e would lose digits (Cephes' tanhf), exponentials elsewhere
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    e = tl.exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def _capped(x, cap):
    return x if cap is None else cap * _tanh(x / cap)


@triton.jit
def _load(row, v, vocabulary, cap):
    x = tl.load(row + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
    if cap is not None:
        x = tl.where(v < vocabulary, _capped(x, cap), float("-inf"))
    return x


@triton.jit
def _advance(top, total, x, rate):
    """Takes x into total = Σ exp(rate·(x − top)): new top, new total, and what old total and x are worth in it."""
    e = tl.exp(-tl.abs(x - top) * rate)
    higher = x > top
    old = tl.where(higher, e, 1.0)
    new = tl.where(higher, 1.0, e)
    return tl.maximum(top, x), total * old + new, old, new


@triton.jit
def _statistics(
    student, teacher, class_weight, begin, end, vocabulary, student_rate, teacher_rate, student_cap,
    teacher_cap, pivot,
    LABELS: tl.constexpr, SMOOTHED: tl.constexpr, CROSSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep 1 over [begin, end), to scalars.

    top, total of the student and its total at temperature 1; Σ w·(z − pivot) for label smoothing; top, total of the
    teacher; crossed = Σ e^{a}·(CROSSED·a − b), a = rate_s·(z_s − top_s), b = rate_t·(z_t − top_t).
    """
    zeros = tl.zeros([BLOCK], tl.float32)
    student_top, student_total, plain_total, linear = zeros + LOWEST, zeros, zeros, zeros
    teacher_top, teacher_total, crossed = zeros + LOWEST, zeros, zeros
    for start in tl.range(begin, end, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = _load(student, v, vocabulary, student_cap)
        if LABELS and teacher is not None:
            _, plain_total, _, _ = _advance(student_top, plain_total, x, 1.0)
        if SMOOTHED:
            w = (v < vocabulary).to(tl.float32)
            if class_weight is not None:
                w = tl.load(class_weight + v, mask=v < vocabulary, other=0.0)
            linear += _times(w, x - pivot)
        top, total, old, new = _advance(student_top, student_total, x, student_rate)
        if teacher is not None:
            y = _load(teacher, v, vocabulary, teacher_cap)
            other_top, other_total, _, _ = _advance(teacher_top, teacher_total, y, teacher_rate)
            if CROSSED is not None:
                moved = CROSSED * student_rate * (student_top - top) - teacher_rate * (teacher_top - other_top)
                here = CROSSED * student_rate * (x - top) - teacher_rate * (y - other_top)
                crossed = _times(old, crossed + _times(student_total, moved)) + _times(new, here)
            teacher_top, teacher_total = other_top, other_total
        student_top, student_total = top, total
    return _combine(student_top, student_total, plain_total, linear, teacher_top, teacher_total, crossed,
                    student_rate, teacher_rate, CROSSED)  # fmt: skip


@triton.jit
def _combine(
    student_top, student_total, plain_total, linear, teacher_top, teacher_total, crossed, student_rate, teacher_rate,
    CROSSED: tl.constexpr,
):  # fmt: skip
    """Statistics of lanes, or of spans, to those of all."""
    top, other_top = tl.max(student_top, 0), tl.max(teacher_top, 0)
    factor = tl.exp((student_top - top) * student_rate)
    if CROSSED is not None:
        moved = CROSSED * student_rate * (student_top - top) - teacher_rate * (teacher_top - other_top)
        crossed = _times(factor, crossed + _times(student_total, moved))
    return (
        top,
        tl.sum(student_total * factor, 0),
        tl.sum(plain_total * tl.exp(student_top - top), 0),
        tl.sum(linear, 0),
        other_top,
        tl.sum(teacher_total * tl.exp((teacher_top - other_top) * teacher_rate), 0),
        tl.sum(crossed, 0),
    )


@triton.jit
def _probability(x, top, rate, log_total):
    log_p = (x - top) * rate - log_total
    return tl.exp(log_p), log_p


@triton.jit
def _totals(
    student, teacher, begin, end, vocabulary, student_top, student_rate, student_log_total, teacher_top, teacher_rate,
    teacher_log_total, student_cap, teacher_cap, parameter, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep 2 over [begin, end), backwards: the shares of D and of S."""
    value, weight = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    last = begin + (tl.cdiv(end - begin, BLOCK) - 1) * BLOCK
    for offset in tl.range(0, end - begin, BLOCK):
        v = last - offset + tl.arange(0, BLOCK)
        x, y = _load(student, v, vocabulary, student_cap), _load(teacher, v, vocabulary, teacher_cap)
        q, log_q = _probability(x, student_top, student_rate, student_log_total)
        p, log_p = _probability(y, teacher_top, teacher_rate, teacher_log_total)
        of_student, of_teacher = TERMS(p, q, log_p, log_q, parameter)
        value += tl.where(v < vocabulary, of_student + of_teacher, 0.0)
        weight += tl.where(v < vocabulary, of_student, 0.0)
    return tl.sum(value, 0), tl.sum(weight, 0)


@triton.jit
def _label_terms(
    label, label_logit, top, log_total, linear, pivot, class_weight, vocabulary, ce_scale, smoothing, z_scale,
    class_weight_sum, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Cross-entropy and lse², and the factors of q, of the label's entry and of each class weight in their gradient."""
    of_label = 1.0 - smoothing
    if class_weight is not None:
        of_label *= tl.load(class_weight + label, mask=(label >= 0) & (label < vocabulary), other=0.0)
    cross_entropy = _times(of_label, top - label_logit + log_total)
    spread = smoothing / vocabulary
    if SMOOTHED:
        cross_entropy += spread * (class_weight_sum * (top - pivot + log_total) - linear)
    lse = top + log_total
    of_q = ce_scale * of_label + 2 * z_scale * lse
    if SMOOTHED:
        of_q += ce_scale * spread * class_weight_sum
    return cross_entropy, lse * lse, of_q, ce_scale * of_label, ce_scale * spread


@triton.jit
def _gradient(
    student, teacher, student_gradient, teacher_gradient, class_weight, begin, end, vocabulary, student_top,
    student_rate, student_log_total, teacher_top, teacher_rate, teacher_log_total, plain_log_total, student_scale,
    teacher_scale, label_scale, divergence, weight, label, of_q, of_label, of_weight, student_cap, teacher_cap,
    parameter,
    TERMS: tl.constexpr, LABELS: tl.constexpr, SMOOTHED: tl.constexpr, FORWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep 3 over [begin, end): both gradients; returns the shares of D for those who have not summed it."""
    value = tl.zeros([BLOCK], tl.float32)
    last = begin + (tl.cdiv(end - begin, BLOCK) - 1) * BLOCK
    for offset in tl.range(0, end - begin, BLOCK):
        start = begin + offset if FORWARD else last - offset
        v = start + tl.arange(0, BLOCK)
        inside = v < vocabulary
        x = _load(student, v, vocabulary, student_cap)
        gradient = tl.zeros([BLOCK], tl.float32)
        if teacher is not None:
            q, log_q = _probability(x, student_top, student_rate, student_log_total)
            y = _load(teacher, v, vocabulary, teacher_cap)
            p, log_p = _probability(y, teacher_top, teacher_rate, teacher_log_total)
            of_student, of_teacher = TERMS(p, q, log_p, log_q, parameter)
            value += tl.where(inside, of_student + of_teacher, 0.0)
            gradient = student_scale * (of_student - q * weight)
            if teacher_gradient is not None:
                other = teacher_scale * (of_teacher - p * (divergence - weight))
                if teacher_cap is not None:
                    other *= 1 - (y / teacher_cap) * (y / teacher_cap)
                tl.store(teacher_gradient + v, other, mask=inside)
        if student_gradient is not None:
            if LABELS:
                of_labels = of_q * tl.exp(x - student_top - plain_log_total)
                if SMOOTHED and class_weight is not None:
                    of_labels -= of_weight * tl.load(class_weight + v, mask=inside, other=0.0)
                elif SMOOTHED:
                    of_labels -= of_weight
                gradient += label_scale * tl.where(v == label, of_labels - of_label, of_labels)
            if student_cap is not None:
                gradient *= 1 - (x / student_cap) * (x / student_cap)
            tl.store(student_gradient + v, gradient, mask=inside)
    return tl.sum(value, 0)


@triton.jit
def _zero(row, begin, end, vocabulary, BLOCK: tl.constexpr):
    if row is not None:
        for start in tl.range(begin, end, BLOCK):
            v = start + tl.arange(0, BLOCK)
            tl.store(row + v, tl.zeros([BLOCK], tl.float32), mask=v < vocabulary)


@triton.jit
def _at(base, n, inner, outer_stride, inner_stride):
    """Where row n of (outer, inner, V) starts; 64 bits, since N·V may be beyond 2³¹."""
    n = tl.cast(n, tl.int64)
    return base + (n // inner) * outer_stride + (n % inner) * inner_stride


@triton.jit
def _save(partials, step, a, b, c, d, e, f, g, h):
    """A span's statistics, a step apart."""
    tl.store(partials, a)
    tl.store(partials + step, b)
    tl.store(partials + 2 * step, c)
    tl.store(partials + 3 * step, d)
    tl.store(partials + 4 * step, e)
    tl.store(partials + 5 * step, f)
    tl.store(partials + 6 * step, g)
    tl.store(partials + 7 * step, h)


@triton.jit
def _meet(partials, step, student_rate, teacher_rate, CROSSED: tl.constexpr, SPLITS: tl.constexpr):
    """The statistics of all spans."""
    at = partials + tl.arange(0, SPLITS)
    return _combine(
        tl.load(at), tl.load(at + step), tl.load(at + 2 * step), tl.load(at + 3 * step), tl.load(at + 4 * step),
        tl.load(at + 5 * step), tl.load(at + 6 * step), student_rate, teacher_rate, CROSSED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "inner"])
def row_kernel(
    student, teacher,  # (outer, inner, vocabulary) logits, dense in the vocabulary
    student_gradient, teacher_gradient,  # of the same shape; the teacher's dense
    parts,  # (3, rows)
    partials,  # (PARTIALS, rows, SPLITS) float32
    row_scale, student_inverse_temperature, teacher_inverse_temperature,  # (rows)
    divergence_scale, cross_entropy_scale, z_loss_scale, labels,  # (rows)
    class_weight,  # (vocabulary)
    rows, inner, vocabulary, span,
    student_outer, student_inner, teacher_outer, teacher_inner, gradient_outer, gradient_inner,  # strides
    student_cap, teacher_cap, parameter, smoothing,
    class_weight_sum,  # (1)
    TERMS: tl.constexpr, CENTRED: tl.constexpr, CROSSED: tl.constexpr, SMOOTHED: tl.constexpr, PHASE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0), + num_programs(0), ... of (outer, inner, V) logits; see `RowCall`. Absent pointers are None.

    Grid: (programs, 1) for whole rows, (programs, splits) for a phase on spans of `span` entries, a multiple of BLOCK.
    SPLITS is a power of two; what lies in `partials` beyond the grid's splits is ready to be combined.
    """
    LABELS: tl.constexpr = labels is not None
    DIVERGENCE: tl.constexpr = teacher is not None
    GRADIENTS: tl.constexpr = student_gradient is not None or teacher_gradient is not None
    # D is summed in the gradient's own sweep: there is no S to wait for, and every entry passes there
    LATE: tl.constexpr = CENTRED and PHASE == WHOLE and student_gradient is not None and teacher_gradient is None
    SWEEP_2: tl.constexpr = DIVERGENCE and CROSSED is None and not LATE
    begin, end = 0, vocabulary
    if PHASE != WHOLE:
        begin = tl.program_id(1) * span
        end = tl.minimum(begin + span, vocabulary)
    for n in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        student_row = _at(student, n, inner, student_outer, student_inner)
        teacher_row, student_gradient_row, teacher_gradient_row = teacher, student_gradient, teacher_gradient
        if DIVERGENCE:
            teacher_row = _at(teacher, n, inner, teacher_outer, teacher_inner)
        if student_gradient is not None:
            student_gradient_row = _at(student_gradient, n, inner, gradient_outer, gradient_inner)
        if teacher_gradient is not None:
            teacher_gradient_row = teacher_gradient + tl.cast(n, tl.int64) * vocabulary
        scale = tl.load(row_scale + n)
        if scale == 0:
            if PHASE == WHOLE or PHASE == GRADIENT:
                _zero(student_gradient_row, begin, end, vocabulary, BLOCK)
                _zero(teacher_gradient_row, begin, end, vocabulary, BLOCK)
                for part in tl.static_range(3):
                    tl.store(parts + part * rows + n, 0.0)
        else:
            student_rate, teacher_rate, of_divergence = 1.0, 1.0, 0.0
            if DIVERGENCE:
                student_rate, teacher_rate = (
                    tl.load(student_inverse_temperature + n),
                    tl.load(teacher_inverse_temperature + n),
                )
                of_divergence = scale * tl.load(divergence_scale + n)
            saved, step = partials, rows * SPLITS
            if PHASE != WHOLE:
                saved = partials + n * SPLITS

            label, label_logit, pivot = -1, 0.0, 0.0
            if LABELS:
                label = tl.load(labels + n)
                if PHASE == WHOLE or PHASE == STATISTICS:
                    known = (label >= 0) & (label < vocabulary)
                    label_logit = tl.load(student_row + label, mask=known, other=float("nan")).to(tl.float32)
                    label_logit = _capped(label_logit, student_cap)
                else:
                    label_logit = tl.load(saved + 7 * step)  # its entry may be the gradient already, in place
                pivot = tl.where(tl.abs(label_logit) < float("inf"), label_logit, 0.0)

            if PHASE == WHOLE or PHASE == STATISTICS:
                statistics = _statistics(
                    student_row, teacher_row, class_weight, begin, end, vocabulary, student_rate, teacher_rate,
                    student_cap, teacher_cap, pivot, LABELS, SMOOTHED, CROSSED, BLOCK,
                )  # fmt: skip
            else:
                statistics = _meet(saved, step, student_rate, teacher_rate, CROSSED, SPLITS)
            student_top, student_total, plain_total, linear, teacher_top, teacher_total, crossed = statistics
            if PHASE == STATISTICS:
                _save(saved + tl.program_id(1), step, student_top, student_total, plain_total, linear, teacher_top,
                      teacher_total, crossed, label_logit)  # fmt: skip
            else:
                if not DIVERGENCE:
                    plain_total = student_total
                student_log_total, teacher_log_total = tl.log(student_total), tl.log(teacher_total)
                divergence, weight = 0.0, 0.0
                if CROSSED is not None:
                    divergence = crossed / student_total - CROSSED * student_log_total + teacher_log_total
                    weight = divergence
                if SWEEP_2 and PHASE != GRADIENT:
                    divergence, weight = _totals(
                        student_row, teacher_row, begin, end, vocabulary, student_top, student_rate,
                        student_log_total, teacher_top, teacher_rate, teacher_log_total, student_cap, teacher_cap,
                        parameter, TERMS, BLOCK,
                    )  # fmt: skip
                if PHASE == TOTALS:
                    tl.store(saved + 8 * step + tl.program_id(1), divergence)
                    tl.store(saved + 9 * step + tl.program_id(1), weight)
                if SWEEP_2 and PHASE == GRADIENT:
                    divergence = tl.sum(tl.load(saved + 8 * step + tl.arange(0, SPLITS)), 0)
                    weight = tl.sum(tl.load(saved + 9 * step + tl.arange(0, SPLITS)), 0)
                if CENTRED:
                    weight = 0.0

                if PHASE == WHOLE or PHASE == GRADIENT:
                    plain_log_total = tl.log(plain_total)
                    cross_entropy, squared_lse, of_q, of_label, of_weight = 0.0, 0.0, 0.0, 0.0, 0.0
                    if LABELS:
                        weight_sum = vocabulary * 1.0
                        if class_weight is not None:
                            weight_sum = tl.load(class_weight_sum)
                        cross_entropy, squared_lse, of_q, of_label, of_weight = _label_terms(
                            label, label_logit, student_top, plain_log_total, linear, pivot, class_weight, vocabulary,
                            tl.load(cross_entropy_scale + n), smoothing, tl.load(z_loss_scale + n), weight_sum,
                            SMOOTHED,
                        )  # fmt: skip
                    if GRADIENTS:
                        value = _gradient(
                            student_row, teacher_row, student_gradient_row, teacher_gradient_row, class_weight, begin,
                            end, vocabulary, student_top, student_rate, student_log_total, teacher_top, teacher_rate,
                            teacher_log_total, plain_log_total, of_divergence * student_rate,
                            of_divergence * teacher_rate, scale, divergence, weight, label, of_q, of_label, of_weight,
                            student_cap, teacher_cap, parameter, TERMS, LABELS, SMOOTHED, SWEEP_2, BLOCK,
                        )  # fmt: skip
                        if LATE:
                            divergence = value
                    if tl.program_id(1) == 0:
                        tl.store(parts + n, of_divergence * divergence)
                        tl.store(parts + rows + n, scale * cross_entropy)
                        tl.store(parts + 2 * rows + n, scale * squared_lse)


@triton.jit
def scale_kernel(gradient, factors, rows, inner, vocabulary, outer_stride, inner_stride, PER_ROW: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Multiplies rows by their factor, in place; nothing is read or written where it is 1, as it nearly always is."""
    factor = tl.load(factors)
    for n in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        if PER_ROW:
            factor = tl.load(factors + n)
        if factor != 1:
            row = _at(gradient, n, inner, outer_stride, inner_stride)
            for start in tl.range(0, vocabulary, BLOCK):
                v = start + tl.arange(0, BLOCK)
                value = tl.load(row + v, mask=v < vocabulary).to(tl.float32)
                tl.store(row + v, value * factor, mask=v < vocabulary)
