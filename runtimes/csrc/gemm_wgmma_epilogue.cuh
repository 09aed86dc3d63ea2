// Hopper's epilogue, of any rank and with every zero point there is:
//
//   acc = Σ_k x_q weight - zero weight_sum - weight_zero row_sum        int32
//   y   = (bias + scale · (weight_scale · acc)) + Σ_r u_r · beta_r      float32; u of the column's segment; null: 0
//
// One warpgroup's epilogue hides behind the other's mainloop as long as it takes no longer, and it is four warps that
// share the registers' ports with the tensor cores. So the accumulators become float32 where they are, each column's
// factors read once for all rows, and the only rank is a multiplication more. Further ranks are a product of the tensor
// cores: wgmma adds u · beta to what the accumulators became, u the sum of two TF32 numbers, and so is beta where it is
// of float32.
//
// µs for 32768 x 4608 x 1152, bf16 out, ranks 0, 1, 4, and the same with zero, on H200s, 2026-11-28: 271, 274, 333, 302,
// 305, 385 when each subtile's conversion did it with float32 products and sums; 245, 274, 304, 259, 298, 327 with
// wgmma for rank 1 too and every block scaled before any rank was added, in that run; 252, 269, 299, 269, 297, 331 with
// a block's ranks added while the next is scaled, at rank 0 block after block as well, in another. As they are now ranks
// 0, 1 and 4 took 257, 266 and 300, and rank 4 with beta of float16 289 (2026-11-29).
#pragma once

#include <type_traits>

#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/cutlass.h"
#include "gemm_epilogue.cuh"

namespace qvdit {

// A float32 as two TF32 numbers: what they lack of it is at most 2^-22 of it. Of what rounds to Inf, `low` is NaN.
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

// u or beta of a tile's rows or columns. kParts: of how many TF32 numbers each is the sum.
template <int kRows, int kRanks, int kParts>
struct TileRanks {
  __device__ __forceinline__ void put(int, const float (&)[1]) {}
};

template <int kRows, int kParts>
struct TileRanks<kRows, 1, kParts> {
  alignas(16) float of[kRows];
  __device__ __forceinline__ void put(int row, const float (&value)[1]) { of[row] = value[0]; }
};

// As operands of wgmma without swizzle: four TF32 numbers of a row are 16 bytes, those of 8 rows lie beside each other. A
// product takes eight numbers of a row, from two such blocks: high | low of u, and of beta high | high, then, unless
// beta are numbers of float16, which have no low parts, low | low in a product of its own.
template <int kRows, int kParts>
struct TileRanks<kRows, kRanksAtOnce, kParts> {
  alignas(128) float4 high[kRows];
  alignas(128) float4 low[kParts > 1 ? kRows : 1];

  __device__ __forceinline__ void put(int row, const float (&of)[kRanksAtOnce]) {
    if constexpr (kParts == 1) {
      high[row] = {of[0], of[1], of[2], of[3]};
    } else {
      const Tf32Pair a(of[0]), b(of[1]), c(of[2]), d(of[3]);
      high[row] = {a.high, b.high, c.high, d.high};
      low[row] = {a.low, b.low, c.low, d.low};
    }
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
template <int kBlockM, int kBlockN, int kRanks, int kBetaParts>
struct TileFactors {
  TileRanks<kBlockM, kRanks, 2> u;
  TileRanks<kBlockN, kRanks, kBetaParts> beta;
  alignas(16) float2 affine[kBlockN];  // weight_scale, bias
  alignas(16) int32_t weight_sum[kBlockN];
  float scale[kBlockM];
  int32_t zero[kBlockM];
};

// Something of CUTLASS's epilogue and the layer's arguments.
template <class Of>
struct WithGemmArgs : Of {
  qvdit_gemm_args gemm;
};

// Comes before Store, an epilogue of CUTLASS's, and makes what that one converts and stores: y, or where that is int32
// acc. By one warpgroup at a time, of kThreads. kRanks: 0, 1, or kRanksAtOnce for any number. Beta: its type. Known here,
// as with a condition between them its loads would wait for each other: 337 µs for 289 of 32768 x 4608 x 1152, rank 4.
template <class Store, int kBlockM, int kBlockN, int kThreads, int kRanks, typename Beta>
class WgmmaEpilogue : public Store {
  static constexpr int kBetaParts = std::is_same_v<Beta, __half> ? 1 : 2;
  using Factors = TileFactors<kBlockM, kBlockN, kRanks, kBetaParts>;
  static constexpr int kBlocks = kBlockM / 64;                          // of a wgmma's rows
  static constexpr int kPairs = kBlockN / 8;                            // of columns that a thread has accumulators of
  static constexpr int kColumns = (kBlockN + kThreads - 1) / kThreads;  // that a thread stages
  static_assert(kBlockM == kThreads && kBlocks == 2, "a thread stages a row");
  static_assert(kRanks == 0 || kRanks == 1 || kRanks == kRanksAtOnce);

 public:
  using Arguments = WithGemmArgs<typename Store::Arguments>;
  using Params = WithGemmArgs<typename Store::Params>;
  // What CUTLASS puts behind it in shared memory are the mainloop's operands, swizzled within 1024 bytes.
  struct alignas(1024) TensorStorage : Store::TensorStorage {
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
    const int m = kBlockM * static_cast<int>(cute::get<0>(tile)), n = kBlockN * static_cast<int>(cute::get<1>(tile));
    const auto store_block = [&](auto const& sums, auto from, int block) {
      return Store::store(load, cute::get<0>(from), store, cute::get<1>(from), shape, tile_shape, tile, sums, tiled_mma,
                          thread, shared, block);
    };
    const auto states = cute::make_tuple(load_state, store_state);
    const auto store_all = [&](auto const& sums) { return store_block(sums, store_block(sums, states, 0), 1); };
    Factors& factors = shared.factors;
    keep_order();
    {  // all is read from device memory before anything is written
      const OwnFactors own = read_factors(m, n, thread);
      const OwnRanks own_ranks = read_ranks(0, m, n, thread);
      put(factors, own, thread);
      put(factors, own_ranks, thread);
    }
    meet();
    if (args_.zero) subtract_products(accumulators, factors, thread);
    if (args_.weight_zero) {
      meet();  // all have read zero and weight_sum
      put_weight_zeros(factors, m, n, thread);
      meet();
      subtract_products(accumulators, factors, thread);
    }
    if constexpr (std::is_same_v<typename Store::ElementD, int32_t>) {
      return store_all(accumulators);
    } else {
      auto y = cute::make_fragment_like<float>(accumulators);
      if constexpr (kRanks <= 1) {
        scale_and_shift<kBlocks>(y, accumulators, 0, factors, thread);
        return store_all(y);
      } else {
        // wgmma's turn comes after what the other warpgroup has asked of the tensor cores: a block's ranks are added
        // while the next is scaled, and while the one before is stored.
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          scale_and_shift<1>(y, accumulators, block, factors, thread);
          add_ranks(y, block, factors);
        }
#pragma unroll 1
        for (int first = kRanksAtOnce; first < args_.rank; first += kRanksAtOnce) {
          wait_for_ranks<0>(y, 0), wait_for_ranks<0>(y, 1);
          meet();  // all have read the ranks before
          put(factors, read_ranks(first, m, n, thread), thread);
          meet();
#pragma unroll
          for (int block = 0; block < kBlocks; ++block) add_ranks(y, block, factors);
        }
        wait_for_ranks<1>(y, 0);
        const auto stored = store_block(y, states, 0);
        wait_for_ranks<0>(y, 1);
        return store_block(y, stored, 1);
      }
    }
  }

 private:
  // Reads and writes stay on their side of it; CUTLASS's barriers do not tell the compiler.
  static CUTLASS_DEVICE void keep_order() { asm volatile("" ::: "memory"); }

  // Everything written to shared memory before is there for all threads and for wgmma.
  static CUTLASS_DEVICE void meet() {
    keep_order();
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kThreads, cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
    keep_order();
  }

  // Not by __ldg: dependent_launch.cuh.
  template <typename T>
  static CUTLASS_DEVICE T read(const T* values, int64_t at, bool there) {
    return there && values ? values[at] : T{};
  }

  // What a thread stages: a row and its columns, 0 past the ends.
  struct OwnFactors {
    float scale;
    int32_t zero;
    float2 affine[kColumns];
    int32_t weight_sum[kColumns];
  };
  struct OwnRanks {
    float u[kRanks > 0 ? kRanks : 1], beta[kColumns][kRanks > 0 ? kRanks : 1];
  };

  // Whether the tile and the matrix have the thread's column c.
  CUTLASS_DEVICE bool has_column(int c, int tile_n, int thread) const {
    return c * kThreads + thread < kBlockN && tile_n + c * kThreads + thread < args_.n;
  }

  CUTLASS_DEVICE OwnFactors read_factors(int tile_m, int tile_n, int thread) const {
    const int m = tile_m + thread;
    OwnFactors own;
    own.scale = read(args_.scale, m, m < args_.m);
    own.zero = read(args_.zero, m, m < args_.m);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int n = tile_n + c * kThreads + thread;
      const bool there = has_column(c, tile_n, thread);
      own.affine[c] = {read(args_.weight_scale, n, there), read(args_.bias, n, there)};
      own.weight_sum[c] = read(args_.weight_sum, n, there);
    }
    return own;
  }

  // kRanks of them, from one on; those past the last are 0.
  CUTLASS_DEVICE OwnRanks read_ranks(int first, int tile_m, int tile_n, int thread) const {
    const int m = tile_m + thread, ranks = static_cast<int>(args_.rank) - first;
    const int64_t first_of_u = first_u(args_, tile_n) + first * args_.m + m;
    const int64_t first_of_beta = first * args_.n + tile_n + thread;
    OwnRanks own;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      own.u[r] = read(args_.u, first_of_u + r * args_.m, r < ranks && m < args_.m);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const bool there = r < ranks && has_column(c, tile_n, thread);
        const int64_t at = first_of_beta + r * args_.n + c * kThreads;
        own.beta[c][r] = static_cast<float>(read(static_cast<const Beta*>(args_.beta), at, there));
      }
    }
    return own;
  }

  static CUTLASS_DEVICE void put(Factors& factors, const OwnFactors& own, int thread) {
    factors.scale[thread] = own.scale;
    factors.zero[thread] = own.zero;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (c * kThreads + thread >= kBlockN) break;
      factors.affine[c * kThreads + thread] = own.affine[c];
      factors.weight_sum[c * kThreads + thread] = own.weight_sum[c];
    }
  }

  static CUTLASS_DEVICE void put(Factors& factors, const OwnRanks& own, int thread) {
    factors.u.put(thread, own.u);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (c * kThreads + thread < kBlockN) factors.beta.put(c * kThreads + thread, own.beta[c]);
    }
  }

  // What few layers have, in the place of zero and weight_sum.
  CUTLASS_DEVICE void put_weight_zeros(Factors& factors, int tile_m, int tile_n, int thread) const {
    factors.zero[thread] = read(args_.row_sum, tile_m + thread, tile_m + thread < args_.m);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = c * kThreads + thread;
      if (column >= kBlockN) break;
      factors.weight_sum[column] = read(args_.weight_zero, tile_n + column, has_column(c, tile_n, thread));
    }
  }

  // Where a thread's accumulators are in the tile. Of a block of 64 rows, wgmma has pairs beside each other in n,
  // alternating between two rows 8 apart, then the next 8 columns: accumulator i is of row (i / 2) % 2, of pair i / 4.
  static CUTLASS_DEVICE int row(int thread, int block, int of_two) {
    return 64 * block + thread / 32 * 16 + 8 * of_two + thread % 32 / 4;
  }
  static CUTLASS_DEVICE int column(int thread, int pair) { return 8 * pair + thread % 4 * 2; }

  template <class Accumulators>
  static CUTLASS_DEVICE void subtract_products(Accumulators& accumulators, const Factors& factors, int thread) {
    int32_t zero[kBlocks][2];
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) zero[i / 2][i % 2] = factors.zero[row(thread, i / 2, i % 2)];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int2 sums = *reinterpret_cast<const int2*>(factors.weight_sum + column(thread, pair));
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) {
        accumulators(4 * pair + i % 4, i / 4, 0) -= zero[i / 4][i / 2 % 2] * (i % 2 ? sums.y : sums.x);
      }
    }
  }

  // y of so many blocks from one on, without ranks or with the only one.
  template <int kMany, class Sums, class Accumulators>
  static CUTLASS_DEVICE void scale_and_shift(Sums& y, Accumulators const& accumulators, int first,
                                             const Factors& factors, int thread) {
    float scale[kMany][2];
    [[maybe_unused]] float u[kMany][2];
#pragma unroll
    for (int i = 0; i < 2 * kMany; ++i) {
      scale[i / 2][i % 2] = factors.scale[row(thread, first + i / 2, i % 2)];
      if constexpr (kRanks == 1) u[i / 2][i % 2] = factors.u.of[row(thread, first + i / 2, i % 2)];
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const float4 affine = *reinterpret_cast<const float4*>(factors.affine + column(thread, pair));
      [[maybe_unused]] float2 beta;
      if constexpr (kRanks == 1) beta = *reinterpret_cast<const float2*>(factors.beta.of + column(thread, pair));
#pragma unroll
      for (int i = 0; i < 4 * kMany; ++i) {
        const int block = i / 4, of_two = i / 2 % 2, at = 4 * pair + i % 4;
        const float weight_scale = i % 2 ? affine.z : affine.x, bias = i % 2 ? affine.w : affine.y;
        const float sum = static_cast<float>(accumulators(at, first + block, 0));
        float value = bias + scale[block][of_two] * (weight_scale * sum);
        if constexpr (kRanks == 1) value += u[block][of_two] * (i % 2 ? beta.y : beta.x);
        y(at, first + block, 0) = value;
      }
    }
  }

  // Begins y += Σ_r u_r · beta_r for a block, of the ranks in shared memory.
  template <class Sums>
  static CUTLASS_DEVICE void add_ranks(Sums& y, int block, const Factors& factors) {
    auto of_block = y(cute::_, block, 0);
    const uint64_t u = factors.u.operand(factors.u.high + 64 * block, sizeof(factors.u.high));
    cute::warpgroup_fence_operand(of_block);
    cute::warpgroup_arrive();
    add_product(of_block, u, factors.beta.operand(factors.beta.high, 0));
    if constexpr (kBetaParts > 1) add_product(of_block, u, factors.beta.operand(factors.beta.low, 0));
    cute::warpgroup_commit_batch();
  }

  // Until no more than so many blocks' ranks, begun after those of this one, are being added.
  template <int kOthers, class Sums>
  static CUTLASS_DEVICE void wait_for_ranks(Sums& y, int block) {
    cute::warpgroup_wait<kOthers>();
    auto of_block = y(cute::_, block, 0);
    cute::warpgroup_fence_operand(of_block);
  }

  template <class Sums>
  static CUTLASS_DEVICE void add_product(Sums& y, uint64_t u, uint64_t beta) {
    add_product(y, u, beta, cute::make_seq<4 * kPairs>{});
  }
  template <class Sums, int... i>
  static CUTLASS_DEVICE void add_product(Sums& y, uint64_t u, uint64_t beta, cute::seq<i...>) {
    using namespace cute::SM90::GMMA;
    using Product = decltype(ss_op_selector<cute::tfloat32_t, cute::tfloat32_t, float,
                                            cute::Shape<cute::_64, cute::Int<kBlockN>, cute::_8>, Major::K, Major::K>());
    Product::fma(u, beta, y(i)..., ScaleOut::One);
  }

  qvdit_gemm_args const& args_;
};

}  // namespace qvdit
