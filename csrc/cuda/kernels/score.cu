// attention_scores and score_and_select. Each head of each layer of an image writes its own row of
// partial sums; the image's last block adds them in the order (layer, head) and selects. So neither
// the schedule nor the other images of a batch can change a bit.
//
//   rows="cls": a block is one head. It holds the logits of its row in shared memory.
//   rows="all": a block is a tile of one head's map: 64 queries in `lse`, which computes the
//   softmax
//               denominators, 64 keys in `columns`, which sums the weights over the queries. Both
//               walk along the other axis and multiply tile by tile, on tensor cores if they
//               support the type.
#include "block.h"
#include "hivtp/softmax.h"

namespace hivtp {

// The place of a block in the grid: image, layer, head and tile; the tile changes fastest.
struct Place {
  int64_t image, row;  // row counts the heads of all layers and images
  int32_t layer, head, tile;

  HIVTP_DEVICE Place(const HivtpAttention& a, int32_t tiles) {
    const int32_t block = int32_t(blockIdx.x) / tiles;
    const int32_t heads = a.layers * a.heads;
    row = block;
    image = block / heads;
    layer = block % heads / a.heads;
    head = block % a.heads;
    tile = int32_t(blockIdx.x) % tiles;
  }
};

// The rows of one head. T must be float for lse.
template <class T>
HIVTP_DEVICE const T* head(const HivtpView& view, const Place& place) {
  return static_cast<const T*>(view.data) + place.image * view.batch_stride +
         place.head * view.head_stride;
}

// Zeroes the padding after a row of partial sums, which `finish` reads.
HIVTP_DEVICE void zero_padding(float* end, int32_t patches) {
  if (threadIdx.x < padded(patches) - patches) end[threadIdx.x] = 0;
}

// Each block calls this once it has written its part of the image's partial sums. An image has
// `blocks` blocks, and a score is the mean of `summands` weights.
HIVTP_DEVICE void finish(const HivtpAttention& a, const Finish& f, int64_t image, int32_t blocks,
                         float summands, Chunk* shared) {
  int32_t* ticket = reinterpret_cast<int32_t*>(shared);
  __syncthreads();
  if (threadIdx.x == 0) *ticket = take_ticket(f.tickets + image);
  __syncthreads();
  if (*ticket != blocks - 1) return;

  const int32_t patches = a.tokens - a.prefix;
  const int32_t rows = a.layers * a.heads;
  const int32_t width = padded(patches);
  float* scores = f.scores + image * patches;
  for (int32_t first = 4 * threadIdx.x; first < patches; first += 4 * blockDim.x) {
    const float* partial = f.partials + image * rows * width + first;
    float sums[4] = {};
#pragma unroll 16
    for (int32_t row = 0; row < rows; ++row) {
      float values[4];
      widen(load_past_l1(partial + int64_t(row) * width), values, 0.0f);
      for (int i = 0; i < 4; ++i) sums[i] += values[i];
    }
    for (int i = 0; i < 4; ++i) {
      if (first + i < patches) scores[first + i] = sums[i] / summands;
    }
  }
  if (!f.selection.counts) return;
  __syncthreads();
  select(scores, f.params, image, f.selection, shared);
}

// ---- rows="cls" ----

template <class T>
HIVTP_DEVICE void cls(const HivtpAttention& a, const Finish& f) {
  // The lanes that share a key, so that a warp reads 128 bytes of each of 4 keys at once.
  constexpr int32_t kLanes = kSliceBytes / sizeof(Chunk);
  constexpr int32_t kChunks = HIVTP_MAX_HEAD_DIM / kPerChunk<T> / kLanes;  // of a key, per lane
  constexpr int32_t kKeys = 16 / kChunks;  // per lane at once: 16 loads in flight
  HIVTP_SHARED(shared);
  float* logits = reinterpret_cast<float*>(shared + kReduceBytes / sizeof(Chunk));
  const Block block(shared);
  const Place place(a, 1);
  const int32_t lane = threadIdx.x % kLanes;
  const int32_t chunks = a.head_dim / kPerChunk<T>;

  float q[kChunks][kPerChunk<T>];
  const T* query = head<T>(a.q[place.layer], place);
  for (int32_t i = 0; i < kChunks; ++i) {
    const int32_t chunk = lane + i * kLanes;
    widen(chunk < chunks ? load<Chunk>(query + chunk * kPerChunk<T>) : Chunk{}, q[i], T());
  }

  const T* keys = head<T>(a.k[place.layer], place);
  const int64_t stride = a.k[place.layer].token_stride;
  constexpr int32_t kStep = kClsThreads / kLanes;
  for (int32_t begin = 0; begin < a.tokens; begin += kKeys * kStep) {
    const int32_t first = begin + threadIdx.x / kLanes;
    Chunk k[kKeys][kChunks];
#pragma unroll
    for (int32_t j = 0; j < kKeys; ++j) {
      const int32_t token = first + j * kStep;
#pragma unroll
      for (int32_t i = 0; i < kChunks; ++i) {
        const int32_t chunk = lane + i * kLanes;
        k[j][i] = token < a.tokens && chunk < chunks
                      ? load<Chunk>(keys + token * stride + chunk * kPerChunk<T>)
                      : Chunk{};
      }
    }
#pragma unroll
    for (int32_t j = 0; j < kKeys; ++j) {
      float logit = 0;
#pragma unroll
      for (int32_t i = 0; i < kChunks; ++i) {
        float values[kPerChunk<T>];
        widen(k[j][i], values, T());
        for (int32_t d = 0; d < kPerChunk<T>; ++d) logit += q[i][d] * values[d];
      }
      for (int32_t step = kLanes / 2; step > 0; step /= 2) {
        logit += __shfl_xor_sync(kAllLanes, logit, step);
      }
      const int32_t token = first + j * kStep;
      if (lane == 0 && token < a.tokens) logits[token] = logit * a.scale;
    }
  }
  block.sync();

  float factor = 1;
  if (a.lse[place.layer].data) {
    softmax_with_lse(block, logits, a.tokens, *head<float>(a.lse[place.layer], place));
  } else {
    factor = softmax(block, logits, a.tokens);
  }
  float* partial = f.partials + place.row * padded(a.tokens - a.prefix) - a.prefix;
  for (int32_t i = block.rank(); i < a.tokens; i += block.size()) {
    if (i >= a.prefix) partial[i] = logits[i] * factor;
  }
  zero_padding(partial + a.tokens, a.tokens - a.prefix);
  const int32_t heads = a.layers * a.heads;
  finish(a, f, place.image, heads, float(heads), shared);
}

// ---- rows="all" ----

constexpr int32_t kSliceChunks = kSliceBytes / int32_t(sizeof(Chunk));
constexpr int32_t kLoads = kTile * kSliceChunks / kTileThreads;  // per thread and slice
constexpr int32_t kColumns = kTile / 8;

// The place of a chunk of a slice, such that the same chunk of 8 consecutive rows fills all banks.
HIVTP_DEVICE int32_t swizzled(int32_t row, int32_t chunk) {
  return row * kSliceChunks + (chunk ^ row % kSliceChunks);
}

// The rows of q or k of one head.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int32_t tokens, chunks;

  HIVTP_DEVICE Rows(const HivtpAttention& a, const HivtpView& view, const Place& place)
      : data(head<T>(view, place)),
        stride(view.token_stride),
        tokens(a.tokens),
        chunks(a.head_dim / kPerChunk<T>) {}

  // This thread's chunks of a slice of the tile that starts at row `first`; zero outside.
  HIVTP_DEVICE void read(int32_t first, int32_t slice, Chunk (&part)[kLoads]) const {
#pragma unroll
    for (int32_t i = 0; i < kLoads; ++i) {
      const int32_t index = threadIdx.x + i * kTileThreads;
      const int32_t row = first + index / kSliceChunks;
      const int32_t chunk = slice * kSliceChunks + index % kSliceChunks;
      part[i] = row < tokens && chunk < chunks
                    ? load<Chunk>(data + row * stride + chunk * kPerChunk<T>)
                    : Chunk{};
    }
  }
};

HIVTP_DEVICE void store(const Chunk (&part)[kLoads], Chunk* slice) {
#pragma unroll
  for (int32_t i = 0; i < kLoads; ++i) {
    const int32_t index = threadIdx.x + i * kTileThreads;
    slice[swizzled(index / kSliceChunks, index % kSliceChunks)] = part[i];
  }
}

// A thread's part of a tile of products, as mma.sync distributes it over a warp: in rows row() and
// row() + 8, columns column(j) and column(j) + 1, as sums[j][0], [1] and [2], [3].
struct Fragment {
  float sums[kColumns][4];

  HIVTP_DEVICE static int32_t row() { return threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4; }
  HIVTP_DEVICE static int32_t column(int32_t j) { return 8 * j + 2 * (threadIdx.x % 4); }
};

// Adds the product of the first `chunks` chunks of a slice of two tiles.
template <class T>
HIVTP_DEVICE void multiply(const Chunk* a, const Chunk* b, int32_t chunks, Fragment& f) {
  if constexpr (kHasMma<T>) {
    const int32_t lane = threadIdx.x % kWarp;
    const int32_t a_row = threadIdx.x / kWarp * 16 + lane % 16;
    const int32_t b_row = lane / 16 * 8 + lane % 8;
#pragma unroll 1
    for (int32_t chunk = 0; chunk < chunks; chunk += 2) {
      uint32_t rows[4];
      load_matrices(a + swizzled(a_row, chunk + lane / 16), rows);
#pragma unroll
      for (int32_t j = 0; j < kColumns; j += 2) {
        uint32_t columns[4];
        load_matrices(b + swizzled(8 * j + b_row, chunk + lane / 8 % 2), columns);
        multiply_add(f.sums[j], rows, columns[0], columns[1], T());
        multiply_add(f.sums[j + 1], rows, columns[2], columns[3], T());
      }
    }
  } else {
#pragma unroll 1
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
      float rows[2][kPerChunk<T>];
      for (int32_t i = 0; i < 2; ++i) {
        widen(a[swizzled(f.row() + 8 * i, chunk)], rows[i], T());
      }
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        const Chunk* first = b + swizzled(f.column(0) + i, chunk);
#pragma unroll
        for (int32_t j = 0; j < kColumns; ++j) {
          float column[kPerChunk<T>];
          widen(first[8 * j * kSliceChunks], column, T());
          for (int32_t d = 0; d < kPerChunk<T>; ++d) {
            f.sums[j][i] += rows[0][d] * column[d];
            f.sums[j][i + 2] += rows[1][d] * column[d];
          }
        }
      }
    }
  }
}

// Multiplies a tile of `own` rows, from `own_first`, by each tile of the `other` rows in turn, and
// passes each product to use(first other row, fragment).
template <class T, class Use>
HIVTP_DEVICE void walk(const Rows<T>& own, int32_t own_first, const Rows<T>& other, Chunk* shared,
                       Use use) {
  const int32_t slices = (own.chunks + kSliceChunks - 1) / kSliceChunks;
  constexpr int32_t kSlice = kTile * kSliceChunks;
  Chunk part[kLoads];
  for (int32_t slice = 0; slice < slices; ++slice) {
    own.read(own_first, slice, part);
    store(part, shared + slice * kSlice);
  }
  Chunk* streamed = shared + slices * kSlice;
  constexpr bool kAhead = kHasMma<T>;
  if (kAhead) other.read(0, 0, part);
  for (int32_t first = 0; first < other.tokens; first += kTile) {
    Fragment product = {};
    for (int32_t slice = 0; slice < slices; ++slice) {
      if (!kAhead) other.read(first, slice, part);
      __syncthreads();  // The previous slice has been read,
      store(part, streamed);
      __syncthreads();  // and this one is stored.
      const bool wraps = slice + 1 == slices;
      if (kAhead) other.read(wraps ? first + kTile : first, wraps ? 0 : slice + 1, part);
      const int32_t rest = own.chunks - slice * kSliceChunks;
      multiply<T>(shared + slice * kSlice, streamed, rest < kSliceChunks ? rest : kSliceChunks,
                  product);
    }
    use(first, product);
  }
}

// The lowest finite float. Maxima start from it: from -inf, a row that starts with -inf would give
// NaN.
constexpr float kLowest = -3.40282347e38f;

template <class T>
HIVTP_DEVICE void lse(const HivtpAttention& a) {
  HIVTP_SHARED(shared);
  const Place place(a, tiles(a.tokens));
  const Rows<T> queries(a, a.q[place.layer], place), keys(a, a.k[place.layer], place);
  // A running maximum and sum per row and lane, joined once at the end. The maximum ignores NaN,
  // which reaches the row through its sum.
  float top[2] = {kLowest, kLowest}, total[2] = {};
  walk(queries, place.tile * kTile, keys, shared, [&](int32_t first, Fragment& f) {
    float tile_top[2] = {top[0], top[1]};
#pragma unroll
    for (int32_t j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        const bool real = first + f.column(j) + i % 2 < a.tokens;
        f.sums[j][i] = real ? f.sums[j][i] * a.scale : -kInfinity;
        tile_top[i / 2] = Larger()(tile_top[i / 2], f.sums[j][i]);
      }
    }
#pragma unroll
    for (int32_t row = 0; row < 2; ++row) {
      float sum = 0;
#pragma unroll
      for (int32_t j = 0; j < kColumns; ++j) {
        sum += exp(f.sums[j][2 * row] - tile_top[row]);
        sum += exp(f.sums[j][2 * row + 1] - tile_top[row]);
      }
      total[row] = total[row] * exp(top[row] - tile_top[row]) + sum;
      top[row] = tile_top[row];
    }
  });

  const HivtpView& view = a.lse[place.layer];
  float* out = const_cast<float*>(head<float>(view, place));
#pragma unroll
  for (int32_t row = 0; row < 2; ++row) {
    float row_top = top[row];
    for (int32_t step = 1; step < 4; step *= 2) {
      row_top = Larger()(row_top, __shfl_xor_sync(kAllLanes, row_top, step));
    }
    float sum = total[row] * exp(top[row] - row_top);
    for (int32_t step = 1; step < 4; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    const int32_t query = place.tile * kTile + Fragment::row() + 8 * row;
    if (threadIdx.x % 4 == 0 && query < a.tokens) {
      out[query * view.token_stride] = row_top + logf(sum);
    }
  }
}

template <class T>
HIVTP_DEVICE void columns(const HivtpAttention& a, const Finish& f) {
  HIVTP_SHARED(shared);
  const Place place(a, tiles(a.tokens));
  const Rows<T> queries(a, a.q[place.layer], place), keys(a, a.k[place.layer], place);
  const HivtpView& view = a.lse[place.layer];
  const float* from = head<float>(view, place);
  float* lse = reinterpret_cast<float*>(shared);
  const int32_t padded_tokens = tiles(a.tokens) * kTile;
  for (int32_t i = threadIdx.x; i < padded_tokens; i += kTileThreads) {
    lse[i] = i < a.tokens ? from[i * view.token_stride] : 0;
  }
  Chunk* tile = shared + padded_tokens / kPerChunk<float>;
  float total[2] = {};
  walk(keys, place.tile * kTile, queries, tile, [&](int32_t first, Fragment& product) {
    // Sums per tile, then the sum of those: this rounds less than one long sum.
    float sum[2] = {};
#pragma unroll
    for (int32_t j = 0; j < 2 * kColumns; ++j) {
      const int32_t query = first + product.column(j / 2) + j % 2;
#pragma unroll
      for (int32_t row = 0; row < 2; ++row) {
        const float logit = product.sums[j / 2][j % 2 + 2 * row] * a.scale;
        const float weight = exp(logit - lse[query]);
        sum[row] += query < a.tokens ? weight : 0;
      }
    }
    total[0] += sum[0];
    total[1] += sum[1];
  });

  float* partial = f.partials + place.row * padded(a.tokens - a.prefix) - a.prefix;
#pragma unroll
  for (int32_t row = 0; row < 2; ++row) {
    for (int32_t step = 1; step < 4; step *= 2) {
      total[row] += __shfl_xor_sync(kAllLanes, total[row], step);
    }
    const int32_t token = place.tile * kTile + Fragment::row() + 8 * row;
    if (threadIdx.x % 4 == 0 && token >= a.prefix && token < a.tokens) partial[token] = total[row];
  }
  if (place.tile == 0) zero_padding(partial + a.tokens, a.tokens - a.prefix);
  const int32_t heads = a.layers * a.heads;
  finish(a, f, place.image, heads * tiles(a.tokens), float(heads) * float(a.tokens), shared);
}

}  // namespace hivtp

#define HIVTP_SCORE_KERNELS(suffix, T)                                                          \
  HIVTP_KERNEL(hivtp::kClsThreads) hivtp_cls_##suffix(HivtpAttention a, hivtp::Finish f) {      \
    hivtp::cls<T>(a, f);                                                                        \
  }                                                                                             \
  HIVTP_KERNEL(hivtp::kTileThreads) hivtp_lse_##suffix(HivtpAttention a) {                      \
    hivtp::lse<T>(a);                                                                           \
  }                                                                                             \
  HIVTP_KERNEL(hivtp::kTileThreads) hivtp_columns_##suffix(HivtpAttention a, hivtp::Finish f) { \
    hivtp::columns<T>(a, f);                                                                    \
  }

HIVTP_SCORE_KERNELS(f32, float)
HIVTP_SCORE_KERNELS(f16, hivtp::Half)
HIVTP_SCORE_KERNELS(bf16, hivtp::BFloat16)
