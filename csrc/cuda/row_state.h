// What is known of a row, told between warps and blocks, and kept in shared memory.
#pragma once

#include "vectors.h"

namespace fdistill {

// What is known of a row before its logits are there: facts that threads carry, and what of it is this block's.
struct Row {
  float scale, rate, other_rate, divergence_scale, label;  // a label below 2^24 is exact; -1: none
  uint32_t outer, inner;        // its indices, the same in every tensor of the call
  int32_t shift;                // entries before it in its first 16 bytes
  int32_t count, first, whole;  // vectors of the slice; of these from `first` on so many are all of this row
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

// And in the second: shares of D and S.
struct alignas(sizeof(Raw)) Totals {
  float divergence = 0, weight = 0;
};

// A block's shared memory, before the stages.
struct Shared {
  static constexpr int most_stages = 3, message = sizeof(Statistics) / sizeof(Raw);
  Barrier arrived[most_stages];   // the slices are there
  Barrier met[2];                 // every block has been heard
  Row rows[most_stages];          // in the stages
  Raw told[message * kMost];      // by warps to their block
  Raw heard[2][message * kMost];  // of blocks, in two meetings
  Raw learnt[message];            // by everyone, of a meeting
};

// The gradient of a row: term * the divergence's + exponential * e + plain * exp(z - top) + constant, less `label` at the
// label; `softmax` is the coefficient of the labels' softmax, that `exponential` or `plain` is made of.
struct Gradient {
  float term = 0, exponential = 0, plain = 0, constant = 0, label = 0, softmax = 0, top = 0;
};

}  // namespace fdistill
