// Unpacking, as a layer's three kernels share it on the host.
#pragma once

#include <cuda_runtime.h>

#include "qvdit_kernels.h"

namespace qvdit {

// qvdit_unpack_weight. beside_quantizer: quantize_rows is the kernel before on this stream. It came after all that ran
// before it, and shares nothing with unpacking, so the two run side by side; whoever waits for this kernel has waited
// for both.
int32_t unpack_weight(const qvdit_unpack_args& args, bool beside_quantizer, cudaStream_t stream);

}  // namespace qvdit
