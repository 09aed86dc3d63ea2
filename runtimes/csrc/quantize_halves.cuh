// Per-token quantization of 16-bit rows as they are: no prologue, smoothing or rotation. What most linears of a model
// in half precision get, and the one that must run at the speed of memory.
//
//   device memory: 3 bytes an element, plus 4 + 4 R a row. Rows stay in registers as they came, two elements a word, so
//   that enough warps fit a multiprocessor to hide the chain load → maximum → scale → integers.
//   kRows rows at once in a thread: their reductions overlap, and each value of alpha is read once for all of them.
//   alpha lies in shared memory in the threads' order (16 bytes a thread beside each other), read from device memory
//   once a block: through L1 in its own order half of each line read is wasted, 80 cycles a row of 1152 and rank.
//
//   grid: as many blocks as run at once, each goes on to further rows; a block is 32 W threads x groups of kRows rows.
#pragma once

#include <algorithm>

#include "dependent_launch.cuh"
#include "quantize_rows.cuh"

namespace qvdit {

// Two 16-bit elements in a word.
template <typename In>
struct Halves;

template <>
struct Halves<__half> {
  using Two = __half2;
  static __device__ __forceinline__ float2 floats(uint32_t word) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
};

template <>
struct Halves<__nv_bfloat16> {
  using Two = __nv_bfloat162;
  static __device__ __forceinline__ float2 floats(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
};

// The greatest of non-negative or NaN values over a warp: as unsigned integers, where NaN is above Inf.
__device__ __forceinline__ float warp_max(float value) {
  return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(value) & 0x7fffffffu));
}

// Makes the compiler believe that the words change here: else it computes what a loop makes of them once before it, and
// keeps that in more registers than there are.
template <int kRows, int kVectors>
__device__ __forceinline__ void keep_out_of_loop(uint4 (&words)[kRows][kVectors]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint4& word = words[i][v];
      asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
    }
  }
}

// sum + Σ q factor, spelled out: kernels of other ranks give the same bits, whatever the compiler would contract.
__device__ __forceinline__ float plus_products(float sum, const float* q, float4 factor) {
  float products = __fmul_rn(q[0], factor.x);
  products = __fmaf_rn(q[1], factor.y, products);
  products = __fmaf_rn(q[2], factor.z, products);
  return __fadd_rn(sum, __fmaf_rn(q[3], factor.w, products));
}

// The groups of rows a block should have, so that with one alpha in shared memory for all of them as many warps as
// possible run on a multiprocessor at once; 0: too few would. warps, staging: of a group. At K = 8960 and rank 4 one
// group a block leaves room for 7 warps of 16, two for 14; read from L2, alpha would be most of what is read.
int groups_sharing_alpha(const void* kernel, int warps, int most_groups, int staging, int alpha);

// kRanks: 0, 1, or how many of more are summed at once.
constexpr int rows_at_once(int ranks) { return ranks > 1 ? 2 : 1; }

// As few as hold a row, for as many warps as that allows. GB/s on an H100 (2026-11-25, bf16, 32768 rows, a copy of them
// 2850-2970) with one row and 72 registers | one row and 80 | two rows and 128:
//
//   K        rank 0                rank 1                rank 4
//   1152     2721 | 2686 | 2670    2263 | 2441 | 2282    1803 | 1988 | 1939
//   1536     2769 | 2736 | 2725    2664 | 2659 | 2598    2016 | 2051 | 2155
//   4608     2836 | 2760 | 2752    2740 | 2635 | 2645    1568 | 1579 | 1863
//   5120     2812 | 2744 | 2746    2665 | 2652 | 2557    1380 | 1385 | 1774
//   8960     2865 | 2831 | 2829    2644 | 2664 | 2498    1637 | 1434 | 1616
constexpr int registers_for(int vectors, int ranks) {
  if (ranks > 1) return 128;
  return ranks == 1 && vectors == 5 ? 80 : 72;
}

// kAlphaShared: known when compiled, since a branch before each of a row's loads would keep them from overlapping.
template <typename In, int kVectors, int kRows, bool kSymmetric, int kRanks, bool kAlphaShared>
__global__ void __maxnreg__(registers_for(kVectors, kRanks))
    quantize_halves_kernel(const __grid_constant__ QuantizeParams params) {
  let_next_kernel_start();
  using Two = typename Halves<In>::Two;
  constexpr int kSides = kSymmetric ? 1 : 2;
  extern __shared__ uint4 shared[];
  __shared__ float partial[2][kRows][kSides][kMaxWarps];  // [of every other iteration]
  __shared__ float partial_u[2][kRows][kRanks > 1 ? kMaxRank : 1][kMaxWarps];
  __shared__ int partial_sum[2][kRows][kMaxWarps];
  const qvdit_quantize_args& args = params.args;
  const int features = static_cast<int>(args.k), rank = kRanks ? static_cast<int>(args.rank) : 0;
  const int row_threads = blockDim.x, warps = row_threads / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_warp = threadIdx.y * warps;
  const int first_k = (warp * kVectors * 32 + lane) * kVector;
  const auto k = [&](int v) { return first_k + v * 32 * kVector; };

  // [warp of the row][rank][vector][half of it][lane]
  float4* const alpha = reinterpret_cast<float4*>(shared) + warp * rank * (2 * 32 * kVectors) + lane;
  const float* const own_alpha = args.alpha + first_k;  // in device memory
  const auto alpha_at = [&](int r, int v, int half) {
    if constexpr (kAlphaShared) return alpha[(r * kVectors + v) * 64 + half * 32];
    const float* from = own_alpha + static_cast<int64_t>(r) * features + v * 32 * kVector + 4 * half;
    return k(v) < features ? __ldg(reinterpret_cast<const float4*>(from)) : make_float4(0.f, 0.f, 0.f, 0.f);
  };

  // The next rows on their way to shared memory: a thread's own vectors, which it alone reads back.
  // [warp of the block][row][vector][lane]
  uint4* const own = shared + (kAlphaShared ? rank * kVectors * 2 * row_threads : 0) +
                     (first_warp + warp) * (kRows * kVectors * 32) + lane;
  const uint32_t staging = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  const uint32_t rows = static_cast<uint32_t>(args.m), step = gridDim.x * blockDim.y * kRows;
  const In* const own_x = static_cast<const In*>(args.x) + first_k;
  int8_t* const own_x_q = args.x_q + first_k;
  const auto fetch = [&](uint32_t first) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const In* row = own_x + static_cast<int64_t>(min(first + i, rows - 1)) * features;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (k(v) < features) {
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(staging + (i * kVectors + v) * 512),
                       "l"(row + v * 32 * kVector));
        }
      }
    }
    asm volatile("cp.async.commit_group;");
  };

  // What a row's threads found, put together by its first warp: one iteration later, so that one barrier serves both.
  const auto finish = [&](uint32_t first, const float(&scale)[kRows], const float(&stored_zero)[kRows], int of) {
    if (warp != 0) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t row = first + i;
      if (row >= rows) break;
      if (kRanks && lane < rank) {
        float dot = 0.f;
#pragma unroll 1
        for (int w = 0; w < warps; ++w) dot += partial_u[of][i][lane][first_warp + w];
        float u = scale[i] * dot;
        if (args.frame_gain) {
          const uint32_t frame = params.frames.remainder(params.tokens.quotient(row));
          const uint32_t linear = lane / static_cast<uint32_t>(args.ranks_per_gain);
          u *= __ldg(args.frame_gain + linear * static_cast<uint32_t>(args.frames) + frame);
        }
        args.u[static_cast<int64_t>(lane) * args.m + row] = u;
      }
      if (lane == 0) {
        args.scale[row] = scale[i];
        if (args.zero) args.zero[row] = static_cast<int>(stored_zero[i]);
        if (args.row_sum) {
          int total = -features * static_cast<int>(stored_zero[i]);
#pragma unroll 1
          for (int w = 0; w < warps; ++w) total += partial_sum[of][i][first_warp + w];
          args.row_sum[row] = total;
        }
      }
    }
  };

  uint32_t first = (blockIdx.x * blockDim.y + threadIdx.y) * kRows, last_first = 0;
  const uint32_t block_first = blockIdx.x * blockDim.y * kRows;
  float last_scale[kRows], last_zero[kRows];
  int parity = 0;
  fetch(first);
  if constexpr (kAlphaShared) {
    for (int r = threadIdx.y; r < rank; r += blockDim.y) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* from = own_alpha + static_cast<int64_t>(r) * features + v * 32 * kVector + 4 * half;
          alpha[(r * kVectors + v) * 64 + half * 32] =
              k(v) < features ? __ldg(reinterpret_cast<const float4*>(from)) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll 1
  for (uint32_t at = block_first; at < rows; at += step, first += step) {
    uint4 words[kRows][kVectors];
    asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        words[i][v] = make_uint4(0, 0, 0, 0);
        if (k(v) < features) words[i][v] = own[(i * kVectors + v) * 32];
      }
    }
    if (rows - at > step) fetch(first + step);

    // [row][0]: max |x|, or max(max x, 0) and [1]: max(max -x, 0); NaN if any x is
    float range[kRows][kSides];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      uint32_t most = 0, least = 0;
      Two& high = reinterpret_cast<Two&>(most);
      Two& low = reinterpret_cast<Two&>(least);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint32_t(&pairs)[4] = reinterpret_cast<const uint32_t(&)[4]>(words[i][v]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Two pair = reinterpret_cast<const Two&>(pairs[j]);
          high = __hmax2_nan(high, kSymmetric ? __habs2(pair) : pair);
          if constexpr (!kSymmetric) low = __hmin2_nan(low, pair);
        }
      }
      const float2 highs = Halves<In>::floats(most);
      range[i][0] = warp_max(RowThreads::max_nan(highs.x, highs.y));
      if constexpr (!kSymmetric) {
        const float2 lows = Halves<In>::floats(least);
        range[i][1] = warp_max(RowThreads::max_nan(-lows.x, -lows.y));
      }
    }
    if (warps > 1) {
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int side = 0; side < kSides; ++side) partial[parity][i][side][first_warp + warp] = range[i][side];
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int side = 0; side < kSides; ++side) {
          range[i][side] = warp_max(lane < warps ? partial[parity][i][side][first_warp + lane] : 0.f);
        }
      }
    } else {
      __syncwarp();
    }
    if (at != block_first) finish(last_first, last_scale, last_zero, parity ^ 1);
    last_first = first;

    RowGrid grid[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      grid[i] = RowGrid::of<kSymmetric>(range[i][kSides - 1], range[i][0], params.levels);
      last_scale[i] = grid[i].scale, last_zero[i] = kSymmetric ? 0.f : grid[i].zero - 128.f;
      if (grid[i].divisor == 0.f) {  // no integers: neither from NaN nor from Inf
#pragma unroll
        for (int v = 0; v < kVectors; ++v) words[i][v] = make_uint4(0, 0, 0, 0);
      }
    }

    int sum[kRows] = {};  // of what is stored
#pragma unroll 1
    for (int first_rank = 0; first_rank == 0 || (kRanks > 1 && first_rank < rank); first_rank += kRanks ? kRanks : 1) {
      if constexpr (kRanks > 1) keep_out_of_loop(words);
      float dot[kRows][kRanks ? kRanks : 1] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float centred[kRows][kVector];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const uint32_t(&pairs)[4] = reinterpret_cast<const uint32_t(&)[4]>(words[i][v]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 pair = Halves<In>::floats(pairs[j]);
            centred[i][2 * j] = rounder_plus_quotient(pair.x, grid[i].divisor, grid[i].reciprocal);
            centred[i][2 * j + 1] = rounder_plus_quotient(pair.y, grid[i].divisor, grid[i].reciprocal);
          }
          if constexpr (!kSymmetric) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) centred[i][j] = fminf(centred[i][j], kRounder + grid[i].highest);
          }
          if (first_rank == 0) {
            uint2 bytes = {pack_bytes(centred[i][0], centred[i][1], centred[i][2], centred[i][3]),
                           pack_bytes(centred[i][4], centred[i][5], centred[i][6], centred[i][7])};
            if constexpr (!kSymmetric) {  // where symmetric, what lies past the features is 0 already
              const uint32_t zero_bytes = (static_cast<uint32_t>(static_cast<int>(last_zero[i])) & 0xff) * 0x01010101u;
              bytes.x = __vadd4(bytes.x, zero_bytes), bytes.y = __vadd4(bytes.y, zero_bytes);
              const int inside = features - k(v);
              bytes.x &= first_bytes(inside), bytes.y &= first_bytes(inside - 4);
            }
            if (args.row_sum) {
              sum[i] =
                  __dp4a(static_cast<int>(bytes.x), 0x01010101, __dp4a(static_cast<int>(bytes.y), 0x01010101, sum[i]));
            }
            if (first + i < rows && k(v) < params.k_pad) {
              *reinterpret_cast<uint2*>(own_x_q + static_cast<int64_t>(first + i) * params.k_pad + v * 32 * kVector) =
                  bytes;
            }
          }
        }
        if constexpr (kRanks > 0) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) centred[i][j] -= kRounder;
          }
#pragma unroll
          for (int r = 0; r < kRanks; ++r) {
            const int of = min(first_rank + r, rank - 1);  // past the last one's end nobody asks for the sum
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float4 factor = alpha_at(of, v, half);
#pragma unroll
              for (int i = 0; i < kRows; ++i) {
                const float(&q)[kVector] = centred[i];
                dot[i][r] = plus_products(dot[i][r], q + 4 * half, factor);
              }
            }
          }
        }
      }
      if constexpr (kRanks > 0) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int r = 0; r < kRanks; ++r) {
            const float whole = warp_sum(dot[i][r]);
            if (lane == 0 && first_rank + r < rank) partial_u[parity][i][first_rank + r][first_warp + warp] = whole;
          }
        }
      }
    }
    if (args.row_sum) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int whole = __reduce_add_sync(0xffffffffu, sum[i]);
        if (lane == 0) partial_sum[parity][i][first_warp + warp] = whole;
      }
    }
    parity ^= 1;
  }
  if (warps > 1) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (block_first < rows) finish(last_first, last_scale, last_zero, parity ^ 1);
}

// Bytes of shared memory that a group of rows needs for the next ones.
inline int group_staging(int warps, int vectors, int rows) { return 32 * warps * rows * vectors * 16; }

template <typename In, int kVectors, bool kSymmetric, int kRanks, bool kAlphaShared>
int32_t launch_halves(const QuantizeParams& params, int warps, int groups, cudaStream_t stream) {
  constexpr int kRows = rows_at_once(kRanks);
  const auto kernel = quantize_halves_kernel<In, kVectors, kRows, kSymmetric, kRanks, kAlphaShared>;
  const int alpha = kAlphaShared ? static_cast<int>(params.args.rank) * kVectors * 2 * 32 * warps * 16 : 0;
  const int shared = groups * group_staging(warps, kVectors, kRows) + alpha;
  const int limit = dynamic_shared_limit(reinterpret_cast<const void*>(kernel));
  const int most_shared = kAlphaShared ? limit : std::min(group_staging(kMaxWarps, kVectors, kRows), limit);
  int resident = 0;
  if (const int32_t status =
          resident_blocks(reinterpret_cast<const void*>(kernel), 32 * warps * groups, shared, most_shared, resident)) {
    return status;
  }
  const int64_t blocks = (params.args.m + groups * kRows - 1) / (groups * kRows);
  kernel<<<static_cast<unsigned>(blocks < resident ? blocks : resident), dim3(32 * warps, groups), shared, stream>>>(
      params);
  return launched("quantize_rows");
}

template <typename In, int kVectors, bool kSymmetric>
int32_t launch_halves(const QuantizeParams& params, cudaStream_t stream) {
  constexpr int kWarpsWanted = 4;             // a block
  constexpr int64_t kBlocksWanted = 2 * 132;  // as many rows a block as leave these
  const int64_t rank = params.args.rank;
  const int slots = 32 * kVectors * kVector, rows = rows_at_once(static_cast<int>(rank));
  const int warps = static_cast<int>((params.k_pad + slots - 1) / slots);
  const int most_groups = static_cast<int>(std::clamp<int64_t>(params.args.m / (rows * kBlocksWanted), 1, kMaxWarps));
  int groups = std::max(kWarpsWanted / warps, 1);
  while (groups > most_groups) groups /= 2;
  if (rank == 0) return launch_halves<In, kVectors, kSymmetric, 0, false>(params, warps, groups, stream);
  // alpha of one rank and the staging: at most 96 KB, which every device has
  if (rank == 1) return launch_halves<In, kVectors, kSymmetric, 1, true>(params, warps, groups, stream);
  const auto sharing = quantize_halves_kernel<In, kVectors, rows_at_once(4), kSymmetric, 4, true>;
  const int alpha = static_cast<int>(rank) * kVectors * 2 * 32 * warps * 16;
  const int groups_sharing = groups_sharing_alpha(reinterpret_cast<const void*>(sharing), warps, most_groups,
                                                  group_staging(warps, kVectors, rows), alpha);
  if (groups_sharing == 0) return launch_halves<In, kVectors, kSymmetric, 4, false>(params, warps, groups, stream);
  return launch_halves<In, kVectors, kSymmetric, 4, true>(params, warps, groups_sharing, stream);
}

template <typename In>
int32_t launch_halves(const QuantizeParams& params, cudaStream_t stream) {
  switch (vectors_per_thread(params.k_pad)) {
    case 3:
      return params.args.symmetric ? launch_halves<In, 3, true>(params, stream)
                                   : launch_halves<In, 3, false>(params, stream);
    case 4:
      return params.args.symmetric ? launch_halves<In, 4, true>(params, stream)
                                   : launch_halves<In, 4, false>(params, stream);
    default:
      return params.args.symmetric ? launch_halves<In, 5, true>(params, stream)
                                   : launch_halves<In, 5, false>(params, stream);
  }
}

}  // namespace qvdit
