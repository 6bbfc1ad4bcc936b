// Every divergence of the package, once, for C++ (scalar and vector) and for CUDA.
//
// A divergence D = sum_v q f(p/q) is two terms at each vocabulary entry, with t = p/q and f(1) = 0:
//     student = q g(t),   g(t) = f(t) - t f'(t)     what the gradient to the student needs
//     teacher = p f'(t)                             what the gradient to the teacher needs
// and their sum is q f(t), the entry's share of the loss. With S = sum_v student,
//     dD/dz_s = (student - q S) / T_s,   dD/dz_t = (teacher - p (D - S)) / T_t.
// f may be shifted by c (t - 1) without changing D, so each f is shifted to the shortest terms; where the shift
// makes S vanish the divergence is `centred`, and the gradient needs no sum over the row.
//
// T is float, or any vector type with the operators + - * / and the functions of `Math<T>`.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FDISTILL_INLINE __host__ __device__ __forceinline__
#else
#define FDISTILL_INLINE inline __attribute__((always_inline))
#endif

namespace fdistill {

constexpr float kSmallestNormal = 1.17549435e-38f, kLowest = -3.40282347e38f;
constexpr float kLowestLog = -1e30f;  // a logarithm of 0 that may still be multiplied

template <typename T>
struct Math;

template <>
struct Math<float> {
  static FDISTILL_INLINE float exp(float x) { return expf(x); }
  static FDISTILL_INLINE float log(float x) { return logf(x); }
  static FDISTILL_INLINE float at_least(float x, float least) { return x < least ? least : x; }
  // x y, where 0 y is 0 even for an infinite or undefined y: the limit of x log x and its kin.
  static FDISTILL_INLINE float times(float x, float y) { return x == 0.0f ? 0.0f : x * y; }
  // magnitude of `size` with the sign of `side`; 0 where side is 0.
  static FDISTILL_INLINE float signed_as(float size, float side) {
    return side > 0.0f ? size : side < 0.0f ? -size : side * size;
  }
  static FDISTILL_INLINE float where_small(float x, float bound, float small, float large) {
    return fabsf(x) < bound ? small : large;
  }
  static FDISTILL_INLINE float zero_if_both_lowest(float x, float y, float value) {
    return x == kLowestLog && y == kLowestLog ? 0.0f : value;
  }
  static FDISTILL_INLINE float infinite_with(float x, float value) { return x == INFINITY ? x : value; }
};

// One vocabulary entry: the teacher's and the student's probability and their logarithms.
template <typename T>
struct Entry {
  T p, q, log_p, log_q;
};

template <typename T>
struct Terms {
  T student, teacher;
};

// w - x for w = x exp(d), without cancellation where d is small.
template <typename T>
FDISTILL_INLINE T difference(T w, T x, T d) {
  T series = T(1.0f / 40320);
  series = series * d + T(1.0f / 5040);
  series = series * d + T(1.0f / 720);
  series = series * d + T(1.0f / 120);
  series = series * d + T(1.0f / 24);
  series = series * d + T(1.0f / 6);
  series = series * d + T(0.5f);
  series = series * d + T(1.0f);
  return Math<T>::where_small(d, 0.5f, x * (series * d), w - x);
}

struct Kl {  // f = t log t - t + 1
  static constexpr bool centred = true;
  template <typename T>
  static FDISTILL_INLINE Terms<T> terms(const Entry<T>& e, float) {
    return {e.q - e.p, Math<T>::times(e.p, e.log_p - e.log_q)};
  }
};

struct Rkl {  // f = -log t + t - 1
  static constexpr bool centred = false;
  template <typename T>
  static FDISTILL_INLINE Terms<T> terms(const Entry<T>& e, float) {
    return {Math<T>::times(e.q, e.log_q - e.log_p), e.p - e.q};
  }
};

struct Jeffreys {  // f = (t - 1) log t
  static constexpr bool centred = false;
  template <typename T>
  static FDISTILL_INLINE Terms<T> terms(const Entry<T>& e, float) {
    const T forward = Math<T>::times(e.p, e.log_p - e.log_q), backward = Math<T>::times(e.q, e.log_q - e.log_p);
    return {backward + e.q - e.p, forward + e.p - e.q};
  }
};

struct Gjs {  // beta KL(p||m) + (1 - beta) KL(q||m), m = beta p + (1 - beta) q, 0 < beta < 1
  static constexpr bool centred = false;
  template <typename T>
  static FDISTILL_INLINE Terms<T> terms(const Entry<T>& e, float beta) {
    const T p = T(beta) * e.p, q = T(1.0f - beta) * e.q;
    const T log_m = Math<T>::log(Math<T>::at_least(p + q, kSmallestNormal));
    // log 0 as a finite number: 0 log 0 is 0 without asking
    return {q * (Math<T>::at_least(e.log_q, kLowest) - log_m), p * (Math<T>::at_least(e.log_p, kLowest) - log_m)};
  }
};

// KL(p || lambda p + (1 - lambda) q), 0 < lambda < 1
struct SkewKl {
  static constexpr bool centred = false;
  template <typename T>
  static FDISTILL_INLINE Terms<T> terms(const Entry<T>& e, float lambda) {
    const T m = Math<T>::at_least(T(lambda) * e.p + T(1.0f - lambda) * e.q, kSmallestNormal);
    const T mixed = T(1.0f - lambda) * e.p * (e.q / m);
    return {T(0.0f) - mixed, mixed + Math<T>::times(e.p, e.log_p - Math<T>::log(m))};
  }
};

// KL(q || lambda q + (1 - lambda) p): SkewKl with the two models exchanged
struct SkewRkl {
  static constexpr bool centred = false;
  template <typename T>
  static FDISTILL_INLINE Terms<T> terms(const Entry<T>& e, float lambda) {
    const Terms<T> exchanged = SkewKl::terms(Entry<T>{e.q, e.p, e.log_q, e.log_p}, lambda);
    return {exchanged.teacher, exchanged.student};
  }
};

struct Tvd {  // f = |t - 1| / 2, with the zero subgradient at ties
  static constexpr bool centred = false;
  template <typename T>
  static FDISTILL_INLINE Terms<T> terms(const Entry<T>& e, float) {
    const T half_sign = Math<T>::signed_as(T(0.5f), e.q - e.p);
    return {e.q * half_sign, T(0.0f) - e.p * half_sign};
  }
};

// f = (t^alpha - alpha t - (1 - alpha)) / (alpha (alpha - 1)), alpha not 0 or 1.
// Scaled by 1/4 at alpha = 1/2 it is hellinger, by 2 at 2 and -1 pearson and neyman.
struct Alpha {
  static constexpr bool centred = false;
  template <typename T>
  static FDISTILL_INLINE Terms<T> terms(const Entry<T>& e, float alpha) {
    // alpha times finfo.min, the mask of many models, would overflow
    const T log_p = Math<T>::at_least(e.log_p, kLowestLog), log_q = Math<T>::at_least(e.log_q, kLowestLog);
    const T w = Math<T>::exp(T(alpha) * log_p + T(1.0f - alpha) * log_q), u = log_p - log_q;
    const T student = difference(w, e.q, T(alpha) * u) * T(-1.0f / alpha);
    const T teacher = difference(w, e.p, T(alpha - 1.0f) * u) * T(1.0f / (alpha - 1.0f));
    const auto limit = [&](T term) {  // the terms of an infinite w have opposite signs, their sum is +inf
      return Math<T>::zero_if_both_lowest(log_p, log_q, Math<T>::infinite_with(w, term));
    };
    return {limit(student), limit(teacher)};
  }
};

struct Triangular {  // f = (t - 1)^2 / (t + 1)
  static constexpr bool centred = false;
  template <typename T>
  static FDISTILL_INLINE Terms<T> terms(const Entry<T>& e, float) {
    const T total = Math<T>::at_least(e.p + e.q, kSmallestNormal);
    const T r = e.p / total, s = e.q / total;
    return {e.q * (s - r) * (s + T(3.0f) * r), e.p * (r - s) * (r + T(3.0f) * s)};
  }
};

struct Engine {  // -sum q log p: not an f-divergence, but linear in q like one
  static constexpr bool centred = false;
  template <typename T>
  static FDISTILL_INLINE Terms<T> terms(const Entry<T>& e, float) {
    return {T(0.0f) - Math<T>::times(e.q, e.log_p), e.p - e.q};
  }
};

struct CrossEntropy {  // -sum p log q: a one-hot p gives the label's cross-entropy
  static constexpr bool centred = true;
  template <typename T>
  static FDISTILL_INLINE Terms<T> terms(const Entry<T>& e, float) {
    return {e.q - e.p, T(0.0f) - Math<T>::times(e.p, e.log_q)};
  }
};

#define FDISTILL_FOR_EACH_DIVERGENCE(X) \
  X(Kl) X(Rkl) X(Jeffreys) X(Gjs) X(SkewKl) X(SkewRkl) X(Tvd) X(Alpha) X(Triangular) X(Engine) X(CrossEntropy)

}  // namespace fdistill
