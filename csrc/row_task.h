// What row kernels are asked, in plain types: the one interface between Python's bindings and the kernels.
#pragma once

#include <cstdint>

namespace fdistill {

enum class Scalar : int32_t { kFloat, kBFloat16, kHalf };
struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

// Rows of a (outer, inner, vocabulary) tensor whose last dimension is dense: row n starts at
// (n / inner) * outer_stride + (n % inner) * inner_stride elements.
struct Rows {
  void* data = nullptr;
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;
};

// A divergence's parameter, 1 less it, the logarithms of both where they are positive, and the coefficients of its value
// near p = q.
struct Parameter {
  float value, rest, log, log_rest, series[7];
};

struct RowTask {
  Scalar scalar;
  int64_t row_count, vocabulary;
  Rows student, teacher;                      // logits; no teacher: the label terms alone
  Rows student_gradient, teacher_gradient;    // null data: not wanted
  const float* row_scale;                     // (rows); 0 skips the row before any load
  const float* student_inverse_temperature;   // (rows)
  const float* teacher_inverse_temperature;   // (rows)
  const float* divergence_scale;              // (rows)
  const float* cross_entropy_scale;           // (rows)
  const float* z_loss_scale;                  // (rows)
  const int64_t* labels;                      // (rows), or null: no label terms; checked by the caller
  const float* class_weight;                  // (vocabulary), or null: ones
  Parameter parameter, exchanged;             // the divergence's own, and with the models exchanged
  float label_smoothing;
  float class_weight_sum;                     // 0 where labels are not smoothed
  float student_softcap, teacher_softcap;     // 0: none; else logits are capped first
  float* parts;                               // (3, rows): divergence, cross-entropy, squared log-sum-exp
  int32_t metrics;                            // 1: (9, rows), with values.py's Metrics behind them
};

}  // namespace fdistill
