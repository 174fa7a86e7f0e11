// Fortified longjmp takes a jump to another stack for a mistake.
#undef _FORTIFY_SOURCE

#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace tensorcomp::cuda::emulation {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

struct Copy {
  char* to;
  const char* from;
  int bytes, width;
};

enum class State { kRunning, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
  char* stack = nullptr;
  State state = State::kRunning;
  int site = 0;
  void* argument = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

[[noreturn]] void fail(const char* text) {
  std::fprintf(stderr, "CUDA emulation: %s\n", text);
  std::abort();
}

Order current_order = Order::kAscending;
std::mt19937 shuffler(7);

struct AlignedDelete {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{16}); }
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<int> sequence;
  ucontext_t scheduler;
  jmp_buf jump;
  const std::function<void()>* body = nullptr;
  std::unique_ptr<char, AlignedDelete> memory;
  int64_t block = 0, blocks = 0;
  int running = 0;
  bool assertion_failed = false;
};
Block* the_block = nullptr;

Fiber& self() { return the_block->fibers[the_block->running]; }

#if defined(__SANITIZE_ADDRESS__)

// The sanitizer wants to know of every change of stacks.
void enter_scheduler() {
  Block& b = *the_block;
  Fiber& fiber = b.fibers[b.running];
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(fiber.state == State::kDone ? nullptr : &fake, b.scheduler.uc_stack.ss_sp,
                                 b.scheduler.uc_stack.ss_size);
  swapcontext(&fiber.context, &b.scheduler);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void start() {
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  the_block->scheduler.uc_stack.ss_sp = const_cast<void*>(bottom);
  the_block->scheduler.uc_stack.ss_size = size;
  (*the_block->body)();
  self().state = State::kDone;
  enter_scheduler();
}

void resume(int thread) {
  Block& b = *the_block;
  Fiber& fiber = b.fibers[thread];
  b.running = thread;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.context.uc_stack.ss_sp, fiber.context.uc_stack.ss_size);
  swapcontext(&b.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

#else

// A fiber is started through its context, and changed to and from by jumps: swapcontext costs two system calls.
void enter_scheduler() {
  Fiber& fiber = self();
  if (_setjmp(fiber.jump) == 0) _longjmp(the_block->jump, 1);
}

void start() {
  (*the_block->body)();
  self().state = State::kDone;
  enter_scheduler();
}

void resume(int thread) {
  Block& b = *the_block;
  Fiber& fiber = b.fibers[thread];
  b.running = thread;
  if (_setjmp(b.jump) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

#endif

bool anyone(State state) {
  return std::any_of(the_block->fibers.begin(), the_block->fibers.end(),
                     [&](const Fiber& f) { return f.state == state; });
}

// Everyone runs until nobody can: all threads are done, or all that are not wait for the block.
void run_block() {
  Block& b = *the_block;
  while (!std::all_of(b.fibers.begin(), b.fibers.end(), [](const Fiber& f) { return f.state == State::kDone; })) {
    if (current_order == Order::kShuffled) std::shuffle(b.sequence.begin(), b.sequence.end(), shuffler);
    bool moved = false;
    for (const int thread : b.sequence) {
      if (b.fibers[thread].state == State::kRunning) {
        resume(thread);
        moved = true;
      }
    }
    if (moved) continue;
    if (anyone(State::kAtWarp)) fail("threads of a warp wait for others that have gone another way");
    if (anyone(State::kDone)) fail("a block barrier that some threads have left without");
    for (Fiber& fiber : b.fibers) fiber.state = State::kRunning;
  }
}

// ldmatrix: thread l of the warp gets of matrix i the 4 bytes l % 4 of row l / 4, or transposed 16-bit elements.
void load(void* const* arguments, bool transposed) {
  uint32_t results[kWarp][4];
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto row_of = [&](int row) {
        const char* data = static_cast<const char*>(static_cast<LoadMatrices*>(arguments[8 * matrix + row])->row);
        if (reinterpret_cast<uintptr_t>(data) % 16 != 0) fail("a matrix row is not aligned to 16 bytes");
        return data;
      };
      char* to = reinterpret_cast<char*>(&results[lane][matrix]);
      if (!transposed) {
        std::memcpy(to, row_of(lane / 4) + 4 * (lane % 4), 4);
      } else {
        for (int i = 0; i < 2; ++i) std::memcpy(to + 2 * i, row_of(2 * (lane % 4) + i) + 2 * (lane / 4), 2);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    std::memcpy(static_cast<LoadMatrices*>(arguments[lane])->result, results[lane], 16);
  }
}

// The fragments of mma.m16n8k16 (16-bit elements, kK = 16) and mma.m16n8k8 (32-bit, kK = 8) as PTX lays them out.
template <int kK, typename Element>
void multiply(void* const* arguments, Element element) {
  float a[16][kK], b[kK][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& call = *static_cast<MatrixProduct*>(arguments[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + 8 * (i % 2);
      for (int e = 0; e < kK / 8; ++e) {
        const int column = kK == 16 ? 2 * member + e + 8 * (i / 2) : member + 4 * (i / 2);
        a[row][column] = element(call.a[i], e);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < kK / 8; ++e) {
        const int row = kK == 16 ? 2 * member + e + 8 * i : member + 4 * i;
        b[row][group] = element(call.b[i], e);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto& call = *static_cast<MatrixProduct*>(arguments[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = call.acc[i];
      for (int k = 0; k < kK; ++k) sum += a[row][k] * b[k][column];
      call.acc[i] = sum;
    }
  }
}

}  // namespace

void set_order(Order order) { current_order = order; }

int thread() { return the_block->running; }
int threads() { return static_cast<int>(the_block->fibers.size()); }
int64_t block() { return the_block->block; }
int64_t blocks() { return the_block->blocks; }
char* shared() { return the_block->memory.get(); }

void meet_block() {
  self().state = State::kAtBlock;
  enter_scheduler();
}

void meet_warp(int site, void* argument, void (*together)(void* const* arguments)) {
  Block& b = *the_block;
  Fiber& mine = self();
  mine.state = State::kAtWarp;
  mine.site = site;
  mine.argument = argument;
  Fiber* warp = &b.fibers[b.running / kWarp * kWarp];
  const bool last = std::all_of(warp, warp + kWarp, [](const Fiber& f) { return f.state == State::kAtWarp; });
  if (!last) return enter_scheduler();
  void* arguments[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (warp[lane].site != site) fail("threads of a warp meet at different instructions");
    arguments[lane] = warp[lane].argument;
    warp[lane].state = State::kRunning;
  }
  together(arguments);
}

void copy(void* to, const void* from, int bytes, int width) {
  if (bytes < 0 || bytes > width) fail("an asynchronous copy of a size other than 0 to its width");
  if (reinterpret_cast<uintptr_t>(to) % width != 0) fail("an asynchronous copy to an address not aligned to its width");
  if (bytes != 0 && reinterpret_cast<uintptr_t>(from) % width != 0) {
    fail("an asynchronous copy from an address not aligned to its width");
  }
  // On its way, it may have arrived or not: whoever still reads what was there before reads NaN.
  std::memset(to, 0xff, static_cast<size_t>(width));
  self().open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, width});
}

void fail_assertion() { the_block->assertion_failed = true; }

void commit() {
  Fiber& mine = self();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void wait(int pending) {
  Fiber& mine = self();
  while (static_cast<int>(mine.groups.size()) > pending) {
    for (const Copy& c : mine.groups.front()) {
      std::memset(c.to, 0, static_cast<size_t>(c.width));
      std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    }
    mine.groups.pop_front();
  }
}

cudaError_t run(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& body) {
  if (blocks == 0) return cudaSuccess;
  if (threads < 1 || threads > 1024 || threads % kWarp != 0) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kSharedLimit) return cudaErrorInvalidValue;
  Block b;
  the_block = &b;
  b.body = &body;
  b.blocks = blocks;
  b.fibers.resize(static_cast<size_t>(threads));
  b.sequence.resize(static_cast<size_t>(threads));
  std::iota(b.sequence.begin(), b.sequence.end(), 0);
  if (current_order == Order::kDescending) std::reverse(b.sequence.begin(), b.sequence.end());
  // Stacks stay for the next launch: so large an allocation is a system call, and there are hundreds.
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < b.fibers.size()) stacks.push_back(std::make_unique<char[]>(kStack));
  for (size_t i = 0; i < b.fibers.size(); ++i) b.fibers[i].stack = stacks[i].get();
  for (b.block = 0; b.block < blocks; ++b.block) {
    // Fresh memory for each block, of exactly the size asked for: an access beyond it is beyond an allocation.
    b.memory.reset(static_cast<char*>(::operator new(shared_bytes, std::align_val_t{16})));
    std::memset(b.memory.get(), 0xff, shared_bytes);
    for (Fiber& fiber : b.fibers) {
      fiber.state = State::kRunning;
      fiber.started = false;
      fiber.open.clear();
      fiber.groups.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &start, 0);
    }
    run_block();
    for (const Fiber& fiber : b.fibers) {
      if (!fiber.open.empty()) fail("an asynchronous copy that was never committed");
      for (const std::vector<Copy>& group : fiber.groups) {
        if (!group.empty()) fail("an asynchronous copy that nobody waited for");
      }
    }
  }
  the_block = nullptr;
  return b.assertion_failed ? cudaErrorAssert : cudaSuccess;
}

void load_matrices(void* const* arguments) { load(arguments, false); }
void load_matrices_transposed(void* const* arguments) { load(arguments, true); }
void mma_bfloat16(void* const* arguments) {
  multiply<16>(arguments,
               [](uint32_t word, int e) { return bfloat16_to_float(static_cast<uint16_t>(word >> 16 * e)); });
}
void mma_float16(void* const* arguments) {
  multiply<16>(arguments, [](uint32_t word, int e) { return float16_to_float(static_cast<uint16_t>(word >> 16 * e)); });
}
// The device reads the upper 19 bits only.
void mma_tf32(void* const* arguments) {
  multiply<8>(arguments, [](uint32_t word, int) { return bits_to_float(word & ~0x1fffu); });
}

void warp_sum(void* const* arguments) {
  float sums[kWarp], next[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) sums[lane] = *static_cast<float*>(arguments[lane]);
  for (int step = kWarp / 2; step > 0; step /= 2) {
    for (int lane = 0; lane < kWarp; ++lane) next[lane] = sums[lane] + sums[lane ^ step];
    std::memcpy(sums, next, sizeof sums);
  }
  for (int lane = 0; lane < kWarp; ++lane) *static_cast<float*>(arguments[lane]) = sums[lane];
}
void warp_prefix(void* const* arguments) {
  int32_t sum = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    auto& value = *static_cast<int32_t*>(arguments[lane]);
    value = sum += value;
  }
}
void warp_last(void* const* arguments) {
  const int32_t last = *static_cast<int32_t*>(arguments[kWarp - 1]);
  for (int lane = 0; lane < kWarp; ++lane) *static_cast<int32_t*>(arguments[lane]) = last;
}

}  // namespace tensorcomp::cuda::emulation
