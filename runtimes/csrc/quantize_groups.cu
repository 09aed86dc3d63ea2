#include "quantize_groups.cuh"

namespace qvdit {

int32_t quantize_groups(const QuantizeParams& params, bool& fits, cudaStream_t stream) {
  return params.args.x_dtype == QVDIT_F16 ? launch_groups<__half>(params, fits, stream)
                                          : launch_groups<__nv_bfloat16>(params, fits, stream);
}

}  // namespace qvdit
