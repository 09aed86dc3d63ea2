// The plugin's attention core for ctypes. Attributes are an array of int32 in kFields' order, messages char [512].
#include <cstring>

#include "../../../runtimes/csrc/tensorrt/attention_core.h"
#include "told.h"

using namespace qvdit::trt;

extern "C" {

QVDIT_API int32_t attention_field_count() { return field_count<AttentionAttributes>(); }
QVDIT_API const char* attention_field_name(int32_t i) { return Description<AttentionAttributes>::kFields[i].name; }
QVDIT_API int32_t attention_blob_bytes() { return sizeof(Blob<AttentionAttributes>); }

QVDIT_API int32_t attention_validate(const AttentionAttributes* attributes, char* text) {
  Refusal refusal;
  return told(validate(*attributes, refusal), refusal, text);
}

QVDIT_API void attention_serialize(const AttentionAttributes* attributes, void* blob) {
  const auto made = serialize(*attributes);
  std::memcpy(blob, &made, sizeof(made));
}

QVDIT_API int32_t attention_deserialize(const void* blob, int64_t bytes, AttentionAttributes* attributes, char* text) {
  Refusal refusal;
  return told(deserialize(blob, static_cast<size_t>(bytes), *attributes, refusal), refusal, text);
}

QVDIT_API int32_t attention_check(const AttentionAttributes* attributes, const Tensor* inputs, int32_t count,
                                  int32_t known, char* text) {
  Refusal refusal;
  const bool done =
      known ? check_shapes(*attributes, inputs, count, refusal) : check_inputs(*attributes, inputs, count, refusal);
  return told(done, refusal, text);
}

QVDIT_API int32_t attention_run(const AttentionAttributes* attributes, const Tensor* descriptions,
                                const void* const* inputs, void* const* outputs, void* stream, char* text) {
  Refusal refusal;
  return told(run(*attributes, descriptions, inputs, outputs, nullptr, stream, refusal), refusal, text);
}

}  // extern "C"
