"""The row kernel: logits in, losses and gradients out, one skeleton for every divergence.

A row is swept at most three times, block by block, with all running values kept lane by lane so that no sweep waits for
a reduction before its end:
    1. statistics: maximum and sum of exponentials of both models, online, and each model's logit at the other's maximum
    2. totals: the divergence D and Σ student's terms, measured from the peak's (formulas.py), and Σ teacher's
    3. gradient: term − probability·Σ terms
Sweep 2 falls away where the divergence is centred (D is summed in sweep 3), and for label terms alone. Each sweep runs
over the row in the opposite direction of the one before: what was read last is still in L2. A block that is whole and
without the row's peak and label is CLEAR: it needs no masks and no choices, and stretches of them (stretches.py) no
branches. Rows that are `close` to their teacher have sweeps of their own.

A program takes whole rows, or one span of each row (few rows, a huge vocabulary); spans meet in `partials`, one launch
a phase. Or a team of programs takes a row TOGETHER, a span each, and they wait for each other between the sweeps: few
rows are then under way at once, which L2 can hold for the sweeps after the first.
"""

import triton
import triton.language as tl

from .entries import LABEL, LARGEST, in_set, models_of, peaks_of, terms_at
from .loads import (
    cap_slope,
    capped,
    first_of,
    line_of,
    load_block,
    logits_of,
    row_at,
    store_block,
    within,
    zero_row,
)
from .row_terms import COEFFICIENTS
from .softmaxes import added, met, no_sums, save, softmaxes_of
from .stretches import NOWHERE, clear_until, fetched_of, first_two, start_of
from .terms import ABOUT_ONE, LOG2E, log1p, times

WHOLE, STATISTICS, TOTALS, GRADIENT, TOGETHER = (tl.constexpr(phase) for phase in range(5))
PARTIALS = 14  # values a span leaves: nine of sweep 1, three of sweep 2, and what only it asks for, its place and top


@triton.jit
def _set_of(y, start, label, threshold, CLEAR: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a block's entries are in the row's set; no label is in a clear one."""
    if MEMBERS == LABEL and CLEAR:
        return tl.zeros([BLOCK], tl.int1)
    else:
        return in_set(y, start + tl.arange(0, BLOCK), label, threshold, MEMBERS)


@triton.jit
def _counted(term, start, bounds, CLEAR: tl.constexpr, EXCHANGED: tl.constexpr, BLOCK: tl.constexpr):
    """The terms of a block; 0 out of bounds, as all of ours are of logits that are −inf in both models."""
    v = start + tl.arange(0, BLOCK)
    return tl.where(within(v, bounds), term, 0.0) if EXCHANGED == "own" and not CLEAR else term


@triton.jit
def _add_totals(
    x, y, value, weight, teacher_weight, start, bounds, models, peaks, own, other, label, threshold,
    CLEAR: tl.constexpr, CLOSE: tl.constexpr, TERMS: tl.constexpr, EXCHANGED: tl.constexpr, CENTRED: tl.constexpr,
    TEACHER_CENTRED: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """The shares of D and of both terms' sums, lane by lane, with those of a block of logits added."""
    of_student, here, of_teacher = terms_at(
        x, y, _set_of(y, start, label, threshold, CLEAR, MEMBERS, BLOCK), models, peaks, own, other, None, CLEAR,
        CLOSE, TERMS, EXCHANGED, CENTRED, TEACHER_CENTRED,
    )  # fmt: skip
    value = added(value, _counted(here, start, bounds, CLEAR, EXCHANGED, BLOCK), LINE)
    weight = added(weight, _counted(of_student, start, bounds, CLEAR, EXCHANGED, BLOCK), LINE)
    if EXCHANGED is not None:
        teacher_weight = added(teacher_weight, _counted(of_teacher, start, bounds, CLEAR, EXCHANGED, BLOCK), LINE)
    return value, weight, teacher_weight


@triton.jit
def _totals(
    rows, begin, end, bounds, caps, models, peaks, place, own, other, label, threshold, CLOSE: tl.constexpr,
    TERMS: tl.constexpr, EXCHANGED: tl.constexpr, CENTRED: tl.constexpr, TEACHER_CENTRED: tl.constexpr,
    MEMBERS: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Sweep 2 over [begin, end), backwards: the shares of D and of both terms' sums."""
    value = no_sums(rows[0], BLOCK)
    weight, teacher_weight = value, value
    k, count = 0, tl.cdiv(end - begin, BLOCK)
    while k < count:
        stop = clear_until(k, begin, end, bounds, NOWHERE if CENTRED else place,
                           label if MEMBERS == LABEL else NOWHERE, False, BLOCK)  # fmt: skip
        here, after = first_two(rows, k, stop, begin, end, False, BLOCK, LINE)
        for two in tl.range(k, stop, 2):
            start = start_of(two, begin, end, False, BLOCK)
            ahead = start_of(tl.minimum(two + 2, stop - 2), begin, end, False, BLOCK)
            for i in tl.static_range(2):
                x, y = logits_of(here[0], caps[0]), logits_of(here[1], caps[1])
                here, after = after, fetched_of(rows, ahead - i * BLOCK, None, BLOCK, LINE)
                value, weight, teacher_weight = _add_totals(
                    x, y, value, weight, teacher_weight, start - i * BLOCK, bounds, models, peaks, own, other, label,
                    threshold, True, CLOSE, TERMS, EXCHANGED, CENTRED, TEACHER_CENTRED, MEMBERS, BLOCK, LINE,
                )  # fmt: skip
        if stop < count:
            start = start_of(stop, begin, end, False, BLOCK)
            x = load_block(rows[0], start, bounds, caps[0], False, BLOCK, LINE)
            y = load_block(rows[1], start, bounds, caps[1], False, BLOCK, LINE)
            value, weight, teacher_weight = _add_totals(
                x, y, value, weight, teacher_weight, start, bounds, models, peaks, own, other, label, threshold, False,
                CLOSE, TERMS, EXCHANGED, CENTRED, TEACHER_CENTRED, MEMBERS, BLOCK, LINE,
            )  # fmt: skip
        k = stop + 1
    return tl.sum(value, 0), tl.sum(weight, 0), tl.sum(teacher_weight, 0)


@triton.jit
def _label_terms(
    label, known, label_logit, top, log_total, linear, pivot, class_weight, vocabulary, ce_scale, smoothing, z_scale,
    class_weight_sum, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Cross-entropy and lse², and the factors of q, of the label's entry and of each class weight in their gradient."""
    of_label = 1.0 - smoothing
    if class_weight is not None:
        of_label *= tl.load(class_weight + label, mask=known, other=0.0)
    cross_entropy = times(of_label, top - label_logit + log_total)
    spread = smoothing / vocabulary
    if SMOOTHED:
        cross_entropy += spread * (class_weight_sum * (top - pivot + log_total) - linear)
    lse = top + log_total
    of_q = ce_scale * of_label + 2 * z_scale * lse
    if SMOOTHED:
        of_q += ce_scale * spread * class_weight_sum
    return cross_entropy, lse * lse, of_q, ce_scale * of_label, ce_scale * spread


@triton.jit
def _of_labels(
    x, start, bounds, label, class_weight, plain_top, plain_log_total, of_q, of_label, of_weight, CLEAR: tl.constexpr,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a block's label terms; the label is in no clear one."""
    v = start + tl.arange(0, BLOCK)
    gradient = of_q * tl.exp2((x - plain_top) * LOG2E - plain_log_total * LOG2E)
    if SMOOTHED and class_weight is not None:
        gradient -= of_weight * tl.load(class_weight + v, mask=within(v, bounds), other=0.0)
    elif SMOOTHED:
        gradient -= of_weight
    return gradient if CLEAR else tl.where(v == label, gradient - of_label, gradient)


@triton.jit
def _scaled(scale, term, caps):
    """``scale·term``; 0 of a row that weighs nothing: it has the student beside itself, of which one may be capped."""
    ONE_CAPPED: tl.constexpr = (caps[0] is None) != (caps[1] is None)
    return tl.where(scale == 0, 0.0, scale * term) if ONE_CAPPED else scale * term


@triton.jit
def _write_gradient(
    x, y, value, gradients, start, bounds, caps, models, peaks, own, other, label, threshold, scales, sums,
    class_weight, of_labels, CLEAR: tl.constexpr, CLOSE: tl.constexpr, TERMS: tl.constexpr, EXCHANGED: tl.constexpr,
    CENTRED: tl.constexpr, TEACHER_CENTRED: tl.constexpr, MEMBERS: tl.constexpr, LABELS: tl.constexpr,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Both gradients of a block of logits; returns the shares of D, lane by lane, with the block's added."""
    gradient = tl.zeros([BLOCK], tl.float32)
    if TERMS is not None:
        of_student, here, of_teacher = terms_at(
            x, y, _set_of(y, start, label, threshold, CLEAR, MEMBERS, BLOCK), models, peaks, own, other, sums, CLEAR,
            CLOSE, TERMS, EXCHANGED, CENTRED, TEACHER_CENTRED,
        )  # fmt: skip
        value = added(value, _counted(here, start, bounds, CLEAR, EXCHANGED, BLOCK), LINE)
        gradient = _scaled(scales[0], of_student, caps)
        if gradients[1] is not None:
            of_teacher = _scaled(scales[1], of_teacher, caps) * cap_slope(y, caps[1])
            store_block(gradients[1], start, bounds, of_teacher, CLEAR, BLOCK, LINE)
    if gradients[0] is not None:
        if LABELS:
            gradient += _of_labels(
                x, start, bounds, label, class_weight, of_labels[0], of_labels[1], of_labels[2], of_labels[3],
                of_labels[4], CLEAR, SMOOTHED, BLOCK,
            )  # fmt: skip
        store_block(gradients[0], start, bounds, gradient * cap_slope(x, caps[0]), CLEAR, BLOCK, LINE)
    return value


@triton.jit
def _gradient(
    rows, gradients, begin, end, bounds, caps, models, peaks, place, own, other, label, threshold, scales, sums,
    class_weight, of_labels, CLOSE: tl.constexpr, TERMS: tl.constexpr, EXCHANGED: tl.constexpr, CENTRED: tl.constexpr,
    TEACHER_CENTRED: tl.constexpr, MEMBERS: tl.constexpr, LABELS: tl.constexpr, SMOOTHED: tl.constexpr,
    FORWARD: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Sweep 3 over [begin, end): both gradients; returns the shares of D for those who have not summed it."""
    STEP: tl.constexpr = BLOCK if FORWARD else -BLOCK
    value = no_sums(rows[0], BLOCK)
    k, count = 0, tl.cdiv(end - begin, BLOCK)
    while k < count:
        stop = clear_until(k, begin, end, bounds, NOWHERE if CENTRED else place,
                           label if LABELS or MEMBERS == LABEL else NOWHERE, FORWARD, BLOCK)  # fmt: skip
        here, after = first_two(rows, k, stop, begin, end, FORWARD, BLOCK, LINE)
        for two in tl.range(k, stop, 2):
            start = start_of(two, begin, end, FORWARD, BLOCK)
            ahead = start_of(tl.minimum(two + 2, stop - 2), begin, end, FORWARD, BLOCK)
            for i in tl.static_range(2):
                x, y = logits_of(here[0], caps[0]), logits_of(here[1], caps[1])
                here, after = after, fetched_of(rows, ahead + i * STEP, None, BLOCK, LINE)
                value = _write_gradient(
                    x, y, value, gradients, start + i * STEP, bounds, caps, models, peaks, own, other, label, threshold,
                    scales, sums, class_weight, of_labels, True, CLOSE, TERMS, EXCHANGED, CENTRED, TEACHER_CENTRED,
                    MEMBERS, LABELS, SMOOTHED, BLOCK, LINE,
                )  # fmt: skip
        if stop < count:
            start = start_of(stop, begin, end, FORWARD, BLOCK)
            x = load_block(rows[0], start, bounds, caps[0], False, BLOCK, LINE)
            y = x
            if rows[1] is not None:
                y = load_block(rows[1], start, bounds, caps[1], False, BLOCK, LINE)
            value = _write_gradient(
                x, y, value, gradients, start, bounds, caps, models, peaks, own, other, label, threshold, scales, sums,
                class_weight, of_labels, False, CLOSE, TERMS, EXCHANGED, CENTRED, TEACHER_CENTRED, MEMBERS, LABELS,
                SMOOTHED, BLOCK, LINE,
            )  # fmt: skip
        k = stop + 1
    return tl.sum(value, 0)


@triton.jit
def _arrived(counter):
    """How many of a team have come here, this program with them; what each has stored is there for all."""
    tl.debug_barrier()  # of all its threads
    return tl.atomic_add(counter, 1, sem="acq_rel") + 1


@triton.jit
def _meet(counter, count):
    """Waits until so many have come."""
    arrived = _arrived(counter)
    while arrived < count:
        arrived = tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def _all(partials, SPLITS: tl.constexpr):
    """The sum of what the spans have left."""
    return tl.sum(tl.load(partials + tl.arange(0, SPLITS)), 0)


@triton.jit
def _with_coefficients(own, coefficients, step):
    """A divergence's constants, and the row's coefficients behind them."""
    at = coefficients
    return (own[0], own[1], own[2], own[3], own[4], own[5], own[6], own[7], own[8], own[9], own[10], tl.load(at),
            tl.load(at + step), tl.load(at + 2 * step), tl.load(at + 3 * step), tl.load(at + 4 * step),
            tl.load(at + 5 * step), tl.load(at + 6 * step), tl.load(at + 7 * step), tl.load(at + 8 * step),
            tl.load(at + 9 * step))  # fmt: skip


@triton.jit(do_not_specialize=["rows", "inner"])
def row_kernel(
    student, teacher,  # (outer, inner, vocabulary) logits, dense in the vocabulary
    student_gradient, teacher_gradient,  # of the same shape; the teacher's dense
    parts,  # (3, rows)
    partials,  # (PARTIALS, rows, SPLITS) float32
    tickets,  # (1 + rows) int32 zeros, of teams: programs that have begun, and those that have come to meet for a row
    row_scale, student_inverse_temperature, teacher_inverse_temperature,  # (rows); no teacher's: the student's
    divergence_scale, cross_entropy_scale, z_loss_scale, labels,  # (rows)
    class_weight,  # (vocabulary)
    coefficients,  # (COEFFICIENTS + 1, rows): of row_statistics.py
    rows, inner, vocabulary, span,
    student_outer, student_inner, teacher_outer, teacher_inner, gradient_outer, gradient_inner,  # strides
    student_cap, teacher_cap,
    parameter, rest, log_parameter, log_rest, c2, c3, c4, c5, c6, c7, c8,  # `Formula.constants`
    other_parameter, other_rest, other_log, other_log_rest,  # with the models exchanged
    smoothing,
    class_weight_sum,  # (1)
    TERMS: tl.constexpr, FACTORS: tl.constexpr, EXCHANGED: tl.constexpr, CENTRED: tl.constexpr,
    TEACHER_CENTRED: tl.constexpr, MEMBERS: tl.constexpr, SMOOTHED: tl.constexpr, PHASE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0), + num_programs(0), ... of (outer, inner, V) logits; see `RowCall`. Absent pointers are None.

    Grid: (programs, 1) for whole rows, (programs, splits) for a phase on spans of `span` entries, a multiple of BLOCK,
    (teams, splits) for teams. SPLITS is a power of two; what lies in `partials` beyond the grid's splits is ready to be
    combined. LINE: see loads.py.

    A team is of programs that have begun one after the other, as their tickets say, in whatever order they are started.
    So all teams but the last to begin are complete and come to their end, which gives places to the rest of that one.
    """
    LABELS: tl.constexpr = labels is not None
    DIVERGENCE: tl.constexpr = teacher is not None
    GRADIENTS: tl.constexpr = student_gradient is not None or teacher_gradient is not None
    # D is summed in the gradient's own sweep: there is no sum to wait for, and every entry passes there
    ALONE: tl.constexpr = PHASE == WHOLE or PHASE == TOGETHER  # the only launch
    LATE: tl.constexpr = CENTRED and ALONE and student_gradient is not None and teacher_gradient is None
    SWEEP_2: tl.constexpr = DIVERGENCE and not LATE
    DIGITS: tl.constexpr = DIVERGENCE and (
        teacher_inverse_temperature is None and student_cap is None and teacher_cap is None
        and student.dtype.element_ty.primitive_bitwidth == 16 and teacher.dtype.element_ty.primitive_bitwidth == 16
    )  # fmt: skip
    numbers = (parameter, rest, log_parameter, log_rest, c2, c3, c4, c5, c6, c7, c8)
    other_numbers = (other_parameter, other_rest, other_log, other_log_rest, c2, c3, c4, c5, c6, c7, c8)
    team, member, members = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if PHASE == TOGETHER:
        ticket = tl.atomic_add(tickets, 1, sem="relaxed")
        team, member = ticket // members, ticket % members
    for n in tl.range(team, rows, tl.num_programs(0)):
        student_row, teacher_row = row_at(student, n, inner, student_outer, student_inner), teacher
        first = first_of(student_row, LINE)  # the same in all of these
        student_row = line_of(student_row, first, LINE)
        student_gradient_row, teacher_gradient_row, weight_row = student_gradient, teacher_gradient, class_weight
        if DIVERGENCE:
            teacher_row = line_of(row_at(teacher, n, inner, teacher_outer, teacher_inner), first, LINE)
        if student_gradient is not None:
            student_gradient_row = row_at(student_gradient, n, inner, gradient_outer, gradient_inner)
            student_gradient_row = line_of(student_gradient_row, first, LINE)
        if teacher_gradient is not None:
            teacher_gradient_row = line_of(teacher_gradient + tl.cast(n, tl.int64) * vocabulary, first, LINE)
        if class_weight is not None:
            weight_row = class_weight - first
        bounds = (first, first + vocabulary)
        begin, end = 0, first + vocabulary
        if PHASE != WHOLE:
            begin = member * span
            end = tl.minimum(begin + span, first + vocabulary)
        scale, cap_of_teacher = tl.load(row_scale + n), teacher_cap
        if scale == 0:
            if ALONE or PHASE == GRADIENT:
                zero_row(student_gradient_row, begin, end, bounds, BLOCK, LINE)
                zero_row(teacher_gradient_row, begin, end, bounds, BLOCK, LINE)
                for part in tl.static_range(3):
                    tl.store(parts + part * rows + n, 0.0)
        else:
            student_rate, teacher_rate, of_divergence = 1.0, 1.0, 0.0
            if DIVERGENCE:
                student_rate = tl.load(student_inverse_temperature + n)
                teacher_rate = student_rate
                if teacher_inverse_temperature is not None:
                    teacher_rate = tl.load(teacher_inverse_temperature + n)
                of_divergence = scale * tl.load(divergence_scale + n)
                # what weighs nothing beside labels may be no number: the student is compared with itself
                if LABELS or not LATE or coefficients is not None:
                    teacher_row = tl.where(of_divergence == 0, student_row, teacher_row)
                    teacher_rate = tl.where(of_divergence == 0, student_rate, teacher_rate)
                    if student_cap is not None and teacher_cap is not None:
                        cap_of_teacher = tl.where(of_divergence == 0, student_cap, teacher_cap)
            caps = (student_cap, cap_of_teacher)
            saved, here, step = partials, partials, rows * SPLITS  # of all spans, and of this one
            if PHASE != WHOLE:
                saved = partials + n * SPLITS
                here = saved + member

            label, known, label_logit, pivot = -1, False, 0.0, 0.0
            if LABELS:
                label = tl.load(labels + n)
                known = (label >= 0) & (label < vocabulary)
                label = tl.where(known, label, -LINE).to(tl.int32) + first
                if ALONE or PHASE == STATISTICS:
                    label_logit = tl.load(student_row + label, mask=known, other=float("nan")).to(tl.float32)
                    label_logit = capped(label_logit, student_cap)
                else:
                    label_logit = tl.load(saved + 8 * step)  # its entry may be the gradient already, in place
                pivot = tl.where(tl.abs(label_logit) < 1e37, label_logit, 0.0)  # not finfo.min, a mask

            if ALONE or PHASE == STATISTICS:
                statistics = softmaxes_of(
                    student_row, teacher_row, weight_row, begin, end, bounds, student_rate, teacher_rate, caps[0],
                    caps[1], pivot, LABELS, SMOOTHED, teacher_gradient is not None, BLOCK, LINE,
                )  # fmt: skip
                if LATE:  # in place, no warp may write where another has still to look for the peak
                    tl.debug_barrier()
            else:
                statistics = met(saved, step, student_rate, teacher_rate, SPLITS)
            if PHASE == STATISTICS or PHASE == TOGETHER:
                save(here, step, statistics)
                tl.store(here + 8 * step, label_logit)
                tl.store(here + 12 * step, statistics[8].to(tl.float32, bitcast=True))
                tl.store(here + 13 * step, statistics[0])
            if PHASE == TOGETHER:
                _meet(tickets + 1 + n, members)
                statistics = met(saved, step, student_rate, teacher_rate, SPLITS)
            if PHASE != STATISTICS:
                student_top, student_rest, plain_rest, linear, teacher_top, teacher_rest, _, _, place = statistics
                if PHASE != WHOLE:
                    place = tl.load(here + 12 * step).to(tl.int32, bitcast=True)
                    place = tl.where(tl.load(here + 13 * step) == student_top, place, NOWHERE)
                if not DIVERGENCE:
                    plain_rest = student_rest
                divergence, weight, teacher_weight = 0.0, 0.0, 0.0
                models, peaks, close, threshold, inside_there = 0.0, 0.0, False, 0.0, False
                own, other, factors = numbers, other_numbers, (0.0, 0.0, 1.0, 1.0)
                if coefficients is not None:
                    own = _with_coefficients(numbers, coefficients + n, rows)
                    other = _with_coefficients(other_numbers, coefficients + (COEFFICIENTS - 1) * rows + n, -rows)
                    threshold = tl.load(coefficients + COEFFICIENTS * rows + n)
                if MEMBERS == LABEL:
                    label_there = tl.load(teacher_row + label, mask=known, other=float("nan")).to(tl.float32)
                    label_there = capped(label_there, caps[1])
                    inside_there = (teacher_top == label_there) & (statistics[7] == label_logit)
                elif MEMBERS == LARGEST:
                    inside_there = teacher_top >= threshold
                if DIVERGENCE:
                    if FACTORS is not None:
                        factors = FACTORS(own)
                    models = models_of(student_top, student_rest, student_rate, teacher_top, teacher_rest, teacher_rate,
                                       factors[1], factors[0], DIGITS)  # fmt: skip
                    peaks = peaks_of(models, statistics[6], statistics[7], inside_there, own, other, TERMS, EXCHANGED,
                                   CENTRED, TEACHER_CENTRED)  # fmt: skip
                    close = (tl.abs(peaks[0]) < ABOUT_ONE) | (tl.abs(peaks[3]) < ABOUT_ONE)
                if SWEEP_2 and PHASE != GRADIENT:
                    sources = (student_row, teacher_row)
                    if close:
                        divergence, weight, teacher_weight = _totals(
                            sources, begin, end, bounds, caps, models, peaks, place, own, other, label, threshold, True,
                            TERMS, EXCHANGED, CENTRED, TEACHER_CENTRED, MEMBERS, BLOCK, LINE,
                        )  # fmt: skip
                    else:
                        divergence, weight, teacher_weight = _totals(
                            sources, begin, end, bounds, caps, models, peaks, place, own, other, label, threshold,
                            False, TERMS, EXCHANGED, CENTRED, TEACHER_CENTRED, MEMBERS, BLOCK, LINE,
                        )  # fmt: skip
                if PHASE == TOTALS or PHASE == TOGETHER:
                    tl.store(here + 9 * step, divergence)
                    tl.store(here + 10 * step, weight)
                    tl.store(here + 11 * step, teacher_weight)
                if SWEEP_2 and PHASE == TOGETHER:
                    _meet(tickets + 1 + n, 2 * members)
                if SWEEP_2 and (PHASE == GRADIENT or PHASE == TOGETHER):
                    divergence, weight = _all(saved + 9 * step, SPLITS), _all(saved + 10 * step, SPLITS)
                    teacher_weight = _all(saved + 11 * step, SPLITS)

                if ALONE or PHASE == GRADIENT:
                    plain_log_total = log1p(plain_rest)
                    cross_entropy, squared_lse, of_q, of_label, of_weight = 0.0, 0.0, 0.0, 0.0, 0.0
                    if LABELS:
                        weight_sum = vocabulary * 1.0
                        if class_weight is not None:
                            weight_sum = tl.load(class_weight_sum)
                        cross_entropy, squared_lse, of_q, of_label, of_weight = _label_terms(
                            label, known, label_logit, student_top, plain_log_total, linear, pivot, weight_row,
                            vocabulary, tl.load(cross_entropy_scale + n), smoothing, tl.load(z_loss_scale + n),
                            weight_sum, SMOOTHED,
                        )  # fmt: skip
                    if GRADIENTS:
                        sources, gradients = (student_row, teacher_row), (student_gradient_row, teacher_gradient_row)
                        sums = (weight * factors[3], teacher_weight * factors[2])
                        scales = (of_divergence * student_rate, of_divergence * teacher_rate)
                        of_labels = (student_top, plain_log_total, scale * of_q, scale * of_label, scale * of_weight)
                        if close:
                            value = _gradient(
                                sources, gradients, begin, end, bounds, caps, models, peaks, place, own, other, label,
                                threshold, scales, sums, weight_row, of_labels, True, TERMS,
                                EXCHANGED, CENTRED, TEACHER_CENTRED, MEMBERS, LABELS, SMOOTHED, SWEEP_2, BLOCK, LINE,
                            )  # fmt: skip
                        else:
                            value = _gradient(
                                sources, gradients, begin, end, bounds, caps, models, peaks, place, own, other, label,
                                threshold, scales, sums, weight_row, of_labels, False, TERMS,
                                EXCHANGED, CENTRED, TEACHER_CENTRED, MEMBERS, LABELS, SMOOTHED, SWEEP_2, BLOCK, LINE,
                            )  # fmt: skip
                        if LATE:
                            divergence = value
                    writes = member == 0
                    if LATE and PHASE == TOGETHER:
                        tl.store(here + 9 * step, value)
                        writes = _arrived(tickets + 1 + n) == 2 * members  # nobody is waited for
                        divergence = _all(saved + 9 * step, SPLITS)
                    if writes:
                        tl.store(parts + n, times(of_divergence, divergence))
                        tl.store(parts + rows + n, scale * cross_entropy)
                        tl.store(parts + 2 * rows + n, scale * squared_lse)
