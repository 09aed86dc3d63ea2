// Errors of launch functions: a status and, in the calling thread, a message with the numbers.
#pragma once

#include <cstdint>

#include "qvdit_kernels.h"

namespace qvdit {

// Keeps a printf-like message for qvdit_last_error and returns the status.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int32_t fail(qvdit_status status, const char* format, ...);

// The outcome of a kernel launch, or of any CUDA call whose error is cudaGetLastError's.
int32_t launched(const char* kernel);

}  // namespace qvdit

// Returns QVDIT_INVALID with a message unless the condition holds.
#define QVDIT_REQUIRE(condition, ...)                                 \
  do {                                                                \
    if (!(condition)) return qvdit::fail(QVDIT_INVALID, __VA_ARGS__); \
  } while (false)
