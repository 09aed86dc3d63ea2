// What the GEMM's entry point, its kernels and their epilogues share on the host.
#pragma once

#include <cuda_runtime.h>

#include "error.h"

namespace qvdit {

// One file each, so that they compile beside each other. The arguments have been checked.
int32_t gemm_mma_f32(const qvdit_gemm_args& args, bool wide, cudaStream_t stream);
int32_t gemm_mma_f16(const qvdit_gemm_args& args, bool wide, cudaStream_t stream);
int32_t gemm_mma_bf16(const qvdit_gemm_args& args, bool wide, cudaStream_t stream);
int32_t gemm_mma_s32(const qvdit_gemm_args& args, bool wide, cudaStream_t stream);

// Hopper, N · sizeof(y) a multiple of 16 bytes; tiles of 128 rows and so many columns, which must lie in one segment.
int32_t gemm_wgmma_96_f16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_96_bf16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_128_f16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_128_bf16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_128_s32(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_192_f16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_192_bf16(const qvdit_gemm_args& args, cudaStream_t stream);

}  // namespace qvdit
