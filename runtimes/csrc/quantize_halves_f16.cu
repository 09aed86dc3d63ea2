#include "quantize_halves.cuh"

namespace qvdit {

int32_t quantize_f16(const QuantizeParams& params, cudaStream_t stream) {
  return launch_halves<__half>(params, stream);
}

}  // namespace qvdit
