// s8 x s8 → s32 for Hopper: CUTLASS's TMA warp-specialized wgmma kernels (its first version passes FP8 row-scaled
// cuBLASLt at every shape measured, so it is not written by hand) with this project's epilogue as one visitor.
//
// Clusters of 2 x 1: two tiles beside each other in M share their slice of the weights by multicast. Persistent grid,
// one block a multiprocessor.
#pragma once

#include <type_traits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/kernel_hardware_info.h"
#include "gemm.h"
#include "gemm_epilogue.cuh"

namespace qvdit {

// The whole epilogue as a leaf of CUTLASS's visitor tree: it loads what it needs itself, through L1, at the coordinates
// of the thread's accumulators. Returns y as Out; where that is int32, the corrected accumulators.
template <typename Out>
struct LowBitVisitor {
  struct SharedStorage {};
  using Arguments = qvdit_gemm_args;
  using Params = qvdit_gemm_args;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const&, Arguments const& args, void*) {
    return args;
  }
  template <class ProblemShape>
  static bool can_implement(ProblemShape const&, Arguments const&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(ProblemShape const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE LowBitVisitor() {}
  CUTLASS_HOST_DEVICE LowBitVisitor(Params const& params, SharedStorage const&) : params_(&params) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(cutlass::epilogue::fusion::ProducerLoadArgs<Args...> const&) {
    return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
  }

  // coordinates: (m, n) of the thread's accumulators relative to its first, static [.., EPI_M, EPI_N].
  template <class Coordinates>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(Coordinates coordinates, int first_m, int first_n, Params const* params)
        : coordinates(coordinates), first_m(first_m), first_n(first_n), params(params) {}

    Coordinates coordinates;
    int first_m, first_n;
    Params const* params;

    // A subtile's accumulators as wgmma lays them out: pairs beside each other in n, alternating between two rows 8
    // apart: (n, n + 1) of m, of m + 8, then the next 8 columns.
    template <int kSize>
    CUTLASS_DEVICE cutlass::Array<Out, kSize> visit(cutlass::Array<int32_t, kSize> const& acc, int epi_v, int epi_m,
                                                    int epi_n) {
      static_assert(kSize % 4 == 0 && in_wgmma_order(cute::make_seq<kSize>{}), "another order of accumulators");
      constexpr int kPairs = kSize / 4;
      cute::Tensor here = coordinates(cute::_, cute::_, cute::_, epi_m, epi_n);
      EpilogueFragment<2, kPairs> fragment{*params, {}, {}, true};
      int32_t sums[2][kPairs][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = first_m + cute::get<0>(here(epi_v * kSize + 2 * h));
        fragment.row[h] = row < params->m ? row : params->m - 1;
      }
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        fragment.column[p] = first_n + cute::get<1>(here(epi_v * kSize + 4 * p));
#pragma unroll
        for (int h = 0; h < 2; ++h) sums[h][p][0] = acc[4 * p + 2 * h], sums[h][p][1] = acc[4 * p + 2 * h + 1];
      }
      fragment.correct(sums);
      if constexpr (std::is_same_v<Out, int32_t>) {
        return flattened<kSize>(sums);
      } else {
        float y[2][kPairs][2];
        fragment.finish(sums, y);
        return cutlass::NumericArrayConverter<Out, float, kSize>{}(flattened<kSize>(y));
      }
    }

    template <int... i>
    static constexpr bool in_wgmma_order(cute::seq<i...>) {
      return ((row_of<i> == i / 2 % 2 * 8 && column_of<i> == i / 4 * 8 + i % 2) && ...);
    }
    template <int i>
    using Coordinate = decltype(std::declval<Coordinates>()(cute::Int<i>{}));
    template <int i>
    static constexpr int row_of = decltype(cute::get<0>(std::declval<Coordinate<i>>()))::value;
    template <int i>
    static constexpr int column_of = decltype(cute::get<1>(std::declval<Coordinate<i>>()))::value;

    // [2][pairs][2] in wgmma's order.
    template <int kSize, typename T>
    static CUTLASS_DEVICE cutlass::Array<T, kSize> flattened(T const (&values)[2][kSize / 4][2]) {
      cutlass::Array<T, kSize> flat;
#pragma unroll
      for (int i = 0; i < kSize; ++i) flat[i] = values[i / 2 % 2][i / 4][i % 2];
      return flat;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(cutlass::epilogue::fusion::ConsumerStoreArgs<Args...> const& args) {
    // The residue is the matrix's end relative to the thread's first accumulator.
    const int first_m = static_cast<int>(params_->m) - cute::get<0>(args.residue_tCcD);
    const int first_n = static_cast<int>(params_->n) - cute::get<1>(args.residue_tCcD);
    return Callbacks<decltype(args.tCcD)>(args.tCcD, first_m, first_n, params_);
  }

  Params const* params_;
};

template <typename Out, int kBlockN, bool kPingpong>
struct WgmmaGemm {
  using Tile = cute::Shape<cute::_128, cute::Int<kBlockN>, cute::_128>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;  // of the weights: [N, K] in memory is K x N by columns
  static constexpr int kOutAlignment = 16 / sizeof(Out);

  using EpilogueSchedule = std::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                                              cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using MainloopSchedule = std::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                              cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, Row, kOutAlignment, Out, Row,
      kOutAlignment, EpilogueSchedule, cutlass::epilogue::fusion::Sm90EVT<LowBitVisitor<Out>>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, Row, 16, int8_t, Column, 16, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static int32_t run(const qvdit_gemm_args& args, cudaStream_t stream) {
    const int m = static_cast<int>(args.m), n = static_cast<int>(args.n), k = static_cast<int>(args.k_pad);
    cutlass::KernelHardwareInfo hardware;
    if (cudaGetDevice(&hardware.device_id) != cudaSuccess) return launched("cudaGetDevice");
    cudaDeviceGetAttribute(&hardware.sm_count, cudaDevAttrMultiProcessorCount, hardware.device_id);
    const auto k_stride = [k](auto stride) { return cute::get<0>(stride) = k, stride; };
    typename Kernel::StrideD y_stride{};
    cute::get<0>(y_stride) = args.n;
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {args.x_q, k_stride(typename Kernel::StrideA{}), args.weight, k_stride(typename Kernel::StrideB{})},
        {{args}, nullptr, {}, static_cast<Out*>(args.y), y_stride},
        hardware};
    if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess || Gemm::get_workspace_size(arguments) != 0) {
      return fail(QVDIT_INVALID, "wgmma tiles do not take M %d, N %d, K_pad %d", m, n, k);
    }
    Gemm gemm;
    cutlass::Status status = gemm.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    if (status != cutlass::Status::kSuccess) {
      const cudaError_t error = cudaGetLastError();
      return fail(QVDIT_CUDA, "gemm_wgmma: %s (%s)", cutlass::cutlassGetStatusString(status),
                  cudaGetErrorString(error));
    }
    return launched("gemm_wgmma");
  }
};

}  // namespace qvdit
