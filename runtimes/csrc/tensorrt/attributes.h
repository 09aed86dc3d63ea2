// What a node LowBitLinear says about itself: its attributes, what is accepted of them, and how an engine keeps them.
// Knows neither TensorRT nor CUDA. Nothing here allocates or throws.
//
// Symbols: K input features, N output features, S linears of one x that were merged into one node, R rank of each,
// T frames.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qvdit::trt {

constexpr char kPluginName[] = "LowBitLinear";
constexpr char kPluginVersion[] = "1";

// Why something is not served: what was got, what was expected, what to do. One sentence.
struct Refusal {
  char text[512] = "";
};

// Writes a printf-like text and returns false.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
bool refuse(Refusal& refusal, const char* format, ...) noexcept;

// How the rows of x [..., L, K] belong to frames: FrameRows of qvdit/contract/layer.py.
enum Rows : int32_t { kRowsNone = 0, kRowsSequence = 1, kRowsSpatial = 2, kRowsTemporal = 3 };

struct Attributes {
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

// The attributes' names, in the order in which they are kept: the one place that has them.
struct Field {
  const char* name;
  int32_t Attributes::* value;
  bool flag;  // 0 or 1
};
constexpr Field kFields[] = {
    {"in_features", &Attributes::in_features, false},
    {"out_features", &Attributes::out_features, false},
    {"weight_bits", &Attributes::weight_bits, false},
    {"act_bits", &Attributes::act_bits, false},
    {"act_symmetric", &Attributes::act_symmetric, true},
    {"rank", &Attributes::rank, false},
    {"segment", &Attributes::segment, false},
    {"rows", &Attributes::rows, false},
    {"frames", &Attributes::frames, false},
    {"rotation", &Attributes::rotation, false},
    {"prologue", &Attributes::prologue, false},
    {"epsilon", &Attributes::epsilon, false},
    {"y_type", &Attributes::y_type, false},
    {"has_zero", &Attributes::has_zero, true},
    {"has_bias", &Attributes::has_bias, true},
    {"has_smooth", &Attributes::has_smooth, true},
    {"test_outputs", &Attributes::test_outputs, true},
};
constexpr int kFieldCount = sizeof(kFields) / sizeof(kFields[0]);
static_assert(sizeof(Attributes) == kFieldCount * sizeof(int32_t), "a field is missing in kFields");

// S.
inline int32_t segments(const Attributes& attributes) { return attributes.out_features / attributes.segment; }

// The epsilon that the attribute holds.
float epsilon_of(const Attributes& attributes) noexcept;

// Whether the kernels serve such a node.
bool validate(const Attributes& attributes, Refusal& refusal) noexcept;

// Reads every attribute by find(source, name), which returns null for one that is absent or no single int32, and
// validates them.
using Find = const int32_t* (*)(const void* source, const char* name);
bool read_attributes(Find find, const void* source, Attributes& attributes, Refusal& refusal) noexcept;

// Attributes as an engine keeps them: magic, version, bytes of all of it, the fields in kFields' order, and a checksum
// of what is before it.
struct Blob {
  int32_t word[3 + kFieldCount + 1];
};

Blob serialize(const Attributes& attributes) noexcept;

// The attributes of a Blob of this version; anything else, and anything damaged, is refused.
bool deserialize(const void* data, size_t bytes, Attributes& attributes, Refusal& refusal) noexcept;

}  // namespace qvdit::trt
