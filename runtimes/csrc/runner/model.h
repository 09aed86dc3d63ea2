// What parity, timing and sampling need of a model, so that they can be tested without one.
#pragma once

#include <map>
#include <string>

#include "tensor.h"

namespace qvdit::runner {

struct Port {
  Type type;
  Shape shape;  // -1 where it varies
};

class Model {
 public:
  virtual ~Model() = default;
  virtual const std::map<std::string, Port>& inputs() const = 0;
  virtual const std::map<std::string, Port>& outputs() const = 0;
  // Runs once. inputs: exactly those of inputs(), in their types and in shapes that fit.
  virtual Tensors infer(const Tensors& inputs) = 0;
};

}  // namespace qvdit::runner
