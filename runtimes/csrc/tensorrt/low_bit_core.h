// The operator LowBitLinear for TensorRT, without TensorRT: which tensors a node has, how much workspace it needs, and
// how it runs on the kernel library. The two plugin interfaces (plugin_v2.cc, plugin_v3.cc) are thin shells around it.
// Nothing here allocates or throws.
//
// Symbols: x [..., L, K], M rows in all; K_pad the next multiple of 32; N, S, R, T as in attributes.h; P rows of a
// frame; G rows of the modulation, one for each [L, K] of an x [G, L, K], or 1.
#pragma once

#include "attributes.h"

namespace qvdit::trt {

// What can be an input, in the order in which those that a node has follow each other.
enum Input {
  kX,                // float [..., L, K]. LayerNorm: float32, as the graph's own would read it
  kModulationScale,  // float32 [G, 1, K], without the 1 that is added to it. LayerNorm
  kModulationShift,  // float32 [G, 1, K]. LayerNorm
  kWords,            // int32 [N, b · K_pad / 32]: qvdit/contract/packing.py's
  kWeightScale,      // float32 [N]
  kWeightZero,       // int32 [ceil(N / 4)]: int8 [N], four to a word, little-endian
  kBias,             // float32 [N]
  kInvSmooth,        // float32 [K]
  kAlpha,            // float16 [S · R, K]
  kBeta,             // [R, N], float16; of rank 1 float32
  kFrameGain,        // float32 [S, T]
  kInputs
};

// Those outputs that a node has come in this order; all but y with test_outputs only.
enum Output {
  kY,      // y_type [..., L, N]
  kXq,     // int32 [..., L, K_pad / 4]: int8 [K_pad], four to a word, little-endian; asymmetric ones less 128
  kScale,  // float32 [..., L]
  kZero,   // int32 [..., L]: of what kXq holds; 0 where symmetric
  kAcc,    // int32 [..., L, N]: exact
  kOutputs
};

struct InputPort {
  Input input;
  const char* name;
  int32_t type;     // enum qvdit_dtype; kOtherType: any of the three float types
  int32_t rank;     // kX: 2 or more
  int64_t dims[3];  // kUnknown: any extent
};

struct InputPorts {
  int count;
  InputPort port[kInputs];
};

// A node's inputs.
InputPorts input_ports(const LowBitAttributes& attributes) noexcept;

struct OutputPort {
  int32_t type;     // enum qvdit_dtype
  int64_t columns;  // the last extent, after those of x but its last; 0: there is none
};

int output_count(const LowBitAttributes& attributes) noexcept;
OutputPort output_port(const LowBitAttributes& attributes, int output) noexcept;

int input_count(const LowBitAttributes& attributes) noexcept;

// Whether input or output ``position``, counted through both, may be of a type; the first input's does not matter.
bool takes_type(const LowBitAttributes& attributes, int position, int32_t type, int32_t first) noexcept;

// The type (enum qvdit_dtype) of an output, whatever the first input's.
int32_t output_type(const LowBitAttributes& attributes, int output, int32_t first) noexcept;

// What an input is taken for where only its shape is known: its own type, float32 where it takes several.
int32_t assumed_type(const LowBitAttributes& attributes, int input) noexcept;

// Whether the first input may come to be of a type that is taken.
bool check_early_type(const LowBitAttributes& attributes, int32_t type, Refusal& refusal) noexcept;

// Whether the first ``count`` inputs may be of these types (enum qvdit_dtype or kOtherType).
bool check_types(const LowBitAttributes& attributes, const int32_t* types, int count, Refusal& refusal) noexcept;

// Whether ``count`` inputs are those of the node: their number, and as far as known their types and shapes.
bool check_inputs(const LowBitAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept;

// M of an x whose extents are known; at least 0, INT64_MAX where it does not fit.
int64_t row_count(const Tensor& x) noexcept;

// check_inputs, and that the rows of an x with known extents can be computed and belong to frames.
bool check_shapes(const LowBitAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept;

// P for an x of ``length`` = L rows in its second to last extent; 1 where there are no gains or no rows. Refused: a
// sequence that does not hold T frames of one size.
bool tokens_per_frame(const LowBitAttributes& attributes, int64_t length, int64_t& tokens, Refusal& refusal) noexcept;

// What lies in the workspace. Those that a node does not need, or has as test outputs, are absent.
enum Piece {
  kPieceWeight,     // int8 [N, K_pad]
  kPieceWeightSum,  // int32 [N]. Asymmetric activations
  kPieceXq,         // int8 [M, K_pad]
  kPieceScale,      // float32 [M]
  kPieceZero,       // int32 [M]. Asymmetric activations
  kPieceU,          // float32 [S · R, M]
  kPieceRowSum,     // int32 [M]. 8-bit weights with zero points, which do not fit into int8 weights
  kPieces
};

constexpr int64_t kAlignment = 256;  // of every piece, in bytes: what cudaMalloc gives

struct Workspace {
  int64_t offset[kPieces];  // bytes from the workspace's first multiple of kAlignment; -1: absent
  int64_t bytes;            // to ask for, whatever the alignment of what is given. Never less for more rows
};

Workspace workspace_of(const LowBitAttributes& attributes, int64_t rows) noexcept;
// Its bytes for inputs of these shapes.
int64_t workspace_bytes(const LowBitAttributes& attributes, const Tensor* inputs) noexcept;

// Starts the node on a stream (a cudaStream_t) and returns at once. descriptions, inputs: of input_ports; outputs:
// output_count of them; workspace: of workspace_of(…).bytes. All in device memory.
bool run(const LowBitAttributes& attributes, const Tensor* descriptions, const void* const* inputs,
         void* const* outputs, void* workspace, void* stream, Refusal& refusal) noexcept;

}  // namespace qvdit::trt
