// The entry points of api.h for scores and selection: checks, then the kernels for this CPU.
#ifdef HIVTP_X86_TARGETS
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

#include "hivtp/api.h"
#include "hivtp/check.h"
#include "kernels.h"

namespace hivtp {
namespace {

struct Kernels {
  const char* target;
  decltype(&baseline::scores_workspace_bytes) scores_workspace_bytes;
  decltype(&baseline::attention_scores) attention_scores;
  decltype(&baseline::select_tokens) select_tokens;
};

#define HIVTP_KERNELS(target)                                                                \
  Kernels {                                                                                  \
    #target, target::scores_workspace_bytes, target::attention_scores, target::select_tokens \
  }

#ifdef HIVTP_X86_TARGETS
// The x86-64 level (2, 3 or 4) that both the processor and the system support. Determined here
// because zig's __builtin_cpu_supports always returns false.
int x86_level() {
  unsigned a, b, c, d, extended;
  if (!__get_cpuid(0x80000001, &a, &b, &extended, &d) || !__get_cpuid(1, &a, &b, &c, &d)) return 2;
  const unsigned fma_movbe_osxsave_avx_f16c = 1u << 12 | 1u << 22 | 7u << 27;
  const unsigned lzcnt = 1u << 5;
  const auto has = [](unsigned value, unsigned bits) { return (value & bits) == bits; };
  if (!has(c, fma_movbe_osxsave_avx_f16c) || !has(extended, lzcnt)) return 2;
  unsigned saved, high;  // which registers the system saves
  asm("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  const unsigned bmi1_avx2_bmi2 = 1u << 3 | 1u << 5 | 1u << 8;
  if (!has(saved, 0x06) || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, bmi1_avx2_bmi2)) {
    return 2;
  }
  const unsigned avx512_f_dq_cd_bw_vl = 3u << 16 | 1u << 28 | 3u << 30;
  return has(saved, 0xe6) && has(b, avx512_f_dq_cd_bw_vl) ? 4 : 3;
}
#endif

// The newest instruction set that this machine has. HIVTP_CPU_TARGET selects an older one, for
// tests.
Kernels choose() {
#ifdef HIVTP_X86_TARGETS
  const char* asked = std::getenv("HIVTP_CPU_TARGET");
  const auto wanted = [&](const char* target) { return !asked || !std::strcmp(asked, target); };
  const int level = x86_level();
  if (level >= 4 && wanted("x86_64_v4")) return HIVTP_KERNELS(x86_64_v4);
  if (level >= 3 && wanted("x86_64_v3")) return HIVTP_KERNELS(x86_64_v3);
#endif
  return HIVTP_KERNELS(baseline);
}

int64_t scores_bytes(const HivtpAttention& a) {
  return aligned(int64_t{a.batch} * (a.tokens - a.prefix) * int64_t{sizeof(float)});
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace
}  // namespace hivtp

using hivtp::check;
using hivtp::check_data;
using hivtp::check_workspace;
using hivtp::kernels;

const char* hivtp_cpu_target(void) {
  return kernels().target;
}

const char* hivtp_status_text(int32_t status) {
  switch (status) {
    case HIVTP_OK:
      return "ok";
    case HIVTP_BAD_ATTENTION_SHAPE:
      return "layers must be 1 to " HIVTP_STRING(HIVTP_MAX_LAYERS)
             ", heads at least 1, tokens 1 to " HIVTP_STRING(HIVTP_MAX_TOKENS)
             ", head_dim a multiple of 8 up to " HIVTP_STRING(HIVTP_MAX_HEAD_DIM)
             ", and prefix less than tokens";
    case HIVTP_BAD_DTYPE:
      return "dtype must be float32, float16 or bfloat16";
    case HIVTP_BAD_ROWS:
      return "rows must be cls or all";
    case HIVTP_BAD_SELECT_PARAMS:
      return "params must have a grid of at most " HIVTP_STRING(HIVTP_MAX_PATCHES)
             " patches, regions within the grid, quotas within their regions and a capacity for all"
             " patches that can be kept";
    case HIVTP_BAD_GRID:
      return "the grid must hold tokens - prefix patches";
    case HIVTP_BAD_INDEX:
      return "indices must be from -1 to patches - 1";
    case HIVTP_BAD_CU_SEQLENS:
      return "cu_seqlens must be the running sums of the number of indices >= 0, from 0 to total";
    case HIVTP_BAD_SIZE:
      return "sizes must not be negative or need 2^31 blocks or more, and threads must be at least "
             "1";
    case HIVTP_NULL_POINTER:
      return "a pointer is null";
    case HIVTP_MISALIGNED_WORKSPACE:
      return "the workspace must be aligned to " HIVTP_STRING(HIVTP_WORKSPACE_ALIGNMENT) " bytes";
    case HIVTP_MISALIGNED_ROWS:
      return "rows of q and k must start at multiples of 16 bytes";
    case HIVTP_NO_DRIVER:
      return "there is no CUDA driver";
    case HIVTP_BAD_CONTEXT:
      return "the current CUDA context must belong to the given device";
    case HIVTP_FOREIGN_STREAM:
      return "the stream must belong to the current CUDA context";
    case HIVTP_FOREIGN_DEVICE:
      return "there is no code for this device";
    case HIVTP_DRIVER_ERROR:
      return "the CUDA driver reports an error";
  }
  return "unknown status";
}

int64_t hivtp_cpu_scores_workspace_bytes(const HivtpAttention* attention, int32_t threads) {
  if (check(attention) || threads < 1) return -1;
  return kernels().scores_workspace_bytes(*attention, threads);
}

int64_t hivtp_cpu_select_workspace_bytes(const HivtpSelectParams* params, int32_t threads) {
  if (check(params) || threads < 1) return -1;
  return threads * hivtp::select_scratch_bytes(*params);
}

int64_t hivtp_cpu_score_and_select_workspace_bytes(const HivtpAttention* attention,
                                                   const HivtpSelectParams* params,
                                                   int32_t threads) {
  const int64_t score = hivtp_cpu_scores_workspace_bytes(attention, threads);
  const int64_t select = hivtp_cpu_select_workspace_bytes(params, threads);
  if (score < 0 || select < 0) return -1;
  return hivtp::scores_bytes(*attention) + (score > select ? score : select);
}

HivtpStatus hivtp_cpu_attention_scores(const HivtpAttention* attention, float* scores,
                                       void* workspace, int32_t threads) {
  if (const HivtpStatus status = check(attention)) return status;
  if (attention->batch == 0) return HIVTP_OK;
  if (const HivtpStatus status = check_workspace(workspace)) return status;
  if (threads < 1) return HIVTP_BAD_SIZE;
  if (!scores) return HIVTP_NULL_POINTER;
  if (const HivtpStatus status = check_data(*attention)) return status;
  kernels().attention_scores(*attention, scores, static_cast<char*>(workspace), threads);
  return HIVTP_OK;
}

HivtpStatus hivtp_cpu_select_tokens(const float* scores, int64_t image_stride, int32_t batch,
                                    const HivtpSelectParams* params,
                                    const HivtpSelection* selection, void* workspace,
                                    int32_t threads) {
  if (const HivtpStatus status = check(params)) return status;
  if (batch < 0 || threads < 1) return HIVTP_BAD_SIZE;
  if (batch == 0) return HIVTP_OK;
  if (const HivtpStatus status = check_workspace(workspace)) return status;
  if (!scores) return HIVTP_NULL_POINTER;
  if (const HivtpStatus status = check_data(*params, selection)) return status;
  kernels().select_tokens(scores, image_stride, batch, *params, *selection,
                          static_cast<char*>(workspace), threads);
  return HIVTP_OK;
}

HivtpStatus hivtp_cpu_score_and_select(const HivtpAttention* attention,
                                       const HivtpSelectParams* params,
                                       const HivtpSelection* selection, void* workspace,
                                       int32_t threads) {
  if (const HivtpStatus status = check(attention, params)) return status;
  if (attention->batch == 0) return HIVTP_OK;
  if (const HivtpStatus status = check_workspace(workspace)) return status;
  float* scores = static_cast<float*>(workspace);
  char* rest = static_cast<char*>(workspace) + hivtp::scores_bytes(*attention);
  if (const HivtpStatus status = hivtp_cpu_attention_scores(attention, scores, rest, threads)) {
    return status;
  }
  return hivtp_cpu_select_tokens(scores, params->height * params->width, attention->batch, params,
                                 selection, rest, threads);
}
