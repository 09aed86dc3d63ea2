#include "quantize_rows.cuh"

namespace qvdit {

int32_t quantize_gelu(const QuantizeParams& params, cudaStream_t stream) {
  return launch_quantize<Gelu>(params, stream);
}

}  // namespace qvdit
