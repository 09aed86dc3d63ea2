#include "plugin.h"

#include <dlfcn.h>

#include "error.h"
#include "versions.h"

namespace qvdit::runner {

void load_plugin(const PluginFacts& plugin, Log& log) {
  const char kBuild[] = "build it on this machine: build.sh";
  check_plugin(plugin, NV_TENSORRT_MAJOR);
  if (!dlopen(plugin.path.c_str(), RTLD_NOW | RTLD_LOCAL)) {  // kept for good: TensorRT holds its creator
    throw Error(plugin.path + ", which does not load (" + dlerror() + ")", "a plugin for this machine", kBuild);
  }
  if (!has_plugin("LowBitLinear", plugin.version.c_str())) {
    throw Error(plugin.path + ", which registers no plugin (" + log.why() + ")", "a plugin for this TensorRT", kBuild);
  }
}

}  // namespace qvdit::runner
