#define FDISTILL_ISA isa_avx2
#include "row_kernel.inc"

namespace fdistill {
RowKernel row_kernel_avx2(const char* divergence) { return isa_avx2::find(divergence); }
RestKernel rest_kernel_avx2() { return isa_avx2::run_rest; }
}  // namespace fdistill
