// The entry points of api.h for CUDA: checks, then grids, workspaces and launches.
#include "driver.h"
#include "hivtp/check.h"
#include "kernels/params.h"

namespace hivtp {
namespace {

constexpr int64_t kMaxBlocks = 0x7fffffff;

// The shared memory that every device has for a block.
constexpr int32_t kSharedBytes = 64 * 1024;
static_assert(select_shared_bytes(HIVTP_MAX_PATCHES) <= kSharedBytes);
static_assert(cls_shared_bytes(HIVTP_MAX_TOKENS) <= kSharedBytes);
static_assert(columns_shared_bytes(HIVTP_MAX_HEAD_DIM * 4, HIVTP_MAX_TOKENS) <= kSharedBytes);

constexpr const char* kCls[] = {"hivtp_cls_f32", "hivtp_cls_f16", "hivtp_cls_bf16"};
constexpr const char* kLse[] = {"hivtp_lse_f32", "hivtp_lse_f16", "hivtp_lse_bf16"};
constexpr const char* kColumns[] = {"hivtp_columns_f32", "hivtp_columns_f16", "hivtp_columns_bf16"};

bool all_rows(const HivtpAttention& a) {
  return a.rows == HIVTP_ROWS_ALL;
}
int32_t patches(const HivtpAttention& a) {
  return a.tokens - a.prefix;
}
int64_t heads(const HivtpAttention& a) {
  return int64_t{a.layers} * a.heads;
}
int64_t blocks(const HivtpAttention& a) {
  return a.batch * heads(a) * (all_rows(a) ? tiles(a.tokens) : 1);
}
int32_t row_bytes(const HivtpAttention& a) {
  return a.head_dim * (a.dtype == HIVTP_FLOAT32 ? 4 : 2);
}

// Rejects shapes whose grid is too large for a launch. For the others, no number here overflows.
HivtpStatus check_grid(const HivtpAttention* a) {
  if (const HivtpStatus status = check(a)) return status;
  const bool fits =
      heads(*a) <= kMaxBlocks && a->batch * heads(*a) <= kMaxBlocks && blocks(*a) <= kMaxBlocks;
  return fits ? HIVTP_OK : HIVTP_BAD_SIZE;
}

// Kernels read chunks of 16 bytes. The stride of a dimension of size one is never used.
HivtpStatus check_rows(const HivtpAttention& a) {
  const int64_t chunk = 16 / (row_bytes(a) / a.head_dim);
  const auto legal = [&](const HivtpView& view, int32_t tokens) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
           (a.batch == 1 || view.batch_stride % chunk == 0) &&
           (a.heads == 1 || view.head_stride % chunk == 0) &&
           (tokens == 1 || view.token_stride % chunk == 0);
  };
  for (int32_t layer = 0; layer < a.layers; ++layer) {
    if (!legal(a.q[layer], all_rows(a) ? a.tokens : 1) || !legal(a.k[layer], a.tokens)) {
      return HIVTP_MISALIGNED_ROWS;
    }
  }
  return HIVTP_OK;
}

// The pieces of a workspace, by their offsets in bytes.
struct Workspace {
  int64_t tickets = 0, partials, lse, scores, end;

  Workspace(const HivtpAttention& a, bool with_scores) {
    const bool with_lse = all_rows(a) && !a.lse[0].data;
    const int64_t rows = a.batch * heads(a);
    partials = piece(tickets, a.batch, sizeof(int32_t));
    lse = piece(partials, rows * padded(patches(a)), sizeof(float));
    scores = piece(lse, with_lse ? rows * a.tokens : 0, sizeof(float));
    end = piece(scores, with_scores ? int64_t{a.batch} * patches(a) : 0, sizeof(float));
  }

 private:
  static int64_t piece(int64_t begin, int64_t count, size_t size) {
    return begin + aligned(count * int64_t(size));
  }
};

template <class... Arguments>
HivtpStatus launch_1d(const char* kernel, int64_t blocks, int32_t threads, int32_t shared_bytes,
                      void* stream, Arguments... arguments) {
  void* pointers[] = {&arguments...};
  return launch({kernel, {uint32_t(blocks), 1, 1}, uint32_t(threads), uint32_t(shared_bytes)},
                pointers, stream);
}

// Scores of valid arguments into `scores` and, if `params` is given, the selection.
HivtpStatus score(HivtpAttention a, const HivtpSelectParams* params,
                  const HivtpSelection* selection, float* scores, char* workspace,
                  const Workspace& layout, int32_t device, void* stream) {
  if (const HivtpStatus status = check_data(a)) return status;
  if (const HivtpStatus status = check_rows(a)) return status;
  if (const HivtpStatus status = check_stream(device, stream)) return status;

  Finish finish{};
  finish.tickets = reinterpret_cast<int32_t*>(workspace + layout.tickets);
  finish.partials = reinterpret_cast<float*>(workspace + layout.partials);
  finish.scores = scores;
  if (params) finish.params = *params;
  if (params) finish.selection = *selection;
  const int32_t select_bytes = params ? select_shared_bytes(patches(a)) : 0;
  const auto at_least = [&](int32_t bytes) { return bytes > select_bytes ? bytes : select_bytes; };

  const size_t ticket_bytes = a.batch * sizeof(int32_t);
  if (const HivtpStatus status = zero(finish.tickets, ticket_bytes, stream)) return status;
  if (!all_rows(a)) {
    return launch_1d(kCls[a.dtype], blocks(a), kClsThreads, at_least(cls_shared_bytes(a.tokens)),
                     stream, a, finish);
  }
  if (!a.lse[0].data) {
    const float* lse = reinterpret_cast<float*>(workspace + layout.lse);
    for (int32_t layer = 0; layer < a.layers; ++layer) {
      const int64_t head = a.tokens, image = heads(a) * head;
      a.lse[layer] = {lse + layer * a.heads * head, image, head, 1};
    }
    if (const HivtpStatus status = launch_1d(kLse[a.dtype], blocks(a), kTileThreads,
                                             lse_shared_bytes(row_bytes(a)), stream, a)) {
      return status;
    }
  }
  return launch_1d(kColumns[a.dtype], blocks(a), kTileThreads,
                   at_least(columns_shared_bytes(row_bytes(a), a.tokens)), stream, a, finish);
}

// Rows of features to `out`, padded, or packed if `cu_seqlens` is given.
HivtpStatus gather(const HivtpFeatures* features, const int32_t* indices, int32_t capacity,
                   const int32_t* cu_seqlens, int64_t out_rows, char* out, int32_t device,
                   void* stream) {
  if (const HivtpStatus status = check(*features, indices, capacity, out_rows, out)) return status;
  constexpr int32_t kRows = kGatherThreads / kWarp;
  const int64_t blocks = (int64_t{features->batch} * capacity + kRows - 1) / kRows;
  if (blocks > kMaxBlocks) return HIVTP_BAD_SIZE;
  if (out_rows == 0 || features->row_bytes == 0) return HIVTP_OK;
  if (const HivtpStatus status = check_stream(device, stream)) return status;
  if (!cu_seqlens) {
    return launch_1d("hivtp_gather", blocks, kGatherThreads, 0, stream, *features, indices,
                     capacity, out);
  }
  return launch_1d("hivtp_pack", blocks, kGatherThreads, 0, stream, *features, indices, capacity,
                   cu_seqlens, out);
}

}  // namespace
}  // namespace hivtp

using hivtp::check;
using hivtp::check_data;
using hivtp::check_grid;
using hivtp::check_workspace;
using hivtp::Workspace;

int64_t hivtp_cuda_scores_workspace_bytes(const HivtpAttention* attention) {
  return check_grid(attention) ? -1 : Workspace(*attention, false).end;
}

int64_t hivtp_cuda_score_and_select_workspace_bytes(const HivtpAttention* attention,
                                                    const HivtpSelectParams* params) {
  if (check_grid(attention) || check(attention, params)) return -1;
  return Workspace(*attention, true).end;
}

HivtpStatus hivtp_cuda_attention_scores(const HivtpAttention* attention, float* scores,
                                        void* workspace, int32_t device, void* stream) {
  if (const HivtpStatus status = check_grid(attention)) return status;
  if (attention->batch == 0) return HIVTP_OK;
  if (const HivtpStatus status = check_workspace(workspace)) return status;
  if (!scores) return HIVTP_NULL_POINTER;
  return hivtp::score(*attention, nullptr, nullptr, scores, static_cast<char*>(workspace),
                      Workspace(*attention, false), device, stream);
}

HivtpStatus hivtp_cuda_select_tokens(const float* scores, int64_t image_stride, int32_t batch,
                                     const HivtpSelectParams* params,
                                     const HivtpSelection* selection, int32_t device,
                                     void* stream) {
  if (const HivtpStatus status = check(params)) return status;
  if (batch < 0) return HIVTP_BAD_SIZE;
  if (batch == 0) return HIVTP_OK;
  if (!scores) return HIVTP_NULL_POINTER;
  if (const HivtpStatus status = check_data(*params, selection)) return status;
  if (const HivtpStatus status = hivtp::check_stream(device, stream)) return status;
  return hivtp::launch_1d("hivtp_select", batch, hivtp::kSelectThreads,
                          hivtp::select_shared_bytes(params->height * params->width), stream,
                          scores, image_stride, *params, *selection);
}

HivtpStatus hivtp_cuda_score_and_select(const HivtpAttention* attention,
                                        const HivtpSelectParams* params,
                                        const HivtpSelection* selection, void* workspace,
                                        int32_t device, void* stream) {
  if (const HivtpStatus status = check_grid(attention)) return status;
  if (const HivtpStatus status = check(attention, params)) return status;
  if (attention->batch == 0) return HIVTP_OK;
  if (const HivtpStatus status = check_workspace(workspace)) return status;
  if (const HivtpStatus status = check_data(*params, selection)) return status;
  const Workspace layout(*attention, true);
  char* bytes = static_cast<char*>(workspace);
  return hivtp::score(*attention, params, selection,
                      reinterpret_cast<float*>(bytes + layout.scores), bytes, layout, device,
                      stream);
}

HivtpStatus hivtp_cuda_gather_tokens(const HivtpFeatures* features, const int32_t* indices,
                                     int32_t capacity, void* out, int32_t device, void* stream) {
  if (!features) return HIVTP_NULL_POINTER;
  return hivtp::gather(features, indices, capacity, nullptr, int64_t{features->batch} * capacity,
                       static_cast<char*>(out), device, stream);
}

HivtpStatus hivtp_cuda_pack_tokens(const HivtpFeatures* features, const int32_t* indices,
                                   int32_t capacity, const int32_t* cu_seqlens, int64_t total,
                                   void* out, int32_t device, void* stream) {
  if (!features || !cu_seqlens) return HIVTP_NULL_POINTER;
  return hivtp::gather(features, indices, capacity, cu_seqlens, total, static_cast<char*>(out),
                       device, stream);
}
