// What a launch and its kernel must agree on, in addition to api.h.
#ifndef HIVTP_CUDA_PARAMS_H_
#define HIVTP_CUDA_PARAMS_H_

#include "hivtp/portable.h"

namespace hivtp {

constexpr int32_t kWarp = 32;
constexpr int32_t kClsThreads = 256;
constexpr int32_t kTileThreads = 128;  // the kernels for rows="all"
constexpr int32_t kSelectThreads = 256;
constexpr int32_t kGatherThreads = 256;

constexpr int32_t kTile = 64;         // query rows by keys in a tile of logits
constexpr int32_t kSliceBytes = 128;  // of each row of a tile of q or k, multiplied at a time

// Shared memory through which the warps of a block exchange values.
constexpr int32_t kReduceBytes = 64;

HIVTP_HD constexpr int32_t select_shared_bytes(int32_t patches) {
  return kReduceBytes + patches * int32_t(sizeof(int64_t) + sizeof(int8_t));
}

HIVTP_HD constexpr int32_t cls_shared_bytes(int32_t tokens) {
  return kReduceBytes + tokens * int32_t(sizeof(float));
}

HIVTP_HD constexpr int32_t tiles(int32_t tokens) {
  return (tokens + kTile - 1) / kTile;
}

HIVTP_HD constexpr int32_t slices(int32_t row_bytes) {
  return (row_bytes + kSliceBytes - 1) / kSliceBytes;
}

// The block's own tile and one slice of the tile that it multiplies by.
HIVTP_HD constexpr int32_t lse_shared_bytes(int32_t row_bytes) {
  return (slices(row_bytes) + 1) * kTile * kSliceBytes;
}

// In addition, lse of all queries, to the end of the last tile.
HIVTP_HD constexpr int32_t columns_shared_bytes(int32_t row_bytes, int32_t tokens) {
  return lse_shared_bytes(row_bytes) + tiles(tokens) * kTile * int32_t(sizeof(float));
}

// Rows of partial sums are padded to 16 bytes.
HIVTP_HD constexpr int32_t padded(int32_t patches) {
  return (patches + 3) / 4 * 4;
}

// What an image's last block needs to turn the partial sums of its heads into scores and, if asked
// to, a selection.
struct Finish {
  int32_t* tickets;  // [batch], zero
  float* partials;   // [batch, layers * heads, padded(patches)]
  float* scores;     // [batch, patches]
  HivtpSelectParams params;
  HivtpSelection selection;  // null counts: scores only
};

}  // namespace hivtp

#endif  // HIVTP_CUDA_PARAMS_H_
