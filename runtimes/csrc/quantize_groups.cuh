// Per-token quantization of 16-bit rows as they are, with a low-rank term of rank 2 and more: the term is an int8
// product of the tensor cores, which costs next to nothing. Rows come in groups of 8, 4 or 2, in the registers of
// one to sixteen warps.
//
//   device memory: 3 bytes an element, plus 4 + 4 R bytes a row.
//   instructions, an element: about 1 (convert) + 0.5 (range) + 4 (quotient) + 1 (pack, store), + 1 where asymmetric,
//   and 0.25 for every four ranks in groups of eight rows, for every rank in groups of two.
//   µs for 32768 rows of bf16 at rank 4 on an H200 (2026-11-28), with float32 products in the registers, and so:
//   K = 1152: 49, 42 | 3072: 136, 107 | 4608: 206, 138 | 5120: 236, 161. Splitting alpha costs each block some µs:
//   quantize.cu leaves few rows to the other kernel.
//
// A warp's lanes are those of the column operand of mma.m16n8k32: lane 4 c + t holds 8 elements of column c, beside
// those of the lanes t of the same c. The 8 columns are the group's rows, or, where it has fewer, rows times parts of
// them. Which of a column's 32 elements the product takes first does not matter.
//
// The next rows come while these are computed: to shared memory, or, where alpha leaves no room for them there (four
// ranks of K = 12288), to registers of a single group a multiprocessor.
//
// alpha enters as integers of 32 bits, alpha ≈ q step with |q| <= 2^30, split into four signed bytes; so
// Σ (x_q - zero) q is exact, and does not depend on the order of its terms. The bytes are 16 rows of the other operand:
// four ranks of one segment, or one rank of four segments. They are made once a block.
//
//   grid: as many blocks as run at once, each group goes on to further rows; a block is 32 W threads x groups.
#pragma once

#include <algorithm>

#include "quantize_rows.cuh"

namespace qvdit {

constexpr int kColumns = 8;              // of the product, a warp's
constexpr int kColumnLanes = 4;          // hold a column's
constexpr int kSegment = 32;             // elements of a column
constexpr int kDigits = 4;               // bytes of alpha's integers
constexpr int kSlots = 4;                // times digits: rows of the product
constexpr float kAlphaLevels = 1 << 30;  // of alpha's integers; the top digit is at most 64
constexpr int kTileBytes = 32 * 16;      // a warp's operand of 16 x 32 bytes, 16 of them a lane's
constexpr int kMaxGroups = kMaxWarps;    // a block
constexpr int kUnstagedVectors = 8;      // a thread's, where the next rows wait in registers
constexpr int kUnstagedRegisters = 160;  // which leave as many warps
constexpr int kMaxUnstagedWarps = 12;
constexpr int kMinUnstagedWarps = 8;  // of the one group on a multiprocessor: fewer would wait too long for each other
static_assert(kMaxUnstagedWarps * 32 * kUnstagedRegisters <= 1 << 16);

// How rows lie in warps.
struct GroupShape {
  int log2_rows;  // of a group: 8, 4 or 2
  int warps;      // of a group

  __host__ __device__ int rows() const { return 1 << log2_rows; }
  __host__ __device__ int log2_segments() const { return 3 - log2_rows; }
  __host__ __device__ int segments() const { return 1 << log2_segments(); }
  // Products of 16 x 8 for every 8 columns of 32 elements.
  __host__ __device__ int sets(int rank) const { return (rank * segments() + kSlots - 1) / kSlots; }
  // Bytes of shared memory: alpha's digits, for all groups; a group's sums of the low-rank term in two iterations.
  __host__ __device__ int alpha_bytes(int rank, int vectors) const { return sets(rank) * warps * vectors * kTileBytes; }
  __host__ __device__ int sum_bytes(int rank) const { return 2 * rank * rows() * kDigits * 4; }
};

// A group's elements as a thread holds them: vector v is at k(v) … k(v) + 7 of its row, 0 from K on; two a word, as
// they came.
template <typename In, int kVectors>
struct GroupValues {
  uint4 words[kVectors];
  int first;  // k(0)

  __device__ __forceinline__ int k(int v) const { return first + v * kSegment; }

  __device__ __forceinline__ void read(const uint4* staged, int features) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      words[v] = make_uint4(0, 0, 0, 0);
      if (k(v) < features) words[v] = staged[v * 32];
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) words[v] = make_uint4(0, 0, 0, 0);
  }
};

// Where the threads of a group meet. Of two warps and more a block has eight groups at most; with the barrier's number
// in a register a kernel would be counted as having all sixteen, and one block alone would fit a multiprocessor of
// sm_110 and 120, four one of sm_90.
__device__ __forceinline__ void barrier(int group, int threads) {
  switch (group) {
    case 0:
      asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
      break;
    case 1:
      asm volatile("bar.sync 2, %0;" ::"r"(threads) : "memory");
      break;
    case 2:
      asm volatile("bar.sync 3, %0;" ::"r"(threads) : "memory");
      break;
    case 3:
      asm volatile("bar.sync 4, %0;" ::"r"(threads) : "memory");
      break;
    case 4:
      asm volatile("bar.sync 5, %0;" ::"r"(threads) : "memory");
      break;
    case 5:
      asm volatile("bar.sync 6, %0;" ::"r"(threads) : "memory");
      break;
    case 6:
      asm volatile("bar.sync 7, %0;" ::"r"(threads) : "memory");
      break;
    default:
      asm volatile("bar.sync 8, %0;" ::"r"(threads) : "memory");
  }
}

// A group's threads. Each has one of its rows.
struct GroupThreads {
  GroupShape shape;
  int group, warp, lane;  // of the block, of the group, of the warp

  __device__ __forceinline__ int column() const { return lane / kColumnLanes; }
  __device__ __forceinline__ int row() const { return column() & (shape.rows() - 1); }
  __device__ __forceinline__ int segment() const { return column() >> shape.log2_rows; }
  // One lane for each row of the group.
  __device__ __forceinline__ bool first_of_row() const { return lane % kColumnLanes == 0 && column() < shape.rows(); }

  __device__ __forceinline__ void meet() const {
    if (shape.warps == 1) {
      __syncwarp();
    } else {
      barrier(group, 32 * shape.warps);
    }
  }

  // The maximum over the lanes of one row, in all of them.
  __device__ __forceinline__ float warp_max(float value) const {
    value = RowThreads::max_nan(value, __shfl_xor_sync(0xffffffffu, value, 1));
    value = RowThreads::max_nan(value, __shfl_xor_sync(0xffffffffu, value, 2));
    for (int apart = kColumnLanes << shape.log2_rows; apart < 32; apart *= 2) {
      value = RowThreads::max_nan(value, __shfl_xor_sync(0xffffffffu, value, apart));
    }
    return value;
  }
};

// What the threads of a group tell each other. Scales and sums are read one iteration later.
struct GroupShared {
  uint32_t range[3][2][kColumns];  // [iteration mod 3][highest, lowest][row], bits of floats >= 0
  float scale[2][kColumns];        // [iteration mod 2][row]
  int zero[2][kColumns];
  int row_sum[2][kColumns];
};

// What a block knows of alpha.
struct AlphaShared {
  uint32_t most[kMaxRank];           // bits of max |alpha|, by rank
  float step[kMaxRank];              // alpha's integers times this are alpha; NaN where any alpha is no number
  int digit_sum[kMaxRank][kDigits];  // Σ_k of the digits
};

// round(x), of magnitude 2^30 at most, as Σ_i digit[i] 256^i with digits from -128 to 127: each but the highest is a
// byte of the sum with 128 in its place, less 128.
__device__ __forceinline__ uint32_t signed_digits(float x) {
  constexpr uint32_t kHalves = 0x00808080u;
  return (static_cast<uint32_t>(__float2int_rn(x)) + kHalves) ^ kHalves;
}

// alpha as digits, in the order in which the product takes them. Everybody of the block comes along.
template <bool kSymmetric, int kVectors>
__device__ __forceinline__ void split_alpha(const qvdit_quantize_args& args, const GroupShape& shape, uint32_t* digits,
                                            AlphaShared& shared) {
  const int features = static_cast<int>(args.k), rank = static_cast<int>(args.rank);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int i = thread; i < rank * kDigits; i += threads) {
    shared.digit_sum[i / kDigits][i % kDigits] = 0;
    if (i % kDigits == 0) shared.most[i / kDigits] = 0;
  }
  __syncthreads();
  // Four loads on their way at once: a block has a few of them for each thread, and waits for memory.
  const auto for_all = [&](const float* alpha, auto&& use) {
    for (int first = 4 * thread; first < features; first += 4 * 4 * threads) {
      float4 loaded[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = first + 4 * i * threads;
        loaded[i] = k < features ? __ldg(reinterpret_cast<const float4*>(alpha + k)) : make_float4(0.f, 0.f, 0.f, 0.f);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + 4 * i * threads < features) use(first + 4 * i * threads, loaded[i]);
      }
    }
  };
  for (int r = 0; r < rank; ++r) {
    float most = 0.f;
    for_all(args.alpha + static_cast<int64_t>(r) * features, [&](int, const float4& four) {
      most = RowThreads::max_nan(RowThreads::max_nan(most, fabsf(four.x)), fabsf(four.y));
      most = RowThreads::max_nan(RowThreads::max_nan(most, fabsf(four.z)), fabsf(four.w));
    });
    const uint32_t whole = __reduce_max_sync(0xffffffffu, __float_as_uint(most) & 0x7fffffffu);  // NaN is above Inf
    if (thread % 32 == 0) atomicMax(&shared.most[r], whole);
  }
  __syncthreads();
  const int sets = shape.sets(rank);
  for (int r = 0; r < rank; ++r) {
    // Far below what float32 tells apart from 0 in a product the integers have fewer bits, lest the factor overflow.
    const float most = __uint_as_float(shared.most[r]), factor = fminf(__fdiv_rn(kAlphaLevels, most), 0x1p126f);
    if (thread == 0) shared.step[r] = isfinite(most) ? __frcp_rn(factor) : __int_as_float(0x7fffffff);
    int sums[kDigits] = {};
    for_all(args.alpha + static_cast<int64_t>(r) * features, [&](int k, const float4& four) {
      const uint32_t a = signed_digits(four.x * factor), b = signed_digits(four.y * factor);
      const uint32_t c = signed_digits(four.z * factor), d = signed_digits(four.w * factor);
      // The same digit of the four beside each other.
      const uint32_t low_ab = __byte_perm(a, b, 0x5140), low_cd = __byte_perm(c, d, 0x5140);
      const uint32_t high_ab = __byte_perm(a, b, 0x7362), high_cd = __byte_perm(c, d, 0x7362);
      const uint32_t words[kDigits] = {__byte_perm(low_ab, low_cd, 0x5410), __byte_perm(low_ab, low_cd, 0x7632),
                                       __byte_perm(high_ab, high_cd, 0x5410), __byte_perm(high_ab, high_cd, 0x7632)};
      if constexpr (!kSymmetric) {
#pragma unroll
        for (int digit = 0; digit < kDigits; ++digit) {
          sums[digit] = __dp4a(static_cast<int>(words[digit]), 0x01010101, sums[digit]);
        }
      }
      // These four are half of what a lane holds of vector v of a segment.
      const int v = k / kSegment % kVectors, whole = k / (kSegment * kVectors), upper = k % kVector / 4;
      const int segment = whole & (shape.segments() - 1), warp = whole >> shape.log2_segments();
      const int lane = k % kSegment / kVector, slot = (r << shape.log2_segments()) + segment;
      uint32_t* tile = digits + ((warp * kVectors + v) * sets + slot / kSlots) * (kTileBytes / 4);
      // Row kDigits · slot + i of the product has an eighth of the lanes, and half of their words.
#pragma unroll
      for (int i = 0; i < kDigits; ++i) {
        const int row = kDigits * (slot % kSlots) + i;
        tile[(row % 8 * kColumnLanes + lane) * 4 + row / 8 + 2 * upper] = words[i];
      }
    });
    if constexpr (!kSymmetric) {
#pragma unroll
      for (int d = 0; d < kDigits; ++d) {
        const int whole = __reduce_add_sync(0xffffffffu, sums[d]);
        if (thread % 32 == 0) atomicAdd(&shared.digit_sum[r][d], whole);
      }
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void multiply_add(int (&sums)[4], const uint4& a, const uint2& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// Bytes of shared memory that a group has for itself.
__host__ __device__ inline int group_bytes(const GroupShape& shape, int rank, int vectors, bool staged) {
  return static_cast<int>(sizeof(GroupShared)) + shape.sum_bytes(rank) + (staged ? shape.warps * vectors * 32 * 16 : 0);
}

template <typename In, int kVectors, bool kSymmetric, bool kStaged>
__global__ void __maxnreg__(kStaged ? 96 : kUnstagedRegisters)
    quantize_groups_kernel(const __grid_constant__ QuantizeParams params, const __grid_constant__ GroupShape shape) {
  let_next_kernel_start();
  extern __shared__ uint4 dynamic[];  // alpha's digits, and for every group: GroupShared, products, the next rows
  __shared__ AlphaShared alpha;
  const qvdit_quantize_args& args = params.args;
  const int features = static_cast<int>(args.k), rank = static_cast<int>(args.rank);
  const int group = threadIdx.y, warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const GroupThreads threads{shape, group, warp, lane};
  const int row_in_group = threads.row();
  char* const of_group = reinterpret_cast<char*>(dynamic) + shape.alpha_bytes(rank, kVectors) +
                         group * group_bytes(shape, rank, kVectors, kStaged);
  GroupShared& shared = *reinterpret_cast<GroupShared*>(of_group);
  int* const products = reinterpret_cast<int*>(of_group + sizeof(GroupShared));  // [iteration mod 2][row][rank][digit]
  uint4* const own =
      reinterpret_cast<uint4*>(of_group + sizeof(GroupShared) + shape.sum_bytes(rank)) + warp * (kVectors * 32) + lane;
  const uint4* const digits = dynamic + warp * kVectors * shape.sets(rank) * 32 + lane;

  GroupValues<In, kVectors> values;
  values.first = (warp * shape.segments() + threads.segment()) * (kVectors * kSegment) + lane % kColumnLanes * kVector;

  const uint32_t rows = static_cast<uint32_t>(args.m), step = gridDim.x * blockDim.y * shape.rows();
  const uint32_t start = (blockIdx.x * blockDim.y + group) * shape.rows();
  const In* const own_x = static_cast<const In*>(args.x) + values.first;
  const uint32_t staging = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  uint4 next[kStaged ? 1 : kVectors] = {};
  // The next rows on their way to where they wait: a thread's own vectors, which it alone reads back.
  const auto fetch = [&](uint32_t first) {
    const In* from = own_x + static_cast<int64_t>(min(first + row_in_group, rows - 1)) * features;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (values.k(v) >= features) continue;
      if constexpr (kStaged) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(staging + v * 512), "l"(from + v * kSegment)
                     : "memory");
      } else {
        next[v] = __ldg(reinterpret_cast<const uint4*>(from + v * kSegment));
      }
    }
    if constexpr (kStaged) asm volatile("cp.async.commit_group;");
  };

  // What a group's threads summed up, put together by its first warp: one iteration later, so that one meeting serves
  // both. Whoever reads a sum clears it for the iteration after the next.
  const auto finish = [&](uint32_t first, int of) {
    if (warp != 0) return;
    for (int i = lane; i < rank << shape.log2_rows; i += 32) {
      const int r = i >> shape.log2_rows, in_group = i & (shape.rows() - 1);
      int4& sums = reinterpret_cast<int4*>(products)[(of * shape.rows() + in_group) * rank + r];
      int4 found = sums;
      sums = make_int4(0, 0, 0, 0);
      if constexpr (!kSymmetric) {
        const int zero = shared.zero[of][in_group];
        const int(&digit_sum)[kDigits] = alpha.digit_sum[r];
        found.x -= zero * digit_sum[0], found.y -= zero * digit_sum[1];
        found.z -= zero * digit_sum[2], found.w -= zero * digit_sum[3];
      }
      const int64_t sum = found.x + (static_cast<int64_t>(found.y) << 8) + (static_cast<int64_t>(found.z) << 16) +
                          (static_cast<int64_t>(found.w) << 24);
      const uint32_t row = first + in_group;
      if (row >= rows) continue;
      float u = shared.scale[of][in_group] * (static_cast<float>(sum) * alpha.step[r]);
      if (args.frame_gain) {
        const uint32_t frame = params.frames.remainder(params.tokens.quotient(row));
        u *= __ldg(args.frame_gain + params.ranks.quotient(r) * static_cast<uint32_t>(args.frames) + frame);
      }
      args.u[static_cast<int64_t>(r) * args.m + row] = u;
    }
    if (args.row_sum && lane < shape.rows()) {
      int& sum = shared.row_sum[of][lane];
      const uint32_t row = first + lane;
      if (row < rows) args.row_sum[row] = sum - features * shared.zero[of][lane];
      sum = 0;
    }
  };

  if (start < rows) fetch(start);
  for (int i = threadIdx.x; i < 2 * rank * shape.rows() * kDigits; i += blockDim.x) products[i] = 0;
  for (int i = threadIdx.x; i < 3 * 2 * kColumns; i += blockDim.x) (&shared.range[0][0][0])[i] = 0;
  if (threadIdx.x < 2 * kColumns) (&shared.row_sum[0][0])[threadIdx.x] = 0;
  split_alpha<kSymmetric, kVectors>(args, shape, reinterpret_cast<uint32_t*>(dynamic), alpha);
  if (start >= rows) return;

  int turn = 0, of = 0;  // iterations mod 3 and 2
  uint32_t first = start;
#pragma unroll 1
  for (;; first += step) {
    if constexpr (kStaged) asm volatile("cp.async.wait_all;" ::: "memory");
    // Else what follows from it is computed once, before the loop, and kept in more registers than there are.
    asm volatile("" : "+r"(values.first));
    if constexpr (kStaged) {
      values.read(own, features);
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) values.words[v] = next[v];
    }
    const bool more = rows - first > step;
    if (more) fetch(first + step);

    // Each of a group's warps raises its rows' extremes, as unsigned integers, where NaN is above Inf.
    uint32_t(&extremes)[2][kColumns] = shared.range[turn];
    float highest = 0.f, lowest = 0.f;
    range_of_halves<In, kSymmetric>(values.words, highest, lowest);
    highest = threads.warp_max(highest);
    if constexpr (!kSymmetric) lowest = threads.warp_max(lowest);
    if (threads.first_of_row()) {
      atomicMax(&extremes[0][row_in_group], __float_as_uint(highest) & 0x7fffffffu);
      if constexpr (!kSymmetric) atomicMax(&extremes[1][row_in_group], __float_as_uint(lowest) & 0x7fffffffu);
    }
    threads.meet();
    highest = __uint_as_float(extremes[0][row_in_group]);
    if constexpr (!kSymmetric) lowest = __uint_as_float(extremes[1][row_in_group]);
    // Of the iteration before, which all have read; raised again after the next meeting.
    if (warp == 0 && lane < 2 * kColumns) (&shared.range[turn == 0 ? 2 : turn - 1][0][0])[lane] = 0;
    if (first != start) finish(first - step, of ^ 1);

    const uint32_t row = first + row_in_group;
    const RowGrid grid = RowGrid::of<kSymmetric>(lowest, highest, params.levels);
    const int stored_zero = kSymmetric ? 0 : static_cast<int>(grid.zero - 128.f);
    if (warp == 0 && threads.first_of_row()) {
      shared.scale[of][row_in_group] = grid.scale;
      shared.zero[of][row_in_group] = stored_zero;
      if (row < rows) {
        args.scale[row] = grid.scale;
        if (args.zero) args.zero[row] = stored_zero;
      }
    }
    if (grid.divisor == 0.f) values.clear();  // no integers: neither from NaN nor from Inf

    int8_t* const x_q = args.x_q + static_cast<int64_t>(row) * params.k_pad + values.first;
    const uint32_t zero_bytes = (static_cast<uint32_t>(stored_zero) & 0xff) * 0x01010101u;
    uint2 bytes[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float q[kVector];
      integers_of_halves<In, kSymmetric>(values.words[v], grid, q);
      bytes[v] = {pack_bytes(q[0], q[1], q[2], q[3]), pack_bytes(q[4], q[5], q[6], q[7])};
      if constexpr (!kSymmetric) {  // where symmetric, what lies past the features is 0 already
        const uint32_t inside = values.k(v) < features ? ~0u : 0u;
        bytes[v].x = __vadd4(bytes[v].x, zero_bytes) & inside, bytes[v].y = __vadd4(bytes[v].y, zero_bytes) & inside;
      }
      if (row < rows && values.k(v) < params.k_pad) *reinterpret_cast<uint2*>(x_q + v * kSegment) = bytes[v];
    }
    if (args.row_sum) {
      int sum = 0;  // of what is stored
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        sum = __dp4a(static_cast<int>(bytes[v].x), 0x01010101, __dp4a(static_cast<int>(bytes[v].y), 0x01010101, sum));
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane % kColumnLanes == 0) atomicAdd(&shared.row_sum[of][row_in_group], sum);
    }
#pragma unroll 1
    for (int set = 0, sets = shape.sets(rank); set < sets; ++set) {
      // Of a single group's products two in turns, or each would wait for the last: 450 µs for 478 of 32768 x 12288.
      int sums[4] = {}, others[4] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        multiply_add(!kStaged && v % 2 ? others : sums, digits[(v * sets + set) * 32], bytes[v]);
      }
      // sums[i] is of row (lane / 4 + 8 (i / 2)) and column 2 (lane % 4) + i % 2 of the product.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 2 * (lane % 4) + i % 2;
        const int slot = kSlots * set + lane / 16 + 2 * (i / 2), digit = lane / 4 % kDigits;
        const int r = slot >> shape.log2_segments(), in_group = column & (shape.rows() - 1);
        if (r < rank && (slot & (shape.segments() - 1)) == column >> shape.log2_rows) {
          atomicAdd(&products[((of * shape.rows() + in_group) * rank + r) * kDigits + digit],
                    kStaged ? sums[i] : sums[i] + others[i]);
        }
      }
    }
    turn = turn == 2 ? 0 : turn + 1, of ^= 1;
    if (!more) break;
  }
  threads.meet();
  finish(first, of ^ 1);
}

// Vectors a thread and rows a group: what leaves the fewest threads without work and fits, at eight warps a group or
// fewer where that is possible and many groups fit; of equals the most rows. vectors is 0 where nothing fits.
struct GroupPlan {
  int vectors = 0;
  GroupShape shape = {};
};

inline GroupPlan plan_groups(int64_t k_pad, int rank, bool staged, int shared_limit) {
  GroupPlan best;
  int64_t least = 0;
  for (int log2_rows = 3; log2_rows >= 1; --log2_rows) {
    const int64_t elements = kSegment * (kColumns >> log2_rows);  // of a warp's vectors in one row
    for (int vectors : {10, 9, 8}) {
      if (!staged && vectors != kUnstagedVectors) continue;
      const int64_t warps = (k_pad + elements * vectors - 1) / (elements * vectors);
      const GroupShape shape{log2_rows, static_cast<int>(warps)};
      const int shared = shape.alpha_bytes(rank, vectors) + group_bytes(shape, rank, vectors, staged);
      const bool suits = staged ? warps <= kMaxWarps : warps >= kMinUnstagedWarps && warps <= kMaxUnstagedWarps;
      if (!suits || shared > shared_limit) continue;
      // Where alpha takes most of what there is, few groups fit, and their warps are all that hide each other's
      // waiting.
      const bool alone = 2 * shape.alpha_bytes(rank, vectors) > shared_limit;
      const int64_t slots = warps * vectors * elements * ((alone ? warps < 10 : warps > 8) ? 2 : 1);
      if (best.vectors == 0 || slots < least) best = {vectors, shape}, least = slots;
    }
  }
  return best;
}

// How many groups a block should have, so that with one alpha in shared memory for all of them as many warps as
// possible run on a multiprocessor at once; 0 where CUDA does not tell. staging: bytes of a group.
int groups_a_block(const void* kernel, int warps, int most_groups, int staging, int alpha);

template <typename In, int kVectors, bool kSymmetric, bool kStaged>
int32_t launch_groups(const QuantizeParams& params, const GroupShape& shape, cudaStream_t stream) {
  constexpr int64_t kBlocksWanted = 2 * 132;  // as many rows a block as leave these
  const auto kernel = quantize_groups_kernel<In, kVectors, kSymmetric, kStaged>;
  const auto entry = reinterpret_cast<const void*>(kernel);
  const int rank = static_cast<int>(params.args.rank), rows = shape.rows();
  const int alpha = shape.alpha_bytes(rank, kVectors), own = group_bytes(shape, rank, kVectors, kStaged);
  const int most = static_cast<int>(std::clamp<int64_t>(params.args.m / (rows * kBlocksWanted), 1, kMaxGroups));
  const int groups = std::max(groups_a_block(entry, shape.warps, most, own, alpha), 1), shared = groups * own + alpha;
  int resident = 0;
  if (const int32_t status =
          resident_blocks(entry, 32 * shape.warps * groups, shared, dynamic_shared_limit(entry), resident)) {
    return status;
  }
  const int64_t blocks = (params.args.m + groups * rows - 1) / (groups * rows);
  kernel<<<static_cast<unsigned>(blocks < resident ? blocks : resident), dim3(32 * shape.warps, groups), shared,
           stream>>>(params, shape);
  return launched("quantize_rows");
}

template <typename In, int kVectors, bool kStaged = true>
int32_t launch_groups(const QuantizeParams& params, const GroupShape& shape, cudaStream_t stream) {
  return params.args.symmetric ? launch_groups<In, kVectors, true, kStaged>(params, shape, stream)
                               : launch_groups<In, kVectors, false, kStaged>(params, shape, stream);
}

// fits: whether the low-rank term does; nothing was started where it does not.
template <typename In>
int32_t launch_groups(const QuantizeParams& params, bool& fits, cudaStream_t stream) {
  const int limit = dynamic_shared_limit(reinterpret_cast<const void*>(quantize_groups_kernel<In, 8, true, true>));
  const int rank = static_cast<int>(params.args.rank);
  const GroupPlan plan = plan_groups(params.k_pad, rank, true, limit);
  fits = plan.vectors > 0;
  switch (plan.vectors) {
    case 0: {
      const GroupPlan unstaged = plan_groups(params.k_pad, rank, false, limit);
      fits = unstaged.vectors > 0;
      return fits ? launch_groups<In, kUnstagedVectors, false>(params, unstaged.shape, stream) : QVDIT_OK;
    }
    case 8:
      return launch_groups<In, 8>(params, plan.shape, stream);
    case 9:
      return launch_groups<In, 9>(params, plan.shape, stream);
    default:
      return launch_groups<In, 10>(params, plan.shape, stream);
  }
}

}  // namespace qvdit
