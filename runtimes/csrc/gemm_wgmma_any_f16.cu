#include "gemm_wgmma_any.cuh"

namespace qvdit {

int32_t gemm_wgmma_any_f16(const qvdit_gemm_args& args, cudaStream_t stream) {
  return launch_wgmma_any<cutlass::half_t, 128>(args, stream);
}

}  // namespace qvdit
