// s8 x s8 → s32 for Hopper: CUTLASS's TMA warp-specialized wgmma kernels (its first version passes FP8 row-scaled
// cuBLASLt at every shape measured, so it is not written by hand), the layer's epilogue before its own.
//
// Ping-pong: each of the two warpgroups has a tile and its epilogue for itself, one after the other. Clusters of 2 x 1:
// two tiles beside each other in M share their slice of the weights by multicast. Persistent grid, one block a
// multiprocessor. Cooperative warpgroups, tiles of 256 rows or columns and other clusters all lost, on an H100
// at every shape of `qvdit bench kernels` (2026-11-25).
//
// It starts early, as dependent_launch.cuh has it: the warp that loads waits, the others for what that one loads.
#pragma once

#define CUTLASS_ENABLE_GDC_FOR_SM90  // the waiting

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
#include "gemm_wgmma_epilogue.cuh"

namespace qvdit {

// kRanks, Beta: as of WgmmaEpilogue.
template <typename Out, int kBlockN, int kRanks, typename Beta = float>
struct WgmmaGemm {
  static constexpr int kBlockM = 128, kThreads = 128;  // threads of a warpgroup
  using Tile = cute::Shape<cute::Int<kBlockM>, cute::Int<kBlockN>, cute::_128>;
  // What a warpgroup converts and hands to TMA at once: a block of the epilogue's. CUTLASS's own choice, 64 x 32, costs
  // its threads three to six times as many meetings and waits for the one before.
  using Subtile = cute::Shape<cute::_64, cute::Int<kBlockN>>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;  // of the weights: [N, K] in memory is K x N by columns
  static constexpr int kOutAlignment = 16 / sizeof(Out);
  using Sum = std::conditional_t<std::is_same_v<Out, int32_t>, int32_t, float>;

  using Convert = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::epilogue::thread::Identity, Out, Sum,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      cutlass::epilogue::fusion::Sm90AccFetch>;
  using Store = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, Subtile, Sum, Sum, void, Row, kOutAlignment,
      Out, Row, kOutAlignment, cutlass::epilogue::TmaWarpSpecialized, Convert>::CollectiveOp;
  using Epilogue = WgmmaEpilogue<Store, kBlockM, kBlockN, kThreads, kRanks, Beta>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, Row, 16, int8_t, Column, 16, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // Blocks take tiles in strips of so many pairs (of rows of tiles; of columns where there are more of these). Of wide
  // outputs what runs at once then reads less of the weights, which L2 may not hold: µs for 32768 x 12288 x 3072 1836
  // and 1784, x 13824 x 5120 3583 and 3414, in turns on an H200 (2026-11-28). N = 3072 gained nothing, and tiles of 96
  // columns lost 4 to 6 % at N of 7680 and 12288. CUTLASS rounds the tiles' numbers up to multiples of it, of which it
  // may waste 1 %: 27 as 32 cost a fifth.
  static int tiles_aside(const qvdit_gemm_args& args) {
    constexpr int64_t kWide = 6144;
    if (kBlockN < 128 || args.n < kWide) return 1;
    const int64_t rows = cute::ceil_div(args.m, kBlockM), columns = cute::ceil_div(args.n, kBlockN);
    const auto tiles = [&](int64_t aside) { return cute::round_up(rows, 2 * aside) * cute::round_up(columns, aside); };
    for (const int aside : {8, 4, 2}) {
      if (100 * tiles(aside) <= 101 * tiles(1)) return aside;
    }
    return 1;
  }

  static int32_t run(const qvdit_gemm_args& args, cudaStream_t stream) {
    const int m = static_cast<int>(args.m), n = static_cast<int>(args.n), k = static_cast<int>(args.k_pad);
    cutlass::KernelHardwareInfo hardware;
    if (cudaGetDevice(&hardware.device_id) != cudaSuccess) return launched("cudaGetDevice");
    cudaDeviceGetAttribute(&hardware.sm_count, cudaDevAttrMultiProcessorCount, hardware.device_id);
    const auto k_stride = [k](auto stride) { return cute::get<0>(stride) = k, stride; };
    typename Epilogue::Arguments epilogue{};
    epilogue.ptr_D = static_cast<Out*>(args.y);
    cute::get<0>(epilogue.dD) = args.n;
    epilogue.gemm = args;
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {args.x_q, k_stride(typename Kernel::StrideA{}), args.weight, k_stride(typename Kernel::StrideB{})},
        epilogue,
        hardware};
    arguments.scheduler.max_swizzle_size = tiles_aside(args);
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

template <typename Out, int kBlockN>
int32_t launch_wgmma(const qvdit_gemm_args& args, cudaStream_t stream) {
  if constexpr (!std::is_same_v<Out, int32_t>) {
    if (args.rank > 0 && args.beta_dtype == QVDIT_F16) {
      return WgmmaGemm<Out, kBlockN, kRanksAtOnce, __half>::run(args, stream);
    }
    if (args.rank == 1) return WgmmaGemm<Out, kBlockN, 1>::run(args, stream);
    if (args.rank > 1) return WgmmaGemm<Out, kBlockN, kRanksAtOnce>::run(args, stream);
  }
  return WgmmaGemm<Out, kBlockN, 0>::run(args, stream);
}

}  // namespace qvdit
