// How the cores' drivers answer: whether it succeeded, and why not in char [512].
#pragma once

#include <cstring>

#include "../../../runtimes/csrc/tensorrt/node.h"

inline int32_t told(bool succeeded, const qvdit::trt::Refusal& refusal, char* text) {
  std::memcpy(text, refusal.text, sizeof(refusal.text));
  return succeeded;
}
