// The kernel library's functions as stubs that keep what they were called with.
#include <cstdio>
#include <cstring>

#include "../../../runtimes/csrc/qvdit_kernels.h"

namespace {

constexpr int kMost = 8;

// One launch: its name and its arguments.
struct Call {
  char name[16];
  union {
    qvdit_unpack_args unpack;
    qvdit_quantize_args quantize;
    qvdit_gemm_args gemm;
    qvdit_attention_args attention;
    qvdit_gated_residual_args residual;
  } args;
  void* stream;
};

Call calls[kMost];
int count = 0;
int32_t status_of_device = QVDIT_OK;
char failing[16] = "";

template <typename Args>
int32_t keep(const char* name, const Args* args, void* stream) {
  Call& call = calls[count++ % kMost];
  std::snprintf(call.name, sizeof(call.name), "%s", name);
  std::memcpy(&call.args, args, sizeof(*args));
  call.stream = stream;
  return std::strcmp(name, failing) == 0 ? QVDIT_INVALID : QVDIT_OK;
}

}  // namespace

extern "C" {

QVDIT_API const char* qvdit_last_error(void) { return "the kernel's own words"; }
QVDIT_API int32_t qvdit_check_device(void) { return status_of_device; }
QVDIT_API int32_t qvdit_low_bit_linear(const qvdit_quantize_args* quantize, const qvdit_unpack_args* unpack,
                                       const qvdit_gemm_args* gemm, void* stream) {
  if (const int32_t status = keep("quantize", quantize, stream)) return status;
  if (const int32_t status = keep("unpack", unpack, stream)) return status;
  return keep("gemm", gemm, stream);
}
QVDIT_API int32_t qvdit_low_bit_gemm(const qvdit_gemm_args* args, void* stream) { return keep("gemm", args, stream); }
QVDIT_API int32_t qvdit_attention(const qvdit_attention_args* args, void* stream) {
  return keep("attention", args, stream);
}
QVDIT_API int32_t qvdit_gated_residual(const qvdit_gated_residual_args* args, void* stream) {
  return keep("residual", args, stream);
}

// Forgets all calls. From now on the launch of that name is refused, and the device has that status.
QVDIT_API void fake_reset(const char* failing_launch, int32_t device) {
  count = 0;
  status_of_device = device;
  std::snprintf(failing, sizeof(failing), "%s", failing_launch);
}
QVDIT_API int32_t fake_count(void) { return count; }
QVDIT_API const char* fake_name(int32_t i) { return calls[i].name; }
QVDIT_API const void* fake_args(int32_t i) { return &calls[i].args; }
QVDIT_API void* fake_stream(int32_t i) { return calls[i].stream; }

}  // extern "C"
