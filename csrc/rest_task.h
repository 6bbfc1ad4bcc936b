// What the kernels for a teacher that is a list of ids are asked; backends/sparse.py says what for.
#pragma once

#include "row_task.h"

namespace fdistill {

struct RestTask {
  Scalar scalar;
  int64_t row_count, vocabulary, list_size;
  Rows student;              // logits
  Rows gradient;             // null data: statistics are wanted
  const float* row_scale;    // (rows); 0 skips the row before any load
  const float* rate;         // (rows), 1/T
  float softcap;             // 0: none
  int32_t plain;             // 1: with what label terms need, at temperature 1
  const int64_t* ids;        // (rows, list_size), -1: none; checked by the caller
  float* statistics;         // (3, rows): the rest's largest logit; relative to it its log-sum-exp at 1/rate and at 1
  const float* coefficients; // (3, rows), plain: (7, rows): sparse.Rest
  const float* values;       // (rows, list_size), the gradient at the ids
};

}  // namespace fdistill
