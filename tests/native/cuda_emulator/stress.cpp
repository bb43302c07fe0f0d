// The program for the sanitizers: every op on CUDA, emulated by real threads, and on the CPU, whose
// results must agree. Buffers have their exact sizes, so that any access out of bounds shows.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "hivtp/api.h"

#define HIVTP_EXPECT(condition)                                                     \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

namespace {

constexpr int32_t kThreads = 3;  // of the CPU

uint32_t state = 1;
uint32_t random_bits() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

int32_t bytes_of(int32_t dtype) {
  return dtype == HIVTP_FLOAT32 ? 4 : 2;
}

// Values from 2^-6 to 1, of either sign.
std::vector<uint8_t> random_values(size_t count, int32_t dtype) {
  std::vector<uint8_t> data(count * bytes_of(dtype));
  for (size_t i = 0; i < count; ++i) {
    const uint32_t bits = random_bits(), sign = bits >> 12 & 1, power = bits >> 13 & 3;
    if (dtype == HIVTP_FLOAT32) {
      const float value = std::ldexp(float(bits & 0xfff) / 4096, -int(power)) * (sign ? -1 : 1);
      std::memcpy(&data[4 * i], &value, 4);
    } else {
      const bool half = dtype == HIVTP_FLOAT16;
      const uint32_t magnitude =
          half ? (11 + power) << 10 | (bits & 0x3ff) : (123 + power) << 7 | (bits & 0x7f);
      const uint16_t value = uint16_t(sign << 15 | magnitude);
      std::memcpy(&data[2 * i], &value, 2);
    }
  }
  return data;
}

struct Free {
  void operator()(void* data) const { std::free(data); }
};
using Workspace = std::unique_ptr<void, Free>;

Workspace workspace(int64_t bytes) {
  HIVTP_EXPECT(bytes >= 0);
  return Workspace(std::aligned_alloc(HIVTP_WORKSPACE_ALIGNMENT, size_t(bytes)));
}

struct Selection {
  std::vector<int32_t> indices, counts;
  std::vector<int8_t> stage;

  Selection(const HivtpSelectParams& params, int32_t batch)
      : indices(size_t(batch) * params.capacity), counts(batch), stage(indices.size()) {}
  HivtpSelection pointers() { return {indices.data(), counts.data(), stage.data()}; }
  bool operator==(const Selection& other) const {
    return indices == other.indices && counts == other.counts && stage == other.stage;
  }
};

HivtpSelectParams params_of(int32_t height, int32_t width, bool fill) {
  HivtpSelectParams params{height, width, 2, 2, 2, 3, {3, 3, 3, 3}, {2, 2, 2, 2}, 0, fill};
  params.capacity = height * width * 3 / 4;
  return params;
}

struct Case {
  int32_t layers, batch, heads, height, width, head_dim, dtype, rows;
  bool with_lse;
};

void score_and_select(const Case& c) {
  HivtpAttention a{};
  a.layers = c.layers;
  a.batch = c.batch;
  a.heads = c.heads;
  a.prefix = 1;
  a.tokens = c.height * c.width + a.prefix;
  a.head_dim = c.head_dim;
  a.dtype = c.dtype;
  a.rows = c.rows;
  a.scale = 0.25f;
  const int64_t head = int64_t{a.tokens} * a.head_dim, image = head * a.heads;
  std::vector<std::vector<uint8_t>> values;
  std::vector<std::vector<float>> lse;
  for (int32_t layer = 0; layer < a.layers; ++layer) {
    for (HivtpView* view : {&a.q[layer], &a.k[layer]}) {
      values.push_back(random_values(size_t(a.batch * image), c.dtype));
      *view = {values.back().data(), image, head, a.head_dim};
    }
    if (!c.with_lse) continue;
    // Any numbers will do: both backends get the same.
    lse.emplace_back(size_t(a.batch) * a.heads * a.tokens, std::log(float(a.tokens)));
    a.lse[layer] = {lse.back().data(), int64_t{a.heads} * a.tokens, a.tokens, 1};
  }
  const HivtpSelectParams params = params_of(c.height, c.width, true);
  const int32_t patches = c.height * c.width;

  std::vector<float> scores(size_t(a.batch) * patches), expected(scores.size());
  Workspace space = workspace(hivtp_cpu_scores_workspace_bytes(&a, kThreads));
  HIVTP_EXPECT(!hivtp_cpu_attention_scores(&a, expected.data(), space.get(), kThreads));
  space = workspace(hivtp_cuda_scores_workspace_bytes(&a));
  HIVTP_EXPECT(!hivtp_cuda_attention_scores(&a, scores.data(), space.get(), 0, nullptr));
  for (size_t i = 0; i < scores.size(); ++i) {
    HIVTP_EXPECT(std::fabs(scores[i] - expected[i]) <= 1e-5f * expected[i]);
  }

  Selection fused(params, a.batch), selected(params, a.batch), on_cpu(params, a.batch);
  HivtpSelection out = fused.pointers();
  space = workspace(hivtp_cuda_score_and_select_workspace_bytes(&a, &params));
  HIVTP_EXPECT(!hivtp_cuda_score_and_select(&a, &params, &out, space.get(), 0, nullptr));
  out = selected.pointers();
  HIVTP_EXPECT(
      !hivtp_cuda_select_tokens(scores.data(), patches, a.batch, &params, &out, 0, nullptr));
  HIVTP_EXPECT(fused == selected);
  out = on_cpu.pointers();
  space = workspace(hivtp_cpu_select_workspace_bytes(&params, kThreads));
  HIVTP_EXPECT(!hivtp_cpu_select_tokens(scores.data(), patches, a.batch, &params, &out, space.get(),
                                        kThreads));
  HIVTP_EXPECT(on_cpu == selected);
  space = workspace(hivtp_cpu_score_and_select_workspace_bytes(&a, &params, kThreads));
  HIVTP_EXPECT(!hivtp_cpu_score_and_select(&a, &params, &out, space.get(), kThreads));
}

// Rows of `row_bytes`, `stride` bytes apart, which determine accesses of 16, 4, 2 or 1 bytes.
void gather(int32_t row_bytes, int32_t stride) {
  constexpr int32_t kBatch = 2, kPatches = 5, kPrefix = 1, kCapacity = 4;
  constexpr int32_t kRows = kBatch * (kPrefix + kPatches);
  std::vector<uint8_t> data(size_t(kRows - 1) * stride + row_bytes);
  for (uint8_t& byte : data) byte = uint8_t(random_bits());
  const HivtpFeatures x{
      data.data(), int64_t{kPrefix + kPatches} * stride, stride, row_bytes, kBatch, kPatches,
      kPrefix};
  const std::vector<int32_t> indices = {0, 2, 4, -1, 1, 3, -1, -1}, cu_seqlens = {0, 3, 5};
  const int64_t total = cu_seqlens.back();

  std::vector<uint8_t> rows(indices.size() * row_bytes), expected(rows.size());
  HIVTP_EXPECT(!hivtp_cuda_gather_tokens(&x, indices.data(), kCapacity, rows.data(), 0, nullptr));
  HIVTP_EXPECT(!hivtp_cpu_gather_tokens(&x, indices.data(), kCapacity, expected.data(), kThreads));
  HIVTP_EXPECT(rows == expected);

  rows.assign(size_t(total) * row_bytes, 0xff);
  expected.assign(rows.size(), 0);
  HIVTP_EXPECT(!hivtp_cuda_pack_tokens(&x, indices.data(), kCapacity, cu_seqlens.data(), total,
                                       rows.data(), 0, nullptr));
  HIVTP_EXPECT(!hivtp_cpu_pack_tokens(&x, indices.data(), kCapacity, cu_seqlens.data(), total,
                                      expected.data(), kThreads));
  HIVTP_EXPECT(rows == expected);
}

// Enough work for several CPU threads.
void share_out() {
  constexpr int32_t kBatch = 64, kPatches = 24 * 24;
  const std::vector<uint8_t> data = random_values(size_t(kBatch) * kPatches, HIVTP_FLOAT32);
  const HivtpSelectParams params = params_of(24, 24, true);
  Selection selection(params, kBatch);
  const HivtpSelection out = selection.pointers();
  Workspace space = workspace(hivtp_cpu_select_workspace_bytes(&params, kThreads));
  HIVTP_EXPECT(!hivtp_cpu_select_tokens(reinterpret_cast<const float*>(data.data()), kPatches,
                                        kBatch, &params, &out, space.get(), kThreads));

  HivtpAttention a{};
  a.layers = a.batch = 2;
  a.heads = 4;
  a.tokens = 193;
  a.head_dim = 64;
  a.scale = 0.125f;
  const int64_t head = int64_t{a.tokens} * a.head_dim;
  const auto values = random_values(size_t(a.batch) * a.heads * head, HIVTP_FLOAT32);
  for (int32_t layer = 0; layer < a.layers; ++layer) {
    a.q[layer] = a.k[layer] = {values.data(), a.heads * head, head, a.head_dim};
  }
  std::vector<float> scores(size_t(a.batch) * a.tokens);
  for (const int32_t rows : {HIVTP_ROWS_CLS, HIVTP_ROWS_ALL}) {
    a.rows = rows;
    space = workspace(hivtp_cpu_scores_workspace_bytes(&a, kThreads));
    HIVTP_EXPECT(!hivtp_cpu_attention_scores(&a, scores.data(), space.get(), kThreads));
  }

  const std::vector<uint8_t> features(size_t{4} << 20);
  std::vector<uint8_t> copies(features.size());
  const std::vector<int32_t> indices(1024, 5);
  const HivtpFeatures x{features.data(), 1 << 20, 4096, 4096, 4, 256, 0};
  HIVTP_EXPECT(!hivtp_cpu_gather_tokens(&x, indices.data(), 256, copies.data(), kThreads));
}

}  // namespace

int main() {
  for (const int32_t dtype : {HIVTP_FLOAT32, HIVTP_FLOAT16, HIVTP_BFLOAT16}) {
    for (const bool with_lse : {false, true}) {
      score_and_select({2, 2, 1, 6, 11, 40, dtype, HIVTP_ROWS_CLS, with_lse});
      score_and_select({1, 2, 1, 6, 11, 72, dtype, HIVTP_ROWS_ALL, with_lse});
    }
  }
  for (const int32_t row_bytes : {160, 36, 6, 3}) {
    gather(row_bytes, row_bytes);
    gather(row_bytes, 2 * row_bytes);
  }
  share_out();
  std::puts("every op agrees on CUDA, emulated, and on the CPU");
}
