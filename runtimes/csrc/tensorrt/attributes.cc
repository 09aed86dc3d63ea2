#include "attributes.h"

#include <cmath>

namespace qvdit::trt {
namespace {

constexpr int32_t kMaxFeatures = 16384;  // of qvdit_quantize_rows
constexpr int32_t kMaxRank = 32;         // of both kernels
constexpr int32_t kSegmentStep = 128;    // of qvdit_low_bit_gemm
constexpr int32_t kMaxRotation = 1024;   // of qvdit_quantize_rows
constexpr int32_t kMaxHeadSize = 128;    // of qvdit_attention
constexpr int32_t kHeadSizeStep = 8;     // of qvdit_attention

bool is_weight_width(int32_t bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 6 || bits == 8; }

bool validate_prologue(const LowBitAttributes& attributes, Refusal& refusal) {
  const int32_t prologue = attributes.prologue, y_type = attributes.y_type;
  if (prologue < QVDIT_PLAIN || prologue > QVDIT_GELU) {
    return refuse(refusal, "got prologue %d, expected 0 (none), 1 (LayerNorm) or 2 (GELU): export the model again",
                  prologue);
  }
  const float epsilon = float_of(attributes.epsilon);
  if (!std::isfinite(epsilon) || epsilon < 0.f) {
    return refuse(refusal, "got epsilon %g, expected the bits of a float of 0 or more: export the model again",
                  static_cast<double>(epsilon));
  }
  if (y_type < QVDIT_F32 || y_type > QVDIT_BF16) {
    return refuse(refusal, "got y_type %d, expected 0 (float32), 1 (float16) or 2 (bfloat16): export the model again",
                  y_type);
  }
  return true;
}

bool validate_frames(const LowBitAttributes& attributes, Refusal& refusal) {
  const int32_t rows = attributes.rows, frames = attributes.frames;
  if (rows < kRowsNone || rows > kRowsTemporal) {
    return refuse(refusal,
                  "got rows %d, expected 0 (none), 1 (sequence), 2 (spatial) or 3 (temporal): export the model again",
                  rows);
  }
  if (frames < 0) return refuse(refusal, "got frames %d, expected 0 or more: export the model again", frames);
  if (frames > 0 && (attributes.rank == 0 || rows == kRowsNone)) {
    return refuse(
        refusal,
        "got gains of %d frames with rank %d and rows %d, expected a rank and rows that belong to frames: export "
        "such a layer with frames 0",
        frames, attributes.rank, rows);
  }
  return true;
}

}  // namespace

bool validate(const LowBitAttributes& attributes, Refusal& refusal) noexcept {
  const int32_t k = attributes.in_features, n = attributes.out_features, segment = attributes.segment;
  if (k < 1 || k > kMaxFeatures) {
    return refuse(refusal, "got in_features %d, expected 1 to %d: leave this layer to TensorRT", k, kMaxFeatures);
  }
  if (n < 1) return refuse(refusal, "got out_features %d, expected 1 or more: export the model again", n);
  if (!is_weight_width(attributes.weight_bits)) {
    return refuse(refusal, "got weight_bits %d, expected 2, 3, 4, 6 or 8: quantize it to one of these",
                  attributes.weight_bits);
  }
  if (attributes.act_bits != 6 && attributes.act_bits != 8) {
    return refuse(refusal, "got act_bits %d, expected 6 or 8: quantize it to one of these", attributes.act_bits);
  }
  if (segment < 1 || n % segment || (segment != n && segment % kSegmentStep)) {
    return refuse(refusal,
                  "got segment %d of out_features %d, expected all of them or a multiple of %d that divides them: do "
                  "not merge these linears",
                  segment, n, kSegmentStep);
  }
  if (attributes.rank < 0 || attributes.rank > kMaxRank / segments(attributes)) {
    return refuse(refusal,
                  "got rank %d of each of %d linears, expected at most %d in all: lower the rank or do not merge them",
                  attributes.rank, segments(attributes), kMaxRank);
  }
  const int32_t rotation = attributes.rotation;
  if (rotation < 0 || rotation > kMaxRotation || (rotation & (rotation - 1)) || (rotation && k % rotation)) {
    return refuse(refusal,
                  "got rotation %d of in_features %d, expected 0 or a power of two to %d that divides them: export the "
                  "model again",
                  rotation, k, kMaxRotation);
  }
  return validate_prologue(attributes, refusal) && validate_flags(attributes, refusal) &&
         validate_frames(attributes, refusal);
}

bool validate(const AttentionAttributes& attributes, Refusal& refusal) noexcept {
  const int32_t heads = attributes.heads, size = attributes.head_size, packed = attributes.packed;
  if (heads < 1) return refuse(refusal, "got heads %d, expected 1 or more: export the model again", heads);
  if (size < kHeadSizeStep || size > kMaxHeadSize || size % kHeadSizeStep) {
    return refuse(refusal, "got head_size %d, expected a multiple of %d to %d: leave this attention to TensorRT", size,
                  kHeadSizeStep, kMaxHeadSize);
  }
  if (packed != kPackedNone && packed != kPackedKV && packed != kPackedQKV) {
    return refuse(refusal, "got packed %d, expected 0 (none), 2 (k and v) or 3 (q, k and v): export the model again",
                  packed);
  }
  if (!validate_flags(attributes, refusal)) return false;
  if ((packed && (attributes.k_layout || attributes.v_layout)) || (packed == kPackedQKV && attributes.q_layout)) {
    return refuse(refusal,
                  "got packed %d with heads before rows, expected packed ones in layout 0: export the model again",
                  packed);
  }
  const float scale = float_of(attributes.scale);
  return (std::isfinite(scale) && scale > 0.f) ||
         refuse(refusal, "got scale %g, expected the bits of a positive float: export the model again",
                static_cast<double>(scale));
}

bool validate(const ResidualAttributes& attributes, Refusal& refusal) noexcept {
  return (attributes.swapped >= 0 ||
          refuse(refusal, "got swapped %d, expected 0 or more: export the model again", attributes.swapped)) &&
         validate_flags(attributes, refusal);
}

}  // namespace qvdit::trt
