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

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .entries import LABEL, LARGEST, Row, in_set, models_of, peaks_of, terms_at
from .loads import cap_slope, capped, first_of, line_at, line_of, row_at, store_block, within, zero_row
from .row_terms import COEFFICIENTS
from .softmaxes import added, met, no_sums, place_here, save, softmaxes_of
from .stretches import NOWHERE, Swept, blocks_of, clear_until, fetched_of, first_two, read, read_at, start_of
from .terms import ABOUT_ONE, LOG2E, log1p, times

WHOLE, STATISTICS, TOTALS, GRADIENT, TOGETHER = (tl.constexpr(phase) for phase in range(5))
PARTIALS = 14  # values a span leaves: nine of sweep 1, three of sweep 2, and what only it asks for, its place and top


class Label(NamedTuple):
    """A row's label: its place, whether it is one of the vocabulary, its logit, and what smoothing measures logits
    from, a finite number.
    """

    place: Any
    known: Any
    logit: Any
    pivot: Any


class LabelFactors(NamedTuple):
    """The label terms' gradient: the student's top and log-total at temperature 1, and the factors of q, of the label's
    entry and of each class weight.
    """

    top: Any
    log_total: Any
    of_q: Any
    of_label: Any
    of_weight: Any


class Written(NamedTuple):
    """What sweep 3 writes.

    Attributes:
        rows: the student's gradient and the teacher's; None: it is not wanted.
        scales, sums: of both models' terms.
        of_labels: `LabelFactors`; None: there are no labels.
        class_weight: a weight an entry; None: each is 1.
    """

    rows: Any
    scales: Any
    sums: Any
    of_labels: Any
    class_weight: Any


@triton.jit
def _set_of(y, start, row, CLEAR: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a block's entries are in the row's set; no label is in a clear one."""
    if KIND.MEMBERS == LABEL and CLEAR:
        return tl.zeros([BLOCK], tl.int1)
    else:
        return in_set(y, start + tl.arange(0, BLOCK), row.label, row.threshold, KIND.MEMBERS)


@triton.jit
def _counted(term, start, bounds, CLEAR: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The terms of a block; 0 out of bounds, as all of ours are of logits that are −inf in both models."""
    v = start + tl.arange(0, BLOCK)
    return tl.where(within(v, bounds), term, 0.0) if KIND.EXCHANGED == "own" and not CLEAR else term


@triton.jit
def _add_totals(
    totals, x, y, start, swept, row, CLEAR: tl.constexpr, CLOSE: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):  # fmt: skip
    """The shares of D and of both terms' sums, lane by lane, with those of a block of logits added."""
    value, weight, teacher_weight = totals
    inside = _set_of(y, start, row, CLEAR, KIND, BLOCK)
    of_student, here, of_teacher = terms_at(x, y, inside, row, None, CLEAR, CLOSE, KIND)
    value = added(value, _counted(here, start, swept.bounds, CLEAR, KIND, BLOCK), LINE)
    weight = added(weight, _counted(of_student, start, swept.bounds, CLEAR, KIND, BLOCK), LINE)
    if KIND.EXCHANGED is not None:
        teacher_weight = added(teacher_weight, _counted(of_teacher, start, swept.bounds, CLEAR, KIND, BLOCK), LINE)
    return value, weight, teacher_weight


@triton.jit
def _totals(swept, row, CLOSE: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """Sweep 2, backwards: the shares of D and of both terms' sums."""
    zeros = no_sums(swept.rows[0], BLOCK)
    totals = zeros, zeros, zeros
    k, count = 0, blocks_of(swept, BLOCK)
    while k < count:
        stop = clear_until(k, swept, NOWHERE if KIND.CENTRED else row.place,
                           row.label if KIND.MEMBERS == LABEL else NOWHERE, False, BLOCK)  # fmt: skip
        here, after = first_two(k, stop, swept, False, BLOCK, LINE)
        for two in tl.range(k, stop, 2):
            start = start_of(two, swept, False, BLOCK)
            ahead = start_of(tl.minimum(two + 2, stop - 2), swept, False, BLOCK)
            for i in tl.static_range(2):
                x, y = read(here, swept)
                here, after = after, fetched_of(swept.rows, ahead - i * BLOCK, None, BLOCK, LINE)
                totals = _add_totals(totals, x, y, start - i * BLOCK, swept, row, True, CLOSE, KIND, BLOCK, LINE)
        if stop < count:
            start = start_of(stop, swept, False, BLOCK)
            x, y = read_at(start, swept, False, BLOCK, LINE)
            totals = _add_totals(totals, x, y, start, swept, row, False, CLOSE, KIND, BLOCK, LINE)
        k = stop + 1
    return tl.sum(totals[0], 0), tl.sum(totals[1], 0), tl.sum(totals[2], 0)


@triton.jit
def _of_labels(
    x, start, bounds, factors, class_weight, place, CLEAR: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of a block's label terms; the label is in no clear one."""
    v = start + tl.arange(0, BLOCK)
    gradient = factors.of_q * tl.exp2((x - factors.top) * LOG2E - factors.log_total * LOG2E)
    if SMOOTHED and class_weight is not None:
        gradient -= factors.of_weight * tl.load(class_weight + v, mask=within(v, bounds), other=0.0)
    elif SMOOTHED:
        gradient -= factors.of_weight
    return gradient if CLEAR else tl.where(v == place, gradient - factors.of_label, gradient)


@triton.jit
def _scaled(scale, term, caps):
    """``scale·term``; 0 of a row that weighs nothing: it has the student beside itself, of which one may be capped."""
    ONE_CAPPED: tl.constexpr = (caps[0] is None) != (caps[1] is None)
    return tl.where(scale == 0, 0.0, scale * term) if ONE_CAPPED else scale * term


@triton.jit
def _write_gradient(
    value, x, y, start, swept, row, written, CLEAR: tl.constexpr, CLOSE: tl.constexpr, KIND: tl.constexpr,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Both gradients of a block of logits; returns the shares of D, lane by lane, with the block's added."""
    bounds, caps = swept.bounds, swept.caps
    gradient = tl.zeros([BLOCK], tl.float32)
    if KIND.TERMS is not None:
        inside = _set_of(y, start, row, CLEAR, KIND, BLOCK)
        of_student, here, of_teacher = terms_at(x, y, inside, row, written.sums, CLEAR, CLOSE, KIND)
        value = added(value, _counted(here, start, bounds, CLEAR, KIND, BLOCK), LINE)
        gradient = _scaled(written.scales[0], of_student, caps)
        if written.rows[1] is not None:
            of_teacher = _scaled(written.scales[1], of_teacher, caps) * cap_slope(y, caps[1])
            store_block(written.rows[1], start, bounds, of_teacher, CLEAR, BLOCK, LINE)
    if written.rows[0] is not None:
        if written.of_labels is not None:
            gradient += _of_labels(x, start, bounds, written.of_labels, written.class_weight, row.label, CLEAR,
                                   SMOOTHED, BLOCK)  # fmt: skip
        store_block(written.rows[0], start, bounds, gradient * cap_slope(x, caps[0]), CLEAR, BLOCK, LINE)
    return value


@triton.jit
def _gradient(
    swept, row, written, CLOSE: tl.constexpr, KIND: tl.constexpr, SMOOTHED: tl.constexpr, FORWARD: tl.constexpr,
    BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Sweep 3: both gradients; returns the shares of D for those who have not summed it."""
    STEP: tl.constexpr = BLOCK if FORWARD else -BLOCK
    AT_LABEL: tl.constexpr = written.of_labels is not None or KIND.MEMBERS == LABEL
    value = no_sums(swept.rows[0], BLOCK)
    k, count = 0, blocks_of(swept, BLOCK)
    while k < count:
        stop = clear_until(k, swept, NOWHERE if KIND.CENTRED else row.place, row.label if AT_LABEL else NOWHERE,
                           FORWARD, BLOCK)  # fmt: skip
        here, after = first_two(k, stop, swept, FORWARD, BLOCK, LINE)
        for two in tl.range(k, stop, 2):
            start = start_of(two, swept, FORWARD, BLOCK)
            ahead = start_of(tl.minimum(two + 2, stop - 2), swept, FORWARD, BLOCK)
            for i in tl.static_range(2):
                x, y = read(here, swept)
                here, after = after, fetched_of(swept.rows, ahead + i * STEP, None, BLOCK, LINE)
                value = _write_gradient(value, x, y, start + i * STEP, swept, row, written, True, CLOSE, KIND, SMOOTHED,
                                        BLOCK, LINE)  # fmt: skip
        if stop < count:
            start = start_of(stop, swept, FORWARD, BLOCK)
            x, y = read_at(start, swept, False, BLOCK, LINE)
            value = _write_gradient(value, x, y, start, swept, row, written, False, CLOSE, KIND, SMOOTHED, BLOCK, LINE)
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
def _label_at(label, student, bounds, cap, saved_logit, LINE: tl.constexpr):
    """The label of a row that starts there. saved_logit: where it is kept; its entry may be the gradient already, in
    place. None: it is read from the row.
    """
    known = (label >= 0) & (label < bounds[1] - bounds[0])
    place = tl.where(known, label, -LINE).to(tl.int32) + bounds[0]
    if saved_logit is None:
        logit = capped(tl.load(student + place, mask=known, other=float("nan")).to(tl.float32), cap)
    else:
        logit = tl.load(saved_logit)
    return Label(place, known, logit, tl.where(tl.abs(logit) < 1e37, logit, 0.0))  # not finfo.min, a mask


@triton.jit
def _with_coefficients(numbers, at, step):
    """A divergence's constants, and the row's coefficients behind them."""
    return (numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7], numbers[8],
            numbers[9], numbers[10], tl.load(at), tl.load(at + step), tl.load(at + 2 * step), tl.load(at + 3 * step),
            tl.load(at + 4 * step), tl.load(at + 5 * step), tl.load(at + 6 * step), tl.load(at + 7 * step),
            tl.load(at + 8 * step), tl.load(at + 9 * step))  # fmt: skip


@triton.jit
def _constants_of(n, numbers, other_numbers, coefficients, rows):
    """Row n's constants, those with the models exchanged, and its set's threshold."""
    if coefficients is None:
        return numbers, other_numbers, 0.0
    else:
        own = _with_coefficients(numbers, coefficients + n, rows)
        other = _with_coefficients(other_numbers, coefficients + (COEFFICIENTS - 1) * rows + n, -rows)
        return own, other, tl.load(coefficients + COEFFICIENTS * rows + n)


@triton.jit
def _peak_in_set(found, label, threshold, swept, KIND: tl.constexpr):
    """Whether the teacher's largest entry is in the row's set."""
    if KIND.MEMBERS == LABEL:
        there = tl.load(swept.rows[1] + label.place, mask=label.known, other=float("nan")).to(tl.float32)
        return (found.teacher_top == capped(there, swept.caps[1])) & (found.student_there == label.logit)
    elif KIND.MEMBERS == LARGEST:
        return found.teacher_top >= threshold
    else:
        return False


@triton.jit
def _label_terms(
    label, found, class_weight, class_weight_sum, vocabulary, scales, smoothing, DIVERGENCE: tl.constexpr,
    SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Cross-entropy, lse², and their gradient's factors. scales: of the row, the cross-entropy and lse²."""
    weight_sum, of_label = vocabulary * 1.0, 1.0 - smoothing
    if class_weight is not None:
        weight_sum = tl.load(class_weight_sum)
        of_label *= tl.load(class_weight + label.place, mask=label.known, other=0.0)
    top, log_total = found.student_top, log1p(found.plain_rest if DIVERGENCE else found.student_rest)
    cross_entropy = times(of_label, top - label.logit + log_total)
    spread = smoothing / vocabulary
    if SMOOTHED:
        cross_entropy += spread * (weight_sum * (top - label.pivot + log_total) - found.linear)
    lse = top + log_total
    of_q = scales[1] * of_label + 2 * scales[2] * lse
    if SMOOTHED:
        of_q += scales[1] * spread * weight_sum
    factors = LabelFactors(top, log_total, scales[0] * of_q, scales[0] * (scales[1] * of_label),
                           scales[0] * (scales[1] * spread))  # fmt: skip
    return cross_entropy, lse * lse, factors


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
    KIND: tl.constexpr,  # entries.py's
    SMOOTHED: tl.constexpr, PHASE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
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
    LATE: tl.constexpr = KIND.CENTRED and ALONE and student_gradient is not None and teacher_gradient is None
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
        student_row = row_at(student, n, inner, student_outer, student_inner)
        first = first_of(student_row, LINE)  # the same in all of these
        given, gradients = (line_of(student_row, first, LINE), teacher), (student_gradient, teacher_gradient)
        if teacher is not None:
            given = given[0], line_at(teacher, n, inner, teacher_outer, teacher_inner, first, LINE)
        if student_gradient is not None:
            of_student = line_at(student_gradient, n, inner, gradient_outer, gradient_inner, first, LINE)
            gradients = of_student, teacher_gradient
        if teacher_gradient is not None:
            gradients = gradients[0], line_at(teacher_gradient, n, 1, vocabulary, 0, first, LINE)
        bounds = first, first + vocabulary
        weights = class_weight
        if class_weight is not None:
            weights = class_weight - first
        begin, end = 0, bounds[1]
        if PHASE != WHOLE:
            begin = member * span
            end = tl.minimum(begin + span, bounds[1])
        scale = tl.load(row_scale + n)
        if scale == 0:
            if ALONE or PHASE == GRADIENT:
                zero_row(gradients[0], begin, end, bounds, BLOCK, LINE)
                zero_row(gradients[1], begin, end, bounds, BLOCK, LINE)
                for part in tl.static_range(3):
                    tl.store(parts + part * rows + n, 0.0)
        else:
            compared, caps, rates, of_divergence = given, (student_cap, teacher_cap), (1.0, 1.0), 0.0
            if DIVERGENCE:
                student_rate = tl.load(student_inverse_temperature + n)
                rates = student_rate, student_rate
                if teacher_inverse_temperature is not None:
                    rates = student_rate, tl.load(teacher_inverse_temperature + n)
                of_divergence = scale * tl.load(divergence_scale + n)
                # what weighs nothing beside labels may be no number: the student is compared with itself
                if LABELS or not LATE or coefficients is not None:
                    compared = given[0], tl.where(of_divergence == 0, given[0], given[1])
                    rates = student_rate, tl.where(of_divergence == 0, student_rate, rates[1])
                    if student_cap is not None and teacher_cap is not None:
                        caps = student_cap, tl.where(of_divergence == 0, student_cap, teacher_cap)
            swept = Swept(compared, caps, begin, end, bounds)
            saved, here, step = partials, partials, rows * SPLITS  # of all spans, and of this one
            if PHASE != WHOLE:
                saved = partials + n * SPLITS
                here = saved + member

            # sweep 1
            label = Label(-1, False, 0.0, 0.0)
            if LABELS:
                label = _label_at(tl.load(labels + n), given[0], bounds, student_cap,
                                  None if ALONE or PHASE == STATISTICS else saved + 8 * step, LINE)  # fmt: skip
            if ALONE or PHASE == STATISTICS:
                found = softmaxes_of(swept, rates, weights, label.pivot, LABELS, SMOOTHED, teacher_gradient is not None,
                                     BLOCK, LINE)  # fmt: skip
                if LATE:  # in place, no warp may write where another has still to look for the peak
                    tl.debug_barrier()
            else:
                found = met(saved, step, rates, SPLITS)
            if PHASE == STATISTICS or PHASE == TOGETHER:
                save(here, step, found, label.logit)
            if PHASE == TOGETHER:
                _meet(tickets + 1 + n, members)
                found = met(saved, step, rates, SPLITS)

            if PHASE != STATISTICS:
                place = found.place
                if PHASE != WHOLE:
                    place = place_here(here, step, found.student_top)
                own, other, threshold = _constants_of(n, numbers, other_numbers, coefficients, rows)
                factors, close = (0.0, 0.0, 1.0, 1.0), False
                row = Row(None, None, own, other, place, label.place, threshold)
                if DIVERGENCE:
                    if KIND.FACTORS is not None:
                        factors = KIND.FACTORS(own)
                    inside = _peak_in_set(found, label, threshold, swept, KIND)
                    models = models_of(found, rates, factors, DIGITS)
                    peaks = peaks_of(models, found.teacher_there, found.student_there, inside, own, other, KIND)
                    close = (tl.abs(peaks.u) < ABOUT_ONE) | (tl.abs(peaks.teacher_u) < ABOUT_ONE)
                    row = Row(models, peaks, own, other, place, label.place, threshold)

                # sweep 2
                divergence, weight, teacher_weight = 0.0, 0.0, 0.0
                if SWEEP_2 and PHASE != GRADIENT:
                    if close:
                        divergence, weight, teacher_weight = _totals(swept, row, True, KIND, BLOCK, LINE)
                    else:
                        divergence, weight, teacher_weight = _totals(swept, row, False, KIND, BLOCK, LINE)
                if PHASE == TOTALS or PHASE == TOGETHER:
                    tl.store(here + 9 * step, divergence)
                    tl.store(here + 10 * step, weight)
                    tl.store(here + 11 * step, teacher_weight)
                if SWEEP_2 and PHASE == TOGETHER:
                    _meet(tickets + 1 + n, 2 * members)
                if SWEEP_2 and (PHASE == GRADIENT or PHASE == TOGETHER):
                    divergence, weight = _all(saved + 9 * step, SPLITS), _all(saved + 10 * step, SPLITS)
                    teacher_weight = _all(saved + 11 * step, SPLITS)

                # sweep 3
                if ALONE or PHASE == GRADIENT:
                    cross_entropy, squared_lse, of_labels = 0.0, 0.0, None
                    if LABELS:
                        of_terms = scale, tl.load(cross_entropy_scale + n), tl.load(z_loss_scale + n)
                        cross_entropy, squared_lse, of_labels = _label_terms(
                            label, found, weights, class_weight_sum, vocabulary, of_terms, smoothing, DIVERGENCE,
                            SMOOTHED,
                        )  # fmt: skip
                    if GRADIENTS:
                        scales = of_divergence * rates[0], of_divergence * rates[1]
                        sums = weight * factors[3], teacher_weight * factors[2]
                        written = Written(gradients, scales, sums, of_labels, weights)
                        if close:
                            value = _gradient(swept, row, written, True, KIND, SMOOTHED, SWEEP_2, BLOCK, LINE)
                        else:
                            value = _gradient(swept, row, written, False, KIND, SMOOTHED, SWEEP_2, BLOCK, LINE)
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
