"""Rows whose teacher is a list of ids: the kernels for whole rows, on the few categories that the list leaves.

Outside the list S a row's gradient is one number times the student's probabilities. So a row is read once for the
log-sum-exp of its rest, the divergence is that of two rows of K + 1 categories (the list's and the rest), made by the
backend's own kernel, and the row is read again where the gradient is written:

    dL/dz_v = L_rest q_v / Σ_rest q   outside S,      dL/dz_k = L_k   on it,      each times 1/T

with L_k, L_rest the gradient by the categories' logits ``z_k/T`` and ``log Σ_rest exp(z/T)``. The rest is summed by
itself, never as 1 less the list's mass, so that it keeps its digits where it is small.

A backend that has them gives two functions (`chunked`, `cpu` and `triton` do):
    rest_statistics(student, softcap, row_scale, rate, ids, plain) -> its top, log_rest, plain_rest, (N,) each
    rest_gradient_(out, student, softcap, row_scale, rate, Rest, ids, values)
and one that makes all of it in one visit of a row gives a third (`cpu`):
    list_rows(call, gradient, Listed, whole) -> the parts
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, reference
from ..carried import replaced
from ..divergences import Divergence
from ..formulas import times
from ..own import FDivergence, autograd_inside_an_operator
from . import chunked, sharded
from .collectives import Collectives
from .rows import RowCall, Shard, Targets, TokenTerms, cap_slope, capped, log_sum_exp

#: A row's mass above 1 that is taken for rounding (8-bit log-probabilities are 3 % off), and scaled away.
MOST_MASS = 1.05
#: Numbers of a piece of rows: of their lists; and of the rows themselves, where whole temporaries are made of them.
LIST_PIECE, ROW_PIECE, CARD_PIECE = 1 << 22, 1 << 21, 1 << 25


class Rest(NamedTuple):
    """What every entry's gradient is made of, (N,) each, times the slope of a cap; without label terms four are None:
    ``of_rest·exp((z − rest_top)·rate − log_rest) + of_plain·exp(z − top − log_all) + constant``, with the rest's own
    largest logit, from which its digits are, and the row's.
    """

    rest_top: Tensor
    of_rest: Tensor
    log_rest: Tensor
    top: Tensor | None = None
    of_plain: Tensor | None = None
    log_all: Tensor | None = None
    constant: Tensor | None = None


def check_targets(targets: Targets, row_scale: Tensor, vocabulary: int) -> None:
    """The values of rows that count; a GPU stops by itself, later.

    Raises:
        ValueError: ids outside [0, V), but for −1; an id twice in a row; weights below 0; a mass above 1, or NaN.
    """
    if targets.ids is None:
        return
    assert targets.log_probs is not None
    counts, ids = row_scale != 0, targets.ids
    if not checks.readable(ids) or not counts.all():  # a GPU is not asked
        ids = torch.where(counts.unsqueeze(1), ids, -1)
    order = ids.sort(1).values
    mass = torch.where(ids >= 0, targets.log_probs, -torch.inf).exp().sum(1)
    outside = (order[:, :1] < -1) | (order[:, -1:] >= vocabulary)
    faults = {
        f"ids must be in [0, {vocabulary}), or -1 where a list is shorter": outside,
        "ids must differ within a row": (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0),
        "log_probs must not be NaN": mass.isnan().unsqueeze(1),
        f"log_probs of a row must be of a mass of {MOST_MASS:g} at most": (mass > MOST_MASS).unsqueeze(1),
    }
    if (weights := targets.weights) is not None:
        faults["weights must be finite and not negative"] = (ids >= 0) & ~((weights >= 0) & (weights < torch.inf))
    for what, wrong in faults.items():
        if wrong.is_cuda:
            torch._assert_async(~wrong.any(), what)
        elif not checks.imagined(wrong) and wrong.any():
            row = int(wrong.any(1).nonzero()[0])
            values = getattr(targets, what.split()[0])[row]
            shown = ", ".join(f"{x:.6g}" for x in values[:8].tolist()) + (", ..." if len(values) > 8 else "")
            raise ValueError(f"{what}: row {row} of those given has {shown}")


def divergence_rows(call: RowCall, backend: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `RowCall`; `backend`: the module whose kernels run."""
    student = call.student
    parts = torch.empty(call.parts, len(call.terms.row_scale), dtype=call.terms.row_scale.dtype, device=student.device)
    out, nothing = call.empty_gradients(getattr(backend, "empty", Tensor.new_empty))
    gradient = student if call.inplace else out if call.student_gradient else None
    whole, ranks = _asks_every_entry(call), Ranks(call.shard)
    at_once = _is_made_at_once(call, whole, backend)
    for i, j, n in _pieces(call, whole and not at_once, ranks, backend):
        some = replaced(call, student=student[i, j], terms=call.terms.of_rows(n), targets=call.targets.of_rows(n))
        of_rows = None if gradient is None else gradient[i, j]
        some, teacher = _listed(some, whole)
        if at_once:
            parts[:, n] = backend.list_rows(some, of_rows, teacher, whole)
        else:
            parts[:, n] = (_whole_rows if whole else _categories)(some, of_rows, teacher, ranks, backend)
    return parts, out, nothing


class Ranks:
    """What rows beside a list ask of the other ranks where the vocabulary is split; alone nothing is sent."""

    def __init__(self, shard: Shard):
        self.shard, self.wire = shard, Collectives(shard.group) if shard.group else None

    def here(self, ids: Tensor, vocabulary: int) -> Tensor:
        """Ids of the whole vocabulary as those of the entries here, −1 for the others."""
        at = ids - self.shard.begin
        return torch.where((at >= 0) & (at < vocabulary), at, -1) if self.wire else ids

    def summed(self, x: Tensor) -> Tensor:
        """Over ranks."""
        return self.wire.reduced(x) if self.wire else x

    def gathered(self, x: Tensor) -> Tensor:
        """(ranks, ...)."""
        return self.wire.gathered(x) if self.wire else x.unsqueeze(0)

    def at(self, call: RowCall, ids: Tensor) -> Tensor:
        """The student's logits (n, K) at ids of the whole vocabulary, capped; any where there is no id."""
        here = self.here(ids, call.student.shape[-1])
        z = capped(_at(call.student, here, call.terms.row_scale.dtype), call.student_softcap)
        return self.summed(torch.where(here >= 0, z, 0)) if self.wire else z

    def rows(self, vocabulary: int) -> int:
        """Entries of a row on a rank, a number that all agree about."""
        return -(-self.shard.size // self.wire.ranks) if self.wire else vocabulary


def _asks_every_entry(call: RowCall) -> bool:
    """Whether the entries outside the list cannot be one category: they have a teacher each; one of them may be the
    label; or what a divergence makes of them, q^(α+β) for one, is not what it makes of their sum.
    """
    tail, divergence = call.targets.tail, call.divergence
    assert divergence is not None
    sums = divergence.kernel not in ("Ab", None) or isinstance(divergence, FDivergence)
    return tail == "uniform" or (tail == "renormalize" and (divergence.needs_labels or not sums))


def _is_made_at_once(call: RowCall, whole: bool, backend: Any) -> bool:
    """Whether the backend's `list_rows` can make all of a row in one visit."""
    truncated = call.targets.tail in ("ignore", "sampled")
    return hasattr(backend, "list_rows") and not (truncated or call.shard.group or (whole and call.terms.metrics))


def _pieces(call: RowCall, whole: bool, ranks: Ranks, backend: Any) -> Iterator[tuple[slice, slice, slice]]:
    """Rows to be made at once: their places in (outer, inner), and their numbers."""
    (outer, inner, vocabulary), ids = call.student.shape, call.targets.ids
    vocabulary = ranks.rows(vocabulary)
    assert ids is not None
    most = max(1, LIST_PIECE // (ids.shape[1] + 1))
    if whole or backend is chunked:
        most = max(1, min(most, (CARD_PIECE if call.student.is_cuda else ROW_PIECE) // vocabulary))
    some, step = max(1, most // inner), min(inner, most)
    for i in range(0, outer, some):
        for j in range(0, inner, step):
            to = min(i + some, outer), min(j + step, inner)
            yield slice(i, to[0]), slice(j, to[1]), slice(i * inner + j, (to[0] - 1) * inner + to[1])


class Listed(NamedTuple):
    """The teacher of n rows.

    Attributes:
        ids: (n, K), −1 where there is none; all of a row that does not count.
        given: (n, K) log p at them, −inf where there is none.
        log_p: (n, K + 1) the teacher's logits of them, of a mass of 1 at most; and of the rest, or each of its entries.
        hidden: (n,) whether the rest is no more than the list's rounding may hide: then it is 0, of which rkl would be
            infinite, only where the student has nothing there either.
    """

    ids: Tensor
    given: Tensor
    log_p: Tensor
    hidden: Tensor


def _listed(call: RowCall, whole: bool) -> tuple[RowCall, Listed]:
    """The list of some rows; whole: for rows of all entries. And the call, for which rows whose list is empty or of
    zeros weigh nothing where the rest does not count: they say nothing.
    """
    targets, terms = call.targets, call.terms
    assert targets.ids is not None and targets.log_probs is not None
    ids = torch.where((terms.row_scale != 0).unsqueeze(1), targets.ids, -1)
    given = torch.where(ids >= 0, targets.log_probs, -torch.inf)
    mass, least = _mass(targets, given)
    log_p, rest = given - mass.clamp_min(1).log().to(given.dtype).unsqueeze(1), torch.zeros_like(mass)
    rate = terms.teacher_inverse_temperature * targets.temperature
    if targets.tail in ("bucket", "uniform"):
        others = call.vocabulary - (ids >= 0).sum(1)
        rest = torch.where(others == 0, 0, torch.maximum(1 - mass, least))
        rest = rest / others.clamp_min(1) if whole else rest
    else:
        renormalised = targets.tail in ("within", "renormalize")
        if renormalised and not whole:  # the largest first: a product may be infinite
            largest = log_p.amax(1, keepdim=True).clamp_min(torch.finfo(log_p.dtype).min)
            log_p = (log_p - largest) * rate.unsqueeze(1)
        says = given > -torch.inf if renormalised else ids >= 0
        says = (says if targets.weights is None else says & (targets.weights != 0)).any(1)
        terms = replaced(terms, divergence_scale=torch.where(says, terms.divergence_scale, 0))
    if whole:
        terms = replaced(terms, teacher_inverse_temperature=rate)
    log_p = torch.cat((log_p, rest.log().to(given.dtype).unsqueeze(1)), 1)
    hidden = (1 - mass <= least) & (not call.student_softcap)  # a capped student has something everywhere
    return replaced(call, terms=terms), Listed(ids, given, log_p, hidden)


def _mass(targets: Targets, given: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_S p`` as given, and how far its rounding may be from it, in the widest arithmetic."""
    wide = given.to(chunked.widest(given))
    p = wide.exp()
    spread = torch.where(p > 0, p * wide.abs(), 0).sum(1)
    return p.sum(1), 4 * targets.rounding * spread + torch.finfo(given.dtype).eps  # a few roundings, of who made them


def _categories(call: RowCall, gradient: Tensor | None, teacher: Listed, ranks: Ranks, backend: Any) -> Tensor:
    """The parts of some rows, through their categories; writes their gradient."""
    terms, rate, ids = call.terms, call.terms.student_inverse_temperature, teacher.ids
    live, z = terms.row_scale != 0, ranks.at(call, teacher.ids)
    row = _statistics(call, ids, z, ranks, backend)
    logits, log_p = row.logits(rate), teacher.log_p.clone()
    log_p[:, -1].masked_fill_(teacher.hidden & (logits[:, -1] == -torch.inf), -torch.inf)
    of_student = logits
    if call.targets.tail == "within":
        of_student = torch.cat((logits[:, :-1], torch.full_like(logits[:, -1:], -torch.inf)), 1)
        says = (of_student != -torch.inf).any(1) | (row.top == torch.inf)  # else none is there, given the list
        call = replaced(call, terms=replaced(terms, divergence_scale=torch.where(says, terms.divergence_scale, 0)))
    losses, of_logits = _of_categories(call, of_student, log_p, ids, live, gradient is not None, backend)
    labels = _Labels(call, row, live, ranks) if terms.labels is not None else None
    parts = [losses, *([torch.zeros_like(losses)] * 2 if labels is None else labels.parts)]
    if terms.metrics:
        parts += _masses(call, logits, teacher.given, ids, z, ranks)
    if gradient is not None:
        _write_gradient_(gradient, call, labels, backend, z, row, ids, of_logits * rate.unsqueeze(1), ranks)
    return torch.stack(parts[:3] + [torch.where(live, terms.row_scale * x, 0) for x in parts[3:]])


class Row(NamedTuple):
    """What a sweep says of rows, (n,) each: the list's logits less the row's largest one (n, K), −inf where there is no
    id; that largest one; the rest's, and its log-sum-exp relative to it; and relative to the row's, at the student's
    temperature and, with labels, at 1.
    """

    below: Tensor
    top: Tensor
    rest_top: Tensor
    of_rest: Tensor
    log_rest: Tensor
    plain_rest: Tensor

    def logits(self, rate: Tensor) -> Tensor:
        """The student's of the categories (n, K + 1), the rest last."""
        return torch.cat((self.below * rate.unsqueeze(1), self.log_rest.unsqueeze(1)), 1)


def _statistics(call: RowCall, ids: Tensor, z: Tensor, ranks: Ranks, backend: Any) -> Row:
    terms, rate = call.terms, call.terms.student_inverse_temperature
    rest_top, of_rest, plain_rest = backend.rest_statistics(
        call.student, call.student_softcap, terms.row_scale, rate, ranks.here(ids, call.student.shape[-1]),
        terms.labels is not None,
    )  # fmt: skip
    if ranks.wire:
        tops, *sums = ranks.gathered(torch.stack((rest_top, of_rest, plain_rest), 1)).unbind(2)
        rest_top = tops.amax(0)
        apart = torch.where(tops == -torch.inf, 0, tops - rest_top)
        of_rest, plain_rest = (sums[0] + apart * rate).logsumexp(0), (sums[1] + apart).logsumexp(0)
    listed = torch.where(ids >= 0, z, -torch.inf)
    top = torch.cat((listed, rest_top.unsqueeze(1)), 1).amax(1)
    lost = of_rest.isnan() & (top != torch.inf)  # not each backend's largest of a NaN and others is the NaN
    top = torch.where(lost, of_rest, top)
    nothing = rest_top == -torch.inf
    apart = torch.where(nothing, 0, rest_top - top)
    rest = torch.where(nothing, 0, rest_top), torch.where(nothing, 0, of_rest)
    return Row(listed - top.unsqueeze(1), top, *rest, of_rest + apart * rate, plain_rest + apart)


def _at(student: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits (n, K) at ids; any where there is no id."""
    at = ids.clamp(0, student.shape[-1] - 1).view(*student.shape[:2], ids.shape[1])
    return student.gather(2, at).to(dtype).flatten(0, 1)


def _of_categories(
    call: RowCall, student: Tensor, teacher: Tensor, ids: Tensor, live: Tensor, wanted: bool, backend: Any
) -> tuple[Tensor, Tensor]:
    """The rows' divergences, weighed, and their gradient by the student's categories (n, K + 1)."""
    terms, divergence = call.terms, call.divergence
    assert divergence is not None
    labels = _category_of(terms.labels, ids) if divergence.needs_labels else None
    if call.targets.tail in ("ignore", "sampled"):
        return _truncated(call, student, teacher, ids, labels, live, wanted)
    ones = torch.ones_like(terms.row_scale)
    of_rows = TokenTerms(
        terms.row_scale, ones, ones, terms.divergence_scale, 0 * ones, 0 * ones, labels, None, divergence, 0.0
    )
    whole = RowCall(student.unsqueeze(0), teacher.unsqueeze(0), of_rows, student_gradient=wanted)
    parts, gradient, _ = backend.divergence_rows(whole)
    return parts[0], gradient.view(student.shape) if wanted else gradient


def _category_of(labels: Tensor | None, ids: Tensor) -> Tensor:
    """Where a label is in its row's list, or in its rest."""
    assert labels is not None
    here = ids == labels.unsqueeze(1)
    return torch.where(here.any(1), here.byte().argmax(1), ids.shape[1])


def _truncated(
    call: RowCall, student: Tensor, teacher: Tensor, ids: Tensor, labels: Tensor | None, live: Tensor, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Sums over the list alone, of the terms as their definition has them, in the widest arithmetic."""
    terms, divergence = call.terms, call.divergence
    assert divergence is not None
    wide = chunked.widest(student)
    with torch.inference_mode(False), torch.set_grad_enabled(wanted), autograd_inside_an_operator():
        z, log_p, scale = (x.to(wide, copy=True) for x in (student, teacher, terms.row_scale * terms.divergence_scale))
        weights = None if call.targets.weights is None else call.targets.weights.to(wide, copy=True)
        listed, counts, place = ids.clone() >= 0, live & (scale != 0), None if labels is None else labels.clone()
        z = torch.where(counts.unsqueeze(1), z, 0).requires_grad_(wanted)
        log_q = z.log_softmax(1)[:, :-1]
        sums = _sums(divergence, log_p[:, :-1], log_q, listed, weights, place)
        sums = torch.where(log_q.isnan().any(1), log_q.sum(1), sums)  # a NaN student's, where all of a list is 0, too
        losses = torch.where(counts, scale * sums, 0)
        gradient = torch.autograd.grad(losses.sum(), z)[0] if wanted else torch.zeros_like(z)
    return losses.detach().to(student.dtype), torch.where(counts.unsqueeze(1), gradient, 0).to(student.dtype)


def _sums(
    divergence: Divergence, log_p: Tensor, log_q: Tensor, listed: Tensor, weights: Tensor | None, labels: Tensor | None
) -> Tensor:
    """``Σ_S w φ(p, q)``, or of a divergence that is no such sum its formula of the list."""
    if weights is not None:  # what weighs nothing adds nothing, not even where it is infinite
        log_p, log_q = (x.masked_fill(weights == 0, -torch.inf) for x in (log_p, log_q))
    if divergence.kernel:  # an operator's divergence has the kernel's name
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", divergence.kernel).lower()
        divergence = dataclasses.replace(divergence, name=name)
    if isinstance(divergence, FDivergence):
        entries = divergence.value(log_p.exp(), log_q.exp(), log_p, log_q)
    elif divergence.kernel is None:
        entries = sum(divergence.terms(log_p.exp(), log_q.exp(), log_p, log_q, divergence.parameter))  # type: ignore
    elif weights is None:
        return divergence.scale * reference.of_log_probs(divergence, log_p, log_q, labels)
    else:  # each entry as a row of its own
        entries = reference.of_log_probs(divergence, log_p.unsqueeze(-1), log_q.unsqueeze(-1))
    entries = torch.where(listed, divergence.scale * entries, 0)
    return entries.sum(1) if weights is None else torch.where(listed, weights * entries, 0).sum(1)


class _Labels:
    """The label terms of some rows: their parts, and the factors of their gradient."""

    def __init__(self, call: RowCall, row: Row, live: Tensor, ranks: Ranks):
        terms, top = call.terms, row.top
        assert terms.labels is not None
        self.labels = torch.where(live, terms.labels, 0)
        self.at_label = ranks.at(call, self.labels.unsqueeze(1)).squeeze(1)
        self.log_all = torch.logaddexp(row.plain_rest, row.below.logsumexp(1))
        smoothing, scale = terms.label_smoothing, terms.row_scale * terms.cross_entropy_scale
        of_label = self.log_all.new_tensor(1 - smoothing)
        cross_entropy = times(of_label, self.log_all - (self.at_label - top))
        if smoothing:
            cross_entropy = cross_entropy + smoothing * (
                self.log_all + ranks.summed(_distance(call, top)) / call.vocabulary
            )
        lse = log_sum_exp(top, self.log_all)
        self.parts = [torch.where(live, terms.row_scale * x, 0) for x in (cross_entropy, lse * lse)]
        self.of_plain = scale + 2 * terms.row_scale * terms.z_loss_scale * lse
        self.constant = -scale * smoothing / call.vocabulary
        self.of_label = scale * (1 - smoothing)


def _distance(call: RowCall, top: Tensor) -> Tensor:
    """``Σ top − z`` over the entries here, a few rows at a time."""
    rows, found = call.student.flatten(0, 1), torch.empty_like(top)
    step = max(1, ROW_PIECE // rows.shape[1])
    for begin in range(0, len(rows), step):
        n = slice(begin, begin + step)
        found[n] = (top[n].unsqueeze(1) - capped(rows[n].to(top.dtype), call.student_softcap)).sum(1)
    return found


def _masses(call: RowCall, logits: Tensor, given: Tensor, ids: Tensor, z: Tensor, ranks: Ranks) -> list[Tensor]:
    """`values.SparseParts` behind the losses, of each row."""
    count = (ids >= 0).sum(1)
    teacher_mass = given.exp().sum(1)
    student_mass = logits.log_softmax(1)[:, :-1].exp().sum(1)
    most = min(ids.shape[1], call.vocabulary)
    if not most:
        return [teacher_mass, torch.zeros_like(teacher_mass), torch.zeros_like(teacher_mass)]
    largest = call.student.topk(min(most, call.student.shape[-1]), -1).values.flatten(0, 1).to(z.dtype)
    if ranks.wire:
        largest = sharded.largest_of_all(ranks.wire, largest, most)
    last = capped(largest, call.student_softcap).gather(1, (count - 1).clamp_min(0).unsqueeze(1))
    shared = ((z >= last) & (ids >= 0)).sum(1).to(z.dtype)
    return [teacher_mass, student_mass, torch.where(count > 0, shared / count.clamp_min(1), 0)]


def _write_gradient_(
    gradient: Tensor, call: RowCall, labels: _Labels | None, backend: Any, z: Tensor, row: Row, ids: Tensor,
    of_z: Tensor, ranks: Ranks,
) -> None:  # fmt: skip
    """of_z: (n, K + 1) the divergence's gradient by the list's logits, and the rest's."""
    top, cap, rate = row.top, call.student_softcap, call.terms.student_inverse_temperature
    row_scale = call.terms.without_metrics().row_scale
    of_rest, at, values = of_z[:, -1], ids, of_z[:, :-1]
    of_all = Rest(row.rest_top, of_rest, row.of_rest)
    if labels is not None:
        of_all = of_all._replace(top=top, of_plain=labels.of_plain, log_all=labels.log_all, constant=labels.constant)

        def beside(z: Tensor) -> Tensor:
            """The label terms' gradient by logits (n, any), but for the label's own."""
            softmax = (z - top.unsqueeze(1) - labels.log_all.unsqueeze(1)).exp()
            return labels.of_plain.unsqueeze(1) * softmax + labels.constant.unsqueeze(1)

        here = ids == labels.labels.unsqueeze(1)
        values = values + beside(z) - torch.where(here, labels.of_label.unsqueeze(1), 0)
        of_tail = of_rest * ((labels.at_label - row.rest_top) * rate - row.of_rest).exp()
        at_label = of_tail.unsqueeze(1) + beside(labels.at_label.unsqueeze(1)) - labels.of_label.unsqueeze(1)
        at = torch.cat((ids, torch.where(here.any(1), -1, labels.labels).unsqueeze(1)), 1)
        values, z = torch.cat((values, at_label), 1), torch.cat((z, labels.at_label.unsqueeze(1)), 1)
    values = torch.where(at >= 0, values * cap_slope(z, cap), 0)
    backend.rest_gradient_(
        gradient, call.student, cap, row_scale, rate, of_all, ranks.here(at, call.student.shape[-1]), values
    )


def _whole_rows(call: RowCall, gradient: Tensor | None, teacher: Listed, ranks: Ranks, backend: Any) -> Tensor:
    """The parts of some rows whose rest is not one category: by whole rows of the teacher, of these few alone."""
    terms, vocabulary, ids = call.terms, call.student.shape[-1], teacher.ids
    here, (log_p, rest) = ranks.here(ids, vocabulary), teacher.log_p.split((ids.shape[1], 1), 1)
    wide = call.student.flatten(0, 1).to(log_p.dtype, memory_format=torch.contiguous_format)  # rows that overlap, too
    rows = rest.repeat(1, vocabulary + 1)
    rows[:, :vocabulary].masked_fill_(teacher.hidden.unsqueeze(1) & (wide == -torch.inf), -torch.inf)
    rows.scatter_(1, torch.where(here >= 0, here, vocabulary), log_p)  # what is no id falls beyond the vocabulary
    whole = RowCall(
        wide[None], rows[None, :, :vocabulary], terms.without_metrics(), call.student_softcap,
        student_gradient=gradient is not None, shard=call.shard,
    )  # fmt: skip
    parts, of_student, _ = (sharded if ranks.wire else backend).divergence_rows(whole)
    if terms.metrics:
        z = ranks.at(call, ids)
        logits = _statistics(call, ids, z, ranks, backend).logits(terms.student_inverse_temperature)
        found = _masses(call, logits, teacher.given, ids, z, ranks)
        live = terms.row_scale != 0
        parts = torch.cat((parts, torch.stack([torch.where(live, terms.row_scale * x, 0) for x in found])))
    if gradient is not None:
        gradient.copy_(of_student.view(gradient.shape))
    return parts
