// Hopper's epilogue, of any rank and with every zero point there is:
//
//   acc = Σ_k x_q weight - zero weight_sum - weight_zero row_sum        int32
//   y   = (bias + scale · (weight_scale · acc)) + Σ_r u_r · beta_r      float32; u of the column's segment; null: 0
//
// One warpgroup's epilogue hides behind the other's mainloop as long as it takes no longer, and it is four warps that
// share the registers' ports with the tensor cores. So the ranks are a product of the tensor cores too: the accumulators
// become float32 where they are, and wgmma adds u · beta to them, each number the sum of two of TF32.
#pragma once

#include <type_traits>

#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/cutlass.h"
#include "gemm_epilogue.cuh"

namespace qvdit {

// A float32 as two TF32 numbers: what they lack of it is at most 2^-22 of it.
struct Tf32Pair {
  float high, low;
  __device__ __forceinline__ explicit Tf32Pair(float value) : high(rounded(value)), low(rounded(value - high)) {}

 private:
  static __device__ __forceinline__ float rounded(float value) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return __uint_as_float(bits);
  }
};

constexpr int kRanksAtOnce = 4;

// u or beta of a tile's rows or columns as operands of wgmma without swizzle: the four TF32 numbers of a row are 16
// bytes, those of 8 rows lie beside each other. A product takes eight numbers of a row, from two such blocks:
//
//   four ranks    u: high | high, then low | low        beta: high | low, both times
//   one rank      u: (high high low low) | the same     beta: (high low high low) | the same, all in `high`
//
// Of one rank the sum comes twice, so u is halved.
template <int kRows>
struct TileRanks {
  alignas(128) float4 high[kRows];
  alignas(128) float4 low[kRows];

  __device__ __forceinline__ void put(int row, const float (&of)[kRanksAtOnce]) {
    const Tf32Pair a(of[0]), b(of[1]), c(of[2]), d(of[3]);
    high[row] = {a.high, b.high, c.high, d.high};
    low[row] = {a.low, b.low, c.low, d.low};
  }
  __device__ __forceinline__ void put_single_u(int row, float u) {
    const Tf32Pair half(0.5f * u);
    high[row] = {half.high, half.high, half.low, half.low};
  }
  __device__ __forceinline__ void put_single_beta(int row, float beta) {
    const Tf32Pair pair(beta);
    high[row] = {pair.high, pair.low, pair.high, pair.low};
  }

  // wgmma's description of rows from one on: their first four numbers, and how many bytes on the other four are.
  static __device__ __forceinline__ uint64_t operand(const float4* row, int bytes_on) {
    cute::GmmaDescriptor descriptor;
    descriptor.bitfield.start_address_ = cute::cast_smem_ptr_to_uint(row) / 16;
    descriptor.bitfield.leading_byte_offset_ = bytes_on / 16;
    descriptor.bitfield.stride_byte_offset_ = 8 * sizeof(float4) / 16;
    descriptor.bitfield.base_offset_ = 0;
    descriptor.bitfield.layout_type_ = static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::INTERLEAVE);
    return descriptor;
  }
};

// A tile's factors in shared memory.
template <int kBlockM, int kBlockN>
struct TileFactors {
  TileRanks<kBlockM> u;
  TileRanks<kBlockN> beta;
  alignas(16) float2 affine[kBlockN];  // weight_scale, bias
  alignas(16) int32_t weight_sum[kBlockN];
  alignas(16) int32_t weight_zero[kBlockN];
  float scale[kBlockM];
  int32_t zero[kBlockM];
  int32_t row_sum[kBlockM];
};

// Something of CUTLASS's epilogue and the layer's arguments.
template <class Of>
struct WithGemmArgs : Of {
  qvdit_gemm_args gemm;
};

// Comes before Store, an epilogue of CUTLASS's, and makes what that one converts and stores: y, or where y is of int32
// acc. By one warpgroup at a time, of kThreads.
template <class Store, int kBlockM, int kBlockN, int kThreads>
class WgmmaEpilogue : public Store {
  using Factors = TileFactors<kBlockM, kBlockN>;
  static constexpr int kBlocks = kBlockM / 64;                          // of a wgmma's rows
  static constexpr int kPairs = kBlockN / 8;                            // of columns that a thread has accumulators of
  static constexpr int kColumns = (kBlockN + kThreads - 1) / kThreads;  // that a thread stages
  static_assert(kBlockM == kThreads, "a thread stages a row");

 public:
  using Arguments = WithGemmArgs<typename Store::Arguments>;
  using Params = WithGemmArgs<typename Store::Params>;
  struct TensorStorage : Store::TensorStorage {
    Factors factors;
  };
  struct SharedStorage {
    TensorStorage tensors;
    typename Store::PipelineStorage pipeline;
  };

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    return {Store::to_underlying_arguments(shape, args, workspace), args.gemm};
  }

  CUTLASS_HOST_DEVICE WgmmaEpilogue(Params const& params, TensorStorage& shared)
      : Store(params, shared), args_(params.gemm) {}

  // As CUTLASS's kernels call it. accumulators: int32, [those of a wgmma, blocks, 1].
  template <class LoadState, class StoreState, class Shape, class TileShape, class Tile, class Engine, class Layout,
            class TiledMma>
  CUTLASS_DEVICE auto store(typename Store::LoadPipeline load, LoadState load_state,
                            typename Store::StorePipeline store, StoreState store_state, Shape shape,
                            TileShape tile_shape, Tile tile, cute::Tensor<Engine, Layout> accumulators,
                            TiledMma tiled_mma, int thread, TensorStorage& shared) {
    static_assert(decltype(cute::size<0>(accumulators))::value == 4 * kPairs &&
                      decltype(cute::size<1>(accumulators))::value == kBlocks,
                  "another order of accumulators");
    const auto store_sums = [&](auto const& sums) {
      return Store::store(load, load_state, store, store_state, shape, tile_shape, tile, sums, tiled_mma, thread,
                          shared);
    };
    const int m = kBlockM * static_cast<int>(cute::get<0>(tile)), n = kBlockN * static_cast<int>(cute::get<1>(tile));
    Factors& factors = shared.factors;
    stage(factors, m, n, thread);
    stage_ranks(factors, 0, m, n, thread);
    meet();
    if (args_.zero) subtract_products(accumulators, factors.zero, factors.weight_sum, thread);
    if (args_.weight_zero) subtract_products(accumulators, factors.row_sum, factors.weight_zero, thread);
    if constexpr (std::is_same_v<typename Store::ElementD, int32_t>) {
      return store_sums(accumulators);
    } else {
      auto y = cute::make_fragment_like<float>(accumulators);
      scale_and_shift(y, accumulators, factors, thread);
      if (args_.rank == 1) add_rank(y, factors);
#pragma unroll 1
      for (int first = 0; args_.rank > 1 && first < args_.rank; first += kRanksAtOnce) {
        if (first > 0) {
          meet();  // all products of the ranks before have been read
          stage_ranks(factors, first, m, n, thread);
          meet();
        }
        add_ranks(y, factors);
      }
      return store_sums(y);
    }
  }

 private:
  // Everything written to shared memory before is there for all threads and for wgmma.
  static CUTLASS_DEVICE void meet() {
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kThreads, cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
  }

  // Not by __ldg: dependent_launch.cuh.
  template <typename T>
  static CUTLASS_DEVICE T read(const T* values, int64_t at, bool there) {
    return there && values ? values[at] : T{};
  }

  // By each thread a row and its columns, 0 past the ends. All is read from device memory before anything is written.
  CUTLASS_DEVICE void stage(Factors& factors, int tile_m, int tile_n, int thread) const {
    const int m = tile_m + thread;
    const bool row_there = m < args_.m;
    const float scale = read(args_.scale, m, row_there);
    const int32_t zero = read(args_.zero, m, row_there), row_sum = read(args_.row_sum, m, row_there);
    float2 affine[kColumns];
    int32_t weight_sum[kColumns], weight_zero[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = c * kThreads + thread, n = tile_n + column;
      const bool there = column < kBlockN && n < args_.n;
      affine[c] = {read(args_.weight_scale, n, there), read(args_.bias, n, there)};
      weight_sum[c] = read(args_.weight_sum, n, there);
      weight_zero[c] = read(args_.weight_zero, n, there);
    }
    factors.scale[thread] = scale;
    factors.zero[thread] = zero;
    factors.row_sum[thread] = row_sum;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = c * kThreads + thread;
      if (column >= kBlockN) break;
      factors.affine[column] = affine[c];
      factors.weight_sum[column] = weight_sum[c];
      factors.weight_zero[column] = weight_zero[c];
    }
  }

  // The same of four ranks from one on, or of the only one. Those past the last are 0.
  CUTLASS_DEVICE void stage_ranks(Factors& factors, int first, int tile_m, int tile_n, int thread) const {
    const int m = tile_m + thread, left = static_cast<int>(args_.rank) - first;
    if (left <= 0) return;
    const bool row_there = m < args_.m;
    const float* of_u = args_.u + first_u(args_, tile_n) + first * args_.m + m;
    const float* of_beta = args_.beta + first * args_.n + tile_n + thread;
    const auto there = [&](int c) {
      const int column = c * kThreads + thread;
      return column < kBlockN && tile_n + column < args_.n;
    };
    if (args_.rank == 1) {
      const float u = read(of_u, 0, row_there);
      float beta[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) beta[c] = read(of_beta, c * kThreads, there(c));
      factors.u.put_single_u(thread, u);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c * kThreads + thread < kBlockN) factors.beta.put_single_beta(c * kThreads + thread, beta[c]);
      }
    } else {
      float u[kRanksAtOnce], beta[kColumns][kRanksAtOnce];
#pragma unroll
      for (int r = 0; r < kRanksAtOnce; ++r) {
        u[r] = read(of_u, r * args_.m, r < left && row_there);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) beta[c][r] = read(of_beta, r * args_.n + c * kThreads, r < left && there(c));
      }
      factors.u.put(thread, u);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c * kThreads + thread < kBlockN) factors.beta.put(c * kThreads + thread, beta[c]);
      }
    }
  }

  // Where a thread's accumulators are in the tile. Of a block of 64 rows, wgmma has pairs beside each other in n,
  // alternating between two rows 8 apart, then the next 8 columns: accumulator i is of row (i / 2) % 2, of pair i / 4.
  static CUTLASS_DEVICE int row(int thread, int block, int of_two) {
    return 64 * block + thread / 32 * 16 + 8 * of_two + thread % 32 / 4;
  }
  static CUTLASS_DEVICE int column(int thread, int pair) { return 8 * pair + thread % 4 * 2; }

  template <typename T>
  struct Rows {  // a thread's values of a vector over the tile's rows
    T of[kBlocks][2];
    CUTLASS_DEVICE Rows(const T* values, int thread) {
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) of[i / 2][i % 2] = values[row(thread, i / 2, i % 2)];
    }
  };

  template <class Accumulators>
  static CUTLASS_DEVICE void subtract_products(Accumulators& accumulators, const int32_t* of_rows,
                                               const int32_t* of_columns, int thread) {
    const Rows<int32_t> rows(of_rows, thread);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int2 columns = *reinterpret_cast<const int2*>(of_columns + column(thread, pair));
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) {
        accumulators(4 * pair + i % 4, i / 4, 0) -= rows.of[i / 4][i / 2 % 2] * (i % 2 ? columns.y : columns.x);
      }
    }
  }

  template <class Sums, class Accumulators>
  static CUTLASS_DEVICE void scale_and_shift(Sums& y, Accumulators const& accumulators, const Factors& factors,
                                             int thread) {
    const Rows<float> scale(factors.scale, thread);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const float4 affine = *reinterpret_cast<const float4*>(factors.affine + column(thread, pair));
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) {
        const float weight_scale = i % 2 ? affine.z : affine.x, bias = i % 2 ? affine.w : affine.y;
        const float sum = static_cast<float>(accumulators(4 * pair + i % 4, i / 4, 0));
        y(4 * pair + i % 4, i / 4, 0) = bias + scale.of[i / 4][i / 2 % 2] * (weight_scale * sum);
      }
    }
  }

  // y += u · beta, of the only rank.
  template <class Sums>
  static CUTLASS_DEVICE void add_rank(Sums& y, const Factors& factors) {
    const uint64_t beta = factors.beta.operand(factors.beta.high, 0);
    begin_products(y);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      add_product(y, block, factors.u.operand(factors.u.high + 64 * block, 0), beta);
    }
    end_products(y);
  }

  // y += Σ_r u_r · beta_r, of the four in shared memory.
  template <class Sums>
  static CUTLASS_DEVICE void add_ranks(Sums& y, const Factors& factors) {
    const uint64_t beta = factors.beta.operand(factors.beta.high, sizeof(factors.beta.high));
    begin_products(y);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      add_product(y, block, factors.u.operand(factors.u.high + 64 * block, 0), beta);
      add_product(y, block, factors.u.operand(factors.u.low + 64 * block, 0), beta);
    }
    end_products(y);
  }

  template <class Sums>
  static CUTLASS_DEVICE void begin_products(Sums& y) {
    cute::warpgroup_fence_operand(y);
    cute::warpgroup_arrive();
  }
  template <class Sums>
  static CUTLASS_DEVICE void end_products(Sums& y) {
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(y);
  }

  template <class Sums>
  static CUTLASS_DEVICE void add_product(Sums& y, int block, uint64_t u, uint64_t beta) {
    add_product(y, block, u, beta, cute::make_seq<4 * kPairs>{});
  }
  template <class Sums, int... i>
  static CUTLASS_DEVICE void add_product(Sums& y, int block, uint64_t u, uint64_t beta, cute::seq<i...>) {
    using namespace cute::SM90::GMMA;
    using Product = decltype(ss_op_selector<cute::tfloat32_t, cute::tfloat32_t, float,
                                            cute::Shape<cute::_64, cute::Int<kBlockN>, cute::_8>, Major::K, Major::K>());
    Product::fma(u, beta, y(i, block, 0)..., ScaleOut::One);
  }

  qvdit_gemm_args const& args_;
};

}  // namespace qvdit
