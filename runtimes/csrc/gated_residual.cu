// qvdit_gated_residual: a warp a row, in one pass.
//
//   device memory: 10 bytes an element (residual 4, x 2, y 4) and 4 for each row of the gate, which L2 holds. A row of y
//   may lie elsewhere than that of x, which costs nothing: it is C floats in one piece either way.
//   grid: M / 8 blocks of 8 warps.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "error.h"

namespace qvdit {
namespace {

constexpr int kWarps = 8;   // a block
constexpr int kVector = 8;  // elements a thread takes at once: 16 bytes of x

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <bool kGated>
__device__ __forceinline__ float combined(float residual, float x, float gate) {
  return kGated ? __fmaf_rn(gate, x, residual) : __fadd_rn(residual, x);
}

// Four floats of a row, from element k on.
__device__ __forceinline__ float4 four(const float* row, int k) {
  return __ldg(reinterpret_cast<const float4*>(row + k));
}

template <typename In, bool kGated>
__device__ __forceinline__ void combine_vector(const In* x, const float* residual, const float* gate, float* y, int k) {
  const uint4 word = __ldg(reinterpret_cast<const uint4*>(x + k));
  const In* value = reinterpret_cast<const In*>(&word);
#pragma unroll
  for (int half = 0; half < kVector; half += 4) {
    const float4 r = *reinterpret_cast<const float4*>(residual + k + half);  // may be y: not through the read-only cache
    const float4 g = kGated ? four(gate, k + half) : float4{};
    const float4 sum = {combined<kGated>(r.x, to_float(value[half]), g.x),
                        combined<kGated>(r.y, to_float(value[half + 1]), g.y),
                        combined<kGated>(r.z, to_float(value[half + 2]), g.z),
                        combined<kGated>(r.w, to_float(value[half + 3]), g.w)};
    *reinterpret_cast<float4*>(y + k + half) = sum;
  }
}

// Where row (b, p, q) is written: (b, q, p).
__device__ __forceinline__ uint32_t swapped_row(uint32_t row, uint32_t outer, uint32_t inner) {
  const uint32_t q = row % inner, p = row / inner % outer;
  return row - (p * inner + q) + q * outer + p;
}

template <typename In, bool kGated, bool kVectorized>
__global__ void __launch_bounds__(32 * kWarps)
    gated_residual_kernel(const __grid_constant__ qvdit_gated_residual_args args) {
  const uint32_t row = blockIdx.x * kWarps + threadIdx.y;
  if (row >= static_cast<uint32_t>(args.m)) return;
  const int features = static_cast<int>(args.k), lane = threadIdx.x;
  const int64_t start = static_cast<int64_t>(row) * args.k;
  const In* x = static_cast<const In*>(args.x) + start;
  const float* residual = args.residual + start;
  const float* gate = kGated ? args.gate + row / static_cast<uint32_t>(args.rows_per_gate) * args.k : nullptr;
  const uint32_t to = args.swapped ? swapped_row(row, args.swapped, args.swapped_inner) : row;
  float* y = args.y + static_cast<int64_t>(to) * args.k;
  if constexpr (kVectorized) {
#pragma unroll 2
    for (int k = lane * kVector; k < features; k += 32 * kVector) {
      combine_vector<In, kGated>(x, residual, gate, y, k);
    }
  } else {
    for (int k = lane; k < features; k += 32) {
      y[k] = combined<kGated>(residual[k], to_float(x[k]), kGated ? gate[k] : 0.f);
    }
  }
}

template <typename In, bool kGated>
int32_t launch(const qvdit_gated_residual_args& args, bool vectorized, cudaStream_t stream) {
  const auto kernel =
      vectorized ? gated_residual_kernel<In, kGated, true> : gated_residual_kernel<In, kGated, false>;
  const auto blocks = static_cast<unsigned>((args.m + kWarps - 1) / kWarps);
  kernel<<<blocks, dim3(32, kWarps), 0, stream>>>(args);
  return launched("gated_residual");
}

template <typename In>
int32_t launch(const qvdit_gated_residual_args& args, bool vectorized, cudaStream_t stream) {
  return args.gate ? launch<In, true>(args, vectorized, stream) : launch<In, false>(args, vectorized, stream);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int32_t check(const qvdit_gated_residual_args& args) {
  const long long m = args.m, k = args.k, gate_rows = args.rows_per_gate, outer = args.swapped;
  const long long inner = args.swapped_inner;
  QVDIT_REQUIRE(args.residual && args.x && args.y, "residual, x and y must be given");
  QVDIT_REQUIRE(m >= 1 && m < INT32_MAX && k >= 1 && k < INT32_MAX, "x of [%lld, %lld]", m, k);
  QVDIT_REQUIRE(args.x_dtype == QVDIT_F16 || args.x_dtype == QVDIT_BF16, "x of type %d; float16 or bfloat16",
                args.x_dtype);
  QVDIT_REQUIRE(!args.gate || (gate_rows >= 1 && gate_rows < INT32_MAX && m % gate_rows == 0),
                "%lld of %lld rows share a gate", gate_rows, m);
  QVDIT_REQUIRE(outer == 0 || (outer >= 1 && inner >= 1 && outer <= m && inner <= m && m % (outer * inner) == 0),
                "%lld rows swapped as [%lld, %lld]", m, outer, inner);
  QVDIT_REQUIRE(outer == 0 || args.y != args.residual, "rows swapped in place");
  return QVDIT_OK;
}

}  // namespace
}  // namespace qvdit

extern "C" int32_t qvdit_gated_residual(const qvdit_gated_residual_args* args, void* stream) {
  if (args->m == 0) return QVDIT_OK;  // whose pointers are null
  if (const int32_t status = qvdit::check(*args)) return status;
  const bool vectorized = args->k % qvdit::kVector == 0 && qvdit::aligned(args->residual) && qvdit::aligned(args->x) &&
                          qvdit::aligned(args->gate) && qvdit::aligned(args->y);
  const auto on = static_cast<cudaStream_t>(stream);
  return args->x_dtype == QVDIT_F16 ? qvdit::launch<__half>(*args, vectorized, on)
                                    : qvdit::launch<__nv_bfloat16>(*args, vectorized, on);
}
