// round(x / divisor), to the bit what an IEEE division followed by round-half-to-even gives, for a divisor that many x
// share: three operations instead of the ten and a branch of a division.
//
// 1 / divisor is the sum of two floats, the second correcting the first, and x times that sum is x / divisor correctly
// rounded, or so nearly that only ties could tell: the result is rounded to an integer next, so only x within 2 ulp of
// h · divisor, h a half-integer, can differ. All of these were compared with the division: 2^23 mantissas of the
// divisor x 256 half-integers x 5 (powers of two scale out: nothing here overflows, and what becomes subnormal is too
// small to tell). tests/unit/test_kernels_host.py samples that comparison; `QVDIT_EXHAUSTIVE=1` runs it whole.
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

// What x is divided by. Of the default every quotient is 0.
struct RoundingDivisor {
  // Above it the correction would lose bits: a row and its divisor are then made smaller by kShrink, exactly but for
  // elements whose quotients are 0.
  static constexpr float kGreatest = 0x1p96f;
  static constexpr float kShrink = 0x1p-64f;

  float reciprocal = 0.f;  // 1 / divisor, correctly rounded
  float correction = 0.f;  // 1 / divisor - reciprocal

  // What x and its divisor have to be multiplied by first.
  static QVDIT_HOST_DEVICE float factor(float divisor) { return divisor > kGreatest ? kShrink : 1.f; }

  RoundingDivisor() = default;
  // 2^-96 <= divisor <= kGreatest
  QVDIT_HOST_DEVICE explicit RoundingDivisor(float divisor) {
#if defined(__CUDA_ARCH__)
    float near;  // by 1 ulp: one step makes it what __frcp_rn gives, which asks first whether it may
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(divisor));
    reciprocal = __fmaf_rn(near, __fmaf_rn(-divisor, near, 1.f), near);
    const float rest = __fmaf_rn(-divisor, reciprocal, 1.f);
    correction = __fmul_rn(reciprocal, __fmaf_rn(rest, rest, rest));
#else
    reciprocal = 1.f / divisor;
    const float rest = std::fma(-divisor, reciprocal, 1.f);
    correction = reciprocal * std::fma(rest, rest, rest);
#endif
  }

  // kRounder + round(x / divisor), |x / divisor| < 2^21.
  QVDIT_HOST_DEVICE float rounder_plus_quotient(float x) const {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(__fmaf_rn(x, reciprocal, __fmul_rn(x, correction)), kRounder);
#else
    return std::fma(x, reciprocal, x * correction) + kRounder;
#endif
  }
};

// x / divisor, correctly rounded, for finite x >= 1e-12 and a divisor of 31, 63, 127 or 255 with its reciprocal; for
// smaller x something below 1e-12. All x were compared, as above.
QVDIT_HOST_DEVICE float quotient_by_levels(float x, float divisor, float reciprocal) {
#if defined(__CUDA_ARCH__)
  const float near = __fmul_rn(x, reciprocal);
  return __fmaf_rn(__fmaf_rn(-near, divisor, x), reciprocal, near);
#else
  const float near = x * reciprocal;
  return std::fma(std::fma(-near, divisor, x), reciprocal, near);
#endif
}

}  // namespace qvdit
