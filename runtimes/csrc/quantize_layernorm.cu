#include "quantize_rows.cuh"

namespace qvdit {

int32_t quantize_layernorm(const QuantizeParams& params, cudaStream_t stream) {
  return launch_quantize<LayerNormModulate>(params, stream);
}

}  // namespace qvdit
