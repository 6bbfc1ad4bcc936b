// The row kernel for Hopper: each logit is read from memory once, each gradient written once.
//
// A cluster of thread blocks takes a row at a time. The row is cut into 16-byte vectors and these into one slice a block;
// the copy engine brings a slice of the student's and of the teacher's logits into shared memory, which the sweeps over
// the row read:
//     statistics   e = exp((z - the warp's top) / T), and their sums       the blocks of the cluster meet
//     totals       the divergence's terms; D and S                         they meet again
//     gradient     student term - q S, to memory
// Where S = 0 (`centred`) the totals are summed in the gradient's sweep. Where the student's term is q times a number of
// modest size (`has_slopes`), the totals' sweep leaves that in the teacher's place, and the gradient's makes q alone
// anew: of bfloat16 logits a float16, which has three bits more than the gradient. Rows of which these are lost, since
// slopes are all alike but the peak's, or tiny, are read again, and their terms made anew. Exponentials are made anew in
// each sweep: kept in registers, they would leave a multiprocessor so few warps that it waits half its time. With several
// blocks on one, some work while others meet or wait. A warp alone reads its part of a slice: when it is done it calls for
// that of the next row, whose facts the speaker has announced during the first meeting. In a meeting warps tell their block;
// its first warp, the speaker, tells every block, whose barrier counts the bytes, hears every block, and lets its own know.
// There is room for two meetings, as for two rows' facts: who tells in the next has heard all in this one, and their
// speakers were done with the one before.
//
// The code is written once for the chip and for a CPU: hopper.cuh and tests/emulation.h give the same names a meaning.
#pragma once

#include "row_slices.h"

namespace fdistill {

template <typename Divergence, typename scalar_t>
struct RowProgram : RowSlices<scalar_t, std::is_void_v<Divergence> ? 1 : 2> {
  static constexpr bool kTeacher = !std::is_void_v<Divergence>;
  static constexpr bool kCentred = [] {
    if constexpr (kTeacher) return Divergence::centred;
    return true;
  }();
  static constexpr bool kSlopes = [] {
    if constexpr (kTeacher) return Divergence::has_slopes && !std::is_same_v<scalar_t, Half>;
    return false;
  }();
  using Slope = Vector<std::conditional_t<std::is_same_v<scalar_t, BFloat16>, Half, scalar_t>>;
  static constexpr bool kLossy = [] {  // kept in 16 bits, a rounding away
    if constexpr (kSlopes) return sizeof(scalar_t) == 2 && !Divergence::has_exact_slopes;
    return false;
  }();
  static constexpr float kUnits = 128.0f;  // of a slope, so that those of 1e-6 still are normal numbers of float16
  using Slices = RowSlices<scalar_t, kTeacher ? 2 : 1>;
  using Vec = Vector<scalar_t>;
  static constexpr int kSize = Slices::kSize;
  using Slices::task, Slices::launch, Slices::shared, Slices::vocabulary;
  using Slices::announce, Slices::begin, Slices::entry_of, Slices::fact_of, Slices::fetch, Slices::for_vectors;
  using Slices::is_entry, Slices::prepare, Slices::room, Slices::store, Slices::vector;

  uint32_t meetings = 0;

  FDISTILL_DEVICE RowProgram(const RowTask& task, const Launch& launch) : Slices(task, launch) {}

  FDISTILL_DEVICE void run() {
    this->start();
    if (speaker()) announce(0, cluster(), fact_of(cluster()));
    block_barrier();
    fetch(0, cluster());
    int parity = 0;
    for (uint32_t n = cluster(); n < task.row_count; n += clusters()) {
      const uint32_t next = n + clusters();
      const float fact = speaker() ? fact_of(next) : 0.0f;  // asked for now, so that it is there by then
      const Row& row = shared.rows[parity];
      wait_for(&shared.arrived[thread() / kWarp], parity);
      if (row.scale == 0.0f) {
        skip_row(n, row);
        block_barrier();  // every warp has left the row before
        if (speaker()) announce(parity ^ 1, next, fact);
        block_barrier();
      } else {
        take_row(n, row, this->logits(), [&] { announce(parity ^ 1, next, fact); });
      }
      warp_barrier();  // my lanes are done with the row
      parity ^= 1;
      fetch(parity, next);
    }
  }

  // Over kMost lanes; the other lanes of a warp hold the same.
  static FDISTILL_DEVICE Softmax sum_over_most(const Softmax& of_lane, float rate) {
    Softmax all{top_of_warp(of_lane.top)};
    all.total = warp_sum<kMost>(of_lane.total * all.worth(of_lane.top, rate));
    return all;
  }

  FDISTILL_DEVICE Statistics sum_over_most(const Statistics& of_lane, const Row& row) const {
    Statistics all{sum_over_most(of_lane.student, row.rate)};
    if (kTeacher) {
      all.teacher = sum_over_most(of_lane.teacher, row.teacher_rate());
      all.other_at_top = top_of_warp(of_lane.student.top == all.student.top ? of_lane.other_at_top : -INFINITY);
    }
    if (tempered(row)) all.plain = warp_sum<kMost>(of_lane.plain * all.student.worth(of_lane.student.top, 1.0f));
    if (task.labels) all.label_logit = warp_sum<kMost>(of_lane.label_logit);
    if (smoothed()) {
      all.entries = warp_sum<kMost>(of_lane.entries);
      all.linear = warp_sum<kMost>(of_lane.linear + Math<float>::times(of_lane.entries, of_lane.student.top - all.student.top));
    }
    return all;
  }

  FDISTILL_DEVICE Totals sum_over_most(const Totals& of_lane, const Row&) const { return sum_over<kMost>(of_lane); }

  template <int lanes>
  static FDISTILL_DEVICE Totals sum_over(const Totals& of_lane) {
    Totals all{warp_sum<lanes>(of_lane.divergence)};
    if (!kCentred) all.weight = warp_sum<lanes>(of_lane.weight);
    if (kLossy) {
      all.kept = warp_sum<lanes>(of_lane.kept), all.mass = warp_sum<lanes>(of_lane.mass);
      all.mean = warp_sum<lanes>(of_lane.mean), all.square = warp_sum<lanes>(of_lane.square);
    }
    return all;
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
    Barrier* met = &shared.met[++meetings % 2];
    Raw* const told = shared.told[meetings % 2];
    if (lane == 0) reinterpret_cast<Message*>(told)[thread() / kWarp] = of_warp;
    const bool alone = launch.cluster == 1;  // a block that has no others sends nothing
    if (thread() == 0) expect(met, alone ? 0 : launch.cluster * sizeof(Message));
    block_barrier();  // every warp has told
    if (!speaker()) return;
    const Message of_block = sum_of<Message>(told, threads() / kWarp, row);
    constexpr int parts = sizeof(Message) / sizeof(Raw);
    Raw raw[parts];
    memcpy(raw, &of_block, sizeof(raw));
    Raw* const heard = &shared.heard[meetings % 2][rank() * parts];
    for (int i = 0; i < parts && lane < launch.cluster; ++i) {
      if (alone) heard[i] = raw[i];
      else send(lane, heard + i, raw[i], met);
    }
    warp_barrier();
  }

  // The warp that tells and hears for its block.
  static FDISTILL_DEVICE bool speaker() { return thread() < kWarp; }

  // What all have told in this meeting; for the speaker.
  template <typename Message>
  FDISTILL_DEVICE Message hear(const Row& row) const {
    wait_for(&shared.met[meetings % 2], (meetings - 1) / 2 % 2);
    return sum_of<Message>(shared.heard[meetings % 2], launch.cluster, row);
  }

  // What follows for everyone from what all have told in the first meeting: the speaker works it out, and has something
  // to do while messages are on their way.
  template <typename Meanwhile>
  FDISTILL_DEVICE Known learn(uint32_t n, const Row& row, const Meanwhile& meanwhile) {
    Known& known = *reinterpret_cast<Known*>(shared.known);
    if (speaker()) {
      meanwhile();
      const Statistics all = hear<Statistics>(row);
      const Known found{models_of(row, all), gradient_of(n, row, all)};
      if (thread() == 0) known = found;
    }
    block_barrier();  // the speaker has heard
    return known;
  }

  FDISTILL_DEVICE Models models_of(const Row& row, const Statistics& all) const {
    Models models(row, all);
    if constexpr (kTeacher) {
      models.u_at_peak = models.template at<true>(models.top, models.other_at_top).u;
      if (!kCentred) models.at_peak = are_close(models.u_at_peak) ? term_at_peak<true>(models) : term_at_peak<false>(models);
    }
    return models;
  }

  // Of the student's largest entry, per probability: what terms are measured from, so that its own is 0.
  template <bool close>
  FDISTILL_DEVICE float term_at_peak(const Models& models) const {
    const auto entry = models.template at<close>(models.top, models.other_at_top);
    return Divergence::terms(entry, task.parameter).student / entry.q;
  }

  FDISTILL_DEVICE Gradient gradient_of(uint32_t n, const Row& row, const Statistics& all) const {
    Gradient of;
    if (task.labels) {
      const float plain = tempered(row) ? all.plain : all.student.total;
      of = label_terms(n, row, {all.student.top, plain}, all.label_logit, all.linear);
    } else if (first()) {
      task.parts[task.row_count + n] = task.parts[2 * task.row_count + n] = 0.0f;
    }
    if constexpr (kTeacher) of.term = row.scale * row.divergence_scale * row.rate * Divergence::unit;
    return of;
  }

  // Labels have a softmax of their own, at temperature 1.
  FDISTILL_DEVICE bool tempered(const Row& row) const { return task.labels && row.rate != 1.0f; }
  FDISTILL_DEVICE bool smoothed() const { return task.labels && task.label_smoothing != 0.0f; }

  template <typename Meanwhile>
  FDISTILL_DEVICE void take_row(uint32_t n, const Row& row, Raw* logits, const Meanwhile& meanwhile) {
    this->deep = (this->vectors_of(row) + kWarp - 1) / kWarp;
    prepare(logits, row);
    Peak peak;
    tell(statistics(row, logits, peak), row);
    auto [models, of] = learn(n, row, meanwhile);
    if (peak.top != models.top) peak.k = -1;
    Totals total;
    if constexpr (!kTeacher) {
      if (task.student_gradient.data) sweep<false, true>(row, logits, models, peak.k, of);
    } else if constexpr (kCentred) {
      tell(sweep<true, true>(row, logits, models, peak.k, of), row);
      if (speaker()) total = hear<Totals>(row);
    } else {
      tell(sweep<true, false>(row, logits, models, peak.k, of), row);
      if (speaker()) total = hear<Totals>(row);
      if (thread() == 0) {
        shared.anew = kLossy && total.need_more_bits(1.0f / 256, exp2f(-models.log2_total));
        shared.weight = kLossy && !shared.anew ? total.kept : total.weight;
      }
      block_barrier();  // the speaker has heard of S
      of.softmax -= of.term * shared.weight;
      if (kLossy && shared.anew && task.student_gradient.data) {
        this->read_again(row, logits);
        sweep<false, true>(row, logits, models, peak.k, of);
      } else if (task.student_gradient.data) {
        if constexpr (kSlopes) write_by_slopes(row, logits, models, of);
        else sweep<false, true>(row, logits, models, peak.k, of);
      }
    }
    if (!first()) return;
    task.parts[n] = 0.0f;
    if constexpr (kTeacher) task.parts[n] = row.scale * row.divergence_scale * Divergence::unit * total.divergence;
  }

  FDISTILL_DEVICE bool first() const { return rank() == 0 && thread() == 0; }

  // Cross-entropy and lse^2 of a row, and their gradient's coefficients.
  FDISTILL_DEVICE Gradient label_terms(uint32_t n, const Row& row, const Softmax& plain, float label_logit,
                                       float linear) const {
    const float log_total = exact_log(plain.total), scale = row.scale;
    const float lse = plain.top == INFINITY ? INFINITY : plain.top + log_total;  // whose total is NaN
    const float of_label = 1.0f - task.label_smoothing, spread = task.label_smoothing / vocabulary;
    if (first()) {
      float cross_entropy = Math<float>::times(of_label, plain.top - label_logit + log_total);
      if (spread != 0.0f) cross_entropy += spread * (vocabulary * log_total - linear);
      task.parts[task.row_count + n] = scale * cross_entropy;
      task.parts[2 * task.row_count + n] = scale * lse * lse;
    }
    Gradient of;
    const float of_cross_entropy = scale * task.cross_entropy_scale[n];
    const float of_softmax = of_cross_entropy * (of_label + spread * vocabulary) + 2.0f * scale * task.z_loss_scale[n] * lse;
    (tempered(row) ? of.plain : of.softmax) = tempered(row) ? of_softmax / plain.total : of_softmax;
    of.constant = -of_cross_entropy * spread;
    of.label = of_cross_entropy * of_label;
    return of;
  }

  // Of my vectors, the first that holds the largest entry of the student, and that entry.
  struct Peak { float top = kLowest; int k = 0; };

  FDISTILL_DEVICE void load_vector(Address mine, int k, float (&x)[kSize]) const { Vec::widen(load(mine, k * kWarp), x); }

  // exp((z - top) / T) as one product less a constant, which is not quite top / T: what all of them are too large by is
  // the correction. Where that could be any number, as of a mask of -1e30, z - top comes first, and there is none.
  struct Exponential {
    float rate, top, constant;
    bool apart;
    FDISTILL_DEVICE Exponential(float top, float rate_of_e)
        : rate(rate_of_e * kLog2E), top(top), constant(top * rate), apart(!(fabsf(constant) < 16777216.0f)) {}
    template <bool kNeverApart>
    FDISTILL_DEVICE float sum(const float (&x)[kSize]) const {
      float total = 0;
      if (!kNeverApart && apart) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) total += exp2f((x[i] - top) * rate);
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i) total += exp2f(fmaf(x[i], rate, -constant));
      }
      return total;
    }
    FDISTILL_DEVICE float correction() const { return apart ? 1.0f : exp2f(fmaf(-top, rate, constant)); }
  };

  // A lane's sums of exponentials; kBare: no more is asked, and no model is `apart`.
  template <bool kBare>
  FDISTILL_DEVICE void add_up(const Row& row, Address mine, Address others, const Exponential& worth,
                              const Exponential& other_worth, Statistics& of) const {
    for_vectors([&](int k) {
      float x[kSize];
      load_vector(mine, k, x);
      of.student.total += worth.template sum<kBare>(x);
      if (!kBare && tempered(row)) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) of.plain += of.student.worth(x[i], 1.0f);
      }
      if (!kBare && smoothed()) add_linear(row, vector(k), x, of);
      if (kTeacher) {
        load_vector(others, k, x);
        of.teacher.total += other_worth.template sum<kBare>(x);
      }
    });
  }

  // My warp's share in the softmaxes, and in what labels need.
  FDISTILL_DEVICE Statistics statistics(const Row& row, Raw* logits, Peak& peak) const {
    const Address mine = address(logits + vector(0)), others = address(logits + room() + vector(0));
    float other_top = kLowest;
    for_vectors([&](int k) {
      const float top = Vec::top(load(mine, k * kWarp));
      if (top > peak.top) peak.top = top, peak.k = k;
      if (kTeacher) other_top = fmaxf(other_top, Vec::top(load(others, k * kWarp)));
    });
    Statistics of{{top_of_warp(peak.top)}, {kTeacher ? top_of_warp(other_top) : kLowest}};
    if (kTeacher) {
      float x[kSize], y[kSize];
      load_vector(mine, peak.k, x), load_vector(others, peak.k, y);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (x[i] == of.student.top) of.other_at_top = fmaxf(of.other_at_top, y[i]);
      of.other_at_top = top_of_warp(of.other_at_top);
    }
    const Exponential worth(of.student.top, row.rate), other_worth(of.teacher.top, row.teacher_rate());
    // asked once, not of each vector
    const bool bare = !(worth.apart || (kTeacher && other_worth.apart) || tempered(row) || smoothed());
    bare ? add_up<true>(row, mine, others, worth, other_worth, of)
         : add_up<false>(row, mine, others, worth, other_worth, of);
    of.student.total = warp_sum(of.student.total) * worth.correction();
    if (kTeacher) of.teacher.total = warp_sum(of.teacher.total) * other_worth.correction();
    if (tempered(row)) of.plain = warp_sum(of.plain);
    if (smoothed()) of.linear = warp_sum(of.linear), of.entries = warp_sum(of.entries);
    if (task.labels) of.label_logit = warp_sum(label_logit_of(row, mine));
    return of;
  }

  // What label smoothing needs of a vector: over the vocabulary, not over what is around the row.
  FDISTILL_DEVICE void add_linear(const Row& row, int v, const float (&x)[kSize], Statistics& of) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (v < row.count && is_entry(entry_of(v, row) + i)) of.linear += x[i] - of.student.top, ++of.entries;
  }

  // Which entry of my vector v is the label's, or -1.
  FDISTILL_DEVICE int label_in(int v, const Row& row) const {
    const int at = static_cast<int>(row.label) - entry_of(v, row);
    return row.label >= 0.0f && v < row.count && at >= 0 && at < kSize ? at : -1;
  }

  // The label's logit, in one thread of the cluster; 0 in others.
  FDISTILL_DEVICE float label_logit_of(const Row& row, Address mine) const {
    if (row.label < 0.0f) return NAN;
    float logit = 0;
    const int k = (static_cast<int>(row.label) - entry_of(vector(0), row)) / (kSize * kWarp);
    if (k < 0 || k >= launch.depth) return 0.0f;
    const int label = label_in(vector(k), row);
    float x[kSize];
    load_vector(mine, k, x);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (i == label) logit = x[i];
    return logit;
  }

  // A sweep over my vectors: my warp's shares of D and S if `kTotals`, the gradient to memory if `kGradient`.
  template <bool kTotals, bool kGradient>
  FDISTILL_DEVICE Totals sweep(const Row& row, Raw* logits, const Models& models, int peak, const Gradient& of) const {
    if (kTeacher && are_close(models.u_at_peak))
      return models.alike ? sweep<kTotals, kGradient, true, true>(row, logits, models, peak, of)
                          : sweep<kTotals, kGradient, true, false>(row, logits, models, peak, of);
    return sweep<kTotals, kGradient, false, false>(row, logits, models, peak, of);
  }

  template <bool kTotals, bool kGradient, bool close, bool alike>
  FDISTILL_DEVICE Totals sweep(const Row& row, Raw* logits, const Models& models, int peak, const Gradient& of) const {
    Totals total;
    const Address mine = address(logits + vector(0)), others = address(logits + room() + vector(0));
    Raw* to = kGradient ? row.gradient + vector(0) : nullptr;
    keep(to);
    const Span whole = row.whole;
    // The vectors with a peak of the warp's lanes, where all of them go together: asked once, or, by formulas that leave no
    // registers for the answer, of each vector.
    const int first_peak = lowest_of_warp(peak < 0 ? launch.depth : peak);
    const bool several = -lowest_of_warp(-peak) > first_peak;
    const bool is_bare = bare();
    const int count = this->vectors_of(row) - thread() % kWarp;
    for_vectors([&](int k) {
      float x[kSize], y[kSize], student[kSize], q[kSize];
      load_vector(mine, k, x);
      if constexpr (kTeacher) {
        load_vector(others, k, y);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const auto entry = models.template at<close, alike>(x[i], y[i]);
          q[i] = entry.q;
          if constexpr (kSlopes && kTotals) {
            const Slopes<float> of_entry = Divergence::slopes(entry, task.parameter);
            student[i] = fmaf(of_entry.slope, kUnits, -kUnits * models.at_peak), total.divergence += of_entry.value;
          } else {
            const Terms<float> terms = Divergence::terms(entry, task.parameter);
            student[i] = terms.student;
            if (kTotals) total.divergence += terms.value;
            if (!kCentred) student[i] -= entry.q * models.at_peak;
          }
        }
        if (!kCentred && (kSlopes ? k == first_peak || several : any_lane(k == peak))) {  // few warps, once
#pragma unroll
          for (int i = 0; i < kSize; ++i)
            if (k == peak && x[i] == models.top && y[i] == models.other_at_top) student[i] = 0.0f;
        }
        if (kTotals && !kCentred) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) total.weight = kSlopes ? fmaf(q[i], student[i], total.weight) : total.weight + student[i];
        }
        if constexpr (kSlopes && kTotals) {
          const Raw kept = Slope::narrow(student);
          if (k * kWarp < count) put(others, k * kWarp, kept);  // what is around a row stays
          if constexpr (kLossy) {
            float slope[kSize];
            Slope::widen(kept, slope);
#pragma unroll
            for (int i = 0; i < kSize; ++i) total.kept = fmaf(q[i], slope[i], total.kept);  // a gradient that sums to 0
            const float part = q[0] * slope[0];  // of an eighth of the entries
            total.mass += q[0], total.mean += part, total.square = fmaf(part, slope[0], total.square);
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i) q[i] = models.q(x[i]), student[i] = 0.0f;
      }
      if constexpr (kGradient) {
        if (kTotals && !task.student_gradient.data) return;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float of_softmax = fmaf(of.softmax, q[i], of.constant);
          student[i] = kTeacher ? fmaf(of.term, student[i], of_softmax) : of_softmax;
        }
        if (!is_bare) add_labels_and_cap(row, vector(k), x, student, models.top, of);
        store(to + k * kWarp, vector(k), row, whole, Vec::narrow(student));
      }
    });
    if (kSlopes && kTotals) before_copies();
    if (!kTotals) return total;
    total = sum_over<kWarp>(total);
    if (kSlopes) total.weight *= 1.0f / kUnits, total.kept *= 1.0f / kUnits;
    return total;
  }

  // The gradient to memory, by the slopes that the totals' sweep has left in the teacher's place.
  FDISTILL_DEVICE void write_by_slopes(const Row& row, Raw* logits, const Models& models, const Gradient& of) const {
    const Address mine = address(logits + vector(0)), slopes = address(logits + room() + vector(0));
    Raw* to = row.gradient + vector(0);
    keep(to);
    const Span whole = row.whole;
    const bool is_bare = bare();
    const float term = of.term * (1.0f / kUnits);
    for_vectors([&](int k) {
      float x[kSize], gradient[kSize];
      load_vector(mine, k, x);
      Slope::widen(load(slopes, k * kWarp), gradient);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        gradient[i] = fmaf(models.q(x[i]), fmaf(term, gradient[i], of.softmax), of.constant);
      if (!is_bare) add_labels_and_cap(row, vector(k), x, gradient, models.top, of);
      store(to + k * kWarp, vector(k), row, whole, Vec::narrow(gradient));
    });
  }

  // Neither labels nor caps: asked once a sweep, not of each vector.
  FDISTILL_DEVICE bool bare() const { return !task.labels && task.student_softcap == 0.0f; }

  // To the gradient of a vector's entries what `bare` rows do without.
  FDISTILL_DEVICE void add_labels_and_cap(const Row& row, int v, const float (&x)[kSize], float (&student)[kSize], float top,
                                          const Gradient& of) const {
    if (of.plain != 0.0f) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) student[i] += of.plain * exp2f((x[i] - top) * kLog2E);
    }
    const int label = task.labels ? label_in(v, row) : -1;
    if (label >= 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (i == label) student[i] -= of.label;
    }
    if (task.student_softcap != 0.0f) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float t = x[i] / task.student_softcap;
        student[i] *= 1.0f - t * t;
      }
    }
  }

  FDISTILL_DEVICE void skip_row(uint32_t n, const Row& row) const {
    if (first())
      for (int part = 0; part < 3; ++part) task.parts[part * task.row_count + n] = 0.0f;
    if (!task.student_gradient.data) return;
    const Span whole = row.whole;
    Raw* to = row.gradient;
    for (int v = thread(); v < row.count; v += threads()) store(to + v, v, row, whole, Raw{});
  }
};

template <typename Divergence, typename scalar_t>
FDISTILL_KERNEL row_kernel(const RowTask task, const Launch launch) {
  RowProgram<Divergence, scalar_t>(task, launch).run();
}

}  // namespace fdistill
