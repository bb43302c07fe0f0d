// csrc/cuda/driver.h over the emulator: launches run immediately, on the CPU.
#include "cuda/driver.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kMaxSharedBytes = 64 * 1024;  // sm_75 has the least

struct Job {
  Kernel kernel;
  void** arguments;
};

// A block with its warps and its shared memory, which has the exact size and is initialized to NaN.
// The guard after it must stay untouched; the address sanitizer has its own.
class BlockState : public Block {
 public:
  BlockState(uint32_t x, const hivtp::Launch& launch)
      : Block{{x, 0, 0}, {launch.threads, 1, 1}, nullptr, {launch.threads}},
        warps(launch.threads / kWarp),
        bytes_(launch.shared_bytes) {
    if (posix_memalign(reinterpret_cast<void**>(&shared), 64, bytes_ + kGuard)) std::abort();
    std::memset(shared, 0xff, bytes_ + kGuard);
  }
  ~BlockState() { std::free(shared); }
  BlockState(const BlockState&) = delete;
  BlockState& operator=(const BlockState&) = delete;

  Thread thread(uint32_t rank) {
    return {{rank, 0, 0}, this, &warps[rank / kWarp], int32_t(rank % kWarp)};
  }

  bool guard_is_intact() const {
    const auto* guard = reinterpret_cast<const unsigned char*>(shared) + bytes_;
    for (size_t i = 0; i < kGuard; ++i) {
      if (guard[i] != 0xff) return false;
    }
    return true;
  }

 private:
#ifdef HIVTP_EMULATOR_THREADS
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 64;
#endif
  std::vector<Warp> warps;
  size_t bytes_;
};

HIVTP_UNSEEN void check_operations(const Record* records) {
  for (int32_t lane = 1; lane < kWarp; ++lane) {
    if (records[lane].operation != records[0].operation) {
      fail("the lanes of a warp are at different operations");
    }
  }
}

}  // namespace

thread_local Thread* current = nullptr;

}  // namespace emulator

#ifdef HIVTP_EMULATOR_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace emulator {
namespace {

__attribute__((always_inline)) inline void meet(Rendezvous& place, const Record* records,
                                                void (*work)(const Record*)) {
  const uint32_t seen = place.generation;
  if (arrive(place) < place.size) return wait(place, seen);
  if (records) check_operations(records);
  if (work) work(records);
  release(place, seen + 1);
}

}  // namespace

void synchronise_block() {
  meet(current->block->barrier, nullptr, nullptr);
}

void synchronise_warp() {
  Warp& warp = *current->warp;
  warp.records[current->lane] = {"__syncwarp", nullptr};
  meet(warp.place, warp.records, nullptr);
}

HIVTP_UNSEEN void exchange(const char* operation, void* operands, void (*work)(const Record*)) {
  Warp& warp = *current->warp;
  warp.records[current->lane] = {operation, operands};
  meet(warp.place, warp.records, work);
}

}  // namespace emulator

namespace hivtp {
namespace {

thread_local std::string last_detail;

HivtpStatus fail(const Launch& launch, const std::string& detail) {
  last_detail = std::string(launch.kernel) + ": " + detail;
  return HIVTP_DRIVER_ERROR;
}

// Blocks may run in any order. HIVTP_EMULATOR_SEED chooses one.
std::vector<uint32_t> order(uint32_t blocks) {
  std::vector<uint32_t> result(blocks);
  std::iota(result.begin(), result.end(), 0);
  if (const char* seed = std::getenv("HIVTP_EMULATOR_SEED")) {
    std::mt19937 random(std::strtoul(seed, nullptr, 10));
    for (uint32_t i = blocks; i > 1; --i) std::swap(result[i - 1], result[random() % i]);
  }
  return result;
}

}  // namespace

HivtpStatus check_stream(int32_t, void*) {
  return HIVTP_OK;
}

HivtpStatus launch(const Launch& launch, void** arguments, void*) {
  const emulator::Kernel kernel = emulator::find(launch.kernel);
  if (!kernel) return fail(launch, "no such kernel");
  const auto [x, y, z] = launch.grid;
  if (x == 0 || x > 0x7fffffffu || y != 1 || z != 1) {
    return fail(launch, "a grid of " + std::to_string(x) + " blocks");
  }
  if (launch.threads == 0 || launch.threads > emulator::kMaxThreads ||
      launch.threads % kWarp != 0) {
    return fail(launch, "a block of " + std::to_string(launch.threads) + " threads");
  }
  if (launch.shared_bytes > emulator::kMaxSharedBytes) {
    return fail(launch, std::to_string(launch.shared_bytes) + " bytes of shared memory");
  }
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const std::string error = emulator::run({kernel, arguments}, launch, order(x));
  return error.empty() ? HIVTP_OK : fail(launch, error);
}

HivtpStatus zero(void* data, size_t bytes, void*) {
  std::memset(data, 0, bytes);
  return HIVTP_OK;
}

}  // namespace hivtp

const char* hivtp_cuda_target(void) {
  return "the emulator of the tests";
}

int32_t hivtp_cuda_runs_on(int32_t, int32_t) {
  return 1;
}

const char* hivtp_cuda_detail(void) {
  return hivtp::last_detail.c_str();
}
