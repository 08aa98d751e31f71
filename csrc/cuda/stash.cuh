// Gradients in shared memory: on their way to the first sweep, and kept from there for the second one.
//
// A block's stash has two ends. At its upper end rounds of lines arrive while the block sums those before them. At its
// lower end lie the lines that it keeps; it applies their units itself, and leaves a mark for the others.

#ifndef FUSED_ADAFACTOR_CUDA_STASH_CUH
#define FUSED_ADAFACTOR_CUDA_STASH_CUH

#include "job.cuh"

namespace fused_adafactor {

constexpr int kAhead = 3;      // rounds under way at a time, with the one that is summed
constexpr int kMostHeld = 32;  // units
constexpr int kStashAlignment = 128;

// Some lines of a unit that are kept: all of its columns of each.
struct Held {
  int32_t tensor, unit;
  int32_t wave;        // counter of its wave: those of later waves are larger
  int32_t begin, end;  // bytes of the stash
  int32_t lines;
};

struct Stash {
  uint64_t arrivals[kAhead];  // mbarriers
  int32_t bytes;
  int32_t count;        // of units that are held
  uint32_t rounds;      // that have arrived since the launch
  bool keeps;           // whether the item's unit may be kept: it will be applied by a later ticket
  Held held[kMostHeld];  // in the order of their tickets

  // The larger one of the free places that lie together, below a limit.
  __device__ __forceinline__ int room(int limit, int& begin) const {
    if (count == 0) {
      begin = 0;
      return limit;
    }
    const int tail = held[0].begin, head = held[count - 1].end;
    if (head <= tail) {  // it has begun at the front again
      begin = head;
      return tail - head;
    }
    begin = tail > limit - head ? 0 : head;
    return tail > limit - head ? tail : limit - head;
  }

  // Where all that is kept ends.
  __device__ __forceinline__ int end() const {
    int last = 0;
    for (int i = 0; i < count; ++i) last = held[i].end > last ? held[i].end : last;
    return last;
  }
};

// From sm_90 on one thread has a round copied in bulk, and an mbarrier tells when its bytes are there. Before that
// every thread has what it will read itself copied, 16 bytes at a time, and waits for that.
#if defined(FA_EMULATED)

#if defined(FA_EMULATED_SM80)
constexpr bool kBulkCopies = false;
#else
constexpr bool kBulkCopies = true;
#endif

inline void make_barrier(uint64_t* barrier) { *barrier = 0; }
inline void expect_bytes(uint64_t* barrier, int bytes) { emulation::expect_copies(barrier, bytes); }
inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  emulation::copy_later(to, from, size_t(bytes), barrier);
}
inline void wait_for_bytes(uint64_t* barrier, uint32_t parity) { emulation::wait_for_copies(barrier, parity); }
inline void copy_sixteen(void* to, const void* from) { emulation::copy_now(to, from, 16); }
inline void end_of_own_copies() {}
inline void wait_for_own_copies() {}

#else

__device__ __forceinline__ uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ void copy_sixteen(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}

__device__ __forceinline__ void end_of_own_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than the rounds behind this one are under way.
__device__ __forceinline__ void wait_for_own_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kAhead - 1) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

constexpr bool kBulkCopies = true;

__device__ __forceinline__ void make_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void wait_for_bytes(uint64_t* barrier, uint32_t parity) {
  uint32_t there = 0;
  while (there == 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(there)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

#else

constexpr bool kBulkCopies = false;

__device__ __forceinline__ void make_barrier(uint64_t*) {}
__device__ void expect_bytes(uint64_t* barrier, int bytes);
__device__ void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier);
__device__ void wait_for_bytes(uint64_t* barrier, uint32_t parity);

#endif
#endif

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_STASH_CUH
