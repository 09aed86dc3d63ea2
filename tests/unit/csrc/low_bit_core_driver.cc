// The plugin's core for ctypes. Attributes are an array of int32 in kFields' order, messages char [512].
#include <cstring>

#include "../../../runtimes/csrc/tensorrt/low_bit_core.h"
#include "told.h"

using namespace qvdit::trt;

namespace {

struct Named {
  const char* const* names;
  const int32_t* values;
  int count;
};

const int32_t* find(const void* source, const char* name) {
  const Named& named = *static_cast<const Named*>(source);
  for (int i = 0; i < named.count; ++i) {
    if (std::strcmp(named.names[i], name) == 0) return &named.values[i];
  }
  return nullptr;
}

}  // namespace

extern "C" {

QVDIT_API int32_t core_field_count() { return field_count<LowBitAttributes>(); }
QVDIT_API const char* core_field_name(int32_t i) { return Description<LowBitAttributes>::kFields[i].name; }
QVDIT_API int32_t core_blob_bytes() { return sizeof(Blob<LowBitAttributes>); }

QVDIT_API int32_t core_read(const char* const* names, const int32_t* values, int32_t count,
                            LowBitAttributes* attributes, char* text) {
  const Named named{names, values, count};
  Refusal refusal;
  return told(read_attributes(find, &named, *attributes, refusal), refusal, text);
}

QVDIT_API void core_serialize(const LowBitAttributes* attributes, void* blob) {
  const auto made = serialize(*attributes);
  std::memcpy(blob, &made, sizeof(made));
}

QVDIT_API int32_t core_deserialize(const void* blob, int64_t bytes, LowBitAttributes* attributes, char* text) {
  Refusal refusal;
  return told(deserialize(blob, static_cast<size_t>(bytes), *attributes, refusal), refusal, text);
}

QVDIT_API int32_t core_inputs(const LowBitAttributes* attributes, InputPort* ports) {
  const InputPorts found = input_ports(*attributes);
  std::memcpy(ports, found.port, sizeof(found.port));
  return found.count;
}

QVDIT_API int32_t core_outputs(const LowBitAttributes* attributes, OutputPort* ports) {
  for (int i = 0; i < output_count(*attributes); ++i) ports[i] = output_port(*attributes, i);
  return output_count(*attributes);
}

QVDIT_API void core_workspace(const LowBitAttributes* attributes, int64_t rows, Workspace* workspace) {
  *workspace = workspace_of(*attributes, rows);
}

QVDIT_API int32_t core_tokens(const LowBitAttributes* attributes, int64_t length, int64_t* tokens, char* text) {
  Refusal refusal;
  return told(tokens_per_frame(*attributes, length, *tokens, refusal), refusal, text);
}

QVDIT_API int32_t core_check(const LowBitAttributes* attributes, const Tensor* inputs, int32_t count, int32_t known,
                             char* text) {
  Refusal refusal;
  const bool done =
      known ? check_shapes(*attributes, inputs, count, refusal) : check_inputs(*attributes, inputs, count, refusal);
  return told(done, refusal, text);
}

QVDIT_API int32_t core_device(char* text) {
  Refusal refusal;
  return told(check_device(refusal), refusal, text);
}

QVDIT_API int32_t core_run(const LowBitAttributes* attributes, const Tensor* descriptions, const void* const* inputs,
                           void* const* outputs, void* workspace, void* stream, char* text) {
  Refusal refusal;
  return told(run(*attributes, descriptions, inputs, outputs, workspace, stream, refusal), refusal, text);
}

}  // extern "C"
