// Threads as real threads, those of several blocks at once. Their writes are ordered by exactly
// what orders the kernel's writes: barriers here, the ticket in emulator.h. Part of runner.cpp.
#ifndef HIVTP_EMULATOR_THREADS_H_
#define HIVTP_EMULATOR_THREADS_H_

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>
#include <memory>
#include <thread>

namespace emulator {
namespace {

constexpr size_t kBlocksAtOnce = 8;
constexpr time_t kPatience = 120;  // seconds

__attribute__((always_inline)) inline uint32_t arrive(Rendezvous& place) {
  return __atomic_add_fetch(&place.arrived, 1, __ATOMIC_ACQ_REL);
}

__attribute__((always_inline)) inline void wait(Rendezvous& place, uint32_t seen) {
  const timespec patience{kPatience, 0};
  while (__atomic_load_n(&place.generation, __ATOMIC_ACQUIRE) == seen) {
    if (syscall(SYS_futex, &place.generation, FUTEX_WAIT_PRIVATE, seen, &patience, nullptr, 0) &&
        errno == ETIMEDOUT) {
      fail("not all threads reach what others wait at");
    }
  }
}

__attribute__((always_inline)) inline void release(Rendezvous& place, uint32_t generation) {
  __atomic_store_n(&place.arrived, 0, __ATOMIC_RELAXED);
  __atomic_store_n(&place.generation, generation, __ATOMIC_RELEASE);
  syscall(SYS_futex, &place.generation, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

std::string run(const Job& job, const hivtp::Launch& launch, const std::vector<uint32_t>& order) {
  for (size_t first = 0; first < order.size(); first += kBlocksAtOnce) {
    std::vector<std::unique_ptr<BlockState>> blocks;
    std::vector<std::thread> threads;
    for (size_t i = first; i < order.size() && i < first + kBlocksAtOnce; ++i) {
      blocks.push_back(std::make_unique<BlockState>(order[i], launch));
      for (uint32_t rank = 0; rank < launch.threads; ++rank) {
        threads.emplace_back([&job, thread = blocks.back()->thread(rank)]() mutable {
          current = &thread;
          job.kernel(job.arguments);
        });
      }
    }
    for (std::thread& thread : threads) thread.join();
  }
  return "";
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

}  // namespace emulator

#endif  // HIVTP_EMULATOR_THREADS_H_
