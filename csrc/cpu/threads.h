// Threads for a call: torch's, or else a pool shared by all calls in the process.
#ifndef HIVTP_CPU_THREADS_H_
#define HIVTP_CPU_THREADS_H_

#include <stdint.h>

namespace hivtp {

// Runs body(context, unit, slot) once per unit. Units go to at most `useful` of the `threads` as
// these become free, so results must not depend on the slot, which numbers the threads of this call
// from 0 and selects scratch memory. Returns when all units are done.
//
// Runs serially if there is one unit or one useful thread, inside an OpenMP parallel region, and,
// in a process without OpenMP, while another call is using the pool.
void parallel_for(int32_t threads, int32_t useful, int64_t units,
                  void (*body)(void*, int64_t, int32_t), void* context);

// How many of `threads` are worth waking for this much work.
static inline int32_t useful_threads(int32_t threads, double nanoseconds) {
  constexpr double kWorthWaking = 20e3;
  const double useful = nanoseconds / kWorthWaking;
  return useful < 1 ? 1 : useful < threads ? int32_t(useful) : threads;
}

}  // namespace hivtp

#endif  // HIVTP_CPU_THREADS_H_
