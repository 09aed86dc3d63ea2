// Hopper's GEMM of rank 0 to kRanks, 1 or 4, its epilogue one visitor of this project's:
//
//   y = Σ_r u_r · beta_r + (bias + scale · (weight_scale · acc))    float32; u of the column's segment; null: 0
//
// and with kZero, acc = Σ_k x_q weight - zero weight_sum before it, in int32.
//
// One warpgroup's epilogue hides behind the other's mainloop as long as it takes no longer, and it is four warps that
// wait for what they load. So a tile's factors come from device memory all at once, by cp.async (CUTLASS's visitors
// wait for each vector in turn), and the factors of a column, or of a row, lie beside each other: 16 bytes a load.
// Registers are what limits this: 192 of a thread's 232 hold accumulators.
//
// Four ranks as a product of the tensor cores (mma.m16n8k8, u and beta as two TF32 numbers each) are slower everywhere:
// on an H200, 2026-11-28, 361 µs for 339 at 32768 x 4608 x 1152 and 1424 for 1274 at 32768 x 5120 x 5120.
#pragma once

#include "gemm_epilogue.cuh"
#include "gemm_wgmma.cuh"

namespace qvdit {

// A tile's factors in shared memory. Ranks past R are 0.
template <int kBlockM, int kBlockN, int kRanks, bool kZero>
struct TileFactors {
  using Ranks = cutlass::AlignedArray<float, kRanks>;
  struct alignas(kRanks > 1 ? 16 : 8) Pair {  // of columns
    Ranks of[2];
  };

  Ranks u[kBlockM];
  float scale[kBlockM];
  int32_t zero[kZero ? kBlockM : 1];
  Pair beta[kBlockN / 2];
  alignas(16) float2 affine[kBlockN];  // weight_scale, bias
  alignas(16) int32_t weight_sum[kZero ? kBlockN : 1];
};

template <typename Out, int kBlockM, int kBlockN, int kThreads, int kRanks, bool kZero>
struct RanksVisitor : LeafVisitor {
  using SharedStorage = TileFactors<kBlockM, kBlockN, kRanks, kZero>;
  using Ranks = typename SharedStorage::Ranks;
  static_assert(kBlockM == kThreads, "a thread stages a row");

  CUTLASS_HOST_DEVICE RanksVisitor() {}
  CUTLASS_HOST_DEVICE RanksVisitor(Params const& params, SharedStorage const& shared)
      : params_(&params), shared_(const_cast<SharedStorage*>(&shared)) {}

  template <class Coordinates>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    using Place = WgmmaPlace<Coordinates>;
    static constexpr int kPairs = Place::kPairs;
    static_assert(Place::kSubtilesM == 2, "visit keeps for the second what it shares with the first");

    CUTLASS_DEVICE Callbacks(Place place, int thread, Params const& args, SharedStorage& shared)
        : place(place), thread(thread), args(args), shared(shared) {}

    Place place;
    int thread;
    Params const& args;
    SharedStorage& shared;
    // What a subtile leaves to the one below it: their columns' factors (weight_scale and bias of a pair), and of one
    // rank beta, of four, which would take too many registers, that one's Σ_r u_r beta_r.
    static constexpr bool kKeepsBeta = kRanks == 1;
    float4 affine[kPairs];
    int2 weight_sum[kPairs];
    typename SharedStorage::Pair beta[kKeepsBeta ? kPairs : 1];
    float below[kKeepsBeta ? 1 : Place::kSize];

    CUTLASS_DEVICE void begin() {
      const int m = place.tile_m + thread;
      const bool row_there = m < args.m;
      copy_ranks(args.u + first_u(args, place.tile_n) + m, args.m, row_there, shared.u[thread]);
      copy(args.scale + m, row_there, shared.scale[thread]);
      if constexpr (kZero) copy(args.zero + m, row_there, shared.zero[thread]);
#pragma unroll
      for (int first = 0; first < kBlockN; first += kThreads) {
        const int column = first + thread, n = place.tile_n + column;
        if (column >= kBlockN) break;
        const bool there = n < args.n;
        copy_ranks(args.beta + n, args.n, there, shared.beta[column / 2].of[column % 2]);
        copy(args.weight_scale + n, there, shared.affine[column].x);
        copy(args.bias + n, there && args.bias, shared.affine[column].y);
        if constexpr (kZero) copy(args.weight_sum + n, there, shared.weight_sum[column]);
      }
      cute::cp_async_wait<0>();
    }
    CUTLASS_DEVICE bool begin_sync_needed() const { return true; }

    // The ranks of one row or column, so far apart.
    CUTLASS_DEVICE void copy_ranks(const float* from, int64_t apart, bool there, Ranks& to) const {
#pragma unroll
      for (int r = 0; r < kRanks; ++r) copy(from + r * apart, there && r < args.rank, to[r]);
    }

    // From device to shared memory, in its own time; 0 if not there.
    template <typename T>
    static CUTLASS_DEVICE void copy(const T* from, bool there, T& to) {
      cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<T>::copy(*from, to, there);
    }

    // Subtiles come by columns: (0, 0), (1, 0), (0, 1), … What two below each other share is read once for both, save
    // for the first two: the registers that would keep it hold accumulators until then.
    template <int kSize>
    CUTLASS_DEVICE cutlass::Array<Out, kSize> visit(cutlass::Array<int32_t, kSize> const& acc, int, int epi_m,
                                                    int epi_n) {
      static_assert(kSize == Place::kSize && Place::in_wgmma_order(), "another order of accumulators");
      const bool shares = epi_n > 0, reads = epi_m == 0 || !shares;
      float scale[2];
      int32_t zero[2];
      Ranks u[2], u_below[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = place.row(epi_m, h);
        scale[h] = shared.scale[m];
        if constexpr (kZero) zero[h] = shared.zero[m];
        if (kKeepsBeta || reads) u[h] = shared.u[m];
        if (!kKeepsBeta && reads && shares) u_below[h] = shared.u[place.row(1, h)];
      }
      cutlass::Array<float, kSize> y;
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int n = place.column(epi_n, p);
        typename SharedStorage::Pair& pair = beta[kKeepsBeta ? p : 0];
        if (reads) {
          affine[p] = *reinterpret_cast<const float4*>(shared.affine + n);
          if constexpr (kZero) weight_sum[p] = *reinterpret_cast<const int2*>(shared.weight_sum + n);
          pair = shared.beta[n / 2];
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float weight_scale = j ? affine[p].z : affine[p].x, bias = j ? affine[p].w : affine[p].y;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int i = 4 * p + 2 * h + j;
            int32_t sum = acc[i];
            if constexpr (kZero) sum -= zero[h] * (j ? weight_sum[p].y : weight_sum[p].x);
            y[i] = bias + scale[h] * (weight_scale * static_cast<float>(sum));
            if constexpr (kKeepsBeta) {
              y[i] = plus_product(y[i], u[h], pair.of[j]);
            } else {
              y[i] = reads ? plus_product(y[i], u[h], pair.of[j]) : y[i] + below[i];
              if (reads && shares) below[i] = plus_product(0.f, u_below[h], pair.of[j]);
            }
          }
        }
      }
      return cutlass::NumericArrayConverter<Out, float, kSize>{}(y);
    }

    static CUTLASS_DEVICE float plus_product(float sum, const Ranks& u, const Ranks& beta) {
#pragma unroll
      for (int r = 0; r < kRanks; ++r) sum += u[r] * beta[r];
      return sum;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(cutlass::epilogue::fusion::ConsumerStoreArgs<Args...> const& args) {
    return Callbacks<decltype(args.tCcD)>(wgmma_place(args, *params_), args.thread_idx, *params_, *shared_);
  }

  Params const* params_;
  SharedStorage* shared_;
};

// Columns of a subtile, on an H200, 2026-11-28, bf16 out, µs of 32, 64 and 96 for 32768 x 4608 x 1152: 309, 285 and 278
// of rank 1 (96 takes one of the mainloop's five stages, which costs nothing at K = 4608), 360, 339 and 356 of rank 4,
// whose registers are too few for 96; of half of it at once, 64 x 192, 297. More stages of stores change nothing.
template <int kBlockN, int kRanks>
constexpr int kSubtileColumns = kBlockN == 96 || (kBlockN == 192 && kRanks == 1) ? 96 : 64;

template <typename Out, int kBlockN, int kRanks, bool kZero>
int32_t launch_wgmma_low_rank(const qvdit_gemm_args& args, cudaStream_t stream) {
  using Visitor = cutlass::epilogue::fusion::Sm90EVT<RanksVisitor<Out, 128, kBlockN, 128, kRanks, kZero>>;
  return WgmmaGemm<Out, kBlockN, kSubtileColumns<kBlockN, kRanks>, Visitor>::run(args, {args}, stream);
}

}  // namespace qvdit
