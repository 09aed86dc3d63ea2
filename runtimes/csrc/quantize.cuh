// What the quantizers share: their arguments, a row's grid, two elements of 16 bits in a word, what a device has.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "error.h"
#include "quantize_plan.h"
#include "round_quotient.h"

namespace qvdit {

constexpr int kMaxRank = 32;
constexpr int64_t kMaxFeatures = 16384;
constexpr int kMaxRotation = 1024;       // features a block of the Walsh-Hadamard transform
constexpr float kSmallestScale = 1e-8f;  // EPS_SCALE of qvdit/method/operator.py

// n / divisor for 0 <= n < 2^31 without a division.
struct Divisor {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t value) : divisor(value) {
    if (value <= 1) return;
    int log2 = 0;
    while (log2 < 31 && (uint64_t{1} << log2) < value) ++log2;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + log2)) + value - 1) / value);
    shift = log2 - 1;
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return divisor == 1 ? n : __umulhi(n, multiplier) >> shift;
  }
  __device__ __forceinline__ uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

// qvdit_quantize_args with what the host worked out.
struct QuantizeParams {
  qvdit_quantize_args args;
  int64_t k_pad;
  float levels;                   // what the range is divided by: 127 or 31; asymmetric 255 or 63
  float levels_reciprocal;        // 1 / levels
  bool vectorized;                // every array may be read 16 bytes at a time, and K is a multiple of 8
  Divisor tokens, frames, ranks;  // tokens_per_frame, frames, ranks_per_gain
  Divisor modulated;              // rows_per_modulation

  // The frame gain of a row's rank, where there are frame gains.
  __device__ __forceinline__ float gain(uint32_t row, uint32_t rank) const {
    const uint32_t frame = frames.remainder(tokens.quotient(row));
    return __ldg(args.frame_gain + ranks.quotient(rank) * static_cast<uint32_t>(args.frames) + frame);
  }
};

// Two 16-bit elements in a word.
template <typename In>
struct Halves;

template <>
struct Halves<__half> {
  using Two = __half2;
  static __device__ __forceinline__ float2 floats(uint32_t word) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
  static __device__ __forceinline__ Two two(float value) { return __float2half2_rn(value); }
};

template <>
struct Halves<__nv_bfloat16> {
  using Two = __nv_bfloat162;
  static __device__ __forceinline__ float2 floats(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
  static __device__ __forceinline__ Two two(float value) { return __float2bfloat162_rn(value); }
};

// The greater of two, NaN where either is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// The greatest of non-negative or NaN values over a warp: as unsigned integers, where NaN is above Inf.
__device__ __forceinline__ float warp_max(float value) {
  return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(value) & 0x7fffffffu));
}

// A row's quantization grid: what x̃ is divided by, and how far its integers go.
struct RowGrid {
  float scale;               // NaN for a row with NaN or Inf in it
  float factor;              // of x̃ before it is divided: 1; or kShrink; or 0 where every integer is 0, from NaN too
  RoundingDivisor division;  // by scale · factor
  float zero;                // of x_q, before 128 is taken away
  float highest;             // x_q - zero is at most this

  // lowest: max(max -x̃, 0), highest: max(max x̃, 0), or both max |x̃| if symmetric; NaN if any x̃ is.
  template <bool kSymmetric>
  static __device__ __forceinline__ RowGrid of(float lowest, float highest, const QuantizeParams& params) {
    const bool bad = !(isfinite(lowest) && isfinite(highest));
    const float range = kSymmetric ? highest : __fadd_rn(highest, lowest);
    // The sum may overflow although both are finite; x̃ / Inf is then 0.
    const bool nothing = !isfinite(range);
    RowGrid grid;
    grid.scale = fmaxf(quotient_by_levels(range, params.levels, params.levels_reciprocal), kSmallestScale);
    if (nothing) grid.scale = bad ? __int_as_float(0x7fffffff) : range;
    grid.factor = nothing ? 0.f : RoundingDivisor::factor(grid.scale);
    if (!nothing) grid.division = RoundingDivisor(grid.scale * grid.factor);
    grid.zero = kSymmetric || nothing ? 0.f : grid.division.rounder_plus_quotient(lowest * grid.factor) - kRounder;
    // Symmetric: |x̃ / scale| <= 127 (1 + 2^-23) rounds to 127 at most. Asymmetric: both roundings may go up, to 256; at
    // the low end round(x̃ / scale) >= -zero, as rounding is monotone.
    grid.highest = params.levels - grid.zero;
    return grid;
  }
};

// Four integers kRounder + q as the bytes q.
__device__ __forceinline__ uint32_t pack_bytes(float a, float b, float c, float d) {
  const uint32_t low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
  const uint32_t high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// Bytes of dynamic shared memory that a kernel may ask for on the current device, beside what it declares: 99 KB a
// block in all on sm_86, 89 and 120, 163 on 80 and 87, 227 on 90 and 100. 0 where CUDA does not tell; resident_blocks
// then says why.
int dynamic_shared_limit(const void* kernel);

// How many blocks of a kernel run at once on the current device; lets it have the most shared memory it may ask for.
int32_t resident_blocks(const void* kernel, int threads, int shared, int most_shared, int& blocks);

// What a multiprocessor of the current device has for a kernel; nothing where CUDA does not tell.
Multiprocessor multiprocessor(const void* kernel);

// One file each, so that they compile beside each other. Of 16-bit rows as they are: quantize_f16 and quantize_bf16 up
// to rank 1, quantize_groups of higher ranks, where they fit.
int32_t quantize_plain(const QuantizeParams& params, cudaStream_t stream);
int32_t quantize_layernorm(const QuantizeParams& params, cudaStream_t stream);
int32_t quantize_gelu(const QuantizeParams& params, cudaStream_t stream);
int32_t quantize_f16(const QuantizeParams& params, cudaStream_t stream);
int32_t quantize_bf16(const QuantizeParams& params, cudaStream_t stream);
int32_t quantize_groups(const QuantizeParams& params, bool& fits, cudaStream_t stream);

}  // namespace qvdit
