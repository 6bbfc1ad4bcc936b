"""The torch backend: any device and dtype, float64 too, in chunks of rows; no temporary is larger than a few chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..divergences import Divergence
from ..formulas import NO_OVERLAP, NOTHING, Entry, Formula, RowStatistics, times
from .rows import RowCall, TokenTerms, cap_slope, capped

#: Elements of one chunk of rows; the arithmetic holds about ten temporaries of this size.
CHUNK_ELEMENTS = 1 << 18


def why_not(device: torch.device, dtype: torch.dtype, divergence: Divergence | None) -> str | None:
    """The reason this backend cannot take a call: there is none."""
    return None


def divergence_rows(call: RowCall) -> tuple[Tensor, Tensor, Tensor]:
    """See `RowCall`."""
    outer, inner, vocabulary = call.student.shape
    rows = outer * inner
    parts = torch.zeros(call.parts, rows, dtype=call.terms.row_scale.dtype, device=call.student.device)
    of_student, of_teacher = call.empty_gradients()
    target = call.student if call.inplace else of_student
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    for i in range(outer):
        for begin in range(0, inner, step):
            end = min(begin + step, inner)
            n = slice(i * inner + begin, i * inner + end)
            parts[:, n], student_gradient, teacher_gradient = _chunk(call, i, slice(begin, end), n)
            if call.student_gradient:
                target[i, begin:end] = student_gradient.to(target.dtype)
            if call.teacher_gradient:
                of_teacher[i, begin:end] = teacher_gradient.to(of_teacher.dtype)
    return parts, of_student, of_teacher


def _chunk(call: RowCall, i: int, inner: slice, n: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Parts (3 or more, n) and both gradients (n, V) of one chunk, in the arithmetic's dtype."""
    terms, dtype = call.terms, call.terms.row_scale.dtype
    live = (terms.row_scale[n] != 0).unsqueeze(1)
    scale = terms.row_scale[n].unsqueeze(1)
    z_s = capped(call.student[i, inner].to(dtype), call.student_softcap)
    zero = torch.zeros((), dtype=dtype, device=z_s.device)
    divergence = cross_entropy = squared_lse = student_gradient = teacher_gradient = zero
    labels = None if terms.labels is None else torch.where(live, terms.labels[n].unsqueeze(1), 0)
    student = teacher = None
    if call.divergence is not None or terms.metrics:
        student = _Model(z_s, terms.student_inverse_temperature[n].unsqueeze(1))

    if call.divergence is not None and call.teacher is not None:
        rate = terms.teacher_inverse_temperature[n].unsqueeze(1)
        teacher = _Model(capped(call.teacher[i, inner].to(dtype), call.teacher_softcap), rate)
        assert student is not None
        weight = terms.divergence_scale[n].unsqueeze(1) * call.divergence.scale
        value, of_student, of_teacher = _terms(call.divergence, student, teacher, labels, call.teacher_gradient)
        divergence = times(weight, value.sum(1, keepdim=True))
        student_gradient = times(weight * student.rate, of_student)
        if of_teacher is not None:
            teacher_gradient = times(weight * teacher.rate, of_teacher)
            if call.teacher_softcap:  # NaN of a NaN, which may weigh nothing
                teacher_gradient = times(teacher_gradient, cap_slope(teacher.logits, call.teacher_softcap))

    if labels is not None:
        cross_entropy, squared_lse, of_labels = _label_terms(terms, z_s, labels, n)
        student_gradient = student_gradient + of_labels

    if call.student_softcap:
        student_gradient = times(student_gradient, cap_slope(z_s, call.student_softcap))

    def finish(x: Tensor) -> Tensor:
        return torch.where(live, scale * x, zero)

    metrics = _metrics(student, teacher, labels) if student is not None and terms.metrics else ()
    every = (divergence, cross_entropy, squared_lse, *metrics)
    parts = torch.cat([finish(x) for x in every], 1).T
    return parts, finish(student_gradient), finish(teacher_gradient)


def widest(x: Tensor) -> torch.dtype:
    """What sums are taken in: Apple's GPUs have no float64."""
    return x.dtype if x.device.type == "mps" else torch.float64


class _Model:
    """A model's logits (n, V), capped, and their softmax at 1/rate."""

    def __init__(self, logits: Tensor, rate: Tensor):
        self.logits, self.rate = logits, rate
        self.top, self.peak = logits.max(1, keepdim=True)
        # the maximum first: z / T of logits near 1e4 would lose the digits that the difference keeps
        self.shifted = (logits - self.top) * rate
        exponentials = self.shifted.exp()
        total = exponentials.sum(1, keepdim=True, dtype=widest(logits))
        self.log_total = total.log()
        self.probability = exponentials * (1 / total).to(logits.dtype)
        self.log_probability = self.shifted - self.log_total.to(logits.dtype)


def log_ratio(z_t: Tensor, z_s: Tensor, teacher: Any, student: Any) -> Tensor:
    """log(p/q) at logits of both models: of models that nearly agree by their logits' differences, which are exact.

    teacher, student: what has `top`, `log_total` and `rate` of rows, such as `_Model`.
    """
    apart = teacher.top - student.top
    constant = (teacher.log_total - student.log_total).to(apart.dtype)
    differences = ((z_t - z_s) - apart) * teacher.rate
    far = (z_t - teacher.top) * teacher.rate - (z_s - student.top) * student.rate
    return torch.where((apart.abs() <= 1) & (teacher.rate == student.rate), differences, far) - constant


def _metrics(student: _Model, teacher: _Model | None, labels: Tensor | None) -> tuple[Tensor, ...]:
    """`Metrics` (n, 1) of each row."""

    def entropy(model: _Model) -> Tensor:
        return -times(model.probability, model.log_probability).sum(1, keepdim=True)

    nothing, lse = torch.zeros_like(student.top), student.logits.logsumexp(1, keepdim=True)
    label = nothing
    if labels is not None:
        label = _log_softmax(student.logits).gather(1, labels)
    if teacher is None:
        return entropy(student), nothing, nothing, nothing, lse, label
    agreement = (student.peak == teacher.peak).to(lse)
    overlap = torch.minimum(student.probability, teacher.probability).sum(1, keepdim=True)
    return entropy(student), entropy(teacher), agreement, overlap, lse, label


def _terms(
    divergence: Divergence, student: _Model, teacher: _Model, labels: Tensor | None, teacher_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The value at each entry, and both models' gradients by rate·logit."""
    u = log_ratio(teacher.logits, student.logits, teacher, student)
    entry = entry_of(teacher, student, u, u.gather(1, student.peak), u.gather(1, teacher.peak))
    if (statistics := divergence.statistics) is not None:
        inside = _members(statistics.members, teacher, labels, divergence.parameter)
        entry = _with_statistics(entry._replace(inside=inside), statistics, divergence.numbers)
    value, of_student, *of_teacher = terms_at(divergence, entry, teacher_gradient)
    if not divergence.centred:
        of_student = _about_peak(of_student, student)
    return value, of_student, _about_peak(of_teacher[0], teacher) if teacher_gradient else None


def entry_of(teacher: Any, student: Any, u: Tensor, u_at_peak: Tensor, u_at_other_peak: Tensor) -> Entry:
    """Both models at some entries, and log(p/q) there and at the student's and the teacher's peak.

    teacher, student: what has `probability`, `log_probability` and `shifted` of the entries, such as `_Model`.
    """
    return Entry(teacher.probability, student.probability, teacher.log_probability, student.log_probability, u,
                 teacher.shifted, student.shifted, u_at_peak, u_at_other_peak)  # fmt: skip


def terms_at(divergence: Divergence, entry: Entry, of_teacher: bool) -> tuple[Tensor, ...]:
    """The value at each entry, the student's term, and the teacher's if wanted."""
    formula, numbers = divergence.terms, divergence.numbers
    if not isinstance(formula, Formula):
        both = formula(entry.p, entry.q, entry.log_p, entry.log_q, divergence.parameter)
        fits = isinstance(both, (tuple, list)) and len(both) == 2 and all(isinstance(x, Tensor) for x in both)
        if not fits or any(x.shape != entry.p.shape or not x.is_floating_point() for x in both):
            raise TypeError(f"{divergence}: its terms must be two floating tensors of p's shape {tuple(entry.p.shape)}")
        return both[0] + both[1], *both[: 1 + of_teacher]
    found = formula.value(entry, *numbers), formula.student(entry, *numbers)
    return (*found, formula.teacher(entry, *numbers)) if of_teacher else found


def _members(members: str, teacher: _Model, labels: Tensor | None, parameter: float) -> Tensor:
    """The row's set, as `RowStatistics.members` names it."""
    if not members:
        return NOTHING
    if members == "label":
        assert labels is not None
        return torch.arange(teacher.logits.shape[1], device=labels.device) == labels
    order = teacher.logits.sort(1, descending=True)
    if members == "count":
        last = min(int(parameter), order.values.shape[1]) - 1
        return teacher.logits >= order.values[:, last : last + 1]
    p = teacher.probability.gather(1, order.indices)
    before = p.cumsum(1, dtype=widest(p)) - p  # an entry is needed where those before it hold too little
    return teacher.logits >= order.values.gather(1, (before < parameter).sum(1, keepdim=True).clamp_min(1) - 1)


def largest_in(entry: Entry, statistics: RowStatistics, numbers: tuple[float, float]) -> tuple[Tensor, ...]:
    """`RowStatistics.largest` of these entries."""
    found = () if statistics.largest is None else statistics.largest(entry, *numbers)
    return tuple(x.amax(1, keepdim=True).clamp(NO_OVERLAP, -NO_OVERLAP) for x in found)


def _with_statistics(entry: Entry, statistics: RowStatistics, numbers: tuple[float, float]) -> Entry:
    entry = entry._replace(largest=largest_in(entry, statistics, numbers))
    sums = (x.sum(1, keepdim=True, dtype=widest(x)).to(x.dtype) for x in statistics.sums(entry, *numbers))
    return entry._replace(of_row=statistics.coefficients(entry, tuple(sums), *numbers))


def _about_peak(term: Tensor, model: _Model) -> Tensor:
    """``term − p Σ term`` with its digits, by terms measured from the peak's: one constant times p less."""
    p = model.probability
    at_peak = term.gather(1, model.peak) / p.gather(1, model.peak)
    term = (term - times(p, at_peak)).scatter(1, model.peak, 0)
    return term - times(p, term.sum(1, keepdim=True, dtype=widest(term)).to(p.dtype))


def _log_softmax(z: Tensor) -> Tensor:
    return (z - z.amax(1, keepdim=True)).log_softmax(1)


def _label_terms(terms: TokenTerms, z: Tensor, label: Tensor, n: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and lse² (n, 1), and the weighted gradient of both (n, V), at temperature 1."""
    vocabulary = z.shape[1]
    ce_scale, z_scale = terms.cross_entropy_scale[n].unsqueeze(1), terms.z_loss_scale[n].unsqueeze(1)
    w = z.new_ones(vocabulary) if terms.class_weight is None else terms.class_weight.to(z)
    log_q = _log_softmax(z)
    lse = z.logsumexp(1, keepdim=True)
    spread = terms.label_smoothing / vocabulary
    of_label = (1 - terms.label_smoothing) * w[label]
    cross_entropy = times(of_label, -log_q.gather(1, label))
    if spread:
        cross_entropy = cross_entropy - spread * times(w, log_q).sum(1, keepdim=True)
    of_q = ce_scale * (of_label + (spread * w.sum() if spread else 0)) + 2 * times(z_scale, lse)
    gradient = times(of_q, log_q.exp()) - (ce_scale * spread * w if spread else 0)
    gradient.scatter_add_(1, label, -ce_scale * of_label)
    return cross_entropy, lse**2, gradient


def _listed(ids: Tensor, vocabulary: int) -> Tensor:
    """Which entries (n, V) are in their row's list."""
    marks = torch.zeros(ids.shape[0], vocabulary + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, torch.where(ids >= 0, ids, vocabulary), True)[:, :vocabulary]


def rest_statistics(
    student: Tensor, softcap: float | None, row_scale: Tensor, rate: Tensor, ids: Tensor, plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of what rows (outer, inner, V) have outside their list: the largest logit, −inf of nothing, and relative to it
    the log-sum-exp at 1/rate, and where `plain` asks for it at temperature 1; see `sparse`.
    """
    z = torch.where((row_scale != 0).unsqueeze(1), student.flatten(0, 1).to(rate.dtype), 0)
    z = capped(z, softcap).masked_fill(_listed(ids, z.shape[1]), -torch.inf)
    top = z.amax(1)
    below = z - torch.where(top == -torch.inf, 0, top).unsqueeze(1)
    return top, (below * rate.unsqueeze(1)).logsumexp(1), below.logsumexp(1) if plain else top


def rest_gradient_(
    out: Tensor, student: Tensor, softcap: float | None, row_scale: Tensor, rate: Tensor, rest: Any, ids: Tensor,
    values: Tensor,
) -> None:  # fmt: skip
    """Writes `sparse.Rest`'s gradient of rows, and at the list's ids the values (n, K); zeros to rows that do not
    count.
    """
    live, vocabulary = (row_scale != 0).unsqueeze(1), student.shape[-1]
    z = capped(torch.where(live, student.flatten(0, 1).to(rate.dtype), 0), softcap)
    rest_top, of_rest, log_rest, *of_labels = (x.unsqueeze(1) for x in rest if x is not None)
    gradient = times(of_rest, ((z - rest_top) * rate.unsqueeze(1) - log_rest).exp())
    if of_labels:
        top, of_plain, log_all, constant = of_labels
        gradient = gradient + times(of_plain, (z - top - log_all).exp()) + constant
    gradient = torch.cat((gradient * cap_slope(z, softcap), torch.zeros_like(rest_top)), 1)
    gradient.scatter_(1, torch.where(ids >= 0, ids, vocabulary), values)
    out.copy_(torch.where(live, gradient[:, :vocabulary], 0).view(out.shape))
