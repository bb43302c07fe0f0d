// gather_tokens and pack_tokens: rows copied as bytes. One unit of work is one image.
#include <atomic>
#include <cstring>

#include "hivtp/check.h"
#include "threads.h"

namespace hivtp {
namespace {

struct Call {
  const HivtpFeatures& features;
  const int32_t* indices;
  int32_t capacity;
  const int32_t* cu_seqlens;  // null: rows keep their places, and padding becomes zeros
  char* out;
  std::atomic<int32_t> status{HIVTP_OK};
};

// Checks one image's indices before any row is read.
HivtpStatus check_indices(const Call& call, int64_t image, const int32_t* indices) {
  int32_t kept = 0;
  bool legal = true;
  for (int32_t i = 0; i < call.capacity; ++i) {
    legal &= indices[i] >= -1 && indices[i] < call.features.patches;
    kept += indices[i] >= 0;
  }
  if (!legal) return HIVTP_BAD_INDEX;
  if (!call.cu_seqlens) return HIVTP_OK;
  const int64_t length = int64_t{call.cu_seqlens[image + 1]} - call.cu_seqlens[image];
  return length == kept ? HIVTP_OK : HIVTP_BAD_CU_SEQLENS;
}

void copy_image(void* context, int64_t image, int32_t) {
  Call& call = *static_cast<Call*>(context);
  const HivtpFeatures& x = call.features;
  const int32_t* indices = call.indices + image * call.capacity;
  if (const HivtpStatus status = check_indices(call, image, indices)) {
    call.status.store(status, std::memory_order_relaxed);
    return;
  }
  const char* rows =
      static_cast<const char*>(x.data) + image * x.image_stride + x.prefix * x.row_stride;
  const bool packed = call.cu_seqlens != nullptr;
  const int64_t first = packed ? call.cu_seqlens[image] : image * call.capacity;
  char* out = call.out + first * x.row_bytes;
  for (int32_t i = 0; i < call.capacity; ++i) {
    if (indices[i] >= 0) {
      std::memcpy(out, rows + indices[i] * x.row_stride, x.row_bytes);
    } else if (packed) {
      continue;
    } else {
      std::memset(out, 0, x.row_bytes);
    }
    out += x.row_bytes;
  }
}

HivtpStatus copy(Call& call, int64_t out_rows, int32_t threads) {
  const HivtpFeatures& x = call.features;
  if (const HivtpStatus status = check(x, call.indices, call.capacity, out_rows, call.out)) {
    return status;
  }
  const double bytes = double(out_rows) * double(x.row_bytes);
  parallel_for(useful_threads(threads, bytes / 10), x.batch, copy_image, &call);
  return HivtpStatus(call.status.load());
}

}  // namespace
}  // namespace hivtp

HivtpStatus hivtp_cpu_gather_tokens(const HivtpFeatures* features, const int32_t* indices,
                                    int32_t capacity, void* out, int32_t threads) {
  if (!features) return HIVTP_NULL_POINTER;
  hivtp::Call call{*features, indices, capacity, nullptr, static_cast<char*>(out)};
  return hivtp::copy(call, int64_t{features->batch} * capacity, threads);
}

HivtpStatus hivtp_cpu_pack_tokens(const HivtpFeatures* features, const int32_t* indices,
                                  int32_t capacity, const int32_t* cu_seqlens, int64_t total,
                                  void* out, int32_t threads) {
  if (!features || !cu_seqlens) return HIVTP_NULL_POINTER;
  // Each image checks its own length, so these make every output row be written once and in bounds.
  if (features->batch < 0) return HIVTP_BAD_SIZE;
  if (cu_seqlens[0] != 0 || cu_seqlens[features->batch] != total) return HIVTP_BAD_CU_SEQLENS;
  for (int32_t image = 0; image < features->batch; ++image) {
    if (cu_seqlens[image + 1] < cu_seqlens[image]) return HIVTP_BAD_CU_SEQLENS;
  }
  hivtp::Call call{*features, indices, capacity, cu_seqlens, static_cast<char*>(out)};
  return hivtp::copy(call, total, threads);
}
