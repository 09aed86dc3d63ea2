#include "gemm_mma.cuh"

namespace qvdit {

int32_t gemm_mma_f32(const qvdit_gemm_args& args, bool wide, cudaStream_t stream) {
  return launch_gemm_mma<float>(args, wide, stream);
}

}  // namespace qvdit
