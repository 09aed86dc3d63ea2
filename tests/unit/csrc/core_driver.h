// A core of one of the plugin's nodes for ctypes: functions NAME_validate, NAME_run, … Attributes are an array of int32
// in kFields' order, messages char [512].
#pragma once

#include <cstring>

#include "told.h"

#define QVDIT_CORE_DRIVER(NAME, ATTRIBUTES)                                                                          \
  extern "C" {                                                                                                       \
  QVDIT_API int32_t NAME##_field_count() { return qvdit::trt::field_count<ATTRIBUTES>(); }                           \
  QVDIT_API const char* NAME##_field_name(int32_t i) { return qvdit::trt::Description<ATTRIBUTES>::kFields[i].name; } \
  QVDIT_API int32_t NAME##_blob_bytes() { return sizeof(qvdit::trt::Blob<ATTRIBUTES>); }                             \
  QVDIT_API int32_t NAME##_validate(const ATTRIBUTES* attributes, char* text) {                                      \
    qvdit::trt::Refusal refusal;                                                                                     \
    return told(validate(*attributes, refusal), refusal, text);                                                      \
  }                                                                                                                  \
  QVDIT_API void NAME##_serialize(const ATTRIBUTES* attributes, void* blob) {                                        \
    const auto made = qvdit::trt::serialize(*attributes);                                                            \
    std::memcpy(blob, &made, sizeof(made));                                                                          \
  }                                                                                                                  \
  QVDIT_API int32_t NAME##_deserialize(const void* blob, int64_t bytes, ATTRIBUTES* attributes, char* text) {        \
    qvdit::trt::Refusal refusal;                                                                                     \
    return told(qvdit::trt::deserialize(blob, static_cast<size_t>(bytes), *attributes, refusal), refusal, text);     \
  }                                                                                                                  \
  QVDIT_API int32_t NAME##_check(const ATTRIBUTES* attributes, const qvdit::trt::Tensor* inputs, int32_t count,      \
                                 int32_t known, char* text) {                                                        \
    qvdit::trt::Refusal refusal;                                                                                     \
    const bool done = known ? check_shapes(*attributes, inputs, count, refusal)                                      \
                            : check_inputs(*attributes, inputs, count, refusal);                                     \
    return told(done, refusal, text);                                                                                \
  }                                                                                                                  \
  QVDIT_API int32_t NAME##_run(const ATTRIBUTES* attributes, const qvdit::trt::Tensor* descriptions,                 \
                               const void* const* inputs, void* const* outputs, void* stream, char* text) {          \
    qvdit::trt::Refusal refusal;                                                                                     \
    return told(run(*attributes, descriptions, inputs, outputs, nullptr, stream, refusal), refusal, text);           \
  }                                                                                                                  \
  }
