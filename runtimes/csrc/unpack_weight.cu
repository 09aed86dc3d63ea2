// Canonically packed weights to the int8 workspace that the GEMM reads: one kernel for every width.
//
// Bytes: N K_pad (b/8 + 1), 39 MB for W4 of 5120 x 5120: about 12 µs on an H200 beside 1200 µs of GEMM at 32768 rows.
// Grid: ceil(N / 4) blocks of 4 warps, a warp a row, a lane 32 values: b words in, 32 bytes out. Where earlier kernels
// still run, its words come to L2 meanwhile: that reads nothing yet.
#include <cuda_runtime.h>

#include "dependent_launch.cuh"
#include "error.h"
#include "unpack.h"

namespace {

constexpr int kRowsPerBlock = 4;

// Words [count] by the lanes of a warp.
__device__ __forceinline__ void bring_to_l2(const uint32_t* words, int64_t count, int lane) {
  constexpr int kLine = 32;  // words
#pragma unroll 1
  for (int64_t i = lane * kLine; i < count; i += 32 * kLine) asm volatile("prefetch.global.L2 [%0];" ::"l"(words + i));
}

template <int kBits>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    unpack_weight_kernel(const __grid_constant__ qvdit_unpack_args args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  const int64_t blocks = qvdit::padded(args.k) / qvdit::kRowPad;
  const uint32_t* words = args.words + row * blocks * kBits;
  qvdit::let_next_kernel_start();
  if (row < args.n) bring_to_l2(words, blocks * kBits, threadIdx.x);
  qvdit::wait_for_earlier_kernels();
  if (row >= args.n) return;
  uint4* weight = reinterpret_cast<uint4*>(args.weight + row * blocks * qvdit::kRowPad);
  // A difference of two 8-bit integers needs 9 bits.
  const int zero = kBits < 8 && args.zero ? args.zero[row] : 0;
  int sum = 0;
  for (int64_t block = threadIdx.x; block < blocks; block += 32) {
    uint32_t packed[kBits];
#pragma unroll
    for (int i = 0; i < kBits; ++i) packed[i] = words[block * kBits + i];
    const int64_t inside = args.k - block * qvdit::kRowPad;  // values of these 32 that are features
    uint32_t bytes[qvdit::kRowPad / 4] = {};
#pragma unroll
    for (int i = 0; i < qvdit::kRowPad; ++i) {
      const int value = i < inside ? qvdit::unpack_value<kBits>(packed, i) - zero : 0;
      bytes[i / 4] |= (static_cast<uint32_t>(value) & 0xffu) << (8 * (i % 4));
      sum += value;
    }
    weight[2 * block] = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
    weight[2 * block + 1] = make_uint4(bytes[4], bytes[5], bytes[6], bytes[7]);
  }
  if (!args.weight_sum) return;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x == 0) args.weight_sum[row] = sum;
}

template <int kBits>
int32_t launch(const qvdit_unpack_args& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((args.n + kRowsPerBlock - 1) / kRowsPerBlock);
  qvdit::launch_early(unpack_weight_kernel<kBits>, blocks, dim3(32, kRowsPerBlock), stream, args);
  return qvdit::launched("unpack_weight");
}

}  // namespace

extern "C" int32_t qvdit_unpack_weight(const qvdit_unpack_args* args, void* stream) {
  const long long n = args->n, k = args->k;
  QVDIT_REQUIRE(args->words && args->weight, "words and weight must be given");
  QVDIT_REQUIRE(n >= 1 && n < INT32_MAX && k >= 1, "a weight of [%lld, %lld]", n, k);
  QVDIT_REQUIRE(reinterpret_cast<uintptr_t>(args->weight) % 16 == 0, "weight is not on a multiple of 16 bytes");
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args->bits) {
    case 2:
      return launch<2>(*args, on);
    case 3:
      return launch<3>(*args, on);
    case 4:
      return launch<4>(*args, on);
    case 6:
      return launch<6>(*args, on);
    case 8:
      return launch<8>(*args, on);
    default:
      return qvdit::fail(QVDIT_INVALID, "weights of %d bits; 2, 3, 4, 6 or 8", args->bits);
  }
}
