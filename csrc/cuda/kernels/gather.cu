// gather_tokens and pack_tokens: rows copied as bytes, one warp per row.
#include "device.h"
#include "params.h"

namespace hivtp {

// Copies a row, or writes zeros if it is null, in accesses of one V.
template <class V>
HIVTP_DEVICE void copy(const char* row, char* out, int64_t bytes) {
  constexpr int64_t kStep = kWarp * sizeof(V);
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp * sizeof(V); i < bytes; i += kStep) {
    *reinterpret_cast<V*>(out + i) = row ? load<V>(row + i) : V{};
  }
}

// Copies row `slot` of [batch, capacity]. When packing, the row goes after those of the images
// before, unless it is padding; `cu_seqlens` bounds the writes even if padding is not at the end.
HIVTP_DEVICE void gather(const HivtpFeatures& x, const int32_t* indices, int32_t capacity,
                         const int32_t* cu_seqlens, char* out) {
  int64_t slot = blockIdx.x * int64_t(kGatherThreads / kWarp) + threadIdx.x / kWarp;
  if (slot >= int64_t(x.batch) * capacity) return;
  const int64_t image = slot / capacity;
  const int32_t index = indices[slot];
  if (cu_seqlens) {
    slot = cu_seqlens[image] + slot % capacity;
    if (index < 0 || slot >= cu_seqlens[image + 1]) return;
  }
  const bool real = index >= 0 && index < x.patches;
  const char* row = static_cast<const char*>(x.data) + image * x.image_stride +
                    (int64_t(x.prefix) + index) * x.row_stride;
  row = real ? row : nullptr;
  out += slot * x.row_bytes;
  const uint64_t alignment = reinterpret_cast<uint64_t>(x.data) | reinterpret_cast<uint64_t>(out) |
                             x.image_stride | x.row_stride | x.row_bytes;
  if (alignment % 16 == 0) {
    copy<Chunk>(row, out, x.row_bytes);
  } else if (alignment % 4 == 0) {
    copy<uint32_t>(row, out, x.row_bytes);
  } else if (alignment % 2 == 0) {
    copy<uint16_t>(row, out, x.row_bytes);
  } else {
    copy<uint8_t>(row, out, x.row_bytes);
  }
}

}  // namespace hivtp

HIVTP_KERNEL(hivtp::kGatherThreads)
hivtp_gather(HivtpFeatures features, const int32_t* indices, int32_t capacity, char* out) {
  hivtp::gather(features, indices, capacity, nullptr, out);
}

HIVTP_KERNEL(hivtp::kGatherThreads)
hivtp_pack(HivtpFeatures features, const int32_t* indices, int32_t capacity,
           const int32_t* cu_seqlens, char* out) {
  hivtp::gather(features, indices, capacity, cu_seqlens, out);
}
