// What the plugin's nodes have in common: attributes that are int32 each, how they are read and how an engine keeps
// them, the tensors that a node is given, and how something is refused. Knows neither TensorRT nor CUDA. Nothing here
// allocates or throws.
//
// A kind of node is a struct of its attributes and a Description of it; what it does is overloaded on that struct.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../qvdit_kernels.h"

namespace qvdit::trt {

constexpr char kPluginVersion[] = "4";

// Why something is not served: what was got, what was expected, what to do. One sentence.
struct Refusal {
  char text[512] = "";
};

// Writes a printf-like text and returns false.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
bool refuse(Refusal& refusal, const char* format, ...) noexcept;

// Tensors

constexpr int32_t kOtherType = -1;  // a type that is no qvdit_dtype
constexpr int64_t kUnknown = -1;    // an extent that is not known before run time
constexpr int kMaxDims = 8;         // of TensorRT

struct Tensor {
  int32_t type;  // enum qvdit_dtype or kOtherType
  int32_t rank;
  int64_t dims[kMaxDims];
};

const char* type_name(int32_t type) noexcept;

inline bool is_float(int32_t type) { return type == QVDIT_F32 || type == QVDIT_F16 || type == QVDIT_BF16; }

// A shape as "[2, ?, 64]".
struct ShapeText {
  char text[160];
};
ShapeText shape_text(const int64_t* dims, int32_t rank) noexcept;

// Whether two extents are the same as far as they are known.
inline bool fits(int64_t extent, int64_t expected) {
  return extent == kUnknown || expected == kUnknown || extent == expected;
}

// The kernel library

// Its status as a refusal.
bool succeeded(int32_t status, Refusal& refusal) noexcept;

// Whether this library has kernels for the current device.
bool check_device(Refusal& refusal) noexcept;

// Attributes

// The float whose bits an attribute holds.
inline float float_of(int32_t bits) noexcept {
  float value;
  static_assert(sizeof(value) == sizeof(bits), "a float's bits are those of an int32");
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename Attributes>
struct Field {
  const char* name;
  int32_t Attributes::* value;
  bool flag;  // 0 or 1
};

// Of a kind of node: kName, its op type; kMagic and kBlobVersion, the latter to change with kFields and with what a
// field means; and kFields, the attributes' names in the order in which they are kept: the one place that has them.
template <typename Attributes>
struct Description;

template <typename Attributes>
constexpr int field_count() {
  constexpr int count = sizeof(Description<Attributes>::kFields) / sizeof(Field<Attributes>);
  static_assert(sizeof(Attributes) == count * sizeof(int32_t), "a field is missing in kFields");
  return count;
}

// Attributes as an engine keeps them: magic, version, bytes of all of it, the fields in kFields' order, and a checksum
// of what is before it.
constexpr int kHeader = 3;
template <typename Attributes>
struct Blob {
  int32_t word[kHeader + field_count<Attributes>() + 1];
};

// FNV-1a over words: every step is a bijection, so no change of a single word goes unseen.
int32_t checksum(const int32_t* words, int count) noexcept;

template <typename Attributes>
Blob<Attributes> serialize(const Attributes& attributes) noexcept {
  constexpr int count = field_count<Attributes>();
  Blob<Attributes> blob;
  blob.word[0] = Description<Attributes>::kMagic;
  blob.word[1] = Description<Attributes>::kBlobVersion;
  blob.word[2] = sizeof(blob);
  for (int i = 0; i < count; ++i) blob.word[kHeader + i] = attributes.*Description<Attributes>::kFields[i].value;
  blob.word[kHeader + count] = checksum(blob.word, kHeader + count);
  return blob;
}

// Whether ``bytes`` bytes, of which ``words`` has as many as fit, are a blob of that many of this kind and version.
bool check_blob(const int32_t* words, size_t bytes, size_t expected, const char* name, int32_t magic, int32_t version,
                Refusal& refusal) noexcept;

// The attributes of a Blob of this version; anything else, and anything damaged, is refused.
template <typename Attributes>
bool deserialize(const void* data, size_t bytes, Attributes& attributes, Refusal& refusal) noexcept {
  using Kind = Description<Attributes>;
  Blob<Attributes> blob = {};
  if (!data) bytes = 0;
  if (bytes) std::memcpy(&blob, data, bytes < sizeof(blob) ? bytes : sizeof(blob));
  if (!check_blob(blob.word, bytes, sizeof(blob), Kind::kName, Kind::kMagic, Kind::kBlobVersion, refusal)) return false;
  for (int i = 0; i < field_count<Attributes>(); ++i) attributes.*Kind::kFields[i].value = blob.word[kHeader + i];
  return validate(attributes, refusal);
}

// Whether every flag is 0 or 1.
template <typename Attributes>
bool validate_flags(const Attributes& attributes, Refusal& refusal) noexcept {
  for (const auto& field : Description<Attributes>::kFields) {
    const int32_t value = attributes.*field.value;
    if (field.flag && value != 0 && value != 1)
      return refuse(refusal, "got %s %d, expected 0 or 1: export the model again", field.name, value);
  }
  return true;
}

// Reads every attribute by find(source, name), which returns null for one that is absent or no single int32, and
// validates them.
using Find = const int32_t* (*)(const void* source, const char* name);
template <typename Attributes>
bool read_attributes(Find find, const void* source, Attributes& attributes, Refusal& refusal) noexcept {
  for (const auto& field : Description<Attributes>::kFields) {
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

}  // namespace qvdit::trt
