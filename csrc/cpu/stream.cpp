// A row copied around the caches, where a plain store first reads the line that it overwrites.
#include "kernels.h"
#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace hivtp {
namespace HIVTP_TARGET {
namespace {

HIVTP_HD void store_around(Float* out, Float value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(out), (__m512)value);
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(out), (__m256)value);
#elif defined(__SSE2__)
  _mm_stream_ps(reinterpret_cast<float*>(out), (__m128)value);
#else
  *out = value;
#endif
}

}  // namespace

void stream_row(char* out, const char* row, int64_t bytes) {
  constexpr int64_t kAtOnce = kStreamedBytes / sizeof(Float);
  for (int64_t i = 0; i < bytes; i += kStreamedBytes) {
    Float values[kAtOnce];
    __builtin_memcpy(values, row + i, sizeof values);
    for (int v = 0; v < kAtOnce; ++v)
      store_around(reinterpret_cast<Float*>(out + i) + v, values[v]);
  }
}

}  // namespace HIVTP_TARGET
}  // namespace hivtp
