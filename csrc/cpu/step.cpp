// One parallel region for a whole step: items are taken in order from one ticket counter, and an item waits only for
// items with lower tickets, which running threads hold already. So it cannot deadlock, with any number of threads.

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include <omp.h>

#include "kernels.h"

namespace fused_adafactor {

namespace portable { extern const Kernels kernels; }
#if defined(FA_X86)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
#endif

namespace {

const Kernels* const kBuilds[] = {
    &portable::kernels,
#if defined(FA_X86)
    &avx2::kernels,
    &avx512::kernels,
    &avx512bf16::kernels,
#endif
};

int32_t best_isa() {
#if defined(FA_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

int32_t chosen_isa = best_isa();

// Items of this call that are left to do of a tensor.
struct Progress {
  std::atomic<int32_t> stats_left{0}, merges_left{0}, finalize_left{0};
  std::atomic<int32_t> update_rms_left{0}, measure_left{0}, strips_left{0};
};

inline void wait_for(const std::atomic<int32_t>& left) {
  // What is waited for comes within microseconds, unless somebody else has the core of the thread that it comes from.
  constexpr int32_t kPatience = 4096;
  for (int32_t tries = 0; left.load(std::memory_order_acquire) != 0; ++tries) {
    if (tries >= kPatience) {
      std::this_thread::yield();
      continue;
    }
#if defined(FA_X86)
    __builtin_ia32_pause();
#endif
  }
}

constexpr int64_t kCacheLine = 64;

// Memory that a thread needs for itself, in bytes, whichever items it takes.
struct Needs {
  int64_t lines = 0, matrix = 0, whole = 0;

  void add(const Tensor& t, bool as_whole) {
    const int64_t size = t.math_dtype == kFloat64 ? 8 : 4;
    // As Matrix and Sums in sums.h, rounded up.
    const int64_t matrix_bytes = 2 * kCacheLine + size * (t.rows + 2 * t.cols);
    if (t.form == kFactored || t.form == kSmall) {
      const int64_t together = t.exp_avg_scale == nullptr ? 2 : std::max<int64_t>(2, block_lines(t));
      lines = std::max(lines, together * t.cols * size);
    }
    if (t.form == kSmall) matrix = std::max(matrix, matrix_bytes);
    if (!as_whole) return;
    const int64_t kept = t.form == kFactored ? t.batch * matrix_bytes + 2 * t.slabs * t.cols * size : 0;
    whole = std::max(whole, 24 * t.slabs + kCacheLine + kept);
  }
};

// Kept from call to call: a step that repeats allocates nothing.
class ThreadMemory {
 public:
  ThreadBuffers reserve(const Needs& needs) {
    return {grown(lines_, needs.lines), grown(chunks_, kChunkBuffers * kChunk * int64_t(sizeof(double))),
            grown(matrix_, needs.matrix), grown(whole_, needs.whole)};
  }

 private:
  static void* grown(std::vector<char>& memory, int64_t bytes) {
    if (int64_t(memory.size()) < bytes + kCacheLine) memory.resize(bytes + kCacheLine);
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<void*>((at + kCacheLine - 1) / kCacheLine * kCacheLine);
  }

  std::vector<char> lines_, chunks_, matrix_, whole_;
};

// What the statistics of a tensor have left in the scratch; see Sums in sums.h.
double grad_sq_of(const Tensor& t, const void* scratch) {
  const double* slab = reinterpret_cast<const double*>(static_cast<const char*>(scratch) + t.scratch);
  double sum = 0;
  for (int64_t i = 0; i < t.slabs; ++i) sum += slab[3 * i];
  return sum;
}

}  // namespace
}  // namespace fused_adafactor

using namespace fused_adafactor;

extern "C" int32_t fused_adafactor_abi_version() { return kAbiVersion; }

extern "C" int32_t fused_adafactor_isa() { return chosen_isa; }

extern "C" int32_t fused_adafactor_set_isa(int32_t isa) {
  const int32_t best = best_isa();
  chosen_isa = isa < 0 || isa > best ? best : isa;
  return chosen_isa;
}

extern "C" int32_t fused_adafactor_run(const Item* items, int64_t count, Tensor* tensors, int64_t tensor_count,
                                       const void* const* grads, const double* grad_factors, uint8_t* skips,
                                       const Rule* rules, void* scratch, int32_t threads, Outcome* outcomes) {
  const Kernels& kernels = *kBuilds[chosen_isa];
  int64_t waves = 0;
  for (int64_t i = 0; i < tensor_count; ++i) {
    waves = std::max(waves, tensors[i].wave + 1);
    tensors[i].grad = grads[i];
    tensors[i].grad_factor = grad_factors == nullptr ? 1.0 : grad_factors[i];
    tensors[i].skip = skips != nullptr && skips[i] != 0;
  }
  std::unique_ptr<Progress[]> progress(new Progress[tensor_count]);
  // Of each wave: its items of the last sweep that are left to do.
  std::unique_ptr<std::atomic<int32_t>[]> apply_left(new std::atomic<int32_t>[waves]());
  Needs needs;
  bool only_sums = true;
  for (int64_t i = 0; i < count; ++i) {
    const Item& item = items[i];
    Progress& p = progress[item.tensor];
    if (item.kind == kStats && p.stats_left.fetch_add(1, std::memory_order_relaxed) == 0) {
      kernels.expect(tensors[item.tensor], rules[tensors[item.tensor].rule]);
    }
    if (item.kind == kMerge) p.merges_left.fetch_add(1, std::memory_order_relaxed);
    if (item.kind == kFinalize) p.finalize_left.fetch_add(1, std::memory_order_relaxed);
    if (item.kind == kMeasure || item.kind == kSettle) p.measure_left.fetch_add(1, std::memory_order_relaxed);
    if (item.kind == kUpdateRms) p.update_rms_left.fetch_add(1, std::memory_order_relaxed);
    if (item.kind == kApply) {
      p.strips_left.fetch_add(1, std::memory_order_relaxed);
      apply_left[tensors[item.tensor].wave].fetch_add(1, std::memory_order_relaxed);
    }
    only_sums = only_sums && item.kind == kStats;
    needs.add(tensors[item.tensor], item.kind == kWhole);
  }
  std::atomic<int64_t> ticket{0};
#pragma omp parallel num_threads(threads)
  {
    static thread_local ThreadMemory memory;
    ThreadBuffers buffers = memory.reserve(needs);
    for (int64_t i = ticket.fetch_add(1); i < count; i = ticket.fetch_add(1)) {
      const Item& item = items[i];
      Tensor& t = tensors[item.tensor];
      const Rule& r = rules[t.rule];
      Progress& p = progress[item.tensor];
      switch (item.kind) {
        case kWhole:
          for (int64_t slab = 0; slab < t.slabs; ++slab) kernels.stats(t, r, slab, buffers.whole, buffers);
          kernels.finalize(t, r, buffers.whole);
          for (int64_t slab = 0; slab < t.slabs; ++slab) kernels.update_rms(t, r, slab, buffers.whole, buffers);
          kernels.measure(t, r, buffers.whole);
          for (int64_t i = t.slabs * t.strips - 1; i >= 0; --i) kernels.apply(t, r, i, buffers.whole, buffers);
          break;
        case kStats:
          if (t.wave >= 2) wait_for(apply_left[t.wave - 2]);
          kernels.stats(t, r, item.slab, scratch, buffers);
          p.stats_left.fetch_sub(1, std::memory_order_acq_rel);
          break;
        case kMerge:
          wait_for(p.stats_left);
          kernels.merge(t, item.slab, scratch);
          p.merges_left.fetch_sub(1, std::memory_order_acq_rel);
          break;
        case kShare:
          wait_for(p.stats_left);
          wait_for(p.merges_left);
          kernels.share(t, r, scratch, buffers);
          break;
        case kFinalize:
          wait_for(p.stats_left);
          wait_for(p.merges_left);
          kernels.finalize(t, r, scratch);
          p.finalize_left.fetch_sub(1, std::memory_order_acq_rel);
          break;
        case kUpdateRms:
          wait_for(p.finalize_left);
          kernels.update_rms(t, r, item.slab, scratch, buffers);
          p.update_rms_left.fetch_sub(1, std::memory_order_acq_rel);
          break;
        case kMeasure:
          wait_for(p.finalize_left);
          wait_for(p.update_rms_left);
          kernels.measure(t, r, scratch);
          p.measure_left.fetch_sub(1, std::memory_order_acq_rel);
          break;
        case kSettle:
          kernels.settle(t);
          p.measure_left.fetch_sub(1, std::memory_order_acq_rel);
          break;
        case kApply:
          wait_for(p.measure_left);
          kernels.apply(t, r, item.slab, scratch, buffers);
          if (p.strips_left.fetch_sub(1, std::memory_order_acq_rel) == 1) kernels.confirm(t, r, scratch);
          apply_left[t.wave].fetch_sub(1, std::memory_order_acq_rel);
          break;
        case kAccumulate:
          kernels.accumulate(t, r, item.slab, buffers);
          break;
        default:
          kernels.average(t, r, item.slab, buffers);
      }
    }
  }
  for (int64_t i = 0; skips != nullptr && i < tensor_count; ++i) skips[i] = tensors[i].skip;
  for (int64_t i = 0; outcomes != nullptr && i < tensor_count; ++i) {
    const Tensor& t = tensors[i];
    outcomes[i] = {only_sums ? grad_sq_of(t, scratch) : t.grad_sq, t.param_rms, t.alpha, t.update_rms};
  }
  return 0;
}
