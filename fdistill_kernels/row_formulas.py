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
    tvd_student,
    tvd_value,
)

Sums = tuple[Tensor, ...]


def _whole_value(e: Entry, *_: float) -> Tensor:
    """of_row[1]: the row's loss."""
    return times(e.q, e.of_row[1])


def _overlap(e: Entry, *_: float) -> Sums:
    return tvd_value(e), torch.minimum(e.p, e.q)


def _lk_coefficients(_: Entry, sums: Sums, *numbers: float) -> Sums:
    apart, overlap = sums
    slope = torch.where(overlap > 0, 1 / overlap, 0)
    return slope, torch.where(apart < 0.5, -(-apart).log1p(), -overlap.log()), slope


def _lk(e: Entry, *_: float) -> Tensor:  # −log(1 − TVD)
    # from the peak's side, whose entries are then 0 without a rounding, which the slope may make large
    return e.of_row[0] * (tvd_student(e) + 0.5 * e.q * e.u_at_peak.sign())


def _anchor(e: Entry, a: float, rest: float) -> Tensor:
    """What keeps Σ p^α q^(1−α) in its dtype: its largest logarithm. Models without a common entry have none."""
    if e.anchor is not None:
        return e.anchor
    return power_log(e, a, rest).amax(1, keepdim=True).clamp(NO_OVERLAP, -NO_OVERLAP)


def _powers(e: Entry, a: float, rest: float) -> Sums:
    return alpha_value(e, a, rest), power(e, a, rest, _anchor(e, a, rest))


def _renyi_coefficients(e: Entry, sums: Sums, a: float, rest: float) -> Sums:
    """The slope by alpha's terms, where Σ p^α q^(1−α) is near 1; else 0, and what the powers are multiplied with."""
    apart, total = sums
    change, anchor = -a * rest * apart, _anchor(e, a, rest)
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


def _rest(e: Entry, *_: float) -> Sums:
    """Outside the set: both masses, their difference, and Σ p u; and the difference inside it."""
    apart = difference(e)
    return (*(torch.where(e.inside, 0, x) for x in (e.p, e.q, apart, times(e.p, e.u))), torch.where(e.inside, apart, 0))


def _group_coefficients(_: Entry, sums: Sums, weight: float, within: float) -> Sums:
    """Of ``weight·KL(the set's entries and its rest) + within·KL(inside the rest)``."""
    p, q, outside, of_kl, inside = sums
    apart = torch.where(p + q > 1, -inside, outside)  # the smaller sum has the digits
    u = torch.where(2 * apart.abs() < q, (apart / positive(q)).log1p(), p.log() - q.log())
    weights, inner = torch.full_like(p, weight), torch.where((p > 0) & (q > 0), torch.full_like(p, within), 0)
    share = times(weights, kl_value(Entry(p, q, p.log(), q.log(), u, p, q, u, u))) / positive(p + q)
    u = torch.where(p > 0, u, 0)  # nothing of the teacher's is there to be measured
    return weights, apart / positive(q), u, 1 / positive(p), 1 / positive(q), share, inner, of_kl / positive(p) - u


def _tail_aware_coefficients(_: Entry, sums: Sums, count: float, within: float) -> Sums:
    return _group_coefficients(_, sums, 1.0, within)


def _within(e: Entry) -> Entry:
    """An entry of the rest, among the rest."""
    _, _, u, of_p, of_q, *_ = e.of_row
    return e._replace(p=e.p * of_p, q=e.q * of_q, log_p=e.log_p - u, u=e.u - u)


def _grouped(e: Entry, *numbers: float) -> Tensor:
    weight, excess, _, _, _, _, inner, _ = e.of_row
    outside = -weight * times(e.q, excess) + times(inner, kl_student(_within(e)))
    return torch.where(e.inside, weight * kl_student(e), outside)


def _grouped_value(e: Entry, *numbers: float) -> Tensor:
    weight, _, _, _, _, share, inner, _ = e.of_row
    outside = times(e.p + e.q, share) + times(inner, kl_value(_within(e)))
    return torch.where(e.inside, times(weight, kl_value(e)), outside)


def _grouped_rkl(e: Entry, *numbers: float) -> Tensor:
    """The teacher's term of `_grouped`, by an exchanged entry."""
    of_kl, inner, _, _, of_p, u, _, weight = e.of_row
    apart = -e.u - u  # from that of the rest as one, which then is 0 without a rounding
    return torch.where(e.inside, times(weight, times(e.q, apart)), times(inner * of_p * e.q, apart - of_kl))


_LK, _RENYI = RowStatistics(_overlap, _lk_coefficients), RowStatistics(_powers, _renyi_coefficients, anchor=_anchor)
_AKL, _GATE = RowStatistics(_gaps, _akl_coefficients, "mass"), RowStatistics(_entropy, _gate)
_CSD = RowStatistics(_scores, _csd_coefficients)
_TOP = RowStatistics(_rest, _tail_aware_coefficients, "count")
_LABEL = RowStatistics(_rest, _group_coefficients, "label")

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
