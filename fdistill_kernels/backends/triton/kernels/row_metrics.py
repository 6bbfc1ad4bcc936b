"""What is worth a look of each row, behind its parts: values.py's Metrics, in a look of their own at the logits."""

import triton
import triton.language as tl

from .entries import entry_of, models_of
from .loads import capped, first_of, is_whole, line_at, line_of, row_at
from .softmaxes import BEYOND, added, by_lane, no_sums, softmaxes_of
from .stretches import Swept, read_at
from .terms import LN2, log1p, times

FIRST = tl.constexpr(3)  # of the parts
COUNT = tl.constexpr(6)


@triton.jit
def _with_first(first, v, found, LINE: tl.constexpr):
    """The lanes' first places with a block's, where something was found."""
    return tl.minimum(first, tl.min(by_lane(tl.where(found, v, BEYOND), first.shape[0], LINE), 1))


@triton.jit
def _looked_at(
    of_student, of_teacher, overlap, first, other_first, start, swept, models, CLEAR: tl.constexpr, BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):  # fmt: skip
    """Entropies, the overlap and the first places of both tops, lane by lane, with a block's."""
    v = start + tl.arange(0, BLOCK)
    x, y = read_at(start, swept, CLEAR, BLOCK, LINE)
    p, q, log2_p, log2_q, _, _, _, _, _ = entry_of(x, y, models, 0.0, False)
    of_student, of_teacher = added(of_student, -times(q, log2_q), LINE), added(of_teacher, -times(p, log2_p), LINE)
    overlap = added(overlap, tl.minimum(p, q, propagate_nan=tl.PropagateNan.ALL), LINE)
    first = _with_first(first, v, x == models.student_top, LINE)
    other_first = _with_first(other_first, v, y == models.teacher_top, LINE)
    return of_student, of_teacher, overlap, first, other_first


@triton.jit(do_not_specialize=["rows", "inner"])
def row_metrics_kernel(
    student, teacher,  # (outer, inner, vocabulary) logits, dense in the vocabulary; no teacher: its metrics are 0
    parts,  # (FIRST + COUNT, rows)
    row_scale, student_inverse_temperature, teacher_inverse_temperature, labels,  # (rows)
    rows, inner, vocabulary, student_outer, student_inner, teacher_outer, teacher_inner,  # strides
    student_cap, teacher_cap, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0), + num_programs(0), ...; those whose row_scale is 0 are not looked at."""
    for n in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        scale = tl.load(row_scale + n)
        at = parts + FIRST * rows + n
        if scale == 0:
            for i in tl.static_range(COUNT):
                tl.store(at + i * rows, 0.0)
        else:
            student_row = row_at(student, n, inner, student_outer, student_inner)
            begin = first_of(student_row, LINE)
            student_row, bounds = line_of(student_row, begin, LINE), (begin, begin + vocabulary)
            student_rate = tl.load(student_inverse_temperature + n)
            rows_of, rates = (student_row, teacher), (student_rate, 1.0)
            if teacher is not None:
                teacher_row = line_at(teacher, n, inner, teacher_outer, teacher_inner, begin, LINE)
                rows_of, rates = (student_row, teacher_row), (student_rate, tl.load(teacher_inverse_temperature + n))
            swept = Swept(rows_of, (student_cap, teacher_cap), 0, bounds[1], bounds)
            found = softmaxes_of(swept, rates, None, 0.0, True, False, False, BLOCK, LINE)
            student_top, plain_rest = found.student_top, found.plain_rest
            if teacher is None:  # at temperature 1, as the labels' terms
                plain_rest = found.student_rest
            models = models_of(found, rates, (0.0, 0.0), False)
            of_student = no_sums(student, BLOCK)
            of_teacher, overlap = of_student, of_student
            first = tl.full(of_student.shape, BEYOND, tl.int32)
            other_first = first
            for start in tl.range(0, bounds[1], BLOCK):
                if is_whole(start, bounds, BLOCK):
                    of_student, of_teacher, overlap, first, other_first = _looked_at(
                        of_student, of_teacher, overlap, first, other_first, start, swept, models, True, BLOCK, LINE
                    )
                else:
                    of_student, of_teacher, overlap, first, other_first = _looked_at(
                        of_student, of_teacher, overlap, first, other_first, start, swept, models, False, BLOCK, LINE
                    )
            log_total = log1p(plain_rest)
            label_log_prob = 0.0
            if labels is not None:
                label = tl.load(labels + n)
                known = (label >= 0) & (label < vocabulary)
                logit = tl.load(student_row + begin + label, mask=known, other=float("nan")).to(tl.float32)
                logit = capped(logit, student_cap)
                label_log_prob = (logit - student_top) - log_total
            agreement, entropy, common = 0.0, 0.0, 0.0
            if teacher is not None:
                agreement = (tl.min(first, 0) == tl.min(other_first, 0)).to(tl.float32)
                entropy, common = tl.sum(of_teacher, 0) * LN2, tl.sum(overlap, 0)
            tl.store(at, scale * (tl.sum(of_student, 0) * LN2))
            tl.store(at + rows, scale * entropy)
            tl.store(at + 2 * rows, scale * agreement)
            tl.store(at + 3 * rows, scale * common)
            # log_total is NaN of +inf
            lse = tl.where(student_top == float("inf"), student_top, student_top + log_total)
            tl.store(at + 4 * rows, scale * lse)
            tl.store(at + 5 * rows, scale * label_log_prob)
