// The command line of qvdit-run.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "tensor.h"

namespace qvdit::runner {

extern const char kUsage[];

struct Arguments {
  std::string command;  // build, parity, bench, sample or help
  std::string folder;
  std::string plugin;  // empty: the folder's, if there is one
  std::string out;     // of sample
  std::string plan;    // of sample; empty: the folder's
  int64_t runs = 50, warmup = 10;
  int64_t workspace_mib = 0;        // 0: TensorRT's default
  int64_t optimization_level = -1;  // -1: TensorRT's default
  bool graph = false;               // replay a CUDA graph
  bool verbose = false;
  std::map<std::string, Shape> least, most;  // by input: where the profile reaches beyond the reference run's shapes
};

// Throws Error for what is no command line.
Arguments parse_arguments(const std::vector<std::string>& words);

}  // namespace qvdit::runner
