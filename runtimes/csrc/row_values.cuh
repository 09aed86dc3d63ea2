// A row as float32 in the registers of one to sixteen warps: its elements, reductions over them, the Walsh-Hadamard
// transform.
#pragma once

#include "quantize.cuh"

namespace qvdit {

constexpr int kQuad = 4;            // of a thread's vector, beside each other in a row: 16 bytes of float32
constexpr int kRotatedVectors = 4;  // a thread's, where inputs are rotated
static_assert(kMaxRotation == 32 * kRotatedVectors * kVector, "what one warp holds");

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Sums and maxima of a thread's elements go in so many chains, or each operation would wait for the last.
constexpr int kChains = 4;

__device__ __forceinline__ float total(const float (&sums)[kChains]) {
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The greatest of a thread's, NaN where any is.
__device__ __forceinline__ float greatest(const float (&of)[kChains]) {
  return max_nan(max_nan(of[0], of[1]), max_nan(of[2], of[3]));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Reductions over one row's threads, the result in all of them. Every thread of the block must come along.
struct RowThreads {
  int warps;  // W
  int warp;   // of the row, 0 … W - 1
  int lane;
  int first;                    // the row's first warp within the block
  float (*partial)[kMaxWarps];  // [reductions so far][warp]: a place is written once, so one barrier each

  __device__ __forceinline__ float sum(float value) {
    value = warp_sum(value);
    if (warps == 1) return value;
    share(value);
    value = 0.f;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) value += (*partial)[first + w];
    ++partial;
    return value;
  }

  // The maximum of values that are not below 0, NaN where any is NaN.
  __device__ __forceinline__ float maximum(float value) {
    value = warp_max(value);
    if (warps == 1) return value;
    share(value);
    value = warp_max((*partial)[first + min(lane, warps - 1)]);
    ++partial;
    return value;
  }

  __device__ __forceinline__ void share(float value) {
    if (lane == 0) (*partial)[first + warp] = value;
    __syncthreads();
  }
};

// An address as the compiler should keep it: at constant distances from it are all that a thread reads or writes of a
// row. Left to itself it computes each of them anew, in 64 bits, under the condition that guards its use.
template <typename T>
__device__ __forceinline__ T* one_address(T* address) {
  asm("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
  return address;
}

// A row's elements as a thread holds them, 0 from K on. A warp has kVectors times 256 beside each other, and its lanes
// have four beside each other of either half: so every load of a warp, be it of float32 or of 16-bit numbers, is of one
// piece of memory.
template <int kVectors_, bool kVectorized_>
struct RowValues {
  static constexpr int kVectors = kVectors_;
  static constexpr bool kVectorized = kVectorized_;

  float x[kVectors][kVector];
  uint32_t row;
  int first;  // k(0, 0)
  int rest;   // K - first

  static __device__ constexpr int distance(int v, int i) {
    return v * (32 * kVector) + i / kQuad * (32 * kQuad) + i % kQuad;
  }
  // Where x[v][i] is in its row.
  __device__ __forceinline__ int k(int v, int i) const { return first + distance(v, i); }
  // Whether it is one of the K; of a quad all are or none, where rows are vectorized.
  __device__ __forceinline__ bool inside(int v, int i) const { return distance(v, i) < rest; }

  // body(v, i, values …) for this thread's elements, but those from K on, with the values of arrays of K.
  template <typename Body, typename... Arrays>
  __device__ __forceinline__ void with(Body&& body, const Arrays*... arrays) const {
    visit(body, one_address(arrays + first)...);
  }

 private:
  template <typename Body, typename... Arrays>
  __device__ __forceinline__ void visit(Body& body, const Arrays*... own) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; i += kVectorized ? kQuad : 1) {
        if (!inside(v, i)) continue;
        if constexpr (kVectorized) {
          visit_quad(v, i, body, quad(own + distance(v, i))...);
        } else {
          body(v, i, to_float(__ldg(own + distance(v, i)))...);
        }
      }
    }
  }

  static __device__ __forceinline__ float4 quad(const float* of) { return __ldg(reinterpret_cast<const float4*>(of)); }
  static __device__ __forceinline__ float4 quad(const __half* of) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(of));
    const float2 low = Halves<__half>::floats(words.x), high = Halves<__half>::floats(words.y);
    return make_float4(low.x, low.y, high.x, high.y);
  }

  template <typename Body, typename... Quads>
  static __device__ __forceinline__ void visit_quad(int v, int i, Body& body, Quads... quads) {
    body(v, i, quads.x...), body(v, i + 1, quads.y...), body(v, i + 2, quads.z...), body(v, i + 3, quads.w...);
  }
};

// (a, b) → (a + b, a - b)
__device__ __forceinline__ void add_and_subtract(float& a, float& b) {
  const float sum = __fadd_rn(a, b);
  b = __fsub_rn(a, b), a = sum;
}

// FWHT of blocks of features, the butterfly of qvdit/method/operator.py to the bit: pairs (a, b) that lie h = 1, 2
// apart are in one quad, 4 … 64 in two lanes, 128 in a thread's two quads, 256 and 512 in two of its vectors.
template <typename Values>
__device__ __forceinline__ void walsh_hadamard(Values& values, int block, int lane) {
  static_assert(Values::kVectors == kRotatedVectors, "a warp must hold whole blocks");
  const auto within_vectors = [&](int apart) {
#pragma unroll
    for (int v = 0; v < kRotatedVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (!(i & apart)) add_and_subtract(values.x[v][i], values.x[v][i + apart]);
      }
    }
  };
#pragma unroll
  for (int apart = 1; apart < kQuad; apart *= 2) {
    if (apart >= block) return;
    within_vectors(apart);
  }
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    if (apart * kQuad >= block) return;
#pragma unroll
    for (int v = 0; v < kRotatedVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float other = __shfl_xor_sync(0xffffffffu, values.x[v][i], apart);
        values.x[v][i] = lane & apart ? __fsub_rn(other, values.x[v][i]) : __fadd_rn(values.x[v][i], other);
      }
    }
  }
  if (32 * kQuad >= block) return;
  within_vectors(kQuad);
#pragma unroll
  for (int apart = 1; apart < kRotatedVectors; apart *= 2) {
    if (apart * 32 * kVector >= block) return;
#pragma unroll
    for (int v = 0; v < kRotatedVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (!(v & apart)) add_and_subtract(values.x[v][i], values.x[v + apart][i]);
      }
    }
  }
}

}  // namespace qvdit
