// The interface between rows.cpp and the builds of row_kernel.cpp.
#pragma once

#include "../rest_task.h"
#include "../row_task.h"

namespace fdistill {

// Entries that share one shift, and that are summed in float before the row's total in double: 8 KiB, a quarter of L1.
constexpr int64_t kBlock = 2048;

inline int64_t padded(int64_t vocabulary) { return (vocabulary + 63) / 64 * 64; }
inline int64_t block_count(int64_t vocabulary) { return (vocabulary + kBlock - 1) / kBlock; }

// Whether rows are taken as copies in float: for the one kernel, which so widens an entry once, not in every pass, and
// takes a third of three types' time to compile.
inline bool is_copied(const RowTask& task) {
  return task.scalar != Scalar::kFloat || task.student_softcap != 0.0f || task.teacher_softcap != 0.0f;
}

// Floats of scratch a thread needs: a row each of q, p and the divergence's two terms, of both models' logits where they
// are copied, and a factor a block of q and p.
inline int64_t scratch_floats(const RowTask& task) {
  const int64_t models = task.teacher.data ? 2 : 1;
  const int64_t rows = (task.teacher_gradient.data ? 4 : models) + (is_copied(task) ? models : 0);
  return rows * padded(task.vocabulary) + 2 * block_count(task.vocabulary);
}

// Floats of scratch: three blocks, the ids, and where each block's begin.
inline int64_t scratch_floats(const RestTask& task) {
  return 3 * kBlock + task.list_size + block_count(task.vocabulary) + 1;
}

// Floats of scratch: of whole rows both models', and the row kernel's; of categories the exponentials, the copied logits,
// the rest's (above), a factor a block, and the categories', with the row kernel's.
inline int64_t scratch_floats(const ListTask& task) {
  const int64_t row = padded(task.row.vocabulary), categories = padded(task.list_size + 1);
  const int64_t blocks = block_count(task.row.vocabulary);
  return 6 * row + 3 * kBlock + 8 * categories + 4 * blocks;
}

// What takes rows [begin, end) of a task; no `row` where the build has no divergence of that name. flushes: whether all
// is right where subnormal numbers are 0, as where instructions convert halves; the default build's own arithmetic is not.
using RowKernel = void (*)(const RowTask&, int64_t begin, int64_t end, float* scratch);
struct Kernels {
  RowKernel row;
  void (*rest)(const RestTask&, int64_t begin, int64_t end, float* scratch);
  void (*list)(const ListTask&, RowKernel, int64_t begin, int64_t end, float* scratch);
  bool flushes;
};

// Of each build, by its instruction set.
namespace isa_default { Kernels kernels_of(const char* divergence); }
namespace isa_avx2 { Kernels kernels_of(const char* divergence); }
namespace isa_avx512 { Kernels kernels_of(const char* divergence); }

}  // namespace fdistill
