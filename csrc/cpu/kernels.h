// The kernels that are compiled once per instruction set; dispatch.cpp chooses at run time.
#ifndef HIVTP_CPU_KERNELS_H_
#define HIVTP_CPU_KERNELS_H_

#include "hivtp/api.h"
#include "hivtp/portable.h"

#define HIVTP_DECLARE_KERNELS(target)                                                    \
  namespace target {                                                                     \
  int64_t scores_workspace_bytes(const HivtpAttention& attention, int32_t threads);      \
  void attention_scores(const HivtpAttention& attention, float* scores, char* workspace, \
                        int32_t threads);                                                \
  void select_tokens(const float* scores, int64_t image_stride, int32_t batch,           \
                     const HivtpSelectParams& params, const HivtpSelection& selection,   \
                     char* workspace, int32_t threads);                                  \
  }

namespace hivtp {

HIVTP_DECLARE_KERNELS(baseline)
HIVTP_DECLARE_KERNELS(x86_64_v3)
HIVTP_DECLARE_KERNELS(x86_64_v4)

// Scratch of one thread that selects: a key and a stage per patch.
static inline int64_t select_scratch_bytes(const HivtpSelectParams& params) {
  return aligned(int64_t{params.height} * params.width * 9);
}

}  // namespace hivtp

#endif  // HIVTP_CPU_KERNELS_H_
