// Argument checks shared by the CPU and CUDA entry points. Host only; they run before any work.
#ifndef HIVTP_CHECK_H_
#define HIVTP_CHECK_H_

#include "hivtp/api.h"
#include "hivtp/select.h"

namespace hivtp {

inline bool between(int64_t value, int64_t low, int64_t high) {
  return low <= value && value <= high;
}

inline HivtpStatus check(const HivtpAttention* a) {
  if (!a) return HIVTP_NULL_POINTER;
  if (!between(a->layers, 1, HIVTP_MAX_LAYERS) || a->batch < 0 || a->heads < 1 ||
      !between(a->tokens, 1, HIVTP_MAX_TOKENS) || a->head_dim % 8 != 0 ||
      !between(a->head_dim, 8, HIVTP_MAX_HEAD_DIM) || !between(a->prefix, 0, a->tokens - 1)) {
    return HIVTP_BAD_ATTENTION_SHAPE;
  }
  if (!between(a->dtype, HIVTP_FLOAT32, HIVTP_BFLOAT16)) return HIVTP_BAD_DTYPE;
  if (!between(a->rows, HIVTP_ROWS_CLS, HIVTP_ROWS_ALL)) return HIVTP_BAD_ROWS;
  return HIVTP_OK;
}

inline HivtpStatus check(const HivtpSelectParams* params) {
  if (!params) return HIVTP_NULL_POINTER;
  const HivtpSelectParams& p = *params;
  if (!between(p.height, 1, HIVTP_MAX_PATCHES) || !between(p.width, 1, HIVTP_MAX_PATCHES)) {
    return HIVTP_BAD_SELECT_PARAMS;
  }
  const int64_t patches = int64_t{p.height} * p.width;
  if (patches > HIVTP_MAX_PATCHES || !between(p.regions_y, 1, p.height) ||
      !between(p.regions_x, 1, p.width) || !between(p.window_y, 1, HIVTP_MAX_PATCHES) ||
      !between(p.window_x, 1, HIVTP_MAX_PATCHES)) {
    return HIVTP_BAD_SELECT_PARAMS;
  }
  // The capacity must hold the most patches that these params can keep: selection writes them all.
  int64_t most =
      int64_t{(p.height + p.window_y - 1) / p.window_y} * ((p.width + p.window_x - 1) / p.window_x);
  for (int32_t row = 0; row < p.regions_y; ++row) {
    for (int32_t column = 0; column < p.regions_x; ++column) {
      const Region region(p, row, column);
      if (!between(region.quota, 0, region.area)) return HIVTP_BAD_SELECT_PARAMS;
      most += region.quota;
    }
  }
  return between(p.capacity, most < patches ? most : patches, patches) ? HIVTP_OK
                                                                       : HIVTP_BAD_SELECT_PARAMS;
}

// Both, and that they agree on the number of patches.
inline HivtpStatus check(const HivtpAttention* a, const HivtpSelectParams* params) {
  if (const HivtpStatus status = check(a)) return status;
  if (const HivtpStatus status = check(params)) return status;
  return a->tokens - a->prefix == params->height * params->width ? HIVTP_OK : HIVTP_BAD_GRID;
}

// Pointers of a valid attention: q and k of every layer, and lse of all layers or none.
inline HivtpStatus check_data(const HivtpAttention& a) {
  for (int32_t layer = 0; layer < a.layers; ++layer) {
    if (!a.q[layer].data || !a.k[layer].data) return HIVTP_NULL_POINTER;
    if (!a.lse[layer].data != !a.lse[0].data) return HIVTP_NULL_POINTER;
  }
  return HIVTP_OK;
}

// Pointers that a selection with valid params writes to.
inline HivtpStatus check_data(const HivtpSelectParams& params, const HivtpSelection* selection) {
  if (!selection || !selection->counts) return HIVTP_NULL_POINTER;
  const bool empty = params.capacity == 0;
  return empty || (selection->indices && selection->stage) ? HIVTP_OK : HIVTP_NULL_POINTER;
}

inline HivtpStatus check_workspace(const void* workspace) {
  if (!workspace) return HIVTP_NULL_POINTER;
  const bool misaligned = reinterpret_cast<uintptr_t>(workspace) % HIVTP_WORKSPACE_ALIGNMENT != 0;
  return misaligned ? HIVTP_MISALIGNED_WORKSPACE : HIVTP_OK;
}

// Rows to copy: `out_rows` of them to `out`, chosen by `indices`, [batch, capacity].
inline HivtpStatus check(const HivtpFeatures& x, const int32_t* indices, int32_t capacity,
                         int64_t out_rows, const void* out) {
  if (x.batch < 0 || x.patches < 0 || x.prefix < 0 || x.row_bytes < 0 || capacity < 0 ||
      out_rows < 0) {
    return HIVTP_BAD_SIZE;
  }
  if (x.batch > 0 && capacity > 0 && !indices) return HIVTP_NULL_POINTER;
  if (out_rows > 0 && x.row_bytes > 0 && (!x.data || !out)) return HIVTP_NULL_POINTER;
  return HIVTP_OK;
}

}  // namespace hivtp

#endif  // HIVTP_CHECK_H_
