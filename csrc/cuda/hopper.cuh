// Hopper's instructions under plain names: what row_kernel.h needs of the chip. tests/emulation.h has the same names for a CPU.
#pragma once

#include <cstdint>

#define FDISTILL_ON_GPU true
#include "../divergences.h"

#define FDISTILL_KERNEL __global__ void __launch_bounds__(256, 3)
#define FDISTILL_DEVICE __device__ __forceinline__

namespace fdistill {

struct alignas(16) Raw { uint32_t word[4]; };  // 16 bytes of logits or gradients
using Barrier = uint64_t;                      // counts the bytes of copies; a phase ends when all have come

FDISTILL_DEVICE int thread() { return threadIdx.x; }
FDISTILL_DEVICE int threads() { return blockDim.x; }

FDISTILL_DEVICE uint32_t special(int which) {
  uint32_t value;
  if (which == 0) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  if (which == 1) asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(value));
  if (which == 2) asm("mov.u32 %0, %%clusterid.x;" : "=r"(value));
  if (which == 3) asm("mov.u32 %0, %%nclusterid.x;" : "=r"(value));
  return value;
}
FDISTILL_DEVICE int rank() { return special(0); }  // of this block in its cluster
FDISTILL_DEVICE int cluster_size() { return special(1); }
FDISTILL_DEVICE int cluster() { return special(2); }
FDISTILL_DEVICE int clusters() { return special(3); }

FDISTILL_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

FDISTILL_DEVICE float from_lane(float value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }
FDISTILL_DEVICE bool any_lane(bool mine) { return __any_sync(0xffffffff, mine); }
FDISTILL_DEVICE int lowest_of_warp(int mine) { return __reduce_min_sync(0xffffffff, mine); }

// By integers in the same order, which the chip compares over a warp in one instruction; mine is a number.
FDISTILL_DEVICE float top_of_warp(float mine) {
  const auto ordered = [](int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); };
  return __int_as_float(ordered(__reduce_max_sync(0xffffffff, ordered(__float_as_int(mine)))));
}
FDISTILL_DEVICE void warp_barrier() { __syncwarp(); }
FDISTILL_DEVICE void block_barrier() { __syncthreads(); }
FDISTILL_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

using Address = uint32_t;  // in shared memory

FDISTILL_DEVICE Address address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

FDISTILL_DEVICE uint32_t address_in(int block, const void* shared) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(shared)), "r"(block));
  return there;
}

// 16 bytes to the same place of shared memory in the block `to` of the cluster, counted by its barrier there. No fence:
// a release over the cluster would wait for every store that is still on its way to memory.
FDISTILL_DEVICE void send(int to, Raw* place, const Raw& raw, Barrier* barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          address_in(to, place)),
      "r"(raw.word[0]), "r"(raw.word[1]), "r"(raw.word[2]), "r"(raw.word[3]), "r"(address_in(to, barrier))
      : "memory");
}

FDISTILL_DEVICE void start_barrier(Barrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

FDISTILL_DEVICE void expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}

// The copy engine's: bytes, from and to are multiples of 16.
FDISTILL_DEVICE void copy(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(address(barrier))
      : "memory");
}

// Acquires over the block. Over the cluster it would drop all of L1 at every wait (CCTL.IVALL); what is waited for is in shared
// memory, which L1 does not hold.
FDISTILL_DEVICE void wait_for(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\nbra again;\nover:\n}" ::"r"(
          address(barrier)),
      "r"(parity)
      : "memory");
}

// What threads wrote to shared memory comes before what the copy engine writes there after the next barrier.
FDISTILL_DEVICE void before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The vector so many after `from`, anew at each call: the compiler must not keep a row's logits in registers from pass to
// pass.
FDISTILL_DEVICE Raw load(Address from, int after) {
  Raw raw;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.word[0]), "=r"(raw.word[1]), "=r"(raw.word[2]), "=r"(raw.word[3])
               : "r"(from + after * static_cast<int>(sizeof(Raw)))
               : "memory");
  return raw;
}

// In the place of the vector so many after `to`.
FDISTILL_DEVICE void put(Address to, int after, const Raw& raw) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + after * static_cast<int>(sizeof(Raw))),
               "r"(raw.word[0]), "r"(raw.word[1]), "r"(raw.word[2]), "r"(raw.word[3])
               : "memory");
}

// In registers: without this it would be worked out anew for each vector.
FDISTILL_DEVICE void keep(Raw*& pointer) { asm volatile("" : "+l"(pointer)); }

FDISTILL_DEVICE void store_streaming(void* to, const Raw& raw) {
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(raw.word[0], raw.word[1], raw.word[2], raw.word[3]));
}

// Pairs of 16-bit logits: to floats, back, and the larger of each.
template <typename scalar_t>
struct Pair;

template <>
struct Pair<BFloat16> {
  static FDISTILL_DEVICE void widen(uint32_t word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000);
  }
  static FDISTILL_DEVICE uint32_t narrow(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static FDISTILL_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
};

template <>
struct Pair<Half> {
  static FDISTILL_DEVICE void widen(uint32_t word, float& low, float& high) {
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(low), "=f"(high) : "r"(word));
  }
  static FDISTILL_DEVICE uint32_t narrow(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static FDISTILL_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
};

}  // namespace fdistill
