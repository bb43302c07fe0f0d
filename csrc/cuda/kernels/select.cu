// select_tokens: one block per image.
#include "block.h"

HIVTP_KERNEL(hivtp::kSelectThreads)
hivtp_select(const float* scores, int64_t image_stride, HivtpSelectParams params,
             HivtpSelection selection) {
  HIVTP_SHARED(shared);
  const int64_t image = blockIdx.x;
  hivtp::select(scores + image * image_stride, params, image, selection, shared);
}
