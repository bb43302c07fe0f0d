// Turns the .cu files into plain C++: defines CUDA's built-in names and the operations of device.h.
//
// A thread of a launch is a fiber or, with HIVTP_EMULATOR_THREADS, a real thread that the thread
// sanitizer can observe (runner.cpp). Errors, such as a shuffle that not all lanes of a warp reach,
// are reported by name.
#ifndef HIVTP_EMULATOR_H_
#define HIVTP_EMULATOR_H_

#include <cmath>
#include <cstdint>

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#include "cuda/kernels/device.h"
#include "cuda/kernels/params.h"

namespace emulator {

using hivtp::bit_cast;
using hivtp::Chunk;
using hivtp::kWarp;

struct Index {
  uint32_t x, y, z;
};

// Where `size` threads wait for each other.
struct Rendezvous {
  uint32_t size;
  uint32_t arrived = 0;
  uint32_t generation = 0;  // how often all of them have met
};

// A lane's part in an operation of its warp.
struct Record {
  const char* operation;
  void* operands;
};

struct Warp {
  Rendezvous place{kWarp};
  Record records[kWarp] = {};
};

struct Block {
  Index index, dim;
  Chunk* shared;
  Rendezvous barrier;
};

struct Thread {
  Index index;
  Block* block;
  Warp* warp;
  int32_t lane;
  int32_t barriers = 0;  // passed so far
};

// The running thread. Never keep a copy: it changes whenever a thread waits.
extern thread_local Thread* current __attribute__((tls_model("initial-exec")));

// Ends the launch with an error.
[[noreturn]] void fail(const char* what);

// Waits for the block or the warp. Afterwards, all threads see each other's earlier writes.
void synchronise_block();
void synchronise_warp();

// Waits for the warp, whose last thread runs `work`. CUDA does not promise that a shuffle makes
// writes visible, so the thread sanitizer must not see this synchronisation.
void exchange(const char* operation, void* operands, void (*work)(const Record*));
#define HIVTP_UNSEEN __attribute__((no_sanitize("thread")))

// A kernel, with pointers to its arguments.
using Kernel = void (*)(void** arguments);
Kernel find(const char* name);

struct Shuffle {
  uint32_t value, result;
  int32_t source;
};

HIVTP_UNSEEN inline void shuffle_all(const Record* records) {
  for (int32_t lane = 0; lane < kWarp; ++lane) {
    auto& mine = *static_cast<Shuffle*>(records[lane].operands);
    mine.result = static_cast<Shuffle*>(records[mine.source].operands)->value;
  }
}

template <class V>
V shuffle(const char* operation, uint32_t mask, V value, int32_t source) {
  if (mask != 0xffffffffu) fail("a shuffle of less than a warp, which the emulator lacks");
  Shuffle operands{bit_cast<uint32_t>(value), 0, source};
  exchange(operation, &operands, shuffle_all);
  return bit_cast<V>(operands.result);
}

// Exact in all FPU modes, as no float here is subnormal.
HIVTP_UNSEEN inline float half_to_float(uint32_t half) {
  const uint32_t exponent = half & 0x7c00u, sign = (half & 0x8000u) << 16;
  const uint32_t bits = (half & 0x7fffu) << 13;
  const uint32_t normal = bits + ((exponent == 0x7c00u ? 224u : 112u) << 23);
  const float subnormal = bit_cast<float>(bits + (113u << 23)) - bit_cast<float>(113u << 23);
  return bit_cast<float>((exponent ? normal : bit_cast<uint32_t>(subnormal)) | sign);
}

HIVTP_UNSEEN inline float to_float(uint32_t half, hivtp::Half) {
  return half_to_float(half);
}
HIVTP_UNSEEN inline float to_float(uint32_t half, hivtp::BFloat16) {
  return bit_cast<float>(half << 16);
}

struct Matrices {
  Chunk row;
  uint32_t* words;
};

HIVTP_UNSEEN inline void load_matrices_all(const Record* records) {
  for (int32_t lane = 0; lane < kWarp; ++lane) {
    uint32_t* words = static_cast<Matrices*>(records[lane].operands)->words;
    for (int32_t i = 0; i < 4; ++i) {
      const void* row = records[8 * i + lane / 4].operands;
      words[i] = static_cast<const Matrices*>(row)->row.words[lane % 4];
    }
  }
}

struct Product {
  float* sums;
  const uint32_t* a;
  uint32_t b[2];
};

// The fragments of mma.m16n8k16, from the PTX manual: lane 4 r + c has rows r and r + 8 of a and of
// the sums, and column r of b; along the other axis, the pairs that start at 2 c and 2 c + 8.
template <class T>
HIVTP_UNSEEN void multiply_add_all(const Record* records) {
  float a[16][16], b[16][8], sums[16][8];
  for (int32_t lane = 0; lane < kWarp; ++lane) {
    const auto& product = *static_cast<Product*>(records[lane].operands);
    const int32_t row = lane / 4, column = lane % 4 * 2;
    for (int32_t i = 0; i < 8; ++i) {
      const uint32_t word = product.a[i / 2] >> i % 2 * 16 & 0xffffu;
      a[row + i / 2 % 2 * 8][column + i / 4 * 8 + i % 2] = to_float(word, T());
    }
    for (int32_t i = 0; i < 4; ++i) {
      const uint32_t word = product.b[i / 2] >> i % 2 * 16 & 0xffffu;
      b[column + i / 2 * 8 + i % 2][row] = to_float(word, T());
      sums[row + i / 2 * 8][column + i % 2] = product.sums[i];
    }
  }
  for (int32_t i = 0; i < 16; ++i) {
    for (int32_t k = 0; k < 16; ++k) {
      for (int32_t j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int32_t lane = 0; lane < kWarp; ++lane) {
    const auto& product = *static_cast<Product*>(records[lane].operands);
    for (int32_t i = 0; i < 4; ++i) {
      product.sums[i] = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  }
}

inline void barrier() {
#ifdef HIVTP_BREAK_BARRIER  // Leaves out the barrier of that number, to see the race reported.
  if (++current->barriers == HIVTP_BREAK_BARRIER) return;
#endif
  synchronise_block();
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->block->index)
#define blockDim (emulator::current->block->dim)
#define __syncthreads() emulator::barrier()
#define __syncwarp() emulator::synchronise_warp()

template <class V>
V __shfl_xor_sync(uint32_t mask, V value, int32_t step) {
  return emulator::shuffle("__shfl_xor_sync", mask, value, emulator::current->lane ^ step);
}

template <class V>
V __shfl_up_sync(uint32_t mask, V value, int32_t step) {
  const int32_t lane = emulator::current->lane;
  return emulator::shuffle("__shfl_up_sync", mask, value, lane < step ? lane : lane - step);
}

namespace hivtp {

inline Chunk* shared_memory() {
  return emulator::current->block->shared;
}

// Not atomic, so that the thread sanitizer reports a read that is not ordered after the write.
inline Chunk load_past_l1(const void* global) {
  return *static_cast<const Chunk*>(global);
}

inline int32_t take_ticket(int32_t* tickets) {
#ifdef HIVTP_BREAK_TICKET
  return __atomic_fetch_add(tickets, 1, __ATOMIC_RELAXED);
#else
  return __atomic_fetch_add(tickets, 1, __ATOMIC_ACQ_REL);
#endif
}

inline void widen(const Chunk& c, float (&values)[8], Half) {
  for (int32_t i = 0; i < 8; ++i) {
    values[i] = emulator::half_to_float(c.words[i / 2] >> i % 2 * 16 & 0xffffu);
  }
}

inline void load_matrices(const Chunk* row, uint32_t (&matrices)[4]) {
  emulator::Matrices operands{*row, matrices};
  emulator::exchange("ldmatrix", &operands, emulator::load_matrices_all);
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  emulator::Product operands{sums, a, {b0, b1}};
  emulator::exchange("mma.sync", &operands, emulator::multiply_add_all<T>);
}

}  // namespace hivtp

#endif  // HIVTP_EMULATOR_H_
