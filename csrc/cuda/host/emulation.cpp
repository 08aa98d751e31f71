// The fibers behind host/cuda_runtime.h: blocks of threads that take turns on one thread of the host.

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <map>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Store what a function must keep and the stack pointer, take those of another stack, and return there.
extern "C" void emulation_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, . - emulation_switch
)");
constexpr size_t kSavedWords = 6;  // below the address to return to
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, %function
emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp d8, d9, [sp, #80]
  stp d10, d11, [sp, #96]
  stp d12, d13, [sp, #112]
  stp d14, d15, [sp, #128]
  stp x29, x30, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp d8, d9, [sp, #80]
  ldp d10, d11, [sp, #96]
  ldp d12, d13, [sp, #112]
  ldp d14, d15, [sp, #128]
  ldp x29, x30, [sp, #144]
  add sp, sp, #160
  ret
.size emulation_switch, . - emulation_switch
)");
#else
#error "the emulation knows how to switch stacks on x86-64 and aarch64"
#endif

namespace emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;  // only what is touched takes memory
constexpr long kMostPolls = 3'000'000;  // nobody waits for so long unless for ever

struct Warp {
  unsigned arrived = 0, generation = 0;
  uint64_t values[2][kWarp];  // of this exchange, and of the one before, which some may still read
};

// What a GPU would do is not known.
[[noreturn]] void refuse(const char* what) {
  fprintf(stderr, "emulation: %s\n", what);
  abort();
}

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  uint64_t* barrier;
};

struct Block {
  std::vector<Copy> copies;                // that have not arrived
  std::map<uint64_t*, int64_t> expected;  // bytes of them, at each barrier, that have not been asked for
  unsigned number, arrived = 0, generation = 0;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> memory;
  char* shared;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  unsigned thread = 0, exchanges = 0;
  bool done = false;
  void* sanitizer = nullptr;
};

// One launch that is under way on this thread.
struct Launch {
  void (*kernel)(const void*);
  const void* argument;
  unsigned blocks, threads;
  void* scheduler = nullptr;
  long polls = 0;
};

thread_local Fiber* running;
thread_local Launch* launching;

#if defined(__SANITIZE_ADDRESS__)
thread_local void* scheduler_sanitizer;
thread_local const void* scheduler_stack;
thread_local size_t scheduler_bytes;
#endif

void to_scheduler(bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &running->sanitizer, scheduler_stack, scheduler_bytes);
#else
  (void)for_good;
#endif
  emulation_switch(&running->stack_pointer, launching->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(running->sanitizer, nullptr, nullptr);
#endif
}

void resume(Fiber& fiber) {
  running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_sanitizer, fiber.stack, kStackBytes);
#endif
  emulation_switch(&launching->scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_sanitizer, nullptr, nullptr);
#endif
}

void begin() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);
#endif
  launching->kernel(launching->argument);
  running->done = true;
  to_scheduler(true);
  abort();
}

void make_ready(Fiber& fiber) {
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
#if defined(__x86_64__)
  top -= 2;  // where a function begins, the stack is 8 bytes past a multiple of 16
  top[0] = reinterpret_cast<void*>(&begin);
  top[1] = nullptr;
  top -= kSavedWords;
  for (size_t i = 0; i < kSavedWords; ++i) top[i] = nullptr;
#else
  top -= 20;
  for (size_t i = 0; i < 20; ++i) top[i] = nullptr;
  top[19] = reinterpret_cast<void*>(&begin);  // x30
#endif
  fiber.stack_pointer = top;
}

// Blocks of a GPU are of any speed. With FUSED_ADAFACTOR_EMULATED_SEED, a number that is not 0, every block stops now
// and then, some times for so long that others do all that does not wait for it.
class Stalls {
 public:
  explicit Stalls(size_t blocks) : left_(blocks, 0) {
    const char* seed = getenv("FUSED_ADAFACTOR_EMULATED_SEED");
    on_ = seed != nullptr && atoi(seed) != 0;
    if (on_) random_.seed(unsigned(atoi(seed)));
  }
  // Asked once for each turn of a block.
  bool stops(size_t block) {
    if (!on_) return false;
    if (left_[block] > 0) return --left_[block] > 0;
    if (random_() % 100 == 0) left_[block] = random_() % 1000;
    return left_[block] > 0;
  }

 private:
  std::vector<unsigned> left_;
  std::mt19937 random_;
  bool on_;
};

// Run some blocks, all of them at the same time, to their end.
void run_blocks(unsigned first, unsigned count, size_t shared_bytes) {
  const size_t fiber_count = size_t(count) * launching->threads;
  char* stacks = static_cast<char*>(mmap(nullptr, fiber_count * kStackBytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) abort();
  std::vector<Block> blocks(count);
  std::vector<Fiber> fibers(fiber_count);
  for (unsigned b = 0; b < count; ++b) {
    Block& block = blocks[b];
    block.number = first + b;
    block.warps.resize(launching->threads / kWarp);
    // Nothing is there to begin with that a kernel could count on.
    block.memory.reset(new char[shared_bytes + 128]);
    memset(block.memory.get(), 0xA5, shared_bytes + 128);
    const uintptr_t at = (reinterpret_cast<uintptr_t>(block.memory.get()) + 127) / 128 * 128;
    block.shared = reinterpret_cast<char*>(at);
    for (unsigned t = 0; t < launching->threads; ++t) {
      Fiber& fiber = fibers[size_t(b) * launching->threads + t];
      fiber.stack = stacks + (size_t(b) * launching->threads + t) * kStackBytes;
      fiber.block = &block;
      fiber.thread = t;
      make_ready(fiber);
    }
  }
  Stalls stalls(count);
  for (bool any = true; any;) {
    any = false;
    for (unsigned b = 0; b < count; ++b) {
      const bool stops = stalls.stops(b);
      for (unsigned t = 0; t < launching->threads; ++t) {
        Fiber& fiber = fibers[size_t(b) * launching->threads + t];
        if (fiber.done) continue;
        any = true;
        if (!stops) resume(fiber);
      }
    }
  }
  munmap(stacks, fiber_count * kStackBytes);
}

}  // namespace

uint3 thread_index() { return {running->thread, 0, 0}; }
uint3 block_index() { return {running->block->number, 0, 0}; }
dim3 blocks() { return dim3(launching->blocks); }
char* shared_memory() { return running->block->shared; }

void wait_for_block() {
  Block& block = *running->block;
  const unsigned generation = block.generation;
  if (++block.arrived == launching->threads) {
    block.arrived = 0;
    ++block.generation;
    launching->polls = 0;
    return;
  }
  while (block.generation == generation) to_scheduler(false);
}

void wait_for_warp() {
  Warp& warp = running->block->warps[running->thread / kWarp];
  const unsigned generation = warp.generation;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
    return;
  }
  while (warp.generation == generation) to_scheduler(false);
}

void let_others_run() {
  if (++launching->polls > kMostPolls) {
    fprintf(stderr, "emulation: block %u waits for ever\n", running->block->number);
    abort();
  }
  to_scheduler(false);
}

void copy_now(void* to, const void* from, size_t bytes) {
  const auto is_whole = [](uintptr_t number) { return number % 16 == 0; };
  if (!is_whole(reinterpret_cast<uintptr_t>(to)) || !is_whole(reinterpret_cast<uintptr_t>(from)) || !is_whole(bytes)) {
    refuse("a copy is not of multiples of 16 bytes");
  }
  memcpy(to, from, bytes);
}

void expect_copies(uint64_t* barrier, int bytes) {
  int64_t& expected = running->block->expected[barrier];
  bool all_there = expected == 0;
  for (const Copy& copy : running->block->copies) all_there = all_there && copy.barrier != barrier;
  if (!all_there) refuse("a barrier expects more bytes before those that it expected are there");
  if (bytes <= 0 || bytes >= 1 << 20) refuse("a barrier expects a number of bytes that it cannot count");
  expected = bytes;
}

void copy_later(void* to, const void* from, size_t bytes, uint64_t* barrier) {
  int64_t& expected = running->block->expected[barrier];
  expected -= int64_t(bytes);
  if (expected < 0) refuse("a copy is of more bytes than its barrier expects");
  running->block->copies.push_back({to, from, bytes, barrier});
}

void wait_for_copies(uint64_t* barrier, unsigned parity) {
  while (*barrier % 2 == parity) {
    std::vector<Copy> asked, others;
    for (const Copy& copy : running->block->copies) (copy.barrier == barrier ? asked : others).push_back(copy);
    if (asked.empty()) {
      let_others_run();
      continue;
    }
    if (running->block->expected[barrier] != 0) refuse("fewer bytes were asked for than a barrier expects");
    for (const Copy& copy : asked) copy_now(copy.to, copy.from, copy.bytes);
    running->block->copies = others;
    ++*barrier;
  }
}

uint64_t exchange(uint64_t value, unsigned lane) {
  Warp& warp = running->block->warps[running->thread / kWarp];
  uint64_t* values = warp.values[running->exchanges++ % 2];
  values[running->thread % kWarp] = value;
  wait_for_warp();
  return values[lane];
}

int launch(void (*kernel)(const void*), const void* argument, unsigned blocks, unsigned threads, size_t shared_bytes,
           bool together) {
  Launch here{kernel, argument, blocks, threads};
  launching = &here;
  if (together) {
    run_blocks(0, blocks, shared_bytes);
  } else {
    for (unsigned block = 0; block < blocks; ++block) run_blocks(block, 1, shared_bytes);
  }
  launching = nullptr;
  return 0;
}

}  // namespace emulation
