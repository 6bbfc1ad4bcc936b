#define FDISTILL_ISA isa_default
#include "row_kernel.inc"

namespace fdistill {
RowKernel row_kernel_default(const char* divergence) { return isa_default::find(divergence); }
RestKernel rest_kernel_default() { return isa_default::run_rest; }
}  // namespace fdistill
