// The order of patches as one integer: score descending, then raster index ascending.
#ifndef HIVTP_SORT_KEY_H_
#define HIVTP_SORT_KEY_H_

#include "hivtp/portable.h"

namespace hivtp {

constexpr int kIndexBits = 12;
static_assert(HIVTP_MAX_PATCHES <= 1 << kIndexBits, "a key must hold every index");
constexpr int kKeyBits = 32 + kIndexBits;
constexpr int32_t kLastIndex = (1 << kIndexBits) - 1;

// The key of a patch. Greater is better, no two are equal, and all are positive, so 0 means no
// patch. NaN counts as -inf and -0.0 as +0.0. Integer arithmetic only, so that no FPU mode can
// change the order.
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
