// gather_tokens and pack_tokens: rows copied as bytes. A unit of work is a few rows of an image, so
// that a single image keeps all threads busy.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "hivtp/check.h"
#include "kernels.h"
#include "threads.h"

namespace hivtp {
namespace {

struct Call {
  const HivtpFeatures& features;
  const int32_t* indices;
  int32_t capacity;
  const int32_t* cu_seqlens;  // null: rows keep their places, and padding becomes zero rows
  char* out;
  int32_t unit_rows = 0;
  int32_t image_units = 0;
  std::atomic<int32_t> status{HIVTP_OK};
};

// Checks all indices of an image before any of its rows is read. Every unit does this: it is quick,
// and no unit has to wait for another.
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

// glibc maps memory of this size separately: the system provides it page by page on first write,
// and gets it back afterwards. Huge pages halve the time of the whole copy.
void ask_for_huge_pages(char* out, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kMapping = 32 << 20, kHugePage = 2 << 20;
  if (uintptr_t(bytes) < kMapping) return;
  const uintptr_t first = (uintptr_t(out) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (uintptr_t(out) + uintptr_t(bytes)) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void copy_rows(void* context, int64_t unit, int32_t) {
  Call& call = *static_cast<Call*>(context);
  const HivtpFeatures& x = call.features;
  const int64_t image = unit / call.image_units;
  const int32_t* indices = call.indices + image * call.capacity;
  if (const HivtpStatus status = check_indices(call, image, indices)) {
    call.status.store(status, std::memory_order_relaxed);
    return;
  }
  const char* rows =
      static_cast<const char*>(x.data) + image * x.image_stride + x.prefix * x.row_stride;
  const int32_t first = int32_t(unit % call.image_units) * call.unit_rows;
  const int32_t last = std::min(first + call.unit_rows, call.capacity);
  const bool packed = call.cu_seqlens != nullptr;
  int64_t place = packed ? call.cu_seqlens[image] : image * call.capacity + first;
  if (packed) place += std::count_if(indices, indices + first, [](int32_t i) { return i >= 0; });
  char* out = call.out + place * x.row_bytes;
  for (int32_t i = first; i < last; ++i) {
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
  if (threads < 1) return HIVTP_BAD_SIZE;
  const HivtpFeatures& x = call.features;
  if (const HivtpStatus status = check(x, call.indices, call.capacity, out_rows, call.out)) {
    return status;
  }
  const double bytes = double(out_rows) * double(x.row_bytes);
  const int32_t useful = useful_threads(threads, bytes / 10);
  // A single image is split once per thread, so that each core finds in its cache what it copied
  // last time; several images are split into smaller units, so that no thread waits long for the
  // last one.
  const int64_t shares = int64_t{useful} * (x.batch > 1 ? 4 : 1);
  const int64_t rows = (int64_t{x.batch} * call.capacity + shares - 1) / shares;
  call.unit_rows = int32_t(std::clamp<int64_t>(rows, 1, std::max(call.capacity, 1)));
  // At least one unit, which checks the length of an image without indices.
  call.image_units = std::max((call.capacity + call.unit_rows - 1) / call.unit_rows, 1);
  ask_for_huge_pages(call.out, int64_t(bytes));
  parallel_for(threads, useful, int64_t{x.batch} * call.image_units, copy_rows, &call);
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
  // With the length that each image checks, this ensures that every output row is written exactly
  // once and in bounds.
  if (features->batch < 0) return HIVTP_BAD_SIZE;
  if (cu_seqlens[0] != 0 || cu_seqlens[features->batch] != total) return HIVTP_BAD_CU_SEQLENS;
  for (int32_t image = 0; image < features->batch; ++image) {
    if (cu_seqlens[image + 1] < cu_seqlens[image]) return HIVTP_BAD_CU_SEQLENS;
  }
  hivtp::Call call{*features, indices, capacity, cu_seqlens, static_cast<char*>(out)};
  return hivtp::copy(call, total, threads);
}
