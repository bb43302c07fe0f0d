// The order of patches as one integer: score descending, then raster index ascending.
#ifndef HIVTP_SORT_KEY_H_
#define HIVTP_SORT_KEY_H_

#include "hivtp/portable.h"

namespace hivtp {

constexpr int kIndexBits = 12;  // at most 4096 patches
constexpr int kKeyBits = 32 + kIndexBits;
constexpr int32_t kLastIndex = (1 << kIndexBits) - 1;

// The key of a patch; bigger is better, no two are equal, and all are positive: 0 is no patch.
// NaN counts as -inf, -0.0 as +0.0. Integers only, so that no mode of the FPU can change the order.
HIVTP_HD int64_t sort_key(float score, int32_t index) {
  uint32_t bits = bit_cast<uint32_t>(score);
  const uint32_t magnitude = bits & 0x7fffffffu;
  bits = magnitude > 0x7f800000u ? 0xff800000u : bits;
  bits = magnitude == 0 ? 0 : bits;
  const uint32_t ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return int64_t(ordered) << kIndexBits | (kLastIndex - index);
}

HIVTP_HD int32_t key_index(int64_t key) {
  return kLastIndex - int32_t(key & kLastIndex);
}

}  // namespace hivtp

#endif  // HIVTP_SORT_KEY_H_
