// The operator GatedResidual for TensorRT, without TensorRT: which tensors a node has and how it runs on the kernel
// library. Nothing here allocates or throws.
//
// Symbols: the residual [G or more, L, K], G gates.
#pragma once

#include "attributes.h"

namespace qvdit::trt {

// In this order.
enum ResidualInput {
  kResidual,   // float32 [B, L, K]
  kAdded,      // x: float16 or bfloat16 [B, L, K]
  kGate,       // float32 [B, 1, K], or [1, 1, K] for all. Gated
  kResidualInputs
};

// The one output is y, float32: [B, L, K], or swapped.
int input_count(const ResidualAttributes& attributes) noexcept;
inline int output_count(const ResidualAttributes&) noexcept { return 1; }

// Whether input or output ``position``, counted through both, may be of a type.
bool takes_type(const ResidualAttributes& attributes, int position, int32_t type, int32_t first) noexcept;

// float32.
int32_t output_type(const ResidualAttributes& attributes, int output, int32_t first) noexcept;

// What an input is taken for where only its shape is known.
int32_t assumed_type(const ResidualAttributes& attributes, int input) noexcept;

// Whether the first input may come to be of a type that is taken.
bool check_early_type(const ResidualAttributes& attributes, int32_t type, Refusal& refusal) noexcept;

// Whether the first ``count`` inputs may be of these types (enum qvdit_dtype or kOtherType).
bool check_types(const ResidualAttributes& attributes, const int32_t* types, int count, Refusal& refusal) noexcept;

// Whether ``count`` inputs are those of the node: their number, and as far as known their types and shapes.
bool check_inputs(const ResidualAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept;

// check_inputs, and what the kernel asks of known extents.
bool check_shapes(const ResidualAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept;

// The kernel needs none.
inline int64_t workspace_bytes(const ResidualAttributes&, const Tensor*) noexcept { return 0; }

// Starts the node on a stream (a cudaStream_t) and returns at once. All in device memory.
bool run(const ResidualAttributes& attributes, const Tensor* descriptions, const void* const* inputs,
         void* const* outputs, void* workspace, void* stream, Refusal& refusal) noexcept;

}  // namespace qvdit::trt
