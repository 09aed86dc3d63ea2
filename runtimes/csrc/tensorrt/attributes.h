// What the plugin's nodes say about themselves: their attributes, and what is accepted of them. Knows neither TensorRT
// nor CUDA. Nothing here allocates or throws.
#pragma once

#include "node.h"

namespace qvdit::trt {

// LowBitLinear
//
// Symbols: K input features, N output features, S linears of one x that were merged into one node, R rank of each,
// T frames.

// How the rows of x [..., L, K] belong to frames: FrameRows of qvdit/contract/layer.py.
enum Rows : int32_t { kRowsNone = 0, kRowsSequence = 1, kRowsSpatial = 2, kRowsTemporal = 3 };

struct LowBitAttributes {
  int32_t in_features;    // K, 1 … 16384
  int32_t out_features;   // N
  int32_t weight_bits;    // 2, 3, 4, 6 or 8
  int32_t act_bits;       // 6 or 8
  int32_t act_symmetric;  // 0 or 1
  int32_t rank;           // R; 0: no low-rank term. S · R is at most 32
  int32_t segment;        // N / S; a multiple of 128 where S > 1
  int32_t rows;           // enum Rows
  int32_t frames;         // T; 0: no gain
  int32_t rotation;       // features a block of the Walsh-Hadamard transform that x goes through; 0: none
  int32_t prologue;       // enum qvdit_prologue: what happens to x before it is quantized
  int32_t epsilon;        // of the LayerNorm: the bits of a float
  int32_t y_type;         // enum qvdit_dtype: float32, float16 or bfloat16
  int32_t has_zero;       // 0 or 1: an input weight_zero follows; likewise below
  int32_t has_bias;
  int32_t has_smooth;
  int32_t test_outputs;  // 0: y; 1: y, x_q, scale, zero, acc
};

template <>
struct Description<LowBitAttributes> {
  static constexpr char kName[] = "LowBitLinear";
  static constexpr int32_t kMagic = 0x4C425651;  // "QVBL"
  static constexpr int32_t kBlobVersion = 4;
  static constexpr Field<LowBitAttributes> kFields[] = {
      {"in_features", &LowBitAttributes::in_features, false},
      {"out_features", &LowBitAttributes::out_features, false},
      {"weight_bits", &LowBitAttributes::weight_bits, false},
      {"act_bits", &LowBitAttributes::act_bits, false},
      {"act_symmetric", &LowBitAttributes::act_symmetric, true},
      {"rank", &LowBitAttributes::rank, false},
      {"segment", &LowBitAttributes::segment, false},
      {"rows", &LowBitAttributes::rows, false},
      {"frames", &LowBitAttributes::frames, false},
      {"rotation", &LowBitAttributes::rotation, false},
      {"prologue", &LowBitAttributes::prologue, false},
      {"epsilon", &LowBitAttributes::epsilon, false},
      {"y_type", &LowBitAttributes::y_type, false},
      {"has_zero", &LowBitAttributes::has_zero, true},
      {"has_bias", &LowBitAttributes::has_bias, true},
      {"has_smooth", &LowBitAttributes::has_smooth, true},
      {"test_outputs", &LowBitAttributes::test_outputs, true},
  };
};

// S.
inline int32_t segments(const LowBitAttributes& attributes) { return attributes.out_features / attributes.segment; }

// Whether the kernels serve such a node.
bool validate(const LowBitAttributes& attributes, Refusal& refusal) noexcept;

// HeadwiseAttention: softmax(scale · q kᵀ) v, head by head. Not called Attention: ONNX has an operator of that name,
// which newer parsers take it for.
//
// Symbols: B batch, L rows of q, S rows of k and v, H heads, D features of a head.

// Which inputs lie side by side in the last axis of one.
enum Packed : int32_t { kPackedNone = 0, kPackedKV = 2, kPackedQKV = 3 };

struct AttentionAttributes {
  int32_t heads;      // H
  int32_t head_size;  // D: a multiple of 8 to 128
  int32_t packed;     // enum Packed
  int32_t q_layout;   // 0: [B, L, H·D] or [B, L, H, D]; 1: [B, H, L, D]. Packed: 0, and of rank 3; likewise below
  int32_t k_layout;
  int32_t v_layout;
  int32_t scale;  // the bits of a positive float
};

template <>
struct Description<AttentionAttributes> {
  static constexpr char kName[] = "HeadwiseAttention";
  static constexpr int32_t kMagic = 0x41485651;  // "QVHA"
  static constexpr int32_t kBlobVersion = 1;
  static constexpr Field<AttentionAttributes> kFields[] = {
      {"heads", &AttentionAttributes::heads, false},      {"head_size", &AttentionAttributes::head_size, false},
      {"packed", &AttentionAttributes::packed, false},    {"q_layout", &AttentionAttributes::q_layout, true},
      {"k_layout", &AttentionAttributes::k_layout, true}, {"v_layout", &AttentionAttributes::v_layout, true},
      {"scale", &AttentionAttributes::scale, false},
  };
};

// Whether the kernel serves such a node.
bool validate(const AttentionAttributes& attributes, Refusal& refusal) noexcept;

// GatedResidual: residual + gate · x, or residual + x, in float32.

struct ResidualAttributes {
  int32_t gated;    // 0 or 1: an input gate follows
  int32_t swapped;  // P: y is [B·Q, P, K] for a residual [B·P, Q, K], token (b, p, q) at (b, q, p); 0: as the residual
};

template <>
struct Description<ResidualAttributes> {
  static constexpr char kName[] = "GatedResidual";
  static constexpr int32_t kMagic = 0x52475651;  // "QVGR"
  static constexpr int32_t kBlobVersion = 1;
  static constexpr Field<ResidualAttributes> kFields[] = {
      {"gated", &ResidualAttributes::gated, true},
      {"swapped", &ResidualAttributes::swapped, false},
  };
};

// Whether the kernel serves such a node.
bool validate(const ResidualAttributes& attributes, Refusal& refusal) noexcept;

}  // namespace qvdit::trt
