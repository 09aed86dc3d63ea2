// TensorRT's log: kept for the sentence that an Error says, shown on request.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace qvdit::runner {

class Log final : public nvinfer1::ILogger {
 public:
  explicit Log(bool verbose) : verbose_(verbose) {}

  void log(Severity severity, const char* text) noexcept override;

  // The first errors since the last call, as part of a sentence.
  std::string why();

 private:
  bool verbose_;
  std::vector<std::string> errors_;
};

}  // namespace qvdit::runner
