#include "gemm_wgmma.cuh"

namespace qvdit {

int32_t gemm_wgmma_128_s32(const qvdit_gemm_args& args, cudaStream_t stream) {
  return launch_wgmma<int32_t, 128>(args, stream);
}

}  // namespace qvdit
