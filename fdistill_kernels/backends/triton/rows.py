"""The row kernel: logits in, losses and gradients out, one skeleton for every divergence.

A row is swept at most three times, block by block, with all running values kept lane by lane so that no sweep waits for
a reduction before its end:
    1. statistics: maximum and sum of exponentials of both models, online, and each model's logit at the other's maximum
    2. totals: the divergence D and Σ student's terms, measured from the peak's (formulas.py), and Σ teacher's
    3. gradient: term − probability·Σ terms
Sweep 2 falls away where the divergence is centred (D is summed in sweep 3), and for label terms alone. Each sweep runs
over the row in the opposite direction of the one before: what was read last is still in L2.

A program takes whole rows, or one span of each row (few rows, a huge vocabulary); spans meet in `partials`, one launch
a phase.
"""

import triton
import triton.language as tl

from .terms import ABOUT_ONE, _log1p, _times, pair

WHOLE, STATISTICS, TOTALS, GRADIENT = (tl.constexpr(phase) for phase in range(4))
PARTIALS = 12  # values a span leaves: nine of sweep 1, three of sweep 2
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
def _advance(top, rest, x, rate):
    """Takes x into 1 + rest = Σ exp(rate·(x − top)), whose 1 is the maximum's own. An empty sum has rest −1."""
    e = tl.exp(-tl.abs(x - top) * rate)
    return tl.maximum(top, x), tl.where(x > top, (rest + 1) * e, rest + e)


@triton.jit
def _statistics(
    student, teacher, class_weight, begin, end, vocabulary, student_rate, teacher_rate, student_cap, teacher_cap, pivot,
    LABELS: tl.constexpr, SMOOTHED: tl.constexpr, TRAINED: tl.constexpr, BLOCK: tl.constexpr,
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
        x = _load(student, v, vocabulary, student_cap)
        if LABELS and teacher is not None:
            _, plain_rest = _advance(student_top, plain_rest, x, 1.0)
        if SMOOTHED:
            w = (v < vocabulary).to(tl.float32)
            if class_weight is not None:
                w = tl.load(class_weight + v, mask=v < vocabulary, other=0.0)
            linear += _times(w, x - pivot)
        if teacher is not None:
            y = _load(teacher, v, vocabulary, teacher_cap)
            teacher_there = tl.where(x > student_top, y, teacher_there)
            if TRAINED:
                student_there = tl.where(y > teacher_top, x, student_there)
            teacher_top, teacher_rest = _advance(teacher_top, teacher_rest, y, teacher_rate)
        student_top, student_rest = _advance(student_top, student_rest, x, student_rate)
    return _combine(student_top, student_rest, plain_rest, linear, teacher_top, teacher_rest, teacher_there,
                    student_there, student_rate, teacher_rate)  # fmt: skip


@triton.jit
def _sum_of_rests(top, rest, all_top, rate):
    """Rests of lanes, or of spans, to that of all."""
    highest = top == all_top
    rests = tl.where(highest, rest, (rest + 1) * tl.exp((top - all_top) * rate))
    return tl.sum(rests, 0) + (tl.sum(highest.to(tl.float32), 0) - 1)


@triton.jit
def _combine(
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
def _entry(x, y, models, u_at_peak):
    """Entries of a row with the student's logits x and the teacher's y, as terms.py takes them."""
    student_top, student_rate, student_log_total = models[0], models[1], models[2]
    teacher_top, teacher_rate, teacher_log_total = models[3], models[4], models[5]
    log_ratio, alike = models[6], models[7]
    q_shifted, p_shifted = (x - student_top) * student_rate, (y - teacher_top) * teacher_rate
    log_q, log_p = q_shifted - student_log_total, p_shifted - teacher_log_total
    # of models that nearly agree by their logits' own differences, which are exact
    apart = tl.where(alike, ((y - x) - (teacher_top - student_top)) * student_rate, p_shifted - q_shifted)
    return tl.exp(log_p), tl.exp(log_q), log_p, log_q, apart - log_ratio, p_shifted, q_shifted, u_at_peak


@triton.jit
def _models(student_top, student_rest, student_rate, teacher_top, teacher_rest, teacher_rate):
    """What `_entry` needs of a row."""
    apart = (teacher_rest - student_rest) / (1 + student_rest)
    little = tl.abs(apart) < 0.5
    log_ratio = _log1p(teacher_rest) - _log1p(student_rest)
    log_ratio = tl.where(little, _log1p(tl.where(little, apart, 0.0)), log_ratio)
    alike = (tl.abs(teacher_top - student_top) <= 1) & (teacher_rate == student_rate)
    return (student_top, student_rate, _log1p(student_rest), teacher_top, teacher_rate, _log1p(teacher_rest), log_ratio,
            alike)  # fmt: skip


@triton.jit
def _peaks(
    models, teacher_there, student_there, own, other, TERMS: tl.constexpr, EXCHANGED: tl.constexpr,
    CENTRED: tl.constexpr, TEACHER_CENTRED: tl.constexpr,
):  # fmt: skip
    """u at both models' largest entries, and their terms per probability there: what terms are measured from."""
    student_top, teacher_top = models[0], models[3]
    at_student = _entry(student_top, teacher_there, models, 0.0)
    u_at_peak = at_student[4]
    p, q, log_p, log_q, u, p_shifted, q_shifted, _ = at_student
    term, _, _ = pair((p, q, log_p, log_q, u, p_shifted, q_shifted, u_at_peak), own, other, u_at_peak, TERMS,
                      "own" if EXCHANGED == "own" else None, True)  # fmt: skip
    at_peak = 0.0 * term
    if not CENTRED:
        at_peak = term / q
    u_at_teacher_peak, at_teacher_peak = u_at_peak, at_peak
    if EXCHANGED is not None:
        at_teacher = _entry(student_there, teacher_top, models, u_at_peak)
        u_at_teacher_peak = at_teacher[4]
        _, _, of_teacher = pair(at_teacher, own, other, u_at_teacher_peak, TERMS, EXCHANGED, True)
        at_teacher_peak = of_teacher / at_teacher[0]
        if TEACHER_CENTRED:
            at_teacher_peak = 0.0 * at_teacher_peak
    return u_at_peak, at_peak, teacher_there, u_at_teacher_peak, at_teacher_peak, student_there


@triton.jit
def _terms(
    x, y, models, peaks, own, other, close, TERMS: tl.constexpr, EXCHANGED: tl.constexpr, CENTRED: tl.constexpr,
    TEACHER_CENTRED: tl.constexpr,
):  # fmt: skip
    """Entries' probabilities, values and both terms, measured from the peaks', whose own is 0."""
    u_at_peak, at_peak, teacher_there, u_at_teacher_peak, at_teacher_peak, student_there = peaks
    entry = _entry(x, y, models, u_at_peak)
    if close:
        student, value, teacher = pair(entry, own, other, u_at_teacher_peak, TERMS, EXCHANGED, True)
    else:
        student, value, teacher = pair(entry, own, other, u_at_teacher_peak, TERMS, EXCHANGED, False)
    if not CENTRED:
        student = tl.where((x == models[0]) & (y == teacher_there), 0.0, student - entry[1] * at_peak)
    if EXCHANGED is not None and not TEACHER_CENTRED:
        teacher = tl.where((y == models[3]) & (x == student_there), 0.0, teacher - entry[0] * at_teacher_peak)
    return entry[0], entry[1], student, value, teacher


@triton.jit
def _totals(
    student, teacher, begin, end, vocabulary, models, peaks, own, other, close, student_cap, teacher_cap,
    TERMS: tl.constexpr, EXCHANGED: tl.constexpr, CENTRED: tl.constexpr, TEACHER_CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep 2 over [begin, end), backwards: the shares of D and of both terms' sums."""
    value = tl.zeros([BLOCK], tl.float32)
    weight, teacher_weight = value, value
    last = begin + (tl.cdiv(end - begin, BLOCK) - 1) * BLOCK
    for offset in tl.range(0, end - begin, BLOCK):
        v = last - offset + tl.arange(0, BLOCK)
        x, y = _load(student, v, vocabulary, student_cap), _load(teacher, v, vocabulary, teacher_cap)
        _, _, of_student, here, of_teacher = _terms(x, y, models, peaks, own, other, close, TERMS, EXCHANGED, CENTRED,
                                                    TEACHER_CENTRED)  # fmt: skip
        value += tl.where(v < vocabulary, here, 0.0)
        weight += tl.where(v < vocabulary, of_student, 0.0)
        if EXCHANGED is not None:
            teacher_weight += tl.where(v < vocabulary, of_teacher, 0.0)
    return tl.sum(value, 0), tl.sum(weight, 0), tl.sum(teacher_weight, 0)


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
    student, teacher, student_gradient, teacher_gradient, class_weight, begin, end, vocabulary, models, peaks, own,
    other, close, plain_top, plain_log_total, student_scale, teacher_scale, label_scale, weight, teacher_weight, label,
    of_q, of_label, of_weight, student_cap, teacher_cap,
    TERMS: tl.constexpr, EXCHANGED: tl.constexpr, CENTRED: tl.constexpr, TEACHER_CENTRED: tl.constexpr,
    LABELS: tl.constexpr, SMOOTHED: tl.constexpr, FORWARD: tl.constexpr, BLOCK: tl.constexpr,
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
            y = _load(teacher, v, vocabulary, teacher_cap)
            p, q, of_student, here, of_teacher = _terms(x, y, models, peaks, own, other, close, TERMS, EXCHANGED,
                                                        CENTRED, TEACHER_CENTRED)  # fmt: skip
            value += tl.where(inside, here, 0.0)
            gradient = student_scale * (of_student - q * weight)
            if teacher_gradient is not None:
                result = teacher_scale * (of_teacher - p * teacher_weight)
                if teacher_cap is not None:
                    result *= 1 - (y / teacher_cap) * (y / teacher_cap)
                tl.store(teacher_gradient + v, result, mask=inside)
        if student_gradient is not None:
            if LABELS:
                of_labels = of_q * tl.exp(x - plain_top - plain_log_total)
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
def _save(partials, step, statistics):
    """A span's statistics, a step apart."""
    for i in tl.static_range(8):
        tl.store(partials + i * step, statistics[i])


@triton.jit
def _meet(partials, step, student_rate, teacher_rate, SPLITS: tl.constexpr):
    """The statistics of all spans."""
    at = partials + tl.arange(0, SPLITS)
    return _combine(
        tl.load(at), tl.load(at + step), tl.load(at + 2 * step), tl.load(at + 3 * step), tl.load(at + 4 * step),
        tl.load(at + 5 * step), tl.load(at + 6 * step), tl.load(at + 7 * step), student_rate, teacher_rate,
    )  # fmt: skip


@triton.jit
def _all(partials, SPLITS: tl.constexpr):
    """The sum of what the spans have left."""
    return tl.sum(tl.load(partials + tl.arange(0, SPLITS)), 0)


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
    student_cap, teacher_cap,
    parameter, rest, log_parameter, log_rest, c2, c3, c4, c5, c6, c7, c8,  # `Formula.constants`
    other_parameter, other_rest, other_log, other_log_rest,  # with the models exchanged
    smoothing,
    class_weight_sum,  # (1)
    TERMS: tl.constexpr, EXCHANGED: tl.constexpr, CENTRED: tl.constexpr, TEACHER_CENTRED: tl.constexpr,
    SMOOTHED: tl.constexpr, PHASE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0), + num_programs(0), ... of (outer, inner, V) logits; see `RowCall`. Absent pointers are None.

    Grid: (programs, 1) for whole rows, (programs, splits) for a phase on spans of `span` entries, a multiple of BLOCK.
    SPLITS is a power of two; what lies in `partials` beyond the grid's splits is ready to be combined.
    """
    LABELS: tl.constexpr = labels is not None
    DIVERGENCE: tl.constexpr = teacher is not None
    GRADIENTS: tl.constexpr = student_gradient is not None or teacher_gradient is not None
    # D is summed in the gradient's own sweep: there is no sum to wait for, and every entry passes there
    LATE: tl.constexpr = CENTRED and PHASE == WHOLE and student_gradient is not None and teacher_gradient is None
    SWEEP_2: tl.constexpr = DIVERGENCE and not LATE
    own = (parameter, rest, log_parameter, log_rest, c2, c3, c4, c5, c6, c7, c8)
    other = (other_parameter, other_rest, other_log, other_log_rest, c2, c3, c4, c5, c6, c7, c8)
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
                student_rate = tl.load(student_inverse_temperature + n)
                teacher_rate = tl.load(teacher_inverse_temperature + n)
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
                    label_logit = tl.load(saved + 8 * step)  # its entry may be the gradient already, in place
                pivot = tl.where(tl.abs(label_logit) < float("inf"), label_logit, 0.0)

            if PHASE == WHOLE or PHASE == STATISTICS:
                statistics = _statistics(
                    student_row, teacher_row, class_weight, begin, end, vocabulary, student_rate, teacher_rate,
                    student_cap, teacher_cap, pivot, LABELS, SMOOTHED, teacher_gradient is not None, BLOCK,
                )  # fmt: skip
            else:
                statistics = _meet(saved, step, student_rate, teacher_rate, SPLITS)
            if PHASE == STATISTICS:
                _save(saved + tl.program_id(1), step, statistics)
                tl.store(saved + tl.program_id(1) + 8 * step, label_logit)
            else:
                student_top, student_rest, plain_rest, linear, teacher_top, teacher_rest, _, _ = statistics
                if not DIVERGENCE:
                    plain_rest = student_rest
                divergence, weight, teacher_weight = 0.0, 0.0, 0.0
                models, peaks, close = 0.0, 0.0, False
                if DIVERGENCE:
                    models = _models(student_top, student_rest, student_rate, teacher_top, teacher_rest, teacher_rate)
                    peaks = _peaks(models, statistics[6], statistics[7], own, other, TERMS, EXCHANGED, CENTRED,
                                   TEACHER_CENTRED)  # fmt: skip
                    close = (tl.abs(peaks[0]) < ABOUT_ONE) | (tl.abs(peaks[3]) < ABOUT_ONE)
                if SWEEP_2 and PHASE != GRADIENT:
                    divergence, weight, teacher_weight = _totals(
                        student_row, teacher_row, begin, end, vocabulary, models, peaks, own, other, close, student_cap,
                        teacher_cap, TERMS, EXCHANGED, CENTRED, TEACHER_CENTRED, BLOCK,
                    )  # fmt: skip
                if PHASE == TOTALS:
                    here = saved + tl.program_id(1)
                    tl.store(here + 9 * step, divergence)
                    tl.store(here + 10 * step, weight)
                    tl.store(here + 11 * step, teacher_weight)
                if SWEEP_2 and PHASE == GRADIENT:
                    divergence, weight = _all(saved + 9 * step, SPLITS), _all(saved + 10 * step, SPLITS)
                    teacher_weight = _all(saved + 11 * step, SPLITS)
                if CENTRED:
                    weight = 0.0
                if TEACHER_CENTRED:
                    teacher_weight = 0.0

                if PHASE == WHOLE or PHASE == GRADIENT:
                    plain_log_total = _log1p(plain_rest)
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
                            end, vocabulary, models, peaks, own, other, close, student_top, plain_log_total,
                            of_divergence * student_rate, of_divergence * teacher_rate, scale, weight, teacher_weight,
                            label, of_q, of_label, of_weight, student_cap, teacher_cap, TERMS, EXCHANGED, CENTRED,
                            TEACHER_CENTRED, LABELS, SMOOTHED, SWEEP_2, BLOCK,
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
