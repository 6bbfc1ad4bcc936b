// The library's plain C interface: a RowTask, how to cut it, and a stream. Built by nvcc for sm_90a; built by a C++
// compiler, the same calls run the same kernels on the CPU.
#include <cstdio>
#include <cstring>

#include "row_kernel.h"

namespace fdistill {

using Kernel = void (*)(const RowTask, const Launch);

template <typename Divergence>
Kernel of_scalar(Scalar scalar) {
  switch (scalar) {
    case Scalar::kFloat: return row_kernel<Divergence, float>;
    case Scalar::kBFloat16: return row_kernel<Divergence, BFloat16>;
    case Scalar::kHalf: return row_kernel<Divergence, Half>;
  }
  return nullptr;
}

Kernel find_kernel(const char* divergence, Scalar scalar) {
  if (!*divergence) return of_scalar<void>(scalar);
#define FDISTILL_FIND(Name) \
  if (!strcmp(divergence, #Name)) return of_scalar<Name>(scalar);
  FDISTILL_FOR_EACH_DIVERGENCE(FDISTILL_FIND)
#undef FDISTILL_FIND
  return nullptr;
}

size_t shared_bytes(const RowTask& task, const Launch& launch) {
  const size_t models = task.teacher.data ? 2 : 1, scalar = task.scalar == Scalar::kFloat ? 4 : 2;
  return launch.stages * models * kHeld * scalar * launch.threads +
         sizeof(float) * 2 * launch.cluster * (launch.threads / kWarp) * kSlot +
         launch.stages * (sizeof(Barrier) + sizeof(Facts));
}

}  // namespace fdistill

extern "C" {

// 1 with every change of RowTask or Launch that a caller must know of.
int fdistill_interface() { return 1; }

const char* fdistill_architectures() { return FDISTILL_ARCHITECTURES; }

// Null when the rows are under way on the stream, or what went wrong.
const char* fdistill_divergence_rows(const char* divergence, const fdistill::RowTask* task,
                                     const fdistill::Launch* launch, void* stream);
}

#ifdef __CUDACC__

const char* fdistill_divergence_rows(const char* divergence, const fdistill::RowTask* task,
                                     const fdistill::Launch* launch, void* stream) {
  const fdistill::Kernel kernel = fdistill::find_kernel(divergence, task->scalar);
  if (!kernel) return "there is no such kernel";
  const size_t shared = fdistill::shared_bytes(*task, *launch);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = launch->cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch->cluster);
  config.blockDim = dim3(launch->threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess && launch->cluster > 8)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  int resident = 0;  // as many clusters as the card holds at a time, each for many rows
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&resident, function, &config);
  if (error == cudaSuccess && resident == 0) return "the card holds no such cluster";
  if (resident > task->row_count) resident = static_cast<int>(task->row_count);
  config.gridDim.x = launch->cluster * resident;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, *task, *launch);
  if (error != cudaSuccess) cudaGetLastError();  // ours is told here, and not to the next caller
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else

const char* fdistill_divergence_rows(const char* divergence, const fdistill::RowTask* task,
                                     const fdistill::Launch* launch, void*) {
  const fdistill::Kernel kernel = fdistill::find_kernel(divergence, task->scalar);
  if (!kernel) return "there is no such kernel";
  return fdistill::emulate([=] { kernel(*task, *launch); }, *launch, fdistill::shared_bytes(*task, *launch));
}

#endif
