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

// Rows of which the divergence is made in the same visit as what it needs of the rest.
struct ListTask {
  RowTask row;               // without a teacher or class weights; metrics = 1 (not of `whole`): parts is (6, rows), and
                             // the last two are the student's mass on the list and the share of values.py's `overlap`
  int64_t list_size;
  const int64_t* ids;        // (rows, list_size), -1: none; checked by the caller
  const float* log_p;        // (rows, list_size + 1): the teacher's logits, the last the rest's, or each of its entries'
  const uint8_t* hidden;     // (rows), 1: the teacher has nothing of the rest either where the student has nothing
  int32_t whole;             // 1: over all entries; 0: over the list's and the rest as one category
  int32_t alone;             // 1: the student's rest is left out, as the teacher's
  int32_t labelled;          // 1: the divergence needs a label
};

}  // namespace fdistill
