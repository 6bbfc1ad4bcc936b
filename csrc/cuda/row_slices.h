// A block's slices of rows: on their way into shared memory, made ready for the passes, taken into registers, and written.
#pragma once

#include "row_state.h"

namespace fdistill {

template <typename scalar_t, int kModels>
struct RowSlices {
  static constexpr bool kTeacher = kModels == 2;
  static constexpr int kSize = Vector<scalar_t>::size;
  using Vec = Vector<scalar_t>;

  const RowTask& task;
  const Launch& launch;
  Shared& shared;
  Raw* const slices;  // [models][depth * threads]
  int deep = 0;       // vectors of a lane of my warp, in this row
  const int vocabulary;

  FDISTILL_DEVICE RowSlices(const RowTask& task, const Launch& launch)
      : task(task), launch(launch), shared(*reinterpret_cast<Shared*>(shared_memory())),
        slices(reinterpret_cast<Raw*>(&shared + 1)), vocabulary(static_cast<int>(task.vocabulary)) {}

  // The student's slice, and so many vectors on the teacher's.
  FDISTILL_DEVICE Raw* logits() const { return slices; }
  FDISTILL_DEVICE int room() const { return launch.depth * threads(); }

  FDISTILL_DEVICE void start() {
    for (int v = thread(); v < kModels * room(); v += threads())  // what no slice reaches stays so
      for (uint32_t& word : slices[v].word) word = Vec::lowest;
    if (thread() == 0) {
      for (Barrier& barrier : shared.arrived) start_barrier(&barrier);
      for (Barrier& barrier : shared.met) start_barrier(&barrier);
    }
    warp_barrier();  // a cluster's barrier wants whole warps
    before_copies();
    cluster_barrier();
  }

  // Where row n is, and what of it is this block's slice.
  FDISTILL_DEVICE void place(uint32_t n, Row& row) const {
    const uint32_t inner = static_cast<uint32_t>(task.student.inner);
    const auto at = [&](const Rows& rows) {
      return static_cast<scalar_t*>(rows.data) + n / inner * rows.outer_stride + n % inner * rows.inner_stride;
    };
    row.shift = reinterpret_cast<uintptr_t>(at(task.student)) % sizeof(Raw) / sizeof(scalar_t);
    const auto slice = [&](const Rows& rows) { return reinterpret_cast<Raw*>(at(rows) - row.shift) + begin(); };
    row.student = slice(task.student), row.gradient = slice(task.student_gradient);
    if (kTeacher) row.teacher = slice(task.teacher);
    const auto until = [&](int entry) {  // vectors of the slice until there
      const int vectors = entry / kSize - begin();
      return vectors < 0 ? 0 : vectors < launch.slice ? vectors : launch.slice;
    };
    row.count = until(row.shift + vocabulary + kSize - 1);
    row.whole.first = rank() == 0 && row.shift != 0;
    const int whole = until(row.shift + vocabulary) - row.whole.first;
    row.whole.count = whole < 0 ? 0 : whole;
  }

  // The first vector of this block's slices.
  FDISTILL_DEVICE int begin() const { return rank() * launch.slice; }

  // Each of the first threads carries a fact of a row as it lies in memory, and of a label the low half. Nothing looks at
  // it before `announce`, so that no thread waits for it.
  FDISTILL_DEVICE float fact_of(uint32_t n) const {
    const void* const facts[kFacts] = {task.row_scale, kTeacher ? task.student_inverse_temperature : nullptr,
                                       kTeacher ? task.teacher_inverse_temperature : nullptr,
                                       kTeacher ? task.divergence_scale : nullptr, task.labels};
    const float* fact = nullptr;
#pragma unroll
    for (int i = 0; i < kFacts; ++i)
      if (thread() == i) fact = static_cast<const float*>(facts[i]);
    return fact && n < task.row_count ? fact[thread() == kLabel ? 2 * static_cast<size_t>(n) : n] : 1.0f;
  }

  // cap tanh(x / cap), by its series where 1 - 2 / (exp + 1) would cancel
  static FDISTILL_DEVICE float capped(float x, float cap) {
    if (cap == 0.0f) return x;
    const float t = x / cap, square = t * t;
    if (fabsf(t) < 0.0625f) return x - x * square * (1.0f / 3 - square * (2.0f / 15));
    return cap * (1.0f - 2.0f / (exp2f(t * (2 * kLog2E)) + 1.0f));
  }

  // Writes down row n, whose facts the first threads carry; for the first warp.
  FDISTILL_DEVICE void announce(int at, uint32_t n, float fact) {
    if (n >= task.row_count) return;
    Row& row = shared.rows[at];
    if (thread() == kLabel) {
      int32_t label;
      memcpy(&label, &fact, sizeof(label));
      fact = task.labels && label >= 0 && label < vocabulary ? static_cast<float>(label) : -1.0f;  // no other is read
    }
    if (thread() < kFacts) (&row.scale)[thread()] = fact;
    if (thread() == 0) place(n, row);
  }

  // My warp's vectors of a row.
  FDISTILL_DEVICE int vectors_of(const Row& row) const {
    const int most = launch.depth * kWarp, count = row.count - thread() / kWarp * most;
    return count < 0 ? 0 : count < most ? count : most;
  }

  // Calls for my warp's part of row n's slices; of an ignored row nothing comes, at once.
  FDISTILL_DEVICE void fetch(int at, uint32_t n) {
    if (n >= task.row_count || thread() % kWarp != 0) return;
    const Row& row = shared.rows[at];
    const int first = vector(0), mine = row.scale == 0.0f ? 0 : vectors_of(row);
    Barrier* const arrived = &shared.arrived[thread() / kWarp];
    expect(arrived, kModels * mine * sizeof(Raw));
    if (mine == 0) return;
#pragma unroll
    for (int model = 0; model < kModels; ++model)
      copy(slices + model * room() + first, (model && row.has_teacher() ? row.teacher : row.student) + first,
           mine * sizeof(Raw), arrived);
  }

  // My k-th vector of a slice. A warp's lie together: k then moves an address by a constant.
  FDISTILL_DEVICE int vector(int k) const { return thread() / kWarp * launch.depth * kWarp + thread() % kWarp + k * kWarp; }

  // body(k) for each of my vectors; two at a time, so that some of their instructions wait for nothing.
  template <typename Body>
  FDISTILL_DEVICE void for_vectors(const Body& body) const {
#pragma unroll 2
    for (int k = 0; k < deep; ++k) body(k);
  }

  // The entry that the first of a vector of mine is; below 0, or beyond the vocabulary, it is not of this row.
  FDISTILL_DEVICE int entry_of(int vector, const Row& row) const { return (begin() + vector) * kSize - row.shift; }
  FDISTILL_DEVICE bool is_entry(int entry) const { return entry >= 0 && entry < vocabulary; }

  // Makes the row's slices what the sweeps read: nothing but this row, its logits capped. Each thread touches
  // no vector but those that it alone reads.
  FDISTILL_DEVICE void prepare(Raw* logits, const Row& row) const {
    // every row fills the same whole vectors: around them all is as it was at the start
    if (launch.aligned && vocabulary % kSize == 0 && task.student_softcap == 0.0f && task.teacher_softcap == 0.0f) return;
    bool changed = false;
#pragma unroll 1
    for (int k = 0; k < launch.depth; ++k) {
      const int v = vector(k), entry = entry_of(v, row);
      if (v >= launch.slice) break;
#pragma unroll
      for (int model = 0; model < kModels; ++model) {
        const float cap = model && row.has_teacher() ? task.teacher_softcap : task.student_softcap;
        if (row.whole.holds(v) && cap == 0.0f) continue;
        Raw& raw = logits[model * room() + v];
        float x[kSize];
        Vec::widen(raw, x);
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          x[i] = v < row.count && is_entry(entry + i) ? capped(x[i], cap) : -INFINITY;
        raw = Vec::narrow(x);
        changed = true;
      }
    }
    if (changed) before_copies();  // only here, since it waits for a thread's earlier stores, gradients too
  }

  // The row's logits from memory, as `prepare` leaves them, in place of what a sweep has made of them.
  FDISTILL_DEVICE void read_again(const Row& row, Raw* logits) const {
#pragma unroll 1
    for (int k = 0; k < deep; ++k) {
      const int v = vector(k);
      if (v >= row.count) break;
#pragma unroll
      for (int model = 0; model < kModels; ++model)
        logits[model * room() + v] = (model && row.has_teacher() ? row.teacher : row.student)[v];
    }
    prepare(logits, row);
    before_copies();
  }

  // Of a vector what is of this row. whole: the row's, in registers.
  FDISTILL_DEVICE void store(Raw* to, int v, const Row& row, const Span& whole, const Raw& raw) const {
    if (whole.holds(v)) return store_streaming(to, raw);
    if (v >= row.count) return;
    const int entry = entry_of(v, row);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (is_entry(entry + i)) reinterpret_cast<scalar_t*>(to)[i] = Vec::entry(raw, i);
  }
};

}  // namespace fdistill
