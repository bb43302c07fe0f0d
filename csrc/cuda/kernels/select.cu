// select_tokens: a block an image.
#include "block.h"

HIVTP_KERNEL(hivtp::kSelectThreads)
hivtp_select(const float* scores, int64_t image_stride, HivtpRule rule, HivtpSelection selection) {
  HIVTP_SHARED(shared);
  const int64_t image = blockIdx.x;
  hivtp::select(scores + image * image_stride, rule, image, selection, shared);
}
