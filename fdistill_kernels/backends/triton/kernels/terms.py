"""Each divergence's terms at vocabulary entries, as csrc/divergences.h has them and formulas.py explains them.

A function takes an entry ``(p, q, log2_p, log2_q, u, p_shifted, q_shifted, u_at_peak, inside)`` and the divergence's
constants ``(parameter, rest, log_parameter, log_rest, series...)``, with the row's coefficients behind them where
row_terms.py asks for them; it returns the student's term and the value, or three: the term as q times the first and the
second, and the value. The models' logarithms are to base 2, whose exponential is one instruction; u is log(p/q). CLOSE:
the models agree about a row's peak, so that near entries need their series. A divergence with FACTORS has p and q
multiplied by them, which costs nothing in an exponent.
"""

import triton
import triton.language as tl

from ....formulas import ABOUT_ONE as _ABOUT_ONE
from ....formulas import LOWEST_LOG as _LOWEST_LOG
from ....formulas import NEAR as _NEAR
from ....formulas import NO_OVERLAP as _NO_OVERLAP

LOWEST_LOG, NO_OVERLAP = tl.constexpr(_LOWEST_LOG), tl.constexpr(_NO_OVERLAP)
ABOUT_ONE = tl.constexpr(_ABOUT_ONE)
NEAR = tl.constexpr(next(iter(_NEAR.values())))
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)
LARGEST = tl.constexpr(3.4028234663852886e38)
FAR = tl.constexpr(1e30)  # more than any two logarithms are apart of entries that both models have
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG2_OF_LN2 = tl.constexpr(-0.5287663729448977)


@triton.jit
def exp(x):
    """One instruction and a product, where tl.exp minds results below the normal numbers."""
    return tl.exp2(x * LOG2E)


@triton.jit
def minus(x):
    """−x by its sign alone; −x as such is 0 − x to older Triton."""
    return x * -1.0


@triton.jit
def times(x, y):
    """``x·y`` with 0·y = 0 for infinite or undefined y."""
    return tl.where(x == 0, 0.0, x * y)


@triton.jit
def by_log(p, log2_p, log2_q):
    """``p·log(p/q)``, 0 where p is: there the logarithm may be infinite, or none where neither model has the entry."""
    return times(p, (log2_p - log2_q) * LN2)


@triton.jit
def polynomial(x, coefficients):
    """From the constant coefficient on."""
    COUNT: tl.constexpr = len(coefficients)
    value = coefficients[COUNT - 1]
    for k in tl.static_range(COUNT - 2, -1, -1):
        value = value * x + coefficients[k]
    return value


@triton.jit
def _second_order(u):
    """``(exp(u) − 1 − u)/u²``, |u| < 2 NEAR, within 2e-7 of itself."""
    return polynomial(u, (0.5, 0.166665437517, 0.0416665130979, 0.00836827876678, 0.00139325536167))


@triton.jit
def _excess(u):
    """t − 1, near."""
    return u + u * u * _second_order(u)


@triton.jit
def _series(x, own):
    """``x² Σ cₖ xᵏ``, the value over q."""
    return polynomial(x, (own[4], own[5], own[6], own[7], own[8], own[9], own[10])) * x * x


@triton.jit
def _near(u, series, far):
    return tl.where(tl.abs(u) < NEAR, series, far)


@triton.jit
def difference(p, q, u, CLOSE: tl.constexpr):
    """``p − q``."""
    return _near(u, q * _excess(u), p - q) if CLOSE else p - q


@triton.jit
def log1p(x):
    """log(1 + x), x > −1."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / (y - 1)))


@triton.jit
def _log1p_of(t):
    """log(1 + x) of t = x/(1 + x/2), x in [−1/4, 1]: 2 atanh(t/2), within 6e-9 of its own."""
    square = t * t
    return t + t * square * polynomial(square, (8.3333022892e-2, 1.2506727129e-2, 2.1876408719e-3, 5.4710940458e-4))


@triton.jit
def _log2_of_one_more(x):
    """log2(1 + x), x in [0, 1], within 1.5e-7 of its own; exact at 1, where js's models are equal, and near it without
    a bias, which thousands of entries would have in common.

    Of its own: where the student has almost all of its mass in one entry the gradient is made of x that 1 + x loses.
    """
    return x * polynomial(x, (1.4426950216, -0.72134023905, 0.48069301248, -0.35840857029, 0.27564147115,
                              -0.19711898267, 0.11285617948, -0.042567048222, 0.0075491811149))  # fmt: skip


@triton.jit
def _log2_sum(apart, b):
    """By log2(a/b): its size, a number where neither model has the entry, too; log2(1 + smaller/larger); and b times
    what log2(a/b) is above 0. ``b·log2((a + b)/b)`` is b times the second, with the third added.
    """
    gap = tl.minimum(tl.abs(apart), FAR)
    return gap, _log2_of_one_more(tl.exp2(minus(gap))), tl.maximum(b * apart, 0.0)


@triton.jit
def _log_ratio(log2_p, log2_q, log_of_p, log_of_q):
    """log2(a/b) of a = p·exp(log_of_p) and b = q·exp(log_of_q); the lowest number where that is none."""
    apart = (log2_p - log2_q) + (log_of_p - log_of_q) * LOG2E
    return tl.minimum(tl.maximum(apart, -LARGEST), LARGEST)


@triton.jit
def _log_sum(apart, a, b, u, u_at_peak, near, CLOSE: tl.constexpr):
    """By log2(a/b): log(a + b) less log b; and in a row about one, of a near entry, log(1 + near)."""
    if CLOSE:
        small, large = tl.where(a < b, a, b), tl.where(a < b, b, a) + SMALLEST_NORMAL
        given = tl.where(tl.abs(u_at_peak) < ABOUT_ONE, tl.abs(u), ABOUT_ONE) < NEAR
        small, large = tl.where(given, near, small), tl.where(given, 1.0, large)
        tail = _log1p_of(small / (large + 0.5 * small))
    else:
        tail = _log2_of_one_more(tl.exp2(minus(tl.abs(apart)))) * LN2
    return tl.maximum(apart, 0.0) * LN2 + tail, tail


@triton.jit
def Kl(e, own, CLOSE: tl.constexpr):
    p, q, log2_p, log2_q, u, _, _, _, _ = e
    less = minus(difference(p, q, u, CLOSE))
    value = by_log(p, log2_p, log2_q) + less
    if CLOSE:
        value = _near(u, q * u * u * (1 + (u - 1) * _second_order(u)), value)
    return less, value


@triton.jit
def Rkl(e, own, CLOSE: tl.constexpr):
    p, q, log2_p, log2_q, u, _, _, _, _ = e
    student = by_log(q, log2_q, log2_p)
    value = student + (p - q)
    if CLOSE:
        student = _near(u, -q * u, student)
        value = _near(u, q * u * u * _second_order(u), value)
    return student, value


@triton.jit
def Jeffreys(e, own, CLOSE: tl.constexpr):
    p, q, log2_p, log2_q, u, _, _, _, _ = e
    backward = by_log(q, log2_q, log2_p)
    apart = difference(p, q, u, CLOSE)
    value = by_log(p, log2_p, log2_q) + backward
    if CLOSE:
        backward = _near(u, -q * u, backward)
        value = _near(u, apart * u, value)
    return backward - apart, value


@triton.jit
def JsFactors(own):
    """``log 2 / 2``, as below."""
    return LOG2_OF_LN2 - 1, LOG2_OF_LN2 - 1, 2 / LN2, 2 / LN2


@triton.jit
def Js(e, own, CLOSE: tl.constexpr):
    """Gjs with shares of one half: of m = sqrt(pq)·cosh(u/2), near entries need few coefficients, within 3e-7."""
    a, b, log2_a, log2_b, u, _, _, u_at_peak, _ = e
    apart, both = log2_a - log2_b, a + b
    gap, tail, above = _log2_sum(apart, b)
    value = both * tail - both + tl.minimum(a, b) * gap
    if CLOSE:
        about_one, square = tl.abs(u_at_peak) < ABOUT_ONE, u * u
        log2_of_q = u * (0.5 * LOG2E) + square * polynomial(square, (LOG2E / 8, -LOG2E / 192))
        student = b * (tail - tl.where(about_one, 1.0, 0.0)) + above
        student = tl.where(tl.abs(u) < tl.where(about_one, NEAR, 0.0), b * log2_of_q, student)
        near_value = both * square * polynomial(square, (1 / (8 * LN2), -1 / (64 * LN2), 1 / (576 * LN2)))
        return minus(student), _near(u, near_value, minus(value))
    else:
        return minus(tail), minus(above), minus(value)


@triton.jit
def GjsFactors(own):
    """``β log 2`` and ``(1 − β) log 2``: logarithms of the mixture's shares, to base 2, then give terms to base e."""
    of_p, of_q = own[2] * LOG2E + LOG2_OF_LN2, own[3] * LOG2E + LOG2_OF_LN2
    return of_p, of_q, 1 / (own[0] * LN2), 1 / (own[1] * LN2)


@triton.jit
def _gjs_near(u, b, beta, rest):
    """log2(m/q) and the value by u: the coefficients are a coin's cumulants, and those of the slope
    β eᵘ (u − log(m/q)); within 3e-7.
    """
    v, skew, of_b = beta * rest, rest - beta, 1 / (rest * LN2)
    h2, h3 = v / 2, v * skew / 6
    h4, h5 = v * (1 - 6 * v) / 24, v * skew * (1 - 12 * v) / 120
    log = polynomial(u, (beta * LOG2E, h2 * LOG2E, h3 * LOG2E, h4 * LOG2E, h5 * LOG2E))
    slope = beta * of_b
    value = polynomial(u, (v / 2 * of_b, slope * (rest - h2) / 3, slope * (rest / 2 - h2 - h3) / 4,
                           slope * (rest / 6 - h2 / 2 - h3 - h4) / 5,
                           slope * (rest / 24 - h2 / 6 - h3 / 2 - h4 - h5) / 6))  # fmt: skip
    return log * u, b * u * u * value


@triton.jit
def Gjs(e, own, CLOSE: tl.constexpr):
    """Of shares a and b of the mixture, the models' own times their factors."""
    a, b, log2_a, log2_b, u, _, _, u_at_peak, _ = e
    apart, log2_rest = log2_a - log2_b, own[3] * LOG2E
    gap, tail, above = _log2_sum(apart, b)
    value = (a + b) * tail + tl.minimum(a, b) * gap + a * (own[2] * LOG2E) + b * log2_rest
    if CLOSE:
        about_one = tl.abs(u_at_peak) < ABOUT_ONE
        log2_of_q, near_value = _gjs_near(u, b, own[0], own[1])
        student = b * (tail + tl.where(about_one, log2_rest, 0.0)) + above
        student = tl.where(tl.abs(u) < tl.where(about_one, NEAR, 0.0), b * log2_of_q, student)
        return minus(student), _near(u, near_value, minus(value))
    else:
        return minus(tail), minus(above), minus(value)


@triton.jit
def SkewKl(e, own, CLOSE: tl.constexpr):
    p, q, log2_p, log2_q, u, _, _, u_at_peak, _ = e
    a, b = own[0] * p, own[1] * q
    apart = difference(p, q, u, CLOSE)
    above_a, _ = _log_sum(_log_ratio(log2_q, log2_p, own[3], own[2]), b, a, u, u_at_peak, 0.0, CLOSE)
    value = -p * (above_a + own[2]) - own[1] * apart
    of = p
    if CLOSE:
        of = tl.where(tl.abs(u_at_peak) < ABOUT_ONE, own[1] * apart, p)
        value = _near(u, q * _series(_excess(u), own), value)
    return minus(of * (b / (a + b + SMALLEST_NORMAL))), value


@triton.jit
def SkewRkl(e, own, CLOSE: tl.constexpr):
    p, q, log2_p, log2_q, u, _, _, u_at_peak, _ = e
    a, b = own[1] * p, own[0] * q
    about_one = tl.abs(u_at_peak) < ABOUT_ONE
    y = own[1] * _excess(u)
    above_b, tail = _log_sum(_log_ratio(log2_p, log2_q, own[3], own[2]), a, b, u, u_at_peak, y, CLOSE)
    g = a / (a + b + SMALLEST_NORMAL) - above_b
    value = -q * (above_b + own[2]) + own[1] * (p - q)
    x = a / (b + SMALLEST_NORMAL)
    small = polynomial(x, (-1 / 2, 2 / 3, -3 / 4, 4 / 5, -5 / 6, 6 / 7, -7 / 8, 8 / 9)) * x * x
    of = tl.where(x < NEAR, small, g)
    if CLOSE:
        of = tl.where(about_one, _near(u, own[0] * y / (1 + y) - tail, g - own[1] - own[2]), of)
        value = _near(u, p * _series(_excess(-u), own), value)
    return times(q, of), value


@triton.jit
def sided(x, q):
    """q with the sign of x, 0 of |x| below 3e-39 q; what is not a number stays so."""
    x = tl.maximum(x * LARGEST, minus(q), propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, q, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def TvdFactors(own):
    """Halves."""
    return -1.0, -1.0, 2.0, 2.0


@triton.jit
def Tvd(e, own, CLOSE: tl.constexpr):
    p, q, _, _, u, _, _, _, _ = e
    apart = difference(p, q, u, CLOSE)
    return sided(minus(apart), q), tl.abs(apart)


@triton.jit
def _above(w, x, d):
    """``w − x`` for w = x·exp(d), by series where d is small."""
    return tl.where(tl.abs(d) < 2 * NEAR, x * _excess(d), w - x)


@triton.jit
def power_log(log2_p, log2_q, a, b):
    """``log2(p^a q^b)``; −inf where neither model has the entry."""
    neither = (log2_p <= LOWEST_LOG) & (log2_q <= LOWEST_LOG)
    either = a * tl.maximum(log2_p, LOWEST_LOG) + b * tl.maximum(log2_q, LOWEST_LOG)
    return tl.where(neither, float("-inf"), either)


@triton.jit
def power(log2_p, log2_q, a, b, less):
    """``p^a q^b``, its logarithm to base 2 less a number; 0 where neither model has the entry."""
    neither = (log2_p <= LOWEST_LOG) & (log2_q <= LOWEST_LOG)
    # a times finfo.min would overflow; what is not a number stays so
    log2_p = tl.where(log2_p < LOWEST_LOG, LOWEST_LOG, log2_p)
    log2_q = tl.where(log2_q < LOWEST_LOG, LOWEST_LOG, log2_q)
    return tl.where(neither, 0.0, tl.exp2(a * log2_p + b * log2_q - less))


@triton.jit
def Alpha(e, own, CLOSE: tl.constexpr):
    p, q, log2_p, log2_q, u, _, _, u_at_peak, _ = e
    w = power(log2_p, log2_q, own[0], own[1], 0.0)
    above_q = _above(w, q, own[0] * u)
    value = above_q / -own[0] - _above(w, p, -own[1] * u) / own[1]
    # the parts of an infinite w have opposite signs
    value = tl.where(w == float("inf"), w, tl.where(value < 0, 0.0, value))
    if CLOSE:
        near = tl.abs(u) * tl.maximum(tl.abs(own[0]), 1.0) < 2 * NEAR
        value = tl.where(near, q * _series(u, own), value)
    return tl.where(tl.abs(own[0] * u_at_peak) < ABOUT_ONE, above_q, w) / -own[0], value


@triton.jit
def _slope(log2_p, log2_q, u, base, a, total):
    """``q^total·(t^a − 1)/a``, and at a = 0 its limit; base: q^total."""
    slope = times(base, u)
    if a != 0:
        slope = _above(power(log2_p, log2_q, a, total - a, 0.0), base, a * u) / a
    return slope


@triton.jit
def Ab(e, own, CLOSE: tl.constexpr):
    _, _, log2_p, log2_q, u, _, _, _, _ = e
    alpha, beta = own[0], own[1]
    total = alpha + beta
    base = power(log2_p, log2_q, 0.0, total, 0.0)
    one, other = _slope(log2_p, log2_q, u, base, alpha, total), _slope(log2_p, log2_q, u, base, total, total)
    value = times(base, 0.5 * u * u)
    if beta != 0:
        value = (other - one) / beta
    elif alpha != 0:
        value = (times(power(log2_p, log2_q, alpha, 0.0, 0.0), u) - one) / alpha
    value = tl.where(value < 0, 0.0, value)
    value = tl.where((tl.abs(one) == float("inf")) | (tl.abs(other) == float("inf")), float("inf"), value)
    if CLOSE:
        steep = tl.maximum(tl.maximum(tl.abs(alpha), tl.abs(total)), 1.0)
        value = tl.where(tl.abs(u) * steep < 2 * NEAR, base * _series(u, own), value)
    return -one, value


@triton.jit
def Todi(e, own, CLOSE: tl.constexpr):
    p, q, _, _, u, _, _, _, _ = e
    x = own[0] * u
    x = tl.where(x > -80, tl.where(x < 80, x, 80.0), -80.0)  # a number where neither model has the entry
    a, rest = 1 / (1 + exp(-x)), 1 / (1 + exp(x))
    apart, backward = a * p - rest * q, times(rest * q, u)
    value = times(a * p, u) - backward
    if CLOSE:
        series = a * difference(p, q, u, CLOSE) - q * a * _excess(-x)  # a − rest = −(exp(−x) − 1)·a
        apart = tl.where(tl.abs(u) * tl.maximum(own[0], 1.0) < NEAR, series, apart)
        value = _near(u, apart * u, value)
    return -apart - backward, value


@triton.jit
def Triangular(e, own, CLOSE: tl.constexpr):
    p, q, _, _, u, _, _, u_at_peak, _ = e
    total = tl.maximum(p + q, SMALLEST_NORMAL)
    r, s, apart = p / total, q / total, difference(p, q, u, CLOSE)
    g = 4 * r * r
    if CLOSE:
        g = tl.where(tl.abs(u_at_peak) < ABOUT_ONE, apart / total * (s + 3 * r), g)
    return minus(q * g), apart / total * apart


@triton.jit
def Engine(e, own, CLOSE: tl.constexpr):
    _, q, log2_p, _, _, p_shifted, _, _, _ = e
    return -times(q, p_shifted), -times(q, log2_p * LN2)


@triton.jit
def CrossEntropy(e, own, CLOSE: tl.constexpr):
    p, q, _, log2_q, u, _, _, _, _ = e
    return -difference(p, q, u, CLOSE), -times(p, log2_q * LN2)


BY_SYMBOL = {
    f.__name__: f
    for f in (Kl, Rkl, Jeffreys, Js, Gjs, SkewKl, SkewRkl, Tvd, Alpha, Triangular, Engine, CrossEntropy, Ab, Todi)
}
#: By symbol: of a divergence's constants, the logarithms, to base 2, of what p and q are multiplied with, and 1/them.
FACTORS = {"Js": JsFactors, "Gjs": GjsFactors, "Tvd": TvdFactors}


@triton.jit
def _measured(found, q, start):
    """The student's term, less q times what start has, if any: g at the row's peak, or that and the row's sum.

    A term of two parts goes to 0 with p/q, so that one product takes all; tvd's are one number at the peak and at most
    entries, which beside their product would hide a sum that is tiny.
    """
    if start is None:
        return (found[0] * q + found[1], found[2]) if len(found) == 3 else found
    elif len(found) == 3:
        least = start[0] if len(start) == 1 else start[0] + start[1]
        return q * (found[0] - least) + found[1], found[2]
    else:
        term = found[0] - q * start[0]
        return term if len(start) == 1 else term - q * start[1], found[1]


@triton.jit
def pair(
    e, own, other, u_at_teacher_peak, start, teacher_start, TERMS: tl.constexpr, EXCHANGED: tl.constexpr,
    CLOSE: tl.constexpr,
):  # fmt: skip
    """The student's term, the value, and the teacher's term, if EXCHANGED is there to make it. start: see `_measured`.

    A user's own TERMS, without EXCHANGED's symbol, are a pair ``(p, q, log_p, log_q, parameter) -> (q·g, p·f′)``.
    """
    p, q, log2_p, log2_q, u, p_shifted, q_shifted, _, inside = e
    if EXCHANGED == "own":
        student, teacher = TERMS(p, q, log2_p * LN2, log2_q * LN2, own[0])
        value = student + teacher
        student, _ = _measured((student, value), q, start)
        teacher, _ = _measured((teacher, value), p, teacher_start)
    else:
        student, value = _measured(TERMS(e, own, CLOSE), q, start)
        teacher = student
        if EXCHANGED is not None:
            exchanged = (q, p, log2_q, log2_p, -u, q_shifted, p_shifted, -u_at_teacher_peak, inside)
            teacher, _ = _measured(EXCHANGED(exchanged, other, CLOSE), p, teacher_start)
    return student, value, teacher
