// s8 x s8 → s32 by mma.sync m16n8k32: every GPU from sm_80 on.
//
// A block computes kBlockM x kBlockN of y from K slices of 64 bytes, which pass through kStages buffers of shared
// memory by cp.async; a warp computes 64 x 64, so that two slices of operands (64 + 64 rows of 64 bytes) feed 64
// instructions. 64-byte slices keep 4 stages of 128 x 256 within the 99 KB that sm_86, 89 and 120 have.
//
//   shared memory, one stage:   x_q [kBlockM][64] then weight [kBlockN][64], 16-byte chunks swizzled:
//
//     row 2i    | c ^ (i & 3) ... |     two rows fill the 128 bytes of the banks; the chunk is permuted by the pair of
//     row 2i+1  | c ^ (i & 3) ... |     rows, so the 8 rows x 16 bytes that ldmatrix reads at once lie in 8 places
//
// Arithmetic: 2 M N K; device memory: M K + N K + sizeof(y) M N bytes at least. Grid: one block a tile, in groups of
// kGroup tiles of rows, so that the weights of a column of tiles are read from L2 by the group.
#pragma once

#include <type_traits>

#include "copy_async.cuh"
#include "gemm.h"
#include "gemm_epilogue.cuh"
#include "mma_sync.cuh"

namespace qvdit {

template <typename Out_, int kBlockM_, int kBlockN_>
struct MmaShape {
  using Out = Out_;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kBlockK = 64;
  static constexpr int kWarpM = 64, kWarpN = 64, kStages = 4, kGroup = 8;
  static constexpr int kWarpsN = kBlockN / kWarpN;
  static constexpr int kThreads = kBlockM / kWarpM * kWarpsN * 32;
  static constexpr int kStageBytes = (kBlockM + kBlockN) * kBlockK;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // The epilogue's staging: 16 rows of a warp, a chunk of padding a row so that its writes lie in different banks.
  static constexpr int kStagedRow = kWarpN * static_cast<int>(sizeof(Out)) + 16;
  static_assert(16 * kStagedRow * (kThreads / 32) <= kSharedBytes, "the staging reuses the operands' shared memory");
};

__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>(row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4));
}

__device__ __forceinline__ void multiply_add(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void store_pair(float* to, float a, float b) { *reinterpret_cast<float2*>(to) = {a, b}; }
__device__ __forceinline__ void store_pair(__half* to, float a, float b) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b);
}
__device__ __forceinline__ void store_pair(int32_t* to, int32_t a, int32_t b) { *reinterpret_cast<int2*>(to) = {a, b}; }

// kRows rows of 64 bytes of a matrix [rows, k_pad] to shared memory, by all threads of the block.
template <int kRows, int kThreads>
__device__ __forceinline__ void load_slice(uint32_t shared, const int8_t* matrix, int64_t first_row, int64_t rows,
                                           int64_t k, int64_t k_pad) {
#pragma unroll
  for (int i = 0; i < kRows * 4 / kThreads; ++i) {
    const int index = i * kThreads + threadIdx.x, row = index / 4, chunk = index % 4;
    const bool there = first_row + row < rows && k + chunk * 16 < k_pad;
    const int8_t* from = there ? matrix + (first_row + row) * k_pad + k + chunk * 16 : matrix;
    copy_async(shared + swizzled(row, chunk), from, there);
  }
}

// acc += the warp's 64 x 64 x 64 of a slice. Lane l of ldmatrix gives the address of row l % 8 of matrix l / 8.
//   a: matrices (rows 0-7, chunk), (rows 8-15, chunk), (rows 0-7, chunk + 1), (rows 8-15, chunk + 1)
//   b: matrices (rows 0-7, chunk), (rows 0-7, chunk + 1), (rows 8-15, chunk), (rows 8-15, chunk + 1)
template <typename Shape>
__device__ __forceinline__ void multiply_slice(int32_t (&acc)[4][8][4], uint32_t x_q, uint32_t weight, int warp_m,
                                               int warp_n, int lane) {
  const int a_row = warp_m * Shape::kWarpM + lane % 16, a_chunk = lane / 16;
  const int b_row = warp_n * Shape::kWarpN + lane % 8 + lane / 16 * 8, b_chunk = lane / 8 % 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // of 32 bytes
    uint32_t a[4][4], b[4][4];
#pragma unroll
    for (int m = 0; m < 4; ++m) load_matrices(a[m], x_q + swizzled(a_row + 16 * m, 2 * half + a_chunk));
#pragma unroll
    for (int n = 0; n < 4; ++n) load_matrices(b[n], weight + swizzled(b_row + 16 * n, 2 * half + b_chunk));
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) multiply_add(acc[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
}

// The block's tile: tiles_m x tiles_n of them, kGroup tiles of rows at a time.
template <int kGroup>
__device__ __forceinline__ void choose_tile(int64_t tiles_m, int64_t tiles_n, int64_t& tile_m, int64_t& tile_n) {
  const int64_t in_group = kGroup * tiles_n, group = blockIdx.x / in_group, first = group * kGroup;
  const int64_t height = tiles_m - first < kGroup ? tiles_m - first : kGroup;
  tile_m = first + blockIdx.x % in_group % height;
  tile_n = blockIdx.x % in_group / height;
}

// Writes the warp's 64 x 64 accumulators as y, 16 rows at a time through staging, so that a row's 64 outputs are
// written 16 bytes a lane beside each other.
template <typename Shape>
__device__ __forceinline__ void store_tile(const qvdit_gemm_args& args, int32_t (&acc)[4][8][4], char* staging,
                                           int64_t first_m, int64_t first_n, int lane) {
  using Out = typename Shape::Out;
  constexpr int kPerChunk = 16 / sizeof(Out), kChunks = Shape::kWarpN / kPerChunk;
  const bool chunked = args.n % kPerChunk == 0 && reinterpret_cast<uintptr_t>(args.y) % 16 == 0;
  const int group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    EpilogueFragment<2, 8> fragment{args, {}, {}, args.n % 2 == 0};
    int32_t sums[2][8][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first_m + 16 * m + group + 8 * h;
      fragment.row[h] = row < args.m ? row : args.m - 1;
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      fragment.column[n] = first_n + 8 * n + pair;
#pragma unroll
      for (int h = 0; h < 2; ++h) sums[h][n][0] = acc[m][n][2 * h], sums[h][n][1] = acc[m][n][2 * h + 1];
    }
    fragment.correct(sums);
    __syncwarp();
    if constexpr (std::is_same_v<Out, int32_t>) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          Out* to = reinterpret_cast<Out*>(staging + (group + 8 * h) * Shape::kStagedRow) + 8 * n + pair;
          store_pair(to, sums[h][n][0], sums[h][n][1]);
        }
      }
    } else {
      float y[2][8][2];
      fragment.finish(sums, y);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          Out* to = reinterpret_cast<Out*>(staging + (group + 8 * h) * Shape::kStagedRow) + 8 * n + pair;
          store_pair(to, y[h][n][0], y[h][n][1]);
        }
      }
    }
    __syncwarp();
    for (int index = lane; index < 16 * kChunks; index += 32) {
      const int r = index / kChunks, c = index % kChunks;
      const int64_t row = first_m + 16 * m + r, column = first_n + c * kPerChunk;
      if (row >= args.m || column >= args.n) continue;
      const Out* from = reinterpret_cast<const Out*>(staging + r * Shape::kStagedRow) + c * kPerChunk;
      Out* to = static_cast<Out*>(args.y) + row * args.n + column;
      if (chunked) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int i = 0; i < kPerChunk && column + i < args.n; ++i) to[i] = from[i];
      }
    }
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) gemm_mma_kernel(const __grid_constant__ qvdit_gemm_args args) {
  extern __shared__ __align__(128) char shared[];
  const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / Shape::kWarpsN, warp_n = warp % Shape::kWarpsN;
  int64_t tile_m, tile_n;
  choose_tile<Shape::kGroup>((args.m + Shape::kBlockM - 1) / Shape::kBlockM,
                             (args.n + Shape::kBlockN - 1) / Shape::kBlockN, tile_m, tile_n);
  const int64_t first_m = tile_m * Shape::kBlockM, first_n = tile_n * Shape::kBlockN;
  const int slices = static_cast<int>((args.k_pad + Shape::kBlockK - 1) / Shape::kBlockK);

  const auto load = [&](int slice) {
    const uint32_t stage = stages + slice % Shape::kStages * Shape::kStageBytes;
    const int64_t k = static_cast<int64_t>(slice) * Shape::kBlockK;
    if (slice < slices) {
      load_slice<Shape::kBlockM, Shape::kThreads>(stage, args.x_q, first_m, args.m, k, args.k_pad);
      load_slice<Shape::kBlockN, Shape::kThreads>(stage + Shape::kBlockM * Shape::kBlockK, args.weight, first_n, args.n,
                                                  k, args.k_pad);
    }
    commit_copies();  // empty ones too, so that a slice's group is always the same count back
  };

  int32_t acc[4][8][4] = {};
  for (int slice = 0; slice < Shape::kStages - 1; ++slice) load(slice);
  for (int slice = 0; slice < slices; ++slice) {
    wait_for_copies_but<Shape::kStages - 2>();
    __syncthreads();  // the slice is there for all, and the stage loaded next has been read by all
    load(slice + Shape::kStages - 1);
    const uint32_t stage = stages + slice % Shape::kStages * Shape::kStageBytes;
    multiply_slice<Shape>(acc, stage, stage + Shape::kBlockM * Shape::kBlockK, warp_m, warp_n, lane);
  }
  wait_for_copies();
  __syncthreads();
  store_tile<Shape>(args, acc, shared + warp * 16 * Shape::kStagedRow, first_m + warp_m * Shape::kWarpM,
                    first_n + warp_n * Shape::kWarpN, lane);
}

template <typename Shape>
int32_t launch_gemm_mma(const qvdit_gemm_args& args, cudaStream_t stream) {
  const int64_t tiles =
      (args.m + Shape::kBlockM - 1) / Shape::kBlockM * ((args.n + Shape::kBlockN - 1) / Shape::kBlockN);
  QVDIT_REQUIRE(tiles < INT32_MAX, "%lld tiles, more than a grid takes", static_cast<long long>(tiles));
  if (cudaFuncSetAttribute(gemm_mma_kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes) !=
      cudaSuccess) {
    return launched("gemm_mma's shared memory");
  }
  gemm_mma_kernel<Shape><<<static_cast<unsigned>(tiles), Shape::kThreads, Shape::kSharedBytes, stream>>>(args);
  return launched("gemm_mma");
}

// wide: tiles of 128 x 256 rather than 128 x 128.
template <typename Out>
int32_t launch_gemm_mma(const qvdit_gemm_args& args, bool wide, cudaStream_t stream) {
  return wide ? launch_gemm_mma<MmaShape<Out, 128, 256>>(args, stream)
              : launch_gemm_mma<MmaShape<Out, 128, 128>>(args, stream);
}

}  // namespace qvdit
