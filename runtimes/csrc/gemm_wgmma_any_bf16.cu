#include "gemm_wgmma_any.cuh"

namespace qvdit {

int32_t gemm_wgmma_any_bf16(const qvdit_gemm_args& args, cudaStream_t stream) {
  return launch_wgmma_any<cutlass::bfloat16_t, 128>(args, stream);
}

}  // namespace qvdit
