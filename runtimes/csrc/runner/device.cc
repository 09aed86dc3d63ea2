#include "device.h"

#include "error.h"

namespace qvdit::runner {

void check_cuda(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  const std::string fix = status == cudaErrorMemoryAllocation ? "free memory, or build for a smaller video"
                                                              : "see that nvidia-smi or tegrastats lists the GPU";
  throw Error(what + " refused by CUDA (" + cudaGetErrorString(status) + ")", "a GPU that works and has memory", fix);
}

Gpu find_gpu() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    const std::string why = status == cudaSuccess ? "" : std::string(" (") + cudaGetErrorString(status) + ")";
    throw Error("no GPU" + why, "an NVIDIA GPU and its driver", "run it on the device that the engine is for");
  }
  int device = 0, driver = 0;
  cudaDeviceProp found;
  check_cuda(cudaGetDevice(&device), "the current device");
  check_cuda(cudaGetDeviceProperties(&found, device), "the device's properties");
  check_cuda(cudaDriverGetVersion(&driver), "the driver's version");
  const auto dotted = [](int major, int minor) { return std::to_string(major) + "." + std::to_string(minor); };
  return {found.name, dotted(found.major, found.minor), "CUDA " + dotted(driver / 1000, driver % 1000 / 10)};
}

int64_t free_memory() {
  size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "the free memory");
  return static_cast<int64_t>(free);
}

Buffer::~Buffer() { cudaFree(data_); }

bool Buffer::reserve(int64_t bytes) {
  if (data_ && bytes <= bytes_) return false;
  check_cuda(cudaFree(data_), "freeing memory");
  data_ = nullptr;
  bytes_ = bytes;
  const size_t asked = bytes > 0 ? static_cast<size_t>(bytes) : 1;
  check_cuda(cudaMalloc(&data_, asked), std::to_string(bytes) + " bytes");
  return true;
}

Stream::Stream() { check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"); }
Stream::~Stream() { cudaStreamDestroy(stream_); }
void Stream::wait() const { check_cuda(cudaStreamSynchronize(stream_), "the model's run"); }

Event::Event() { check_cuda(cudaEventCreate(&event_), "an event"); }
Event::~Event() { cudaEventDestroy(event_); }
void Event::record(const Stream& stream) const { check_cuda(cudaEventRecord(event_, stream.get()), "an event"); }
void Event::wait() const { check_cuda(cudaEventSynchronize(event_), "the model's run"); }

float Event::milliseconds_since(const Event& start) const {
  float milliseconds = 0;
  check_cuda(cudaEventElapsedTime(&milliseconds, start.event_, event_), "a time");
  return milliseconds;
}

}  // namespace qvdit::runner
