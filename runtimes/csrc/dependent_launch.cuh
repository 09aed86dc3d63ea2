// A layer's three kernels, each starting while the one before it still ends (programmatic dependent launch): with few
// rows they take some microseconds each, and as long as it takes to start them is then hidden. From Hopper on;
// elsewhere they start as ever, one after the other.
//
//   quantize_rows   is launched as any kernel, so that all before it has ended; lets the next start at once
//   unpack_weight   is launched early, brings its words to L2, waits; lets the next start at once. Right after its
//                   layer's quantize_rows its last block waits, and that when it is done
//   gemm_wgmma      is launched early, sets up its barriers, waits; lets the next start when its blocks load their last
//                   tiles, which may be their first
//
// What is read and written is as if none did. Whoever is launched early waits, in every block and before it reads or
// writes device memory, until the kernel before it has ended and what it wrote is there. That one waited too, and
// quantize_rows comes first: so all kernels before have ended. It must not read by __ldg, which may be moved ahead of
// the waiting. The exception is unpacking beside the quantizer: it shares nothing with that, and all that ran before
// the quantizer has ended. It waits so that whoever waits for it has waited for both.
#pragma once

#include <cuda_runtime.h>

namespace qvdit {

__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once every block has called it, or has ended, the next kernel may start if it is launched early.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// kernel<<<grid, block, 0, stream>>>(params), but early. As there, cudaGetLastError tells of an error.
template <typename Params>
void launch_early(void (*kernel)(Params), dim3 grid, dim3 block, cudaStream_t stream, const Params& params) {
  int device = 0, major = 0;
  const bool able = cudaGetDevice(&device) == cudaSuccess &&
                    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                    major >= 9;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.stream = stream;
  config.attrs = &early, config.numAttrs = able ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace qvdit
