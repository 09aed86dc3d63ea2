// round(x / divisor), to the bit what an IEEE division followed by round-half-to-even gives, for a divisor that many x
// share: four operations instead of the ten and a branch of a division.
//
// q0 = x · r and one correction by the exact remainder give x / divisor correctly rounded, or so nearly that only ties
// could tell: the result is rounded to an integer next, so only x within 2 ulp of h · divisor, h a half-integer, can
// differ. All of these were compared with the division: 2^23 mantissas of the divisor x 256 half-integers x 5 (powers
// of two scale out, as nothing here overflows or becomes subnormal before it is 0 anyway).
// tests/unit/test_kernels_host.py samples that comparison; `QVDIT_EXHAUSTIVE=1` runs it whole.
#pragma once

#include <cmath>
#include <cstdint>

#include "unpack.h"

namespace qvdit {

// 1.5 · 2^23 + 0x6600: a float32 of magnitude below 2^21 plus this is rounded to an integer, half to even. The sum's
// low byte is that of the integer in two's complement, and its lower half, where the integer is at most 511 either way,
// is the float16 number kHalfRounder plus the integer.
constexpr float kRounder = 12582912.0f + 0x6600;
constexpr float kHalfRounder = 1536.0f;

// |x / divisor| < 2^21. reciprocal: 1 / divisor, correctly rounded. Returns kRounder + round(x / divisor).
QVDIT_HOST_DEVICE float rounder_plus_quotient(float x, float divisor, float reciprocal) {
#if defined(__CUDA_ARCH__)
  const float q0 = __fmul_rn(x, reciprocal);
  const float q = __fmaf_rn(__fmaf_rn(-q0, divisor, x), reciprocal, q0);
  return __fadd_rn(q, kRounder);
#else
  const float q0 = x * reciprocal;
  const float q = std::fma(std::fma(-q0, divisor, x), reciprocal, q0);
  return q + kRounder;
#endif
}

}  // namespace qvdit
