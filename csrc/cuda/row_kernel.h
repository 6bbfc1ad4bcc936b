// The row kernel for Hopper: each logit is read from memory once, each gradient written once.
//
// A cluster of thread blocks takes a row at a time. The row is cut into 16-byte vectors and these into one slice a block;
// the copy engine brings a slice of the student's and of the teacher's logits into a stage of shared memory while earlier
// rows are worked on. A thread keeps its kHeld entries of both models in registers from the first exponential to the
// gradient, so that each is made once:
//     statistics   e = exp((z - the warp's top) / T), and their sums       all warps of the cluster meet
//     totals       the divergence's terms; D and S                         all meet again
//     gradient     student term - q S, to memory
// Where S = 0 (`centred`) the gradient does not wait for the second meeting. In a meeting each warp sends 16 bytes to every
// block, whose barrier counts them. There is room for two: who sends for the next has heard from all in this one, and
// they were done with the one before.
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

constexpr int kHeld = 32;                // entries of a model in a thread's registers
constexpr int kWarp = 32;
constexpr float kLog2E = 1.44269504f;

// How a call is cut; made by the caller. `slice`: vectors of a row that each block of the cluster takes; `aligned`: every
// row starts at a multiple of 16 bytes.
struct Launch {
  int32_t cluster, threads, stages, slice, aligned;
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

FDISTILL_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) x += from_lane(x, mask);
  return x;
}

FDISTILL_DEVICE float warp_top(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) x = fmaxf(x, from_lane(x, mask));
  return x;
}

// What is known of a row before its logits are there.
struct Facts {
  float scale, rate, other_rate, divergence_scale, label;  // a label below 2^24 is exact; -1: none
};
constexpr int kFacts = sizeof(Facts) / sizeof(float);

// A model's softmax: p = exp((z - top) rate) / total. A top starts from kLowest: finite, so that -inf - top is -inf.
struct Softmax {
  float top = kLowest, total = 0, rate = 1;
  FDISTILL_DEVICE float worth(float other_top) const { return exp2f((other_top - top) * (rate * kLog2E)); }
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
  Raw* stage;          // [stages][models][kVectors * threads]: a model's slice
  Raw* meeting;        // [2][2][warps of the cluster]: of the two meetings what all send, and what labels need besides
  Barrier* arrived;    // [stages]: the slices are there
  Barrier* met;        // [2]: all have been heard
  Facts* facts;        // [stages]: of the rows in the stages
  const int vocabulary, warps;  // warps of the cluster
  uint32_t meetings = 0;
  int shift, begin, count;  // of the row at hand: entries before it in its first vector; my first vector and how many
  float held[kHeld], other[kHeld];  // exponentials of the student and of the teacher; in the end `other` is the student's term

  FDISTILL_DEVICE RowProgram(const RowTask& task, const Launch& launch)
      : task(task), launch(launch), vocabulary(static_cast<int>(task.vocabulary)),
        warps(launch.cluster * (threads() / kWarp)) {
    stage = reinterpret_cast<Raw*>(shared_memory());
    meeting = stage + launch.stages * kModels * kVectors * threads();
    arrived = reinterpret_cast<Barrier*>(meeting + 4 * warps);
    met = arrived + launch.stages;
    facts = reinterpret_cast<Facts*>(met + 2);
  }

  FDISTILL_DEVICE void run() {
    start();
    const uint32_t step = clusters();
    for (int i = 0; i < launch.stages; ++i) fetch(i, cluster() + i * step, fact_of(cluster() + i * step));
    block_barrier();
    int at = 0, parity = 0;
    for (uint32_t n = cluster(); n < task.row_count; n += step) {
      const uint32_t ahead = n + launch.stages * step;
      const float fact_ahead = fact_of(ahead);  // asked for now, so that it is there by then
      wait_for(&arrived[at], parity);
      const Facts& row = facts[at];
      if (row.scale == 0.0f) {
        skip_row(n);
      } else {
        take_row(n, row, &stage[at * kModels * kVectors * threads()]);
      }
      before_copies();
      block_barrier();  // every thread is done with the stage
      fetch(at, ahead, fact_ahead);
      if (launch.stages == 1) block_barrier();  // the facts of the next row are there at once
      if (++at == launch.stages) at = 0, parity ^= 1;
    }
  }

  FDISTILL_DEVICE void start() {
    const int vectors = launch.stages * kModels * kVectors * threads();
    for (int v = thread(); v < vectors; v += threads())  // what no slice reaches stays so
      for (uint32_t& word : stage[v].word) word = Vec::lowest;
    if (thread() == 0)
      for (int i = 0; i < launch.stages + 2; ++i) start_barrier(&arrived[i]);
    before_copies();
    cluster_barrier();
  }

  // Row n's indices: the same (outer, inner) in every tensor of the call.
  struct Place {
    uint32_t outer, inner;
  };
  FDISTILL_DEVICE Place place_of(uint32_t n) const {
    const uint32_t inner = static_cast<uint32_t>(task.student.inner);
    return {n / inner, n % inner};
  }
  FDISTILL_DEVICE scalar_t* row_at(const Rows& rows, const Place& at) const {
    return static_cast<scalar_t*>(rows.data) + at.outer * rows.outer_stride + at.inner * rows.inner_stride;
  }

  // Entries by which a row's start is past a multiple of 16 bytes: the same for every tensor of the call.
  static FDISTILL_DEVICE int shift_of(const scalar_t* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(Raw) / sizeof(scalar_t));
  }

  FDISTILL_DEVICE void find_slice(const scalar_t* row) {
    shift = shift_of(row);
    begin = rank() * launch.slice;
    const int vectors = (shift + vocabulary + kSize - 1) / kSize, left = vectors - begin;
    count = left < 0 ? 0 : left < launch.slice ? left : launch.slice;
  }

  // Each of the first threads carries a fact of a row; 0 is the scale, 0 for a row that is ignored or does not exist.
  FDISTILL_DEVICE float fact_of(uint32_t n) const {
    if (thread() >= kFacts || n >= task.row_count) return 0.0f;
    switch (thread()) {
      case 0: return task.row_scale[n];
      case 1: return kTeacher ? task.student_inverse_temperature[n] : 1.0f;
      case 2: return kTeacher ? task.teacher_inverse_temperature[n] : 1.0f;
      case 3: return kTeacher ? task.divergence_scale[n] : 0.0f;
      default: break;
    }
    const int64_t label = task.labels ? task.labels[n] : -1;
    return label >= 0 && label < vocabulary ? static_cast<float>(label) : -1.0f;  // no other is ever read
  }

  static FDISTILL_DEVICE float value_of(scalar_t x) {
    if constexpr (std::is_same_v<scalar_t, float>) {
      return x;
    } else {
      float low, high;
      Pair<scalar_t>::widen(x.bits, low, high);
      return low;
    }
  }

  // cap tanh(x / cap)
  static FDISTILL_DEVICE float capped(float x, float cap) {
    return cap == 0.0f ? x : cap * (1.0f - 2.0f / (exp2f(x * (2 * kLog2E / cap)) + 1.0f));
  }

  // In the logits' own precision, as `prepare` leaves them.
  FDISTILL_DEVICE float label_logit_of(const Place& place, int label) const {
    if (!task.labels) return 0.0f;
    if (label < 0) return NAN;
    const float logit = value_of(row_at(task.student, place)[label]);
    if (task.student_softcap == 0.0f) return logit;
    const float x[kSize] = {capped(logit, task.student_softcap)};
    return value_of(Vec::entry(Vec::narrow(x), 0));
  }

  // Calls for my slice of row n's logits; an ignored row's stage is at once ready, with nothing new in it.
  FDISTILL_DEVICE void fetch(int at, uint32_t n, float fact) {
    if (n >= task.row_count) return;
    if (thread() < kFacts) (&facts[at].scale)[thread()] = fact;
    if (thread() != 0) return;
    if (fact == 0.0f) return expect(&arrived[at], 0);
    const Place place = place_of(n);
    const scalar_t* rows[] = {row_at(task.student, place), kTeacher ? row_at(task.teacher, place) : nullptr};
    find_slice(rows[0]);
    const uint32_t bytes = count * sizeof(Raw);
    expect(&arrived[at], kModels * bytes);
    if (bytes == 0) return;
#pragma unroll
    for (int model = 0; model < kModels; ++model)
      copy(&stage[(at * kModels + model) * kVectors * threads()],
           reinterpret_cast<const Raw*>(rows[model] - shift) + begin, bytes, &arrived[at]);
  }

  // The entry that the first of a vector of mine is; below 0, or beyond the vocabulary, it is not of this row.
  FDISTILL_DEVICE int entry_of(int vector) const { return (begin + vector) * kSize - shift; }

  // Makes the row's slices in a stage what the passes read: nothing but this row, its logits capped. Each thread touches
  // no vector but those that it alone reads.
  FDISTILL_DEVICE void prepare(Raw* logits) {
    // every row fills the same whole vectors: around them the stage is as it was at the start
    if (launch.aligned && vocabulary % kSize == 0 && task.student_softcap == 0.0f && task.teacher_softcap == 0.0f) return;
#pragma unroll 1
    for (int k = 0; k < kVectors; ++k) {
      const int v = k * threads() + thread(), entry = entry_of(v);
      if (v >= launch.slice) break;
      const bool whole = v < count && entry >= 0 && entry + kSize <= vocabulary;
#pragma unroll
      for (int model = 0; model < kModels; ++model) {
        const float cap = model ? task.teacher_softcap : task.student_softcap;
        if (whole && cap == 0.0f) continue;
        Raw& raw = logits[model * kVectors * threads() + v];
        float x[kSize];
        Vec::widen(raw, x);
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          x[i] = v < count && entry + i >= 0 && entry + i < vocabulary ? capped(x[i], cap) : -INFINITY;
        raw = Vec::narrow(x);
      }
    }
  }

  // body(k, x): each of my vectors of a model in a stage.
  template <typename Body>
  FDISTILL_DEVICE void for_vectors(const Raw* logits, const Body& body) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[kSize];
      Vec::widen(logits[k * threads() + thread()], x);
      body(k, x);
    }
  }

  // A model's exponentials about the warp's top, which comes back with their sum.
  FDISTILL_DEVICE Softmax exponentials(const Raw* logits, float rate, float (&kept)[kHeld]) const {
    Softmax mine;
    mine.rate = rate;
    float top = kLowest;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) top = fmaxf(top, Vec::top(logits[k * threads() + thread()]));
    mine.top = warp_top(top);
    for_vectors(logits, [&](int k, const float(&x)[kSize]) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) mine.total += kept[k * kSize + i] = mine.worth(x[i]);
    });
    mine.total = warp_sum(mine.total);
    return mine;
  }

  // Goes to the next meeting; `messages` of 16 bytes will come from each warp of the cluster.
  FDISTILL_DEVICE void call_meeting(int messages) {
    ++meetings;
    if (thread() == 0) expect(&met[meetings % 2], messages * warps * sizeof(Raw));
  }

  // A warp's values to every block of the cluster; `extra` is a second message of the same meeting.
  FDISTILL_DEVICE void publish(const float (&value)[4], int extra = 0) {
    const int lane = thread() % kWarp, warp = rank() * (threads() / kWarp) + thread() / kWarp;
    Raw raw;
    memcpy(&raw, value, sizeof(raw));
    if (lane < launch.cluster) send(lane, &room(extra)[warp], raw, &met[meetings % 2]);
  }

  FDISTILL_DEVICE Raw* room(int extra) const { return &meeting[(2 * extra + meetings % 2) * warps]; }

  FDISTILL_DEVICE void meet() const { wait_for(&met[meetings % 2], (meetings - 1) / 2 % 2); }

  // body(values of a warp) for those of the cluster's warps that this lane is to look at.
  template <typename Body>
  FDISTILL_DEVICE void for_met(int extra, const Body& body) const {
    const Raw* all = room(extra);
#pragma unroll 1
    for (int warp = thread() % kWarp; warp < warps; warp += kWarp) {
      float value[4];
      memcpy(value, &all[warp], sizeof(value));
      body(value);
    }
  }

  // The cluster's softmaxes from its warps' tops and totals.
  FDISTILL_DEVICE void met_softmaxes(Softmax& student, Softmax& teacher) const {
    for_met(0, [&](const float(&value)[4]) {
      student.top = fmaxf(student.top, value[0]);
      if (kTeacher) teacher.top = fmaxf(teacher.top, value[2]);
    });
    student.top = warp_top(student.top);
    if (kTeacher) teacher.top = warp_top(teacher.top);
    for_met(0, [&](const float(&value)[4]) {
      student.total += value[1] * student.worth(value[0]);
      if (kTeacher) teacher.total += value[3] * teacher.worth(value[2]);
    });
    student.total = warp_sum(student.total);
    if (kTeacher) teacher.total = warp_sum(teacher.total);
  }

  template <int which>
  FDISTILL_DEVICE float met_sum(int extra) const {
    float total = 0;
    for_met(extra, [&](const float(&value)[4]) { total += value[which]; });
    return warp_sum(total);
  }

  FDISTILL_DEVICE void take_row(uint32_t n, const Facts& row, Raw* logits) {
    const Place place = place_of(n);
    find_slice(row_at(task.student, place));
    prepare(logits);
    const Raw* other_logits = logits + kVectors * threads();
    const bool tempered = task.labels && row.rate != 1.0f;  // labels have a softmax of their own, at temperature 1
    const bool smoothed = task.labels && task.label_smoothing != 0.0f;
    const float label_logit = label_logit_of(place, static_cast<int>(row.label));
    const float pivot = fabsf(label_logit) < INFINITY ? label_logit : 0.0f;

    call_meeting(tempered || smoothed ? 2 : 1);
    const Softmax mine = exponentials(logits, row.rate, held);
    const Softmax other_mine = kTeacher ? exponentials(other_logits, row.other_rate, other) : Softmax{};
    publish({mine.top, mine.total, other_mine.top, other_mine.total});
    if (tempered || smoothed)
      publish({mine.top, tempered ? plain_total(logits, {mine.top, 0.0f, 1.0f}) : 0.0f,
               smoothed ? sum_about(logits, pivot) : 0.0f, 0.0f}, 1);
    meet();
    Softmax student{kLowest, 0.0f, row.rate}, teacher{kLowest, 0.0f, row.other_rate};
    met_softmaxes(student, teacher);
    const float of_held = student.worth(mine.top) / student.total;  // makes an exponential of mine a probability
    Gradient of;
    if (task.labels) {
      Softmax plain{student.top, student.total, 1.0f};
      if (tempered) {
        plain.total = 0.0f;
        for_met(1, [&](const float(&value)[4]) { plain.total += value[1] * plain.worth(value[0]); });
        plain.total = warp_sum(plain.total);
      }
      of = label_terms(n, row.scale, plain, label_logit, pivot, smoothed ? met_sum<2>(1) : 0.0f);
      (tempered ? of.plain : of.exponential) = of.softmax * (tempered ? 1.0f / plain.total : of_held);
    } else if (first()) {
      task.parts[task.row_count + n] = task.parts[2 * task.row_count + n] = 0.0f;
    }

    if constexpr (kTeacher) {
      float divergence = 0, weight = 0;
      call_meeting(1);
      totals(logits, other_logits, student, teacher, of_held, teacher.worth(other_mine.top) / teacher.total, divergence,
             weight);
      publish({warp_sum(divergence), kCentred ? 0.0f : warp_sum(weight), 0.0f, 0.0f});
      of.term = row.scale * row.divergence_scale * row.rate;
      if (!kCentred) {
        meet();
        of.exponential -= of.term * met_sum<1>(0) * of_held;
      }
    }
    of.top = student.top;
    if (task.student_gradient.data) write_gradient(place, static_cast<int>(row.label), logits, of);
    float divergence = 0;
    if constexpr (kTeacher) {
      if (kCentred) meet();
      if (rank() == 0 && thread() < kWarp) divergence = met_sum<0>(0);
    }
    if (first()) task.parts[n] = kTeacher ? row.scale * row.divergence_scale * divergence : 0.0f;
  }

  FDISTILL_DEVICE bool first() const { return rank() == 0 && thread() == 0; }

  // Cross-entropy and lse^2 of a row, and their gradient's coefficients.
  FDISTILL_DEVICE Gradient label_terms(uint32_t n, float scale, const Softmax& plain, float label_logit, float pivot,
                                       float linear) const {
    const float log_total = logf(plain.total), lse = plain.top + log_total;
    const float of_label = 1.0f - task.label_smoothing, spread = task.label_smoothing / vocabulary;
    if (first()) {
      float cross_entropy = Math<float>::times(of_label, plain.top - label_logit + log_total);
      if (spread != 0.0f) cross_entropy += spread * (vocabulary * (plain.top - pivot + log_total) - linear);
      task.parts[task.row_count + n] = scale * cross_entropy;
      task.parts[2 * task.row_count + n] = scale * lse * lse;
    }
    Gradient of;
    of.softmax = scale * (task.cross_entropy_weight * (of_label + spread * vocabulary) + 2.0f * task.z_loss * lse);
    of.constant = -scale * task.cross_entropy_weight * spread;
    of.label = scale * task.cross_entropy_weight * of_label;
    return of;
  }

  FDISTILL_DEVICE float plain_total(const Raw* logits, const Softmax& plain) const {
    float total = 0;
    for_vectors(logits, [&](int, const float(&x)[kSize]) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) total += plain.worth(x[i]);
    });
    return warp_sum(total);
  }

  // Sum of z - pivot over the vocabulary, not over what is around the row.
  FDISTILL_DEVICE float sum_about(const Raw* logits, float pivot) const {
    float total = 0;
    for_vectors(logits, [&](int k, const float(&x)[kSize]) {
      const int v = k * threads() + thread(), entry = entry_of(v);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (v < count && entry + i >= 0 && entry + i < vocabulary) total += x[i] - pivot;
    });
    return warp_sum(total);
  }

  // My shares of D and S; the student's terms go where the teacher's exponentials were.
  FDISTILL_DEVICE void totals(const Raw* logits, const Raw* other_logits, const Softmax& student, const Softmax& teacher,
                              float of_held, float of_other, float& divergence, float& weight) {
    const float log_total = logf(student.total), other_log_total = logf(teacher.total);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[kSize], y[kSize];
      Vec::widen(logits[k * threads() + thread()], x);
      Vec::widen(other_logits[k * threads() + thread()], y);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const Entry<float> entry{other[k * kSize + i] * of_other, held[k * kSize + i] * of_held,
                                 (y[i] - teacher.top) * teacher.rate - other_log_total,
                                 (x[i] - student.top) * student.rate - log_total};
        const Terms<float> terms = Divergence::terms(entry, task.parameter);
        divergence += terms.student + terms.teacher;
        weight += terms.student;
        other[k * kSize + i] = terms.student;
      }
    }
  }

  FDISTILL_DEVICE void write_gradient(const Place& place, int label, const Raw* logits, const Gradient& of) const {
    scalar_t* row = row_at(task.student_gradient, place);
    const float inverse_cap = task.student_softcap == 0.0f ? 0.0f : 1.0f / task.student_softcap;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int v = k * threads() + thread(), entry = entry_of(v);
      float value[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        value[i] = of.exponential * held[k * kSize + i] + of.constant;
        if (kTeacher) value[i] += of.term * other[k * kSize + i];
      }
      const bool labelled = label >= 0 && static_cast<unsigned>(label - entry) < kSize;
      if (of.plain != 0.0f || inverse_cap != 0.0f || labelled) {
        float x[kSize];
        Vec::widen(logits[v], x);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          if (of.plain != 0.0f) value[i] += of.plain * exp2f((x[i] - of.top) * kLog2E);
          if (labelled && label == entry + i) value[i] -= of.label;
          if (inverse_cap != 0.0f) value[i] *= 1.0f - (x[i] * inverse_cap) * (x[i] * inverse_cap);
        }
      }
      store(row, v, entry, Vec::narrow(value));
    }
  }

  // Of a vector what is of this row.
  FDISTILL_DEVICE void store(scalar_t* row, int v, int entry, const Raw& raw) const {
    if (v >= count) return;
    if (entry >= 0 && entry + kSize <= vocabulary) return store_streaming(row + entry, raw);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (entry + i >= 0 && entry + i < vocabulary) row[entry + i] = Vec::entry(raw, i);
  }

  FDISTILL_DEVICE void skip_row(uint32_t n) {
    if (first())
      for (int part = 0; part < 3; ++part) task.parts[part * task.row_count + n] = 0.0f;
    if (!task.student_gradient.data) return;
    scalar_t* row = row_at(task.student_gradient, place_of(n));
    find_slice(row);
    for (int v = thread(); v < count; v += threads()) store(row, v, entry_of(v), Raw{});
  }
};

template <typename Divergence, typename scalar_t>
FDISTILL_KERNEL row_kernel(const RowTask task, const Launch launch) {
  RowProgram<Divergence, scalar_t>(task, launch).run();
}

}  // namespace fdistill
