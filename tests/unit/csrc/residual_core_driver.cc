// The plugin's residual core for ctypes. Attributes are an array of int32 in kFields' order, messages char [512].
#include <cstring>

#include "../../../runtimes/csrc/tensorrt/residual_core.h"
#include "told.h"

using namespace qvdit::trt;

extern "C" {

QVDIT_API int32_t residual_field_count() { return field_count<ResidualAttributes>(); }
QVDIT_API const char* residual_field_name(int32_t i) { return Description<ResidualAttributes>::kFields[i].name; }
QVDIT_API int32_t residual_blob_bytes() { return sizeof(Blob<ResidualAttributes>); }

QVDIT_API int32_t residual_validate(const ResidualAttributes* attributes, char* text) {
  Refusal refusal;
  return told(validate(*attributes, refusal), refusal, text);
}

QVDIT_API void residual_serialize(const ResidualAttributes* attributes, void* blob) {
  const auto made = serialize(*attributes);
  std::memcpy(blob, &made, sizeof(made));
}

QVDIT_API int32_t residual_deserialize(const void* blob, int64_t bytes, ResidualAttributes* attributes, char* text) {
  Refusal refusal;
  return told(deserialize(blob, static_cast<size_t>(bytes), *attributes, refusal), refusal, text);
}

QVDIT_API int32_t residual_check(const ResidualAttributes* attributes, const Tensor* inputs, int32_t count,
                                  int32_t known, char* text) {
  Refusal refusal;
  const bool done =
      known ? check_shapes(*attributes, inputs, count, refusal) : check_inputs(*attributes, inputs, count, refusal);
  return told(done, refusal, text);
}

QVDIT_API int32_t residual_run(const ResidualAttributes* attributes, const Tensor* descriptions,
                                const void* const* inputs, void* const* outputs, void* stream, char* text) {
  Refusal refusal;
  return told(run(*attributes, descriptions, inputs, outputs, nullptr, stream, refusal), refusal, text);
}

}  // extern "C"
