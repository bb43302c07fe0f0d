// The kernels that are compiled once for each instruction set; dispatch.cpp chooses.
#ifndef HIVTP_CPU_KERNELS_H_
#define HIVTP_CPU_KERNELS_H_

#include "hivtp/api.h"
#include "hivtp/portable.h"

#define HIVTP_DECLARE_KERNELS(target)                                                         \
  namespace target {                                                                          \
  int64_t scores_workspace_bytes(const HivtpAttention& attention, int32_t threads);           \
  void attention_scores(const HivtpAttention& attention, float* scores, char* workspace,      \
                        int32_t threads);                                                     \
  void select_tokens(const float* scores, int64_t image_stride, int32_t batch,                \
                     const HivtpRule& rule, const HivtpSelection& selection, char* workspace, \
                     int32_t threads);                                                        \
  }

namespace hivtp {

HIVTP_DECLARE_KERNELS(baseline)
HIVTP_DECLARE_KERNELS(x86_64_v3)
HIVTP_DECLARE_KERNELS(x86_64_v4)

// What one thread needs to select: a key and a stage for each patch.
static inline int64_t select_scratch_bytes(const HivtpRule& rule) {
  return aligned(int64_t{rule.height} * rule.width * 9);
}

}  // namespace hivtp

#endif  // HIVTP_CPU_KERNELS_H_
