// The OpenMP runtime that torch computes with, borrowed.
//
// Precondition: torch is imported before the first call, and its libgomp is visible in the process
// (dlsym finds it, nothing is linked). Its threads may still be polling for work when a call comes,
// and would keep our own threads from the cores; they do not survive a fork. Always the whole team,
// as in torch: libgomp ends the threads that a smaller team leaves out, and torch's next op would
// have to start them again.
#include <dlfcn.h>
#include <pthread.h>

#include "job.h"

namespace hivtp {
namespace {

using ParallelRegion = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
using ThreadNumber = int (*)();

template <class Function>
Function loaded(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

const ThreadNumber thread_number = loaded<ThreadNumber>("omp_get_thread_num");
std::atomic<ParallelRegion> torch_team{[] {
  pthread_atfork(nullptr, nullptr, [] { torch_team = nullptr; });
  return thread_number ? loaded<ParallelRegion>("GOMP_parallel") : nullptr;
}()};

void join(void* context) {
  Job& job = *static_cast<Job*>(context);
  const int32_t slot = thread_number();
  if (slot == 0) {
    job.call();
  } else if (slot < job.useful) {
    job.help(slot);
  }
}

}  // namespace

bool run_on_torch_team(Job& job, int32_t threads) {
  const ParallelRegion run = torch_team;
  if (run) run(join, &job, unsigned(threads), 0);
  return run != nullptr;
}

}  // namespace hivtp
