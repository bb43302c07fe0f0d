// What the kernels need from a device and plain C++ does not have. They include only this and the
// shared headers, and use CUDA's built-in names.
#ifndef HIVTP_CUDA_DEVICE_H_
#define HIVTP_CUDA_DEVICE_H_

#include "hivtp/portable.h"

#define HIVTP_DEVICE __device__ __forceinline__
#define HIVTP_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 512 / threads)

// The dynamic shared memory of the block, as an array of Chunk.
#ifdef __CUDACC__
#define HIVTP_SHARED(name) extern __shared__ hivtp::Chunk name[]
#else
#define HIVTP_SHARED(name) hivtp::Chunk* const name = hivtp::shared_memory()
#endif

namespace hivtp {

// 16 bytes, loaded or stored in one access.
struct alignas(16) Chunk {
  uint32_t words[4];
};

// The 16-bit floats as stored in memory; float is the third type of q and k.
enum class Half : uint16_t {};
enum class BFloat16 : uint16_t {};

// Elements of T in a chunk.
template <class T>
constexpr int32_t kPerChunk = int32_t(sizeof(Chunk) / sizeof(T));

// Whether the tensor cores multiply T with fp32 accumulation.
template <class T>
constexpr bool kHasMma = false;
template <>
constexpr bool kHasMma<Half> = true;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <>
constexpr bool kHasMma<BFloat16> = true;
#endif

// The elements of a chunk as floats.
HIVTP_DEVICE void widen(const Chunk& c, float (&values)[4], float) {
  for (int i = 0; i < 4; ++i) values[i] = bit_cast<float>(c.words[i]);
}

HIVTP_DEVICE void widen(const Chunk& c, float (&values)[8], BFloat16) {
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = bit_cast<float>(c.words[i] << 16);
    values[2 * i + 1] = bit_cast<float>(c.words[i] & 0xffff0000u);
  }
}

// Reads memory that no thread of the launch writes.
template <class V>
HIVTP_DEVICE V load(const void* global) {
  return *static_cast<const V*>(global);
}

#ifdef __CUDACC__

template <>
HIVTP_DEVICE Chunk load<Chunk>(const void* global) {
  Chunk c;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(c.words[0]), "=r"(c.words[1]), "=r"(c.words[2]), "=r"(c.words[3])
      : "l"(global));
  return c;
}

// Reads what other blocks have written, bypassing the L1 cache, which may hold older values.
HIVTP_DEVICE Chunk load_past_l1(const void* global) {
  Chunk c;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(c.words[0]), "=r"(c.words[1]), "=r"(c.words[2]), "=r"(c.words[3])
               : "l"(global)
               : "memory");
  return c;
}

// Takes a ticket and returns its number. Everything that blocks with lower numbers wrote before
// taking theirs is visible after this.
HIVTP_DEVICE int32_t take_ticket(int32_t* tickets) {
  int32_t number;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(number)
               : "l"(tickets)
               : "memory");
  return number;
}

HIVTP_DEVICE void widen(const Chunk& c, float (&values)[8], Half) {
  for (int i = 0; i < 4; ++i) {
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2;"
        " cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(values[2 * i]), "=f"(values[2 * i + 1])
        : "r"(c.words[i]));
  }
}

// Four matrices of 8 rows of 16 bytes; lanes 8 i to 8 i + 7 point to the rows of matrix i.
HIVTP_DEVICE void load_matrices(const Chunk* row, uint32_t (&matrices)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// sums += a b, 16 x 8, for a of 16 x 16 and b of 16 x 8, as fragments of mma.m16n8k16.
HIVTP_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                               Half) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
        " {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half ? b1 : b0));
  }
#endif
}

HIVTP_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                               BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else  // tests/native/cuda_emulator, which executes the kernels on the CPU, defines these.

Chunk* shared_memory();
Chunk load_past_l1(const void* global);
int32_t take_ticket(int32_t* tickets);
void widen(const Chunk& c, float (&values)[8], Half);
void load_matrices(const Chunk* row, uint32_t (&matrices)[4]);
template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T);

#endif

}  // namespace hivtp

#endif  // HIVTP_CUDA_DEVICE_H_
