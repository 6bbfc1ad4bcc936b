// The CPU row kernels' C interface: a task, whose pointers Python has checked, to the kernel of an instruction set.
#include <cstdlib>
#include <cstring>
#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef FDISTILL_X86
#include <xmmintrin.h>
#endif

#include "parallel.h"
#include "row_kernel.h"

namespace {

fdistill::Kernels find_kernels(const char* instruction_set, const char* divergence) {
#ifdef FDISTILL_X86
  if (!std::strcmp(instruction_set, "AVX512")) return fdistill::isa_avx512::kernels_of(divergence);
  if (!std::strcmp(instruction_set, "AVX2")) return fdistill::isa_avx2::kernels_of(divergence);
#endif
  return fdistill::isa_default::kernels_of(divergence);
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// While it lives, subnormal numbers are 0 in its thread, as on GPUs: arithmetic with them takes a hundred times longer, in
// the products with a gradient, too.
class WithoutSubnormals {
#ifdef FDISTILL_X86
 public:
  explicit WithoutSubnormals(bool asked) : before_(_mm_getcsr()) {
    constexpr unsigned kResultsAndInputs = 0x8040;
    if (asked) _mm_setcsr(before_ | kResultsAndInputs);
  }
  WithoutSubnormals(const WithoutSubnormals&) = delete;
  ~WithoutSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
 public:
  explicit WithoutSubnormals(bool) {}
#endif
};

struct ForThread {
  std::unique_ptr<float, Free> scratch;
  WithoutSubnormals without;
};

// kernel(task, begin, end, scratch), one of `kernels`, on pieces of `of`'s rows, enough of them to be worth a thread; null,
// or what went wrong.
template <typename Kernel, typename Task, typename Rows>
const char* run_rows(const fdistill::Kernels& kernels, const Kernel& kernel, const Task& task, const Rows& of, int threads) {
  const int64_t vocabulary = of.vocabulary > 0 ? of.vocabulary : 1;
  const int64_t shared = (of.row_count + 4 * threads - 1) / (4 * threads), small = 16384 / vocabulary;
  const int64_t grain = shared > small ? shared : small > 0 ? small : 1;
  const size_t bytes = (fdistill::scratch_floats(task) * sizeof(float) + 63) / 64 * 64;
  std::atomic<bool> failed{false};
  const auto start = [&] {
    float* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
    return ForThread{std::unique_ptr<float, Free>(memory), WithoutSubnormals(kernels.flushes)};
  };
  fdistill::for_pieces((of.row_count + grain - 1) / grain, threads, start, [&](const ForThread& mine, int64_t piece) {
    const int64_t begin = piece * grain, end = begin + grain < of.row_count ? begin + grain : of.row_count;
    if (mine.scratch) kernel(task, begin, end, mine.scratch.get());
    else failed = true;
  });
  return failed ? "no memory for a row" : nullptr;
}

}  // namespace

extern "C" {

// Goes up with every change of what Python hands over.
__attribute__((visibility("default"))) int fdistill_cpu_interface() { return 7; }

// Null, or what went wrong. instruction_set: as torch names what this CPU has.
__attribute__((visibility("default"))) const char* fdistill_cpu_divergence_rows(
    const char* instruction_set, const char* divergence, const fdistill::RowTask* task, int threads) {
  const auto kernels = find_kernels(instruction_set, divergence);
  return kernels.row ? run_rows(kernels, kernels.row, *task, *task, threads) : "there is no such kernel";
}

__attribute__((visibility("default"))) const char* fdistill_cpu_rest_rows(
    const char* instruction_set, const fdistill::RestTask* task, int threads) {
  const auto kernels = find_kernels(instruction_set, "");
  return run_rows(kernels, kernels.rest, *task, *task, threads);
}

__attribute__((visibility("default"))) const char* fdistill_cpu_list_rows(
    const char* instruction_set, const char* divergence, const fdistill::ListTask* task, int threads) {
  const auto kernels = find_kernels(instruction_set, divergence);
  const auto rows = [&](const auto& of, int64_t begin, int64_t end, float* scratch) {
    kernels.list(of, kernels.row, begin, end, scratch);
  };
  return kernels.row ? run_rows(kernels, rows, *task, task->row, threads) : "there is no such kernel";
}

// A fresh N x V tensor costs a page fault every 4 KiB, more time than its arithmetic; 2 MiB pages cost 512 times fewer.
__attribute__((visibility("default"))) void fdistill_cpu_large_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // extern "C"
