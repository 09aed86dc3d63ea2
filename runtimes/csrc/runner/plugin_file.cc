#include "plugin_file.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>

#include "error.h"
#include "files.h"

namespace qvdit::runner {
namespace {

const char kBuild[] = "build it: build.sh, or cmake -S csrc -DQVDIT_TENSORRT_INCLUDE=…";
constexpr int64_t kLargest = int64_t{1} << 31;

}  // namespace

PluginFacts inspect_plugin(const std::string& path) {
  // kBuiltFor of ../tensorrt/shell.cc: "qvdit LowBitLinear 4 for TensorRT 8.6.0", ended by a zero.
  static const std::string kStart = "qvdit LowBitLinear ", kMiddle = " for TensorRT ";
  const std::string content = read_file(path, "TensorRT's LowBitLinear plugin", kLargest);
  const size_t start = content.find(kStart), end = content.find('\0', start);
  const std::string text =
      start == std::string::npos ? "" : content.substr(start + kStart.size(), end - start - kStart.size());
  const size_t middle = text.find(kMiddle);
  if (middle == std::string::npos) throw Error(path, "a build of the LowBitLinear plugin", kBuild);
  return {path, text.substr(0, middle), text.substr(middle + kMiddle.size())};
}

void check_plugin(const PluginFacts& plugin, int major) {
  if (std::atoi(plugin.tensorrt.c_str()) == major) return;
  throw Error(plugin.path + ", built for TensorRT " + plugin.tensorrt, "a plugin for TensorRT " + std::to_string(major),
              kBuild);
}

bool needs_plugin(const std::string& onnx) {
  std::ifstream file(onnx, std::ios::binary);
  const std::string name = "LowBitLinear";
  std::string window(1 << 20, '\0');
  size_t kept = 0;  // of the chunk before, so that a name across two is found
  while (file.read(window.data() + kept, static_cast<std::streamsize>(window.size() - kept)), file.gcount() > 0) {
    const size_t filled = kept + static_cast<size_t>(file.gcount());
    if (window.substr(0, filled).find(name) != std::string::npos) return true;
    kept = std::min(filled, name.size() - 1);
    window.replace(0, kept, window, filled - kept, kept);
  }
  return false;
}

}  // namespace qvdit::runner
