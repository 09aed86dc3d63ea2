#include "gemm_mma.cuh"

namespace qvdit {

int32_t gemm_mma_f16(const qvdit_gemm_args& args, bool wide, cudaStream_t stream) {
  return launch_gemm_mma<__half>(args, wide, stream);
}

}  // namespace qvdit
