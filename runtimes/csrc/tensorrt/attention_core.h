// The operator HeadwiseAttention for TensorRT, without TensorRT: which tensors a node has and how it runs on the kernel
// library. Nothing here allocates or throws.
//
// Symbols as in attributes.h.
#pragma once

#include "attributes.h"

namespace qvdit::trt {

// Not packed: q, k, v; k and v packed: q, kv; all: qkv. Each float16 or bfloat16, as y is: [B, L, H·D], [B, L, H, D] or
// [B, H, L, D]; k and v with S for L. Packed [B, S, 2·H·D] and [B, L, 3·H·D]. The one output is y [B, L, H·D].
int input_count(const AttentionAttributes& attributes) noexcept;
inline int output_count(const AttentionAttributes&) noexcept { return 1; }

// The extent of the first input that is L.
int row_axis(const AttentionAttributes& attributes) noexcept;
// H·D.
int64_t features(const AttentionAttributes& attributes) noexcept;

// Whether input or output ``position``, counted through both, may be of a type where the first input is of another.
bool takes_type(const AttentionAttributes& attributes, int position, int32_t type, int32_t first) noexcept;

// The type (enum qvdit_dtype) of y for a first input of a type; float16 where that is not decided.
int32_t output_type(const AttentionAttributes& attributes, int output, int32_t first) noexcept;

// What an input is taken for where only its shape is known.
inline int32_t assumed_type(const AttentionAttributes&, int) noexcept { return QVDIT_F16; }

// Whether the first input may come to be of a type that is taken: TensorRT 8.6 calls what will be float16 float32.
bool check_early_type(const AttentionAttributes& attributes, int32_t type, Refusal& refusal) noexcept;

// Whether the first ``count`` inputs may be of these types (enum qvdit_dtype or kOtherType).
bool check_types(const AttentionAttributes& attributes, const int32_t* types, int count, Refusal& refusal) noexcept;

// Whether ``count`` inputs are those of the node: their number, and as far as known their types and shapes.
bool check_inputs(const AttentionAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept;

// check_inputs, and that known extents have keys for their queries.
bool check_shapes(const AttentionAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept;

// The kernel needs none.
inline int64_t workspace_bytes(const AttentionAttributes&, const Tensor*) noexcept { return 0; }

// Starts the node on a stream (a cudaStream_t) and returns at once. All in device memory.
bool run(const AttentionAttributes& attributes, const Tensor* descriptions, const void* const* inputs,
         void* const* outputs, void* workspace, void* stream, Refusal& refusal) noexcept;

}  // namespace qvdit::trt
