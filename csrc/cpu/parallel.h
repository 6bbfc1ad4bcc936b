// Threads for the CPU kernels: those of the OpenMP library that torch has loaded already, since a second one's would
// spin beside them; our own where there is none.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fdistill {

// body(piece) for each piece of [0, count), on up to `threads` threads. What a thread needs for itself it takes in
// `start()`, whose result is given to body(mine, piece).
template <typename Start, typename Body>
void for_pieces(int64_t count, int threads, const Start& start, const Body& body) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    auto mine = start();
    for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(mine, piece);
  };
  threads = static_cast<int>(threads < count ? threads : count);
  if (threads <= 1) return work();
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel)
    return parallel([](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace fdistill
