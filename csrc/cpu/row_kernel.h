// The interface between the binding and the per-ISA builds of the row kernel.
#pragma once

#include "../rest_task.h"
#include "../row_task.h"

namespace fdistill {

// Entries that share one shift, and that are summed in float before the row's total in double: 8 KiB, a quarter of L1.
constexpr int64_t kBlock = 2048;

inline int64_t padded(int64_t vocabulary) { return (vocabulary + 63) / 64 * 64; }
inline int64_t block_count(int64_t vocabulary) { return (vocabulary + kBlock - 1) / kBlock; }

// Floats of scratch a thread needs: a row each of q, p and the divergence's two terms, of both models' logits where they
// are capped, and a factor a block of q and p.
inline int64_t scratch_floats(const RowTask& task) {
  const int64_t models = task.teacher.data ? 2 : 1;
  const bool capped = task.student_softcap != 0.0f || task.teacher_softcap != 0.0f;
  const int64_t rows = (task.teacher_gradient.data ? 4 : models) + (capped ? models : 0);
  return rows * padded(task.vocabulary) + 2 * block_count(task.vocabulary);
}

// Rows [begin, end) of the task; null when the build has no kernel of that name.
using RowKernel = void (*)(const RowTask&, int64_t begin, int64_t end, float* scratch);
RowKernel row_kernel_default(const char* divergence);
#ifdef FDISTILL_X86
RowKernel row_kernel_avx2(const char* divergence);
RowKernel row_kernel_avx512(const char* divergence);
#endif

// Floats of scratch: three blocks, the ids, and where each block's begin.
inline int64_t rest_scratch_floats(const RestTask& task) {
  return 3 * kBlock + task.list_size + block_count(task.vocabulary) + 1;
}

// The same for rows beside a list.
using RestKernel = void (*)(const RestTask&, int64_t begin, int64_t end, float* scratch);
RestKernel rest_kernel_default();
#ifdef FDISTILL_X86
RestKernel rest_kernel_avx2();
RestKernel rest_kernel_avx512();
#endif

}  // namespace fdistill
