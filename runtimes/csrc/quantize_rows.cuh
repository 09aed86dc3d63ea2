// Per-token quantization: one row in the registers of one to sixteen warps, read once and written once.
//
//   device memory: sizeof(x) + 1 bytes an element (3 for fp16), plus 4 + 4 R bytes a row; inv_smooth, the modulation
//   and alpha come from L1/L2, 4 bytes an element, of alpha 2 an element and rank. At 80 % of an H200's copy bandwidth
//   (4.1 TB/s) a 32768 x 5120 fp16 input takes 152 µs, 32768 x 1152 takes 34 µs.
//   instructions, what it is bound by: symmetric, about 2 (load, convert, range) + 3 (quotient) + 1 (pack) an element
//   and 150 a row, + 1 with a low-rank term and 1.3 for each of its ranks; asymmetric 4 more an element. The bandwidth
//   above leaves 21 an element on an H200.
//
//   grid: ceil(M / rows a block), but no more than run at once: each block goes on to further rows; a block is 32 W
//   threads x rows, W warps a row of V vectors of 8 elements a thread.
#pragma once

#include <type_traits>

#include "copy_async.cuh"
#include "dependent_launch.cuh"
#include "prologues.cuh"

namespace qvdit {

// x̃ of a row, for tests.
template <typename Values>
__device__ void store_transformed(const Values& values, const qvdit_quantize_args& args) {
#pragma unroll
  for (int v = 0; v < Values::kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (values.inside(v, i)) {
        args.transformed[static_cast<int64_t>(values.row) * args.k + values.k(v, i)] = values.x[v][i];
      }
    }
  }
}

// The next row on its way to shared memory while this one is computed: a warp's own elements, in their order, which its
// lanes fetch 16 bytes at a time and read back a quad at a time.
template <typename In, int kVectors>
struct StagedRow {
  static constexpr int kPieces = kVectors * kVector * static_cast<int>(sizeof(In)) / 16;  // a lane's
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(In));                        // elements
  using Quad = std::conditional_t<sizeof(In) == 2, uint2, uint4>;

  uint4* own;         // of a lane: kPieces, 32 apart
  const Quad* quads;  // as it reads them, 32 apart
  int first, rest;    // the lane's first element in its row; K - first

  __device__ StagedRow(uint4* of_warp, int first_of_warp, int lane, int features)
      : own(of_warp + lane),
        quads(reinterpret_cast<const Quad*>(of_warp) + lane),
        first(first_of_warp + lane * kPiece),
        rest(features - first) {}

  // What is past the features is never fetched: it is 0 once and for all.
  __device__ __forceinline__ void clear_rest() const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (!inside(p)) own[p * 32] = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ bool inside(int piece) const { return piece * (32 * kPiece) < rest; }

  __device__ __forceinline__ void fetch(const In* row) {
    asm volatile("" : "+r"(rest));  // else whether pieces are inside is found once and kept, bit by bit
    const In* const from = one_address(row + first);
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(own));
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (!inside(p)) continue;
      copy_async(to + p * 512, from + p * (32 * kPiece));
    }
    commit_copies();
  }

  __device__ __forceinline__ void read(float (&x)[kVectors][kVector]) const {
    wait_for_copies();
    __syncwarp();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; i += kQuad) {
        const Quad quad = quads[(v * kVector + i) / kQuad * 32];
        if constexpr (sizeof(In) == 2) {
          const float2 low = Halves<In>::floats(quad.x), high = Halves<In>::floats(quad.y);
          x[v][i] = low.x, x[v][i + 1] = low.y, x[v][i + 2] = high.x, x[v][i + 3] = high.y;
        } else {
          x[v][i] = __uint_as_float(quad.x), x[v][i + 1] = __uint_as_float(quad.y);
          x[v][i + 2] = __uint_as_float(quad.z), x[v][i + 3] = __uint_as_float(quad.w);
        }
      }
    }
    __syncwarp();
  }
};

// One row: x in the registers → integers, scale, zero point, u and row sum.
template <typename Prologue, bool kSymmetric, typename Values>
__device__ __forceinline__ void quantize_row(Values& values, RowThreads threads, const QuantizeParams& params,
                                             bool stores, float (*partial_u)[kMaxRank], int* partial_sum) {
  constexpr int kVectors = Values::kVectors;
  const qvdit_quantize_args& args = params.args;
  const int features = static_cast<int>(args.k), warps = threads.warps, warp = threads.warp, lane = threads.lane;
  const int padded_rest = static_cast<int>(params.k_pad) - values.first;
  const uint32_t row = values.row;
  Prologue::apply(values, threads, params);
  if (args.inv_smooth) {
    values.with([&](int v, int i, float inv_smooth) { values.x[v][i] = __fmul_rn(values.x[v][i], inv_smooth); },
                args.inv_smooth);
  }
  if constexpr (kVectors == kRotatedVectors) {
    if (args.rotation > 1) walsh_hadamard(values, static_cast<int>(args.rotation), lane);
  }
  if (args.transformed && stores) store_transformed(values, args);

  float highests[kChains] = {}, lowests[kChains] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float& highest = highests[i % kChains];
      highest = max_nan(highest, kSymmetric ? fabsf(values.x[v][i]) : values.x[v][i]);
      if constexpr (!kSymmetric) {
        float& lowest = lowests[i % kChains];
        lowest = max_nan(lowest, -values.x[v][i]);
      }
    }
  }
  const float highest = threads.maximum(greatest(highests));
  const float lowest = kSymmetric ? 0.f : threads.maximum(greatest(lowests));
  const RowGrid grid = RowGrid::of<kSymmetric>(lowest, highest, params);
  if (grid.factor != 1.f) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values.x[v][i] = grid.factor == 0.f ? 0.f : values.x[v][i] * grid.factor;
    }
  }

  const int rank = static_cast<int>(args.rank);
  float gain = 1.f;  // of rank lane; loaded now, so that it is there at the end
  if (args.frame_gain && warp == 0 && lane < rank) gain = params.gain(row, lane);

  int8_t* const x_q = one_address(args.x_q + static_cast<int64_t>(row) * params.k_pad + values.first);
  const float stored_zero = kSymmetric ? 0.f : grid.zero - 128.f;
  const uint32_t zero_bytes = (static_cast<uint32_t>(static_cast<int>(stored_zero)) & 0xff) * 0x01010101u;
  int sum = 0;  // of what is stored
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float (&centred)[kVector] = values.x[v];  // from here on kRounder + x_q - zero
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      centred[i] = grid.division.rounder_plus_quotient(centred[i]);
      if constexpr (!kSymmetric) centred[i] = fminf(centred[i], kRounder + grid.highest);
    }
#pragma unroll
    for (int i = 0; i < kVector; i += kQuad) {
      uint32_t bytes = pack_bytes(centred[i], centred[i + 1], centred[i + 2], centred[i + 3]);
      if constexpr (!kSymmetric) {  // where symmetric, what lies past the features is 0 already
        bytes = __vadd4(bytes, zero_bytes) & first_bytes(values.rest - Values::distance(v, i));
      }
      if (args.row_sum) sum = __dp4a(static_cast<int>(bytes), 0x01010101, sum);
      if (stores && Values::distance(v, i) < padded_rest)
        *reinterpret_cast<uint32_t*>(x_q + Values::distance(v, i)) = bytes;
    }
  }

  if (rank > 0) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values.x[v][i] -= kRounder;
    }
  }
#pragma unroll 1
  for (int r = 0; r < rank; ++r) {
    float dots[kChains] = {};
    values.with([&](int v, int i, float alpha) { dots[i % kChains] += values.x[v][i] * alpha; },
                static_cast<const __half*>(args.alpha) + static_cast<int64_t>(r) * args.k);
    const float dot = warp_sum(total(dots));
    if (lane == 0) partial_u[threads.first + warp][r] = dot;
  }
  if (args.row_sum) {
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (lane == 0) partial_sum[threads.first + warp] = sum;
  }
  if (warps > 1) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (!stores || warp != 0) return;

  if (lane < rank) {
    float dot = 0.f;
    for (int w = 0; w < warps; ++w) dot += partial_u[threads.first + w][lane];
    args.u[static_cast<int64_t>(lane) * args.m + row] = grid.scale * dot * gain;
  }
  if (lane == 0) {
    args.scale[row] = grid.scale;
    if (args.zero) args.zero[row] = static_cast<int>(stored_zero);
    if (args.row_sum) {
      int total = -features * static_cast<int>(stored_zero);
      for (int w = 0; w < warps; ++w) total += partial_sum[threads.first + w];
      args.row_sum[row] = total;
    }
  }
}

// Registers that a thread of so many vectors has: with fewer more warps run, but some bytes are spilled. On an H200,
// 2026-11-28, µs of 32768 rows at rank 1, three vectors with 56 registers, 64; four with 80; five with
// 80, 96:
//
//   LayerNorm, K = 1152, float32    93,   - |  88 |  83,  61    LayerNorm, K = 5120, bf16   307,   - | 249 | 251, 229
//   LayerNorm, K = 1536, float32   114,  86 |  91 | 130, 102    GELU, K = 4608, bf16        173,   - | 180 | 178, 174
//   LayerNorm, K = 3072, float32   224, 174 | 162 | 237, 179    GELU, K = 12288, bf16       474, 459 | 437 | 504, 457
constexpr int registers(int vectors) { return 16 + 16 * vectors; }

// A block takes every gridDim.x-th group of rows. What it shares is written again only after a barrier that comes after
// the last reading of it: each row's first reduction (or warp) for partial_u, its end for the reductions' places.
template <typename In, typename Prologue, int kVectors, bool kVectorized, bool kSymmetric>
__global__ void __maxnreg__(kVectorized ? registers(kVectors) : 128)
    quantize_rows_kernel(const __grid_constant__ QuantizeParams params) {
  let_next_kernel_start();
  extern __shared__ uint4 staging[];
  __shared__ float partial[4][kMaxWarps];
  __shared__ float partial_u[kMaxWarps][kMaxRank];
  __shared__ int partial_sum[kMaxWarps];
  const qvdit_quantize_args& args = params.args;
  const int features = static_cast<int>(args.k), warps = blockDim.x / 32;
  const RowThreads threads{warps, static_cast<int>(threadIdx.x) / 32, static_cast<int>(threadIdx.x) % 32,
                           static_cast<int>(threadIdx.y) * warps, partial};
  RowValues<kVectors, kVectorized> values;
  const int first_of_warp = threads.warp * (kVectors * 32 * kVector);
  values.first = first_of_warp + threads.lane * kQuad;
  values.rest = features - values.first;

  // Rows past the last are computed as the last and not stored: everybody meets at the barriers.
  const uint32_t rows = static_cast<uint32_t>(args.m), step = gridDim.x * blockDim.y;
  const auto row_of = [&](uint32_t first) { return min(first + threadIdx.y, rows - 1); };
  const auto start_of = [&](uint32_t first) {
    return static_cast<const In*>(args.x) + static_cast<int64_t>(row_of(first)) * args.k;
  };
  StagedRow<In, kVectors> staged(staging + (threads.first + threads.warp) * (StagedRow<In, kVectors>::kPieces * 32),
                                 first_of_warp, threads.lane, features);
  uint32_t first = blockIdx.x * blockDim.y;
  if constexpr (kVectorized) {
    staged.clear_rest();
    staged.fetch(start_of(first));
  }
#pragma unroll 1
  for (; first < rows; first += step) {
    // Else what follows from it is computed once, before the loop, and kept in more registers than there are.
    asm volatile("" : "+r"(values.first), "+r"(values.rest));
    __syncwarp();  // what a row of one warp shares has been read by all of its lanes
    if constexpr (kVectorized) {
      staged.read(values.x);
      if (rows - first > step) staged.fetch(start_of(first + step));
    } else {
      const In* const row = start_of(first);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          values.x[v][i] = values.inside(v, i) ? to_float(row[values.k(v, i)]) : 0.f;
        }
      }
    }
    values.row = row_of(first);
    quantize_row<Prologue, kSymmetric>(values, threads, params, first + threadIdx.y < rows, partial_u, partial_sum);
  }
}

template <typename In, typename Prologue, int kVectors, bool kVectorized>
int32_t launch_quantize(const QuantizeParams& params, cudaStream_t stream) {
  const auto kernel = params.args.symmetric ? quantize_rows_kernel<In, Prologue, kVectors, kVectorized, true>
                                            : quantize_rows_kernel<In, Prologue, kVectors, kVectorized, false>;
  constexpr int kWarpsWanted = 4;  // a block: enough blocks fit a multiprocessor at any number of rows
  const int warps = static_cast<int>(warps_of(params.k_pad, 32 * kVectors * kVector));
  const int rows = warps < kWarpsWanted ? kWarpsWanted / warps : 1;
  const int threads = 32 * warps * rows;
  constexpr int kStaged = kVectorized ? kVectors * kVector * static_cast<int>(sizeof(In)) : 0;  // bytes a thread
  const int shared = threads * kStaged, most_shared = 32 * kMaxWarps * kStaged;
  int resident = 0;  // blocks on the device at once
  if (const int32_t status =
          resident_blocks(reinterpret_cast<const void*>(kernel), threads, shared, most_shared, resident)) {
    return status;
  }
  const int64_t blocks = (params.args.m + rows - 1) / rows;
  const auto grid = static_cast<unsigned>(blocks < resident ? blocks : resident);
  kernel<<<grid, dim3(32 * warps, rows), shared, stream>>>(params);
  return launched("quantize_rows");
}

template <typename In, typename Prologue>
int32_t launch_quantize(const QuantizeParams& params, cudaStream_t stream) {
  if (!params.vectorized) return launch_quantize<In, Prologue, 4, false>(params, stream);
  // This chose the fastest of them at each of ten sizes but one, 12288 features after GELU (437 µs with four vectors,
  // 458 with five; H200, 2026-11-28).
  switch (params.args.rotation > 1 ? kRotatedVectors : vectors_per_thread(params.k_pad, {5, 4, 3})) {
    case 3:
      return launch_quantize<In, Prologue, 3, true>(params, stream);
    case 4:
      return launch_quantize<In, Prologue, 4, true>(params, stream);
    default:
      return launch_quantize<In, Prologue, 5, true>(params, stream);
  }
}

template <typename Prologue>
int32_t launch_quantize(const QuantizeParams& params, cudaStream_t stream) {
  switch (params.args.x_dtype) {
    case QVDIT_F16:
      return launch_quantize<__half, Prologue>(params, stream);
    case QVDIT_BF16:
      return launch_quantize<__nv_bfloat16, Prologue>(params, stream);
    default:
      return launch_quantize<float, Prologue>(params, stream);
  }
}

}  // namespace qvdit
