#include "attention.cuh"

namespace qvdit {

int32_t attention_f16(const qvdit_attention_args& args, cudaStream_t stream) {
  return launch_attention<__half>(args, stream);
}

}  // namespace qvdit
