// attention_scores, in two steps: units of work that each write their own rows of the workspace,
// then, per image, the sum of its rows in the order (layer, head). So neither the threads nor the
// other images of a batch can change a bit.
//
//   rows="cls": a unit is a run of keys over all heads of a layer, which are adjacent in the output
//               of a projection. It writes logits; the softmax is part of the sum.
//   rows="all": a unit is one head. It writes the sum of its softmax over the query rows.
#include "hivtp/softmax.h"

#include "kernels.h"
#include "simd.h"
#include "threads.h"

namespace hivtp {
namespace HIVTP_TARGET {
namespace {

// A tile of logits that fits into registers: rows of q by vectors of keys.
#if HIVTP_LANES == 16
constexpr int kTileRows = 8, kTileVectors = 3;
#else
constexpr int kTileRows = 4, kTileVectors = 3;
#endif

// rows="all" sums the rows of a tile, then this many tiles, then all of those: three short sums
// round less than one of up to HIVTP_MAX_TOKENS numbers.
constexpr int32_t kTilesPerSum = 16;

// Floats from row to row of a tile of q. A constant, as all rows are addressed at once.
constexpr int32_t kPackedRow = HIVTP_MAX_HEAD_DIM;

constexpr int32_t kKeysPerUnit = 64;  // rows="cls"

// The vectors that hold n floats.
constexpr int32_t vectors(int32_t n) {
  return (n + kLanes - 1) / kLanes;
}

// The layout of the workspace: all rows, then the scratch of each thread.
struct Workspace {
  int32_t width;      // vectors in a row
  int64_t row_bytes;  // all rows (image, layer, head) together
  int64_t packed_q;   // bytes of the pieces of the scratch, in this order
  int64_t packed_k;
  int64_t logits;
  int64_t sums;
  int64_t slot_bytes;

  explicit Workspace(const HivtpAttention& a) {
    const bool all = a.rows == HIVTP_ROWS_ALL;
    constexpr int64_t kVector = sizeof(Float);
    width = vectors(a.tokens);
    row_bytes = aligned(int64_t{a.batch} * a.layers * a.heads * width * kVector);
    packed_q = all ? aligned(int64_t{kTileRows} * kPackedRow * sizeof(float))
                   : aligned(a.heads * vectors(a.head_dim) * kVector);
    packed_k = all ? aligned(width * a.head_dim * kVector) : 0;
    logits = all ? aligned(kTileRows * width * kVector) : 0;
    sums = aligned(width * kVector);
    slot_bytes = packed_q + packed_k + logits + sums;
  }
};

struct Call {
  const HivtpAttention& attention;
  float* scores;
  char* workspace;
  Workspace layout;

  Float* row(int64_t image, int32_t layer, int32_t head) const {
    const HivtpAttention& a = attention;
    return reinterpret_cast<Float*>(workspace) +
           ((image * a.layers + layer) * a.heads + head) * layout.width;
  }
  char* scratch(int32_t slot) const {
    return workspace + layout.row_bytes + slot * layout.slot_bytes;
  }
};

template <class T>
HIVTP_HD const T* head(const HivtpView& view, int64_t image, int32_t h) {
  return static_cast<const T*>(view.data) + image * view.batch_stride + h * view.head_stride;
}

// Calls body with an element of the type of q and k.
template <class Body>
HIVTP_HD void with_type_of(const HivtpAttention& a, Body body) {
  switch (a.dtype) {
    case HIVTP_FLOAT32:
      return body(float());
    case HIVTP_FLOAT16:
      return body(Half());
    case HIVTP_BFLOAT16:
      return body(BFloat16());
  }
}

// Fills a row with -inf after its `tokens` logits, to the end of the last vector.
HIVTP_HD void pad(Float* row, int32_t tokens) {
  float* logits = reinterpret_cast<float*>(row);
  for (int32_t t = tokens; t < vectors(tokens) * kLanes; ++t) logits[t] = -kInfinity;
}

// ---- rows="cls" ----

// Logits of n consecutive keys.
template <int n, class T>
HIVTP_HD void dot(const Float* q, const T* k, int64_t stride, int32_t head_dim, float* logits) {
  Float sums[n] = {};
  for (int32_t d = 0; d < head_dim; d += kLanes) {
    for (int i = 0; i < n; ++i) sums[i] += *q * load(k + i * stride, d, head_dim);
    ++q;
  }
  for (int i = 0; i < n; ++i) logits[i] = sum_lanes(sums[i]);
}

template <class T>
void cls_logits(const Call& call, int64_t image, int32_t layer, int32_t begin, Float* packed_q) {
  const HivtpAttention& a = call.attention;
  const int32_t per_head = vectors(a.head_dim);
  for (int32_t h = 0; h < a.heads; ++h) {
    const T* q = head<T>(a.q[layer], image, h);
    for (int32_t j = 0; j < per_head; ++j) {
      packed_q[h * per_head + j] = load(q, j * kLanes, a.head_dim) * a.scale;
    }
  }

  // In memory order: a few keys per head if the heads are adjacent, else all keys of the unit.
  const HivtpView& k = a.k[layer];
  const int32_t end = begin + kKeysPerUnit < a.tokens ? begin + kKeysPerUnit : a.tokens;
  constexpr int32_t kAtOnce = 4;
  const int32_t run = k.head_stride < k.token_stride ? kAtOnce : kKeysPerUnit;
  for (int32_t first = begin; first < end; first += run) {
    const int32_t last = first + run < end ? first + run : end;
    for (int32_t h = 0; h < a.heads; ++h) {
      const Float* q = packed_q + h * per_head;
      const T* key = head<T>(k, image, h);
      float* logits = reinterpret_cast<float*>(call.row(image, layer, h));
      int32_t t = first;
      for (; t + kAtOnce <= last; t += kAtOnce) {
        dot<kAtOnce>(q, key + t * k.token_stride, k.token_stride, a.head_dim, logits + t);
      }
      for (; t < last; ++t) dot<1>(q, key + t * k.token_stride, 0, a.head_dim, logits + t);
    }
  }
  if (end == a.tokens) {
    for (int32_t h = 0; h < a.heads; ++h) pad(call.row(image, layer, h), a.tokens);
  }
}

void cls_unit(void* context, int64_t unit, int32_t slot) {
  const Call& call = *static_cast<const Call*>(context);
  const HivtpAttention& a = call.attention;
  const int32_t runs = (a.tokens + kKeysPerUnit - 1) / kKeysPerUnit;
  const int32_t begin = int32_t(unit % runs) * kKeysPerUnit;
  const int32_t layer = int32_t(unit / runs % a.layers);
  const int64_t image = unit / runs / a.layers;
  Float* packed_q = reinterpret_cast<Float*>(call.scratch(slot));
  with_type_of(
      a, [&](auto element) { cls_logits<decltype(element)>(call, image, layer, begin, packed_q); });
}

// ---- rows="all" ----

// Rows of a head are often kilobytes apart, too far for the hardware prefetcher.
template <class T>
HIVTP_HD void prefetch(const T* row, int32_t head_dim) {
  constexpr int32_t kLine = 64 / sizeof(T);
  for (int32_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(row + d);
}

// k transposed, in panels of kTileVectors vectors of keys, and of one vector for the remainder:
// panel[d] holds component d of its keys. Keys that pad the last vector are 0.
template <class T>
void pack_k(const T* k, int64_t stride, int32_t tokens, int32_t head_dim, Float* packed) {
  const int32_t width = vectors(tokens), in_panels = width / kTileVectors * kTileVectors;
  for (int32_t vector = 0; vector < width; ++vector) {
    const int32_t first = vector * kLanes, next = first + kLanes;
    for (int32_t t = next; t < next + kLanes && t < tokens; ++t) prefetch(k + t * stride, head_dim);
    const int32_t of_panel = vector < in_panels ? kTileVectors : 1;
    const int32_t in_panel = vector % of_panel;
    Float* panel = packed + (vector - in_panel) * head_dim + in_panel;
    for (int32_t d = 0; d < head_dim; d += kLanes) {
      Float square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = first + i < tokens ? load(k + (first + i) * stride, d, head_dim) : Float{};
      }
      transpose(square);
      for (int i = 0; i < kLanes && d + i < head_dim; ++i) panel[(d + i) * of_panel] = square[i];
    }
  }
}

// Rows of q times `scale`, kPackedRow floats apart. The last row is repeated to fill the tile.
template <class T>
void pack_q(const T* q, int64_t stride, int32_t rows, int32_t head_dim, float scale,
            float* packed) {
  for (int32_t row = 0; row < kTileRows; ++row) {
    const T* source = q + (row < rows ? row : rows - 1) * stride;
    Float* target = reinterpret_cast<Float*>(packed + row * kPackedRow);
    for (int32_t d = 0; d < head_dim; d += kLanes) *target++ = load(source, d, head_dim) * scale;
  }
}

// logits[row][vector] = q[row] . k[.][vector], one tile in registers.
template <int n>
HIVTP_HD void multiply(const float* q, const Float* k, int32_t head_dim, Float* logits,
                       int32_t stride) {
  Float tile[kTileRows][n] = {};
  for (int32_t d = 0; d < head_dim; ++d) {
    for (int row = 0; row < kTileRows; ++row) {
      for (int i = 0; i < n; ++i) tile[row][i] += k[i] * q[row * kPackedRow];
    }
    q += 1;
    k += n;
  }
  for (int row = 0; row < kTileRows; ++row) {
    for (int i = 0; i < n; ++i) logits[row * stride + i] = tile[row][i];
  }
}

template <class T>
void all_columns(const Call& call, int64_t image, int32_t layer, int32_t h, char* scratch) {
  const HivtpAttention& a = call.attention;
  const int32_t width = call.layout.width;
  float* packed_q = reinterpret_cast<float*>(scratch);
  Float* packed_k = reinterpret_cast<Float*>(scratch += call.layout.packed_q);
  Float* logits = reinterpret_cast<Float*>(scratch += call.layout.packed_k);
  Float* sums = reinterpret_cast<Float*>(scratch += call.layout.logits);
  const HivtpView& q = a.q[layer];
  const HivtpView& k = a.k[layer];
  const HivtpView& lse = a.lse[layer];
  const float* head_lse = lse.data ? head<float>(lse, image, h) : nullptr;

  pack_k(head<T>(k, image, h), k.token_stride, a.tokens, a.head_dim, packed_k);
  Float* columns = call.row(image, layer, h);
  for (int32_t j = 0; j < width; ++j) columns[j] = sums[j] = Float{};

  for (int32_t first = 0; first < a.tokens; first += kTileRows) {
    const int32_t rows = a.tokens - first < kTileRows ? a.tokens - first : kTileRows;
    pack_q(head<T>(q, image, h) + first * q.token_stride, q.token_stride, rows, a.head_dim, a.scale,
           packed_q);
    for (int32_t row = first + kTileRows; row < first + 2 * kTileRows && row < a.tokens; ++row) {
      prefetch(head<T>(q, image, h) + row * q.token_stride, a.head_dim);
    }
    int32_t j = 0;
    for (; j + kTileVectors <= width; j += kTileVectors) {
      multiply<kTileVectors>(packed_q, packed_k + j * a.head_dim, a.head_dim, logits + j, width);
    }
    for (; j < width; ++j) {
      multiply<1>(packed_q, packed_k + j * a.head_dim, a.head_dim, logits + j, width);
    }

    float factor[kTileRows];
    for (int32_t row = 0; row < rows; ++row) {
      pad(logits + row * width, a.tokens);
      factor[row] = 1;
      if (head_lse) {
        const float row_lse = head_lse[(first + row) * lse.token_stride];
        softmax_with_lse(Serial(), logits + row * width, width, row_lse);
      } else {
        factor[row] = softmax<4>(Serial(), logits + row * width, width);
      }
    }
    for (j = 0; j < width; ++j) {
      Float sum = logits[j] * factor[0];
      for (int32_t row = 1; row < rows; ++row) sum += logits[row * width + j] * factor[row];
      sums[j] += sum;
    }
    const int32_t tile = first / kTileRows;
    if (tile % kTilesPerSum == kTilesPerSum - 1 || first + rows == a.tokens) {
      for (j = 0; j < width; ++j) {
        columns[j] += sums[j];
        sums[j] = Float{};
      }
    }
  }
}

void all_unit(void* context, int64_t unit, int32_t slot) {
  const Call& call = *static_cast<const Call*>(context);
  const HivtpAttention& a = call.attention;
  const int32_t h = int32_t(unit % a.heads);
  const int32_t layer = int32_t(unit / a.heads % a.layers);
  const int64_t image = unit / a.heads / a.layers;
  char* scratch = call.scratch(slot);
  with_type_of(
      a, [&](auto element) { all_columns<decltype(element)>(call, image, layer, h, scratch); });
}

// ---- both ----

void add_rows(void* context, int64_t image, int32_t slot) {
  const Call& call = *static_cast<const Call*>(context);
  const HivtpAttention& a = call.attention;
  const int32_t width = call.layout.width;
  const bool all = a.rows == HIVTP_ROWS_ALL;
  Float* sums =
      reinterpret_cast<Float*>(call.scratch(slot) + call.layout.slot_bytes - call.layout.sums);
  for (int32_t j = 0; j < width; ++j) sums[j] = Float{};
  for (int32_t layer = 0; layer < a.layers; ++layer) {
    for (int32_t h = 0; h < a.heads; ++h) {
      Float* row = call.row(image, layer, h);
      float factor = 1;
      if (!all && a.lse[layer].data) {
        softmax_with_lse(Serial(), row, width, *head<float>(a.lse[layer], image, h));
      } else if (!all) {
        factor = softmax<4>(Serial(), row, width);
      }
      for (int32_t j = 0; j < width; ++j) sums[j] += row[j] * factor;
    }
  }
  const float count = float(a.layers) * float(a.heads) * (all ? float(a.tokens) : 1.0f);
  const int32_t patches = a.tokens - a.prefix;
  const float* totals = reinterpret_cast<const float*>(sums) + a.prefix;
  float* scores = call.scores + image * patches;
  for (int32_t i = 0; i < patches; ++i) scores[i] = totals[i] / count;
}

}  // namespace

int64_t scores_workspace_bytes(const HivtpAttention& attention, int32_t threads) {
  const Workspace layout(attention);
  return layout.row_bytes + threads * layout.slot_bytes;
}

void attention_scores(const HivtpAttention& a, float* scores, char* workspace, int32_t threads) {
  Call call{a, scores, workspace, Workspace(a)};
  const int64_t heads = int64_t{a.batch} * a.layers * a.heads;
  const double products = double(heads) * a.tokens * a.head_dim;
  if (a.rows == HIVTP_ROWS_ALL) {
    parallel_for(threads, useful_threads(threads, products * a.tokens / 50), heads, all_unit,
                 &call);
  } else {
    const int32_t runs = (a.tokens + kKeysPerUnit - 1) / kKeysPerUnit;
    const int64_t units = int64_t{a.batch} * a.layers * runs;
    parallel_for(threads, useful_threads(threads, products / 5), units, cls_unit, &call);
  }
  const double exponentials = double(heads) * a.tokens;
  parallel_for(threads, useful_threads(threads, exponentials / 2), a.batch, add_rows, &call);
}

}  // namespace HIVTP_TARGET
}  // namespace hivtp
