#include "node.h"

#include <cstdarg>
#include <cstdio>

namespace qvdit::trt {

bool refuse(Refusal& refusal, const char* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(refusal.text, sizeof(refusal.text), format, arguments);
  va_end(arguments);
  return false;
}

const char* type_name(int32_t type) noexcept {
  switch (type) {
    case QVDIT_F32:
      return "float32";
    case QVDIT_F16:
      return "float16";
    case QVDIT_BF16:
      return "bfloat16";
    case QVDIT_S32:
      return "int32";
    default:
      return "another type";
  }
}

ShapeText shape_text(const int64_t* dims, int32_t rank) noexcept {
  ShapeText shape;
  int used = std::snprintf(shape.text, sizeof(shape.text), "[");
  for (int i = 0; i < rank && i < kMaxDims; ++i) {
    const char* comma = i ? ", " : "";
    const size_t room = sizeof(shape.text) - used;
    used += dims[i] < 0 ? std::snprintf(shape.text + used, room, "%s?", comma)
                        : std::snprintf(shape.text + used, room, "%s%lld", comma, static_cast<long long>(dims[i]));
  }
  std::snprintf(shape.text + used, sizeof(shape.text) - used, "]");
  return shape;
}

bool succeeded(int32_t status, Refusal& refusal) noexcept {
  switch (status) {
    case QVDIT_OK:
      return true;
    case QVDIT_NO_KERNEL:
      return refuse(refusal,
                    "got no kernel (%s), expected one for this GPU: build the plugin with its QVDIT_ARCHITECTURES",
                    qvdit_last_error());
    case QVDIT_INVALID:
      return refuse(
          refusal, "got arguments that no kernel takes (%s), expected those of qvdit_kernels.h: export the model again",
          qvdit_last_error());
    default:
      return refuse(refusal, "got a CUDA error (%s), expected a working device: see that nvidia-smi lists one",
                    qvdit_last_error());
  }
}

bool check_device(Refusal& refusal) noexcept { return succeeded(qvdit_check_device(), refusal); }

int32_t checksum(const int32_t* words, int count) noexcept {
  uint32_t hash = 2166136261u;
  for (int i = 0; i < count; ++i) hash = (hash ^ static_cast<uint32_t>(words[i])) * 16777619u;
  return static_cast<int32_t>(hash);
}

bool check_blob(const int32_t* words, size_t bytes, size_t expected, const char* name, int32_t magic, int32_t version,
                Refusal& refusal) noexcept {
  constexpr char kRemedy[] = "build the engine again";
  if (bytes < kHeader * sizeof(int32_t) || words[0] != magic) {
    return refuse(refusal, "got %zu bytes that are no %s, expected what this plugin wrote: %s", bytes, name, kRemedy);
  }
  if (words[1] != version) {
    return refuse(refusal,
                  "got a layer of version %d, expected %d: %s with this plugin, or load the one it was built with",
                  words[1], version, kRemedy);
  }
  if (bytes != expected || words[2] != static_cast<int32_t>(expected)) {
    return refuse(refusal, "got %zu bytes that say they are %d, expected %zu: %s", bytes, words[2], expected, kRemedy);
  }
  const int count = static_cast<int>(expected / sizeof(int32_t)) - 1;
  if (words[count] != checksum(words, count)) {
    return refuse(refusal, "got a damaged layer, expected its checksum to match: %s", kRemedy);
  }
  return true;
}

}  // namespace qvdit::trt
