// The CUDA runtime, as far as the runner needs it, with errors as sentences.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace qvdit::runner {

// Throws Error unless a CUDA call succeeded. what: what was tried.
void check_cuda(cudaError_t status, const std::string& what);

struct Gpu {
  std::string name;
  std::string compute;  // capability, "8.7"
  std::string driver;   // the newest CUDA that it serves
};

// The current device. Throws Error where there is none.
Gpu find_gpu();

int64_t free_memory();

// Device memory that grows.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  // At least ``bytes``; whether it moved.
  bool reserve(int64_t bytes);
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

class Stream {
 public:
  Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();

  cudaStream_t get() const { return stream_; }
  // Waits for what was started; reports what went wrong in it.
  void wait() const;

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event();

  void record(const Stream& stream) const;
  void wait() const;
  float milliseconds_since(const Event& start) const;

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace qvdit::runner
