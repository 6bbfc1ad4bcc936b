// The native operator: tensors in, RowTask out to the widest kernel this CPU runs. Whoever calls it, no pointer is taken
// of a tensor whose type, length and strides have not been looked at.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "row_kernel.h"

namespace {

using at::Tensor;
using std::optional;

fdistill::RowKernel find_kernel(const std::string& divergence) {
#ifdef FDISTILL_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return fdistill::row_kernel_avx512(divergence.c_str());
  if (capability == "AVX2") return fdistill::row_kernel_avx2(divergence.c_str());
#endif
  return fdistill::row_kernel_default(divergence.c_str());
}

fdistill::Rows rows_of(const optional<Tensor>& rows) {
  if (!rows) return {};
  return {rows->data_ptr(), std::max<int64_t>(rows->size(1), 1), rows->stride(0), rows->stride(1)};
}

void check_rows(const char* name, const Tensor& rows, const Tensor& like) {
  TORCH_CHECK_VALUE(rows.layout() == at::kStrided && rows.device().is_cpu() && rows.dim() == 3 &&
                        rows.sizes() == like.sizes() && rows.scalar_type() == like.scalar_type() &&
                        (rows.size(2) <= 1 || rows.stride(2) == 1),
                    name, " must be rows (outer, inner, V) as the student's, dense in V");
}

// A vector of `count` entries, or null for one not given.
template <typename T>
const T* pointer(const char* name, const optional<Tensor>& tensor, int64_t count) {
  if (!tensor) return nullptr;
  TORCH_CHECK_VALUE(tensor->layout() == at::kStrided && tensor->device().is_cpu() && tensor->is_contiguous() &&
                        tensor->scalar_type() == c10::CppTypeToScalarType<T>::value && tensor->numel() == count,
                    name, " must be ", count, " dense entries of ", c10::CppTypeToScalarType<T>::value,
                    " on the CPU, not ", tensor->sizes(), " of ", tensor->scalar_type());
  return tensor->const_data_ptr<T>();
}

// Labels are indices into a row: those of rows that count must be inside.
void check_labels(const fdistill::RowTask& task) {
  if (!task.labels) return;
  for (int64_t n = 0; n < task.row_count; ++n)
    TORCH_CHECK_VALUE(task.row_scale[n] == 0.0f || (0 <= task.labels[n] && task.labels[n] < task.vocabulary),
                      "labels must be in [0, ", task.vocabulary, "), but hold ", task.labels[n]);
}

// A fresh N x V tensor costs a page fault every 4 KiB, more time than its arithmetic; 2 MiB pages cost 512 times fewer.
Tensor empty_in_large_pages(const Tensor& like, at::IntArrayRef sizes) {
  Tensor gradient = at::empty(sizes, like.options(), at::MemoryFormat::Contiguous);
#ifdef __linux__
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(gradient.data_ptr()) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(gradient.data_ptr()) + gradient.nbytes()) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return gradient;
}

fdistill::Scalar scalar_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat: return fdistill::Scalar::kFloat;
    case at::kBFloat16: return fdistill::Scalar::kBFloat16;
    case at::kHalf: return fdistill::Scalar::kHalf;
    default: TORCH_CHECK(false, "the cpu backend takes float32, bfloat16 and float16, not ", logits.scalar_type());
  }
}

// Logits (outer, inner, V) with a dense last dimension; vectors of outer * inner rows; parts (3, rows) back.
std::tuple<Tensor, Tensor, Tensor> divergence_rows(
    const Tensor& student, const optional<Tensor>& teacher, const Tensor& row_scale,
    const Tensor& student_inverse_temperature, const Tensor& teacher_inverse_temperature,
    const Tensor& divergence_scale, const Tensor& cross_entropy_scale, const Tensor& z_loss_scale,
    const optional<Tensor>& labels, const optional<Tensor>& class_weight, const std::string& divergence,
    double parameter, double label_smoothing, bool student_gradient_wanted, bool teacher_gradient_wanted, bool inplace,
    double student_softcap, double teacher_softcap) {
  const fdistill::RowKernel kernel = find_kernel(divergence);
  TORCH_CHECK(kernel, "the cpu backend has no kernel named '", divergence, "'");
  check_rows("student", student, student);
  if (teacher) check_rows("teacher", *teacher, student);
  TORCH_CHECK_VALUE(divergence.empty() ? labels.has_value() : teacher.has_value(),
                    "a divergence needs a teacher, and a loss without one labels");
  TORCH_CHECK_VALUE(!teacher_gradient_wanted || teacher, "there is no teacher to make a gradient for");
  const int64_t row_count = student.size(0) * student.size(1), vocabulary = student.size(2);

  Tensor parts = at::empty({3, row_count}, student.options().dtype(at::kFloat));
  optional<Tensor> student_gradient, teacher_gradient;
  if (student_gradient_wanted) student_gradient = inplace ? student : empty_in_large_pages(student, student.sizes());
  if (teacher_gradient_wanted) teacher_gradient = empty_in_large_pages(*teacher, teacher->sizes());

  fdistill::RowTask task{};
  task.scalar = scalar_of(student);
  task.row_count = row_count;
  task.vocabulary = vocabulary;
  task.student = rows_of(student);
  task.teacher = rows_of(teacher);
  task.student_gradient = rows_of(student_gradient);
  task.teacher_gradient = rows_of(teacher_gradient);
  task.row_scale = pointer<float>("row_scale", row_scale, row_count);
  task.student_inverse_temperature =
      pointer<float>("student_inverse_temperature", student_inverse_temperature, row_count);
  task.teacher_inverse_temperature =
      pointer<float>("teacher_inverse_temperature", teacher_inverse_temperature, row_count);
  task.divergence_scale = pointer<float>("divergence_scale", divergence_scale, row_count);
  task.cross_entropy_scale = pointer<float>("cross_entropy_scale", cross_entropy_scale, row_count);
  task.z_loss_scale = pointer<float>("z_loss_scale", z_loss_scale, row_count);
  task.parameter = static_cast<float>(parameter);
  task.labels = pointer<int64_t>("labels", labels, row_count);
  task.class_weight = pointer<float>("class_weight", class_weight, vocabulary);
  task.label_smoothing = static_cast<float>(label_smoothing);
  if (label_smoothing != 0.0)
    task.class_weight_sum = class_weight ? class_weight->sum().item<float>() : static_cast<float>(vocabulary);
  task.student_softcap = static_cast<float>(student_softcap);
  task.teacher_softcap = static_cast<float>(teacher_softcap);
  check_labels(task);
  task.parts = parts.mutable_data_ptr<float>();

  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(task.vocabulary, 1));
  at::parallel_for(0, row_count, grain, [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({fdistill::scratch_floats(task)}, at::kFloat);
    kernel(task, begin, end, scratch.mutable_data_ptr<float>());
  });
  const auto none = [&] { return at::empty({0}, student.options()); };
  return {parts, student_gradient && !inplace ? *student_gradient : none(),
          teacher_gradient ? *teacher_gradient : none()};
}

std::string capability() { return at::get_cpu_capability(); }

}  // namespace

TORCH_LIBRARY(fdistill_native, library) {
  library.def(
      "divergence_rows(Tensor(a!) student, Tensor(b!)? teacher, Tensor row_scale, Tensor student_inverse_temperature, "
      "Tensor teacher_inverse_temperature, Tensor divergence_scale, Tensor cross_entropy_scale, Tensor z_loss_scale, "
      "Tensor? labels, Tensor? class_weight, str divergence, float parameter, float label_smoothing, "
      "bool student_gradient, bool teacher_gradient, bool inplace, float student_softcap, float teacher_softcap) -> (Tensor, Tensor, Tensor)");
  library.impl("divergence_rows", c10::DispatchKey::CPU, TORCH_FN(divergence_rows));
  library.def("empty_in_large_pages(Tensor like, int[] sizes) -> Tensor");
  library.impl("empty_in_large_pages", c10::DispatchKey::CPU, TORCH_FN(empty_in_large_pages));
  library.def("capability() -> str", &capability);
}
