"""Entries of a row whose softmaxes are known, and their terms, measured from those of the models' largest entries."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .terms import LOG2E, log1p, minus, pair

#: Which entries are in a row's set: none, the label, or the teacher's largest.
NONE, LABEL, LARGEST = (tl.constexpr(members) for members in range(3))


class Kind(NamedTuple):
    """A divergence as the compiler knows it: functions of terms.py or row_terms.py, and what they are to their rows.

    Attributes:
        TERMS, FACTORS: None: there is no divergence; no factors.
        EXCHANGED: the terms with the models exchanged, for the teacher's gradient; "own": a user's TERMS have both;
            None: it is not wanted.
        CENTRED, TEACHER_CENTRED: whether a row's terms need no sum, the student's and the teacher's.
        MEMBERS: what is in the row's set.
    """

    TERMS: Any
    FACTORS: Any
    EXCHANGED: Any
    CENTRED: bool
    TEACHER_CENTRED: bool
    MEMBERS: int

    @property
    def cache_key(self) -> str:
        """What Triton's files go by: the functions' sources, where by their names one could be another's."""
        return "-".join(getattr(value, "cache_key", str(value)) for value in self)


class Models(NamedTuple):
    """Both models' softmaxes of a row.

    Attributes:
        student_top, teacher_top: the largest logits.
        student_rate, teacher_rate: inverse temperatures.
        student_log2_total, teacher_log2_total: log2 Σ 2^(rate·(z − top)), less the logarithms of FACTORS.
        log_ratio: of the totals, the teacher's over the student's.
        near: (alike,), whether the models nearly agree. Of models of one rate and of 16 bits, whose logits' differences
            have all their digits, (from_student, from_teacher), what u is measured from: each model's top or, of models
            that nearly agree, for entries far smaller than it, the distance of both.
    """

    student_top: Any
    student_rate: Any
    student_log2_total: Any
    teacher_top: Any
    teacher_rate: Any
    teacher_log2_total: Any
    log_ratio: Any
    near: Any


class Peaks(NamedTuple):
    """What terms are measured from: u and the term per probability at both models' largest entries, each with the other
    model's logit there; and whether the teacher's is in the row's set.
    """

    u: Any
    term: Any
    teacher_there: Any
    teacher_u: Any
    teacher_term: Any
    student_there: Any
    inside: Any


class Row(NamedTuple):
    """What the terms of a row's entries are made of.

    Attributes:
        models, peaks: `Models` and `Peaks`.
        own, other: the divergence's constants, with the row's coefficients behind them; other: models exchanged.
        place: of the student's peak, as clear_until (stretches.py) takes it.
        label, threshold: which entries are in the row's set.
    """

    models: Any
    peaks: Any
    own: Any
    other: Any
    place: Any
    label: Any
    threshold: Any


@triton.jit
def in_set(y, v, label, threshold, MEMBERS: tl.constexpr):
    """Whether entries v, of the teacher's logits y, are in the row's set."""
    if MEMBERS == LABEL:
        return v == label
    elif MEMBERS == LARGEST:
        return y >= threshold
    else:
        return False


@triton.jit
def entry_of(x, y, models, u_at_peak, inside):
    """Entries of a row with the student's logits x and the teacher's y, as terms.py takes them."""
    student_top, student_rate, teacher_top, teacher_rate = (models.student_top, models.student_rate, models.teacher_top,
                                                            models.teacher_rate)  # fmt: skip
    q_shifted, p_shifted = (x - student_top) * student_rate, (y - teacher_top) * teacher_rate
    log2_q = (x - student_top) * (student_rate * LOG2E) - models.student_log2_total
    log2_p = (y - teacher_top) * (teacher_rate * LOG2E) - models.teacher_log2_total
    if len(models.near) == 2:
        apart = ((y - models.near[1]) - (x - models.near[0])) * student_rate
    else:  # of models that nearly agree by their logits' own differences, which are exact
        apart = tl.where(models.near[0], ((y - x) - (teacher_top - student_top)) * student_rate, p_shifted - q_shifted)
    return (tl.exp2(log2_p), tl.exp2(log2_q), log2_p, log2_q, apart - models.log_ratio, p_shifted, q_shifted, u_at_peak,
            inside)  # fmt: skip


@triton.jit
def models_of(found, rates, factors, DIGITS: tl.constexpr):
    """By a row's `Softmaxes`. factors: of terms.py's FACTORS. DIGITS: of what `near` says of 16 bits."""
    student_top, student_rest, student_rate = found.student_top, found.student_rest, rates[0]
    teacher_top, teacher_rest, teacher_rate = found.teacher_top, found.teacher_rest, rates[1]
    apart = (teacher_rest - student_rest) / (1 + student_rest)
    little = tl.abs(apart) < 0.5
    log_ratio = log1p(teacher_rest) - log1p(student_rest)
    log_ratio = tl.where(little, log1p(tl.where(little, apart, 0.0)), log_ratio)
    # one rounding: it is of all of a row's probabilities
    student_log2_total = tl.fma(log1p(student_rest), LOG2E, minus(factors[1]))
    teacher_log2_total = tl.fma(log1p(teacher_rest), LOG2E, minus(factors[0]))
    alike = (tl.abs(teacher_top - student_top) <= 1) & (teacher_rate == student_rate)
    near = (alike,)
    if DIGITS:
        near = tl.where(alike, 0.0, student_top), tl.where(alike, teacher_top - student_top, teacher_top)
    return Models(student_top, student_rate, student_log2_total, teacher_top, teacher_rate, teacher_log2_total,
                  log_ratio, near)  # fmt: skip


@triton.jit
def peaks_of(models, teacher_there, student_there, inside, own, other, KIND: tl.constexpr):
    """The peaks by each model's logit at the other's. inside: whether the teacher's is in the row's set; terms that
    depend on it need none at the student's.
    """
    u = entry_of(models.student_top, teacher_there, models, 0.0, False)[4]
    at_student = entry_of(models.student_top, teacher_there, models, u, False)
    EXCHANGED: tl.constexpr = KIND.EXCHANGED  # older Triton hands no text on as it is
    of_both: tl.constexpr = "own" if EXCHANGED == "own" else None
    term, _, _ = pair(at_student, own, other, u, None, None, KIND.TERMS, of_both, True)
    at_peak = 0.0 * term
    if not KIND.CENTRED:
        at_peak = term / at_student[1]
    teacher_u, at_teacher_peak = u, at_peak
    if EXCHANGED is not None:
        at_teacher = entry_of(student_there, models.teacher_top, models, u, inside)
        teacher_u = at_teacher[4]
        _, _, of_teacher = pair(at_teacher, own, other, teacher_u, None, None, KIND.TERMS, EXCHANGED, True)
        at_teacher_peak = of_teacher / at_teacher[0]
        if KIND.TEACHER_CENTRED:
            at_teacher_peak = 0.0 * at_teacher_peak
    return Peaks(u, at_peak, teacher_there, teacher_u, at_teacher_peak, student_there, inside)


@triton.jit
def terms_at(x, y, inside, row, sums, CLEAR: tl.constexpr, CLOSE: tl.constexpr, KIND: tl.constexpr):
    """Entries' values and both terms, measured from the peaks', whose own is 0, and less their shares of both terms'
    sums where these are known. CLEAR: the student's peak is not among these entries.
    """
    EXCHANGED: tl.constexpr = KIND.EXCHANGED
    models, peaks = row.models, row.peaks
    start = None if KIND.CENTRED else (peaks.term,)
    if not KIND.CENTRED and CLEAR and sums is not None:
        start = (peaks.term, sums[0])
    teacher_start = None if KIND.TEACHER_CENTRED else (peaks.teacher_term,)
    entry = entry_of(x, y, models, peaks.u, inside)
    student, value, teacher = pair(entry, row.own, row.other, peaks.teacher_u, start, teacher_start, KIND.TERMS,
                                   EXCHANGED, CLOSE)  # fmt: skip
    if not KIND.CENTRED and not CLEAR:
        student = tl.where((x == models.student_top) & (y == peaks.teacher_there), 0.0, student)
        if sums is not None:
            student -= entry[1] * sums[0]
    if EXCHANGED is not None and not KIND.TEACHER_CENTRED:
        at_peak = (y == models.teacher_top) & (x == peaks.student_there) & (inside == peaks.inside)
        teacher = tl.where(at_peak, 0.0, teacher)
        if sums is not None:
            teacher -= entry[0] * sums[1]
    return student, value, teacher
