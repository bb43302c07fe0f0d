// Threads as fibers: one runs at a time, until it waits. Part of runner.cpp.
#ifndef HIVTP_EMULATOR_FIBERS_H_
#define HIVTP_EMULATOR_FIBERS_H_

#include <sys/mman.h>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {
namespace {

// A little more than a power of two, so that stacks do not compete for the same cache sets.
constexpr size_t kStackBytes = 64 * 1024 + 9 * 64;

void start();

#ifdef __x86_64__

// Saves the callee-saved registers and loads those of another context. swapcontext would make a
// system call each time.
asm(R"(
.text
.type hivtp_switch, @function
hivtp_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size hivtp_switch, .-hivtp_switch
)");
extern "C" void hivtp_switch(void** save, void* resume) __attribute__((visibility("hidden")));

struct Context {
  void* top = nullptr;

  // Six registers, the return address of the first switch, and the end of the stack.
  void prepare(char* stack) {
    void** end = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & -64);
    end[-2] = reinterpret_cast<void*>(&start);
    top = end - 8;
  }
  static void swap(Context& from, Context& to) { hivtp_switch(&from.top, to.top); }
};

#else

struct Context {
  ucontext_t state;

  void prepare(char* stack) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = kStackBytes;
    state.uc_link = nullptr;
    makecontext(&state, start, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
};

#endif

struct Fiber : Thread {
  Context context = {};
  const Rendezvous* place = nullptr;  // where it waits, and since which generation
  uint32_t seen = 0;
  bool ended = false;

  bool can_run() const { return !ended && (!place || place->generation != seen); }
};

// State of the current launch.
Job job;
Context scheduler;
const char* error;

char* stacks() {
  static char* const memory =
      static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED) std::abort();
  return memory;
}

void suspend() {
  Context::swap(static_cast<Fiber*>(current)->context, scheduler);
}

void start() {
  job.kernel(job.arguments);
  static_cast<Fiber*>(current)->ended = true;
  suspend();
}

uint32_t arrive(Rendezvous& place) {
  return ++place.arrived;
}

void wait(const Rendezvous& place, uint32_t seen) {
  auto& fiber = *static_cast<Fiber*>(current);
  fiber.place = &place;
  fiber.seen = seen;
  suspend();
}

void release(Rendezvous& place, uint32_t generation) {
  place.arrived = 0;
  place.generation = generation;
}

// Runs the threads of one warp until each has ended or waits for another warp.
bool run_warp(Fiber* fibers) {
  bool ran = false;
  for (bool again = true; again && !error;) {
    again = false;
    for (int32_t lane = 0; lane < kWarp && !error; ++lane) {
      if (!fibers[lane].can_run()) continue;
      current = &fibers[lane];
      Context::swap(scheduler, fibers[lane].context);
      ran = again = true;
    }
  }
  return ran;
}

std::string run(const Job& new_job, const hivtp::Launch& launch,
                const std::vector<uint32_t>& blocks) {
  job = new_job;
  error = nullptr;
  std::vector<Fiber> fibers(launch.threads);
  for (const uint32_t x : blocks) {
    BlockState block(x, launch);
    for (uint32_t rank = 0; rank < launch.threads; ++rank) {
      fibers[rank] = {block.thread(rank)};
      fibers[rank].context.prepare(stacks() + rank * kStackBytes);
    }
    for (bool ran = true; ran;) {
      ran = false;
      for (uint32_t rank = 0; rank < launch.threads; rank += kWarp) ran |= run_warp(&fibers[rank]);
    }
    current = nullptr;
    if (error) return error;
    for (const Fiber& fiber : fibers) {
      if (fiber.ended) continue;
      const bool in_block = fiber.place == &block.barrier;
      return "thread " + std::to_string(fiber.index.x) + " waits at " +
             (in_block ? "__syncthreads" : fiber.warp->records[fiber.lane].operation) +
             ", which not all reach";
    }
    if (!block.guard_is_intact()) return "a write past the end of shared memory";
  }
  return "";
}

}  // namespace

void fail(const char* what) {
  error = what;
  for (;;) suspend();
}

}  // namespace emulator

#endif  // HIVTP_EMULATOR_FIBERS_H_
