#include "gemm_wgmma_low_rank.cuh"

namespace qvdit {

int32_t gemm_wgmma_rank4_96_bf16(const qvdit_gemm_args& args, cudaStream_t stream) {
  return launch_wgmma_low_rank<cutlass::bfloat16_t, 96, 4, false>(args, stream);
}

}  // namespace qvdit
