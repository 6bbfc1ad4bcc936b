"""The formulas of divergences that ask for statistics of their row: as formulas.py has the others, which these use.

A row's statistics are sums over its entries; coefficients made of them, through which no gradient flows, enter the
terms. Where the loss is a function of the whole row, each entry's value is the loss times its share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .formulas import (
    KERNELS,
    NO_OVERLAP,
    Entry,
    Formula,
    RowStatistics,
    alpha_series,
    alpha_student,
    alpha_value,
    difference,
    kl_student,
    kl_value,
    positive,
    power,
    power_log,
    rkl_student,
    rkl_value,
    times,
    tvd_value,
)

Sums = tuple[Tensor, ...]


def _whole_value(e: Entry, *_: float) -> Tensor:
    """of_row[1]: the row's loss."""
    return times(e.q, e.of_row[1])


def _smaller_logs(e: Entry, *_: float) -> Sums:
    return (torch.minimum(e.log_p, e.log_q),)


def _overlap(e: Entry, *_: float) -> Sums:
    (log,) = _smaller_logs(e)
    return tvd_value(e), (log - e.largest[0]).exp()


def _lk_coefficients(e: Entry, sums: Sums, *numbers: float) -> Sums:
    apart, overlap = sums
    loss = torch.where(apart < 0.5, -(-apart).log1p(), -(overlap.log() + e.largest[0]))
    of_overlap = torch.where(overlap == 0, -math.inf, loss)  # what is no part of nothing
    return of_overlap, loss, of_overlap


def _lk(e: Entry, *_: float) -> Tensor:  # −log(1 − TVD)
    # from the peak's side, whose entries are then 0 without a rounding; the others' are no larger than the overlap
    share = (e.log_q + e.of_row[0]).clamp_max(0).exp()
    return times(share, 0.5 * (e.u_at_peak.sign() - e.u.sign()))


def _power_logs(e: Entry, a: float, rest: float) -> Sums:
    return (power_log(e, a, rest),)


def _powers(e: Entry, a: float, rest: float) -> Sums:
    return alpha_value(e, a, rest), power(e, a, rest, e.largest[0])


def _renyi_coefficients(e: Entry, sums: Sums, a: float, rest: float) -> Sums:
    """The slope by alpha's terms, where Σ p^α q^(1−α) is near 1; else 0, and what the powers are multiplied with."""
    apart, total = sums
    change, anchor = -a * rest * apart, e.largest[0]
    near = change.abs() < 0.5
    slope, of_power = torch.where(near, a / (1 + change), 0), torch.where(total > 0, a / total, 0)
    loss = torch.where(near, change.log1p(), total.log() + anchor) / -rest
    return slope, loss, anchor, of_power, of_power, anchor, torch.zeros_like(slope), slope


def _renyi(e: Entry, a: float, rest: float) -> Tensor:  # log(Σ p^α q^(1−α)) / (α − 1)
    slope, _, anchor, of_power, *_rest = e.of_row
    far = times(power(e, a, rest, anchor), of_power / -a)
    return torch.where(slope == 0, far, times(alpha_student(e, a, rest), slope))


def _mixed(e: Entry, *_: float) -> Tensor:
    """of_row: the weight of kl, and last that of rkl."""
    return e.of_row[0] * kl_student(e) + times(e.of_row[-1], rkl_student(e))


def _mixed_value(e: Entry, *_: float) -> Tensor:
    return times(e.of_row[0], kl_value(e)) + times(e.of_row[-1], rkl_value(e))


def _gaps(e: Entry, *_: float) -> Sums:
    gap = difference(e).abs()
    return torch.where(e.inside, gap, 0), torch.where(e.inside, 0, gap)


def _akl_coefficients(_: Entry, sums: Sums, *numbers: float) -> Sums:
    head, tail = sums
    share = torch.where(head + tail == 0, 0.5, head / (head + tail))
    return share, 1 - share


def _entropy(e: Entry, *_: float) -> Sums:
    return (-times(e.p, e.log_p),)


def _gate(_: Entry, sums: Sums, threshold: float, other: float) -> Sums:
    gate = (sums[0] > threshold).to(sums[0])
    return gate, torch.ones_like(gate)


def _scores(e: Entry, of_teacher: float, _: float) -> Sums:
    return (times(e.p if of_teacher else e.q, e.u - _u_at_weights_peak(e, of_teacher)),)


def _u_at_weights_peak(e: Entry, of_teacher: float) -> Tensor:
    """u at the largest weight, whose own then keeps its digits; 0 where it is infinite, as the mean then will be."""
    u = e.u_at_other_peak if of_teacher else e.u_at_peak
    return torch.where(u.isinf(), 0, u)


def _csd_coefficients(e: Entry, sums: Sums, of_teacher: float, _: float) -> Sums:
    anchor = _u_at_weights_peak(e, of_teacher)
    return sums[0], anchor, -anchor, -sums[0]


def _csd(e: Entry, of_teacher: float, _: float) -> Tensor:  # Σ w (u − Σ w u)², w = p or q held still
    return -2 * times(e.p if of_teacher else e.q, (e.u - e.of_row[1]) - e.of_row[0])


def _csd_value(e: Entry, of_teacher: float, _: float) -> Tensor:
    square = ((e.u - e.of_row[1]) - e.of_row[0]) ** 2  # where u is infinite the mean is too
    return times(e.p if of_teacher else e.q, torch.where(e.u.isinf(), math.inf, square))


def _logs_outside(e: Entry, *_: float) -> Sums:
    """What keeps the rest's masses in their dtype, where the set has all but e^−100 of a model's."""
    return tuple(torch.where(e.inside, NO_OVERLAP, log) for log in (e.log_p, e.log_q))


def _rest(e: Entry, *_: float) -> Sums:
    """Outside the set, relative to their largest entries: both masses, their difference to q's, and Σ p u; and the
    difference inside it.
    """
    of_p, of_q = e.largest
    p, q = (e.log_p - of_p).exp(), (e.log_q - of_q).exp()
    apart = difference(e._replace(p=(e.log_p - of_q).exp(), q=q))  # infinite where it is not asked for
    outside = (torch.where(e.inside, 0, x) for x in (p, q, apart, times(p, e.u)))
    return *outside, torch.where(e.inside, difference(e), 0)


def _group_coefficients(e: Entry, sums: Sums, weight: float, within: float) -> Sums:
    """Of ``weight·KL(the set's entries and its rest) + within·KL(inside the rest)``."""
    p, q, outside, of_kl, inside = sums
    top_p, top_q = e.largest
    log_p, log_q = top_p + p.log(), top_q + q.log()
    mass_p, mass_q = log_p.exp(), log_q.exp()
    # p/q − 1, by the sum that has the digits
    excess = torch.where(mass_p + mass_q > 1, -inside / positive(mass_q), outside / positive(q))
    little = excess.abs() < 0.5
    apart = torch.where(little, excess * mass_q, mass_p - mass_q)
    u = torch.where(little, excess.log1p(), (top_p - top_q) + p.log() - q.log())
    weights, inner = torch.full_like(p, weight), torch.where((p > 0) & (q > 0), torch.full_like(p, within), 0)
    loss = times(weights, kl_value(Entry(mass_p, mass_q, log_p, log_q, u, p, q, u, u)))
    share = loss / ((p > 0).to(p) + (q > 0).to(q)).clamp_min(1)
    u = torch.where(p > 0, u, 0)  # nothing of the teacher's is there to be measured
    of_p, of_q = 1 / positive(p), 1 / positive(q)
    return weights, apart, u, top_p, top_q, of_p, of_q, share, inner, of_kl * of_p - u


def _tail_aware_coefficients(e: Entry, sums: Sums, count: float, within: float) -> Sums:
    return _group_coefficients(e, sums, 1.0, within)


def _within(e: Entry) -> Entry:
    """An entry of the rest, among the rest."""
    _, _, u, top_p, top_q, of_p, of_q, *_ = e.of_row
    p, q = (e.log_p - top_p).exp() * of_p, (e.log_q - top_q).exp() * of_q
    return e._replace(p=p, q=q, log_p=e.log_p - u, u=e.u - u)


def _grouped(e: Entry, *numbers: float) -> Tensor:
    weight, apart, *_, inner, _ = e.of_row
    within = _within(e)
    outside = times(inner, kl_student(within)) - weight * within.q * apart
    return torch.where(e.inside, weight * kl_student(e), outside)


def _grouped_value(e: Entry, *numbers: float) -> Tensor:
    weight, *_, share, inner, _ = e.of_row
    within = _within(e)
    outside = times(within.p + within.q, share) + times(inner, kl_value(within))
    return torch.where(e.inside, times(weight, kl_value(e)), outside)


def _grouped_rkl(e: Entry, *numbers: float) -> Tensor:
    """The teacher's term of `_grouped`, by an exchanged entry."""
    of_kl, inner, _, _, of_p, _, top_p, u, _, weight = e.of_row
    apart = -e.u - u  # from that of the rest as one, which then is 0 without a rounding
    outside = times(inner * ((e.log_q - top_p).exp() * of_p), apart - of_kl)
    return torch.where(e.inside, times(weight, times(e.q, apart)), outside)


_LK = RowStatistics(_overlap, _lk_coefficients, largest=_smaller_logs)
_RENYI = RowStatistics(_powers, _renyi_coefficients, largest=_power_logs)
_AKL, _GATE = RowStatistics(_gaps, _akl_coefficients, "mass"), RowStatistics(_entropy, _gate)
_CSD = RowStatistics(_scores, _csd_coefficients)
_TOP = RowStatistics(_rest, _tail_aware_coefficients, "count", _logs_outside)
_LABEL = RowStatistics(_rest, _group_coefficients, "label", _logs_outside)

KERNELS |= {
    "Lk": Formula(_lk, _whole_value, "Lk", statistics=_LK),
    "Renyi": Formula(_renyi, _whole_value, "Renyi", swapped=True, series=alpha_series, statistics=_RENYI),
    "Akl": Formula(_mixed, _mixed_value, "Akl", statistics=_AKL),
    "EntropyGated": Formula(_mixed, _mixed_value, "EntropyGated", statistics=_GATE),
    "Csd": Formula(_csd, _csd_value, "Csd", swapped=True, centred=True, statistics=_CSD),
    "TailAware": Formula(_grouped, _grouped_value, "GroupedRkl", centred=True, statistics=_TOP),
    "Dkd": Formula(_grouped, _grouped_value, "GroupedRkl", centred=True, statistics=_LABEL),
    "GroupedRkl": Formula(_grouped_rkl, _grouped_value, "TailAware"),
}
