// softmax(scale · q kᵀ) v without the scores in memory: mma.sync m16n8k16, every GPU from sm_80 on.
//
// A block takes kRows rows of q of one head, a warp sixteen of them, and goes through the keys kKeys at a time: k and v
// come to shared memory by cp.async while the tile before is computed. A warp keeps its rows of q, their output and
// their running maximum and sum in registers, as FlashAttention-2 does (arXiv 2307.08691, algorithm 1).
//
//   operations: 4 L S D a head, a half more than D / 16 rounded up where D is an odd number of eights. Softmax adds one
//   ex2, three float operations and a half's conversion for each of L S scores.
//   bytes: q and y once, k and v once for each kRows rows, from L2.
//
// Shared memory holds rows of D, rounded up to 16, and 16 bytes more: the eight rows that ldmatrix reads at once then
// lie in different banks. Features between D and the next 16 are zero in q and k. Keys that there are not have zeros as
// their values, since 0 · NaN is no zero, and scores of -∞.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "copy_async.cuh"
#include "error.h"
#include "mma_sync.cuh"

namespace qvdit {

// kEights: D / 8, or more. kWarps: of a block. kKeys: of a tile.
template <typename T_, int kEights_, int kWarps_, int kKeys_>
struct AttentionShape {
  using T = T_;
  static constexpr int kEights = kEights_, kWarps = kWarps_, kKeys = kKeys_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kSteps = (kEights + 1) / 2;      // of 16 features
  static constexpr int kPitch = 32 * kSteps + 16;       // bytes of a row in shared memory
  static constexpr int kTileBytes = kKeys * kPitch;     // of k, or of v
  static constexpr int kStageBytes = 2 * kTileBytes;    // both
  static constexpr int kQueryBytes = kRows * kPitch;    // later the rows of y, on their way out
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStageBytes;
  // Accumulators, scores and q take 4 kEights + kKeys / 2 + 4 kSteps registers of a thread.
  static constexpr int kBlocks = kWarps == 1 ? 8 : kEights <= 9 ? 2 : 1;
};

// D / 8, and divisions by it of what counts a tile's pieces of 16 bytes: at most 128 rows of 16.
struct Eights {
  int count, multiplier;

  explicit __device__ __forceinline__ Eights(int64_t head_size)
      : count(static_cast<int>(head_size / 8)), multiplier((1 << 16) / count + 1) {}
  __device__ __forceinline__ int quotient(int i) const { return i * multiplier >> 16; }
};

__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address));
}

__device__ __forceinline__ void load_transposed_half(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(address));
}

// acc += a b, 16 x 16 by 16 x 8.
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == sizeof(__half) && !__is_same(T, __nv_bfloat16)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two floats as T, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  if constexpr (__is_same(T, __nv_bfloat16)) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of the four lanes that share a row of an accumulator.
__device__ __forceinline__ float largest_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Rows first … first + kCount of one head to shared memory; those from ``rows`` on as zeros.
template <typename Shape, int kCount>
__device__ __forceinline__ void load_rows(uint32_t shared, const typename Shape::T* head, int64_t stride, int64_t first,
                                          int64_t rows, const Eights& eights) {
  for (int i = threadIdx.x; i < kCount * eights.count; i += Shape::kThreads) {
    const int row = eights.quotient(i), eight = i - row * eights.count;
    const bool there = first + row < rows;
    copy_async(shared + row * Shape::kPitch + 16 * eight, head + (there ? first + row : 0) * stride + 8 * eight,
                  there);
  }
}

// Zeros for the features from D on, of q and of both stages of k and v: no load touches them.
template <typename Shape>
__device__ __forceinline__ void clear_padding(char* shared, const Eights& eights) {
  const int missing = 2 * Shape::kSteps - eights.count;
  constexpr int kAllRows = Shape::kRows + 4 * Shape::kKeys;  // their pitches are the same
  for (int i = threadIdx.x; i < kAllRows * missing; i += Shape::kThreads) {
    const int row = i / missing, eight = eights.count + i % missing;
    *reinterpret_cast<uint4*>(shared + row * Shape::kPitch + 16 * eight) = make_uint4(0, 0, 0, 0);
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    attention_kernel(const __grid_constant__ qvdit_attention_args args) {
  using T = typename Shape::T;
  extern __shared__ __align__(128) char shared[];
  const uint32_t queries = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t stages = queries + Shape::kQueryBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Eights eights(args.head_size);

  // Blocks of one head follow each other: they share its keys in L2.
  const int64_t tiles = (args.rows + Shape::kRows - 1) / Shape::kRows;
  const int64_t first_row = blockIdx.x % tiles * Shape::kRows, one = blockIdx.x / tiles;
  const int64_t head = one % args.heads, batch = one / args.heads;
  const T* q = static_cast<const T*>(args.q) + batch * args.q_batch + head * args.q_head;
  const T* k = static_cast<const T*>(args.k) + batch * args.k_batch + head * args.k_head;
  const T* v = static_cast<const T*>(args.v) + batch * args.v_batch + head * args.v_head;

  const int64_t key_tiles = (args.keys + Shape::kKeys - 1) / Shape::kKeys;
  const auto load = [&](int64_t tile) {
    if (tile < key_tiles) {
      const uint32_t stage = stages + static_cast<uint32_t>(tile % 2) * Shape::kStageBytes;
      load_rows<Shape, Shape::kKeys>(stage, k, args.k_row, tile * Shape::kKeys, args.keys, eights);
      load_rows<Shape, Shape::kKeys>(stage + Shape::kTileBytes, v, args.v_row, tile * Shape::kKeys, args.keys, eights);
    }
    commit_copies();  // empty ones too, so that the tile needed is always the last but one
  };

  clear_padding<Shape>(shared, eights);
  load_rows<Shape, Shape::kRows>(queries, q, args.q_row, first_row, args.rows, eights);
  load(0);

  const float to_exponent = args.scale * 1.4426950408889634f;  // log2 e
  uint32_t query[Shape::kSteps][4];
  float out[Shape::kEights][4] = {};
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // of rows lane / 4 and lane / 4 + 8

  for (int64_t tile = 0; tile < key_tiles; ++tile) {
    load(tile + 1);
    wait_for_copies_but<1>();
    __syncthreads();
    if (tile == 0) {
      const uint32_t rows = queries + (16 * warp + lane % 16) * Shape::kPitch + lane / 16 * 16;
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) load_matrices(query[step], rows + 32 * step);
    }
    const uint32_t keys = stages + static_cast<uint32_t>(tile % 2) * Shape::kStageBytes;
    const uint32_t values = keys + Shape::kTileBytes;

    // Scores: row lane / 4 (0, 1) and eight below (2, 3), keys 8 n + 2 (lane % 4) and the next.
    float score[Shape::kKeys / 8][4] = {};
    const uint32_t key_address = keys + (lane / 16 * 8 + lane % 8) * Shape::kPitch + lane / 8 % 2 * 16;
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
#pragma unroll
      for (int pair = 0; pair < Shape::kKeys / 16; ++pair) {
        uint32_t b[4];
        load_matrices(b, key_address + pair * 16 * Shape::kPitch + 32 * step);
        multiply<T>(score[2 * pair], query[step], b[0], b[1]);
        multiply<T>(score[2 * pair + 1], query[step], b[2], b[3]);
      }
    }
    if ((tile + 1) * Shape::kKeys > args.keys) {
      const int there = static_cast<int>(args.keys - tile * Shape::kKeys) - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (8 * n + i % 2 >= there) score[n][i] = -INFINITY;
        }
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[half];
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
        most = fmaxf(most, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
      }
      most = largest_of_row(most);
      const float shrink = power_of_two((largest[half] - most) * to_exponent);
      largest[half] = most;
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < Shape::kEights; ++n) out[n][2 * half] *= shrink, out[n][2 * half + 1] *= shrink;
      const float offset = most * to_exponent;
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          score[n][i] = power_of_two(fmaf(score[n][i], to_exponent, -offset));
          sum[half] += score[n][i];
        }
      }
    }

    const uint32_t value_address = values + (lane / 8 % 2 * 8 + lane % 8) * Shape::kPitch + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < Shape::kKeys / 16; ++step) {
      const uint32_t weight[4] = {
          pack_two<T>(score[2 * step][0], score[2 * step][1]), pack_two<T>(score[2 * step][2], score[2 * step][3]),
          pack_two<T>(score[2 * step + 1][0], score[2 * step + 1][1]),
          pack_two<T>(score[2 * step + 1][2], score[2 * step + 1][3])};
      const uint32_t rows = value_address + step * 16 * Shape::kPitch;
#pragma unroll
      for (int n = 0; n < Shape::kEights; n += 2) {
        uint32_t b[4];
        if (n + 1 < Shape::kEights) {
          load_transposed(b, rows + 16 * n);
          multiply<T>(out[n], weight, b[0], b[1]);
          multiply<T>(out[n + 1], weight, b[2], b[3]);
        } else {
          load_transposed_half(b, rows + 16 * n);
          multiply<T>(out[n], weight, b[0], b[1]);
        }
      }
    }
    __syncthreads();  // the stage loaded next has been read by all
  }

  // Through shared memory, a warp's rows of q giving way to those of y, so that 16 bytes leave at once.
  char* staging = shared + 16 * warp * Shape::kPitch;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float whole = sum_of_row(sum[half]);
    char* row = staging + (lane / 4 + 8 * half) * Shape::kPitch + lane % 4 * 4;
#pragma unroll
    for (int n = 0; n < Shape::kEights; ++n) {
      *reinterpret_cast<uint32_t*>(row + 16 * n) = pack_two<T>(out[n][2 * half] / whole, out[n][2 * half + 1] / whole);
    }
  }
  __syncwarp();
  T* y = static_cast<T*>(args.y) + (batch * args.rows * args.heads + head) * args.head_size;
  for (int i = lane; i < 16 * eights.count; i += 32) {
    const int row = eights.quotient(i), eight = i - row * eights.count;
    const int64_t at = first_row + 16 * warp + row;
    if (at < args.rows) {
      *reinterpret_cast<uint4*>(y + at * args.heads * args.head_size + 8 * eight) =
          *reinterpret_cast<const uint4*>(staging + row * Shape::kPitch + 16 * eight);
    }
  }
}

template <typename Shape>
int32_t launch_shape(const qvdit_attention_args& args, cudaStream_t stream) {
  const int64_t blocks = (args.rows + Shape::kRows - 1) / Shape::kRows * args.batch * args.heads;
  QVDIT_REQUIRE(blocks < INT32_MAX, "%lld blocks, more than a grid takes", static_cast<long long>(blocks));
  if (cudaFuncSetAttribute(attention_kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes) !=
      cudaSuccess) {
    return launched("attention's shared memory");
  }
  attention_kernel<Shape><<<static_cast<unsigned>(blocks), Shape::kThreads, Shape::kSharedBytes, stream>>>(args);
  return launched("attention");
}

// A warp a block where there are few rows, as of frames; else as many as leave a row's data in registers, and two
// stages in the 99 KB of shared memory that every GPU has.
template <typename T, int kEights>
int32_t launch_for_rows(const qvdit_attention_args& args, cudaStream_t stream) {
  constexpr int64_t kFew = 32;
  constexpr int kWarps = kEights <= 9 ? 8 : 4;
  if (args.rows <= kFew) return launch_shape<AttentionShape<T, kEights, 1, 16>>(args, stream);
  return launch_shape<AttentionShape<T, kEights, kWarps, 64>>(args, stream);
}

template <typename T>
int32_t launch_attention(const qvdit_attention_args& args, cudaStream_t stream) {
  const int64_t eights = args.head_size / 8;
  if (eights <= 4) return launch_for_rows<T, 4>(args, stream);
  if (eights <= 6) return launch_for_rows<T, 6>(args, stream);
  if (eights <= 8) return launch_for_rows<T, 8>(args, stream);
  if (eights <= 9) return launch_for_rows<T, 9>(args, stream);
  if (eights <= 12) return launch_for_rows<T, 12>(args, stream);
  return launch_for_rows<T, 16>(args, stream);
}

// By type, compiled apart.
int32_t attention_f16(const qvdit_attention_args& args, cudaStream_t stream);
int32_t attention_bf16(const qvdit_attention_args& args, cudaStream_t stream);

}  // namespace qvdit
