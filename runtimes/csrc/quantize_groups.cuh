// Per-token quantization of 16-bit rows as they are, with a low-rank term of rank 2 and more: the term is a float16
// product of the tensor cores, which costs next to nothing. Rows come in groups of 8, 4 or 2, in the registers of
// one to sixteen warps.
//
//   device memory: 3 bytes an element, plus 4 + 4 R bytes a row.
//   instructions, an element: about 1 (convert) + 0.5 (range) + 4 (quotient) + 1 (pack, store) + 1.5 (float16), + 1
//   where asymmetric, and 0.25 for every four ranks in groups of eight rows, for every rank in groups of two.
//
// A warp's lanes are those of the row operand of mma.m16n8k16: lane 4 c + t holds 8 elements of line c, beside those of
// the lanes t of the same c; four enter the product in its row c, four in row c + 8. The 8 lines are the group's rows,
// or, where it has fewer, rows times parts of them. Which of a line's elements the product takes first does not matter.
// Its 8 columns are four slots, each a rank of one segment, times the two halves of a lane's elements.
//
// x_q - zero is a number of float16, and so is alpha as layers hold it: their products are exact, and are summed up in
// float32, in an order that depends on K, the rank and the GPU, not on how many rows there are. Where any alpha is no
// such number, all of the term is float32 products. alpha becomes float16 once a block.
//
// The next rows come to shared memory while these are computed.
//
//   grid: as many blocks as run at once, each group goes on to further rows; a block is 32 W threads x groups.
#pragma once

#include <algorithm>

#include "quantize_rows.cuh"

namespace qvdit {

constexpr int kLines = 8;              // of the product, a warp's: rows times segments
constexpr int kLineLanes = 4;          // hold a line's
constexpr int kSegment = 32;           // elements of a line, in a vector
constexpr int kSlots = 4;              // of a product
constexpr int kMaxGroups = kMaxWarps;  // a block

// How rows lie in warps.
struct GroupShape {
  int log2_rows;  // of a group: 8, 4 or 2
  int warps;      // of a group

  __host__ __device__ int rows() const { return 1 << log2_rows; }
  __host__ __device__ int log2_segments() const { return 3 - log2_rows; }
  __host__ __device__ int segments() const { return 1 << log2_segments(); }
  // Pieces of a row, one of each warp and segment.
  __host__ __device__ int pieces() const { return warps << log2_segments(); }
  // Products for every vector of a warp.
  __host__ __device__ int sets(int rank) const { return (rank * segments() + kSlots - 1) / kSlots; }
  // Bytes of shared memory: a rank's alpha, for all groups; a group's parts of the low-rank term in two iterations.
  __host__ __device__ int rank_bytes(int vectors) const { return odd_lines(pieces() * piece_bytes(vectors)); }
  __host__ __device__ int alpha_bytes(int rank, int vectors) const { return rank * rank_bytes(vectors); }
  __host__ __device__ int sum_bytes(int rank) const { return 2 * pieces() * rank * rows() * 4; }

  // alpha of a piece. What lanes read at once is 64 bytes of two slots, in banks of their own.
  static __host__ __device__ constexpr int piece_bytes(int vectors) { return odd_lines(vectors * kSegment * 2); }
  static __host__ __device__ constexpr int odd_lines(int bytes) { return bytes | 64; }
};

__device__ __forceinline__ uint32_t half_pair(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ float line_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

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

  // Instead of vector v its integers q - kRounder as float16, in the order of the product's operand: rows c and c + 8
  // in turns.
  __device__ __forceinline__ void keep_integers(int v, const float (&q)[kVector]) {
    const auto pair = [&](int i) {
      const uint32_t halves = __byte_perm(__float_as_uint(q[i]), __float_as_uint(q[i + 1]), 0x5410);
      const __half2 integers = __hsub2(reinterpret_cast<const __half2&>(halves), __float2half2_rn(kHalfRounder));
      return reinterpret_cast<const uint32_t&>(integers);
    };
    words[v] = make_uint4(pair(0), pair(4), pair(2), pair(6));
  }

  // Σ of such integers, over the lanes of a line; four of them are at most 1020, which float16 holds.
  __device__ __forceinline__ int sum() const {
    float sum = 0.f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const __half2(&pairs)[4] = reinterpret_cast<const __half2(&)[4]>(words[v]);
      const float2 of_pairs = __half22float2(__hadd2(__hadd2(pairs[0], pairs[1]), __hadd2(pairs[2], pairs[3])));
      sum += of_pairs.x + of_pairs.y;
    }
    return static_cast<int>(line_sum(sum));
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

  __device__ __forceinline__ int line() const { return lane / kLineLanes; }
  __device__ __forceinline__ int row() const { return line() & (shape.rows() - 1); }
  __device__ __forceinline__ int segment() const { return line() >> shape.log2_rows; }
  // One lane for each row of the group.
  __device__ __forceinline__ bool first_of_row() const { return lane % kLineLanes == 0 && line() < shape.rows(); }

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
    for (int apart = kLineLanes << shape.log2_rows; apart < 32; apart *= 2) {
      value = RowThreads::max_nan(value, __shfl_xor_sync(0xffffffffu, value, apart));
    }
    return value;
  }
};

// What the threads of a group tell each other. Scales and sums are read one iteration later.
struct GroupShared {
  uint32_t range[3][2][kLines];  // [iteration mod 3][highest, lowest][row], bits of floats >= 0
  float scale[2][kLines];        // [iteration mod 2][row]
  int row_sum[2][kLines];
};

// alpha as float16, piece by piece, 0 from K on; whether it is that. Everybody of the block comes along.
template <int kVectors>
__device__ __forceinline__ bool halve_alpha(const qvdit_quantize_args& args, const GroupShape& shape, char* to) {
  constexpr int kPiece = kVectors * kSegment / kVector;  // vectors
  constexpr int kAtOnce = 4;                             // ranks: a thread has few loads, and waits for memory
  const int features = static_cast<int>(args.k), rank = static_cast<int>(args.rank);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  bool same = true;
  for (int i = thread; i < shape.pieces() * kPiece; i += threads) {
    const int piece = i / kPiece, k = i * kVector;
    char* const at = to + piece * GroupShape::piece_bytes(kVectors) + i % kPiece * 16;
    for (int first = 0; first < rank; first += kAtOnce) {
      float4 eight[kAtOnce][2];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* const from = args.alpha + static_cast<int64_t>(first + r) * features + k + 4 * half;
          eight[r][half] = first + r < rank && k < features ? __ldg(reinterpret_cast<const float4*>(from))
                                                            : make_float4(0.f, 0.f, 0.f, 0.f);
        }
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (first + r >= rank) break;
        uint32_t words[4];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const float4& four = eight[r][pair / 2];
          const float a = pair % 2 ? four.z : four.x, b = pair % 2 ? four.w : four.y;
          words[pair] = half_pair(a, b);
          const float2 back = Halves<__half>::floats(words[pair]);
          same = same && back.x == a && back.y == b;
        }
        *reinterpret_cast<uint4*>(at + (first + r) * shape.rank_bytes(kVectors)) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
  return __syncthreads_and(same);
}

// Σ (x_q - zero) alpha over the lanes of a line, of what this thread has stored; the first so many are inside the row.
// Not inlined: it is seldom called, and would take registers from the loop over rows.
template <int kVectors>
__device__ __noinline__ float stored_product(const int8_t* x_q, int stored_zero, const float* alpha, int inside) {
  float sum = 0.f;
#pragma unroll 1
  for (int k = 0; k < min(inside, kVectors * kSegment); k += kSegment) {
    const char4* const bytes = reinterpret_cast<const char4*>(x_q + k);
    const float4* const factors = reinterpret_cast<const float4*>(alpha + k);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const char4 q = bytes[half];
      const float4 factor = factors[half];
      sum = fmaf(static_cast<float>(q.x - stored_zero), factor.x, sum);
      sum = fmaf(static_cast<float>(q.y - stored_zero), factor.y, sum);
      sum = fmaf(static_cast<float>(q.z - stored_zero), factor.z, sum);
      sum = fmaf(static_cast<float>(q.w - stored_zero), factor.w, sum);
    }
  }
  return line_sum(sum);
}

__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint4& a, const uint2& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// Bytes of shared memory that a group has for itself.
__host__ __device__ inline int group_bytes(const GroupShape& shape, int rank, int vectors) {
  return static_cast<int>(sizeof(GroupShared)) + shape.sum_bytes(rank) + shape.warps * vectors * 32 * 16;
}

// As few as hold a group's elements, for as many warps as that allows.
constexpr int group_registers(int vectors) { return vectors > 10 ? 128 : 96; }

template <typename In, int kVectors, bool kSymmetric>
__global__ void __maxnreg__(group_registers(kVectors))
    quantize_groups_kernel(const __grid_constant__ QuantizeParams params, const __grid_constant__ GroupShape shape) {
  let_next_kernel_start();
  extern __shared__ uint4 dynamic[];  // alpha as float16, and for every group: GroupShared, sums, the next rows
  const qvdit_quantize_args& args = params.args;
  const int features = static_cast<int>(args.k), rank = static_cast<int>(args.rank);
  const int group = threadIdx.y, warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const GroupThreads threads{shape, group, warp, lane};
  const int row_in_group = threads.row(), piece = (warp << shape.log2_segments()) + threads.segment();
  char* const alpha = reinterpret_cast<char*>(dynamic);
  char* const of_group = alpha + shape.alpha_bytes(rank, kVectors) + group * group_bytes(shape, rank, kVectors);
  GroupShared& shared = *reinterpret_cast<GroupShared*>(of_group);
  // The low-rank term's parts. [iteration mod 2][piece][rank][row]
  float* const sums = reinterpret_cast<float*>(of_group + sizeof(GroupShared));
  const int row_sums = rank << shape.log2_rows, all_sums = shape.pieces() * row_sums;
  uint4* const own =
      reinterpret_cast<uint4*>(of_group + sizeof(GroupShared) + shape.sum_bytes(rank)) + warp * (kVectors * 32) + lane;

  GroupValues<In, kVectors> values;
  values.first = piece * (kVectors * kSegment) + lane % kLineLanes * kVector;

  const uint32_t rows = static_cast<uint32_t>(args.m), step = gridDim.x * blockDim.y * shape.rows();
  const uint32_t start = (blockIdx.x * blockDim.y + group) * shape.rows();
  const In* const own_x = static_cast<const In*>(args.x) + values.first;
  const uint32_t staging = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  // The next rows on their way to where they wait: a thread's own vectors, which it alone reads back.
  const auto fetch = [&](uint32_t first) {
    const In* from = own_x + static_cast<int64_t>(min(first + row_in_group, rows - 1)) * features;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (values.k(v) < features) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(staging + v * 512), "l"(from + v * kSegment)
                     : "memory");
      }
    }
    asm volatile("cp.async.commit_group;");
  };

  // What a group's threads summed up, put together by its first warp: one iteration later, so that one meeting serves
  // both.
  const auto finish = [&](uint32_t first, int of) {
    if (warp != 0) return;
    for (int i = lane; i < row_sums; i += 32) {
      const int r = i >> shape.log2_rows, in_group = i & (shape.rows() - 1);
      const uint32_t row = first + in_group;
      float sum = 0.f;
      for (int p = 0; p < shape.pieces(); ++p) sum += sums[of * all_sums + p * row_sums + i];
      if (row >= rows) continue;
      float u = shared.scale[of][in_group] * sum;
      if (args.frame_gain) {
        const uint32_t frame = params.frames.remainder(params.tokens.quotient(row));
        u *= __ldg(args.frame_gain + params.ranks.quotient(r) * static_cast<uint32_t>(args.frames) + frame);
      }
      args.u[static_cast<int64_t>(r) * args.m + row] = u;
    }
    if (args.row_sum && lane < shape.rows()) {
      int& sum = shared.row_sum[of][lane];
      const uint32_t row = first + lane;
      if (row < rows) args.row_sum[row] = sum;
      sum = 0;  // for the iteration after the next
    }
  };

  if (start < rows) fetch(start);
  for (int i = threadIdx.x; i < 3 * 2 * kLines; i += blockDim.x) (&shared.range[0][0][0])[i] = 0;
  if (threadIdx.x < 2 * kLines) (&shared.row_sum[0][0])[threadIdx.x] = 0;
  const bool halves = halve_alpha<kVectors>(args, shape, alpha);
  if (start >= rows) return;

  int turn = 0, of = 0;  // iterations mod 3 and 2
  uint32_t first = start;
#pragma unroll 1
  for (;; first += step) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    // Else what follows from it is computed once, before the loop, and kept in more registers than there are.
    asm volatile("" : "+r"(values.first));
    values.read(own, features);
    const bool more = rows - first > step;
    if (more) fetch(first + step);

    // Each of a group's warps raises its rows' extremes, as unsigned integers, where NaN is above Inf.
    uint32_t(&extremes)[2][kLines] = shared.range[turn];
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
    if (warp == 0 && lane < 2 * kLines) (&shared.range[turn == 0 ? 2 : turn - 1][0][0])[lane] = 0;
    if (first != start) finish(first - step, of ^ 1);

    const uint32_t row = first + row_in_group;
    const RowGrid grid = RowGrid::of<kSymmetric>(lowest, highest, params.levels);
    const int stored_zero = kSymmetric ? 0 : static_cast<int>(grid.zero - 128.f);
    if (warp == 0 && threads.first_of_row()) {
      shared.scale[of][row_in_group] = grid.scale;
      if (row < rows) {
        args.scale[row] = grid.scale;
        if (args.zero) args.zero[row] = stored_zero;
      }
    }
    if (grid.divisor == 0.f) values.clear();  // no integers: neither from NaN nor from Inf

    int8_t* const x_q = args.x_q + static_cast<int64_t>(row) * params.k_pad + values.first;
    const uint32_t zero_bytes = (static_cast<uint32_t>(stored_zero) & 0xff) * 0x01010101u;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float q[kVector];
      integers_of_halves<In, kSymmetric>(values.words[v], grid, q);
      uint2 bytes = {pack_bytes(q[0], q[1], q[2], q[3]), pack_bytes(q[4], q[5], q[6], q[7])};
      if constexpr (!kSymmetric) {  // where symmetric, what lies past the features is 0 already
        const uint32_t inside = values.k(v) < features ? ~0u : 0u;
        bytes.x = __vadd4(bytes.x, zero_bytes) & inside, bytes.y = __vadd4(bytes.y, zero_bytes) & inside;
      }
      if (row < rows && values.k(v) < params.k_pad) *reinterpret_cast<uint2*>(x_q + v * kSegment) = bytes;
      values.keep_integers(v, q);
    }
    if (args.row_sum) {
      const int sum = values.sum();
      if (lane % kLineLanes == 0) atomicAdd(&shared.row_sum[of][row_in_group], sum);
    }
    float* const own_sums = sums + of * all_sums + piece * row_sums + row_in_group;
    if (halves) {
      // The lane reads what the product's column lane / 4 takes: of a slot, a half of the elements of lanes lane % 4.
      const char* const of_warp = alpha + (warp << shape.log2_segments()) * GroupShape::piece_bytes(kVectors) +
                                  lane % 4 * 16 + lane / 4 % 2 * 8;
      const int segments_less_1 = shape.segments() - 1, last_slot = (rank << shape.log2_segments()) - 1;
#pragma unroll 1
      for (int set = 0; set < shape.sets(rank); ++set) {
        const int read = min(kSlots * set + lane / 8, last_slot), found = kSlots * set + lane % 4;
        const char* const from = of_warp + (read >> shape.log2_segments()) * shape.rank_bytes(kVectors) +
                                 (read & segments_less_1) * GroupShape::piece_bytes(kVectors);
        float products[4] = {};
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          multiply_add(products, values.words[v], *reinterpret_cast<const uint2*>(from + v * (kSegment * 2)));
        }
        // products[i] is of line lane / 4, half i / 2, and column 2 (lane % 4) + i % 2.
        if (found <= last_slot && (found & segments_less_1) == threads.segment()) {
          own_sums[found >> shape.log2_segments() << shape.log2_rows] = products[0] + products[3];
        }
      }
    } else {
#pragma unroll 1
      for (int r = 0; r < rank; ++r) {
        const float* const from = args.alpha + static_cast<int64_t>(r) * features + values.first;
        const float product =
            stored_product<kVectors>(x_q, stored_zero, from, row < rows ? features - values.first : 0);
        if (lane % kLineLanes == 0) own_sums[r << shape.log2_rows] = product;
      }
    }
    turn = turn == 2 ? 0 : turn + 1, of ^= 1;
    if (!more) break;
  }
  threads.meet();
  finish(first, of ^ 1);
}

// Vectors a thread and rows a group: the most rows that fit, of the vectors that cost least. vectors is 0 where
// nothing fits. µs at rank 4 of 32768 rows in groups of eight with 6, 8, 10 and 12 vectors on a GPU that bf16 products
// keep hot: K = 1152: 41, 41, 43, 41 | 1920: 65, 67, 64, 59 | 3072: 115, 114, 95, 92 | 4608: -, -, 152, 145 | 5120:
// -, -, 160, 165. On a cool one more warps of 6 and 8 vectors were as fast (H200, 2026-11-29).
struct GroupPlan {
  int vectors = 0;
  GroupShape shape = {};
};

inline GroupPlan plan_groups(int64_t k_pad, int rank, int shared_limit) {
  constexpr int kFewestWarps = 8;  // beside one alpha: fewer would wait too long, and a row is quantized for itself
  for (int log2_rows = 3; log2_rows >= 1; --log2_rows) {
    GroupPlan best;
    int64_t least = 0;
    for (int vectors : {12, 10, 8}) {
      const int64_t elements = kSegment * vectors * (kLines >> log2_rows);  // of a warp in one row
      const int64_t warps = (k_pad + elements - 1) / elements, cost = warps_cost(warps, vectors);
      const GroupShape shape{log2_rows, static_cast<int>(warps)};
      const int room = shared_limit - shape.alpha_bytes(rank, vectors);
      const int64_t groups = std::min(room / group_bytes(shape, rank, vectors), kMaxGroups);
      if (warps > kMaxWarps || groups * warps < kFewestWarps) continue;
      if (best.vectors == 0 || cost < least) best = {vectors, shape}, least = cost;
    }
    if (best.vectors > 0) return best;
  }
  return {};
}

// How many groups a block should have, so that with one alpha in shared memory for all of them as many warps as
// possible run on a multiprocessor at once; 0 where CUDA does not tell. staging: bytes of a group.
int groups_a_block(const void* kernel, int warps, int most_groups, int staging, int alpha);

template <typename In, int kVectors, bool kSymmetric>
int32_t launch_groups(const QuantizeParams& params, const GroupShape& shape, cudaStream_t stream) {
  constexpr int64_t kBlocksWanted = 2 * 132;  // as many rows a block as leave these
  const auto kernel = quantize_groups_kernel<In, kVectors, kSymmetric>;
  const auto entry = reinterpret_cast<const void*>(kernel);
  const int rank = static_cast<int>(params.args.rank), rows = shape.rows();
  const int alpha = shape.alpha_bytes(rank, kVectors), own = group_bytes(shape, rank, kVectors);
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

template <typename In, int kVectors>
int32_t launch_groups(const QuantizeParams& params, const GroupShape& shape, cudaStream_t stream) {
  return params.args.symmetric ? launch_groups<In, kVectors, true>(params, shape, stream)
                               : launch_groups<In, kVectors, false>(params, shape, stream);
}

// fits: whether the low-rank term does; nothing was started where it does not.
template <typename In>
int32_t launch_groups(const QuantizeParams& params, bool& fits, cudaStream_t stream) {
  const int limit = dynamic_shared_limit(reinterpret_cast<const void*>(quantize_groups_kernel<In, 8, true>));
  const GroupPlan plan = plan_groups(params.k_pad, static_cast<int>(params.args.rank), limit);
  fits = plan.vectors > 0;
  switch (plan.vectors) {
    case 0:
      return QVDIT_OK;
    case 8:
      return launch_groups<In, 8>(params, plan.shape, stream);
    case 10:
      return launch_groups<In, 10>(params, plan.shape, stream);
    default:
      return launch_groups<In, 12>(params, plan.shape, stream);
  }
}

}  // namespace qvdit
