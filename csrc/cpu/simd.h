// Vectors of floats, as wide as the instruction set that this file is compiled for.
//
// score.cpp and select.cpp are compiled once per instruction set, each time in another namespace,
// HIVTP_TARGET. They include no standard header, and the functions of the headers that they include
// are always inlined: the linker could otherwise keep the version for the newest CPU of a shared
// inline function.
#ifndef HIVTP_CPU_SIMD_H_
#define HIVTP_CPU_SIMD_H_

#include <stdint.h>

#include "hivtp/softmax.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define HIVTP_LANES 16
#elif defined(__AVX2__)
#define HIVTP_LANES 8
#else
#define HIVTP_LANES 4
#endif

namespace hivtp {
namespace HIVTP_TARGET {

constexpr int kLanes = HIVTP_LANES;

typedef float Float __attribute__((vector_size(4 * HIVTP_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * HIVTP_LANES)));
typedef uint16_t Short __attribute__((vector_size(2 * HIVTP_LANES)));

// The 16-bit floats as stored in memory; float is the third type of q and k.
enum class Half : uint16_t {};
enum class BFloat16 : uint16_t {};

// Intrinsics where one instruction is enough: compilers turn a plain conversion into several. (The
// unmasked AVX-512 intrinsics give false warnings in GCC 12.)
HIVTP_HD Bits extend(Short values) {
#if defined(__AVX512F__)
  return (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)values);
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32((__m128i)values);
#else
  return __builtin_convertvector(values, Bits);
#endif
}

HIVTP_HD Float widen(Float values, float) {
  return values;
}

HIVTP_HD Float widen(Short values, BFloat16) {
  return bit_cast<Float>(extend(values) << 16);
}

HIVTP_HD Float widen(Short values, Half) {
#if defined(__AVX512F__)
  return (Float)_mm512_maskz_cvtph_ps(0xffff, (__m256i)values);
#elif defined(__F16C__)
  return (Float)_mm256_cvtph_ps((__m128i)values);
#else
  const Bits half = extend(values);
  const Bits magnitude = (half & 0x7fffu) << 13;
  const Bits rebiased = magnitude + (112u << 23);
  // Subnormal mantissas count from 2^-14; inf and NaN keep an exponent of all ones.
  const Bits tiny =
      bit_cast<Bits>(bit_cast<Float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23));
  Bits bits = magnitude < (1u << 23) ? tiny : rebiased;
  bits = magnitude >= (31u << 23) ? rebiased + (112u << 23) : bits;
  return bit_cast<Float>(bits | (half & 0x8000u) << 16);
#endif
}

// As many T as a Float has lanes, and half as many.
template <class T>
struct Packed {
  typedef Short type;
  typedef uint16_t half __attribute__((vector_size(HIVTP_LANES)));
};
template <>
struct Packed<float> {
  typedef Float type;
  typedef float half __attribute__((vector_size(2 * HIVTP_LANES)));
};

// kLanes elements as floats.
template <class T>
HIVTP_HD Float load(const T* p) {
  typename Packed<T>::type values;
  __builtin_memcpy(&values, p, sizeof values);
  return widen(values, T());
}

// Elements d to d + kLanes of a head as floats. head_dim is a multiple of 8, so only 16 lanes can
// have a tail: 8 elements, followed by zeros.
template <class T>
HIVTP_HD Float load(const T* head, int32_t d, int32_t head_dim) {
#if HIVTP_LANES == 16
  if (d + kLanes > head_dim) {
    typename Packed<T>::half tail;
    __builtin_memcpy(&tail, head + d, sizeof tail);
    // Joined in registers: reading a vector back after two writes to memory would stall.
    const typename Packed<T>::half zeros{};
    return widen(
        __builtin_shufflevector(tail, zeros, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        T());
  }
#else
  (void)head_dim;
#endif
  return load(head + d);
}

#define HIVTP_SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#if HIVTP_LANES == 16
#define HIVTP_SWAP_8(v) HIVTP_SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define HIVTP_SWAP_4(v) HIVTP_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define HIVTP_SWAP_2(v) HIVTP_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define HIVTP_SWAP_1(v) HIVTP_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#elif HIVTP_LANES == 8
#define HIVTP_SWAP_4(v) HIVTP_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3)
#define HIVTP_SWAP_2(v) HIVTP_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5)
#define HIVTP_SWAP_1(v) HIVTP_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6)
#else
#define HIVTP_SWAP_2(v) HIVTP_SHUFFLE(v, 2, 3, 0, 1)
#define HIVTP_SWAP_1(v) HIVTP_SHUFFLE(v, 1, 0, 3, 2)
#endif

// Rows become columns: for each bit, lanes and rows whose numbers differ in it change places.
HIVTP_HD void transpose(Float (&square)[kLanes]) {
  Bits lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#define HIVTP_EXCHANGE(bit)                                   \
  for (int i = 0; i < kLanes; ++i) {                          \
    if (i & bit) continue;                                    \
    const Float a = square[i], b = square[i + bit];           \
    square[i] = (lane & bit) ? HIVTP_SWAP_##bit(b) : a;       \
    square[i + bit] = (lane & bit) ? b : HIVTP_SWAP_##bit(a); \
  }
#if HIVTP_LANES >= 16
  HIVTP_EXCHANGE(8)
#endif
#if HIVTP_LANES >= 8
  HIVTP_EXCHANGE(4)
#endif
  HIVTP_EXCHANGE(2)
  HIVTP_EXCHANGE(1)
#undef HIVTP_EXCHANGE
}

HIVTP_HD float sum_lanes(Float v) {
#if HIVTP_LANES >= 16
  v += HIVTP_SWAP_8(v);
#endif
#if HIVTP_LANES >= 8
  v += HIVTP_SWAP_4(v);
#endif
  v += HIVTP_SWAP_2(v);
  v += HIVTP_SWAP_1(v);
  return v[0];
}

HIVTP_HD Float larger(Float a, Float b) {
  return a > b ? a : b;
}

// The largest lane, ignoring NaN.
HIVTP_HD float max_lanes(Float v) {
#if HIVTP_LANES >= 16
  v = larger(v, HIVTP_SWAP_8(v));
#endif
#if HIVTP_LANES >= 8
  v = larger(v, HIVTP_SWAP_4(v));
#endif
  v = larger(v, HIVTP_SWAP_2(v));
  v = larger(v, HIVTP_SWAP_1(v));
  return v[0];
}

// A Group of one worker, for the algorithms in include/hivtp.
struct Serial {
  HIVTP_HD static constexpr int32_t rank() { return 0; }
  HIVTP_HD static constexpr int32_t size() { return 1; }
  HIVTP_HD static constexpr int32_t teams() { return 1; }
  HIVTP_HD static constexpr int32_t team_rank() { return 0; }
  HIVTP_HD Serial team() const { return {}; }
  HIVTP_HD static void sync() {}
  HIVTP_HD static int64_t sum(int64_t value) { return value; }
  HIVTP_HD static int64_t scan(int64_t) { return 0; }
  HIVTP_HD static float sum(Float value) { return sum_lanes(value); }
  HIVTP_HD static float max(Float value) { return max_lanes(value); }
};

}  // namespace HIVTP_TARGET

#if defined(__AVX512F__)
// Like the generic version, except that one instruction sets the exponent.
template <>
HIVTP_HD HIVTP_TARGET::Float exp(HIVTP_TARGET::Float x) {
  using HIVTP_TARGET::Float;
  // Masked lanes are 0 at no cost; subnormal results would be slow. NaN is not masked and passes
  // through the minimum; everything above 89 gives inf.
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-86.6f), _CMP_NLT_UQ);
  x = (Float)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(89.0f), (__m512)x);
  const Float n = x * kLog2E + kRound - kRound;
  return (Float)_mm512_maskz_scalef_ps(normal, (__m512)exp_fraction<Float>(x, n), (__m512)n);
}
#endif

template <>
struct BitsOf<HIVTP_TARGET::Float> {
  using type = HIVTP_TARGET::Bits;
};

}  // namespace hivtp

#endif  // HIVTP_CPU_SIMD_H_
