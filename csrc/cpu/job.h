// One call's units of work, which threads claim as they become free.
#ifndef HIVTP_CPU_JOB_H_
#define HIVTP_CPU_JOB_H_

#include <stdint.h>

#include <atomic>

namespace hivtp {

struct Job {
  void (*body)(void*, int64_t, int32_t);
  void* context;
  int64_t units;
  int32_t useful;
  std::atomic<int64_t> claimed{0};
  std::atomic<int64_t> from_back{0};

  // The caller goes forward and its helpers backward, so that a core finds in its cache what it
  // used in the previous call.
  void call() {
    for (int64_t unit = 0; claimed.fetch_add(1, std::memory_order_relaxed) < units; ++unit) {
      body(context, unit, 0);
    }
  }
  void help(int32_t slot) {
    while (claimed.fetch_add(1, std::memory_order_relaxed) < units) {
      body(context, units - 1 - from_back.fetch_add(1, std::memory_order_relaxed), slot);
    }
  }
};

// Runs the job on the OpenMP team that torch loaded; false if the process has none.
bool run_on_torch_team(Job& job, int32_t threads);

}  // namespace hivtp

#endif  // HIVTP_CPU_JOB_H_
