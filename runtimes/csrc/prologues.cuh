// What happens to a row before it is quantized. The elements from K on stay 0.
#pragma once

#include "row_values.cuh"

namespace qvdit {

struct Plain {
  template <typename Values>
  static __device__ __forceinline__ void apply(Values&, RowThreads&, const QuantizeParams&) {}
};

struct Gelu {
  // 0.5 x (1 + tanh u) = x / (1 + 2^e), e = -2 u / ln 2, u = √(2/π) (x + 0.044715 x³)
  template <typename Values>
  static __device__ __forceinline__ void apply(Values& values, RowThreads&, const QuantizeParams&) {
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float x = values.x[v][i];
        const float exponent = x * fmaf(-0.10294324f, x * x, -2.3022082f);
        float power, inverse;  // past the greatest float Inf, and 0
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
        values.x[v][i] = x * inverse;
      }
    }
  }
};

struct LayerNormModulate {
  // Two passes over the registers: the variance is that of x - mean, so it never cancels.
  template <typename Values>
  static __device__ __forceinline__ void apply(Values& values, RowThreads& threads, const QuantizeParams& params) {
    const qvdit_quantize_args& args = params.args;
    const float per_feature = 1.f / static_cast<float>(args.k);
    float sums[kChains] = {}, squares[kChains] = {};
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i % kChains] += values.x[v][i];
    }
    const float mean = threads.sum(total(sums)) * per_feature;
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values.x[v][i] -= values.inside(v, Values::kVectorized ? i / kQuad * kQuad : i) ? mean : 0.f;
        squares[i % kChains] += values.x[v][i] * values.x[v][i];
      }
    }
    const float deviation = rsqrtf(threads.sum(total(squares)) * per_feature + args.epsilon);
    const int64_t modulation = params.modulated.quotient(values.row) * args.modulation_stride;
    const float* const scales = args.modulation_scale + modulation;
    const float* const shifts = args.modulation_shift + modulation;
    if (args.modulation_scale && args.modulation_shift) {
      values.with([&](int v, int i, float scale,
                      float shift) { values.x[v][i] = fmaf(values.x[v][i], fmaf(deviation, scale, deviation), shift); },
                  scales, shifts);
      return;
    }
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values.x[v][i] *= deviation;
    }
    if (args.modulation_scale) {
      values.with([&](int v, int i, float scale) { values.x[v][i] *= 1.f + scale; }, scales);
    } else if (args.modulation_shift) {
      values.with([&](int v, int i, float shift) { values.x[v][i] += shift; }, shifts);
    }
  }
};

}  // namespace qvdit
