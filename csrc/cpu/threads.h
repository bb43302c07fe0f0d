// Threads for a call: those of torch, or else a pool shared by all calls of the process.
#ifndef HIVTP_CPU_THREADS_H_
#define HIVTP_CPU_THREADS_H_

#include <stdint.h>

namespace hivtp {

// Runs body(context, unit, slot) once for each unit. Units are handed out to at most `useful` of
// the `threads` as they get free, so a result must not depend on the slot, which numbers the
// threads of this call from 0 and chooses scratch memory. Returns when all units are done.
//
// Serial where there is one unit or one useful thread, in a parallel region of OpenMP, and, in a
// process without OpenMP, while another call is using the pool.
void parallel_for(int32_t threads, int32_t useful, int64_t units,
                  void (*body)(void*, int64_t, int32_t), void* context);

// How many of `threads` are worth waking for that much work.
static inline int32_t useful_threads(int32_t threads, double nanoseconds) {
  constexpr double kWorthWaking = 20e3;
  const double useful = nanoseconds / kWorthWaking;
  return useful < 1 ? 1 : useful < threads ? int32_t(useful) : threads;
}

}  // namespace hivtp

#endif  // HIVTP_CPU_THREADS_H_
