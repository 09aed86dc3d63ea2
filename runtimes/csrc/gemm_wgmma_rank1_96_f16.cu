#include "gemm_wgmma_low_rank.cuh"

namespace qvdit {

int32_t gemm_wgmma_rank1_96_f16(const qvdit_gemm_args& args, cudaStream_t stream) {
  return launch_wgmma_low_rank<cutlass::half_t, 96, 1, false>(args, stream);
}

}  // namespace qvdit
