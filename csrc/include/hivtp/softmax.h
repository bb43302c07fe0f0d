// The soft-max of a row of logits, by a group of workers.
//
// `F` is what one worker holds at a time: a float on a device, a vector of floats on a CPU. The
// order of every sum follows from the group's size and F alone.
#ifndef HIVTP_SOFTMAX_H_
#define HIVTP_SOFTMAX_H_

#include "hivtp/portable.h"

namespace hivtp {

// The bits of F, lane by lane.
template <class F>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
};

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

template <class F>
HIVTP_HD F splat(float value) {
  return F{} + value;
}

// e^x within 2 ulp. Below e^-86.6 it is 0; NaN stays NaN.
template <class F>
HIVTP_HD F exp(F x) {
  using Bits = typename BitsOf<F>::type;
  // Adding 1.5 * 2^23 rounds to the nearest integer n and leaves it in the low bits.
  const float kRound = 12582912.0f;
  const F shifted = x * 1.44269504f + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // x - n ln 2, ln 2 in two parts
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;             // Cephes: e^r for |r| <= ln 2 / 2
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n as 2 * 2^(n - 1), since n goes up to 128, one more than an exponent.
  const Bits exponent = bit_cast<Bits>(shifted) - bit_cast<uint32_t>(kRound) + 126u;
  F y = p * bit_cast<F>(exponent << 23) * 2.0f;
  y = x < splat<F>(-86.6f) ? F{} : y;
  return x > splat<F>(88.7228f) ? splat<F>(kInfinity) : y;
}

// Replaces a row by exp(row - lse), its soft-max where lse is the log of the sum of exp(row).
template <class Group, class F>
HIVTP_HD void softmax_with_lse(const Group& group, F* row, int32_t n, float lse) {
  for (int32_t i = group.rank(); i < n; i += group.size()) row[i] = exp<F>(row[i] - lse);
}

// Replaces a row by exp(row - max(row)) and returns the factor that turns it into the soft-max.
// A NaN or +inf in the row, or only -inf, gives the factor NaN. Pad the row with -inf.
template <class Group, class F>
HIVTP_HD float softmax(const Group& group, F* row, int32_t n) {
  F top = splat<F>(-kInfinity);
  for (int32_t i = group.rank(); i < n; i += group.size()) top = row[i] > top ? row[i] : top;
  const float largest = group.max(top);
  F total{};
  for (int32_t i = group.rank(); i < n; i += group.size()) {
    row[i] = exp<F>(row[i] - largest);
    total += row[i];
  }
  return 1.0f / group.sum(total);
}

}  // namespace hivtp

#endif  // HIVTP_SOFTMAX_H_
