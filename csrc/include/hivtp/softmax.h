// The softmax of a row of logits, computed by a group of workers.
//
// `F` is what one worker holds at a time: a float on a device, a vector of floats on a CPU. The
// order of every sum depends only on the group's size and F.
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

constexpr float kLog2E = 1.44269504f;

// Adding this rounds a number to the nearest integer, which is then in the low bits.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

// e^x / 2^n for the integer n nearest to x log2 e.
template <class F>
HIVTP_HD F exp_fraction(F x, F n) {
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // x - n ln 2, ln 2 in two parts
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;             // Cephes: e^r for |r| <= ln 2 / 2
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

// e^x within 2 ulp; 0 for x < -86.6; NaN stays NaN.
template <class F>
HIVTP_HD F exp(F x) {
  using Bits = typename BitsOf<F>::type;
  const F shifted = x * kLog2E + kRound;
  const F p = exp_fraction<F>(x, shifted - kRound);
  // 2^n as 2 * 2^(n - 1), since n goes up to 128, one more than an exponent can hold.
  const Bits exponent = bit_cast<Bits>(shifted) - bit_cast<uint32_t>(kRound) + 126u;
  F y = p * bit_cast<F>(exponent << 23) * 2.0f;
  y = x < splat<F>(-86.6f) ? F{} : y;
  return x > splat<F>(88.7228f) ? splat<F>(kInfinity) : y;
}

// Replaces a row by exp(row - lse), its softmax if lse is the log of the sum of exp(row).
template <class Group, class F>
HIVTP_HD void softmax_with_lse(const Group& group, F* row, int32_t n, float lse) {
  for (int32_t i = group.rank(); i < n; i += group.size()) row[i] = exp<F>(row[i] - lse);
}

// Replaces a row by exp(row - max(row)) and returns the factor that turns it into the softmax.
// A row with a NaN or +inf, or of only -inf, gives the factor NaN. Pad the row with -inf. Each
// comparison waits for the one before it, so a worker with many can split them into `chains`.
template <int chains = 1, class Group, class F>
HIVTP_HD float softmax(const Group& group, F* row, int32_t n) {
  F top[chains];
  for (F& chain : top) chain = splat<F>(-kInfinity);
  int32_t i = group.rank();
  for (; chains > 1 && i + (chains - 1) * group.size() < n; i += chains * group.size()) {
    for (int c = 0; c < chains; ++c) {
      const F logit = row[i + c * group.size()];
      top[c] = logit > top[c] ? logit : top[c];
    }
  }
  for (; i < n; i += group.size()) top[0] = row[i] > top[0] ? row[i] : top[0];
  for (int c = 1; c < chains; ++c) top[0] = top[c] > top[0] ? top[c] : top[0];
  const float largest = group.max(top[0]);
  F total{};
  for (i = group.rank(); i < n; i += group.size()) {
    row[i] = exp<F>(row[i] - largest);
    total += row[i];
  }
  return 1.0f / group.sum(total);
}

}  // namespace hivtp

#endif  // HIVTP_SOFTMAX_H_
