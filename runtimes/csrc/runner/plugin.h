// Loading the LowBitLinear plugin's library.
#pragma once

#include "log.h"
#include "plugin_file.h"

namespace qvdit::runner {

// Registers the plugin, for as long as the process lives. Throws Error where the library is for another TensorRT, does
// not load or registers nothing.
void load_plugin(const PluginFacts& plugin, Log& log);

}  // namespace qvdit::runner
