#include "attributes.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "../qvdit_kernels.h"

namespace qvdit::trt {
namespace {

constexpr int32_t kMaxFeatures = 16384;  // of qvdit_quantize_rows
constexpr int32_t kMaxRank = 32;         // of both kernels
constexpr int32_t kSegmentStep = 128;    // of qvdit_low_bit_gemm
constexpr int32_t kMaxRotation = 1024;   // of qvdit_quantize_rows

constexpr int32_t kMagic = 0x4C425651;  // "QVBL"
constexpr int32_t kBlobVersion = 3;     // changes with kFields and with what a field means
constexpr int kHeader = 3;

bool is_weight_width(int32_t bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 6 || bits == 8; }

// FNV-1a over words: every step is a bijection, so no change of a single word goes unseen.
int32_t checksum(const int32_t* words, int count) {
  uint32_t hash = 2166136261u;
  for (int i = 0; i < count; ++i) hash = (hash ^ static_cast<uint32_t>(words[i])) * 16777619u;
  return static_cast<int32_t>(hash);
}

bool validate_flags(const Attributes& attributes, Refusal& refusal) {
  for (const Field& field : kFields) {
    const int32_t value = attributes.*field.value;
    if (field.flag && value != 0 && value != 1)
      return refuse(refusal, "got %s %d, expected 0 or 1: export the model again", field.name, value);
  }
  return true;
}

bool validate_prologue(const Attributes& attributes, Refusal& refusal) {
  const int32_t prologue = attributes.prologue, y_type = attributes.y_type;
  if (prologue < QVDIT_PLAIN || prologue > QVDIT_GELU) {
    return refuse(refusal, "got prologue %d, expected 0 (none), 1 (LayerNorm) or 2 (GELU): export the model again",
                  prologue);
  }
  const float epsilon = epsilon_of(attributes);
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

bool validate_frames(const Attributes& attributes, Refusal& refusal) {
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

bool refuse(Refusal& refusal, const char* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(refusal.text, sizeof(refusal.text), format, arguments);
  va_end(arguments);
  return false;
}

float epsilon_of(const Attributes& attributes) noexcept {
  float epsilon;
  static_assert(sizeof(epsilon) == sizeof(attributes.epsilon), "a float's bits are those of an int32");
  std::memcpy(&epsilon, &attributes.epsilon, sizeof(epsilon));
  return epsilon;
}

bool validate(const Attributes& attributes, Refusal& refusal) noexcept {
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

bool read_attributes(Find find, const void* source, Attributes& attributes, Refusal& refusal) noexcept {
  for (const Field& field : kFields) {
    const int32_t* value = find(source, field.name);
    if (!value) {
      return refuse(refusal,
                    "got no integer attribute %s, expected one: export the model again with this plugin's version",
                    field.name);
    }
    attributes.*field.value = *value;
  }
  return validate(attributes, refusal);
}

Blob serialize(const Attributes& attributes) noexcept {
  Blob blob;
  blob.word[0] = kMagic;
  blob.word[1] = kBlobVersion;
  blob.word[2] = sizeof(Blob);
  for (int i = 0; i < kFieldCount; ++i) blob.word[kHeader + i] = attributes.*kFields[i].value;
  blob.word[kHeader + kFieldCount] = checksum(blob.word, kHeader + kFieldCount);
  return blob;
}

bool deserialize(const void* data, size_t bytes, Attributes& attributes, Refusal& refusal) noexcept {
  constexpr char kRemedy[] = "build the engine again";
  Blob blob = {};
  if (!data) bytes = 0;
  if (bytes) std::memcpy(&blob, data, bytes < sizeof(blob) ? bytes : sizeof(blob));
  if (bytes < kHeader * sizeof(int32_t) || blob.word[0] != kMagic) {
    return refuse(refusal, "got %zu bytes that are no %s, expected what this plugin wrote: %s", bytes, kPluginName,
                  kRemedy);
  }
  if (blob.word[1] != kBlobVersion) {
    return refuse(refusal,
                  "got a layer of version %d, expected %d: %s with this plugin, or load the one it was built with",
                  blob.word[1], kBlobVersion, kRemedy);
  }
  if (bytes != sizeof(Blob) || blob.word[2] != static_cast<int32_t>(sizeof(Blob))) {
    return refuse(refusal, "got %zu bytes that say they are %d, expected %zu: %s", bytes, blob.word[2], sizeof(Blob),
                  kRemedy);
  }
  if (blob.word[kHeader + kFieldCount] != checksum(blob.word, kHeader + kFieldCount)) {
    return refuse(refusal, "got a damaged layer, expected its checksum to match: %s", kRemedy);
  }
  for (int i = 0; i < kFieldCount; ++i) attributes.*kFields[i].value = blob.word[kHeader + i];
  return validate(attributes, refusal);
}

}  // namespace qvdit::trt
