#include "quantize_rows.cuh"

namespace qvdit {

int32_t quantize_plain(const QuantizeParams& params, cudaStream_t stream) {
  return launch_quantize<Plain>(params, stream);
}

}  // namespace qvdit
