"""The formulas of each divergence at a vocabulary entry, in torch, in any float dtype; csrc/divergences.h and Triton's
kernels/terms.py say the same in their languages.

A divergence ``D(p‖q) = Σ q f(p/q)`` is two functions, with t = p/q:

    value     q f(t), f shifted by c·(t − 1) so that f′(1) = 0: never negative, and 0 at p = q
    student   q g(t), g = f − t f′ less a constant, which no gradient feels: ``∂D/∂z_s = (student − q Σ student) / T``

and the divergence with the models exchanged, whose student's term is the teacher's of this one. A constant in g that is
large beside its differences costs the gradient its digits, so g is taken from g(1) in rows that are `about_one`, whose
models agree about the peak, and from g(0) in the others, whose models barely overlap. Near p = q everything is made
from u = log t, which the kernels take from the logits' own differences, by series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: A logarithm of 0 that may still be multiplied: masks of finfo.min, and −inf.
LOWEST_LOG = -1e30
#: Above the logarithm of p^a q^b of an entry that one model lacks, for 0 < a, b and a + b = 1; its negative is below
#: that for a > 1.
NO_OVERLAP = -1e20
#: |u| below which p and q are near, and series are used: as far as they hold a dtype's digits.
NEAR = {torch.float32: 0.1875, torch.float64: 0.02}
#: |u| of a row's peak below which g is taken from g(1).
ABOUT_ONE = 1.0
#: Coefficients of a series that native kernels use; float64 needs more.
TERMS = 7
#: The most coefficients of a row.
COEFFICIENTS = 10
#: Coefficients of (exp(u) − 1 − u)/u².
SECOND_ORDER = tuple(1 / math.factorial(k) for k in range(2, 9))


NOTHING = torch.zeros((), dtype=torch.bool)


class Entry(NamedTuple):
    """Entries of rows (n, V): both models' probabilities, their logarithms, u = log(p/q), and log p and log q but for a
    constant of the row, whose differences have more digits. `u_at_peak`, `u_at_other_peak` (n, 1): u at the student's
    largest entry, and at the teacher's.

    Of divergences with `RowStatistics` also which entries are in their set, and the coefficients (n, 1) of the row, at
    most `COEFFICIENTS`; and before these are known `RowStatistics.largest` of the row, from NO_OVERLAP to -NO_OVERLAP.
    """

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor
    u: Tensor
    p_shifted: Tensor
    q_shifted: Tensor
    u_at_peak: Tensor
    u_at_other_peak: Tensor
    inside: Tensor = NOTHING
    of_row: tuple[Tensor, ...] = ()
    largest: tuple[Tensor, ...] = ()

    def exchanged(self) -> Entry:
        """Teacher for student, the row's coefficients in reverse."""
        return Entry(
            self.q, self.p, self.log_q, self.log_p, -self.u, self.q_shifted, self.p_shifted, -self.u_at_other_peak,
            -self.u_at_peak, self.inside, self.of_row[::-1], self.largest,
        )  # fmt: skip

    def about_one(self, power: float = 1.0) -> Tensor:
        """Whether t^power is about 1 at the row's peak, so that g is to be taken from g(1)."""
        return (power * self.u_at_peak).abs() < ABOUT_ONE


#: Of an entry and the divergence's two numbers: its parameter, and the other one, which is 1 − parameter where there is
#: none.
EntryFunction = Callable[[Entry, float, float], Tensor]


@dataclass(frozen=True)
class RowStatistics:
    """What a divergence asks of a row before its terms.

    Attributes:
        members: which entries are in the row's set: the "label"; or the teacher's largest, by "count" (as many as the
            parameter) or by "mass" (as few as hold the parameter's share). Entries that tie are in it together.
        largest: of what of its entries the row's largest (n, 1) are to be known first: logarithms, which sums are then
            taken relative to, so that these stay in their dtype.
        sums: what is summed over the row, of its entries.
        coefficients: what `Entry.of_row` holds, of those sums (n, 1), the two numbers, and u at the peaks; no gradient
            flows through it.
    """

    sums: Callable[[Entry, float, float], tuple[Tensor, ...]]
    coefficients: Callable[[Entry, tuple[Tensor, ...], float, float], tuple[Tensor, ...]]
    members: str = ""
    largest: Callable[[Entry, float, float], tuple[Tensor, ...]] | None = None


@dataclass(frozen=True)
class Formula:
    """A divergence's two functions, of an entry and the divergence's two numbers.

    Attributes:
        exchanged: the symbol of the divergence with the models exchanged; `swapped`: with its numbers exchanged.
        centred: Σ student = 0, so that the gradient needs no sum over the row.
        series: the coefficients of value/q near p = q by x = t − 1 (alpha, ab: by u), from that of x² on.
        statistics: of the row, whose coefficients the functions take.
    """

    student: EntryFunction
    value: EntryFunction
    exchanged: str
    swapped: bool = False
    centred: bool = False
    series: Callable[[float, float], list[float]] | None = None
    statistics: RowStatistics | None = None

    def of_exchanged(self, parameter: float, other: float) -> tuple[float, float]:
        """The two numbers with the models exchanged."""
        return (other, parameter) if self.swapped else (parameter, other)

    def teacher(self, entry: Entry, parameter: float, other: float) -> Tensor:
        """The teacher's term, ``p f′(t)`` less a constant."""
        return KERNELS[self.exchanged].student(entry.exchanged(), *self.of_exchanged(parameter, other))

    def constants(self, parameter: float, other: float) -> tuple[float, ...]:
        """csrc/row_task.h's `Parameter`."""
        logs = [math.log(x) if x > 0 else 0.0 for x in (parameter, other)]
        series = self.series(parameter, other)[:TERMS] if self.series else [0.0] * TERMS
        return parameter, other, *logs, *series

    def __call__(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
        """Both terms, of one f, so that their sum is the value: what a `Divergence` of the user's own is made of."""
        if self.statistics is not None:
            raise TypeError("these terms need sums over their row, which a divergence of one's own has not")
        about_one = torch.zeros_like(p[..., :1])
        entry = Entry(p, q, log_p, log_q, log_p - log_q, log_p, log_q, about_one, about_one)
        return self.student(entry, parameter, 1 - parameter), self.teacher(entry, parameter, 1 - parameter)


def times(x: Tensor, y: Tensor | float) -> Tensor:
    """``x·y`` with 0·y = 0 for infinite or undefined y: the limit of x log x and its kin."""
    return torch.where(x == 0, torch.zeros_like(x), x * y)


def _near(e: Entry, series: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(e.u.abs() < NEAR[e.u.dtype], series, otherwise)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """From the constant one on."""
    value = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * x + c
    return value


def positive(x: Tensor) -> Tensor:
    """A denominator."""
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def _finite(log: Tensor) -> Tensor:
    """log 0 as a number: 0 log 0 is 0 without asking."""
    return log.clamp_min(torch.finfo(log.dtype).min)


def difference(e: Entry) -> Tensor:
    """``p − q``."""
    return _near(e, e.q * torch.expm1(e.u), e.p - e.q)


def kl_student(e: Entry, *_: float) -> Tensor:  # f = t log t − t + 1
    return -difference(e)


def kl_value(e: Entry, *_: float) -> Tensor:
    series = e.q * e.u**2 * (1 + (e.u - 1) * _polynomial(e.u, SECOND_ORDER))
    return _near(e, series, times(e.p, e.log_p - e.log_q) - (e.p - e.q))


def rkl_student(e: Entry, *_: float) -> Tensor:  # f = −log t + t − 1
    return _near(e, -e.q * e.u, times(e.q, e.log_q - e.log_p))


def rkl_value(e: Entry, *_: float) -> Tensor:
    series = e.q * e.u**2 * _polynomial(e.u, SECOND_ORDER)
    return _near(e, series, times(e.q, e.log_q - e.log_p) + (e.p - e.q))


def _jeffreys(e: Entry, *_: float) -> Tensor:  # f = (t − 1) log t
    return rkl_student(e) + kl_student(e)


def _jeffreys_value(e: Entry, *_: float) -> Tensor:
    return rkl_value(e) + kl_value(e)


def _log_sum(a: Tensor, b: Tensor, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """``log(a + b)`` less log a and less log b, each with the digits of its smallest values."""
    ratio = (torch.minimum(a, b) / positive(torch.maximum(a, b))).log1p()
    apart = _finite(log_a) - _finite(log_b)
    return torch.where(a > b, ratio, ratio - apart), torch.where(a > b, ratio + apart, ratio)


def _gjs(e: Entry, beta: float, rest: float) -> Tensor:  # β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q, 0 < β < 1
    a, b, log_beta, log_rest = beta * e.p, rest * e.q, math.log(beta), math.log(rest)
    _, above_b = _log_sum(a, b, e.log_p + log_beta, e.log_q + log_rest)
    about_one = _near(e, (beta * torch.expm1(e.u)).log1p(), above_b + log_rest)
    return -b * torch.where(e.about_one(), about_one, above_b)


def _gjs_value(e: Entry, beta: float, rest: float) -> Tensor:
    a, b, log_beta, log_rest = beta * e.p, rest * e.q, math.log(beta), math.log(rest)
    above_a, above_b = _log_sum(a, b, e.log_p + log_beta, e.log_q + log_rest)
    x = torch.expm1(e.u)
    return _near(
        e, e.q * x**2 * _polynomial(x, _gjs_series(beta, rest)), -a * (above_a + log_beta) - b * (above_b + log_rest)
    )


def _gjs_series(beta: float, _: float) -> list[float]:
    return [(-1) ** k * beta * (1 - beta ** (k - 1)) / (k * (k - 1)) for k in range(2, 11)]


def _skew_kl(e: Entry, lam: float, rest: float) -> Tensor:  # KL(p ‖ λp + (1 − λ)q), 0 < λ < 1
    m = positive(lam * e.p + rest * e.q)
    return -rest * torch.where(e.about_one(), rest * difference(e), e.p) * (e.q / m)


def _skew_kl_value(e: Entry, lam: float, rest: float) -> Tensor:
    log_lam, x = math.log(lam), torch.expm1(e.u)
    above_a, _ = _log_sum(lam * e.p, rest * e.q, e.log_p + log_lam, e.log_q + math.log(rest))
    far = rest * (e.q - e.p) - times(e.p, above_a + log_lam)  # log(m/p) of λ near 1, where it is almost nothing
    return _near(e, e.q * x**2 * _polynomial(x, _skew_series(lam, rest)), far)


def _skew_series(lam: float, _: float) -> list[float]:
    return [(-1) ** k * (1 / (k * (k - 1)) + lam**k / k - lam ** (k - 1) / (k - 1)) for k in range(2, 11)]


def _skew_rkl(
    e: Entry, lam: float, rest: float
) -> Tensor:  # KL(q ‖ λq + (1 − λ)p): g = x/(1 + x) − log1p(x), x = (1 − λ)t/λ
    a, b, log_lam, log_rest = rest * e.p, lam * e.q, math.log(lam), math.log(rest)
    _, above_b = _log_sum(a, b, e.log_p + log_rest, e.log_q + log_lam)
    g = a / positive(a + b) - above_b
    x, y = a / positive(b), rest * torch.expm1(e.u)
    small = torch.where(x < NEAR[x.dtype], -(x**2) * _polynomial(x, [(-1) ** k * (1 - 1 / k) for k in range(2, 14)]), g)
    about_one = _near(e, lam * y / (1 + y) - y.log1p(), g - rest - log_lam)
    return times(e.q, torch.where(e.about_one(), about_one, small))


def _skew_rkl_value(e: Entry, lam: float, rest: float) -> Tensor:
    return _skew_kl_value(e.exchanged(), lam, rest)


def tvd_student(e: Entry, *_: float) -> Tensor:  # f = |t − 1| / 2, with the zero subgradient at ties
    return -0.5 * e.q * difference(e).sign()


def tvd_value(e: Entry, *_: float) -> Tensor:
    return 0.5 * difference(e).abs()


def power_log(e: Entry, a: float, b: float) -> Tensor:
    """``log(p^a q^b)``; −inf where neither model has the entry."""
    log_p, log_q = e.log_p.clamp_min(LOWEST_LOG), e.log_q.clamp_min(LOWEST_LOG)  # a times finfo.min would overflow
    neither = (e.log_p <= LOWEST_LOG) & (e.log_q <= LOWEST_LOG)
    return (a * log_p + b * log_q).masked_fill(neither, -math.inf)


def power(e: Entry, a: float, b: float, less: float | Tensor = 0) -> Tensor:
    """``p^a q^b``, its logarithm less a number; 0 where neither model has the entry."""
    return (power_log(e, a, b) - less).exp()


def _above(w: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """``w − x`` for w = x·exp(d), without cancellation where d is small."""
    return torch.where(d.abs() < 0.5, x * torch.expm1(d), w - x)


def alpha_student(e: Entry, alpha: float, rest: float) -> Tensor:  # f = (t^α − αt − (1 − α)) / (α(α − 1))
    w = power(e, alpha, rest)
    return torch.where(e.about_one(alpha), _above(w, e.q, alpha * e.u), w) / -alpha


def alpha_value(e: Entry, alpha: float, rest: float) -> Tensor:
    w = power(e, alpha, rest)
    far = _above(w, e.q, alpha * e.u) / -alpha + _above(w, e.p, (alpha - 1) * e.u) / (alpha - 1)
    far = torch.where(w == math.inf, w, far.clamp_min(0))  # the terms of an infinite w have opposite signs
    series = e.q * e.u**2 * _polynomial(e.u, alpha_series(alpha, rest))
    return torch.where(e.u.abs() * max(1, abs(alpha)) < 2 * NEAR[e.u.dtype], series, far)


def alpha_series(alpha: float, _: float) -> list[float]:
    return [sum(alpha**i for i in range(k - 1)) / math.factorial(k) for k in range(2, 11)]


def _triangular(e: Entry, *_: float) -> Tensor:  # f = (t − 1)² / (t + 1)
    total = positive(e.p + e.q)
    r, s = e.p / total, e.q / total
    return -e.q * torch.where(e.about_one(), difference(e) / total * (s + 3 * r), 4 * r * r)


def _triangular_value(e: Entry, *_: float) -> Tensor:
    apart = difference(e)
    return apart / positive(e.p + e.q) * apart


def _engine(e: Entry, *_: float) -> Tensor:  # −Σ q log p: not an f-divergence, but linear in q like one
    return -times(e.q, e.p_shifted)


def _engine_value(e: Entry, *_: float) -> Tensor:
    return -times(e.q, e.log_p)


def _cross_entropy_value(e: Entry, *_: float) -> Tensor:  # −Σ p log q: a one-hot p gives the label's cross-entropy
    return -times(e.p, e.log_q)


def _slope_of_power(e: Entry, a: float, total: float) -> Tensor:
    """``q^total·(t^a − 1)/a``, and at a = 0 its limit ``q^total·log t``."""
    base = power(e, 0, total)
    return _above(power(e, a, total - a), base, a * e.u) / a if a else times(base, e.u)


def _ab(e: Entry, alpha: float, beta: float) -> Tensor:  # φ = (q^s (t^s − 1)/s − q^s (t^α − 1)/α) / β, s = α + β
    return -_slope_of_power(e, alpha, alpha + beta)


def _ab_value(e: Entry, alpha: float, beta: float) -> Tensor:
    total = alpha + beta
    one, other = _slope_of_power(e, alpha, total), _slope_of_power(e, total, total)
    far = (other - one) / (beta or 1)
    if not beta:  # the derivative by the exponent
        far = (times(power(e, alpha, 0), e.u) - one) / alpha if alpha else times(power(e, 0, 0), e.u**2 / 2)
    far = torch.where(one.isinf() | other.isinf(), math.inf, far.clamp_min(0))
    series = power(e, 0, total) * e.u**2 * _polynomial(e.u, _ab_series(alpha, beta))
    return torch.where(e.u.abs() * max(1, abs(alpha), abs(total)) < 2 * NEAR[e.u.dtype], series, far)


def _ab_series(alpha: float, beta: float) -> list[float]:
    return [
        sum((alpha + beta) ** i * alpha ** (k - 2 - i) for i in range(k - 1)) / math.factorial(k) for k in range(2, 11)
    ]


def _shares(e: Entry, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """a = σ(βu), 1 − a, and a p − (1 − a) q; any where neither model has the entry."""
    steepness = beta * e.u if beta else torch.zeros_like(e.u)  # of an infinite u, too
    a, rest = (torch.sigmoid(x).nan_to_num(0) for x in (steepness, -steepness))
    return a, rest, _near(e, a * difference(e) + e.q * (steepness / 2).tanh(), a * e.p - rest * e.q)


def _todi(e: Entry, beta: float, other: float) -> Tensor:  # φ = a p log(p/q) + (1 − a) q log(q/p), a held still
    _, of_q, apart = _shares(e, beta)
    return -apart - times(of_q * e.q, e.u)


def _todi_value(e: Entry, beta: float, _: float) -> Tensor:
    of_p, of_q, apart = _shares(e, beta)
    return _near(e, apart * e.u, times(of_p * e.p, e.u) - times(of_q * e.q, e.u))


#: What each native kernel computes, by its symbol there.
KERNELS: dict[str, Formula] = {
    "Kl": Formula(kl_student, kl_value, "Rkl", centred=True),
    "Rkl": Formula(rkl_student, rkl_value, "Kl"),
    "Jeffreys": Formula(_jeffreys, _jeffreys_value, "Jeffreys"),
    "Gjs": Formula(_gjs, _gjs_value, "Gjs", swapped=True, series=_gjs_series),
    "SkewKl": Formula(_skew_kl, _skew_kl_value, "SkewRkl", series=_skew_series),
    "SkewRkl": Formula(_skew_rkl, _skew_rkl_value, "SkewKl", series=_skew_series),
    "Tvd": Formula(tvd_student, tvd_value, "Tvd"),
    "Alpha": Formula(alpha_student, alpha_value, "Alpha", swapped=True, series=alpha_series),
    "Triangular": Formula(_triangular, _triangular_value, "Triangular"),
    "Engine": Formula(_engine, _engine_value, "CrossEntropy"),
    "CrossEntropy": Formula(kl_student, _cross_entropy_value, "Engine", centred=True),
    "Ab": Formula(_ab, _ab_value, "Ab", swapped=True, series=_ab_series),
    "Todi": Formula(_todi, _todi_value, "Todi"),
}
