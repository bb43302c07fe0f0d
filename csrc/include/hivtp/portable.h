// What the block algorithms need from a compiler, on the host and on a device.
#ifndef HIVTP_PORTABLE_H_
#define HIVTP_PORTABLE_H_

#include "hivtp/api.h"

// Always inlined. The CPU kernels are compiled once per instruction set, so a copy that the linker
// shares between them could use instructions that the machine lacks.
#ifdef __CUDACC__
#define HIVTP_HD __host__ __device__ __forceinline__
#else
#define HIVTP_HD inline __attribute__((always_inline))
#endif

#define HIVTP_STRING_(text) #text
#define HIVTP_STRING(text) HIVTP_STRING_(text)

namespace hivtp {

template <class To, class From>
HIVTP_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  union {
    From from;
    To to;
  } bits = {value};
  return bits.to;
}

// Workspaces are divided into pieces that start at a cache line.
HIVTP_HD int64_t aligned(int64_t bytes) {
  return (bytes + HIVTP_WORKSPACE_ALIGNMENT - 1) & -int64_t{HIVTP_WORKSPACE_ALIGNMENT};
}

}  // namespace hivtp

#endif  // HIVTP_PORTABLE_H_
