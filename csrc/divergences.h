// Every divergence of the package, once, for C++ (scalar and vector) and for CUDA; fdistill_kernels/formulas.py says the
// same in torch, and why.
//
// A divergence D = sum_v q f(p/q) is two terms at each vocabulary entry, with t = p/q and f(1) = f'(1) = 0:
//     value   = q f(t)          never negative, 0 at p = q
//     student = q (g(t) - c)    g = f - t f', c a constant of the row: dD/dz_s = (student - q sum(student)) / T_s
// and the divergence with the models exchanged, whose student's term is this one's for the teacher's gradient. c is g(1)
// where the row's models agree about its peak, g(0) elsewhere; near t = 1 all is made from u = log t by series. Where
// sum(student) is 0 the divergence is `centred`, and the gradient needs no sum over the row.
//
// T is float, or any vector type with the operators + - * / and the functions of `Math<T>`.
#pragma once

#include <cmath>

#include "row_task.h"

#ifdef __CUDACC__
#define FDISTILL_INLINE __host__ __device__ __forceinline__
#else
#define FDISTILL_INLINE inline __attribute__((always_inline))
#endif

namespace fdistill {

constexpr float kSmallestNormal = 1.17549435e-38f, kLowest = -3.40282347e38f;
constexpr float kLowestLog = -1e30f;  // a logarithm of 0 that may still be multiplied
constexpr float kNoOverlap = -1e20f;  // above that of p^a q^b, 0 < a, b and a + b = 1, of an entry that one model lacks
constexpr float kNear = 0.1875f;   // |u| below which p and q are near
constexpr float kAboutOne = 1.0f;  // |u| of a row's peak below which g is taken from g(1)

#ifndef FDISTILL_ON_GPU  // where exponentials and logarithms to base 2 are one instruction each
#define FDISTILL_ON_GPU false
#endif
constexpr bool kOnGpu = FDISTILL_ON_GPU;
constexpr float kLog2 = 0.693147181f, kLog2E = 1.44269504f;

template <typename T>
struct Math;

template <>
struct Math<float> {
  static FDISTILL_INLINE float exp(float x) { return expf(x); }
  static FDISTILL_INLINE float exp2_of_minus(float x) {
#ifdef __CUDA_ARCH__  // -x, which would flush a denormal, is an instruction; this is a sign of the exponential's
    asm("{.reg .f32 minus; neg.f32 minus, %0; ex2.approx.ftz.f32 %0, minus;}" : "+f"(x));
    return x;
#endif
    return exp2f(-x);
  }
  static FDISTILL_INLINE float log(float x) { return logf(x); }
  static FDISTILL_INLINE float log2(float x) { return log2f(x); }
  static FDISTILL_INLINE float at_least(float x, float least) { return x < least ? least : x; }
  // x y, where 0 y is 0 even for an infinite or undefined y: the limit of x log x and its kin.
  static FDISTILL_INLINE float times(float x, float y) { return x == 0.0f ? 0.0f : x * y; }
  // magnitude of `size` with the sign of `side`; 0 where side is 0.
  static FDISTILL_INLINE float signed_as(float size, float side) {
#ifdef __CUDA_ARCH__  // where there are no denormals: three instructions for a NaN too
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(side) : "f"(side * 3e38f), "f"(-size));
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(side) : "f"(side), "f"(size));
    return side;
#endif
    return side > 0.0f ? size : side < 0.0f ? -size : side * size;
  }
  static FDISTILL_INLINE float where_small(float x, float bound, float small, float large) {
    return fabsf(x) < bound ? small : large;
  }
  static FDISTILL_INLINE float where_less(float x, float y, float less, float other) { return x < y ? less : other; }
  static FDISTILL_INLINE float magnitude(float x) { return fabsf(x); }
  static FDISTILL_INLINE float larger(float x, float y) { return x > y ? x : y; }  // y of a NaN
  static FDISTILL_INLINE float smaller(float x, float y) {
    return kOnGpu ? fminf(x, y) : x < y ? x : y;  // there one instruction, of which a NaN y is x
  }
  static FDISTILL_INLINE float zero_if_both_lowest(float x, float y, float value) {
    return x == kLowestLog && y == kLowestLog ? 0.0f : value;
  }
  static FDISTILL_INLINE float infinite_with(float x, float value) { return x == INFINITY ? x : value; }
};

FDISTILL_INLINE float minus(float x) { return -x; }  // a sign of an operand, where 0 - x is an instruction
template <typename T>
FDISTILL_INLINE T minus(const T& x) { return T(0.0f) - x; }

// One vocabulary entry: both models' probabilities, their logarithms, u = log(p/q), and log p and log q but for a constant
// of the row; u at the row's peak, the student's largest entry. For row_divergences.h also whether it is in the row's set,
// 1 or 0, and the row's coefficients, with the models exchanged in reverse. GPUs have the logarithms to base 2, too,
// and use these where they can.
//
// `close`: the models agree about a peak. In other rows near entries weigh too little for their series to matter.
template <typename Value, bool close>
struct Entry {
  using T = Value;
  static constexpr bool is_close = close;
  T p, q, log_p, log_q, u, p_shifted, q_shifted;
  float u_at_peak;
  T inside = T(0.0f);
  const float *of_row = nullptr, *of_row_exchanged = nullptr;
  T log2_p = T(0.0f), log2_q = T(0.0f);

  // Teacher for student, with the teacher's peak.
  FDISTILL_INLINE Entry exchanged(float u_at_its_peak) const {
    return {q, p, log_q, log_p, minus(u), q_shifted, p_shifted, -u_at_its_peak, inside, of_row_exchanged, of_row,
            log2_q, log2_p};
  }
  // p log(p/q) and q log(q/p), 0 where p is, or q.
  FDISTILL_INLINE T p_by_log() const {
    return Math<T>::times(p, kOnGpu ? (log2_p - log2_q) * T(kLog2) : log_p - log_q);
  }
  FDISTILL_INLINE T q_by_log() const {
    return Math<T>::times(q, kOnGpu ? (log2_q - log2_p) * T(kLog2) : log_q - log_p);
  }
  FDISTILL_INLINE bool about_one() const { return close && about_one(1.0f); }
  FDISTILL_INLINE bool about_one(float power) const { return fabsf(power * u_at_peak) < kAboutOne; }
  FDISTILL_INLINE T near(const T& series, const T& far) const { return near_of(kNear, series, far); }
  FDISTILL_INLINE T near_of(float bound, const T& series, const T& far) const {
    return close ? Math<T>::where_small(u, bound, series, far) : far;
  }
};

FDISTILL_INLINE bool are_close(float u_at_peak) { return fabsf(u_at_peak) < kAboutOne; }

template <typename T>
struct Terms {
  T student, value;
};

// The student's term per probability, and the value.
template <typename T>
struct Slopes {
  T slope, value;
  FDISTILL_INLINE Terms<T> terms(const T& q) const { return {q * slope, value}; }
};
constexpr float kSteepest = 256.0f;  // in base 2: of a steeper one q is 0

// Entries in a row's set: none; the label; or the teacher's largest, as many as the parameter, or as few as hold the
// parameter's share of its mass.
enum class Members { kNone, kLabel, kCount, kMass };

// What a divergence is beside its terms; `Other`: with the models exchanged. row_divergences.h has those that ask for
// statistics of their row, and some of these for the largest of what they name. `unit`: what a GPU's terms are to be
// multiplied with, which is done once a row. `has_slopes`: the student's term is known per probability, and of modest
// size, so that a GPU may keep it in 16 bits from sweep to sweep; `has_exact_slopes`: these hold it as it is.
template <typename Other, bool is_centred = false>
struct OfEntries {
  using Exchanged = Other;
  static constexpr bool centred = is_centred, asks = false, has_largest = false;
  static constexpr bool has_slopes = false, has_exact_slopes = false;
  static constexpr Members members = Members::kNone;
  static constexpr float unit = 1.0f;
};

template <typename T, int count>
FDISTILL_INLINE T polynomial(const T& x, const float (&coefficients)[count]) {  // from the constant one on
  T value = T(coefficients[count - 1]);
#pragma GCC unroll 16
  for (int k = count - 2; k >= 0; --k) value = value * x + T(coefficients[k]);
  return value;
}

// (exp(u) - 1 - u) / u^2, |u| < 2 kNear
template <typename T>
FDISTILL_INLINE T second_order(const T& u) {
  const float coefficients[] = {1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
  return polynomial(u, coefficients);
}

// t - 1, near
template <typename T>
FDISTILL_INLINE T excess(const T& u) { return u + u * u * second_order(u); }

// p - q
template <typename E>
FDISTILL_INLINE typename E::T difference(const E& e) { return e.near(e.q * excess(e.u), e.p - e.q); }

// log(1 + x) of t = x / (1 + x/2), x in [-1/4, 1]: 2 atanh(t/2), within 6e-9 of its own
template <typename T>
FDISTILL_INLINE T log1p_of(const T& t) {
  const float coefficients[] = {8.3333022892e-2f, 1.2506727129e-2f, 2.1876408719e-3f, 5.4710940458e-4f};
  const T square = t * t;
  return t + t * square * polynomial(square, coefficients);
}

// log(a + b) less log b, and log(a/b). Of a near entry, if `given`, log(1 + near) stands for log(1 + smaller/larger).
template <typename T>
struct LogSum {
  T apart, tail, above_b;
  template <typename E>
  FDISTILL_INLINE LogSum(const E& e, const T& a, const T& b, const T& log_a, const T& log_b, bool given, const T& near) {
    // 0/0 as a finite number: 0 log 0 is 0 without asking
    apart = Math<T>::smaller(Math<T>::larger(log_a - log_b, T(kLowest)), T(0.0f - kLowest));
    const T small = Math<T>::smaller(a, b), large = Math<T>::larger(a, b) + T(kSmallestNormal);
    const T x = given ? e.near(near, small) : small, one = given ? e.near(T(1.0f), large) : large;  // x over one
    tail = log1p_of(x / (one + T(0.5f) * x));
    above_b = tail + Math<T>::larger(apart, T(0.0f));
  }
};

struct Kl : OfEntries<struct Rkl, true> {  // f = t log t - t + 1
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter&) {
    const T series = e.q * e.u * e.u * (T(1.0f) + (e.u - T(1.0f)) * second_order(e.u)), apart = difference(e);
    return {minus(apart), e.near(series, e.p_by_log() - apart)};
  }
};

struct Rkl : OfEntries<Kl> {  // f = -log t + t - 1
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter&) {
    const T student = e.near(minus(e.q * e.u), e.q_by_log());
    return {student, e.near(e.q * e.u * e.u * second_order(e.u), student + (e.p - e.q))};
  }
};

struct Jeffreys : OfEntries<Jeffreys> {  // f = (t - 1) log t
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter&) {
    const T backward = e.near(minus(e.q * e.u), e.q_by_log()), apart = difference(e);
    return {backward - apart, e.near(apart * e.u, e.p_by_log() + backward)};
  }
};

// log2(1 + x) of x = 2^-gap, gap = |log2(a/b)|: within 1.5e-7 of its own, also where 1 + x loses x, and exact at 1, where
// models are equal; near it without a bias, which thousands of entries would have in common.
template <typename T>
struct Log2Sum {
  T gap, tail;
  FDISTILL_INLINE explicit Log2Sum(const T& apart)  // a number where neither model has the entry
      : gap(Math<T>::smaller(Math<T>::magnitude(apart), T(0.0f - kLowestLog))) {
    const float coefficients[] = {1.4426950216f, -0.72134023904f, 0.48069301248f, -0.35840857029f, 0.27564147114f,
                                  -0.19711898267f, 0.11285617948f, -0.042567048222f, 0.0075491811149f};
    const T x = Math<T>::exp2_of_minus(gap);
    tail = x * polynomial(x, coefficients);
  }
};

struct Gjs : OfEntries<Gjs> {  // beta KL(p||m) + (1 - beta) KL(q||m), m = beta p + (1 - beta) q, 0 < beta < 1
  static constexpr float unit = kOnGpu ? -kLog2 : 1.0f;
  static constexpr bool has_slopes = true;

  // In a row about p = q: from log m, which elsewhere, where models barely overlap, keeps no digit of log(q/m).
  // Near p = q by h = log(m/q) = log(1 - beta + beta e^u), whose coefficients are a coin's cumulants, and the
  // value's slope beta e^u (u - h): both by u, within 3e-7.
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Slopes<T> by_log2(const E& e, const T& a, const T& b, const Parameter& beta) {
    const T log2_m = Math<T>::log2(Math<T>::at_least(a + b, kSmallestNormal));
    const T above_q = log2_m - Math<T>::at_least(e.log2_q, -kSteepest);
    const T of_p = a * (log2_m - Math<T>::at_least(e.log2_p, kLowestLog));
    const float x = beta.value, y = beta.rest, v = x * y, skew = 1.0f - 2.0f * x;
    const float h[] = {x, v / 2, v * skew / 6, v * (1.0f - 6.0f * v) / 24, v * skew * (1.0f - 12.0f * v) / 120};
    const float value[] = {x * y / 2, x * (y - h[1]) / 3, x * (y / 2 - h[1] - h[2]) / 4,
                           x * (y / 6 - h[1] / 2 - h[2] - h[3]) / 5,
                           x * (y / 24 - h[1] / 6 - h[2] / 2 - h[3] - h[4]) / 6};
    const T per_unit(1.0f / unit), u = e.u;
    return {T(beta.rest) * e.near(minus(per_unit * u * polynomial(u, h)), above_q),
            e.near(per_unit * e.q * u * u * polynomial(u, value), b * above_q + of_p)};
  }

  // In other rows.
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Slopes<T> by_exp2(const E& e, const T& a, const T& b, const Parameter& beta) {
    const float log2_share = beta.log * kLog2E, log2_rest = beta.log_rest * kLog2E;
    const T apart = (e.log2_p - e.log2_q) + T(log2_share - log2_rest);
    const Log2Sum<T> m(apart);
    return {T(beta.rest) * (m.tail + Math<T>::larger(Math<T>::smaller(apart, T(kSteepest)), T(0.0f))),
            (a + b) * m.tail + Math<T>::smaller(a, b) * m.gap + a * T(log2_share) + b * T(log2_rest)};
  }

  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Slopes<T> slopes(const E& e, const Parameter& beta) {
    const T a = T(beta.value) * e.p, b = T(beta.rest) * e.q;
    if constexpr (E::is_close) return by_log2(e, a, b, beta);
    return by_exp2(e, a, b, beta);
  }

  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& beta) {
    if constexpr (kOnGpu) return slopes(e, beta).terms(e.q);
    const T a = T(beta.value) * e.p, b = T(beta.rest) * e.q;
    const T x = excess(e.u);
    const bool about_one = e.about_one();
    const LogSum<T> m(e, a, b, e.log_p + T(beta.log), e.log_q + T(beta.log_rest), about_one, T(beta.value) * x);
    const T g = m.above_b + T(about_one ? beta.log_rest : 0.0f);
    const T far = a * (m.apart - m.above_b - T(beta.log)) - b * (m.above_b + T(beta.log_rest));
    return {minus(b * (about_one ? e.near(m.tail, g) : g)),
            e.near(e.q * x * x * polynomial(x, beta.series), far)};
  }
};

// Gjs with shares of one half, for GPUs: of m = sqrt(pq) cosh(u/2), near entries need few coefficients, within 3e-7.
struct Js : OfEntries<Js> {
  static constexpr float unit = -0.5f * kLog2;
  static constexpr bool has_slopes = true;

  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Slopes<T> slopes(const E& e, const Parameter&) {
    const T both = e.p + e.q, apart = e.log2_p - e.log2_q;
    if constexpr (!E::is_close) {
      const Log2Sum<T> m(apart);
      return {m.tail + Math<T>::larger(Math<T>::smaller(apart, T(kSteepest)), T(0.0f)),
              both * m.tail - both + Math<T>::smaller(e.p, e.q) * m.gap};
    }
    const T square = e.u * e.u, log2_m = Math<T>::log2(Math<T>::at_least(T(0.5f) * both, kSmallestNormal));
    const T above_q = log2_m - Math<T>::at_least(e.log2_q, -kSteepest);
    const T of_p = e.p * (log2_m - Math<T>::at_least(e.log2_p, kLowestLog));
    const float h[] = {0.125f * kLog2E, -1.0f / 192 * kLog2E};
    const float value[] = {-0.125f * kLog2E, 1.0f / 64 * kLog2E, -1.0f / 576 * kLog2E};
    return {e.near(square * polynomial(square, h) + T(0.5f * kLog2E) * e.u, above_q),
            e.near(both * square * polynomial(square, value), e.q * above_q + of_p)};
  }

  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& none) {
    return slopes(e, none).terms(e.q);
  }
};

struct SkewKl : OfEntries<struct SkewRkl> {  // KL(p || lambda p + (1 - lambda) q), 0 < lambda < 1
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& lambda) {
    const T a = T(lambda.value) * e.p, b = T(lambda.rest) * e.q, x = excess(e.u), apart = difference(e);
    const T share = b / (a + b + T(kSmallestNormal));
    // log(m/p) = log(m/a) + log lambda: with lambda near 1 almost nothing, of which log m keeps no digit
    const LogSum<T> m(e, b, a, e.log_q + T(lambda.log_rest), e.log_p + T(lambda.log), false, b);
    const T far = minus(T(lambda.rest) * apart) - e.p * (m.above_b + T(lambda.log));
    return {minus((e.about_one() ? T(lambda.rest) * apart : e.p) * share),
            e.near(e.q * x * x * polynomial(x, lambda.series), far)};
  }
};

// KL(q || lambda q + (1 - lambda) p): g = x / (1 + x) - log1p(x), x = (1 - lambda) t / lambda
struct SkewRkl : OfEntries<SkewKl> {
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& lambda) {
    const T a = T(lambda.rest) * e.p, b = T(lambda.value) * e.q, y = T(lambda.rest) * excess(e.u);
    const bool about_one = e.about_one();
    const LogSum<T> m(e, a, b, e.log_p + T(lambda.log_rest), e.log_q + T(lambda.log), about_one, y);
    const T g = a / (a + b + T(kSmallestNormal)) - m.above_b;
    const float coefficients[] = {-1.0f / 2, 2.0f / 3, -3.0f / 4, 4.0f / 5, -5.0f / 6, 6.0f / 7, -7.0f / 8, 8.0f / 9};
    const T x = a / (b + T(kSmallestNormal)), small = x * x * polynomial(x, coefficients);
    const T of_one = e.near(T(lambda.value) * y / (T(1.0f) + y) - m.tail,
                          g - T(lambda.rest + lambda.log));
    // the value is SkewKl's of the models exchanged
    const T z = excess(minus(e.u));
    const T far = T(lambda.rest) * (e.p - e.q) - e.q * (m.above_b + T(lambda.log));
    return {Math<T>::times(e.q, about_one ? of_one : Math<T>::where_less(x, T(kNear), small, g)),
            e.near(e.p * z * z * polynomial(z, lambda.series), far)};
  }
};

struct Tvd : OfEntries<Tvd> {  // f = |t - 1| / 2, with the zero subgradient at ties
  static constexpr float unit = kOnGpu ? 0.5f : 1.0f;
  static constexpr bool has_slopes = true, has_exact_slopes = true;

  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Slopes<T> slopes(const E& e, const Parameter&) {
    const T apart = difference(e), half(0.5f / unit);
    return {minus(Math<T>::signed_as(half, apart)), half * Math<T>::magnitude(apart)};
  }

  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& none) {
    return slopes(e, none).terms(e.q);
  }
};

// log(p^a q^b); any number where neither model has the entry
template <typename E, typename T = typename E::T>
FDISTILL_INLINE T power_log(const E& e, float a, float b) {
  // a times finfo.min, the mask of many models, would overflow
  return T(a) * Math<T>::at_least(e.log_p, kLowestLog) + T(b) * Math<T>::at_least(e.log_q, kLowestLog);
}

template <typename E, typename T = typename E::T>
FDISTILL_INLINE T zero_of_neither(const E& e, const T& x) {
  return Math<T>::zero_if_both_lowest(Math<T>::at_least(e.log_p, kLowestLog), Math<T>::at_least(e.log_q, kLowestLog), x);
}

// p^a q^b, its logarithm less a number; 0 where neither model has the entry
template <typename E, typename T = typename E::T>
FDISTILL_INLINE T power_of(const E& e, float a, float b, float less = 0.0f) {
  return zero_of_neither(e, Math<T>::exp(power_log(e, a, b) - T(less)));
}

// f = (t^alpha - alpha t - (1 - alpha)) / (alpha (alpha - 1)), alpha not 0 or 1.
// Scaled by 1/4 at alpha = 1/2 it is hellinger, by 2 at 2 and -1 pearson and neyman.
struct Alpha : OfEntries<Alpha> {

  // w - x for w = x exp(d), without cancellation where d is small
  template <typename T>
  static FDISTILL_INLINE T above(const T& w, const T& x, const T& d) {
    return Math<T>::where_small(d, 2 * kNear, x * excess(d), w - x);
  }

  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& alpha) {
    const T w = power_of(e, alpha.value, alpha.rest);
    const bool smooth = e.is_close || fabsf(alpha.value) < 0.5f || fabsf(alpha.rest) < 0.5f;
    const T above_q = smooth ? above(w, e.q, T(alpha.value) * e.u) : w - e.q;
    const T above_p = smooth ? above(w, e.p, T(0.0f - alpha.rest) * e.u) : w - e.p;
    const T far = above_q * T(-1.0f / alpha.value) - above_p * T(1.0f / alpha.rest);
    // the parts of an infinite w have opposite signs
    const T value = Math<T>::infinite_with(w, Math<T>::at_least(far, 0.0f));
    const float steep = fabsf(alpha.value) > 1.0f ? fabsf(alpha.value) : 1.0f;
    return {(e.about_one(alpha.value) ? above_q : w) * T(-1.0f / alpha.value),
            e.near_of(2 * kNear / steep, e.q * e.u * e.u * polynomial(e.u, alpha.series), value)};
  }
};

struct Triangular : OfEntries<Triangular> {  // f = (t - 1)^2 / (t + 1)
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter&) {
    const T total = Math<T>::at_least(e.p + e.q, kSmallestNormal), apart = difference(e);
    const T r = e.p / total, s = e.q / total, share = apart / total;
    const T g = e.about_one() ? share * (s + T(3.0f) * r) : T(4.0f) * r * r;
    return {minus(e.q * g), share * apart};
  }
};

// phi = (q^s (t^s - 1) / s - q^s (t^alpha - 1) / alpha) / beta, s = alpha + beta, and its limits
struct Ab : OfEntries<Ab> {

  // q^total (t^a - 1) / a, and at a = 0 its limit
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE T slope(const E& e, const T& base, float a, float total) {
    if (a == 0.0f) return Math<T>::times(base, e.u);
    return Alpha::above(power_of(e, a, total - a), base, T(a) * e.u) * T(1.0f / a);
  }

  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& numbers) {
    const float alpha = numbers.value, beta = numbers.rest, total = alpha + beta;
    const T base = power_of(e, 0.0f, total);
    const T one = slope(e, base, alpha, total), other = slope(e, base, total, total);
    T far;
    if (beta != 0.0f) far = (other - one) * T(1.0f / beta);
    else if (alpha != 0.0f) far = (Math<T>::times(power_of(e, alpha, 0.0f), e.u) - one) * T(1.0f / alpha);
    else far = Math<T>::times(base, T(0.5f) * e.u * e.u);
    const T value = Math<T>::infinite_with(Math<T>::magnitude(one),
                                           Math<T>::infinite_with(Math<T>::magnitude(other), Math<T>::at_least(far, 0.0f)));
    const float steep = fmaxf(1.0f, fmaxf(fabsf(alpha), fabsf(total)));
    return {minus(one), e.near_of(2 * kNear / steep, base * e.u * e.u * polynomial(e.u, numbers.series), value)};
  }
};

struct Todi : OfEntries<Todi> {  // phi = a p log(p/q) + (1 - a) q log(q/p), a = sigma(beta u) held still
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& beta) {
    // a number where neither model has the entry
    const T x = Math<T>::smaller(Math<T>::larger(T(beta.value) * e.u, T(-80.0f)), T(80.0f));
    const T a = T(1.0f) / (T(1.0f) + Math<T>::exp(minus(x))), rest = T(1.0f) / (T(1.0f) + Math<T>::exp(x));
    const float bound = kNear / (beta.value > 1.0f ? beta.value : 1.0f);
    const T series = a * difference(e) - e.q * a * excess(minus(x));  // a - rest = -(exp(-x) - 1) a
    const T apart = e.near_of(bound, series, a * e.p - rest * e.q), backward = Math<T>::times(rest * e.q, e.u);
    return {minus(apart) - backward, e.near(apart * e.u, Math<T>::times(a * e.p, e.u) - backward)};
  }
};

struct Engine : OfEntries<struct CrossEntropy> {  // -sum q log p: not an f-divergence, but linear in q like one
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter&) {
    return {minus(Math<T>::times(e.q, e.p_shifted)), minus(Math<T>::times(e.q, e.log_p))};
  }
};

struct CrossEntropy : OfEntries<Engine, true> {  // -sum p log q: a one-hot p gives the label's cross-entropy
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter&) {
    return {minus(difference(e)), minus(Math<T>::times(e.p, e.log_q))};
  }
};

#define FDISTILL_FOR_EACH_DIVERGENCE(X) \
  X(Kl) X(Rkl) X(Jeffreys) X(Gjs) X(SkewKl) X(SkewRkl) X(Tvd) X(Alpha) X(Triangular) X(Engine) X(CrossEntropy) X(Ab) \
  X(Todi)
#define FDISTILL_FOR_EACH_DIVERGENCE_OF_GPUS(X) FDISTILL_FOR_EACH_DIVERGENCE(X) X(Js)

}  // namespace fdistill
