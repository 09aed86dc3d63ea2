// Per-token quantization of 16-bit rows as they are, with a low-rank term of rank 2 and more: the term is a float16
// product of the tensor cores, which costs next to nothing. Rows come in groups of 8, 4 or 2, in the registers of
// one to sixteen warps.
//
//   device memory: 3 bytes an element, plus 4 + 4 R bytes a row.
//   instructions, an element: about 1 (convert) + 0.5 (range) + 3 (quotient) + 1 (pack, store) + 1.5 (float16), + 1
//   where asymmetric, and 0.25 for every four ranks in groups of eight rows, for every rank in groups of two.
//
// A warp's lanes are those of the row operand of mma.m16n8k16: lane 4 c + t holds 8 elements of line c, beside those of
// the lanes t of the same c; four enter the product in its row c, four in row c + 8. The 8 lines are the group's rows,
// or, where it has fewer, rows times parts of them. Which of a line's elements the product takes first does not matter.
// Its 8 columns are four slots, each a rank of one segment, times the two halves of a lane's elements.
//
// The next rows come to shared memory while these are computed.
//
//   grid: as many blocks as run at once, each group goes on to further rows; a block is 32 W threads x groups.
#pragma once

#include <algorithm>

#include "copy_async.cuh"
#include "dependent_launch.cuh"
#include "half_products.cuh"
#include "half_rows.cuh"
#include "quantize_plan.h"

namespace qvdit {

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

  // Instead of vector v its integers q - kRounder as float16, in the order of the product's operand: rows c and c + 8
  // in turns.
  __device__ __forceinline__ void keep_integers(int v, const float (&q)[kVector]) { words[v] = half_operand(q); }

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
  int warp, lane;  // of the group, of the warp

  __device__ __forceinline__ GroupThreads(const GroupShape& shape, int thread)
      : shape(shape), warp(thread / 32), lane(thread % 32) {}

  __device__ __forceinline__ int line() const { return lane / kLineLanes; }
  __device__ __forceinline__ int row() const { return line() & (shape.rows() - 1); }
  __device__ __forceinline__ int segment() const { return line() >> shape.log2_rows; }
  __device__ __forceinline__ int piece() const { return (warp << shape.log2_segments()) + segment(); }
  // One lane for each row of the group.
  __device__ __forceinline__ bool first_of_row() const { return lane % kLineLanes == 0 && line() < shape.rows(); }

  __device__ __forceinline__ void meet() const {
    if (shape.warps == 1) {
      __syncwarp();
    } else {
      barrier(threadIdx.y, 32 * shape.warps);
    }
  }

  // The maximum over the lanes of one row, in all of them.
  __device__ __forceinline__ float row_max(float value) const {
    value = max_nan(value, __shfl_xor_sync(0xffffffffu, value, 1));
    value = max_nan(value, __shfl_xor_sync(0xffffffffu, value, 2));
    for (int apart = kLineLanes << shape.log2_rows; apart < 32; apart *= 2) {
      value = max_nan(value, __shfl_xor_sync(0xffffffffu, value, apart));
    }
    return value;
  }
};

// alpha on its way to shared memory, piece by piece, 0 from K on. Everybody of the block comes along.
template <int kVectors>
__device__ __forceinline__ void fetch_alpha(const qvdit_quantize_args& args, const GroupShape& shape, char* to) {
  constexpr int kPiece = kVectors * kSegment / kVector;  // vectors
  const int features = static_cast<int>(args.k), rank = static_cast<int>(args.rank);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int i = thread; i < shape.pieces() * kPiece; i += threads) {
    const int piece = i / kPiece, k = i * kVector;
    char* at = to + piece * GroupShape::piece_bytes(kVectors) + i % kPiece * 16;
    for (int r = 0; r < rank; ++r, at += shape.rank_bytes(kVectors)) {
      copy_or_clear(at, static_cast<const __half*>(args.alpha) + static_cast<int64_t>(r) * features + k, k < features);
    }
  }
}

// As few as hold a group's elements, for as many warps as that allows.
constexpr int group_registers(int vectors) { return vectors > 8 ? 128 : 104; }

template <typename In, int kVectors, bool kSymmetric>
__global__ void __maxnreg__(group_registers(kVectors))
    quantize_groups_kernel(const __grid_constant__ QuantizeParams params, const __grid_constant__ GroupShape shape) {
  let_next_kernel_start();
  extern __shared__ uint4 dynamic[];  // alpha, and for every group: GroupShared, sums, the next rows
  const qvdit_quantize_args& args = params.args;
  const int features = static_cast<int>(args.k), rank = static_cast<int>(args.rank);
  const int group = threadIdx.y;
  GroupThreads threads(shape, threadIdx.x);
  char* const alpha = reinterpret_cast<char*>(dynamic);
  char* const of_group = alpha + shape.alpha_bytes(rank, kVectors) + group * shape.group_bytes(rank, kVectors);
  GroupShared& shared = *reinterpret_cast<GroupShared*>(of_group);
  // The low-rank term's parts. [iteration since they were written][piece][rank][row]
  float* const sums = reinterpret_cast<float*>(of_group + sizeof(GroupShared));
  const int row_sums = rank << shape.log2_rows, all_sums = shape.pieces() * row_sums;
  uint4* const own = reinterpret_cast<uint4*>(of_group + sizeof(GroupShared) + shape.sum_bytes(rank)) +
                     threads.warp * (kVectors * 32) + threads.lane;

  GroupValues<In, kVectors> values;
  values.first = threads.piece() * (kVectors * kSegment) + threads.lane % kLineLanes * kVector;

  const uint32_t rows = static_cast<uint32_t>(args.m), step = gridDim.x * blockDim.y * shape.rows();
  const uint32_t start = (blockIdx.x * blockDim.y + group) * shape.rows();
  const In* const own_x = static_cast<const In*>(args.x) + values.first;
  const uint32_t staging = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  // The next rows on their way to where they wait: a thread's own vectors, which it alone reads back.
  const auto fetch = [&](uint32_t first) {
    const In* from = own_x + static_cast<int64_t>(min(first + threads.row(), rows - 1)) * features;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (values.k(v) < features) copy_async(staging + v * 512, from + v * kSegment);
    }
    commit_copies();
  };

  // The results of so many iterations, whose rows are step apart: put together and written by all of the group's
  // threads.
  const auto write = [&](uint32_t first, int count) {
    for (int i = threadIdx.x; i < row_sums << shape.log2_kept; i += blockDim.x) {
      const int in_group = i & (shape.rows() - 1), kept = i >> shape.log2_rows & (shape.kept() - 1);
      const int r = i >> (shape.log2_rows + shape.log2_kept);
      const uint32_t row = first + kept * step + in_group;
      if (kept >= count || row >= rows) continue;
      const float gain = args.frame_gain ? params.gain(row, r) : 1.f;
      const float* const parts = sums + kept * all_sums + (r << shape.log2_rows) + in_group;
      float sum = 0.f;
      for (int p = 0; p < shape.pieces(); ++p) sum += parts[p * row_sums];
      const float scale = shared.scale[kept][in_group];
      args.u[static_cast<int64_t>(r) * args.m + row] = scale * sum * gain;
      if (r != 0) continue;
      args.scale[row] = scale;
      if (args.zero) args.zero[row] = shared.stored_zero[kept][in_group];
      if (args.row_sum) {
        args.row_sum[row] = shared.row_sum[kept][in_group];
        shared.row_sum[kept][in_group] = 0;
      }
    }
  };

  if (start < rows) fetch(start);
  for (int i = threadIdx.x; i < 3 * 2 * kLines; i += blockDim.x) (&shared.range[0][0][0])[i] = 0;
  for (int i = threadIdx.x; i < kMostKept * kLines; i += blockDim.x) (&shared.row_sum[0][0])[i] = 0;
  fetch_alpha<kVectors>(args, shape, alpha);
  wait_for_copies();
  __syncthreads();
  if (start >= rows) return;

  int turn = 0, kept = 0;  // iterations mod 3; since results were written
  uint32_t first = start, first_kept = start;
#pragma unroll 1
  for (;; first += step) {
    wait_for_copies();
    // Else what follows from these is computed once, before the loop, and kept in more registers than there are.
    int thread = threadIdx.x;
    asm volatile("" : "+r"(values.first), "+r"(thread));
    threads = GroupThreads(shape, thread);
    const int row_in_group = threads.row();
    values.read(own, features);
    if (rows - first > step) fetch(first + step);

    // Each of a group's warps raises its rows' extremes, as unsigned integers, where NaN is above Inf.
    uint32_t (&extremes)[2][kLines] = shared.range[turn];
    float highest = 0.f, lowest = 0.f;
    range_of_halves<In, kSymmetric>(values.words, highest, lowest);
    highest = threads.row_max(highest);
    if constexpr (!kSymmetric) lowest = threads.row_max(lowest);
    if (threads.first_of_row()) {
      atomicMax(&extremes[0][row_in_group], __float_as_uint(highest) & 0x7fffffffu);
      if constexpr (!kSymmetric) atomicMax(&extremes[1][row_in_group], __float_as_uint(lowest) & 0x7fffffffu);
    }
    threads.meet();
    highest = __uint_as_float(extremes[0][row_in_group]);
    if constexpr (!kSymmetric) lowest = __uint_as_float(extremes[1][row_in_group]);
    // Of the iteration before, which all have read; raised again after the next meeting.
    if (thread < 2 * kLines) (&shared.range[turn == 0 ? 2 : turn - 1][0][0])[thread] = 0;

    const uint32_t row = first + row_in_group;
    const RowGrid grid = RowGrid::of<kSymmetric>(lowest, highest, params);
    const int stored_zero = kSymmetric ? 0 : static_cast<int>(grid.zero) - 128;
    if (threads.warp == 0 && threads.first_of_row()) {
      shared.scale[kept][row_in_group] = grid.scale, shared.stored_zero[kept][row_in_group] = stored_zero;
    }
    multiply_halves<In>(values.words, grid.factor);

    int8_t* const x_q = args.x_q + static_cast<int64_t>(row) * params.k_pad + values.first;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float q[kVector];
      integers_of_halves<In, kSymmetric>(values.words[v], grid, q);
      const uint2 bytes = stored_bytes<kSymmetric>(q, stored_zero, values.k(v) < features);
      if (row < rows && values.k(v) < params.k_pad) *reinterpret_cast<uint2*>(x_q + v * kSegment) = bytes;
      values.keep_integers(v, q);
    }
    if (args.row_sum) {
      const int sum = values.sum();
      if (threads.lane % kLineLanes == 0) atomicAdd(&shared.row_sum[kept][row_in_group], sum);
    }

    // A lane reads what the product's column lane / 4 takes: of a slot, a half of the elements of lanes lane % 4.
    asm volatile("" : "+r"(thread));
    const GroupThreads own_threads(shape, thread);
    const int lane = own_threads.lane, segment = own_threads.segment();
    const char* const of_warp = alpha +
                                (own_threads.warp << shape.log2_segments()) * GroupShape::piece_bytes(kVectors) +
                                lane % 4 * 16 + lane / 4 % 2 * 8;
    float* const own_sums = sums + kept * all_sums + own_threads.piece() * row_sums + own_threads.row();
    const int segments_less_1 = shape.segments() - 1, last_slot = (rank << shape.log2_segments()) - 1;
#pragma unroll 1
    for (int set = 0; set < shape.sets(rank); ++set) {
      const int read = min(kSlots * set + lane / 8, last_slot), slot = kSlots * set + lane % 4;
      const char* const from = of_warp + (read >> shape.log2_segments()) * shape.rank_bytes(kVectors) +
                               (read & segments_less_1) * GroupShape::piece_bytes(kVectors);
      float products[4] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        multiply_add(products, values.words[v], *reinterpret_cast<const uint2*>(from + v * (kSegment * 2)));
      }
      // products[i] is of line lane / 4, half i / 2, and column 2 (lane % 4) + i % 2.
      if (slot <= last_slot && (slot & segments_less_1) == segment) {
        own_sums[slot >> shape.log2_segments() << shape.log2_rows] = products[0] + products[3];
      }
    }
    turn = turn == 2 ? 0 : turn + 1;
    const bool last = rows - first <= step;
    if (++kept == shape.kept() || last) {
      threads.meet();
      write(first_kept, kept);
      kept = 0, first_kept = first + step;
    }
    if (last) break;
  }
}

template <typename In, int kVectors, bool kSymmetric>
int32_t launch_groups(const QuantizeParams& params, const GroupPlan& plan, cudaStream_t stream) {
  const auto kernel = quantize_groups_kernel<In, kVectors, kSymmetric>;
  const auto entry = reinterpret_cast<const void*>(kernel);
  const GroupShape& shape = plan.shape;
  const int rank = static_cast<int>(params.args.rank), rows = shape.rows(), limit = dynamic_shared_limit(entry);
  const int most = static_cast<int>(std::clamp<int64_t>(params.args.m / (rows * kBlocksWanted), 1, kMaxGroups));
  const int groups = groups_a_block(multiprocessor(entry), limit, plan, rank, most);
  const int shared = plan.block_bytes(groups, rank);
  int resident = 0;
  if (const int32_t status = resident_blocks(entry, 32 * shape.warps * groups, shared, limit, resident)) return status;
  const int64_t blocks = (params.args.m + groups * rows - 1) / (groups * rows);
  kernel<<<static_cast<unsigned>(blocks < resident ? blocks : resident), dim3(32 * shape.warps, groups), shared,
           stream>>>(params, shape);
  return launched("quantize_rows");
}

template <typename In, int kVectors>
int32_t launch_groups(const QuantizeParams& params, const GroupPlan& plan, cudaStream_t stream) {
  return params.args.symmetric ? launch_groups<In, kVectors, true>(params, plan, stream)
                               : launch_groups<In, kVectors, false>(params, plan, stream);
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
      return launch_groups<In, 8>(params, plan, stream);
    case 10:
      return launch_groups<In, 10>(params, plan, stream);
    default:
      return launch_groups<In, 12>(params, plan, stream);
  }
}

}  // namespace qvdit
