// select_tokens: a unit of work is one image.
#include "hivtp/select.h"

#include "kernels.h"
#include "simd.h"
#include "threads.h"

namespace hivtp {
namespace HIVTP_TARGET {
namespace {

struct Call {
  const float* scores;
  int64_t image_stride;
  const HivtpSelectParams& params;
  const HivtpSelection& selection;
  char* workspace;
};

void select_unit(void* context, int64_t image, int32_t slot) {
  const Call& call = *static_cast<const Call*>(context);
  const HivtpSelectParams params = call.params;
  const int32_t patches = params.height * params.width;
  char* scratch = call.workspace + slot * hivtp::select_scratch_bytes(params);
  int64_t* keys = reinterpret_cast<int64_t*>(scratch);
  int8_t* stage = reinterpret_cast<int8_t*>(keys + patches);
  const int64_t first = image * params.capacity;
  select_image(Serial(), call.scores + image * call.image_stride, params, keys, stage,
               call.selection.indices + first, call.selection.counts + image,
               call.selection.stage + first);
}

}  // namespace

void select_tokens(const float* scores, int64_t image_stride, int32_t batch,
                   const HivtpSelectParams& params, const HivtpSelection& selection,
                   char* workspace, int32_t threads) {
  Call call{scores, image_stride, params, selection, workspace};
  const double nanoseconds = 10.0 * batch * params.height * params.width;
  parallel_for(threads, useful_threads(threads, nanoseconds), batch, select_unit, &call);
}

}  // namespace HIVTP_TARGET
}  // namespace hivtp
