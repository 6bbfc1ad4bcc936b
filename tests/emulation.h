// The chip on a CPU: the names of hopper.cuh, with every thread of a cluster a coroutine. Threads are resumed in an order
// that a seed decides, and copies land as late or as early as the barriers allow, or in any order, so that a missing
// barrier shows as a result that changes with the seed, or as a deadlock. Nothing here is fast.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define FDISTILL_ON_GPU true
#include "divergences.h"

#define FDISTILL_KERNEL inline void
#define FDISTILL_DEVICE inline

namespace fdistill {

struct alignas(16) Raw { uint32_t word[4]; };

struct Barrier {
  int32_t pending;  // bytes that are still to come, and one for the arrival
  int32_t parity;
};

namespace emulation {

constexpr int kWarpSize = 32, kClusters = 2;  // two persistent clusters, one after the other
constexpr int kBeyond = 4096;                 // bytes after a block's shared memory that nothing may write
constexpr char kUnwritten = static_cast<char>(0xff);  // NaN, if read as logits

struct Meeting {  // of `size` threads; the k-th has passed when k * size have arrived
  int size = 0;
  int64_t arrived = 0;
};

struct Copy {
  void* to;
  const void* from;  // null: what is sent
  uint32_t bytes;
  Barrier* barrier;
  Raw sent;
};

struct Warp {
  Meeting meeting;
  float lanes[2][kWarpSize];
};

struct Block {
  std::vector<char> memory;
  char* shared = nullptr;
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<Copy> copies;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  int rank = 0, index = 0;
  int64_t shuffles = 0, block_meetings = 0, cluster_meetings = 0;
  bool done = false;
};

struct Cluster {
  ucontext_t scheduler;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  Meeting meeting;
  Thread* running = nullptr;
  const std::function<void()>* kernel = nullptr;
  int index = 0;
  int64_t events = 0;  // arrivals so far: none in a whole round is a deadlock
  bool late_copies = false;
};

inline Cluster* now = nullptr;

inline Thread& me() { return *now->running; }

template <typename Condition>
void wait_until(const Condition& condition) {
  while (!condition()) swapcontext(&me().context, &now->scheduler);
}

inline void arrive(Meeting& meeting) {
  ++meeting.arrived;
  ++now->events;
}

inline void meet(Meeting& meeting, int64_t& times) {
  arrive(meeting);
  const int64_t needed = ++times * meeting.size;
  wait_until([&] { return meeting.arrived >= needed; });
}

inline void finish(Barrier* barrier, int32_t of_pending) {
  barrier->pending -= of_pending;
  ++now->events;
  if (barrier->pending == 0) barrier->parity ^= 1, barrier->pending = 1;
}

// All copies that are under way, or some of them in any order.
inline void land(Block& block, std::minstd_rand* some = nullptr) {
  std::vector<Copy> later;
  if (some) std::shuffle(block.copies.begin(), block.copies.end(), *some);
  for (const Copy& copy : block.copies) {
    if (some && (*some)() % 2) {
      later.push_back(copy);
      continue;
    }
    std::memcpy(copy.to, copy.from ? copy.from : &copy.sent, copy.bytes);
    finish(copy.barrier, static_cast<int32_t>(copy.bytes));
  }
  block.copies = later;
}

inline void start_copy(Block& block, const Copy& copy) {
  block.copies.push_back(copy);
  if (!now->late_copies) land(block);
}

inline void thread_main() {
  (*now->kernel)();
  me().done = true;
  ++now->events;
  swapcontext(&me().context, &now->scheduler);
}

// Null, or what went wrong.
inline const char* run_cluster(Cluster& cluster, uint32_t seed) {
  std::minstd_rand random(seed + 1);
  std::vector<std::vector<Thread*>> warps(cluster.threads.size() / kWarpSize);
  for (size_t i = 0; i < cluster.threads.size(); ++i) warps[i / kWarpSize].push_back(&cluster.threads[i]);
  now = &cluster;
  bool everyone = seed == 0;  // else some warps sleep for a round or a few, so that others get far ahead
  for (size_t left = cluster.threads.size(); left;) {
    const int64_t before = cluster.events;
    if (seed) std::shuffle(warps.begin(), warps.end(), random);
    for (std::vector<Thread*>& warp : warps) {
      if (!everyone && random() % 4) continue;
      if (seed) std::shuffle(warp.begin(), warp.end(), random);
      for (Thread* thread : warp) {
        if (thread->done) continue;
        cluster.running = thread;
        swapcontext(&cluster.scheduler, &thread->context);
        left -= thread->done;
      }
    }
    if (seed % 4 == 3)
      for (Block& block : cluster.blocks) land(block, &random);
    const bool stuck = cluster.events == before;
    if (stuck && everyone && left) {
      bool waiting = false;  // for a copy, perhaps: they land when nothing else goes on
      for (Block& block : cluster.blocks) waiting |= !block.copies.empty(), land(block);
      if (!waiting) return "deadlock: every thread waits";
    }
    everyone = seed == 0 || (stuck && !everyone);
  }
  return nullptr;
}

}  // namespace emulation

inline int thread() { return emulation::me().index; }
inline int rank() { return emulation::me().rank; }
inline int cluster_size() { return static_cast<int>(emulation::now->blocks.size()); }
inline int threads() { return static_cast<int>(emulation::now->threads.size()) / cluster_size(); }
inline int cluster() { return emulation::now->index; }
inline int clusters() { return emulation::kClusters; }
inline char* shared_memory() { return emulation::me().block->shared; }

inline float from_lane(float value, int mask) {
  emulation::Thread& me = emulation::me();
  emulation::Warp& warp = me.block->warps[me.index / emulation::kWarpSize];
  const int lane = me.index % emulation::kWarpSize, turn = me.shuffles % 2;
  warp.lanes[turn][lane] = value;
  emulation::meet(warp.meeting, me.shuffles);
  return warp.lanes[turn][lane ^ mask];
}

// On the chip whether any lane of the warp says so; here each may go its own way.
inline bool any_lane(bool mine) { return mine; }
inline int lowest_of_warp(int mine) { return mine; }
inline float top_of_warp(float mine) {
  for (int mask = emulation::kWarpSize / 2; mask; mask /= 2) mine = std::fmax(mine, from_lane(mine, mask));
  return mine;
}

inline void warp_barrier() { from_lane(0.0f, 0); }
inline void block_barrier() { emulation::meet(emulation::me().block->meeting, emulation::me().block_meetings); }

inline void cluster_barrier() { emulation::meet(emulation::now->meeting, emulation::me().cluster_meetings); }

inline void start_barrier(Barrier* barrier) { *barrier = {1, 0}; }

inline void expect(Barrier* barrier, uint32_t bytes) {
  barrier->pending += static_cast<int32_t>(bytes);
  emulation::finish(barrier, 1);
}

inline void copy(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  // of a row's neighbours only what is in the row's own 16-byte vectors may be asked for
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) std::abort();
  emulation::start_copy(*emulation::me().block, {to, from, bytes, barrier, {}});
}

inline void send(int to, Raw* place, const Raw& raw, Barrier* barrier) {
  emulation::Block& block = emulation::now->blocks[to];
  const auto there = [&](void* here) { return block.shared + (static_cast<char*>(here) - shared_memory()); };
  emulation::start_copy(block, {there(place), nullptr, sizeof(raw), reinterpret_cast<Barrier*>(there(barrier)), raw});
}

inline void wait_for(Barrier* barrier, uint32_t parity) {
  emulation::wait_until([&] { return barrier->parity != static_cast<int32_t>(parity); });
}

inline void before_copies() {}

using Address = Raw*;
inline Address address(Raw* shared) { return shared; }
inline Raw load(Address from, int after) { return from[after]; }
inline void put(Address to, int after, const Raw& raw) { to[after] = raw; }

inline void keep(Raw*&) {}

inline void store_streaming(void* to, const Raw& raw) {
  if (reinterpret_cast<uintptr_t>(to) % 16) std::abort();
  std::memcpy(to, &raw, sizeof(raw));
}

template <typename scalar_t>
struct Pair {
  static float wide(uint16_t bits) {
    if constexpr (std::is_same_v<scalar_t, BFloat16>) {
      const uint32_t word = static_cast<uint32_t>(bits) << 16;
      float x;
      std::memcpy(&x, &word, sizeof(x));
      return x;
    } else {
      _Float16 x;
      std::memcpy(&x, &bits, sizeof(x));
      return x;
    }
  }
  static uint32_t slim(float x) {
    if constexpr (std::is_same_v<scalar_t, BFloat16>) {
      uint32_t word;
      std::memcpy(&word, &x, sizeof(x));
      return std::isnan(x) ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
    } else {
      const _Float16 half = static_cast<_Float16>(x);
      uint16_t bits;
      std::memcpy(&bits, &half, sizeof(bits));
      return bits;
    }
  }
  static void widen(uint32_t word, float& low, float& high) {
    low = wide(static_cast<uint16_t>(word));
    high = wide(static_cast<uint16_t>(word >> 16));
  }
  static uint32_t narrow(float low, float high) { return slim(low) | slim(high) << 16; }
  static uint32_t larger(uint32_t a, uint32_t b) {
    float x[4];
    widen(a, x[0], x[1]);
    widen(b, x[2], x[3]);
    return narrow(std::fmax(x[0], x[2]), std::fmax(x[1], x[3]));
  }
};

// Runs a kernel by every thread of the grid; null, or what went wrong. FDISTILL_SEED picks the schedule: 0 is in order.
template <typename Launch>
const char* emulate(const std::function<void()>& kernel, const Launch& launch, size_t shared_bytes) {
  using namespace emulation;
  const char* text = std::getenv("FDISTILL_SEED");
  const uint32_t seed = text ? static_cast<uint32_t>(std::atoi(text)) : 0;
  for (int index = 0; index < kClusters; ++index) {
    Cluster cluster;
    cluster.kernel = &kernel;
    cluster.index = index;
    cluster.late_copies = seed % 2;
    cluster.blocks.resize(launch.cluster);
    cluster.threads.resize(launch.cluster * launch.threads);
    cluster.meeting.size = launch.cluster * launch.threads;
    for (int rank = 0; rank < launch.cluster; ++rank) {
      Block& block = cluster.blocks[rank];
      block.memory.assign(shared_bytes + 128 + kBeyond, kUnwritten);
      block.shared = block.memory.data() + 128 - reinterpret_cast<uintptr_t>(block.memory.data()) % 128;
      block.meeting.size = launch.threads;
      block.warps.resize(launch.threads / kWarpSize);
      for (Warp& warp : block.warps) warp.meeting.size = kWarpSize;
      for (int i = 0; i < launch.threads; ++i) {
        Thread& thread = cluster.threads[rank * launch.threads + i];
        constexpr size_t stack = 64 << 10;
        thread.stack.reset(new char[stack]);
        thread.block = &block;
        thread.rank = rank;
        thread.index = i;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = stack;
        makecontext(&thread.context, thread_main, 0);
      }
    }
    if (const char* error = run_cluster(cluster, seed)) return error;
    for (const Block& block : cluster.blocks)
      for (int i = 0; i < kBeyond; ++i)
        if (block.shared[shared_bytes + i] != kUnwritten) return "a block wrote beyond its shared memory";
  }
  return nullptr;
}

}  // namespace fdistill
