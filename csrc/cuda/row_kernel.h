// The row kernel for Hopper: each logit is read from memory once, each gradient written once.
//
// A cluster of thread blocks takes a row at a time. The row is cut into 16-byte vectors and these into one slice a block;
// the copy engine brings a slice of the student's and of the teacher's logits into a stage of shared memory while earlier
// rows are worked on. A thread keeps its kHeld entries of both models in registers from the first exponential to the
// gradient, so that each is made once:
//     statistics   e = exp((z - the warp's top) / T), and their sums       the blocks of the cluster meet
//     totals       the divergence's terms; D and S                         they meet again
//     gradient     student term - q S, to memory
// Where S = 0 (`centred`) the gradient does not wait for the second meeting. In a meeting warps tell their block; its
// first warp, the speaker, tells every block, whose barrier counts the bytes, hears every block, and lets its own know.
// There is room for two meetings: who tells in the next has heard all in this one, and their speakers were done with the
// one before.
//
// The code is written once for the chip and for a CPU: hopper.cuh and emulation.h give the same names a meaning.
#pragma once

#include <cmath>
#include <type_traits>

#include "../row_task.h"
#ifdef __CUDACC__
#include "hopper.cuh"
#else
#include "emulation.h"
#endif

namespace fdistill {

constexpr int kWarp = 32, kMost = 16;  // lanes of a warp; the most warps of a block, and blocks of a cluster
constexpr int kHeld = 40;  // entries of a model in a thread's registers: as many as 128 registers hold without a spill
constexpr float kLog2E = 1.44269504f;

// How a call is cut; made by the caller. `slice`: vectors of a row that each block of the cluster takes; `depth`: that each
// thread takes; `aligned`: every row starts at a multiple of 16 bytes.
struct Launch {
  int32_t cluster, threads, depth, stages, slice, aligned;
};

template <typename scalar_t>
struct Vector {
  static constexpr int size = 8;
  static constexpr uint32_t lowest = std::is_same_v<scalar_t, Half> ? 0xfc00fc00 : 0xff80ff80;  // a pair of -inf
  static FDISTILL_DEVICE void widen(const Raw& raw, float (&x)[size]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) Pair<scalar_t>::widen(raw.word[i], x[2 * i], x[2 * i + 1]);
  }
  static FDISTILL_DEVICE Raw narrow(const float (&x)[size]) {
    Raw raw;
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.word[i] = Pair<scalar_t>::narrow(x[2 * i], x[2 * i + 1]);
    return raw;
  }
  static FDISTILL_DEVICE scalar_t entry(const Raw& raw, int i) {
    return {static_cast<uint16_t>(raw.word[i / 2] >> i % 2 * 16)};
  }
  static FDISTILL_DEVICE float top(const Raw& raw) {
    using P = Pair<scalar_t>;
    float low, high;
    P::widen(P::larger(P::larger(raw.word[0], raw.word[1]), P::larger(raw.word[2], raw.word[3])), low, high);
    return fmaxf(low, high);
  }
};

template <>
struct Vector<float> {
  static constexpr int size = 4;
  static constexpr uint32_t lowest = 0xff800000;
  static FDISTILL_DEVICE void widen(const Raw& raw, float (&x)[size]) { memcpy(x, &raw, sizeof(raw)); }
  static FDISTILL_DEVICE Raw narrow(const float (&x)[size]) {
    Raw raw;
    memcpy(&raw, x, sizeof(raw));
    return raw;
  }
  static FDISTILL_DEVICE float entry(const Raw& raw, int i) {
    float x[size];
    widen(raw, x);
    return x[i];
  }
  static FDISTILL_DEVICE float top(const Raw& raw) {
    float x[size];
    widen(raw, x);
    return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
  }
};

template <int lanes = kWarp>
FDISTILL_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = lanes / 2; mask; mask /= 2) x += from_lane(x, mask);
  return x;
}

template <int lanes = kWarp>
FDISTILL_DEVICE float warp_top(float x) {
#pragma unroll
  for (int mask = lanes / 2; mask; mask /= 2) x = fmaxf(x, from_lane(x, mask));
  return x;
}

// What is known of a row before its logits are there: facts that threads carry, and what of it is this block's.
struct Row {
  float scale, rate, other_rate, divergence_scale, label;  // a label below 2^24 is exact; -1: none
  uint32_t outer, inner;        // its indices, the same in every tensor of the call
  int32_t shift;                // entries before it in its first 16 bytes
  int32_t count, first, whole;  // vectors of the slice; of these from `first` on so many are all of this row
};
constexpr int kFacts = 5, kLabel = 4;

// A model's softmax, whole or in part: p = exp((z - top) rate) / total. A top starts from kLowest: finite, so that
// -inf - top is -inf.
struct Softmax {
  float top = kLowest, total = 0;
  FDISTILL_DEVICE float worth(float x, float rate) const { return exp2f((x - top) * (rate * kLog2E)); }
};

// What is told in the first meeting. Of the student's, what labels may need: `plain` is the sum of exp(z - top), `linear`
// that of z - top, over so many `entries`.
struct alignas(sizeof(Raw)) Statistics {
  Softmax student, teacher;
  float label_logit = 0, plain = 0, linear = 0, entries = 0;
  float other_at_top = -INFINITY;  // the teacher's logit at the student's top
};

// And in the second: shares of D and S.
struct alignas(sizeof(Raw)) Totals {
  float divergence = 0, weight = 0;
};

// A block's shared memory, before the stages.
struct Shared {
  static constexpr int most_stages = 3, message = sizeof(Statistics) / sizeof(Raw);
  Barrier arrived[most_stages];   // the slices are there
  Barrier met[2];                 // every block has been heard
  Row rows[most_stages];          // in the stages
  Raw told[message * kMost];      // by warps to their block
  Raw heard[2][message * kMost];  // of blocks, in two meetings
  Raw learnt[message];            // by everyone, of a meeting
};

// The gradient of a row: term * the divergence's + exponential * e + plain * exp(z - top) + constant, less `label` at the
// label; `softmax` is the coefficient of the labels' softmax, that `exponential` or `plain` is made of.
struct Gradient {
  float term = 0, exponential = 0, plain = 0, constant = 0, label = 0, softmax = 0, top = 0;
};

template <typename Divergence, typename scalar_t>
struct RowProgram {
  static constexpr bool kTeacher = !std::is_void_v<Divergence>;
  static constexpr int kModels = kTeacher ? 2 : 1, kSize = Vector<scalar_t>::size, kVectors = kHeld / kSize;
  static constexpr bool kCentred = [] {
    if constexpr (kTeacher) return Divergence::centred;
    return true;
  }();
  using Vec = Vector<scalar_t>;

  const RowTask& task;
  const Launch& launch;
  Shared& shared;
  Raw* const stages;  // [stages][models][depth * threads]: a model's slice
  const int vocabulary;
  uint32_t meetings = 0;
  float held[kHeld], other[kHeld];  // exponentials of the student and of the teacher; in the end `other` is the student's term

  FDISTILL_DEVICE RowProgram(const RowTask& task, const Launch& launch)
      : task(task), launch(launch), shared(*reinterpret_cast<Shared*>(shared_memory())),
        stages(reinterpret_cast<Raw*>(&shared + 1)), vocabulary(static_cast<int>(task.vocabulary)) {}

  // A model's slice in a stage.
  FDISTILL_DEVICE Raw* slice_at(int at, int model) const { return stages + (at * kModels + model) * room(); }
  FDISTILL_DEVICE int room() const { return launch.depth * threads(); }

  FDISTILL_DEVICE void run() {
    start();
    const uint32_t step = clusters();
    for (int i = 0; i < launch.stages; ++i) fetch(i, cluster() + i * step, fact_of(cluster() + i * step));
    block_barrier();
    int at = 0, parity = 0;
    for (uint32_t n = cluster(); n < task.row_count; n += step) {
      const uint32_t ahead = n + launch.stages * step;
      const float fact_ahead = fact_of(ahead);  // asked for now, so that it is there by then
      wait_for(&shared.arrived[at], parity);
      const Row& row = shared.rows[at];
      if (row.scale == 0.0f) {
        skip_row(n, row);
      } else {
        take_row(n, row, slice_at(at, 0));
      }
      block_barrier();  // every thread is done with the stage
      fetch(at, ahead, fact_ahead);
      if (launch.stages == 1) block_barrier();  // the facts of the next row are there at once
      if (++at == launch.stages) at = 0, parity ^= 1;
    }
  }

  FDISTILL_DEVICE void start() {
    const int vectors = launch.stages * kModels * room();
    for (int v = thread(); v < vectors; v += threads())  // what no slice reaches stays so
      for (uint32_t& word : stages[v].word) word = Vec::lowest;
    if (thread() == 0) {
      for (Barrier& barrier : shared.arrived) start_barrier(&barrier);
      for (Barrier& barrier : shared.met) start_barrier(&barrier);
    }
    before_copies();
    cluster_barrier();
  }

  FDISTILL_DEVICE scalar_t* row_at(const Rows& rows, const Row& row) const {
    return static_cast<scalar_t*>(rows.data) + row.outer * rows.outer_stride + row.inner * rows.inner_stride;
  }

  // Where row n is, and what of it is this block's slice.
  FDISTILL_DEVICE void place(uint32_t n, Row& row) const {
    const uint32_t inner = static_cast<uint32_t>(task.student.inner);
    row.outer = n / inner, row.inner = n % inner;
    row.shift = reinterpret_cast<uintptr_t>(row_at(task.student, row)) % sizeof(Raw) / sizeof(scalar_t);
    const auto until = [&](int entry) {  // vectors of the slice until there
      const int vectors = entry / kSize - begin();
      return vectors < 0 ? 0 : vectors < launch.slice ? vectors : launch.slice;
    };
    row.count = until(row.shift + vocabulary + kSize - 1);
    row.first = rank() == 0 && row.shift != 0;
    const int whole = until(row.shift + vocabulary) - row.first;
    row.whole = whole < 0 ? 0 : whole;
  }

  // The first vector of this block's slices.
  FDISTILL_DEVICE int begin() const { return rank() * launch.slice; }

  // This block's vectors of a row in memory.
  FDISTILL_DEVICE Raw* slice_of(const Rows& rows, const Row& row) const {
    return reinterpret_cast<Raw*>(row_at(rows, row) - row.shift) + begin();
  }

  // Each of the first threads carries a fact of a row as it lies in memory, and of a label the low half. Nothing looks at
  // it before `fetch`, so that no thread waits for it.
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

  // Calls for my slice of row n's logits; an ignored row's stage is at once ready, with nothing new in it.
  FDISTILL_DEVICE void fetch(int at, uint32_t n, float fact) {
    if (n >= task.row_count) return;
    Row& row = shared.rows[at];
    if (thread() == kLabel) {
      int32_t label;
      memcpy(&label, &fact, sizeof(label));
      fact = task.labels && label >= 0 && label < vocabulary ? static_cast<float>(label) : -1.0f;  // no other is read
    }
    if (thread() < kFacts) (&row.scale)[thread()] = fact;
    if (thread() != 0) return;
    place(n, row);
    const uint32_t bytes = fact == 0.0f ? 0 : row.count * sizeof(Raw);
    expect(&shared.arrived[at], kModels * bytes);
    if (bytes == 0) return;
#pragma unroll
    for (int model = 0; model < kModels; ++model)
      copy(slice_at(at, model), slice_of(model ? task.teacher : task.student, row), bytes, &shared.arrived[at]);
  }

  // My k-th vector of a slice. A warp's lie together: k then moves an address by a constant.
  FDISTILL_DEVICE int vector(int k) const { return thread() / kWarp * launch.depth * kWarp + thread() % kWarp + k * kWarp; }

  // body(k) for each of my vectors.
  template <typename Body>
  FDISTILL_DEVICE void for_vectors(const Body& body) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      if (k < launch.depth) body(k);
  }

  // body(j) for each of the entries that I hold.
  template <typename Body>
  FDISTILL_DEVICE void for_entries(const Body& body) const {
    for_vectors([&](int k) {
#pragma unroll
      for (int j = k * kSize; j < (k + 1) * kSize; ++j) body(j);
    });
  }

  // The entry that the first of a vector of mine is; below 0, or beyond the vocabulary, it is not of this row.
  FDISTILL_DEVICE int entry_of(int vector, const Row& row) const { return (begin() + vector) * kSize - row.shift; }
  FDISTILL_DEVICE bool is_entry(int entry) const { return entry >= 0 && entry < vocabulary; }

  // Makes the row's slices in a stage what the passes read: nothing but this row, its logits capped. Each thread touches
  // no vector but those that it alone reads.
  FDISTILL_DEVICE void prepare(Raw* logits, const Row& row) const {
    // every row fills the same whole vectors: around them the stage is as it was at the start
    if (launch.aligned && vocabulary % kSize == 0 && task.student_softcap == 0.0f && task.teacher_softcap == 0.0f) return;
    bool changed = false;
#pragma unroll 1
    for (int k = 0; k < launch.depth; ++k) {
      const int v = vector(k), entry = entry_of(v, row);
      if (v >= launch.slice) break;
#pragma unroll
      for (int model = 0; model < kModels; ++model) {
        const float cap = model ? task.teacher_softcap : task.student_softcap;
        if (is_whole(v, row) && cap == 0.0f) continue;
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

  // My entries of a model, and their top.
  FDISTILL_DEVICE float take(const Raw* logits, float (&kept)[kHeld]) const {
    float top = kLowest;
    const Address mine = address(logits + vector(0));
    for_vectors([&](int k) {
      const Raw raw = load(mine, k * kWarp);
      top = fmaxf(top, Vec::top(raw));
      float x[kSize];
      Vec::widen(raw, x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) kept[k * kSize + i] = x[i];
    });
    return top;
  }

  // Their exponentials about my warp's top, and my sum of them.
  FDISTILL_DEVICE void exponentials(float (&kept)[kHeld], float rate, Softmax& mine) const {
    for_entries([&](int j) { mine.total += kept[j] = mine.worth(kept[j], rate); });
  }

  // Over kMost lanes.
  static FDISTILL_DEVICE Softmax sum_over_most(const Softmax& of_lane, float rate) {
    Softmax all{warp_top<kMost>(of_lane.top)};
    all.total = warp_sum<kMost>(of_lane.total * all.worth(of_lane.top, rate));
    return all;
  }

  FDISTILL_DEVICE Statistics sum_over_most(const Statistics& of_lane, const Row& row) const {
    Statistics all{sum_over_most(of_lane.student, row.rate)};
    if (kTeacher) {
      all.teacher = sum_over_most(of_lane.teacher, row.other_rate);
      all.other_at_top = warp_top<kMost>(of_lane.student.top == all.student.top ? of_lane.other_at_top : -INFINITY);
    }
    if (tempered(row)) all.plain = warp_sum<kMost>(of_lane.plain * all.student.worth(of_lane.student.top, 1.0f));
    if (task.labels) all.label_logit = warp_sum<kMost>(of_lane.label_logit);
    if (smoothed()) {
      all.entries = warp_sum<kMost>(of_lane.entries);
      all.linear = warp_sum<kMost>(of_lane.linear + Math<float>::times(of_lane.entries, of_lane.student.top - all.student.top));
    }
    return all;
  }

  FDISTILL_DEVICE Totals sum_over_most(const Totals& of_lane, const Row&) const {
    return {warp_sum<kMost>(of_lane.divergence), kCentred ? 0.0f : warp_sum<kMost>(of_lane.weight)};
  }

  // Of the first `count` messages, a lane for each.
  template <typename Message>
  FDISTILL_DEVICE Message sum_of(const Raw* messages, int count, const Row& row) const {
    const int lane = thread() % kMost;
    return sum_over_most(lane < count ? reinterpret_cast<const Message*>(messages)[lane] : Message{}, row);
  }

  // Tells my warp's share in the next meeting.
  template <typename Message>
  FDISTILL_DEVICE void tell(const Message& of_warp, const Row& row) {
    const int lane = thread() % kWarp;
    if (lane == 0) reinterpret_cast<Message*>(shared.told)[thread() / kWarp] = of_warp;
    Barrier* met = &shared.met[++meetings % 2];
    if (thread() == 0) expect(met, launch.cluster * sizeof(Message));
    block_barrier();  // every warp has told
    if (!speaker()) return;
    const Message of_block = sum_of<Message>(shared.told, threads() / kWarp, row);
    constexpr int parts = sizeof(Message) / sizeof(Raw);
    Raw raw[parts];
    memcpy(raw, &of_block, sizeof(raw));
    if (lane >= launch.cluster) return;
    for (int i = 0; i < parts; ++i) send(lane, &shared.heard[meetings % 2][rank() * parts + i], raw[i], met);
  }

  // The warp that tells and hears for its block.
  static FDISTILL_DEVICE bool speaker() { return thread() < kWarp; }

  // What all have told in this meeting; for the speaker.
  template <typename Message>
  FDISTILL_DEVICE Message hear(const Row& row) const {
    wait_for(&shared.met[meetings % 2], (meetings - 1) / 2 % 2);
    return sum_of<Message>(shared.heard[meetings % 2], launch.cluster, row);
  }

  // The same, for everyone.
  template <typename Message>
  FDISTILL_DEVICE Message learn(const Row& row) const {
    if (speaker()) {
      const Message all = hear<Message>(row);
      if (thread() == 0) *reinterpret_cast<Message*>(shared.learnt) = all;
    }
    block_barrier();  // the speaker has heard
    return *reinterpret_cast<const Message*>(shared.learnt);
  }

  // Labels have a softmax of their own, at temperature 1.
  FDISTILL_DEVICE bool tempered(const Row& row) const { return task.labels && row.rate != 1.0f; }
  FDISTILL_DEVICE bool smoothed() const { return task.labels && task.label_smoothing != 0.0f; }

  FDISTILL_DEVICE void take_row(uint32_t n, const Row& row, Raw* logits) {
    prepare(logits, row);
    const float top = take(logits, held), other_top = kTeacher ? take(logits + room(), other) : kLowest;
    Statistics mine{{warp_top(top)}, {kTeacher ? warp_top(other_top) : kLowest}};
    if (kTeacher) {
      for_entries([&](int j) { if (held[j] == mine.student.top) mine.other_at_top = fmaxf(mine.other_at_top, other[j]); });
      mine.other_at_top = warp_top(mine.other_at_top);
    }
    if (task.labels) of_labels(row, mine);
    exponentials(held, row.rate, mine.student);
    if (kTeacher) exponentials(other, row.other_rate, mine.teacher);
    mine.student.total = warp_sum(mine.student.total);
    if (kTeacher) mine.teacher.total = warp_sum(mine.teacher.total);
    tell(mine, row);
    const Statistics all = learn<Statistics>(row);
    const float of_held = all.student.worth(mine.student.top, row.rate) / all.student.total;  // to probabilities
    Gradient of;
    if (task.labels) {
      const float plain = tempered(row) ? all.plain : all.student.total;
      of = label_terms(n, row, {all.student.top, plain}, all.label_logit, all.linear);
      (tempered(row) ? of.plain : of.exponential) = of.softmax * (tempered(row) ? 1.0f / plain : of_held);
    } else if (first()) {
      task.parts[task.row_count + n] = task.parts[2 * task.row_count + n] = 0.0f;
    }

    Totals total;
    if constexpr (kTeacher) {
      const float of_other = all.teacher.worth(mine.teacher.top, row.other_rate) / all.teacher.total;
      tell(totals(logits, row, all, of_held, of_other), row);
      of.term = row.scale * row.divergence_scale * row.rate;
      if (!kCentred) {
        total = learn<Totals>(row);
        of.exponential -= of.term * total.weight * of_held;
      }
    }
    of.top = all.student.top;
    if (task.student_gradient.data) write_gradient(row, logits, of);
    if (kTeacher && kCentred && speaker()) total = hear<Totals>(row);
    if (first()) task.parts[n] = kTeacher ? row.scale * row.divergence_scale * total.divergence : 0.0f;
  }

  FDISTILL_DEVICE bool first() const { return rank() == 0 && thread() == 0; }

  // Cross-entropy and lse^2 of a row, and their gradient's coefficients.
  FDISTILL_DEVICE Gradient label_terms(uint32_t n, const Row& row, const Softmax& plain, float label_logit,
                                       float linear) const {
    const float log_total = logf(plain.total), lse = plain.top + log_total, scale = row.scale;
    const float of_label = 1.0f - task.label_smoothing, spread = task.label_smoothing / vocabulary;
    if (first()) {
      float cross_entropy = Math<float>::times(of_label, plain.top - label_logit + log_total);
      if (spread != 0.0f) cross_entropy += spread * (vocabulary * log_total - linear);
      task.parts[task.row_count + n] = scale * cross_entropy;
      task.parts[2 * task.row_count + n] = scale * lse * lse;
    }
    Gradient of;
    const float of_cross_entropy = scale * task.cross_entropy_scale[n];
    of.softmax = of_cross_entropy * (of_label + spread * vocabulary) + 2.0f * scale * task.z_loss_scale[n] * lse;
    of.constant = -of_cross_entropy * spread;
    of.label = of_cross_entropy * of_label;
    return of;
  }

  // My warp's share in what labels need, of the logits that are held.
  FDISTILL_DEVICE void of_labels(const Row& row, Statistics& mine) const {
    if (tempered(row)) {
      for_entries([&](int j) { mine.plain += mine.student.worth(held[j], 1.0f); });
      mine.plain = warp_sum(mine.plain);
    }
    if (smoothed()) {
      for_vectors([&](int k) {  // over the vocabulary, not over what is around the row
        const int v = vector(k), entry = entry_of(v, row);
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          if (v < row.count && is_entry(entry + i))
            mine.linear += held[k * kSize + i] - mine.student.top, ++mine.entries;
      });
      mine.linear = warp_sum(mine.linear), mine.entries = warp_sum(mine.entries);
    }
    const int label = held_label(row);
    if (label >= 0) {  // one thread of the cluster
#pragma unroll
      for (int j = 0; j < kHeld; ++j)
        if (j == label) mine.label_logit = held[j];
    }
    mine.label_logit = row.label < 0.0f ? NAN : warp_sum(mine.label_logit);
  }

  // Entries of a row whose softmaxes are known.
  struct Models {
    float top, rate, log_total, other_top, other_rate, other_log_total, log_ratio;
    bool alike;  // log(p/q) is taken from the logits' own differences, which are exact where models nearly agree

    FDISTILL_DEVICE Models(const Row& row, const Statistics& all)
        : top(all.student.top), rate(row.rate), log_total(logf(all.student.total)), other_top(all.teacher.top),
          other_rate(row.other_rate), other_log_total(logf(all.teacher.total)),
          alike(fabsf(other_top - top) <= 1.0f && rate == other_rate) {
      const float more = (all.teacher.total - all.student.total) / all.student.total;
      log_ratio = fabsf(more) < 0.25f ? log1p(more) : other_log_total - log_total;
    }

    template <bool close>
    FDISTILL_DEVICE Entry<float, close> at(float x, float y, float p, float q, float u_at_peak) const {
      const float q_shifted = (x - top) * rate, p_shifted = (y - other_top) * other_rate;
      const float apart = alike ? ((y - x) - (other_top - top)) * rate : p_shifted - q_shifted;
      return {p, q, p_shifted - other_log_total, q_shifted - log_total, apart - log_ratio, p_shifted, q_shifted, u_at_peak};
    }
  };

  // My warp's shares of D and S; the student's terms go where the teacher's exponentials were. They are measured from the
  // term of the student's largest entry, whose own is 0.
  FDISTILL_DEVICE Totals totals(const Raw* logits, const Row& row, const Statistics& all, float of_held, float of_other) {
    const Models models(row, all);
    const float q = 1.0f / all.student.total, p = expf((all.other_at_top - models.other_top) * row.other_rate) / all.teacher.total;
    const float u = models.template at<true>(models.top, all.other_at_top, p, q, 0.0f).u;
    const float at_peak = kCentred ? 0.0f : Divergence::terms(
        models.template at<true>(models.top, all.other_at_top, p, q, u), task.parameter).student / q;
    return are_close(u) ? totals_of<true>(logits, models, all.other_at_top, of_held, of_other, u, at_peak)
                        : totals_of<false>(logits, models, all.other_at_top, of_held, of_other, u, at_peak);
  }

  template <bool close>
  FDISTILL_DEVICE Totals totals_of(const Raw* logits, const Models& models, float other_at_top, float of_held,
                                   float of_other, float u_at_peak, float at_peak) {
    Totals total;
    const Address mine = address(logits + vector(0));
    for_vectors([&](int k) {
      float x[kSize], y[kSize];
      Vec::widen(load(mine, k * kWarp), x);
      Vec::widen(load(mine, room() + k * kWarp), y);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const auto entry = models.template at<close>(x[i], y[i], other[k * kSize + i] * of_other,
                                                     held[k * kSize + i] * of_held, u_at_peak);
        const Terms<float> terms = Divergence::terms(entry, task.parameter);
        float student = terms.student;
        if (!kCentred) student = x[i] == models.top && y[i] == other_at_top ? 0.0f : student - entry.q * at_peak;
        total.divergence += terms.value;
        total.weight += student;
        other[k * kSize + i] = student;
      }
    });
    return {warp_sum(total.divergence), kCentred ? 0.0f : warp_sum(total.weight)};
  }

  FDISTILL_DEVICE void write_gradient(const Row& row, const Raw* logits, const Gradient& of) {
    for_entries([&](int j) {
      held[j] = of.exponential * held[j] + of.constant;
      if (kTeacher) held[j] += of.term * other[j];
    });
    const int label = held_label(row);
    if (task.labels && label >= 0) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j)
        if (j == label) held[j] -= of.label;
    }
    const float inverse_cap = task.student_softcap == 0.0f ? 0.0f : 1.0f / task.student_softcap;
    const Address mine = address(logits + vector(0));
    if (of.plain != 0.0f || inverse_cap != 0.0f)
      for_vectors([&](int k) {
        float x[kSize];
        Vec::widen(load(mine, k * kWarp), x);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          held[k * kSize + i] += of.plain * exp2f((x[i] - of.top) * kLog2E);
          if (inverse_cap != 0.0f) held[k * kSize + i] *= 1.0f - (x[i] * inverse_cap) * (x[i] * inverse_cap);
        }
      });
    Raw* to = slice_of(task.student_gradient, row) + vector(0);
    for_vectors([&](int k) {
      float value[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) value[i] = held[k * kSize + i];
      store(to + k * kWarp, vector(k), row, Vec::narrow(value));
    });
  }

  // Which of the entries that I hold is the label's, or -1.
  FDISTILL_DEVICE int held_label(const Row& row) const {
    const int at = static_cast<int>(row.label) + row.shift - begin() * kSize, v = at / kSize, mine = v - vector(0);
    const bool is_mine = row.label >= 0.0f && at >= 0 && v < row.count && mine >= 0 && mine % kWarp == 0 && mine < launch.depth * kWarp;
    return is_mine ? mine / kWarp * kSize + at % kSize : -1;
  }

  static FDISTILL_DEVICE bool is_whole(int v, const Row& row) {
    return static_cast<unsigned>(v - row.first) < static_cast<unsigned>(row.whole);
  }

  // Of a vector what is of this row.
  FDISTILL_DEVICE void store(Raw* to, int v, const Row& row, const Raw& raw) const {
    if (is_whole(v, row)) return store_streaming(to, raw);
    if (v >= row.count) return;
    const int entry = entry_of(v, row);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (is_entry(entry + i)) reinterpret_cast<scalar_t*>(to)[i] = Vec::entry(raw, i);
  }

  FDISTILL_DEVICE void skip_row(uint32_t n, const Row& row) const {
    if (first())
      for (int part = 0; part < 3; ++part) task.parts[part * task.row_count + n] = 0.0f;
    if (!task.student_gradient.data) return;
    Raw* to = slice_of(task.student_gradient, row);
    for (int v = thread(); v < row.count; v += threads()) store(to + v, v, row, Raw{});
  }
};

template <typename Divergence, typename scalar_t>
FDISTILL_KERNEL row_kernel(const RowTask task, const Launch launch) {
  RowProgram<Divergence, scalar_t>(task, launch).run();
}

}  // namespace fdistill
