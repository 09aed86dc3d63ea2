// Rows of 16-bit elements that stay in registers as they came, two a word.
#pragma once

#include "quantize.cuh"

namespace qvdit {

// A row's elements of 16 bits times its grid's factor, which is hardly ever not 1.
template <typename In, int kVectors>
__device__ __forceinline__ void multiply_halves(uint4 (&words)[kVectors], float factor) {
  if (factor == 1.f) return;
  const typename Halves<In>::Two factors = Halves<In>::two(factor);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    typename Halves<In>::Two(&pairs)[4] = reinterpret_cast<typename Halves<In>::Two(&)[4]>(words[v]);
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = factor == 0.f ? factors : __hmul2(pairs[j], factors);
  }
}

// A row's extremes, of rows that stay as they came, two elements of 16 bits a word. highest: max |x|, or max(max x, 0)
// and lowest: max(max -x, 0); NaN if any x is.
template <typename In, bool kSymmetric, int kVectors>
__device__ __forceinline__ void range_of_halves(const uint4 (&words)[kVectors], float& highest, float& lowest) {
  using Two = typename Halves<In>::Two;
  uint32_t most = 0, least = 0;
  Two& high = reinterpret_cast<Two&>(most);
  Two& low = reinterpret_cast<Two&>(least);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const uint32_t (&pairs)[4] = reinterpret_cast<const uint32_t (&)[4]>(words[v]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Two pair = reinterpret_cast<const Two&>(pairs[j]);
      high = __hmax2_nan(high, kSymmetric ? __habs2(pair) : pair);
      if constexpr (!kSymmetric) low = __hmin2_nan(low, pair);
    }
  }
  const float2 highs = Halves<In>::floats(most);
  highest = max_nan(highs.x, highs.y);
  if constexpr (!kSymmetric) {
    const float2 lows = Halves<In>::floats(least);
    lowest = max_nan(-lows.x, -lows.y);
  }
}

// The integers of eight such elements, as kRounder + x_q - zero.
template <typename In, bool kSymmetric>
__device__ __forceinline__ void integers_of_halves(const uint4& words, const RowGrid& grid, float (&q)[kVector]) {
  const uint32_t (&pairs)[4] = reinterpret_cast<const uint32_t (&)[4]>(words);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = Halves<In>::floats(pairs[j]);
    q[2 * j] = grid.division.rounder_plus_quotient(pair.x);
    q[2 * j + 1] = grid.division.rounder_plus_quotient(pair.y);
  }
  if constexpr (!kSymmetric) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) q[i] = fminf(q[i], kRounder + grid.highest);
  }
}

// Eight integers kRounder + x_q - zero as the bytes that are stored; 0 past the features, where they are 0 themselves
// if symmetric.
template <bool kSymmetric>
__device__ __forceinline__ uint2 stored_bytes(const float (&q)[kVector], int stored_zero, bool inside) {
  uint2 bytes = {pack_bytes(q[0], q[1], q[2], q[3]), pack_bytes(q[4], q[5], q[6], q[7])};
  if constexpr (!kSymmetric) {
    const uint32_t zeros = (static_cast<uint32_t>(stored_zero) & 0xff) * 0x01010101u, mask = inside ? ~0u : 0u;
    bytes.x = __vadd4(bytes.x, zeros) & mask, bytes.y = __vadd4(bytes.y, zeros) & mask;
  }
  return bytes;
}

}  // namespace qvdit
