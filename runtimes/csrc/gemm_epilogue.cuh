// Step 4 for a fragment of accumulators of the mma.sync GEMM: which rows and columns it covers is the caller's
// business. Hopper's GEMMs share first_u.
//
//   acc = Σ_k x_q weight - zero weight_sum - weight_zero row_sum        int32; wraps only where the true sum would
//   y   = scale · (acc · weight_scale) + Σ_r u beta + bias              float32, in this order
//
// with u of the column's segment.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "qvdit_kernels.h"

namespace qvdit {

// Where the u of a column's segment begin.
__device__ __forceinline__ int64_t first_u(const qvdit_gemm_args& args, int64_t column) {
  if (args.segment >= args.n || column >= args.n) return 0;
  return static_cast<uint32_t>(column) / static_cast<uint32_t>(args.segment) * args.rank * args.m;
}

// A fragment of kRows x 2 kPairs accumulators, all in one segment. Its columns come in pairs beside each other, the
// first of a pair even. Rows and columns past the ends are given too; they read the last ones and their results are
// thrown away.
template <int kRows, int kPairs>
struct EpilogueFragment {
  const qvdit_gemm_args& args;
  int64_t row[kRows];      // at most M - 1
  int64_t column[kPairs];  // of a pair's first
  bool even;               // N is: then a pair may be read at once

  // A row vector's values [N] at a pair of columns.
  template <typename T, typename T2>
  __device__ __forceinline__ void pair(const T* values, int p, T& a, T& b) const {
    if (even) {
      const T2 both = __ldg(reinterpret_cast<const T2*>(values + (column[p] < args.n ? column[p] : 0)));
      a = both.x, b = both.y;
    } else {
      a = __ldg(values + (column[p] < args.n ? column[p] : 0));
      b = __ldg(values + (column[p] + 1 < args.n ? column[p] + 1 : 0));
    }
  }

  // y += u beta of a rank, of beta's type: known here, or each pair's loads would wait for those before.
  template <typename T, typename T2>
  __device__ __forceinline__ void add_rank(int r, const float (&u)[kRows], float (&y)[kRows][kPairs][2]) const {
    const T* const beta = static_cast<const T*>(args.beta) + r * args.n;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      T a, b;
      pair<T, T2>(beta, p, a, b);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        y[m][p][0] += u[m] * static_cast<float>(a), y[m][p][1] += u[m] * static_cast<float>(b);
      }
    }
  }

  // The integers that zero points add to the accumulators.
  __device__ __forceinline__ void correct(int32_t (&acc)[kRows][kPairs][2]) const {
    if (args.zero) {
      int32_t zero[kRows];
#pragma unroll
      for (int m = 0; m < kRows; ++m) zero[m] = __ldg(args.zero + row[m]);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        int32_t a, b;
        pair<int32_t, int2>(args.weight_sum, p, a, b);
#pragma unroll
        for (int m = 0; m < kRows; ++m) acc[m][p][0] -= zero[m] * a, acc[m][p][1] -= zero[m] * b;
      }
    }
    if (args.weight_zero) {
      int32_t row_sum[kRows];
#pragma unroll
      for (int m = 0; m < kRows; ++m) row_sum[m] = __ldg(args.row_sum + row[m]);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        int8_t a, b;
        pair<int8_t, char2>(args.weight_zero, p, a, b);
#pragma unroll
        for (int m = 0; m < kRows; ++m) acc[m][p][0] -= row_sum[m] * a, acc[m][p][1] -= row_sum[m] * b;
      }
    }
  }

  // acc: corrected → y, float32.
  __device__ __forceinline__ void finish(const int32_t (&acc)[kRows][kPairs][2], float (&y)[kRows][kPairs][2]) const {
    float scale[kRows];
#pragma unroll
    for (int m = 0; m < kRows; ++m) scale[m] = __ldg(args.scale + row[m]);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      float a, b;
      pair<float, float2>(args.weight_scale, p, a, b);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        y[m][p][0] = scale[m] * (static_cast<float>(acc[m][p][0]) * a);
        y[m][p][1] = scale[m] * (static_cast<float>(acc[m][p][1]) * b);
      }
    }
    const int rank = static_cast<int>(args.rank);
    const float* segment_u = args.u + first_u(args, column[0]);
#pragma unroll 1
    for (int r = 0; r < rank; ++r) {
      float u[kRows];
#pragma unroll
      for (int m = 0; m < kRows; ++m) u[m] = __ldg(segment_u + r * args.m + row[m]);
      if (args.beta_dtype == QVDIT_F16) {
        add_rank<__half, __half2>(r, u, y);
      } else {
        add_rank<float, float2>(r, u, y);
      }
    }
    if (args.bias) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        float a, b;
        pair<float, float2>(args.bias, p, a, b);
#pragma unroll
        for (int m = 0; m < kRows; ++m) y[m][p][0] += a, y[m][p][1] += b;
      }
    }
  }
};

}  // namespace qvdit
