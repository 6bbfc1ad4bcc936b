// Divergences that ask for statistics of their row; fdistill_kernels/row_formulas.py says the same in torch, and why.
//
// Such a divergence names its set of entries, sums over the row's entries, and makes of the sums the row's coefficients,
// which enter its terms and through which no gradient flows.
#pragma once

#include "divergences.h"

namespace fdistill {

constexpr int kCoefficients = 10, kMostSums = 5, kMostLargest = 2;

// What `coefficients` sees of a row.
struct RowFacts {
  float sums[kMostSums], u_at_peak, u_at_other_peak;
  float largest[kMostLargest] = {};  // of what `largest` says of entries, if anything; from kNoOverlap to -kNoOverlap
};

template <typename Other, bool is_centred = false>
struct OfRows : OfEntries<Other, is_centred> {
  static constexpr bool asks = true;
};

template <typename T>
FDISTILL_INLINE T where_inside(const T& inside, const T& yes, const T& no) {
  return Math<T>::where_less(T(0.5f), inside, yes, no);
}

template <typename E, typename T = typename E::T>
FDISTILL_INLINE T entry_of_whole(const E& e) { return Math<T>::times(e.q, T(e.of_row[1])); }

struct Lk : OfRows<Lk> {  // -log(1 - TVD)
  static constexpr bool has_largest = true;
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE void largest(const E& e, const Parameter&, T (&most)[kMostLargest]) {
    most[0] = smaller_log(e);
  }
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE void sums(const E& e, const Parameter&, const RowFacts& row, T (&sums)[kMostSums]) {
    sums[0] = T(0.5f) * Math<T>::magnitude(difference(e));
    sums[1] = Math<T>::exp(smaller_log(e) - T(row.largest[0]));
  }
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE T smaller_log(const E& e) { return Math<T>::where_less(e.log_p, e.log_q, e.log_p, e.log_q); }
  static FDISTILL_INLINE void coefficients(const RowFacts& row, const Parameter&, float* of_row) {
    const float apart = row.sums[0], overlap = row.sums[1];
    of_row[1] = apart >= 0.5f ? -(logf(overlap) + row.largest[0]) : -log1pf(-apart);  // also of what is not a number
    of_row[0] = of_row[kCoefficients - 1] = overlap == 0.0f ? -INFINITY : of_row[1];  // what is no part of nothing
  }
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter&) {
    // from the peak's side, whose entries are then 0 without a rounding; the others' are no larger than the overlap
    const float side = e.u_at_peak > 0.0f ? 0.5f : e.u_at_peak < 0.0f ? -0.5f : 0.0f;
    const T log_share = e.log_q + T(e.of_row[0]);
    const T share = Math<T>::exp(Math<T>::where_less(T(0.0f), log_share, T(0.0f), log_share));
    return {Math<T>::times(share, T(side) - Math<T>::signed_as(T(0.5f), e.u)), entry_of_whole(e)};
  }
};

struct Renyi : OfRows<Renyi> {  // log(sum p^alpha q^(1 - alpha)) / (alpha - 1)
  static constexpr bool has_largest = true;
  // What keeps the sum in float: its largest logarithm. Models without a common entry have none.
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE void largest(const E& e, const Parameter& alpha, T (&most)[kMostLargest]) {
    most[0] = power_log(e, alpha.value, alpha.rest);
  }
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE void sums(const E& e, const Parameter& alpha, const RowFacts& row, T (&sums)[kMostSums]) {
    sums[0] = Alpha::terms(e, alpha).value;
    sums[1] = power_of(e, alpha.value, alpha.rest, row.largest[0]);
  }
  // The slope by alpha's terms, where the sum is near 1; else 0, and what the powers are multiplied with.
  static FDISTILL_INLINE void coefficients(const RowFacts& row, const Parameter& alpha, float* of_row) {
    const float change = -alpha.value * alpha.rest * row.sums[0], total = row.sums[1];
    const bool near = fabsf(change) < 0.5f;
    of_row[0] = of_row[kCoefficients - 1] = near ? alpha.value / (1.0f + change) : 0.0f;
    of_row[1] = (near ? log1pf(change) : logf(total) + row.largest[0]) / -alpha.rest;
    of_row[2] = of_row[kCoefficients - 3] = row.largest[0];
    of_row[3] = of_row[kCoefficients - 4] = total > 0.0f ? alpha.value / total : 0.0f * total;
  }
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& alpha) {
    const T student = e.of_row[0] != 0.0f
        ? Math<T>::times(Alpha::terms(e, alpha).student, T(e.of_row[0]))
        : power_of(e, alpha.value, alpha.rest, e.of_row[2]) * T(-e.of_row[3] / alpha.value);
    return {student, entry_of_whole(e)};
  }
};

// of_row: the weight of kl, and last that of rkl
template <typename Self>
struct Mixed : OfRows<Self> {
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& parameter) {
    const T of_kl(e.of_row[0]), of_rkl(e.of_row[kCoefficients - 1]);
    const Terms<T> kl = Kl::terms(e, parameter), rkl = Rkl::terms(e, parameter);
    return {of_kl * kl.student + Math<T>::times(of_rkl, rkl.student),
            Math<T>::times(of_kl, kl.value) + Math<T>::times(of_rkl, rkl.value)};
  }
};

struct Akl : Mixed<Akl> {  // the weights are the shares of sum |p - q| of the teacher's head, and of its tail
  static constexpr Members members = Members::kMass;
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE void sums(const E& e, const Parameter&, const RowFacts&, T (&sums)[kMostSums]) {
    const T gap = Math<T>::magnitude(difference(e));
    sums[0] = where_inside(e.inside, gap, T(0.0f));
    sums[1] = where_inside(e.inside, T(0.0f), gap);
  }
  static FDISTILL_INLINE void coefficients(const RowFacts& row, const Parameter&, float* of_row) {
    const float all = row.sums[0] + row.sums[1];
    of_row[0] = all == 0.0f ? 0.5f : row.sums[0] / all;
    of_row[kCoefficients - 1] = 1.0f - of_row[0];
  }
};

struct EntropyGated : Mixed<EntropyGated> {  // rkl, and kl where the teacher's entropy is above the parameter
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE void sums(const E& e, const Parameter&, const RowFacts&, T (&sums)[kMostSums]) {
    sums[0] = T(0.0f) - Math<T>::times(e.p, e.log_p);
  }
  static FDISTILL_INLINE void coefficients(const RowFacts& row, const Parameter& threshold, float* of_row) {
    of_row[0] = row.sums[0] > threshold.value ? 1.0f : 0.0f;
    of_row[kCoefficients - 1] = 1.0f;
  }
};

struct Csd : OfRows<Csd, true> {  // sum w (u - sum w u)^2, w = p (the parameter is 1) or q (0) held still
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE void sums(const E& e, const Parameter& of_teacher, const RowFacts& row, T (&sums)[kMostSums]) {
    sums[0] = Math<T>::times(of_teacher.value != 0.0f ? e.p : e.q, e.u - T(at_peak(row, of_teacher)));
  }
  // u is measured from that at the weights' peak, whose own then keeps its digits; where it is infinite, the mean will be.
  static FDISTILL_INLINE float at_peak(const RowFacts& row, const Parameter& of_teacher) {
    const float u = of_teacher.value != 0.0f ? row.u_at_other_peak : row.u_at_peak;
    return std::isinf(u) ? 0.0f : u;
  }
  static FDISTILL_INLINE void coefficients(const RowFacts& row, const Parameter& of_teacher, float* of_row) {
    of_row[0] = row.sums[0];
    of_row[1] = at_peak(row, of_teacher);
    of_row[kCoefficients - 2] = -of_row[1];
    of_row[kCoefficients - 1] = -of_row[0];
  }
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& of_teacher) {
    const T apart = (e.u - T(e.of_row[1])) - T(e.of_row[0]), weight = of_teacher.value != 0.0f ? e.p : e.q;
    // where u is infinite the mean is too
    const T square = Math<T>::infinite_with(Math<T>::magnitude(e.u), apart * apart);
    return {T(-2.0f) * Math<T>::times(weight, apart), Math<T>::times(weight, square)};
  }
};

// weight kl(the set's entries and the rest as one) + within kl(inside the rest)
struct GroupedKl : OfRows<struct GroupedRkl, true> {
  enum { kWeight, kApart, kLogRatio, kTopP, kTopQ, kOfP, kOfQ, kShare, kWithin, kKl };  // coefficients
  static constexpr bool has_largest = true;

  // What keeps the rest's masses in float, where the set has all but e^-100 of a model's.
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE void largest(const E& e, const Parameter&, T (&most)[kMostLargest]) {
    most[0] = where_inside(e.inside, T(kNoOverlap), e.log_p);
    most[1] = where_inside(e.inside, T(kNoOverlap), e.log_q);
  }
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE void sums(const E& e, const Parameter&, const RowFacts& row, T (&sums)[kMostSums]) {
    const T of_p(row.largest[0]), of_q(row.largest[1]), zero(0.0f);
    E relative = e;  // to q's largest; infinite where it is not asked for
    relative.p = Math<T>::exp(e.log_p - of_q);
    relative.q = Math<T>::exp(e.log_q - of_q);
    const T p = Math<T>::exp(e.log_p - of_p);
    sums[0] = where_inside(e.inside, zero, p);
    sums[1] = where_inside(e.inside, zero, relative.q);
    sums[2] = where_inside(e.inside, zero, difference(relative));
    sums[3] = where_inside(e.inside, zero, Math<T>::times(p, e.u));
    sums[4] = where_inside(e.inside, difference(e), zero);
  }
  static FDISTILL_INLINE void coefficients(const RowFacts& row, float weight, float within, float* of_row) {
    const float p = row.sums[0], q = row.sums[1], top_p = row.largest[0], top_q = row.largest[1];
    const float log_p = top_p + logf(p), log_q = top_q + logf(q);
    const float mass_p = expf(log_p), mass_q = expf(log_q);
    // p/q - 1, by the sum that has the digits
    const float excess = mass_p + mass_q > 1.0f ? -row.sums[4] / Math<float>::at_least(mass_q, kSmallestNormal)
                                                : row.sums[2] / Math<float>::at_least(q, kSmallestNormal);
    const bool little = fabsf(excess) < 0.5f;
    const float u = little ? log1pf(excess) : (top_p - top_q) + logf(p) - logf(q);
    const Entry<float, true> rest{mass_p, mass_q, log_p, log_q, u, log_p, log_q, u};
    of_row[kWeight] = weight;
    of_row[kApart] = little ? excess * mass_q : mass_p - mass_q;
    of_row[kLogRatio] = p > 0.0f ? u : 0.0f;  // nothing of the teacher's is there to be measured
    of_row[kTopP] = top_p;
    of_row[kTopQ] = top_q;
    of_row[kOfP] = 1.0f / Math<float>::at_least(p, kSmallestNormal);
    of_row[kOfQ] = 1.0f / Math<float>::at_least(q, kSmallestNormal);
    of_row[kShare] = Math<float>::times(weight, Kl::terms(rest, Parameter()).value) / (p > 0.0f && q > 0.0f ? 2.0f : 1.0f);
    of_row[kWithin] = p > 0.0f && q > 0.0f ? within : 0.0f;
    of_row[kKl] = row.sums[3] * of_row[kOfP] - of_row[kLogRatio];
  }
  // Kl's terms of an entry, which is one of the whole row inside the set, and one of the rest outside.
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& parameter) {
    const T weight(e.of_row[kWeight]), within(e.of_row[kWithin]);
    const T apart = where_inside(e.inside, T(0.0f), T(e.of_row[kLogRatio]));
    const T p = where_inside(e.inside, e.p, Math<T>::exp(e.log_p - T(e.of_row[kTopP])) * T(e.of_row[kOfP]));
    const T q = where_inside(e.inside, e.q, Math<T>::exp(e.log_q - T(e.of_row[kTopQ])) * T(e.of_row[kOfQ]));
    const Entry<T, true> of_set{p, q, e.log_p - apart, e.log_q, e.u - apart, e.p_shifted, e.q_shifted, 0.0f};
    const Terms<T> found = Kl::terms(of_set, parameter);
    const T student = Math<T>::times(within, found.student) - weight * q * T(e.of_row[kApart]);
    const T value = Math<T>::times(p + q, T(e.of_row[kShare])) + Math<T>::times(within, found.value);
    return {where_inside(e.inside, weight * found.student, student),
            where_inside(e.inside, Math<T>::times(weight, found.value), value)};
  }
};

struct GroupedRkl {  // the teacher's term of GroupedKl, by an exchanged entry
  template <typename E, typename T = typename E::T>
  static FDISTILL_INLINE Terms<T> terms(const E& e, const Parameter& parameter) {
    const auto of_row = [&](int i) { return T(e.of_row[kCoefficients - 1 - i]); };
    const T weight = of_row(GroupedKl::kWeight), apart = of_row(GroupedKl::kLogRatio);
    const T of_rest = Math<T>::exp(e.log_q - of_row(GroupedKl::kTopP)) * of_row(GroupedKl::kOfP);
    const T u = T(0.0f) - e.u - apart;
    // from that of the rest as one, which then is 0 without a rounding
    return {where_inside(e.inside, Math<T>::times(weight, Math<T>::times(e.q, u)),
                         Math<T>::times(of_row(GroupedKl::kWithin) * of_rest, u - of_row(GroupedKl::kKl))), T(0.0f)};
  }
};

struct TailAware : GroupedKl {  // the set is the teacher's `value` largest
  static constexpr Members members = Members::kCount;
  static FDISTILL_INLINE void coefficients(const RowFacts& row, const Parameter& numbers, float* of_row) {
    GroupedKl::coefficients(row, 1.0f, numbers.rest, of_row);
  }
};

struct Dkd : GroupedKl {  // the set is the label
  static constexpr Members members = Members::kLabel;
  static FDISTILL_INLINE void coefficients(const RowFacts& row, const Parameter& numbers, float* of_row) {
    GroupedKl::coefficients(row, numbers.value, numbers.rest, of_row);
  }
};

#define FDISTILL_FOR_EACH_ROW_DIVERGENCE(X) X(Lk) X(Renyi) X(Akl) X(EntropyGated) X(Csd) X(TailAware) X(Dkd)

}  // namespace fdistill
