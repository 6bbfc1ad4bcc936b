#define FDISTILL_ISA isa_avx512
#include "row_kernel.inc"

namespace fdistill {
RowKernel row_kernel_avx512(const char* divergence) { return isa_avx512::find(divergence); }
RestKernel rest_kernel_avx512() { return isa_avx512::run_rest; }
}  // namespace fdistill
