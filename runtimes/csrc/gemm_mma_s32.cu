#include "gemm_mma.cuh"

namespace qvdit {

int32_t gemm_mma_s32(const qvdit_gemm_args& args, bool wide, cudaStream_t stream) {
  return launch_gemm_mma<int32_t>(args, wide, stream);
}

}  // namespace qvdit
