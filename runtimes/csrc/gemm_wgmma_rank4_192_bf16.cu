#include "gemm_wgmma_rank4.cuh"

namespace qvdit {

int32_t gemm_wgmma_rank4_192_bf16(const qvdit_gemm_args& args, cudaStream_t stream) {
  return launch_wgmma_rank4<cutlass::bfloat16_t, 192, false>(args, stream);
}

}  // namespace qvdit
