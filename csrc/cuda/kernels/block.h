// The threads of a block as a Group for the block algorithms; its teams are its warps.
#ifndef HIVTP_CUDA_BLOCK_H_
#define HIVTP_CUDA_BLOCK_H_

#include "device.h"
#include "hivtp/select.h"
#include "params.h"

namespace hivtp {

constexpr uint32_t kAllLanes = 0xffffffffu;

template <class V, class Join>
HIVTP_DEVICE V reduce_lanes(V value, Join join) {
  for (int32_t step = kWarp / 2; step > 0; step /= 2) {
    value = join(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

struct Add {
  template <class V>
  HIVTP_DEVICE V operator()(V a, V b) const {
    return a + b;
  }
};

struct Larger {
  HIVTP_DEVICE float operator()(float a, float b) const { return b > a ? b : a; }
};

struct Warp {
  HIVTP_DEVICE int32_t rank() const { return threadIdx.x % kWarp; }
  HIVTP_DEVICE int32_t size() const { return kWarp; }
  HIVTP_DEVICE void sync() const { __syncwarp(); }
  HIVTP_DEVICE int64_t sum(int64_t value) const { return reduce_lanes(int32_t(value), Add()); }
};

// `scratch` is kReduceBytes of shared memory. Integer sums must fit into 32 bits.
struct Block {
  int32_t* scratch;

  HIVTP_DEVICE explicit Block(Chunk* shared) : scratch(reinterpret_cast<int32_t*>(shared)) {}
  HIVTP_DEVICE int32_t rank() const { return threadIdx.x; }
  HIVTP_DEVICE int32_t size() const { return blockDim.x; }
  HIVTP_DEVICE void sync() const { __syncthreads(); }
  HIVTP_DEVICE int32_t teams() const { return blockDim.x / kWarp; }
  HIVTP_DEVICE int32_t team_rank() const { return threadIdx.x / kWarp; }
  HIVTP_DEVICE Warp team() const { return {}; }

  HIVTP_DEVICE int64_t sum(int64_t value) const { return reduce(int32_t(value), Add()); }
  HIVTP_DEVICE float sum(float value) const { return reduce(value, Add()); }
  HIVTP_DEVICE float max(float value) const { return reduce(value, Larger()); }

  HIVTP_DEVICE int64_t scan(int64_t value) const {
    int32_t upto = int32_t(value);
    for (int32_t step = 1; step < kWarp; step *= 2) {
      const int32_t lower = __shfl_up_sync(kAllLanes, upto, step);
      upto += team().rank() >= step ? lower : 0;
    }
    if (team().rank() == kWarp - 1) scratch[team_rank()] = upto;
    sync();
    int32_t before = upto - int32_t(value);
    for (int32_t warp = 0; warp < team_rank(); ++warp) before += scratch[warp];
    sync();
    return before;
  }

 private:
  // Always in the order of the warps.
  template <class V, class Join>
  HIVTP_DEVICE V reduce(V value, Join join) const {
    value = reduce_lanes(value, join);
    if (team().rank() == 0) scratch[team_rank()] = bit_cast<int32_t>(value);
    sync();
    value = bit_cast<V>(scratch[0]);
    for (int32_t warp = 1; warp < teams(); ++warp) value = join(value, bit_cast<V>(scratch[warp]));
    sync();
    return value;
  }
};

// Selects the patches of one image in select_shared_bytes(patches) of shared memory.
HIVTP_DEVICE void select(const float* scores, const HivtpSelectParams& params, int64_t image,
                         const HivtpSelection& out, Chunk* shared) {
  const int64_t first = image * params.capacity;
  int64_t* keys = reinterpret_cast<int64_t*>(shared + kReduceBytes / sizeof(Chunk));
  int8_t* stage = reinterpret_cast<int8_t*>(keys + params.height * params.width);
  select_image(Block(shared), scores, params, keys, stage, out.indices + first, out.counts + image,
               out.stage + first);
}

}  // namespace hivtp

#endif  // HIVTP_CUDA_BLOCK_H_
