// Per-token quantization of 16-bit rows as they are: no prologue, smoothing or rotation, and a low-rank term of rank 1
// or none. What most linears of a model in half precision get, and the one that must run at the speed of memory.
//
//   device memory: 3 bytes an element, plus 4 + 4 R a row. Rows stay in registers as they came, two elements a word, so
//   that enough warps fit a multiprocessor to hide the chain load → maximum → scale → integers.
//   alpha lies in shared memory in the threads' order (16 bytes a thread beside each other), read from device memory
//   once a block: through L1 in its own order half of each line read is wasted, 80 cycles a row of 1152.
//
//   grid: as many blocks as run at once, each goes on to further rows; a block is 32 W threads x rows.
#pragma once

#include <algorithm>

#include "dependent_launch.cuh"
#include "quantize_rows.cuh"

namespace qvdit {

// sum + Σ q factor, spelled out: kernels of either range give the same bits, whatever the compiler would contract.
__device__ __forceinline__ float plus_products(float sum, const float* q, float4 factor) {
  float products = __fmul_rn(q[0], factor.x);
  products = __fmaf_rn(q[1], factor.y, products);
  products = __fmaf_rn(q[2], factor.z, products);
  return __fadd_rn(sum, __fmaf_rn(q[3], factor.w, products));
}

// As few as hold a row, for as many warps as that allows.
constexpr int half_registers(int vectors, bool low_rank) { return low_rank && vectors == 5 ? 80 : 72; }

template <typename In, int kVectors, bool kSymmetric, bool kLowRank>
__global__ void __maxnreg__(half_registers(kVectors, kLowRank))
    quantize_halves_kernel(const __grid_constant__ QuantizeParams params) {
  let_next_kernel_start();
  constexpr int kSides = kSymmetric ? 1 : 2;
  extern __shared__ uint4 shared[];
  __shared__ float partial[2][kSides][kMaxWarps];  // [of every other iteration]
  __shared__ float partial_u[2][kMaxWarps];
  __shared__ int partial_sum[2][kMaxWarps];
  const qvdit_quantize_args& args = params.args;
  const int features = static_cast<int>(args.k);
  const int row_threads = blockDim.x, warps = row_threads / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_warp = threadIdx.y * warps;
  const int first_k = (warp * kVectors * 32 + lane) * kVector;
  const auto k = [&](int v) { return first_k + v * 32 * kVector; };

  // [warp of the row][vector][half of it][lane]
  float4* const alpha = reinterpret_cast<float4*>(shared) + warp * (2 * 32 * kVectors) + lane;

  // The next row on its way to shared memory: a thread's own vectors, which it alone reads back.
  // [warp of the block][vector][lane]
  uint4* const own =
      shared + (kLowRank ? kVectors * 2 * row_threads : 0) + (first_warp + warp) * (kVectors * 32) + lane;
  const uint32_t staging = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  const uint32_t rows = static_cast<uint32_t>(args.m), step = gridDim.x * blockDim.y;
  const In* const own_x = static_cast<const In*>(args.x) + first_k;
  int8_t* const own_x_q = args.x_q + first_k;
  const auto fetch = [&](uint32_t row) {
    const In* from = own_x + static_cast<int64_t>(min(row, rows - 1)) * features;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (k(v) < features) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(staging + v * 512), "l"(from + v * 32 * kVector)
                     : "memory");
      }
    }
    asm volatile("cp.async.commit_group;");
  };

  // What a row's threads found, put together by its first warp: one iteration later, so that one barrier serves both.
  const auto finish = [&](uint32_t row, float scale, float stored_zero, float gain, int of) {
    if (warp != 0 || lane != 0 || row >= rows) return;
    args.scale[row] = scale;
    if (args.zero) args.zero[row] = static_cast<int>(stored_zero);
    if constexpr (kLowRank) {
      float dot = 0.f;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) dot += partial_u[of][first_warp + w];
      args.u[row] = scale * dot * gain;
    }
    if (args.row_sum) {
      int total = -features * static_cast<int>(stored_zero);
#pragma unroll 1
      for (int w = 0; w < warps; ++w) total += partial_sum[of][first_warp + w];
      args.row_sum[row] = total;
    }
  };

  uint32_t row = blockIdx.x * blockDim.y + threadIdx.y, last_row = 0;
  const uint32_t block_first = blockIdx.x * blockDim.y;
  float last_scale = 0.f, last_zero = 0.f, last_gain = 1.f;
  int parity = 0;
  fetch(row);
  if constexpr (kLowRank) {
    if (threadIdx.y == 0) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float4* const to = alpha + v * 64 + half * 32;
          if (k(v) < features) {
            asm volatile(
                "cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                "l"(args.alpha + k(v) + 4 * half)
                : "memory");
          } else {
            *to = make_float4(0.f, 0.f, 0.f, 0.f);
          }
        }
      }
    }
    if (warps == 1) {  // else the first row's own barrier comes before alpha is read
      asm volatile("cp.async.wait_all;" ::: "memory");
      __syncthreads();
    }
  }
#pragma unroll 1
  for (uint32_t at = block_first; at < rows; at += step, row += step) {
    uint4 words[kVectors];
    asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      words[v] = make_uint4(0, 0, 0, 0);
      if (k(v) < features) words[v] = own[v * 32];
    }
    if (rows - at > step) fetch(row + step);

    // [0]: max |x|, or max(max x, 0) and [1]: max(max -x, 0); NaN if any x is
    float range[kSides], lowest = 0.f;
    range_of_halves<In, kSymmetric>(words, range[0], lowest);
    range[0] = warp_max(range[0]);
    if constexpr (!kSymmetric) range[1] = warp_max(lowest);
    if (warps > 1) {
      if (lane == 0) {
#pragma unroll
        for (int side = 0; side < kSides; ++side) partial[parity][side][first_warp + warp] = range[side];
      }
      __syncthreads();
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        range[side] = warp_max(lane < warps ? partial[parity][side][first_warp + lane] : 0.f);
      }
    } else {
      __syncwarp();
    }
    if (at != block_first) finish(last_row, last_scale, last_zero, last_gain, parity ^ 1);
    last_row = row;
    if constexpr (kLowRank) {  // now, so that it is there when the row is finished
      if (args.frame_gain && warp == 0 && lane == 0) {
        last_gain = __ldg(args.frame_gain + params.frames.remainder(params.tokens.quotient(min(row, rows - 1))));
      }
    }

    const RowGrid grid = RowGrid::of<kSymmetric>(range[kSides - 1], range[0], params.levels);
    last_scale = grid.scale, last_zero = kSymmetric ? 0.f : grid.zero - 128.f;
    if (grid.divisor == 0.f) {  // no integers: neither from NaN nor from Inf
#pragma unroll
      for (int v = 0; v < kVectors; ++v) words[v] = make_uint4(0, 0, 0, 0);
    }

    int sum = 0;  // of what is stored
    float dot = 0.f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float centred[kVector];  // kRounder + x_q - zero
      integers_of_halves<In, kSymmetric>(words[v], grid, centred);
      uint2 bytes = {pack_bytes(centred[0], centred[1], centred[2], centred[3]),
                     pack_bytes(centred[4], centred[5], centred[6], centred[7])};
      if constexpr (!kSymmetric) {  // where symmetric, what lies past the features is 0 already
        const uint32_t zero_bytes = (static_cast<uint32_t>(static_cast<int>(last_zero)) & 0xff) * 0x01010101u;
        bytes.x = __vadd4(bytes.x, zero_bytes), bytes.y = __vadd4(bytes.y, zero_bytes);
        const int inside = features - k(v);
        bytes.x &= first_bytes(inside), bytes.y &= first_bytes(inside - 4);
      }
      if (args.row_sum) {
        sum = __dp4a(static_cast<int>(bytes.x), 0x01010101, __dp4a(static_cast<int>(bytes.y), 0x01010101, sum));
      }
      if (row < rows && k(v) < params.k_pad) {
        *reinterpret_cast<uint2*>(own_x_q + static_cast<int64_t>(row) * params.k_pad + v * 32 * kVector) = bytes;
      }
      if constexpr (kLowRank) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) centred[j] -= kRounder;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          dot = plus_products(dot, centred + 4 * half, alpha[v * 64 + half * 32]);
        }
      }
    }
    if constexpr (kLowRank) {
      dot = warp_sum(dot);
      if (lane == 0) partial_u[parity][first_warp + warp] = dot;
    }
    if (args.row_sum) {
      sum = __reduce_add_sync(0xffffffffu, sum);
      if (lane == 0) partial_sum[parity][first_warp + warp] = sum;
    }
    parity ^= 1;
  }
  if (warps > 1) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (block_first < rows) finish(last_row, last_scale, last_zero, last_gain, parity ^ 1);
}

template <typename In, int kVectors, bool kSymmetric, bool kLowRank>
int32_t launch_halves(const QuantizeParams& params, cudaStream_t stream) {
  constexpr int kWarpsWanted = 4;             // a block
  constexpr int64_t kBlocksWanted = 2 * 132;  // as many rows a block as leave these
  // Of few rows too a block has several: alpha is twice a row's bytes. µs of one and of two rows a block: 3.46 and 3.33
  // for 512 x 1920, 5.11 and 4.93 for 512 x 5120; of four rows 5.50 (H200, 2026-11-28).
  constexpr int64_t kFewRows = 1024, kBlocksOfFew = 256;
  constexpr int kVectorBytes = 16, kAlphaBytes = kLowRank ? kVector * 4 : 0;
  const auto kernel = quantize_halves_kernel<In, kVectors, kSymmetric, kLowRank>;
  const int slots = 32 * kVectors * kVector, warps = static_cast<int>((params.k_pad + slots - 1) / slots);
  int rows = std::max(kWarpsWanted / warps, 1);
  while (rows > 1 && params.args.m < rows * kBlocksWanted) rows /= 2;
  if (kLowRank && params.args.m <= kFewRows) {
    rows = static_cast<int>(std::clamp<int64_t>(params.args.m / kBlocksOfFew, 1, max_warps(kVectors) / warps));
  }
  const int shared = 32 * warps * kVectors * (rows * kVectorBytes + kAlphaBytes);
  // A row's staging and alpha, at most 96 KB, which every device has
  const int most_shared = 32 * max_warps(kVectors) * kVectors * (kVectorBytes + kAlphaBytes);
  int resident = 0;
  if (const int32_t status =
          resident_blocks(reinterpret_cast<const void*>(kernel), 32 * warps * rows, shared, most_shared, resident)) {
    return status;
  }
  const int64_t blocks = (params.args.m + rows - 1) / rows;
  kernel<<<static_cast<unsigned>(blocks < resident ? blocks : resident), dim3(32 * warps, rows), shared, stream>>>(
      params);
  return launched("quantize_rows");
}

template <typename In, int kVectors>
int32_t launch_halves(const QuantizeParams& params, cudaStream_t stream) {
  if (params.args.rank == 0) {
    return params.args.symmetric ? launch_halves<In, kVectors, true, false>(params, stream)
                                 : launch_halves<In, kVectors, false, false>(params, stream);
  }
  return params.args.symmetric ? launch_halves<In, kVectors, true, true>(params, stream)
                               : launch_halves<In, kVectors, false, true>(params, stream);
}

template <typename In>
int32_t launch_halves(const QuantizeParams& params, cudaStream_t stream) {
  switch (vectors_per_thread(params.k_pad)) {
    case 3:
      return launch_halves<In, 3>(params, stream);
    case 4:
      return launch_halves<In, 4>(params, stream);
    default:
      return launch_halves<In, 5>(params, stream);
  }
}

}  // namespace qvdit
