// s8 x s8 → s32 for Hopper: CUTLASS's TMA warp-specialized wgmma kernels (its first version passes FP8 row-scaled
// cuBLASLt at every shape measured, so it is not written by hand), their epilogue a visitor of the caller's.
//
// Ping-pong: each of the two warpgroups has a tile and its epilogue for itself, one after the other. Clusters of 2 x 1:
// two tiles beside each other in M share their slice of the weights by multicast. Persistent grid, one block a
// multiprocessor. Cooperative warpgroups, tiles of 256 rows or columns, other clusters and rasters all lost, on an H100
// at every shape of `qvdit bench kernels` (2026-11-25).
//
// It starts early, as dependent_launch.cuh has it: the warp that loads waits, the others for what that one loads.
#pragma once

#define CUTLASS_ENABLE_GDC_FOR_SM90  // the waiting

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/kernel_hardware_info.h"
#include "gemm.h"

namespace qvdit {

template <int kBlockN>
using WgmmaTile = cute::Shape<cute::_128, cute::Int<kBlockN>, cute::_128>;

// What CUTLASS asks of every leaf of a visitor tree: here its parameters are the layer's, it needs no workspace, and
// nothing is loaded for it.
struct LeafVisitor {
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

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(cutlass::epilogue::fusion::ProducerLoadArgs<Args...> const&) {
    return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
  }
};

// Where a thread's accumulators are, subtile by subtile.
//
// coordinates: (m, n) of them relative to the thread's first, static [.., EPI_M, EPI_N]. A subtile's are laid out as
// wgmma does it: pairs beside each other in n, alternating between two rows 8 apart: (n, n + 1) of m, of m + 8, then
// the next 8 columns.
template <class Coordinates>
struct WgmmaPlace {
  static constexpr int kSize = decltype(cute::size(
      std::declval<Coordinates>()(cute::_, cute::_, cute::_, cute::Int<0>{}, cute::Int<0>{})))::value;
  static constexpr int kSubtilesM = decltype(cute::size<3>(std::declval<Coordinates>()))::value;
  static constexpr int kPairs = kSize / 4;

  Coordinates coordinates;
  int thread_m, thread_n;  // of the thread's first, within the tile
  int tile_m, tile_n;      // of the tile

  // Within the tile: of a subtile's row h (0 or 1) and of the first column of its pair p.
  CUTLASS_DEVICE int row(int epi_m, int h) const {
    return thread_m + cute::get<0>(coordinates(cute::_, cute::_, cute::_, epi_m, 0)(2 * h));
  }
  CUTLASS_DEVICE int column(int epi_n, int p) const {
    return thread_n + cute::get<1>(coordinates(cute::_, cute::_, cute::_, 0, epi_n)(4 * p));
  }

  static constexpr bool in_wgmma_order() { return in_wgmma_order(cute::make_seq<kSize>{}); }

 private:
  template <int... i>
  static constexpr bool in_wgmma_order(cute::seq<i...>) {
    return kSize % 4 == 0 && ((row_of<i> == i / 2 % 2 * 8 && column_of<i> == i / 4 * 8 + i % 2) && ...);
  }
  template <int i>
  using Coordinate =
      decltype(std::declval<Coordinates>()(cute::_, cute::_, cute::_, cute::Int<0>{}, cute::Int<0>{})(cute::Int<i>{}));
  template <int i>
  static constexpr int row_of = decltype(cute::get<0>(std::declval<Coordinate<i>>()))::value;
  template <int i>
  static constexpr int column_of = decltype(cute::get<1>(std::declval<Coordinate<i>>()))::value;
};

// That of a visitor's callbacks.
template <class... Args>
CUTLASS_DEVICE auto wgmma_place(cutlass::epilogue::fusion::ConsumerStoreArgs<Args...> const& args,
                                qvdit_gemm_args const& gemm) {
  // The residues are the matrix's end relative to the tile's and to the thread's first accumulator.
  const int m = cute::get<0>(args.residue_cD), n = cute::get<1>(args.residue_cD);
  return WgmmaPlace<decltype(args.tCcD)>{args.tCcD, m - static_cast<int>(cute::get<0>(args.residue_tCcD)),
                                         n - static_cast<int>(cute::get<1>(args.residue_tCcD)),
                                         static_cast<int>(gemm.m) - m, static_cast<int>(gemm.n) - n};
}

// Visitor: a tree of CUTLASS's that makes y as Out. kSubtileN: columns of what a warpgroup takes from its accumulators,
// converts and hands to TMA at once; 64 rows. CUTLASS's own choice is 32. A subtile costs its threads two meetings and
// a wait for the one before, and an epilogue that outlasts the other warpgroup's mainloop is what bounds K = 1152.
template <typename Out, int kBlockN, int kSubtileN, class Visitor>
struct WgmmaGemm {
  using Tile = WgmmaTile<kBlockN>;
  using Subtile = cute::Shape<cute::_64, cute::Int<kSubtileN>>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;  // of the weights: [N, K] in memory is K x N by columns
  static constexpr int kOutAlignment = 16 / sizeof(Out);

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, Subtile, int32_t, float, void, Row,
      kOutAlignment, Out, Row, kOutAlignment, cutlass::epilogue::TmaWarpSpecialized, Visitor>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, Row, 16, int8_t, Column, 16, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  using Fused = typename Epilogue::FusionCallbacks::Arguments;

  static int32_t run(const qvdit_gemm_args& args, const Fused& fused, cudaStream_t stream) {
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
        {fused, nullptr, {}, static_cast<Out*>(args.y), y_stride},
        hardware};
    if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess || Gemm::get_workspace_size(arguments) != 0) {
      return fail(QVDIT_INVALID, "wgmma tiles do not take M %d, N %d, K_pad %d", m, n, k);
    }
    Gemm gemm;
    cutlass::Status status = gemm.initialize(arguments, nullptr, stream);
    constexpr bool kStartsEarly = true;
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream, nullptr, kStartsEarly);
    if (status != cutlass::Status::kSuccess) {
      const cudaError_t error = cudaGetLastError();
      return fail(QVDIT_CUDA, "gemm_wgmma: %s (%s)", cutlass::cutlassGetStatusString(status),
                  cudaGetErrorString(error));
    }
    return launched("gemm_wgmma");
  }
};

}  // namespace qvdit
