// A vector of floats by the compiler's own vector extensions (GCC and Clang, any architecture), as wide as the build's
// instruction set has them, with the functions and conversions that the row kernel needs. Nothing here is of torch.
//
// exp, log and tanh are within 1.5 units in the last place, of subnormal results too where a thread has them (rows.cpp
// takes them away); coefficients are Cephes' (S. L. Moshier, single precision). Each build of the row kernel has its own
// namespace, so that no two share a symbol.
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "../divergences.h"

namespace fdistill {
namespace FDISTILL_ISA {

#ifdef __F16C__
constexpr bool kFlushes = true;  // subnormal numbers are 0 while the kernels run (rows.cpp)
#else
constexpr bool kFlushes = false;
#endif

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Floats __attribute__((vector_size(kLanes * 4))) = float;
using Ints __attribute__((vector_size(kLanes * 4))) = int32_t;
using Words __attribute__((vector_size(kLanes * 4))) = uint32_t;
using Halves __attribute__((vector_size(kLanes * 2))) = uint16_t;

struct Vec {
  Floats lanes;

  Vec() = default;
  FDISTILL_INLINE Vec(Floats lanes) : lanes(lanes) {}
  FDISTILL_INLINE Vec(float x) : lanes(x - Floats{}) {}  // a broadcast: -0 too, which 0 + x would lose

  static FDISTILL_INLINE Vec loadu(const float* from) {
    Vec x;
    std::memcpy(&x.lanes, from, sizeof(x.lanes));
    return x;
  }
  FDISTILL_INLINE void store(float* to) const { std::memcpy(to, &lanes, sizeof(lanes)); }

  friend FDISTILL_INLINE Vec operator+(const Vec& x, const Vec& y) { return x.lanes + y.lanes; }
  friend FDISTILL_INLINE Vec operator-(const Vec& x, const Vec& y) { return x.lanes - y.lanes; }
  friend FDISTILL_INLINE Vec operator*(const Vec& x, const Vec& y) { return x.lanes * y.lanes; }
  friend FDISTILL_INLINE Vec operator/(const Vec& x, const Vec& y) { return x.lanes / y.lanes; }
};

template <typename To, typename From>
FDISTILL_INLINE To bits(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof(to));
  return to;
}

FDISTILL_INLINE Words broadcast(uint32_t x) { return x - Words{}; }
FDISTILL_INLINE Vec select(const Ints& condition, const Vec& yes, const Vec& no) {
  return condition ? yes.lanes : no.lanes;
}
FDISTILL_INLINE Vec absolute(const Vec& x) { return bits<Floats>(bits<Words>(x.lanes) & 0x7fffffffu); }

// y where either is NaN: the machine's own.
FDISTILL_INLINE Vec maximum(const Vec& x, const Vec& y) {
#ifdef __AVX512F__
  return Floats(_mm512_max_ps(__m512(x.lanes), __m512(y.lanes)));
#elif defined(__AVX2__)
  return Floats(_mm256_max_ps(__m256(x.lanes), __m256(y.lanes)));
#else
  return select(x.lanes > y.lanes, x, y);
#endif
}

FDISTILL_INLINE Vec minimum(const Vec& x, const Vec& y) {
#ifdef __AVX512F__
  return Floats(_mm512_min_ps(__m512(x.lanes), __m512(y.lanes)));
#elif defined(__AVX2__)
  return Floats(_mm256_min_ps(__m256(x.lanes), __m256(y.lanes)));
#else
  return select(x.lanes < y.lanes, x, y);
#endif
}

// The first `count` lanes of `value`, the others of `rest`.
FDISTILL_INLINE Vec first_lanes(int64_t count, const Vec& value, const Vec& rest) {
  Ints index;
  for (int32_t i = 0; i < kLanes; ++i) index[i] = i;
  return select(index < static_cast<int32_t>(count), value, rest);
}

FDISTILL_INLINE double lane_sum(const Vec& x) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += x.lanes[i];
  return sum;
}

FDISTILL_INLINE float lane_maximum(const Vec& x) {
  float best = x.lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) best = best > x.lanes[i] || best != best ? best : x.lanes[i];
  return best;
}

#ifdef __AVX512F__
// 2^(j/16)
constexpr float kRootsOfTwo[16] = {1.0f,         1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                                   1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                   1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
#endif

// x = n log 2 + r, e^r by a polynomial. With AVX-512 n is in sixteenths, whose 2^n a register holds, and r so small that
// two coefficients do; else 2^n is two factors, so that a result below the normal numbers is rounded once, or one, where
// such results are 0. `below_zero`: x is not above 0.
template <bool below_zero = false>
FDISTILL_INLINE Vec exponential(const Vec& argument) {
#ifdef __AVX512F__
  constexpr bool kOneFactor = false;
  constexpr float kRounder = 0x1.8p19f;  // what is added to it becomes a multiple of 1/16
#else
  constexpr bool kOneFactor = below_zero && kFlushes;
  constexpr float kRounder = 0x1.8p23f + (kOneFactor ? 127 : 0);  // an integer, of one factor its exponent's bits
#endif
  Floats x = maximum(Vec(kOneFactor ? -88.0f : -104.0f), argument).lanes;  // a NaN passes
  if (!below_zero) x = minimum(Vec(89.0f), Vec(x)).lanes;
  const Floats rounded = x * 1.44269504088896341f + kRounder, n = rounded - kRounder;
  Floats r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
#ifdef __AVX512F__
  const Floats p = (r * 1.6666666667e-1f + 5.0001659e-1f) * r + 1.0f;  // e^r = 1 + r p, within 2e-9
  const Floats root = Floats(_mm512_permutexvar_ps(bits<__m512i>(rounded), _mm512_loadu_ps(kRootsOfTwo)));
  return Floats(_mm512_scalef_ps(__m512(root + root * (r * p)), __m512(n)));  // by the whole part of n
#else
  Floats p = Floats{} + 1.3814598989e-3f;  // within 4e-9 of e^r
  p = p * r + 8.3687170132e-3f;
  p = p * r + 4.1668388049e-2f;
  p = p * r + 1.6666520631e-1f;
  p = p * r + 4.9999993448e-1f;
  p = p * (r * r) + r + 1.0f;
  if (kOneFactor) return p * bits<Floats>(bits<Words>(rounded) << 23);  // 0 of n = -127
  const Ints exponent = bits<Ints>(rounded) - bits<int32_t>(kRounder), half = exponent >> 1;
  return p * bits<Floats>((half + 127) << 23) * bits<Floats>((exponent - half + 127) << 23);
#endif
}

// log(1 + f) of f in [sqrt(1/2) - 1, sqrt(2) - 1], less f
FDISTILL_INLINE Vec log_tail(const Vec& f) {
  const float coefficients[] = {3.3333331174e-1f, -2.4999993993e-1f, 2.0000714765e-1f, -1.6668057665e-1f, 1.4249322787e-1f,
                                -1.2420140846e-1f, 1.1676998740e-1f, -1.1514610310e-1f, 7.0376836292e-2f};
  const Vec square = f * f;
  return f * square * polynomial(f, coefficients) - Vec(0.5f) * square;
}

// Of normal numbers, infinity and NaN: x = 2^n m, m in [sqrt(1/2), sqrt(2)).
FDISTILL_INLINE Vec logarithm(const Vec& x) {
  constexpr int32_t kRootOfHalf = 0x3f3504f3;
  const Ints above = bits<Ints>(x.lanes) - kRootOfHalf;
  const Floats n = __builtin_convertvector(above >> 23, Floats);
  const Floats f = bits<Floats>((above & 0x7fffff) + kRootOfHalf) - 1.0f;
  const Floats tail = log_tail(Vec(f)).lanes - n * 2.12194440e-4f;
  return select(x.lanes < kInfinity, f + tail + n * 0.693359375f, x);
}

FDISTILL_INLINE Vec hyperbolic_tangent(const Vec& x) {
  const Floats square = x.lanes * x.lanes;
  Floats p = Floats{} - 5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec small = p * square * x.lanes + x.lanes, size = absolute(x);
  const Vec large = Vec(1.0f) - Vec(2.0f) / (exponential(size + size) + Vec(1.0f));
  const Words sign = bits<Words>(x.lanes) & 0x80000000u;
  return select(size.lanes < 0.625f, small, bits<Floats>(bits<Words>(large.lanes) | sign));
}

FDISTILL_INLINE Vec widened(const Halves& narrow, BFloat16) {
#ifdef __AVX512BW__  // each half to the upper half of a word in one step, where a conversion and a shift are two
  constexpr uint32_t kUpper = 0xaaaaaaaau;
  const __m512i places = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16);
  return bits<Floats>(_mm512_maskz_permutexvar_epi16(kUpper, places, _mm512_castsi256_si512(bits<__m256i>(narrow))));
#elif defined(__AVX2__)  // of GCC's own conversion each half is widened apart
  return bits<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits<__m128i>(narrow)), 16));
#else
  return bits<Floats>(__builtin_convertvector(narrow, Words) << 16);
#endif
}

FDISTILL_INLINE Halves narrowed(const Vec& x, BFloat16) {  // to the nearest, ties to even; a NaN is cut
#ifdef __AVX512BW__
  const __m512i word = bits<__m512i>(x.lanes);
  const __mmask16 number = _mm512_cmp_ps_mask(__m512(x.lanes), __m512(x.lanes), _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, word, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_add_epi32(word, number, word, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  const __m512i uppers = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d, 0xb0009,
                                          0x70005, 0x30001);  // the upper half of each word
  return bits<Halves>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(uppers, rounded)));
#else
  const Words word = bits<Words>(x.lanes), rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  const Words halves = x.lanes != x.lanes ? broadcast(0x7fc0u) : rounded;
#ifdef __AVX2__
  const __m256i wide = bits<__m256i>(halves);
  return bits<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
  return __builtin_convertvector(halves, Halves);
#endif
#endif
}

FDISTILL_INLINE Vec widened(const Halves& narrow, Half) {
#if defined(__AVX512F__)
  return Floats(_mm512_cvtph_ps(bits<__m256i>(narrow)));
#elif defined(__F16C__)
  return Floats(_mm256_cvtph_ps(bits<__m128i>(narrow)));
#else  // the exponent's bias is mended by a product, which is exact for subnormal numbers too
  const Words half = __builtin_convertvector(narrow, Words), size = (half & 0x7fffu) << 13;
  const Words finite = bits<Words>(bits<Floats>(size) * 0x1p112f);
  return bits<Floats>((size >= 0x0f800000u ? size | 0x7f800000u : finite) | (half & 0x8000u) << 16);
#endif
}

FDISTILL_INLINE Halves narrowed(const Vec& x, Half) {
#if defined(__AVX512F__)
  return bits<Halves>(_mm512_cvtps_ph(__m512(x.lanes), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bits<Halves>(_mm256_cvtps_ph(__m256(x.lanes), _MM_FROUND_TO_NEAREST_INT));
#else
  const Words word = bits<Words>(x.lanes), size = word & 0x7fffffffu, sign = (word >> 16) & 0x8000u;
  const Words normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // 0.5 has the spacing of float16's subnormal numbers
  const Words subnormal = bits<Words>(bits<Floats>(size) + 0.5f) - 0x3f000000u;
  Words half = size < 0x38800000u ? subnormal : normal;
  half = size >= 0x477ff000u ? broadcast(0x7c00u) : half;
  half = size > 0x7f800000u ? broadcast(0x7e00u) : half;
  return __builtin_convertvector(half | sign, Halves);
#endif
}

// A vector of a row as float; lanes past `count` are -inf, which every pass takes for "not in the vocabulary".
FDISTILL_INLINE Vec load(const float* from, int64_t count) {
  if (count >= kLanes) return Vec::loadu(from);
  Vec x(-kInfinity);
  std::memcpy(&x.lanes, from, count * sizeof(float));
  return x;
}

template <typename Narrow>
FDISTILL_INLINE Vec load(const Narrow* from, int64_t count) {
  Halves narrow{};
  std::memcpy(&narrow, from, (count >= kLanes ? kLanes : count) * sizeof(Narrow));
  const Vec wide = widened(narrow, Narrow());
  return count >= kLanes ? wide : first_lanes(count, wide, Vec(-kInfinity));
}

FDISTILL_INLINE void store(float* to, const Vec& x, int64_t count) {
  std::memcpy(to, &x.lanes, (count >= kLanes ? kLanes : count) * sizeof(float));
}

template <typename Narrow>
FDISTILL_INLINE void store(Narrow* to, const Vec& x, int64_t count) {
  const Halves narrow = narrowed(x, Narrow());
  std::memcpy(to, &narrow, (count >= kLanes ? kLanes : count) * sizeof(Narrow));
}

}  // namespace FDISTILL_ISA

template <>
struct Math<FDISTILL_ISA::Vec> {
  using Vec = FDISTILL_ISA::Vec;
  static FDISTILL_INLINE Vec exp(const Vec& x) { return exponential(x); }
  static FDISTILL_INLINE Vec log(const Vec& x) { return logarithm(x); }
  static FDISTILL_INLINE Vec at_least(const Vec& x, float least) { return maximum(Vec(least), x); }
  static FDISTILL_INLINE Vec times(const Vec& x, const Vec& y) { return select(x.lanes == 0.0f, Vec(0.0f), x * y); }
  static FDISTILL_INLINE Vec signed_as(const Vec& size, const Vec& side) {
    return select(side.lanes > 0.0f, size, select(side.lanes < 0.0f, Vec(0.0f) - size, side * size));
  }
  static FDISTILL_INLINE Vec where_small(const Vec& x, float bound, const Vec& small, const Vec& large) {
    return select(absolute(x).lanes < bound, small, large);
  }
  static FDISTILL_INLINE Vec where_less(const Vec& x, const Vec& y, const Vec& less, const Vec& other) {
    return select(x.lanes < y.lanes, less, other);
  }
  static FDISTILL_INLINE Vec magnitude(const Vec& x) { return absolute(x); }
  static FDISTILL_INLINE Vec larger(const Vec& x, const Vec& y) { return maximum(x, y); }
  static FDISTILL_INLINE Vec smaller(const Vec& x, const Vec& y) { return minimum(x, y); }
  static FDISTILL_INLINE Vec zero_if_both_lowest(const Vec& x, const Vec& y, const Vec& value) {
    return select((x.lanes == kLowestLog) & (y.lanes == kLowestLog), Vec(0.0f), value);
  }
  static FDISTILL_INLINE Vec infinite_with(const Vec& x, const Vec& value) {
    return select(x.lanes == FDISTILL_ISA::kInfinity, x, value);
  }
};

}  // namespace fdistill
