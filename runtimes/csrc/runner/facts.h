// What is known of an engine, in a file beside it: TensorRT's own check of a foreign engine is a crash or a line of its
// log, and none at all for one that was built from another ONNX file.
#pragma once

#include <map>
#include <string>

#include "json.h"
#include "tensor.h"

namespace qvdit::runner {

struct Profile {
  Shape least, typical, most;
};

// The fields of EngineFacts in qvdit/runtimes/tensorrt/engine.py, which reads and writes the same file.
struct Facts {
  std::string tensorrt;  // "8.6.0"
  std::string gpu;
  std::string compute;  // capability, "8.7"
  std::string driver;
  std::map<std::string, Profile> profile;   // by input
  std::map<std::string, std::string> onnx;  // sha256 of the model and its data, by name inside the folder
  std::string plugin_sha256, plugin_version, plugin_tensorrt;  // empty where there is none
  int64_t optimization_level = -1;                             // -1: TensorRT's default
  int64_t workspace = 0;                                       // bytes; 0: TensorRT's default
  double build_seconds = 0;
  std::string engine_sha256;
  int64_t engine_bytes = 0;
  int64_t device_bytes = 0;  // scratch memory that a context needs

  std::string json() const;
  // Throws Error for what is no such text. path: names it.
  static Facts parse(const std::string& text, const std::string& path);
};

// Throws Error, one sentence, unless an engine at ``path`` with these facts can be loaded here: by the same TensorRT,
// on the same GPU, for the same ONNX files. ``here`` has these alone, and the engine file's size and sha256.
void check_facts(const Facts& facts, const Facts& here, const std::string& path);

// The profiles, by input, that serve ``shapes`` and reach to ``least`` and ``most`` where those name an input. Throws
// Error where they name none, or have another number of extents.
std::map<std::string, Profile> widened(const std::map<std::string, Shape>& shapes,
                                       const std::map<std::string, Shape>& least,
                                       const std::map<std::string, Shape>& most);

// Throws Error unless a shape lies in a profile.
void check_profile(const std::string& input, const Profile& profile, const Shape& shape);

}  // namespace qvdit::runner
