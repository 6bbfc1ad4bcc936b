// The library's plain C interface: a RowTask, how to cut it, and a stream. Built by nvcc for sm_90a; built by a C++
// compiler, the same calls run the same kernels on the CPU.
#include <dlfcn.h>

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
  FDISTILL_FOR_EACH_DIVERGENCE_OF_GPUS(FDISTILL_FIND)
#undef FDISTILL_FIND
  return nullptr;
}

constexpr const char* kNoRoom = "the card holds no such cluster";

size_t shared_bytes(const RowTask& task, const Launch& launch) {
  const size_t models = task.teacher.data ? 2 : 1;
  return sizeof(Shared) + models * launch.depth * sizeof(Raw) * launch.threads;
}

}  // namespace fdistill

extern "C" {

// 1 more with every change of RowTask, Launch or the kernels' names that a caller must know of.
int fdistill_cuda_interface() { return 9; }

const char* fdistill_cuda_architectures() { return FDISTILL_ARCHITECTURES; }

// Null, or why nothing of this library can run with this machine's driver.
const char* fdistill_cuda_trouble();

// Null when the rows are under way on the stream, or what went wrong; kNoRoom: nothing, but the card holds no such cluster.
const char* fdistill_cuda_divergence_rows(const char* divergence, const fdistill::RowTask* task,
                                     const fdistill::Launch* launch, void* stream);
}

#ifdef __CUDACC__
#include <map>
#include <mutex>
#include <tuple>

namespace fdistill {

// Readies a kernel for a launch; how many of its clusters the card holds at a time.
cudaError_t resident_clusters(const void* function, const cudaLaunchConfig_t& config, const Launch& launch, int* count) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int, size_t>, int> known;  // asking takes longer than a small call
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, fresh] = known.try_emplace({device, function, launch.cluster, launch.threads, config.dynamicSmemBytes}, -1);
  if (entry->second < 0) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10);
    if (error == cudaSuccess && launch.cluster > 8)
      error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&entry->second, function, &config);
    if (error != cudaSuccess) known.erase(entry);
  }
  if (error == cudaSuccess) *count = entry->second;
  return error;
}

}  // namespace fdistill

const char* fdistill_cuda_trouble() {
  // the driver's own function, not the runtime's, which would start CUDA: a child forked later could not use it
  void* library = dlopen("libcuda.so.1", RTLD_LAZY);
  const auto version = library ? reinterpret_cast<int (*)(int*)>(dlsym(library, "cuDriverGetVersion")) : nullptr;
  int driver = 0;
  if (!version || version(&driver)) return "there is no CUDA driver";
  static char text[128];
  snprintf(text, sizeof(text), "the driver supports CUDA %d.%d, the library is of CUDA %d.%d", driver / 1000,
           driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  return driver / 1000 < CUDART_VERSION / 1000 ? text : nullptr;
}

const char* fdistill_cuda_divergence_rows(const char* divergence, const fdistill::RowTask* task,
                                     const fdistill::Launch* launch, void* stream) {
  const fdistill::Kernel kernel = fdistill::find_kernel(divergence, task->scalar);
  if (!kernel) return "there is no such kernel";
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = launch->cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch->cluster);
  config.blockDim = dim3(launch->threads);
  config.dynamicSmemBytes = fdistill::shared_bytes(*task, *launch);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int resident = 0;
  cudaError_t error = fdistill::resident_clusters(reinterpret_cast<const void*>(kernel), config, *launch, &resident);
  if (error == cudaSuccess && resident == 0) return fdistill::kNoRoom;
  const int64_t clusters = task->row_count < resident ? task->row_count : resident;  // persistent: each for many rows
  config.gridDim.x = static_cast<unsigned>(launch->cluster * clusters);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, *task, *launch);
  if (error != cudaSuccess) cudaGetLastError();  // ours is told here, and not to the next caller
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else

const char* fdistill_cuda_trouble() { return nullptr; }

const char* fdistill_cuda_divergence_rows(const char* divergence, const fdistill::RowTask* task,
                                     const fdistill::Launch* launch, void*) {
  const fdistill::Kernel kernel = fdistill::find_kernel(divergence, task->scalar);
  if (!kernel) return "there is no such kernel";
  if (launch->cluster > 16) return fdistill::kNoRoom;
  return fdistill::emulate([=] { kernel(*task, *launch); }, *launch, fdistill::shared_bytes(*task, *launch));
}

#endif
