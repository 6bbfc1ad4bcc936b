// What the row kernels are asked, in plain types: the one interface between the binding and the per-ISA builds.
#pragma once

#include <cstdint>

namespace fdistill {

enum class Scalar { kFloat, kBFloat16, kHalf };

// Rows of a (outer, inner, vocabulary) tensor whose last dimension is dense: row n starts at
// (n / inner) * outer_stride + (n % inner) * inner_stride elements.
struct Rows {
  void* data = nullptr;
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;
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
  float parameter;                            // the divergence's own
  const int64_t* labels;                      // (rows), or null: no label terms; checked by the caller
  const float* class_weight;                  // (vocabulary), or null: ones
  float class_weight_sum;
  float cross_entropy_weight, label_smoothing, z_loss;
  float student_softcap, teacher_softcap;     // 0: none; else capped logits overwrite the logits
  float* parts;                               // (3, rows): divergence, cross-entropy, squared log-sum-exp
};

// Entries that share one shift, and that are summed in float before the row's total in double: 8 KiB, a quarter of L1.
constexpr int64_t kBlock = 2048;

inline int64_t padded(int64_t vocabulary) { return (vocabulary + 63) / 64 * 64; }
inline int64_t block_count(int64_t vocabulary) { return (vocabulary + kBlock - 1) / kBlock; }

// Floats of scratch a thread needs: a row each of q, p and the divergence's two terms, and a factor a block of q and p.
inline int64_t scratch_floats(const RowTask& task) {
  const int64_t rows = !task.teacher.data ? 1 : task.teacher_gradient.data ? 4 : 2;
  return rows * padded(task.vocabulary) + 2 * block_count(task.vocabulary);
}

// Rows [begin, end) of the task; null when the build has no kernel of that name.
using RowKernel = void (*)(const RowTask&, int64_t begin, int64_t end, float* scratch);
RowKernel row_kernel_default(const char* divergence);
#ifdef FDISTILL_X86
RowKernel row_kernel_avx2(const char* divergence);
RowKernel row_kernel_avx512(const char* divergence);
#endif

}  // namespace fdistill
