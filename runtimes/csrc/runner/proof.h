// What a comparison with the reference run found, and how it is told.
#pragma once

#include <string>
#include <vector>

#include "compare.h"

namespace qvdit::runner {

struct Proof {
  std::vector<LayerParity> layers;
  int64_t layers_saved = 0;  // of the reference run
  ModelParity model;

  bool passed() const;
  // For a reader: the layers that fail, a line for all layers, a line for the model.
  std::string text() const;
  // As qvdit/runtimes/tensorrt/parity.py writes it.
  std::string json() const;
};

}  // namespace qvdit::runner
