// 16-byte vectors of logits, sums over a warp, and how a call is cut.
#pragma once

#include <cmath>
#include <type_traits>

#include "../row_task.h"
#ifdef __CUDACC__
#include "hopper.cuh"
#else
#include "emulation.h"  // of tests, for a C++ compiler
#endif

namespace fdistill {

constexpr int kWarp = 32, kWarps = 8, kMost = 16;  // lanes of a warp, most warps of a block, most blocks of a cluster

// How a call is cut; made by the caller. `slice`: vectors of a row that each block of the cluster takes; `depth`: that each
// thread takes; `aligned`: every row starts at a multiple of 16 bytes.
struct Launch {
  int32_t cluster, threads, depth, slice, aligned;
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

// log x: to the last digit near 1 too, where the chip's own is not.
FDISTILL_DEVICE float exact_log(float x) {
  if (!(x > 0.0f && x < INFINITY)) return logf(x);
  int32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const int32_t power = (bits - 0x3f400000) >> 23;  // x = 2^power m, m in [3/4, 3/2)
  bits -= power << 23;
  float m;
  memcpy(&m, &bits, sizeof(m));
  return power * 0.693147181f + log1p_of((m - 1.0f) / (1.0f + 0.5f * (m - 1.0f)));
}

}  // namespace fdistill
