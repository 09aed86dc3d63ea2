#include "quantize_halves.cuh"

namespace qvdit {

int32_t quantize_bf16(const QuantizeParams& params, cudaStream_t stream) {
  return launch_halves<__nv_bfloat16>(params, stream);
}

}  // namespace qvdit
