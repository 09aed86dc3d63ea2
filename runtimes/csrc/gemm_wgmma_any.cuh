// Hopper's GEMM with every epilogue there is, as one visitor of this project's: any rank, every zero point, int32 out.
// What most layers need has faster kernels of its own: gemm_wgmma_low_rank.cuh.
#pragma once

#include <type_traits>

#include "gemm_epilogue.cuh"
#include "gemm_wgmma.cuh"

namespace qvdit {

constexpr int kStagedRanks = 4;  // those of more ranks read the rest through L1

// What a tile's epilogue needs of its rows and columns. Each value is read from device memory once a tile, and from
// here once for all the accumulators of a thread's column or row: shared memory is what the mainloop of the other
// warpgroup is bound by.
template <int kBlockM, int kBlockN>
struct EpilogueFactors {
  alignas(16) float scale[kBlockM];
  alignas(16) int32_t zero[kBlockM];
  alignas(16) float u[kStagedRanks][kBlockM];
  alignas(16) float weight_scale[kBlockN];
  alignas(16) int32_t weight_sum[kBlockN];
  alignas(16) float bias[kBlockN];
  alignas(16) float beta[kStagedRanks][kBlockN];

  // By all threads of the epilogue. Rows and columns past the ends get zeros; a rank that is absent, too.
  __device__ __forceinline__ void fill(const qvdit_gemm_args& args, int64_t first_m, int64_t first_n, int thread,
                                       int threads) {
    const int ranks = args.rank < kStagedRanks ? static_cast<int>(args.rank) : kStagedRanks;
    for (int i = thread; i < kBlockN; i += threads) {
      const int64_t n = first_n + i;
      const bool there = n < args.n;
      if (args.weight_scale) weight_scale[i] = there ? args.weight_scale[n] : 0.f;
      bias[i] = there && args.bias ? args.bias[n] : 0.f;
      beta[0][i] = there && ranks > 0 ? args.beta[n] : 0.f;
      for (int r = 1; r < ranks; ++r) beta[r][i] = there ? args.beta[r * args.n + n] : 0.f;
      if (args.zero) weight_sum[i] = there ? args.weight_sum[n] : 0;
    }
    const float* segment_u = args.u + first_u(args, first_n);
    for (int i = thread; i < kBlockM; i += threads) {
      const int64_t m = first_m + i;
      const bool there = m < args.m;
      if (args.scale) scale[i] = there ? args.scale[m] : 0.f;
      u[0][i] = there && ranks > 0 ? segment_u[m] : 0.f;
      for (int r = 1; r < ranks; ++r) u[r][i] = there ? segment_u[r * args.m + m] : 0.f;
      if (args.zero) zero[i] = there ? args.zero[m] : 0;
    }
  }
};

// The whole epilogue as a leaf of CUTLASS's visitor tree. Returns y as Out; where that is int32, the corrected
// accumulators.
template <typename Out, int kBlockM, int kBlockN, int kThreads>
struct LowBitVisitor : LeafVisitor {
  using SharedStorage = EpilogueFactors<kBlockM, kBlockN>;

  CUTLASS_HOST_DEVICE LowBitVisitor() {}
  CUTLASS_HOST_DEVICE LowBitVisitor(Params const& params, SharedStorage const& shared)
      : params_(&params), shared_(const_cast<SharedStorage*>(&shared)) {}

  template <class Coordinates>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    using Place = WgmmaPlace<Coordinates>;
    static constexpr int kSubtilesM = Place::kSubtilesM, kPairs = Place::kPairs;

    CUTLASS_DEVICE Callbacks(Place place, int thread, Params const* params, SharedStorage* shared)
        : place(place), thread(thread), params(params), shared(shared) {}

    Place place;
    int thread;
    Params const* params;
    SharedStorage* shared;
    // The thread's factors: of all its rows, and of the columns of one subtile.
    float scale[kSubtilesM][2], u[kSubtilesM][2];
    int32_t zero[kSubtilesM][2];
    float2 weight_scale[kPairs], bias[kPairs], beta[kPairs];
    int2 weight_sum[kPairs];

    CUTLASS_DEVICE void begin() { shared->fill(*params, place.tile_m, place.tile_n, thread, kThreads); }
    CUTLASS_DEVICE bool begin_sync_needed() const { return true; }

    // Subtiles come by columns: (0, 0), (1, 0), …, (0, 1), …
    CUTLASS_DEVICE void begin_loop(int epi_m, int epi_n) {
      const bool zeros = params->zero != nullptr;
      if (epi_n == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          scale[epi_m][h] = shared->scale[place.row(epi_m, h)];
          u[epi_m][h] = shared->u[0][place.row(epi_m, h)];
          if (zeros) zero[epi_m][h] = shared->zero[place.row(epi_m, h)];
        }
      }
      if (epi_m == 0) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          const int n = place.column(epi_n, p);
          weight_scale[p] = *reinterpret_cast<const float2*>(shared->weight_scale + n);
          bias[p] = *reinterpret_cast<const float2*>(shared->bias + n);
          beta[p] = *reinterpret_cast<const float2*>(shared->beta[0] + n);
          if (zeros) weight_sum[p] = *reinterpret_cast<const int2*>(shared->weight_sum + n);
        }
      }
    }

    template <int kSize>
    CUTLASS_DEVICE cutlass::Array<Out, kSize> visit(cutlass::Array<int32_t, kSize> const& acc, int epi_v, int epi_m,
                                                    int epi_n) {
      static_assert(kSize % 4 == 0 && Place::in_wgmma_order(), "another order of accumulators");
      const int first_pair = epi_v * kSize / 4;
      cutlass::Array<int32_t, kSize> sums = acc;
      if (params->zero) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const int2 pair = weight_sum[first_pair + i / 4];
          sums[i] -= zero[epi_m][i / 2 % 2] * (i % 2 ? pair.y : pair.x);
        }
      }
      if (params->weight_zero) correct_weight_zero(sums, first_pair, epi_m, epi_n);
      if constexpr (std::is_same_v<Out, int32_t>) {
        return sums;
      } else {
        cutlass::Array<float, kSize> y;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const int p = first_pair + i / 4, h = i / 2 % 2;
          y[i] = scale[epi_m][h] * (static_cast<float>(sums[i]) * (i % 2 ? weight_scale[p].y : weight_scale[p].x));
          y[i] += u[epi_m][h] * (i % 2 ? beta[p].y : beta[p].x);
        }
        if (params->rank > 1) add_further_ranks(y, first_pair, epi_m, epi_n);
#pragma unroll
        for (int i = 0; i < kSize; ++i) y[i] += i % 2 ? bias[first_pair + i / 4].y : bias[first_pair + i / 4].x;
        return cutlass::NumericArrayConverter<Out, float, kSize>{}(y);
      }
    }

    template <int kSize>
    CUTLASS_DEVICE void add_further_ranks(cutlass::Array<float, kSize>& y, int first_pair, int epi_m, int epi_n) const {
      const int ranks = static_cast<int>(params->rank), staged = ranks < kStagedRanks ? ranks : kStagedRanks;
#pragma unroll
      for (int r = 1; r < kStagedRanks; ++r) {
        if (r >= staged) break;
#pragma unroll
        for (int i = 0; i < kSize; i += 2) {
          const float2 pair =
              *reinterpret_cast<const float2*>(shared->beta[r] + place.column(epi_n, first_pair + i / 4));
          const float factor = shared->u[r][place.row(epi_m, i / 2 % 2)];
          y[i] += factor * pair.x, y[i + 1] += factor * pair.y;
        }
      }
#pragma unroll 1
      for (int r = kStagedRanks; r < ranks; ++r) {
        const float* row_u = params->u + first_u(*params, place.tile_n) + r * params->m;
        const float* column_beta = params->beta + r * params->n;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const int64_t m = place.tile_m + place.row(epi_m, i / 2 % 2),
                        n = place.tile_n + place.column(epi_n, first_pair + i / 4) + i % 2;
          if (m < params->m && n < params->n) y[i] += row_u[m] * column_beta[n];
        }
      }
    }

    template <int kSize>
    CUTLASS_DEVICE void correct_weight_zero(cutlass::Array<int32_t, kSize>& sums, int first_pair, int epi_m,
                                            int epi_n) const {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const int64_t m = place.tile_m + place.row(epi_m, i / 2 % 2),
                      n = place.tile_n + place.column(epi_n, first_pair + i / 4) + i % 2;
        if (m < params->m && n < params->n) sums[i] -= params->row_sum[m] * params->weight_zero[n];
      }
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(cutlass::epilogue::fusion::ConsumerStoreArgs<Args...> const& args) {
    return Callbacks<decltype(args.tCcD)>(wgmma_place(args, *params_), args.thread_idx, params_, shared_);
  }

  Params const* params_;
  SharedStorage* shared_;
};

template <typename Out, int kBlockN>
int32_t launch_wgmma_any(const qvdit_gemm_args& args, cudaStream_t stream) {
  using Visitor = cutlass::epilogue::fusion::Sm90EVT<LowBitVisitor<Out, 128, kBlockN, 128>>;
  return WgmmaGemm<Out, kBlockN, 32, Visitor>::run(args, {args}, stream);
}

}  // namespace qvdit
