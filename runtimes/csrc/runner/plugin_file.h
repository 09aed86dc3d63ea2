// The LowBitLinear plugin's library as a file: what it says of itself, before anything loads it.
#pragma once

#include <string>

namespace qvdit::runner {

struct PluginFacts {
  std::string path;      // empty: there is none
  std::string version;   // of the node's attributes, "1"
  std::string tensorrt;  // whose headers it was compiled against, "8.6.0"
};

// Throws Error for a file that is no such library.
PluginFacts inspect_plugin(const std::string& path);

// Throws Error unless it was compiled for TensorRT ``major``: loaded beside another one it would crash.
void check_plugin(const PluginFacts& plugin, int major);

// Whether an ONNX file has nodes of the plugin.
bool needs_plugin(const std::string& onnx);

}  // namespace qvdit::runner
