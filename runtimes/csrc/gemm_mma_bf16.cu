#include "gemm_mma.cuh"

namespace qvdit {

int32_t gemm_mma_bf16(const qvdit_gemm_args& args, bool wide, cudaStream_t stream) {
  return launch_gemm_mma<__nv_bfloat16>(args, wide, stream);
}

}  // namespace qvdit
