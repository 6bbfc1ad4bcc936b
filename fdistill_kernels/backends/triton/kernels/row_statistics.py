"""What a divergence asks of rows before the row kernel: its set of entries, and the coefficients of its sums."""

import triton
import triton.language as tl

from .entries import LABEL, LARGEST, Row, entry_of, in_set, models_of
from .loads import first_of, line_at, line_of, load_block, row_at, within
from .row_terms import COEFFICIENTS
from .softmaxes import added, by_lane, no_sums, softmaxes_of
from .stretches import NOWHERE, Swept, blocks_of, clear_until, read_at
from .terms import LOG2E, NO_OVERLAP

#: How the teacher's largest entries are told: by their number, or by their mass.
COUNT, MASS = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _float_of(key):
    """The float of a key that orders them."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _threshold(swept, models, enough, BY: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """The largest t that enough entries, or their mass, are at or above: by the bits of floats, one a sweep."""
    low = tl.full([], -0x7F800001, tl.int64)  # −inf
    high = (models.teacher_top + 0.0).to(tl.int32, bitcast=True)
    high = tl.where(high < 0, high ^ 0x7FFFFFFF, high).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        threshold = _float_of(middle.to(tl.int32))
        found = no_sums(swept.rows[1], BLOCK)
        for start in tl.range(0, swept.end, BLOCK):
            v = start + tl.arange(0, BLOCK)
            y = load_block(swept.rows[1], start, swept.bounds, swept.caps[1], False, BLOCK, LINE)
            weight = tl.full([BLOCK], 1.0, tl.float32)
            if BY == MASS:
                weight = tl.exp2((y - models.teacher_top) * (models.teacher_rate * LOG2E) - models.teacher_log2_total)
            found = added(found, tl.where((y >= threshold) & within(v, swept.bounds), weight, 0.0), LINE)
        reached = tl.sum(found, 0) >= enough
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return _float_of(low.to(tl.int32))


@triton.jit
def _added_to(
    sums, start, swept, row, facts, CLEAR: tl.constexpr, SUMS: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """The five sums, lane by lane, with a block's added."""
    v = start + tl.arange(0, BLOCK)
    x, y = read_at(start, swept, CLEAR, BLOCK, LINE)
    inside = in_set(y, v, row.label, row.threshold, MEMBERS)
    one, two, three, four, five = SUMS(entry_of(x, y, row.models, facts[0], inside), row.own, facts)
    if not CLEAR:
        inside = within(v, swept.bounds)
        one, two, three = tl.where(inside, one, 0.0), tl.where(inside, two, 0.0), tl.where(inside, three, 0.0)
        four, five = tl.where(inside, four, 0.0), tl.where(inside, five, 0.0)
    return (added(sums[0], one, LINE), added(sums[1], two, LINE), added(sums[2], three, LINE),
            added(sums[3], four, LINE), added(sums[4], five, LINE))  # fmt: skip


@triton.jit(do_not_specialize=["rows", "inner"])
def row_statistics_kernel(
    student, teacher,  # (outer, inner, vocabulary) logits, dense in the vocabulary
    coefficients,  # (COEFFICIENTS + 1, rows) float32; the last is the set's threshold
    row_scale, student_inverse_temperature, teacher_inverse_temperature, labels,  # (rows)
    rows, inner, vocabulary, student_outer, student_inner, teacher_outer, teacher_inner,  # strides
    student_cap, teacher_cap,
    parameter, rest, log_parameter, log_rest, c2, c3, c4, c5, c6, c7, c8,  # `Formula.constants`
    SUMS: tl.constexpr, OF_SUMS: tl.constexpr, LARGEST_OF: tl.constexpr, MEMBERS: tl.constexpr, BY: tl.constexpr,
    BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0), + num_programs(0), ... whose row_scale is not 0."""
    own = (parameter, rest, log_parameter, log_rest, c2, c3, c4, c5, c6, c7, c8)
    for n in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        if tl.load(row_scale + n) != 0:
            student_row = row_at(student, n, inner, student_outer, student_inner)
            first = first_of(student_row, LINE)
            student_row = line_of(student_row, first, LINE)
            teacher_row = line_at(teacher, n, inner, teacher_outer, teacher_inner, first, LINE)
            rates = tl.load(student_inverse_temperature + n), tl.load(teacher_inverse_temperature + n)
            swept = Swept((student_row, teacher_row), (student_cap, teacher_cap), 0, first + vocabulary,
                          (first, first + vocabulary))  # fmt: skip
            found = softmaxes_of(swept, rates, None, 0.0, False, False, True, BLOCK, LINE)
            models = models_of(found, rates, (0.0, 0.0), False)
            u_at_peak = entry_of(found.student_top, found.teacher_there, models, 0.0, False)[4]
            u_at_other_peak = entry_of(found.student_there, found.teacher_top, models, 0.0, False)[4]
            label, threshold = -1, 0.0
            if MEMBERS == LABEL:
                label = tl.load(labels + n) + first
            if MEMBERS == LARGEST:
                enough = parameter
                if BY == COUNT:
                    enough = tl.minimum(parameter, vocabulary * 1.0)
                threshold = _threshold(swept, models, enough, BY, BLOCK, LINE)
            zeros = no_sums(student, BLOCK)
            one, other = zeros + NO_OVERLAP, zeros + NO_OVERLAP
            if LARGEST_OF is not None:
                for start in tl.range(0, swept.end, BLOCK):
                    x, y = read_at(start, swept, False, BLOCK, LINE)
                    inside = in_set(y, start + tl.arange(0, BLOCK), label, threshold, MEMBERS)
                    of_one, of_other = LARGEST_OF(entry_of(x, y, models, u_at_peak, inside), own)
                    one = tl.maximum(one, tl.max(by_lane(of_one, zeros.shape[0], LINE), 1))
                    other = tl.maximum(other, tl.max(by_lane(of_other, zeros.shape[0], LINE), 1))
            one, other = tl.minimum(tl.max(one, 0), -NO_OVERLAP), tl.minimum(tl.max(other, 0), -NO_OVERLAP)
            facts = u_at_peak, u_at_other_peak, one, other
            row = Row(models, None, own, None, None, label, threshold)
            sums = zeros, zeros, zeros, zeros, zeros
            k, count = 0, blocks_of(swept, BLOCK)
            while k < count:
                stop = clear_until(k, swept, NOWHERE, NOWHERE, True, BLOCK)
                for start in tl.range(k * BLOCK, stop * BLOCK, BLOCK):
                    sums = _added_to(sums, start, swept, row, facts, True, SUMS, MEMBERS, BLOCK, LINE)
                if stop < count:
                    sums = _added_to(sums, stop * BLOCK, swept, row, facts, False, SUMS, MEMBERS, BLOCK, LINE)
                k = stop + 1
            sums = (tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0), tl.sum(sums[3], 0),
                    tl.sum(sums[4], 0))  # fmt: skip
            of_row = OF_SUMS(sums, own, facts)
            for i in tl.static_range(COEFFICIENTS):
                tl.store(coefficients + i * rows + n, of_row[i])
            tl.store(coefficients + COEFFICIENTS * rows + n, threshold)
