// The low-rank term's Σ_k (x_q - zero) alpha[k]: a float16 product of the tensor cores.
//
// x_q - zero is a number of float16, as alpha is: their products are exact, and are summed up in float32, in an order
// that depends on K, the rank and the GPU, not on how many rows there are.
#pragma once

#include <cuda_fp16.h>

#include "copy_async.cuh"
#include "round_quotient.h"

namespace qvdit {

// Sixteen bytes on their way to shared memory; or, where there are none, zeros at once. With zeros by cp.async itself
// quantizing in groups took 2 to 5 % longer.
__device__ __forceinline__ void copy_or_clear(void* to, const void* from, bool inside) {
  if (inside) {
    copy_async(static_cast<uint32_t>(__cvta_generic_to_shared(to)), from);
  } else {
    *static_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
  }
}

// Two integers kRounder + q as the float16 numbers q: kRounder's lower half makes that of the sum one of float16.
__device__ __forceinline__ uint32_t half_integers(float a, float b) {
  const uint32_t halves = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x5410);
  const __half2 integers = __hsub2(reinterpret_cast<const __half2&>(halves), __float2half2_rn(kHalfRounder));
  return reinterpret_cast<const uint32_t&>(integers);
}

// mma.m16n8k16: sums += a b.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint4& a, const uint2& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// Eight integers kRounder + q as a product's operand a. The first four are in its row lane / 4, the others 8 below.
__device__ __forceinline__ uint4 half_operand(const float (&q)[8]) {
  return make_uint4(half_integers(q[0], q[1]), half_integers(q[4], q[5]), half_integers(q[2], q[3]),
                    half_integers(q[6], q[7]));
}

// Σ of products of what a warp's lanes hold, one rank's, line by line: lines of integers are a product's rows, those of
// factors its columns, and what is wanted are the sums of the same line.
struct LineSums {
  float first[4] = {}, second[4] = {};  // of a lane's first four elements, and of its others

  __device__ __forceinline__ void add(const uint4& operand, const uint2& first_factors, const uint2& second_factors) {
    multiply_add(first, operand, first_factors);
    multiply_add(second, operand, second_factors);
  }

  // Whether a lane has its line's sum; which.
  static __device__ __forceinline__ bool has_own(int lane) { return lane % 4 == lane / 8; }
  __device__ __forceinline__ float own(int lane) const {
    return lane / 4 % 2 ? first[1] + second[3] : first[0] + second[2];
  }
};

}  // namespace qvdit
