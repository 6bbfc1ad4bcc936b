"""Divergences that ask for statistics of their row, as csrc/row_divergences.h has and row_formulas.py explains them.

A divergence's sums are of an entry (terms.py), its coefficients of the sums, both beside the row's facts: u at both
peaks, and the largest of the two it names, from NO_OVERLAP to -NO_OVERLAP. Its terms take the coefficients behind their
constants, own[FIRST] and on, with the models exchanged in reverse.
"""

import triton
import triton.language as tl

from .terms import (
    LN2,
    LOG2E,
    NO_OVERLAP,
    SMALLEST_NORMAL,
    Alpha,
    Kl,
    Rkl,
    difference,
    log1p,
    minus,
    power,
    power_log,
    sided,
    times,
)

COEFFICIENTS = tl.constexpr(10)
FIRST, LAST = tl.constexpr(11), tl.constexpr(20)


@triton.jit
def _whole(e, own):
    """An entry's share of its row's loss."""
    return times(e[1], own[FIRST + 1])


@triton.jit
def _smaller(e):
    return tl.minimum(e[2], e[3], propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def LkLargest(e, own):
    """What keeps Σ min(p, q) in float: its largest logarithm, to base 2."""
    return _smaller(e), _smaller(e)


@triton.jit
def LkSums(e, own, facts):
    p, q, _, _, u, _, _, _, _ = e
    apart = difference(p, q, u, True)
    return 0.5 * tl.abs(apart), tl.exp2(_smaller(e) - facts[2]), 0.0 * p, 0.0 * p, 0.0 * p


@triton.jit
def LkCoefficients(sums, own, facts):
    apart, overlap, _, _, _ = sums
    far = -(tl.log(overlap) + facts[2] * LN2)
    loss = tl.where(apart < 0.5, -log1p(-tl.where(apart < 0.5, apart, 0.0)), far)
    of_overlap = tl.where(overlap == 0, float("-inf"), loss * LOG2E)  # what is no part of nothing
    return of_overlap, loss, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, of_overlap


@triton.jit
def Lk(e, own, CLOSE: tl.constexpr):
    u, u_at_peak = e[4], e[7]
    side = tl.where(u_at_peak > 0, 0.5, tl.where(u_at_peak < 0, -0.5, 0.0))
    # from the peak's side, whose entries are then 0 without a rounding; the others' are no larger than the overlap
    share = tl.exp2(tl.minimum(e[3] + own[FIRST], 0.0, propagate_nan=tl.PropagateNan.ALL))
    return times(share, side + sided(minus(u), 0.5 + 0.0 * share)), _whole(e, own)


@triton.jit
def RenyiLargest(e, own):
    """What keeps Σ p^α q^(1−α) in float: its largest logarithm, to base 2."""
    largest = power_log(e[2], e[3], own[0], own[1])
    return largest, largest


@triton.jit
def RenyiSums(e, own, facts):
    _, value = Alpha(e, own, True)
    total = power(e[2], e[3], own[0], own[1], facts[2])
    return value, total, 0.0 * e[0], 0.0 * e[0], 0.0 * e[0]


@triton.jit
def RenyiCoefficients(sums, own, facts):
    """The slope by alpha's terms, where the sum is near 1; else 0, and what the powers are multiplied with."""
    change, total = -own[0] * own[1] * sums[0], sums[1]
    anchor, near = facts[2], tl.abs(change) < 0.5
    slope, of_power = tl.where(near, own[0] / (1 + change), 0.0), tl.where(total > 0, own[0] / total, 0.0 * total)
    loss = tl.where(near, log1p(tl.where(near, change, 0.0)), tl.log(total) + anchor * LN2) / -own[1]
    return slope, loss, anchor, of_power, 0.0, 0.0, of_power, anchor, 0.0, slope


@triton.jit
def Renyi(e, own, CLOSE: tl.constexpr):
    student, _ = Alpha(e, own, CLOSE)
    far = power(e[2], e[3], own[0], own[1], own[FIRST + 2]) * (own[FIRST + 3] / -own[0])
    return tl.where(own[FIRST] == 0, far, times(student, own[FIRST])), _whole(e, own)


@triton.jit
def Mixed(e, own, CLOSE: tl.constexpr):
    """Coefficients: the weight of kl, and last that of rkl."""
    forward, of_kl = Kl(e, own, CLOSE)
    backward, of_rkl = Rkl(e, own, CLOSE)
    return own[FIRST] * forward + times(own[LAST], backward), times(own[FIRST], of_kl) + times(own[LAST], of_rkl)


@triton.jit
def AklSums(e, own, facts):
    p, q, _, _, u, _, _, _, inside = e
    gap = tl.abs(difference(p, q, u, True))
    return tl.where(inside, gap, 0.0), tl.where(inside, 0.0, gap), 0.0 * p, 0.0 * p, 0.0 * p


@triton.jit
def AklCoefficients(sums, own, facts):
    total = sums[0] + sums[1]
    share = tl.where(total == 0, 0.5, sums[0] / total)
    return share, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1 - share


@triton.jit
def EntropyGatedSums(e, own, facts):
    p = e[0]
    return -times(p, e[2] * LN2), 0.0 * p, 0.0 * p, 0.0 * p, 0.0 * p


@triton.jit
def EntropyGatedCoefficients(sums, own, facts):
    gate = tl.where(sums[0] > own[0], 1.0, 0.0)
    return gate, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gate * 0.0 + 1.0


@triton.jit
def _u_at_weights_peak(own, facts):
    """u at the largest weight, whose own then keeps its digits; 0 where it is infinite, as the mean then will be."""
    u = tl.where(own[0] != 0, facts[1], facts[0])
    return tl.where(tl.abs(u) == float("inf"), 0.0, u)


@triton.jit
def CsdSums(e, own, facts):
    p, q, _, _, u, _, _, _, _ = e
    mean = times(tl.where(own[0] != 0, p, q), u - _u_at_weights_peak(own, facts))
    return mean, 0.0 * p, 0.0 * p, 0.0 * p, 0.0 * p


@triton.jit
def CsdCoefficients(sums, own, facts):
    at_peak = _u_at_weights_peak(own, facts)
    return sums[0], at_peak, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -at_peak, -sums[0]


@triton.jit
def Csd(e, own, CLOSE: tl.constexpr):
    p, q, _, _, u, _, _, _, _ = e
    weight, apart = tl.where(own[0] != 0, p, q), (u - own[FIRST + 1]) - own[FIRST]
    # where u is infinite the mean is too
    square = tl.where(tl.abs(u) == float("inf"), float("inf"), apart * apart)
    return -2 * times(weight, apart), times(weight, square)


@triton.jit
def GroupedLargest(e, own):
    """What keeps the rest's masses in float, where the set has all but 2^−140 of a model's, to base 2."""
    return tl.where(e[8], NO_OVERLAP, e[2]), tl.where(e[8], NO_OVERLAP, e[3])


@triton.jit
def GroupedSums(e, own, facts):
    """Outside the set, relative to their largest entries: both masses, their difference to q's, which is infinite where
    it is not asked for, and Σ p u; and the difference inside it.
    """
    p, q, log2_p, log2_q, u, _, _, _, inside = e
    of_p, of_q = tl.exp2(log2_p - facts[2]), tl.exp2(log2_q - facts[3])
    apart = difference(tl.exp2(log2_p - facts[3]), of_q, u, True)
    return (tl.where(inside, 0.0, of_p), tl.where(inside, 0.0, of_q), tl.where(inside, 0.0, apart),
            tl.where(inside, 0.0, times(of_p, u)), tl.where(inside, difference(p, q, u, True), 0.0))  # fmt: skip


@triton.jit
def _grouped_coefficients(sums, facts, weight, within):
    p, q, outside, of_kl, inside = sums
    top_p, top_q = facts[2], facts[3]
    log2_p, log2_q = top_p + tl.log2(p), top_q + tl.log2(q)
    mass_p, mass_q = tl.exp2(log2_p), tl.exp2(log2_q)
    # p/q − 1, by the sum that has the digits
    excess = outside / tl.maximum(q, SMALLEST_NORMAL)
    excess = tl.where(mass_p + mass_q > 1, -inside / tl.maximum(mass_q, SMALLEST_NORMAL), excess)
    little = tl.abs(excess) < 0.5
    apart = tl.where(little, excess * mass_q, mass_p - mass_q)
    u = tl.where(little, log1p(tl.where(little, excess, 0.0)), ((top_p - top_q) + tl.log2(p) - tl.log2(q)) * LN2)
    _, loss = Kl((mass_p, mass_q, log2_p, log2_q, u, p, q, u, False), (0.0, 0.0), True)
    both = (p > 0) & (q > 0)
    share = times(weight, loss) * tl.where(both, 0.5, 1.0)
    u = tl.where(p > 0, u, 0.0)  # nothing of the teacher's is there to be measured
    of_p, of_q = 1 / tl.maximum(p, SMALLEST_NORMAL), 1 / tl.maximum(q, SMALLEST_NORMAL)
    return weight, apart, u, top_p, top_q, of_p, of_q, share, tl.where(both, within, 0.0), of_kl * of_p - u


@triton.jit
def TailAwareCoefficients(sums, own, facts):
    return _grouped_coefficients(sums, facts, 0.0 * own[1] + 1.0, own[1])


@triton.jit
def DkdCoefficients(sums, own, facts):
    return _grouped_coefficients(sums, facts, own[0], own[1])


@triton.jit
def GroupedKl(e, own, CLOSE: tl.constexpr):
    """KL's terms of an entry, which is one of the whole row inside the set, and one of the rest outside."""
    _, _, log2_p, log2_q, u, p_shifted, q_shifted, _, inside = e
    weight, within = own[FIRST], own[FIRST + 8]
    apart = tl.where(inside, 0.0, own[FIRST + 2])
    p = tl.exp2(log2_p - tl.where(inside, 0.0, own[FIRST + 3])) * tl.where(inside, 1.0, own[FIRST + 5])
    q = tl.exp2(log2_q - tl.where(inside, 0.0, own[FIRST + 4])) * tl.where(inside, 1.0, own[FIRST + 6])
    of_set = (p, q, log2_p - apart * LOG2E, log2_q, u - apart, p_shifted, q_shifted, 0.0, inside)
    student, value = Kl(of_set, own, True)
    outside = times(within, student) - weight * (q * own[FIRST + 1])
    value_outside = times(p + q, own[FIRST + 7]) + times(within, value)
    return tl.where(inside, weight * student, outside), tl.where(inside, times(weight, value), value_outside)


@triton.jit
def GroupedRkl(e, own, CLOSE: tl.constexpr):
    """The teacher's term of GroupedKl, by an exchanged entry; from that of the rest as one."""
    q, log2_q, inside = e[1], e[3], e[8]
    apart = -e[4] - own[LAST - 2]
    of_rest = tl.exp2(log2_q - own[LAST - 3]) * own[LAST - 5]
    outside = times(own[LAST - 8] * of_rest, apart - own[LAST - 9])
    return tl.where(inside, times(own[LAST], times(q, apart)), outside), 0.0 * q


BY_SYMBOL = {
    "Lk": Lk, "Renyi": Renyi, "Akl": Mixed, "EntropyGated": Mixed, "Csd": Csd, "TailAware": GroupedKl, "Dkd": GroupedKl,
    "GroupedRkl": GroupedRkl,
}  # fmt: skip
#: By symbol: the sums over a row, and their coefficients.
STATISTICS = {
    "Lk": (LkSums, LkCoefficients), "Renyi": (RenyiSums, RenyiCoefficients), "Akl": (AklSums, AklCoefficients),
    "EntropyGated": (EntropyGatedSums, EntropyGatedCoefficients), "Csd": (CsdSums, CsdCoefficients),
    "TailAware": (GroupedSums, TailAwareCoefficients), "Dkd": (GroupedSums, DkdCoefficients),
}  # fmt: skip
#: By symbol: what of entries is to be known the largest of first.
LARGEST = {"Lk": LkLargest, "Renyi": RenyiLargest, "TailAware": GroupedLargest, "Dkd": GroupedLargest}
