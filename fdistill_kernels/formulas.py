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
#: |u| below which p and q are near, and series are used: as far as they hold a dtype's digits.
NEAR = {torch.float32: 0.1875, torch.float64: 0.02}
#: |u| of a row's peak below which g is taken from g(1).
ABOUT_ONE = 1.0
#: Coefficients of a series that native kernels use; float64 needs more.
TERMS = 7
#: Coefficients of (exp(u) − 1 − u)/u².
SECOND_ORDER = tuple(1 / math.factorial(k) for k in range(2, 9))


class Entry(NamedTuple):
    """Entries of rows (n, V): both models' probabilities, their logarithms, u = log(p/q), and log p and log q but for a
    constant of the row, whose differences have more digits. `u_at_peak` (n, 1): u at the student's largest entry.
    """

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor
    u: Tensor
    p_shifted: Tensor
    q_shifted: Tensor
    u_at_peak: Tensor

    def exchanged(self, u_at_peak: Tensor) -> Entry:
        """Teacher for student; u_at_peak: at the teacher's largest entry."""
        return Entry(self.q, self.p, self.log_q, self.log_p, -self.u, self.q_shifted, self.p_shifted, -u_at_peak)

    def about_one(self, power: float = 1.0) -> Tensor:
        """Whether t^power is about 1 at the row's peak, so that g is to be taken from g(1)."""
        return (power * self.u_at_peak).abs() < ABOUT_ONE


EntryFunction = Callable[[Entry, float], Tensor]


@dataclass(frozen=True)
class Formula:
    """A divergence's two functions, of an entry and the divergence's parameter.

    Attributes:
        exchanged: the symbol of the divergence with the models exchanged; `complement`: with 1 − parameter for it.
        centred: Σ student = 0, so that the gradient needs no sum over the row.
        series: the coefficients of value/q near p = q by x = t − 1 (alpha: by u), from that of x² on.
    """

    student: EntryFunction
    value: EntryFunction
    exchanged: str
    complement: bool = False
    centred: bool = False
    series: Callable[[float], list[float]] | None = None

    def teacher(self, entry: Entry, parameter: float, u_at_peak: Tensor) -> Tensor:
        """The teacher's term, ``p f′(t)`` less a constant; u_at_peak: at the teacher's largest entry."""
        parameter = 1 - parameter if self.complement else parameter
        return KERNELS[self.exchanged].student(entry.exchanged(u_at_peak), parameter)

    def constants(self, parameter: float) -> tuple[float, ...]:
        """csrc/row_task.h's `Parameter`."""
        logs = [math.log(x) if x > 0 else 0.0 for x in (parameter, 1 - parameter)]
        series = self.series(parameter)[:TERMS] if self.series else [0.0] * TERMS
        return parameter, 1 - parameter, *logs, *series

    def __call__(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
        """Both terms, of one f, so that their sum is the value: what a `Divergence` of the user's own is made of."""
        about_one = torch.zeros_like(p[..., :1])
        entry = Entry(p, q, log_p, log_q, log_p - log_q, log_p, log_q, about_one)
        return self.student(entry, parameter), self.teacher(entry, parameter, about_one)


def times(x: Tensor, y: Tensor) -> Tensor:
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


def _positive(x: Tensor) -> Tensor:
    """A denominator."""
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def _finite(log: Tensor) -> Tensor:
    """log 0 as a number: 0 log 0 is 0 without asking."""
    return log.clamp_min(torch.finfo(log.dtype).min)


def _difference(e: Entry) -> Tensor:
    """``p − q``."""
    return _near(e, e.q * torch.expm1(e.u), e.p - e.q)


def _kl(e: Entry, _: float) -> Tensor:  # f = t log t − t + 1
    return -_difference(e)


def _kl_value(e: Entry, _: float) -> Tensor:
    series = e.q * e.u**2 * (1 + (e.u - 1) * _polynomial(e.u, SECOND_ORDER))
    return _near(e, series, times(e.p, e.log_p - e.log_q) - (e.p - e.q))


def _rkl(e: Entry, _: float) -> Tensor:  # f = −log t + t − 1
    return _near(e, -e.q * e.u, times(e.q, e.log_q - e.log_p))


def _rkl_value(e: Entry, _: float) -> Tensor:
    series = e.q * e.u**2 * _polynomial(e.u, SECOND_ORDER)
    return _near(e, series, times(e.q, e.log_q - e.log_p) + (e.p - e.q))


def _jeffreys(e: Entry, _: float) -> Tensor:  # f = (t − 1) log t
    return _rkl(e, 0) + _kl(e, 0)


def _jeffreys_value(e: Entry, _: float) -> Tensor:
    return _rkl_value(e, 0) + _kl_value(e, 0)


def _log_sum(a: Tensor, b: Tensor, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """``log(a + b)`` less log a and less log b, each with the digits of its smallest values."""
    ratio = (torch.minimum(a, b) / _positive(torch.maximum(a, b))).log1p()
    apart = _finite(log_a) - _finite(log_b)
    return torch.where(a > b, ratio, ratio - apart), torch.where(a > b, ratio + apart, ratio)


def _gjs(e: Entry, beta: float) -> Tensor:  # β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q, 0 < β < 1
    a, b, log_beta, log_rest = beta * e.p, (1 - beta) * e.q, math.log(beta), math.log(1 - beta)
    _, above_b = _log_sum(a, b, e.log_p + log_beta, e.log_q + log_rest)
    about_one = _near(e, (beta * torch.expm1(e.u)).log1p(), above_b + log_rest)
    return -b * torch.where(e.about_one(), about_one, above_b)


def _gjs_value(e: Entry, beta: float) -> Tensor:
    a, b, log_beta, log_rest = beta * e.p, (1 - beta) * e.q, math.log(beta), math.log(1 - beta)
    above_a, above_b = _log_sum(a, b, e.log_p + log_beta, e.log_q + log_rest)
    x = torch.expm1(e.u)
    return _near(
        e, e.q * x**2 * _polynomial(x, _gjs_series(beta)), -a * (above_a + log_beta) - b * (above_b + log_rest)
    )


def _gjs_series(beta: float) -> list[float]:
    return [(-1) ** k * beta * (1 - beta ** (k - 1)) / (k * (k - 1)) for k in range(2, 11)]


def _skew_kl(e: Entry, lam: float) -> Tensor:  # KL(p ‖ λp + (1 − λ)q), 0 < λ < 1
    m = _positive(lam * e.p + (1 - lam) * e.q)
    return -(1 - lam) * torch.where(e.about_one(), (1 - lam) * _difference(e), e.p) * (e.q / m)


def _skew_kl_value(e: Entry, lam: float) -> Tensor:
    m = _positive(lam * e.p + (1 - lam) * e.q)
    x = torch.expm1(e.u)
    far = times(e.p, e.log_p - m.log()) - (1 - lam) * (e.p - e.q)
    return _near(e, e.q * x**2 * _polynomial(x, _skew_series(lam)), far)


def _skew_series(lam: float) -> list[float]:
    return [(-1) ** k * (1 / (k * (k - 1)) + lam**k / k - lam ** (k - 1) / (k - 1)) for k in range(2, 11)]


def _skew_rkl(e: Entry, lam: float) -> Tensor:  # KL(q ‖ λq + (1 − λ)p): g = x/(1 + x) − log1p(x), x = (1 − λ)t/λ
    a, b, log_lam, log_rest = (1 - lam) * e.p, lam * e.q, math.log(lam), math.log(1 - lam)
    _, above_b = _log_sum(a, b, e.log_p + log_rest, e.log_q + log_lam)
    g = a / _positive(a + b) - above_b
    x, y = a / _positive(b), (1 - lam) * torch.expm1(e.u)
    small = torch.where(x < NEAR[x.dtype], -(x**2) * _polynomial(x, [(-1) ** k * (1 - 1 / k) for k in range(2, 14)]), g)
    about_one = _near(e, lam * y / (1 + y) - y.log1p(), g - (1 - lam) - log_lam)
    return times(e.q, torch.where(e.about_one(), about_one, small))


def _skew_rkl_value(e: Entry, lam: float) -> Tensor:
    return _skew_kl_value(e.exchanged(e.u_at_peak), lam)


def _tvd(e: Entry, _: float) -> Tensor:  # f = |t − 1| / 2, with the zero subgradient at ties
    return -0.5 * e.q * _difference(e).sign()


def _tvd_value(e: Entry, _: float) -> Tensor:
    return 0.5 * _difference(e).abs()


def _power(e: Entry, alpha: float) -> Tensor:
    """``p^α q^(1−α)``; 0 where neither model has the entry."""
    log_p, log_q = e.log_p.clamp_min(LOWEST_LOG), e.log_q.clamp_min(LOWEST_LOG)  # α times finfo.min would overflow
    neither = (e.log_p <= LOWEST_LOG) & (e.log_q <= LOWEST_LOG)
    return (alpha * log_p + (1 - alpha) * log_q).exp().masked_fill(neither, 0)


def _above(w: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """``w − x`` for w = x·exp(d), without cancellation where d is small."""
    return torch.where(d.abs() < 0.5, x * torch.expm1(d), w - x)


def _alpha(e: Entry, alpha: float) -> Tensor:  # f = (t^α − αt − (1 − α)) / (α(α − 1))
    w = _power(e, alpha)
    return torch.where(e.about_one(alpha), _above(w, e.q, alpha * e.u), w) / -alpha


def _alpha_value(e: Entry, alpha: float) -> Tensor:
    w = _power(e, alpha)
    far = _above(w, e.q, alpha * e.u) / -alpha + _above(w, e.p, (alpha - 1) * e.u) / (alpha - 1)
    far = torch.where(w == math.inf, w, far.clamp_min(0))  # the terms of an infinite w have opposite signs
    series = e.q * e.u**2 * _polynomial(e.u, _alpha_series(alpha))
    return torch.where(e.u.abs() * max(1, abs(alpha)) < 2 * NEAR[e.u.dtype], series, far)


def _alpha_series(alpha: float) -> list[float]:
    return [sum(alpha**i for i in range(k - 1)) / math.factorial(k) for k in range(2, 11)]


def _triangular(e: Entry, _: float) -> Tensor:  # f = (t − 1)² / (t + 1)
    total = _positive(e.p + e.q)
    r, s = e.p / total, e.q / total
    return -e.q * torch.where(e.about_one(), _difference(e) / total * (s + 3 * r), 4 * r * r)


def _triangular_value(e: Entry, _: float) -> Tensor:
    difference = _difference(e)
    return difference / _positive(e.p + e.q) * difference


def _engine(e: Entry, _: float) -> Tensor:  # −Σ q log p: not an f-divergence, but linear in q like one
    return -times(e.q, e.p_shifted)


def _engine_value(e: Entry, _: float) -> Tensor:
    return -times(e.q, e.log_p)


def _cross_entropy_value(e: Entry, _: float) -> Tensor:  # −Σ p log q: a one-hot p gives the label's cross-entropy
    return -times(e.p, e.log_q)


#: What each native kernel computes, by its symbol there.
KERNELS: dict[str, Formula] = {
    "Kl": Formula(_kl, _kl_value, "Rkl", centred=True),
    "Rkl": Formula(_rkl, _rkl_value, "Kl"),
    "Jeffreys": Formula(_jeffreys, _jeffreys_value, "Jeffreys"),
    "Gjs": Formula(_gjs, _gjs_value, "Gjs", complement=True, series=_gjs_series),
    "SkewKl": Formula(_skew_kl, _skew_kl_value, "SkewRkl", series=_skew_series),
    "SkewRkl": Formula(_skew_rkl, _skew_rkl_value, "SkewKl", series=_skew_series),
    "Tvd": Formula(_tvd, _tvd_value, "Tvd"),
    "Alpha": Formula(_alpha, _alpha_value, "Alpha", complement=True, series=_alpha_series),
    "Triangular": Formula(_triangular, _triangular_value, "Triangular"),
    "Engine": Formula(_engine, _engine_value, "CrossEntropy"),
    "CrossEntropy": Formula(_kl, _cross_entropy_value, "Engine", centred=True),
}
