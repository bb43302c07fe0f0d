// The C interface of the kernels: raw pointers and plain structs, no torch, no Python.
//
// Nothing here allocates: outputs and workspaces belong to the caller. Every function returns a
// status, which `hivtp_status_text` puts into words.
#ifndef HIVTP_API_H_
#define HIVTP_API_H_

#include "hivtp/integers.h"

#ifdef __cplusplus
extern "C" {
#endif

// The limits and codes of hivtp_kernels/types.py. A test compares the two.
#define HIVTP_MAX_LAYERS 8
#define HIVTP_MAX_PATCHES 4096
#define HIVTP_MAX_TOKENS 4101
#define HIVTP_MAX_HEAD_DIM 128
#define HIVTP_WORKSPACE_ALIGNMENT 64

typedef enum HivtpStatus {
  HIVTP_OK = 0,
  HIVTP_BAD_ATTENTION_SHAPE,
  HIVTP_BAD_DTYPE,
  HIVTP_BAD_ROWS,
  HIVTP_BAD_SELECT_PARAMS,
  HIVTP_BAD_GRID,
  HIVTP_BAD_INDEX,
  HIVTP_BAD_CU_SEQLENS,
  HIVTP_BAD_SIZE,
  HIVTP_NULL_POINTER,
  HIVTP_MISALIGNED_WORKSPACE,
  HIVTP_MISALIGNED_ROWS,
  HIVTP_NO_DRIVER,
  HIVTP_BAD_CONTEXT,
  HIVTP_FOREIGN_STREAM,
  HIVTP_FOREIGN_DEVICE,
  HIVTP_DRIVER_ERROR,
} HivtpStatus;

typedef enum HivtpDtype { HIVTP_FLOAT32 = 0, HIVTP_FLOAT16 = 1, HIVTP_BFLOAT16 = 2 } HivtpDtype;
typedef enum HivtpRows { HIVTP_ROWS_CLS = 0, HIVTP_ROWS_ALL = 1 } HivtpRows;

// Why a patch is kept.
typedef enum HivtpStage {
  HIVTP_PADDING = 0,
  HIVTP_GLOBAL = 1,
  HIVTP_LOCAL = 2,
  HIVTP_FILLED = 3,
} HivtpStage;

// One layer of q or k, [batch, heads, tokens, head_dim] with a unit last stride, or of lse,
// [batch, heads, queries]. Strides count elements.
typedef struct HivtpView {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
} HivtpView;

typedef struct HivtpAttention {
  HivtpView q[HIVTP_MAX_LAYERS];
  HivtpView k[HIVTP_MAX_LAYERS];
  HivtpView lse[HIVTP_MAX_LAYERS];  // fp32; null data if not given
  int32_t layers;
  int32_t batch;
  int32_t heads;
  int32_t tokens;
  int32_t head_dim;
  int32_t prefix;
  int32_t dtype;  // HivtpDtype
  int32_t rows;   // HivtpRows
  float scale;
} HivtpAttention;

// What to keep of each image. Regions have one of four areas, class `2 * tall + wide`, where tall
// regions have more than height / regions_y rows and wide regions more than width / regions_x
// columns. Region r keeps `quota_base[class] + (r < quota_cut[class])` patches.
typedef struct HivtpSelectParams {
  int32_t height, width;
  int32_t regions_y, regions_x;
  int32_t window_y, window_x;
  int32_t quota_base[4];
  int32_t quota_cut[4];
  int32_t capacity;
  int32_t fill;  // whether to fill up to the capacity
} HivtpSelectParams;

typedef struct HivtpSelection {
  int32_t* indices;  // [batch, capacity], ascending, -1 past the count
  int32_t* counts;   // [batch]
  int8_t* stage;     // [batch, capacity], HivtpStage
} HivtpSelection;

// Rows of x, [batch, prefix + patches, channels], of any element type.
typedef struct HivtpFeatures {
  const void* data;
  int64_t image_stride;  // in bytes
  int64_t row_stride;    // in bytes
  int64_t row_bytes;
  int32_t batch;
  int32_t patches;
  int32_t prefix;
} HivtpFeatures;

// Device code does not call the functions, and NVRTC rejects their declarations.
#ifndef __CUDACC_RTC__

const char* hivtp_status_text(int32_t status);

// The instruction set that the CPU kernels use here: "x86_64_v4", "x86_64_v3" or "baseline".
const char* hivtp_cpu_target(void);

// Bytes of workspace for at most `threads` threads, or -1 if the arguments are invalid.
int64_t hivtp_cpu_scores_workspace_bytes(const HivtpAttention* attention, int32_t threads);
int64_t hivtp_cpu_select_workspace_bytes(const HivtpSelectParams* params, int32_t threads);
int64_t hivtp_cpu_score_and_select_workspace_bytes(const HivtpAttention* attention,
                                                   const HivtpSelectParams* params,
                                                   int32_t threads);

// scores: [batch, tokens - prefix].
HivtpStatus hivtp_cpu_attention_scores(const HivtpAttention* attention, float* scores,
                                       void* workspace, int32_t threads);

// scores: [batch, height * width], `image_stride` elements from image to image.
HivtpStatus hivtp_cpu_select_tokens(const float* scores, int64_t image_stride, int32_t batch,
                                    const HivtpSelectParams* params,
                                    const HivtpSelection* selection, void* workspace,
                                    int32_t threads);

HivtpStatus hivtp_cpu_score_and_select(const HivtpAttention* attention,
                                       const HivtpSelectParams* params,
                                       const HivtpSelection* selection, void* workspace,
                                       int32_t threads);

// indices: [batch, capacity]; out: [batch, capacity, row_bytes], zero rows where an index is -1.
HivtpStatus hivtp_cpu_gather_tokens(const HivtpFeatures* features, const int32_t* indices,
                                    int32_t capacity, void* out, int32_t threads);

// cu_seqlens: [batch + 1], running sums of each image's indices >= 0; out: [total, row_bytes].
HivtpStatus hivtp_cpu_pack_tokens(const HivtpFeatures* features, const int32_t* indices,
                                  int32_t capacity, const int32_t* cu_seqlens, int64_t total,
                                  void* out, int32_t threads);

// What the image holds: "CUDA 13.0 for sm_75, sm_80 and compute_80".
const char* hivtp_cuda_target(void);

// Whether the image holds code for a device of this compute capability.
int32_t hivtp_cuda_runs_on(int32_t major, int32_t minor);

// Details, in one line, of this thread's last failure with a status from HIVTP_NO_DRIVER to
// HIVTP_DRIVER_ERROR.
const char* hivtp_cuda_detail(void);

// The same on a CUDA device, given by its number in this process. All pointers are device pointers.
// `stream` is a CUstream (null: the default stream) of the current context, which must belong to
// that device; a thread without a context gets the device's primary context. Rows of q and k must
// start at multiples of 16 bytes. The functions return once everything is queued; the structs are
// not used after that.
int64_t hivtp_cuda_scores_workspace_bytes(const HivtpAttention* attention);
int64_t hivtp_cuda_score_and_select_workspace_bytes(const HivtpAttention* attention,
                                                    const HivtpSelectParams* params);
HivtpStatus hivtp_cuda_attention_scores(const HivtpAttention* attention, float* scores,
                                        void* workspace, int32_t device, void* stream);
HivtpStatus hivtp_cuda_select_tokens(const float* scores, int64_t image_stride, int32_t batch,
                                     const HivtpSelectParams* params,
                                     const HivtpSelection* selection, int32_t device, void* stream);
HivtpStatus hivtp_cuda_score_and_select(const HivtpAttention* attention,
                                        const HivtpSelectParams* params,
                                        const HivtpSelection* selection, void* workspace,
                                        int32_t device, void* stream);
HivtpStatus hivtp_cuda_gather_tokens(const HivtpFeatures* features, const int32_t* indices,
                                     int32_t capacity, void* out, int32_t device, void* stream);
HivtpStatus hivtp_cuda_pack_tokens(const HivtpFeatures* features, const int32_t* indices,
                                   int32_t capacity, const int32_t* cu_seqlens, int64_t total,
                                   void* out, int32_t device, void* stream);

#endif  // __CUDACC_RTC__

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // HIVTP_API_H_
