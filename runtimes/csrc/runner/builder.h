// ONNX to a serialized engine.
#pragma once

#include <functional>
#include <string>

#include "facts.h"
#include "log.h"

namespace qvdit::runner {

struct BuildOptions {
  int64_t workspace = 0;            // bytes; 0: TensorRT's default
  int64_t optimization_level = -1;  // -1: TensorRT's default
  std::string timing_cache;         // a file; it is used, and written again
};

// The version of the TensorRT that is loaded, "8.6.0". Throws Error where it is not the one compiled against.
std::string tensorrt_version();

// A serialized engine. profile_of: an input's shapes. Throws Error with TensorRT's own words where it refuses.
std::string build_engine(const std::string& onnx, const std::function<Profile(const std::string& input)>& profile_of,
                         const BuildOptions& options, Log& log);

}  // namespace qvdit::runner
