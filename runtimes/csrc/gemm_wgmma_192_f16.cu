#include "gemm_wgmma.cuh"

namespace qvdit {

int32_t gemm_wgmma_192_f16(const qvdit_gemm_args& args, cudaStream_t stream) {
  return launch_wgmma<cutlass::half_t, 192>(args, stream);
}

}  // namespace qvdit
