// Per-token quantization of 16-bit rows as they are: no prologue, smoothing or rotation, and a low-rank term of rank 1
// or none. What most linears of a model in half precision get, and the one that must run at the speed of memory.
//
//   device memory: 3 bytes an element, plus 4 + 4 R a row. Rows stay in registers as they came, two elements a word, so
//   that few warps hold a row: what has to be done once a row, and waiting for each other, is done once a warp.
//   instructions, an element: about 1 (convert) + 0.5 (range) + 3 (quotient) + 1 (pack, store), + 1 where asymmetric,
//   + 1.4 with alpha.
//   alpha lies in shared memory in the threads' order (16 bytes a thread beside each other), read from device memory
//   once a block. The next row comes to shared memory while one is computed.
//
//   grid: as many blocks as run at once, each goes on to further rows; a block is 32 W threads x rows.
#pragma once

#include "copy_async.cuh"
#include "dependent_launch.cuh"
#include "half_products.cuh"
#include "half_rows.cuh"
#include "quantize_plan.h"

namespace qvdit {

// As few as hold a row, for as many warps as that allows.
constexpr int half_registers(int vectors) { return vectors < 6 ? 64 : 24 + 8 * vectors; }

template <typename In, int kVectors, bool kSymmetric, bool kLowRank>
__global__ void __maxnreg__(half_registers(kVectors))
    quantize_halves_kernel(const __grid_constant__ QuantizeParams params) {
  let_next_kernel_start();
  constexpr int kSides = kSymmetric ? 1 : 2;
  constexpr int kRowStep = 32 * kVector;
  extern __shared__ uint4 shared[];                // alpha, the next rows, results
  __shared__ float partial[2][kSides][kMaxWarps];  // [of every other iteration]
  const qvdit_quantize_args& args = params.args;
  const int features = static_cast<int>(args.k), block_warps = blockDim.x * blockDim.y / 32;
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_warp = threadIdx.y * warps, block_warp = first_warp + warp;
  int first_k = (warp * kVectors * 32 + lane) * kVector;
  const auto k = [&](int v) { return first_k + v * kRowStep; };

  // [warp of the row][vector][lane]
  uint4* const alpha = shared + warp * (32 * kVectors) + lane;
  // The next row on its way to shared memory: a thread's own vectors, which it alone reads back.
  // [warp of the block][vector][lane]
  uint4* const all_rows = shared + (kLowRank ? warps * 32 * kVectors : 0);
  uint4* const own = all_rows + block_warp * (32 * kVectors) + lane;
  // [iteration mod kKept][warp of the block]
  WarpResult<kLowRank>* const results = reinterpret_cast<WarpResult<kLowRank>*>(all_rows + block_warps * 32 * kVectors);

  const uint32_t rows = static_cast<uint32_t>(args.m), step = gridDim.x * blockDim.y;
  const In* const own_x = static_cast<const In*>(args.x) + first_k;
  int8_t* const own_x_q = args.x_q + first_k;
  const uint32_t staging = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  const auto fetch = [&](uint32_t row) {
    const In* from = own_x + static_cast<int64_t>(min(row, rows - 1)) * features;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (k(v) < features) copy_async(staging + v * 512, from + v * kRowStep);
    }
    commit_copies();
  };

  const auto meet = [&] {
    if (warps > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  };

  // Each lane of a row's first warp writes the results of a row. What it needs from memory it reads long before.
  float gain = 1.f;
  const auto prepare = [&](uint32_t first) {
    const uint32_t row = min(first + lane * step, rows - 1);
    if (args.frame_gain) gain = params.gain(row, 0);
  };
  const auto write = [&](uint32_t first, int count) {
    const uint32_t row = first + lane * step;
    if (warp != 0 || lane >= count || row >= rows) return;
    const WarpResult<kLowRank>* const of_row = results + lane * block_warps + first_warp;
    args.scale[row] = of_row->scale;
    if (args.zero) args.zero[row] = of_row->stored_zero;
    if constexpr (kLowRank) {
      float u = 0.f;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) {
#pragma unroll
        for (int line = 0; line < kLines; ++line) u += of_row[w].u[line];
      }
      args.u[row] = of_row->scale * u * gain;
    }
    if (args.row_sum) {
      int sum = -features * of_row->stored_zero;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) sum += of_row[w].sum;
      args.row_sum[row] = sum;
    }
  };

  const uint32_t block_first = blockIdx.x * blockDim.y;
  uint32_t row = block_first + threadIdx.y, first_kept = row;
  int kept = 0, parity = 0;
  if constexpr (kLowRank) {
    if (threadIdx.y == 0) {
      const __half* const from = static_cast<const __half*>(args.alpha) + first_k;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) copy_or_clear(alpha + v * 32, from + v * kRowStep, k(v) < features);
    }
  }
  fetch(row);
  if constexpr (kLowRank) prepare(row);
  if (kLowRank && warps == 1) {  // else the first row's own meeting comes before alpha is read
    wait_for_copies();
    __syncthreads();
  }
#pragma unroll 1
  for (uint32_t at = block_first; at < rows; at += step, row += step) {
    // Else what follows from it is computed once, before the loop, and kept in more registers than there are.
    asm volatile("" : "+r"(first_k));
    uint4 words[kVectors];
    wait_for_copies();
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
        for (int side = 0; side < kSides; ++side) partial[parity][side][block_warp] = range[side];
      }
      __syncthreads();
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        range[side] = warp_max(lane < warps ? partial[parity][side][first_warp + lane] : 0.f);
      }
      parity ^= 1;
    }

    const RowGrid grid = RowGrid::of<kSymmetric>(range[kSides - 1], range[0], params);
    const int stored_zero = kSymmetric ? 0 : static_cast<int>(grid.zero) - 128;
    multiply_halves<In>(words, grid.factor);

    int sum = 0;  // of what is stored
    LineSums sums;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float centred[kVector];  // kRounder + x_q - zero
      integers_of_halves<In, kSymmetric>(words[v], grid, centred);
      const uint2 bytes = stored_bytes<kSymmetric>(centred, stored_zero, k(v) < features);
      if (args.row_sum) {
        sum = __dp4a(static_cast<int>(bytes.x), 0x01010101, __dp4a(static_cast<int>(bytes.y), 0x01010101, sum));
      }
      if (row < rows && k(v) < params.k_pad) {
        *reinterpret_cast<uint2*>(own_x_q + static_cast<int64_t>(row) * params.k_pad + v * kRowStep) = bytes;
      }
      if constexpr (kLowRank) {
        const uint4 factors = alpha[v * 32];
        sums.add(half_operand(centred), make_uint2(factors.x, factors.y), make_uint2(factors.z, factors.w));
      }
    }
    WarpResult<kLowRank>& result = results[kept * block_warps + block_warp];
    if constexpr (kLowRank) {
      if (LineSums::has_own(lane)) result.u[lane / 4] = sums.own(lane);
    }
    if (args.row_sum) sum = __reduce_add_sync(0xffffffffu, sum);
    if (lane == 0) result.scale = grid.scale, result.stored_zero = stored_zero, result.sum = sum;
    if (++kept == kKept) {
      meet();
      write(first_kept, kKept);
      meet();
      kept = 0, first_kept = row + step;
      if constexpr (kLowRank) prepare(first_kept);
    }
  }
  meet();
  write(first_kept, kept);
}

template <typename In, int kVectors, bool kSymmetric, bool kLowRank>
int32_t launch_halves(const QuantizeParams& params, cudaStream_t stream) {
  const auto kernel = quantize_halves_kernel<In, kVectors, kSymmetric, kLowRank>;
  const auto entry = reinterpret_cast<const void*>(kernel);
  const int limit = dynamic_shared_limit(entry);
  const auto [warps, rows, shared] = plan_halves<kLowRank>(params.args.m, params.k_pad, kVectors, limit);
  int resident = 0;
  if (const int32_t status = resident_blocks(entry, 32 * warps * rows, shared, limit, resident)) {
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
  // µs at rank 1 of 32768 rows with 4, 5, 6, 8, 10 and 12 vectors on a GPU that bf16 products keep hot: K = 3072: 84,
  // -, 79, -, -, 80 | 4608: 141, 119, 119, -, 115, - | 5120: 141, 129, -, 149, 130, - | 8960: 254, 225, 224, 244, 223,
  // 233 | 12288: 310, 306, 307, 313, 308, 313. Without a low-rank term all are within 2 % (H200, 2026-11-29).
  switch (vectors_per_thread(params.k_pad, {10, 8, 6, 5, 4})) {
    case 4:
      return launch_halves<In, 4>(params, stream);
    case 5:
      return launch_halves<In, 5>(params, stream);
    case 6:
      return launch_halves<In, 6>(params, stream);
    case 8:
      return launch_halves<In, 8>(params, stream);
    default:
      return launch_halves<In, 10>(params, stream);
  }
}

}  // namespace qvdit
