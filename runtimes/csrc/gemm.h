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

// Hopper, N · sizeof(y) a multiple of 16 bytes.
int32_t gemm_wgmma_any_f16(const qvdit_gemm_args& args, cudaStream_t stream);  // 128x128
int32_t gemm_wgmma_any_bf16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_any_s32(const qvdit_gemm_args& args, cudaStream_t stream);

// Of rank 0 or 1, and of rank 2 to 4, without weight_zero; with zero or without. 96 and 192 columns: a tile must lie in
// one segment.
int32_t gemm_wgmma_rank1_96_f16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank1_96_bf16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank1_128_f16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank1_128_bf16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank1_192_f16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank1_192_bf16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank1_zero_192_f16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank1_zero_192_bf16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank4_96_f16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank4_96_bf16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank4_128_f16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank4_128_bf16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank4_192_f16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank4_192_bf16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank4_zero_192_f16(const qvdit_gemm_args& args, cudaStream_t stream);
int32_t gemm_wgmma_rank4_zero_192_bf16(const qvdit_gemm_args& args, cudaStream_t stream);

}  // namespace qvdit
