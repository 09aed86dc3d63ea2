#include "attention.cuh"

namespace qvdit {

int32_t attention_bf16(const qvdit_attention_args& args, cudaStream_t stream) {
  return launch_attention<__nv_bfloat16>(args, stream);
}

}  // namespace qvdit
