// Canonically packed weights to the int8 workspace that the GEMM reads: one kernel for every width.
//
// Bytes: N K_pad (b/8 + 1), 39 MB for W4 of 5120 x 5120: about 10 µs on an H200 beside 1200 µs of GEMM at 32768 rows.
// Instructions: about 3 a value, whatever the width.
// Grid: blocks of 4 warps, one, two or four to a row; a lane takes 16 values at a time, so that what a warp writes at
// once lies beside each other, and reads all of its own before it unpacks the first, or six. Where earlier kernels
// still run that it must wait for, its words come to L2 meanwhile: that reads nothing yet.
#include "unpack_weight.h"

#include <cuda_runtime.h>

#include "dependent_launch.cuh"
#include "error.h"
#include "unpack.h"

namespace {

constexpr int kWarps = 4;     // of a block
constexpr int kChunk = 16;    // values: half a block of the packing, 16 bytes of the weights
constexpr int kOnTheWay = 6;  // chunks that a lane reads before it unpacks the first

struct UnpackParams {
  qvdit_unpack_args args;
  int log2_row_warps;     // warps a row
  bool beside_quantizer;  // see unpack_weight.h
};

// Words [count] by so many lanes.
__device__ __forceinline__ void bring_to_l2(const uint32_t* words, int count, int lane, int lanes) {
  constexpr int kLine = 32;  // words
#pragma unroll 1
  for (int i = lane * kLine; i < count; i += lanes * kLine) asm volatile("prefetch.global.L2 [%0];" ::"l"(words + i));
}

// The codes of one chunk, packed.
template <int kBits>
struct Chunk {
  static constexpr int kWords = (kBits * kChunk + 31) / 32;
  uint32_t words[kWords];

  // row: its packed words, on a multiple of a block's.
  __device__ __forceinline__ void read(const uint32_t* row, int chunk) {
    const uint32_t* const from = row + chunk * kBits / 2;
    if constexpr (kBits % 2 == 1) {  // every other chunk begins within a word
      const int shift = chunk % 2 * 16;
      words[0] = __funnelshift_r(from[0], from[1], shift), words[1] = from[1] >> shift;
    } else if constexpr (kWords == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      words[0] = two.x, words[1] = two.y;
    } else if constexpr (kWords == 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = from[i];
    }
  }
};

template <int kBits>
__global__ void __launch_bounds__(32 * kWarps) unpack_weight_kernel(const __grid_constant__ UnpackParams params) {
  __shared__ int sums[kWarps];
  const qvdit_unpack_args& args = params.args;
  const int warp = threadIdx.y, row_warps = 1 << params.log2_row_warps, step = 32 * row_warps;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) >> params.log2_row_warps;
  const int lane = (warp & (row_warps - 1)) * 32 + threadIdx.x;  // of the row's
  const int k = static_cast<int>(args.k), blocks = static_cast<int>(qvdit::padded(k) / qvdit::kRowPad);
  const uint32_t* const words = args.words + row * blocks * kBits;
  qvdit::let_next_kernel_start();
  if (!params.beside_quantizer) {
    if (row < args.n) bring_to_l2(words, blocks * kBits, lane, step);
    qvdit::wait_for_earlier_kernels();
  }
  int sum = 0;
  if (row < args.n) {
    uint4* const weight = reinterpret_cast<uint4*>(args.weight + row * blocks * qvdit::kRowPad);
    // A difference of two 8-bit integers needs 9 bits.
    const qvdit::CodeOffset<kBits> offset(kBits < 8 && args.zero ? args.zero[row] : 0);
    for (int first = lane; first < 2 * blocks; first += step * kOnTheWay) {
      Chunk<kBits> chunks[kOnTheWay];
#pragma unroll
      for (int j = 0; j < kOnTheWay; ++j) {
        if (first + step * j < 2 * blocks) chunks[j].read(words, first + step * j);
      }
#pragma unroll
      for (int j = 0; j < kOnTheWay; ++j) {
        const int chunk = first + step * j, inside = k - chunk * kChunk;  // values of the chunk that are features
        if (chunk >= 2 * blocks) break;
        uint32_t values[kChunk / 4];
#pragma unroll
        for (int i = 0; i < kChunk / 4; ++i) {
          values[i] = offset.values(qvdit::unpack_codes<kBits>(chunks[j].words, i));
          if (inside < kChunk) values[i] &= qvdit::first_bytes(inside - 4 * i);
          sum = __dp4a(static_cast<int>(values[i]), 0x01010101, sum);
        }
        weight[chunk] = make_uint4(values[0], values[1], values[2], values[3]);
      }
    }
  }
  if (args.weight_sum) {
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (threadIdx.x == 0) sums[warp] = sum;
    __syncthreads();
    if (lane == 0 && row < args.n) {
      for (int other = 1; other < row_warps; ++other) sum += sums[warp + other];
      args.weight_sum[row] = sum;
    }
  }
  // One block is enough: the kernel has not ended before it has. Blocks that wait keep others from starting.
  if (params.beside_quantizer && blockIdx.x == gridDim.x - 1) qvdit::wait_for_earlier_kernels();
}

template <int kBits>
int32_t launch(const UnpackParams& params, cudaStream_t stream) {
  const int64_t warps = params.args.n << params.log2_row_warps;
  const unsigned blocks = static_cast<unsigned>((warps + kWarps - 1) / kWarps);
  qvdit::launch_early(unpack_weight_kernel<kBits>, blocks, dim3(32, kWarps), stream, params);
  return qvdit::launched("unpack_weight");
}

}  // namespace

int32_t qvdit::unpack_weight(const qvdit_unpack_args& args, bool beside_quantizer, cudaStream_t stream) {
  const long long n = args.n, k = args.k;
  QVDIT_REQUIRE(args.words && args.weight, "words and weight must be given");
  QVDIT_REQUIRE(n >= 1 && n < INT32_MAX && k >= 1 && k <= 1 << 20, "a weight of [%lld, %lld]", n, k);
  QVDIT_REQUIRE(reinterpret_cast<uintptr_t>(args.weight) % 16 == 0, "weight is not on a multiple of 16 bytes");
  QVDIT_REQUIRE(reinterpret_cast<uintptr_t>(args.words) % 16 == 0, "words are not on a multiple of 16 bytes");
  const int64_t chunks = qvdit::padded(k) / kChunk, most = 32 * kOnTheWay;  // of a row; of a warp at once
  const UnpackParams params{args, chunks > 2 * most ? 2 : chunks > most ? 1 : 0, beside_quantizer};
  switch (args.bits) {
    case 2:
      return launch<2>(params, stream);
    case 3:
      return launch<3>(params, stream);
    case 4:
      return launch<4>(params, stream);
    case 6:
      return launch<6>(params, stream);
    case 8:
      return launch<8>(params, stream);
    default:
      return qvdit::fail(QVDIT_INVALID, "weights of %d bits; 2, 3, 4, 6 or 8", args.bits);
  }
}

extern "C" int32_t qvdit_unpack_weight(const qvdit_unpack_args* args, void* stream) {
  return qvdit::unpack_weight(*args, false, static_cast<cudaStream_t>(stream));
}
