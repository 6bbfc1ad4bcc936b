"""Each divergence's pair of terms in Triton, under the symbol that the table gives it.

``(p, q, log_p, log_q, parameter) -> (q·g, p·f′)``, float32 and elementwise: the gradient's weight to either model, and
in their sum the entry's share of the loss. csrc/divergences.h holds the same formulas.
"""

import triton
import triton.language as tl

SMALLEST_NORMAL = tl.constexpr(1.2e-38)  # a little over 2^-126: Triton takes what is less for float64
LOWEST_LOG = tl.constexpr(-1e30)  # a logarithm of 0 that may still be multiplied


@triton.jit
def _times(x, y):
    """``x·y`` with 0·y = 0 for infinite or undefined y."""
    return tl.where(x == 0, 0.0, x * y)


@triton.jit
def Kl(p, q, log_p, log_q, parameter):
    return q - p, _times(p, log_p - log_q)


@triton.jit
def Rkl(p, q, log_p, log_q, parameter):
    return _times(q, log_q - log_p), p - q


@triton.jit
def Jeffreys(p, q, log_p, log_q, parameter):
    return _times(q, log_q - log_p) + q - p, _times(p, log_p - log_q) + p - q


@triton.jit
def Gjs(p, q, log_p, log_q, parameter):
    log_m = tl.log(tl.maximum(parameter * p + (1 - parameter) * q, SMALLEST_NORMAL))
    return (1 - parameter) * _times(q, log_q - log_m), parameter * _times(p, log_p - log_m)


@triton.jit
def SkewKl(p, q, log_p, log_q, parameter):
    m = tl.maximum(parameter * p + (1 - parameter) * q, SMALLEST_NORMAL)
    mixed = (1 - parameter) * p * (q / m)
    return -mixed, mixed + _times(p, log_p - tl.log(m))


@triton.jit
def SkewRkl(p, q, log_p, log_q, parameter):
    teacher, student = SkewKl(q, p, log_q, log_p, parameter)
    return student, teacher


@triton.jit
def Tvd(p, q, log_p, log_q, parameter):
    half_sign = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0 * (q - p)))  # the last is 0 or NaN
    return q * half_sign, -p * half_sign


@triton.jit
def _difference(w, x, d):
    """``w - x`` for w = x·exp(d), by the series of expm1 where d is small."""
    series = d * (1 / 40320) + 1 / 5040
    series = series * d + 1 / 720
    series = series * d + 1 / 120
    series = series * d + 1 / 24
    series = series * d + 1 / 6
    series = series * d + 0.5
    series = series * d + 1.0
    return tl.where(tl.abs(d) < 0.5, x * (series * d), w - x)


@triton.jit
def Alpha(p, q, log_p, log_q, parameter):
    neither = (log_p <= LOWEST_LOG) & (log_q <= LOWEST_LOG)
    # the parameter times finfo.min would overflow; max(NaN, x) may be x
    log_p = tl.where(log_p < LOWEST_LOG, LOWEST_LOG, log_p)
    log_q = tl.where(log_q < LOWEST_LOG, LOWEST_LOG, log_q)
    w = tl.exp(parameter * log_p + (1 - parameter) * log_q)
    u = log_p - log_q
    student = _difference(w, q, parameter * u) / -parameter
    teacher = _difference(w, p, (parameter - 1) * u) / (parameter - 1)
    # the terms of an infinite w have opposite signs, their sum is +inf; an entry neither model has counts nothing
    infinite = w == float("inf")
    student = tl.where(neither, 0.0, tl.where(infinite, w, student))
    teacher = tl.where(neither, 0.0, tl.where(infinite, w, teacher))
    return student, teacher


@triton.jit
def Triangular(p, q, log_p, log_q, parameter):
    total = tl.maximum(p + q, SMALLEST_NORMAL)
    r = p / total
    s = q / total
    return q * (s - r) * (s + 3 * r), p * (r - s) * (r + 3 * s)


@triton.jit
def Engine(p, q, log_p, log_q, parameter):
    return -_times(q, log_p), p - q


@triton.jit
def CrossEntropy(p, q, log_p, log_q, parameter):
    return q - p, -_times(p, log_q)


BY_SYMBOL = {
    f.__name__: f for f in (Kl, Rkl, Jeffreys, Gjs, SkewKl, SkewRkl, Tvd, Alpha, Triangular, Engine, CrossEntropy)
}
