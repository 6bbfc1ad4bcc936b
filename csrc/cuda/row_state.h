// What is known of a row, told between warps and blocks, and kept in shared memory.
#pragma once

#include "vectors.h"

namespace fdistill {

// Vectors of a slice, so many from the first on.
struct Span {
  int32_t first, count;
  FDISTILL_DEVICE bool holds(int v) const { return static_cast<unsigned>(v - first) < static_cast<unsigned>(count); }
};

// What is known of a row before its logits are there: facts that threads carry, and what of it is this block's.
struct Row {
  float scale, rate, other_rate, divergence_scale, label;  // a label below 2^24 is exact; -1: none
  int32_t shift;                // entries before it in its first 16 bytes
  int32_t count;                // vectors of the slice
  Span whole;                   // of these what is all of this row
  Raw *student, *teacher, *gradient;  // the slice in memory

  // A divergence that weighs nothing may be infinite: the student is then compared with itself.
  FDISTILL_DEVICE bool has_teacher() const { return scale * divergence_scale != 0.0f; }
  FDISTILL_DEVICE float teacher_rate() const { return has_teacher() ? other_rate : rate; }
};
constexpr int kFacts = 5, kLabel = 4;

// A model's softmax, whole or in part: p = exp((z - top) rate) / total. A top starts from kLowest: finite, so that
// -inf - top is -inf.
struct Softmax {
  float top = kLowest, total = 0;
  FDISTILL_DEVICE float worth(float x, float rate) const { return exp2f((x - top) * (rate * kLog2E)); }
};

// What is told in the first meeting. Of the student's, what labels may need: `plain` is the sum of exp(z - top), `linear`
// that of z - top, over so many `entries`.
struct alignas(sizeof(Raw)) Statistics {
  Softmax student, teacher;
  float label_logit = 0, plain = 0, linear = 0, entries = 0;
  float other_at_top = -INFINITY;  // the teacher's logit at the student's top
};

// And in the second: shares of D and S. Where slopes are kept in 16 bits, also S of what is kept; and of some entries their
// mass, and the mean and mean square of their slopes times it.
struct alignas(sizeof(Raw)) Totals {
  float divergence = 0, weight = 0, kept = 0, mass = 0, mean = 0, square = 0;

  // Whether 16 bits are too few for slopes so small, or for what is left of them less S: an error of theirs would be beyond
  // that of rounding the gradient. S is not near to slopes that are all alike where the student's largest entry, whose slope
  // is 0, has so much of its mass: the gradient there is -S times it, to which an error of 2^-12 of S times the root of the
  // others' mass squared is at most a rounding. Models that agree have no slopes.
  FDISTILL_DEVICE bool need_more_bits(float smallest, float largest_mass) const {
    const float variance = square - mean * (mean / mass);
    const bool enough = square > smallest * smallest * mass && (variance * 16.0f > square || largest_mass * 32.0f > 1.0f);
    return !enough && !(divergence == 0.0f && weight == 0.0f);
  }
};

// Both models of a row, their softmaxes known.
struct Models {
  float top, rate, log_total, log2_total, other_top, other_rate, other_log_total, other_log2_total, log_ratio;
  float other_at_top, u_at_peak = 0, at_peak = 0;  // of the student's largest entry: u, and its term per probability
  bool alike;  // in close rows log(p/q) is taken from the logits' own differences, exact where models nearly agree

  FDISTILL_DEVICE Models(const Row& row, const Statistics& all)
      : top(all.student.top), rate(row.rate), log_total(exact_log(all.student.total)), log2_total(log_total * kLog2E),
        other_top(all.teacher.top), other_rate(row.teacher_rate()), other_log_total(exact_log(all.teacher.total)),
        other_log2_total(other_log_total * kLog2E), other_at_top(all.other_at_top),
        alike(fabsf(other_top - top) <= 1.0f && rate == other_rate) {
    const float more = (all.teacher.total - all.student.total) / all.student.total;
    log_ratio = fabsf(more) < 0.25f ? log1p(more) : other_log_total - log_total;
  }

  FDISTILL_DEVICE float q(float x) const { return exp2f(fmaf(x - top, rate * kLog2E, -log2_total)); }

  // `close`: see Entry; `known_alike`: alike.
  template <bool close, bool known_alike = false>
  FDISTILL_DEVICE Entry<float, close> at(float x, float y) const {
    const float over = x - top, other_over = y - other_top;
    const float q_shifted = over * rate, p_shifted = other_over * other_rate;
    const float apart = known_alike || (close && alike) ? ((y - x) - (other_top - top)) * rate : p_shifted - q_shifted;
    const float log2_p = fmaf(other_over, other_rate * kLog2E, -other_log2_total);
    const float log2_q = fmaf(over, rate * kLog2E, -log2_total);
    return {exp2f(log2_p), exp2f(log2_q), fmaf(other_over, other_rate, -other_log_total), fmaf(over, rate, -log_total),
            apart - log_ratio, p_shifted, q_shifted, u_at_peak, 0.0f, nullptr, nullptr, log2_p, log2_q};
  }
};

// The gradient of a row: term * the divergence's + softmax * q + plain * exp(z - top) + constant, less `label` at the
// label. Labels have a softmax of their own, `plain`, where the divergence's has another temperature.
struct Gradient {
  float term = 0, softmax = 0, plain = 0, constant = 0, label = 0;
};

// What every thread needs of a row after the first meeting.
struct Known {
  Models models;
  Gradient gradient;
};

// A block's shared memory, before its slices.
struct Shared {
  static constexpr int message = sizeof(Statistics) / sizeof(Raw);
  Barrier arrived[kWarps];         // a warp's part of the slices is there
  Barrier met[2];                  // every block has been heard
  Row rows[2];                     // this one and the next
  Raw told[2][message * kWarps];   // by warps to their block, in two meetings
  Raw heard[2][message * kMost];   // of blocks
  char known[sizeof(Known)];       // by everyone, of a row
  float weight;                    // S, of the second meeting
  int32_t anew;                    // whether a row's logits must be read once more for its gradient
};

}  // namespace fdistill
