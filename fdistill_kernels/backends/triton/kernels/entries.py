"""Entries of a row whose softmaxes are known, and their terms, measured from those of the models' largest entries."""

import triton
import triton.language as tl

from .terms import LOG2E, log1p, minus, pair

#: Which entries are in a row's set: none, the label, or the teacher's largest.
NONE, LABEL, LARGEST = (tl.constexpr(members) for members in range(3))


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
    student_top, student_rate, student_log2_total = models[0], models[1], models[2]
    teacher_top, teacher_rate, teacher_log2_total = models[3], models[4], models[5]
    log_ratio = models[6]
    q_shifted, p_shifted = (x - student_top) * student_rate, (y - teacher_top) * teacher_rate
    log2_q = (x - student_top) * (student_rate * LOG2E) - student_log2_total
    log2_p = (y - teacher_top) * (teacher_rate * LOG2E) - teacher_log2_total
    if len(models) == 9:  # DIGITS of `models_of`
        apart = ((y - models[7]) - (x - models[8])) * student_rate
    else:  # of models that nearly agree by their logits' own differences, which are exact
        apart = tl.where(models[7], ((y - x) - (teacher_top - student_top)) * student_rate, p_shifted - q_shifted)
    return (tl.exp2(log2_p), tl.exp2(log2_q), log2_p, log2_q, apart - log_ratio, p_shifted, q_shifted, u_at_peak,
            inside)  # fmt: skip


@triton.jit
def models_of(
    student_top, student_rest, student_rate, teacher_top, teacher_rest, teacher_rate, of_student=0.0, of_teacher=0.0,
    DIGITS: tl.constexpr = False,
):  # fmt: skip
    """What `entry_of` needs of a row; of_student and of_teacher: terms.py's FACTORS. And whether the models nearly
    agree; where they are of one rate and of 16 bits, whose differences have all their DIGITS, what u is measured from:
    each model's top or, of models that nearly agree, for entries far smaller than it, the distance of both.
    """
    apart = (teacher_rest - student_rest) / (1 + student_rest)
    little = tl.abs(apart) < 0.5
    log_ratio = log1p(teacher_rest) - log1p(student_rest)
    log_ratio = tl.where(little, log1p(tl.where(little, apart, 0.0)), log_ratio)
    # one rounding: it is of all of a row's probabilities
    student_log2_total = tl.fma(log1p(student_rest), LOG2E, minus(of_student))
    teacher_log2_total = tl.fma(log1p(teacher_rest), LOG2E, minus(of_teacher))
    alike = (tl.abs(teacher_top - student_top) <= 1) & (teacher_rate == student_rate)
    if DIGITS:
        from_teacher = tl.where(alike, teacher_top - student_top, teacher_top)
        return (student_top, student_rate, student_log2_total, teacher_top, teacher_rate, teacher_log2_total, log_ratio,
                from_teacher, tl.where(alike, 0.0, student_top))  # fmt: skip
    else:
        return (student_top, student_rate, student_log2_total, teacher_top, teacher_rate, teacher_log2_total, log_ratio,
                alike)  # fmt: skip


@triton.jit
def peaks_of(
    models, teacher_there, student_there, inside_there, own, other, TERMS: tl.constexpr, EXCHANGED: tl.constexpr,
    CENTRED: tl.constexpr, TEACHER_CENTRED: tl.constexpr,
):  # fmt: skip
    """u at both models' largest entries, and their terms per probability there: what terms are measured from.

    inside_there: whether the teacher's is in the row's set; terms that depend on it need none at the student's.
    """
    student_top, teacher_top = models[0], models[3]
    u_at_peak = entry_of(student_top, teacher_there, models, 0.0, False)[4]
    at_student = entry_of(student_top, teacher_there, models, u_at_peak, False)
    term, _, _ = pair(at_student, own, other, u_at_peak, None, None, TERMS, "own" if EXCHANGED == "own" else None, True)
    at_peak = 0.0 * term
    if not CENTRED:
        at_peak = term / at_student[1]
    u_at_teacher_peak, at_teacher_peak = u_at_peak, at_peak
    if EXCHANGED is not None:
        at_teacher = entry_of(student_there, teacher_top, models, u_at_peak, inside_there)
        u_at_teacher_peak = at_teacher[4]
        _, _, of_teacher = pair(at_teacher, own, other, u_at_teacher_peak, None, None, TERMS, EXCHANGED, True)
        at_teacher_peak = of_teacher / at_teacher[0]
        if TEACHER_CENTRED:
            at_teacher_peak = 0.0 * at_teacher_peak
    return u_at_peak, at_peak, teacher_there, u_at_teacher_peak, at_teacher_peak, student_there, inside_there


@triton.jit
def terms_at(
    x, y, inside, models, peaks, own, other, sums, CLEAR: tl.constexpr, CLOSE: tl.constexpr, TERMS: tl.constexpr,
    EXCHANGED: tl.constexpr, CENTRED: tl.constexpr, TEACHER_CENTRED: tl.constexpr,
):  # fmt: skip
    """Entries' values and both terms, measured from the peaks', whose own is 0, and less their shares of both terms'
    sums where these are known. CLEAR: the student's peak is not among these entries.
    """
    u_at_peak, at_peak, teacher_there, u_at_teacher_peak, at_teacher_peak, student_there, inside_there = peaks
    start = None if CENTRED else (at_peak,)
    if not CENTRED and CLEAR and sums is not None:
        start = (at_peak, sums[0])
    teacher_start = None if TEACHER_CENTRED else (at_teacher_peak,)
    entry = entry_of(x, y, models, u_at_peak, inside)
    student, value, teacher = pair(entry, own, other, u_at_teacher_peak, start, teacher_start, TERMS, EXCHANGED, CLOSE)
    if not CENTRED and not CLEAR:
        student = tl.where((x == models[0]) & (y == teacher_there), 0.0, student)
        if sums is not None:
            student -= entry[1] * sums[0]
    if EXCHANGED is not None and not TEACHER_CENTRED:
        teacher = tl.where((y == models[3]) & (x == student_there) & (inside == inside_there), 0.0, teacher)
        if sums is not None:
            teacher -= entry[0] * sums[1]
    return student, value, teacher
