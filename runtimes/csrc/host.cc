// What of the kernels can be tested without a GPU, as a small shared library: the headers they share with the host.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "quantize_plan.h"
#include "qvdit_kernels.h"
#include "round_quotient.h"
#include "unpack.h"

namespace {

template <int kBits>
void unpack(const uint32_t* words, const int8_t* zero, int64_t n, int64_t k, int8_t* weight) {
  const int64_t blocks = qvdit::padded(k) / qvdit::kRowPad;
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      uint32_t packed[kBits];
      std::memcpy(packed, words + (row * blocks + block) * kBits, sizeof(packed));
      uint32_t values[qvdit::kRowPad / 4];
      for (int i = 0; i < qvdit::kRowPad / 4; ++i) {
        values[i] = qvdit::CodeOffset<kBits>(zero ? zero[row] : 0).values(qvdit::unpack_codes<kBits>(packed, i));
      }
      const int64_t first = block * qvdit::kRowPad, count = k - first < qvdit::kRowPad ? k - first : qvdit::kRowPad;
      std::memcpy(weight + row * k + first, values, count);
    }
  }
}

int64_t wrong_quotients_of(uint32_t mantissa) {
  const float divisor = std::ldexp(static_cast<float>(mantissa), -23);
  const qvdit::RoundingDivisor by(divisor);
  int64_t wrong = 0;
  for (int half = 0; half < 256; ++half) {
    const float tie = (static_cast<float>(half) + 0.5f) * divisor;
    uint32_t bits;
    std::memcpy(&bits, &tie, sizeof(bits));
    for (uint32_t near = bits - 2; near <= bits + 2; ++near) {
      float x;
      std::memcpy(&x, &near, sizeof(x));
      wrong += by.rounder_plus_quotient(x) != x / divisor + qvdit::kRounder;
    }
  }
  return wrong;
}

}  // namespace

extern "C" {

// words: [N, b · K_pad / 32] → weight: int8 [N, K], less zero [N] (null: 0; b < 8). Returns a qvdit_status.
QVDIT_API int32_t qvdit_host_unpack(const uint32_t* words, int32_t bits, const int8_t* zero, int64_t n, int64_t k,
                                    int8_t* weight) {
  switch (bits) {
    case 2:
      unpack<2>(words, zero, n, k, weight);
      return QVDIT_OK;
    case 3:
      unpack<3>(words, zero, n, k, weight);
      return QVDIT_OK;
    case 4:
      unpack<4>(words, zero, n, k, weight);
      return QVDIT_OK;
    case 6:
      unpack<6>(words, zero, n, k, weight);
      return QVDIT_OK;
    case 8:
      unpack<8>(words, zero, n, k, weight);
      return QVDIT_OK;
    default:
      return QVDIT_INVALID;
  }
}

// round(x / divisor) of every x [count], 2^-96 <= divisor.
QVDIT_API void qvdit_host_round_quotients(const float* x, float divisor, int64_t count, float* quotient) {
  const float factor = qvdit::RoundingDivisor::factor(divisor);
  const qvdit::RoundingDivisor by(divisor * factor);
  for (int64_t i = 0; i < count; ++i) {
    quotient[i] = by.rounder_plus_quotient(x[i] * factor) - qvdit::kRounder;
  }
}

// The bits of kRounder + round(x) of every x [count].
QVDIT_API void qvdit_host_rounded_bits(const float* x, int64_t count, uint32_t* bits) {
  const qvdit::RoundingDivisor by(1.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float sum = by.rounder_plus_quotient(x[i]);
    std::memcpy(bits + i, &sum, sizeof(sum));
  }
}

// How many of the x near a tie are rounded otherwise than by a division, for divisors of mantissa first, first + step …
// below 2^24 (the smallest is 2^23).
QVDIT_API int64_t qvdit_host_wrong_quotients(int64_t first, int64_t step) {
  int64_t wrong = 0;
  for (int64_t mantissa = first; mantissa < 1 << 24; mantissa += step) {
    wrong += wrong_quotients_of(static_cast<uint32_t>(mantissa));
  }
  return wrong;
}

// How many x, from 1e-12 on every step-th float, are divided by levels otherwise than by a division.
QVDIT_API int64_t qvdit_host_wrong_scales(float levels, int64_t step) {
  const float reciprocal = 1.0f / levels, smallest = 1e-12f, greatest = std::numeric_limits<float>::max();
  uint32_t first, last;
  std::memcpy(&first, &smallest, sizeof(first));
  std::memcpy(&last, &greatest, sizeof(last));
  int64_t wrong = 0;
  for (int64_t bits = first; bits <= last; bits += step) {
    const uint32_t word = static_cast<uint32_t>(bits);
    float x;
    std::memcpy(&x, &word, sizeof(x));
    wrong += qvdit::quotient_by_levels(x, levels, reciprocal) != x / levels;
  }
  return wrong;
}

// How a 16-bit row of K features and rank 0 or 1 is laid out with so many vectors a thread: warps of a row, rows and
// bytes of shared memory of a block that may have shared_limit.
QVDIT_API void qvdit_host_plan_halves(int64_t m, int64_t k, int32_t vectors, int32_t rank, int32_t shared_limit,
                                      int32_t found[3]) {
  const int64_t k_pad = qvdit::padded(k);
  const qvdit::HalvesPlan plan = rank ? qvdit::plan_halves<true>(m, k_pad, vectors, shared_limit)
                                      : qvdit::plan_halves<false>(m, k_pad, vectors, shared_limit);
  found[0] = plan.warps, found[1] = plan.rows, found[2] = plan.shared;
}

// How 16-bit rows of several ranks are laid out: vectors a thread (0: they do not fit), a group's rows and warps,
// pieces of a row, products a vector, bytes of alpha and of a group, warps that run at once.
QVDIT_API void qvdit_host_plan_groups(int64_t k, int32_t rank, int32_t shared_limit, int32_t found[8]) {
  const qvdit::GroupPlan plan = qvdit::plan_groups(qvdit::padded(k), rank, shared_limit);
  const auto& [vectors, shape] = plan;
  if (vectors == 0) {
    std::fill_n(found, 8, 0);
    return;
  }
  const int32_t of_plan[8] = {vectors,
                              shape.rows(),
                              shape.warps,
                              shape.pieces(),
                              shape.sets(rank),
                              shape.alpha_bytes(rank, vectors),
                              shape.group_bytes(rank, vectors),
                              qvdit::running_groups(plan, rank, shared_limit) * shape.warps};
  std::copy_n(of_plan, 8, found);
}

// Groups of a block, of rows that are laid out so, on a multiprocessor with so many warps and bytes of shared memory.
QVDIT_API int32_t qvdit_host_groups_a_block(int64_t k, int32_t rank, int32_t shared_limit, int32_t warps,
                                            int32_t shared, int32_t most_groups) {
  const qvdit::GroupPlan plan = qvdit::plan_groups(qvdit::padded(k), rank, shared_limit);
  return plan.vectors == 0 ? 0 : qvdit::groups_a_block({warps, shared}, shared_limit, plan, rank, most_groups);
}

// The sizes of the argument structs, which runtimes/cuda.py repeats: quantize, unpack, gemm, attention,
// gated residual.
QVDIT_API void qvdit_host_struct_sizes(int64_t sizes[5]) {
  sizes[0] = sizeof(qvdit_quantize_args);
  sizes[1] = sizeof(qvdit_unpack_args);
  sizes[2] = sizeof(qvdit_gemm_args);
  sizes[3] = sizeof(qvdit_attention_args);
  sizes[4] = sizeof(qvdit_gated_residual_args);
}

}  // extern "C"
