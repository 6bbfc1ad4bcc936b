// The row kernel over vector.h, built once for each instruction set, in a namespace of its own, FDISTILL_ISA.
//
// A row of logits is read from memory once; every later pass finds it in cache:
//   1  q and p, block by block, as exp(z - the block's maximum), and their sums
//      (and the statistics of the row, for divergences that ask for them)
//   2  the divergence's terms, D and S        3  the gradients
// `centred` divergences (S = 0) run pass 3 on each block right behind pass 2, but where models nearly agree.
#include "row_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#include "../row_divergences.h"
#include "vector.h"

namespace fdistill {
namespace FDISTILL_ISA {

#include "softmax.inc"
#include "labels.inc"
#include "entries.inc"
#include "rest.inc"

// A model's term, measured from its value at the model's peak, whose own is 0: sum(term) then has its digits where one
// entry has nearly all the mass, and those of the others are far above its.
struct Term {
  float u_at_peak = 0, at_peak = 0;  // the term per probability there
  int64_t peak = 0;
  float* row = nullptr;
  double total = 0;

  FDISTILL_INLINE Vec measured(const Vec& term, const Vec& probability) const {
    return term - probability * Vec(at_peak);
  }

  // `entry`: the vector around the peak, with this term's model as the student.
  template <typename Divergence>
  void measure_from(const Entry<Vec, true>& entry, const Parameter& parameter) {
    at_peak = (Divergence::terms(entry, parameter).student / entry.q).lanes[peak % kLanes];
  }

  // A block of the row is there, and its sum.
  void add(int64_t begin, int64_t end, double sum) {
    total += sum;
    if (peak < begin || peak >= end) return;
    total -= row[peak];
    row[peak] = 0;
  }
};

template <typename scalar_t>
void skip_row(const RowTask& task, int64_t n) {
  for (int part = 0; part < (task.metrics ? 9 : 3); ++part) task.parts[part * task.row_count + n] = 0.0f;
  for (const Rows* rows : {&task.student_gradient, &task.teacher_gradient})
    if (scalar_t* gradient = gradient_row<scalar_t>(*rows, n))
      std::memset(static_cast<void*>(gradient), 0, task.vocabulary * sizeof(scalar_t));
}

// A row whose divergence weighs nothing, not even where it is infinite; its metrics are there.
void without_divergence(RowTask task, int64_t n, const float* student, float* scratch) {
  const Rows of_student = task.student_gradient;
  task.metrics = 0;
  if (task.labels) task.student_gradient.data = nullptr;  // it may be where the logits are, which are still needed
  skip_row<float>(task, n);
  task.student_gradient = of_student;
  if (task.labels) cross_entropy_row(task, n, student, scratch);
}

template <typename Divergence>
void divergence_row(const RowTask& task, int64_t n, const LogitRow& student_row, const LogitRow& teacher_row,
                    float* scratch) {
  const float *student_logits = student_row.logits, *teacher_logits = teacher_row.logits;
  using Exchanged = typename Divergence::Exchanged;
  const int64_t vocabulary = task.vocabulary, stride = padded(vocabulary);
  float* student_gradient = gradient_row<float>(task.student_gradient, n);
  float* teacher_gradient = gradient_row<float>(task.teacher_gradient, n);
  float* q_row = scratch;
  float* p_row = scratch + stride;
  float* q_factors = scratch + (teacher_gradient ? 4 : 2) * stride;
  float* p_factors = q_factors + block_count(vocabulary);

  const Parameter parameter = task.parameter, exchanged_parameter = task.exchanged;  // copies: no store changes them
  const float scale = task.row_scale[n];
  const float student_scale = scale * task.divergence_scale[n] * task.student_inverse_temperature[n];
  LabelTerms label_values;
  const LabelTerms* labels = nullptr;
  const Softmax student = softmax_of(student_row, vocabulary, task.student_inverse_temperature[n], q_row, q_factors);
  if (task.labels) {
    label_values = labels_of(task, student_logits, student, p_row, p_factors, n);
    labels = &label_values;
  }
  RowMetrics metrics;
  if (task.metrics) {
    const bool tempered = student.inverse_temperature != 1.0f;
    metrics.of_labels(task, n, student_logits,
                      labels     ? labels->model
                      : tempered ? softmax_of(student_logits, vocabulary, 1.0f, p_row, p_factors)
                                 : student);
  }
  const Softmax teacher = softmax_of(teacher_row, vocabulary, task.teacher_inverse_temperature[n], p_row, p_factors);
  constexpr Members members = Divergence::members;
  Entries entries(student_logits, teacher_logits, vocabulary, student, teacher);
  if (task.metrics) {
    metrics.of_models(vocabulary, [&](int64_t v, int64_t count, int64_t begin) {
      return entries.template at<Members::kNone, false>(v, count, Vec(teacher.factor(begin)),
                                                        Vec(student.factor(begin)), 0.0f);
    });
    metrics.agreement = student.peak == teacher.peak;
    metrics.write(task, n);
  }
  if (scale * task.divergence_scale[n] == 0.0f) return without_divergence(task, n, student_logits, scratch);
  Term of_student, of_teacher;
  of_student.row = teacher_gradient ? scratch + 2 * stride : p_row;  // p is not needed again
  of_student.peak = student.peak;
  of_student.u_at_peak = entries.log_ratio_at(student.peak);
  if constexpr (Divergence::asks)
    ask_row<Divergence>(task, n, &entries, of_student.u_at_peak, entries.log_ratio_at(teacher.peak));
  const bool close = teacher_gradient || are_close(of_student.u_at_peak);  // trained teachers have one form of the passes
  // sum(term) is 0 but for the rounding of the softmaxes' sums, which models that nearly agree would feel
  const bool direct = Divergence::centred && !close;
  if (!direct && student_gradient)
    of_student.measure_from<Divergence>(entries.template around<members>(student.peak, of_student.u_at_peak), parameter);
  if (teacher_gradient) {
    of_teacher.row = scratch + 3 * stride;
    of_teacher.peak = teacher.peak;
    of_teacher.u_at_peak = entries.log_ratio_at(teacher.peak);
    of_teacher.measure_from<Exchanged>(entries.template around<members>(teacher.peak, 0.0f).exchanged(of_teacher.u_at_peak),
                                       exchanged_parameter);
  }

  // Pass 2 on a block; the value's sum. `last`: it writes the gradient too, and leaves no terms.
  const auto terms_of_block = [&](auto close, auto last, int64_t begin, int64_t end) {
    const Vec p_factor(teacher.factor(begin)), q_factor(student.factor(begin));
    double sums[3];  // of the value, and of both models' terms
    sums_of(begin, end, sums, [&](int64_t v, int64_t count, Vec(&sum)[3]) {
      const auto entry = entries.template at<members, close>(v, count, p_factor, q_factor, of_student.u_at_peak);
      const Terms<Vec> terms = Divergence::terms(entry, parameter);
      sum[0] = sum[0] + terms.value;
      if constexpr (last) {
        store(student_gradient + v, terms.student * Vec(student_scale), count);
        return;
      }
      if (!student_gradient && !teacher_gradient) return;
      entry.q.store(q_row + v);
      const Vec term = of_student.measured(terms.student, entry.q);
      sum[1] = sum[1] + term;
      if constexpr (close) {
        if (teacher_gradient) {
          entry.p.store(p_row + v);
          const auto exchanged = entry.exchanged(of_teacher.u_at_peak);
          const Vec other = of_teacher.measured(Exchanged::terms(exchanged, exchanged_parameter).student, entry.p);
          sum[2] = sum[2] + other;
          other.store(of_teacher.row + v);
        }
      }
      term.store(of_student.row + v);
    });
    if (!direct && student_gradient) of_student.add(begin, end, sums[1]);
    if (teacher_gradient) of_teacher.add(begin, end, sums[2]);
    return sums[0];
  };
  const bool in_one = direct && student_gradient && !labels && task.student_softcap == 0.0f;
  double divergence = 0;
  for_blocks(vocabulary, [&](int64_t begin, int64_t end) {
    const std::true_type yes;
    const std::false_type no;
    if (in_one) {
      if constexpr (Divergence::centred) divergence += terms_of_block(no, yes, begin, end);
      return;
    }
    divergence += close ? terms_of_block(yes, no, begin, end) : terms_of_block(no, no, begin, end);
    if (direct && student_gradient)
      write_gradient(task, student_gradient, student_logits, &student, of_student.row, student_scale, 0.0f, labels,
                     scale, task.student_softcap, begin, end);
  });

  task.parts[n] = scale * task.divergence_scale[n] * static_cast<float>(divergence);
  task.parts[task.row_count + n] = labels ? scale * labels->cross_entropy : 0.0f;
  task.parts[2 * task.row_count + n] = labels ? scale * labels->squared_lse : 0.0f;
  for_blocks(vocabulary, [&](int64_t begin, int64_t end) {
    if (!direct && student_gradient)
      write_gradient(task, student_gradient, student_logits, &student, of_student.row, student_scale,
                     static_cast<float>(of_student.total), labels, scale, task.student_softcap, begin, end);
    if (teacher_gradient)
      write_gradient(task, teacher_gradient, teacher_logits, &teacher, of_teacher.row,
                     scale * task.divergence_scale[n] * task.teacher_inverse_temperature[n],
                     static_cast<float>(of_teacher.total), nullptr, 0.0f, task.teacher_softcap, begin, end);
  });
}

#include "lists.inc"

template <typename Divergence>
void run_row(const RowTask& task, int64_t n, const LogitRow& student, const LogitRow& teacher, float* scratch) {
  if constexpr (std::is_void_v<Divergence>) {
    cross_entropy_row(task, n, student, scratch);
  } else {
    divergence_row<Divergence>(task, n, student, teacher, scratch);
  }
}

// A row of 16 bits, or one that is capped, by way of rows in float: gradients go where its logits are there, and are
// rounded from there.
template <typename scalar_t, typename Row>
void run_copied(const RowTask& task, int64_t n, const Row& row, const scalar_t* student, const scalar_t* teacher,
                float* scratch) {
  const int64_t stride = padded(task.vocabulary);
  float *copy = scratch, *other = scratch + stride, *rest = scratch + (teacher ? 2 : 1) * stride;
  RowTask copied = task;
  if (task.student_gradient.data) copied.student_gradient = {copy, 1, 0, 0};
  if (task.teacher_gradient.data) copied.teacher_gradient = {other, 1, 0, 0};
  row(copied, n, {student, task.student_softcap, copy}, {teacher, task.teacher_softcap, other}, rest);
  for (const auto& [rows, from] : {std::pair(&task.student_gradient, copy), std::pair(&task.teacher_gradient, other)})
    if (scalar_t* to = gradient_row<scalar_t>(*rows, n))
      for_vectors(0, task.vocabulary, [&, from = from](int64_t v, int64_t count) {
        store(to + v, load(from + v, count), count);
      });
}

template <typename scalar_t, typename Row>
void run_rows(const RowTask& task, int64_t begin, int64_t end, const Row& row, float* scratch) {
  for (int64_t n = begin; n < end; ++n) {
    const scalar_t* student = row_of<scalar_t>(task.student, n);
    const scalar_t* teacher = task.teacher.data ? row_of<scalar_t>(task.teacher, n) : nullptr;
    if (task.row_scale[n] == 0.0f) {
      skip_row<scalar_t>(task, n);
    } else if (is_copied(task)) {
      run_copied(task, n, row, student, teacher, scratch);
    } else if constexpr (std::is_same_v<scalar_t, float>) {
      row(task, n, student, teacher, scratch);
    }
  }
}

template <typename Divergence>
void run(const RowTask& task, int64_t begin, int64_t end, float* scratch) {
  const auto row = &run_row<Divergence>;
  switch (task.scalar) {
    case Scalar::kFloat: return run_rows<float>(task, begin, end, row, scratch);
    case Scalar::kBFloat16: return run_rows<BFloat16>(task, begin, end, row, scratch);
    case Scalar::kHalf: return run_rows<Half>(task, begin, end, row, scratch);
  }
}

RowKernel row_kernel_of(const char* divergence) {
  if (!*divergence) return run<void>;
#define FDISTILL_FIND(Name) \
  if (!std::strcmp(divergence, #Name)) return run<Name>;
  FDISTILL_FOR_EACH_DIVERGENCE(FDISTILL_FIND)
  FDISTILL_FOR_EACH_ROW_DIVERGENCE(FDISTILL_FIND)
#undef FDISTILL_FIND
  return nullptr;
}

Kernels kernels_of(const char* divergence) {
  return {row_kernel_of(divergence), run_rest, run_lists, kFlushes};
}

}  // namespace FDISTILL_ISA
}  // namespace fdistill
