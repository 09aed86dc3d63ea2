// What the library is and whether it serves the current device.
#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdio>

#include "error.h"

#ifndef QVDIT_ARCHITECTURES
#error "define QVDIT_ARCHITECTURES, the list of what this library is compiled for"
#endif

namespace {

thread_local char last_error[512] = "";

// Exists for every architecture that the other kernels exist for.
__global__ void probe() {}

}  // namespace

namespace qvdit {

int32_t fail(qvdit_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

int32_t launched(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return QVDIT_OK;
  if (error == cudaErrorNoKernelImageForDevice && qvdit_check_device() == QVDIT_NO_KERNEL) return QVDIT_NO_KERNEL;
  return fail(QVDIT_CUDA, "%s: %s (%s)", kernel, cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace qvdit

extern "C" {

const char* qvdit_last_error(void) { return last_error; }

int32_t qvdit_abi(void) { return QVDIT_ABI; }

const char* qvdit_architectures(void) { return QVDIT_ARCHITECTURES; }

int32_t qvdit_check_device(void) {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return qvdit::launched("cudaGetDevice");
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) return QVDIT_OK;
  cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    return qvdit::fail(QVDIT_NO_KERNEL, "device %d is sm_%d%d; this library has kernels for %s", device, major, minor,
                       QVDIT_ARCHITECTURES);
  }
  return qvdit::fail(QVDIT_CUDA, "device %d: %s", device, cudaGetErrorString(error));
}

}  // extern "C"
