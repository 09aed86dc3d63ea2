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

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>
#include <type_traits>

#include "dependent_launch.cuh"
#include "error.h"
#include "round_quotient.h"

namespace qvdit {

constexpr int kVector = 8;     // elements that a thread has for every 256 of its warp
constexpr int kQuad = 4;       // of them beside each other in a row: 16 bytes of float32
constexpr int kMaxWarps = 16;  // a row
constexpr int kMaxRank = 32;

constexpr int kRotatedVectors = 4;                            // a thread's, where inputs are rotated
constexpr int kMaxRotation = 32 * kRotatedVectors * kVector;  // features that one warp holds
constexpr float kSmallestScale = 1e-8f;                       // EPS_SCALE of qvdit/method/operator.py
constexpr int64_t kMaxFeatures = 16384;

// n / divisor for 0 <= n < 2^31 without a division.
struct Divisor {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t value) : divisor(value) {
    if (value <= 1) return;
    int log2 = 0;
    while (log2 < 31 && (uint64_t{1} << log2) < value) ++log2;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + log2)) + value - 1) / value);
    shift = log2 - 1;
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return divisor == 1 ? n : __umulhi(n, multiplier) >> shift;
  }
  __device__ __forceinline__ uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

// qvdit_quantize_args with what the host worked out.
struct QuantizeParams {
  qvdit_quantize_args args;
  int64_t k_pad;
  float levels;                   // what the range is divided by: 127 or 31; asymmetric 255 or 63
  float levels_reciprocal;        // 1 / levels
  bool vectorized;                // every array may be read 16 bytes at a time, and K is a multiple of 8
  Divisor tokens, frames, ranks;  // tokens_per_frame, frames, ranks_per_gain
  Divisor modulated;              // rows_per_modulation
};

// (a, b) → (a + b, a - b)
__device__ __forceinline__ void add_and_subtract(float& a, float& b) {
  const float sum = __fadd_rn(a, b);
  b = __fsub_rn(a, b), a = sum;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Two 16-bit elements in a word.
template <typename In>
struct Halves;

template <>
struct Halves<__half> {
  using Two = __half2;
  static __device__ __forceinline__ float2 floats(uint32_t word) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
  static __device__ __forceinline__ Two two(float value) { return __float2half2_rn(value); }
};

template <>
struct Halves<__nv_bfloat16> {
  using Two = __nv_bfloat162;
  static __device__ __forceinline__ float2 floats(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
  static __device__ __forceinline__ Two two(float value) { return __float2bfloat162_rn(value); }
};

// Sums and maxima of a thread's elements go in so many chains, or each operation would wait for the last.
constexpr int kChains = 4;

__device__ __forceinline__ float total(const float (&sums)[kChains]) {
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// The greatest of non-negative or NaN values over a warp: as unsigned integers, where NaN is above Inf.
__device__ __forceinline__ float warp_max(float value) {
  return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(value) & 0x7fffffffu));
}

// Reductions over one row's threads, the result in all of them. Every thread of the block must come along.
struct RowThreads {
  int warps;  // W
  int warp;   // of the row, 0 … W - 1
  int lane;
  int first;                    // the row's first warp within the block
  float (*partial)[kMaxWarps];  // [reductions so far][warp]: a place is written once, so one barrier each

  __device__ __forceinline__ float sum(float value) {
    value = warp_sum(value);
    if (warps == 1) return value;
    share(value);
    value = 0.f;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) value += (*partial)[first + w];
    ++partial;
    return value;
  }

  // The maximum of values that are not below 0, NaN where any is NaN.
  __device__ __forceinline__ float maximum(float value) {
    value = warp_max(value);
    if (warps == 1) return value;
    share(value);
    value = warp_max((*partial)[first + min(lane, warps - 1)]);
    ++partial;
    return value;
  }

  __device__ __forceinline__ void share(float value) {
    if (lane == 0) (*partial)[first + warp] = value;
    __syncthreads();
  }

  static __device__ __forceinline__ float max_nan(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
  }

  static __device__ __forceinline__ float max_nan(const float (&of)[kChains]) {
    return max_nan(max_nan(of[0], of[1]), max_nan(of[2], of[3]));
  }
};

// An address as the compiler should keep it: at constant distances from it are all that a thread reads or writes of a
// row. Left to itself it computes each of them anew, in 64 bits, under the condition that guards its use.
template <typename T>
__device__ __forceinline__ T* one_address(T* address) {
  asm("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
  return address;
}

// A row's elements as a thread holds them, 0 from K on. A warp has kVectors times 256 beside each other, and its lanes
// have four beside each other of either half: so every load of a warp, be it of float32 or of 16-bit numbers, is of one
// piece of memory.
template <int kVectors_, bool kVectorized_>
struct RowValues {
  static constexpr int kVectors = kVectors_;
  static constexpr bool kVectorized = kVectorized_;

  float x[kVectors][kVector];
  uint32_t row;
  int first;  // k(0, 0)
  int rest;   // K - first

  static __device__ constexpr int distance(int v, int i) {
    return v * (32 * kVector) + i / kQuad * (32 * kQuad) + i % kQuad;
  }
  // Where x[v][i] is in its row.
  __device__ __forceinline__ int k(int v, int i) const { return first + distance(v, i); }
  // Whether it is one of the K; of a quad all are or none, where rows are vectorized.
  __device__ __forceinline__ bool inside(int v, int i) const { return distance(v, i) < rest; }

  // body(v, i, values …) for this thread's elements, but those from K on, with the values of arrays of K.
  template <typename Body, typename... Arrays>
  __device__ __forceinline__ void with(Body&& body, const Arrays*... arrays) const {
    visit(body, one_address(arrays + first)...);
  }

 private:
  template <typename Body, typename... Arrays>
  __device__ __forceinline__ void visit(Body& body, const Arrays*... own) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; i += kVectorized ? kQuad : 1) {
        if (!inside(v, i)) continue;
        if constexpr (kVectorized) {
          visit_quad(v, i, body, quad(own + distance(v, i))...);
        } else {
          body(v, i, to_float(__ldg(own + distance(v, i)))...);
        }
      }
    }
  }

  static __device__ __forceinline__ float4 quad(const float* of) { return __ldg(reinterpret_cast<const float4*>(of)); }
  static __device__ __forceinline__ float4 quad(const __half* of) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(of));
    const float2 low = Halves<__half>::floats(words.x), high = Halves<__half>::floats(words.y);
    return make_float4(low.x, low.y, high.x, high.y);
  }

  template <typename Body, typename... Quads>
  static __device__ __forceinline__ void visit_quad(int v, int i, Body& body, Quads... quads) {
    body(v, i, quads.x...), body(v, i + 1, quads.y...), body(v, i + 2, quads.z...), body(v, i + 3, quads.w...);
  }
};

// FWHT of blocks of features, the butterfly of qvdit/method/operator.py to the bit: pairs (a, b) that lie h = 1, 2
// apart are in one quad, 4 … 64 in two lanes, 128 in a thread's two quads, 256 and 512 in two of its vectors.
template <typename Values>
__device__ __forceinline__ void walsh_hadamard(Values& values, int block, int lane) {
  static_assert(Values::kVectors == kRotatedVectors, "a warp must hold whole blocks");
  const auto within_vectors = [&](int apart) {
#pragma unroll
    for (int v = 0; v < kRotatedVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (!(i & apart)) add_and_subtract(values.x[v][i], values.x[v][i + apart]);
      }
    }
  };
#pragma unroll
  for (int apart = 1; apart < kQuad; apart *= 2) {
    if (apart >= block) return;
    within_vectors(apart);
  }
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    if (apart * kQuad >= block) return;
#pragma unroll
    for (int v = 0; v < kRotatedVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float other = __shfl_xor_sync(0xffffffffu, values.x[v][i], apart);
        values.x[v][i] = lane & apart ? __fsub_rn(other, values.x[v][i]) : __fadd_rn(values.x[v][i], other);
      }
    }
  }
  if (32 * kQuad >= block) return;
  within_vectors(kQuad);
#pragma unroll
  for (int apart = 1; apart < kRotatedVectors; apart *= 2) {
    if (apart * 32 * kVector >= block) return;
#pragma unroll
    for (int v = 0; v < kRotatedVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (!(v & apart)) add_and_subtract(values.x[v][i], values.x[v + apart][i]);
      }
    }
  }
}

// What happens to x before quantization. Each leaves the elements from K on 0.
struct Plain {
  template <typename Values>
  static __device__ __forceinline__ void apply(Values&, RowThreads&, const QuantizeParams&) {}
};

struct Gelu {
  // 0.5 x (1 + tanh u) = x / (1 + 2^e), e = -2 u / ln 2, u = √(2/π) (x + 0.044715 x³)
  template <typename Values>
  static __device__ __forceinline__ void apply(Values& values, RowThreads&, const QuantizeParams&) {
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float x = values.x[v][i];
        const float exponent = x * fmaf(-0.10294324f, x * x, -2.3022082f);
        float power, inverse;  // past the greatest float Inf, and 0
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
        values.x[v][i] = x * inverse;
      }
    }
  }
};

struct LayerNormModulate {
  // Two passes over the registers: the variance is that of x - mean, so it never cancels.
  template <typename Values>
  static __device__ __forceinline__ void apply(Values& values, RowThreads& threads, const QuantizeParams& params) {
    const qvdit_quantize_args& args = params.args;
    const float per_feature = 1.f / static_cast<float>(args.k);
    float sums[kChains] = {}, squares[kChains] = {};
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i % kChains] += values.x[v][i];
    }
    const float mean = threads.sum(total(sums)) * per_feature;
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values.x[v][i] -= values.inside(v, Values::kVectorized ? i / kQuad * kQuad : i) ? mean : 0.f;
        squares[i % kChains] += values.x[v][i] * values.x[v][i];
      }
    }
    const float deviation = rsqrtf(threads.sum(total(squares)) * per_feature + args.epsilon);
    const int64_t modulation = params.modulated.quotient(values.row) * args.modulation_stride;
    const float* const scales = args.modulation_scale + modulation;
    const float* const shifts = args.modulation_shift + modulation;
    if (args.modulation_scale && args.modulation_shift) {
      values.with([&](int v, int i, float scale,
                      float shift) { values.x[v][i] = fmaf(values.x[v][i], fmaf(deviation, scale, deviation), shift); },
                  scales, shifts);
      return;
    }
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values.x[v][i] *= deviation;
    }
    if (args.modulation_scale) {
      values.with([&](int v, int i, float scale) { values.x[v][i] *= 1.f + scale; }, scales);
    } else if (args.modulation_shift) {
      values.with([&](int v, int i, float shift) { values.x[v][i] += shift; }, shifts);
    }
  }
};

// A row's quantization grid: what x̃ is divided by, and how far its integers go.
struct RowGrid {
  float scale;               // NaN for a row with NaN or Inf in it
  float factor;              // of x̃ before it is divided: 1; or kShrink; or 0 where every integer is 0, from NaN too
  RoundingDivisor division;  // by scale · factor
  float zero;                // of x_q, before 128 is taken away
  float highest;             // x_q - zero is at most this

  // lowest: max(max -x̃, 0), highest: max(max x̃, 0), or both max |x̃| if symmetric; NaN if any x̃ is.
  template <bool kSymmetric>
  static __device__ __forceinline__ RowGrid of(float lowest, float highest, const QuantizeParams& params) {
    const bool bad = !(isfinite(lowest) && isfinite(highest));
    const float range = kSymmetric ? highest : __fadd_rn(highest, lowest);
    // The sum may overflow although both are finite; x̃ / Inf is then 0.
    const bool nothing = !isfinite(range);
    RowGrid grid;
    grid.scale = fmaxf(quotient_by_levels(range, params.levels, params.levels_reciprocal), kSmallestScale);
    if (nothing) grid.scale = bad ? __int_as_float(0x7fffffff) : range;
    grid.factor = nothing ? 0.f : RoundingDivisor::factor(grid.scale);
    if (!nothing) grid.division = RoundingDivisor(grid.scale * grid.factor);
    grid.zero =
        kSymmetric || nothing ? 0.f : grid.division.rounder_plus_quotient(lowest * grid.factor) - kRounder;
    // Symmetric: |x̃ / scale| <= 127 (1 + 2^-23) rounds to 127 at most. Asymmetric: both roundings may go up, to 256; at
    // the low end round(x̃ / scale) >= -zero, as rounding is monotone.
    grid.highest = params.levels - grid.zero;
    return grid;
  }
};

// A row's elements of 16 bits times its grid's factor, which is hardly ever not 1.
template <typename In, int kVectors>
__device__ __forceinline__ void multiply_halves(uint4 (&words)[kVectors], float factor) {
  if (factor == 1.f) return;
  const typename Halves<In>::Two factors = Halves<In>::two(factor);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    typename Halves<In>::Two(&pairs)[4] = reinterpret_cast<typename Halves<In>::Two(&)[4]>(words[v]);
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = factor == 0.f ? factors : __hmul2(pairs[j], factors);
  }
}

// A row's extremes, of rows that stay as they came, two elements of 16 bits a word. highest: max |x|, or max(max x, 0)
// and lowest: max(max -x, 0); NaN if any x is.
template <typename In, bool kSymmetric, int kVectors>
__device__ __forceinline__ void range_of_halves(const uint4 (&words)[kVectors], float& highest, float& lowest) {
  using Two = typename Halves<In>::Two;
  uint32_t most = 0, least = 0;
  Two& high = reinterpret_cast<Two&>(most);
  Two& low = reinterpret_cast<Two&>(least);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const uint32_t(&pairs)[4] = reinterpret_cast<const uint32_t(&)[4]>(words[v]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Two pair = reinterpret_cast<const Two&>(pairs[j]);
      high = __hmax2_nan(high, kSymmetric ? __habs2(pair) : pair);
      if constexpr (!kSymmetric) low = __hmin2_nan(low, pair);
    }
  }
  const float2 highs = Halves<In>::floats(most);
  highest = RowThreads::max_nan(highs.x, highs.y);
  if constexpr (!kSymmetric) {
    const float2 lows = Halves<In>::floats(least);
    lowest = RowThreads::max_nan(-lows.x, -lows.y);
  }
}

// The integers of eight such elements, as kRounder + x_q - zero.
template <typename In, bool kSymmetric>
__device__ __forceinline__ void integers_of_halves(const uint4& words, const RowGrid& grid, float (&q)[kVector]) {
  const uint32_t(&pairs)[4] = reinterpret_cast<const uint32_t(&)[4]>(words);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = Halves<In>::floats(pairs[j]);
    q[2 * j] = grid.division.rounder_plus_quotient(pair.x);
    q[2 * j + 1] = grid.division.rounder_plus_quotient(pair.y);
  }
  if constexpr (!kSymmetric) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) q[i] = fminf(q[i], kRounder + grid.highest);
  }
}

// Four integers kRounder + q as the bytes q.
__device__ __forceinline__ uint32_t pack_bytes(float a, float b, float c, float d) {
  const uint32_t low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
  const uint32_t high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

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
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + p * 512), "l"(from + p * (32 * kPiece))
                   : "memory");
    }
    asm volatile("cp.async.commit_group;");
  }

  __device__ __forceinline__ void read(float (&x)[kVectors][kVector]) const {
    asm volatile("cp.async.wait_all;" ::: "memory");
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
      highest = RowThreads::max_nan(highest, kSymmetric ? fabsf(values.x[v][i]) : values.x[v][i]);
      if constexpr (!kSymmetric) {
        float& lowest = lowests[i % kChains];
        lowest = RowThreads::max_nan(lowest, -values.x[v][i]);
      }
    }
  }
  const float highest = threads.maximum(RowThreads::max_nan(highests));
  const float lowest = kSymmetric ? 0.f : threads.maximum(RowThreads::max_nan(lowests));
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
  if (args.frame_gain && warp == 0 && lane < rank) {
    const uint32_t frame = params.frames.remainder(params.tokens.quotient(row));
    gain = __ldg(args.frame_gain + params.ranks.quotient(lane) * static_cast<uint32_t>(args.frames) + frame);
  }

  int8_t* const x_q = one_address(args.x_q + static_cast<int64_t>(row) * params.k_pad + values.first);
  const float stored_zero = kSymmetric ? 0.f : grid.zero - 128.f;
  const uint32_t zero_bytes = (static_cast<uint32_t>(static_cast<int>(stored_zero)) & 0xff) * 0x01010101u;
  int sum = 0;  // of what is stored
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float(&centred)[kVector] = values.x[v];  // from here on kRounder + x_q - zero
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

// Bytes of dynamic shared memory that a kernel may ask for on the current device, beside what it declares: 99 KB a
// block in all on sm_86, 89 and 120, 163 on 80 and 87, 227 on 90 and 100. 0 where CUDA does not tell; resident_blocks
// then says why.
int dynamic_shared_limit(const void* kernel);

// How many blocks of a kernel run at once on the current device; lets it have the most shared memory it may ask for.
int32_t resident_blocks(const void* kernel, int threads, int shared, int most_shared, int& blocks);

// What so many warps of so many vectors a thread cost. Beside its vectors a warp has to find maxima and scales, which
// takes as long as two of them.
constexpr int64_t warps_cost(int64_t warps, int vectors) {
  constexpr int kOverhead = 2;
  return warps * (vectors + kOverhead);
}

// Vectors a thread, of those that a kernel has: what costs a row's warps least.
inline int vectors_per_thread(int64_t k_pad, std::initializer_list<int> candidates) {
  int best = 0;
  int64_t least = 0;
  for (int candidate : candidates) {
    const int64_t held = 32 * candidate * kVector, warps = (k_pad + held - 1) / held;
    if (warps > kMaxWarps) continue;
    const int64_t cost = warps_cost(warps, candidate);
    if (best == 0 || cost < least) best = candidate, least = cost;
  }
  return best;
}

template <typename In, typename Prologue, int kVectors, bool kVectorized>
int32_t launch_quantize(const QuantizeParams& params, cudaStream_t stream) {
  const auto kernel = params.args.symmetric ? quantize_rows_kernel<In, Prologue, kVectors, kVectorized, true>
                                            : quantize_rows_kernel<In, Prologue, kVectors, kVectorized, false>;
  constexpr int kWarpsWanted = 4;  // a block: enough blocks fit a multiprocessor at any number of rows
  const int slots = 32 * kVectors * kVector;
  const int warps = static_cast<int>((params.k_pad + slots - 1) / slots);
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

// One file each, so that they compile beside each other. Of 16-bit rows as they are: quantize_f16 and quantize_bf16 up
// to rank 1, quantize_groups of higher ranks, where they fit.
int32_t quantize_plain(const QuantizeParams& params, cudaStream_t stream);
int32_t quantize_layernorm(const QuantizeParams& params, cudaStream_t stream);
int32_t quantize_gelu(const QuantizeParams& params, cudaStream_t stream);
int32_t quantize_f16(const QuantizeParams& params, cudaStream_t stream);
int32_t quantize_bf16(const QuantizeParams& params, cudaStream_t stream);
int32_t quantize_groups(const QuantizeParams& params, bool& fits, cudaStream_t stream);

}  // namespace qvdit
