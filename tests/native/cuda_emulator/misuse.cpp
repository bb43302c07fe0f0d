// Kernels with errors that the emulator must report, and one without. Prints the reports.
#include <cstdio>
#include <cstring>

#include "cuda/driver.h"
#include "emulator.h"

namespace {

struct Misuse {
  const char* name;
  emulator::Kernel kernel;
};

constexpr Misuse kMisuses[] = {
    {"barrier_for_some",
     [](void**) {
       if (threadIdx.x < 40) __syncthreads();
     }},
    {"shuffle_for_some",
     [](void**) {
       if (threadIdx.x % 2 == 0) __shfl_xor_sync(0xffffffffu, 1, 2);
     }},
    {"shuffle_next_to_barrier",
     [](void**) {
       if (threadIdx.x < 3) __syncthreads();
       __shfl_xor_sync(0xffffffffu, 1, 1);
     }},
    {"different_operations",
     [](void**) {
       if (threadIdx.x < 3) {
         __syncwarp();
       } else {
         __shfl_up_sync(0xffffffffu, 1, 1);
       }
     }},
    {"shuffle_of_half_a_warp", [](void**) { __shfl_xor_sync(0xffffu, 1, 1); }},
    {"write_past_shared_memory",
     [](void**) {
       HIVTP_SHARED(shared);
       if (threadIdx.x < 5) shared[threadIdx.x].words[3] = 0;
     }},
    {"nothing_wrong",
     [](void**) {
       HIVTP_SHARED(shared);
       const uint32_t below = __shfl_up_sync(0xffffffffu, threadIdx.x, 1);
       if (threadIdx.x < 4) shared[threadIdx.x].words[3] = below;
       __syncthreads();
     }},
};

}  // namespace

emulator::Kernel emulator::find(const char* name) {
  for (const Misuse& misuse : kMisuses) {
    if (!std::strcmp(misuse.name, name)) return misuse.kernel;
  }
  return nullptr;
}

int main() {
  const auto report = [](const hivtp::Launch& launch) {
    std::puts(hivtp::launch(launch, nullptr, nullptr) ? hivtp_cuda_detail() : launch.kernel);
  };
  for (const Misuse& misuse : kMisuses) report({misuse.name, {2, 1, 1}, 64, 64});
  report({"unknown", {1, 1, 1}, 32, 0});
  report({"nothing_wrong", {0, 1, 1}, 32, 64});
  report({"nothing_wrong", {1, 1, 1}, 1056, 64});
  report({"nothing_wrong", {1, 1, 1}, 40, 64});
  report({"nothing_wrong", {1, 1, 1}, 64, 65537});
}
