// s8 x s8 → s32 for Hopper: CUTLASS's TMA warp-specialized wgmma kernels (its first version passes FP8 row-scaled
// cuBLASLt at every shape measured, so it is not written by hand), their epilogue a visitor of the caller's.
//
// Ping-pong: each of the two warpgroups has a tile and its epilogue for itself, one after the other. Clusters of 2 x 1:
// two tiles beside each other in M share their slice of the weights by multicast. Persistent grid, one block a
// multiprocessor. Cooperative warpgroups, tiles of 256 rows or columns, other clusters and rasters all lost, on an H100
// at every shape of `qvdit bench kernels` (2026-11-25).
#pragma once

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

// What CUTLASS asks of a visitor on the host: its parameters are its arguments, and it needs no workspace.
template <class Arguments_>
struct VisitorHost {
  using Arguments = Arguments_;
  using Params = Arguments_;

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
};

// Visitor: a tree of CUTLASS's that makes y as Out.
template <typename Out, int kBlockN, class Visitor>
struct WgmmaGemm {
  using Tile = WgmmaTile<kBlockN>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;  // of the weights: [N, K] in memory is K x N by columns
  static constexpr int kOutAlignment = 16 / sizeof(Out);

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, Row, kOutAlignment, Out, Row,
      kOutAlignment, cutlass::epilogue::TmaWarpSpecialized, Visitor>::CollectiveOp;
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
