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

#include "../divergences.h"
#include "row_slices.h"

namespace fdistill {

template <typename Divergence, typename scalar_t>
struct RowProgram : RowSlices<scalar_t, std::is_void_v<Divergence> ? 1 : 2> {
  static constexpr bool kTeacher = !std::is_void_v<Divergence>;
  static constexpr bool kCentred = [] {
    if constexpr (kTeacher) return Divergence::centred;
    return true;
  }();
  using Slices = RowSlices<scalar_t, kTeacher ? 2 : 1>;
  using Vec = Vector<scalar_t>;
  static constexpr int kSize = Slices::kSize;
  using Slices::task, Slices::launch, Slices::shared, Slices::vocabulary;
  using Slices::begin, Slices::entry_of, Slices::fact_of, Slices::fetch, Slices::for_entries, Slices::for_vectors;
  using Slices::held_label, Slices::is_entry, Slices::prepare, Slices::room, Slices::slice_at, Slices::slice_of;
  using Slices::store, Slices::take, Slices::vector;

  uint32_t meetings = 0;
  float held[kHeld], other[kHeld];  // exponentials of the student and of the teacher; in the end `other` is the student's term

  FDISTILL_DEVICE RowProgram(const RowTask& task, const Launch& launch) : Slices(task, launch) {}

  FDISTILL_DEVICE void run() {
    this->start();
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
    const float q = 1.0f / all.student.total;
    const float p = expf((all.other_at_top - models.other_top) * row.other_rate) / all.teacher.total;
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
