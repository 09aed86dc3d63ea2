#include "parity.h"

#include <algorithm>
#include <stdexcept>

#include "error.h"

namespace qvdit::runner {
namespace {

const std::string kModel = "model:", kLayer = "layer:", kX = ":x";

bool starts_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

std::string node_of(const std::string& port) {
  if (!ends_with(port, kX)) throw Error("an input " + port, "inputs NODE:x", "export the model again");
  return port.substr(0, port.size() - kX.size());
}

std::vector<std::string> layers_of(const std::string& node) {
  std::vector<std::string> names;
  size_t start = 0;
  for (size_t comma = node.find(','); comma != std::string::npos; comma = node.find(',', start)) {
    names.push_back(node.substr(start, comma - start));
    start = comma + 1;
  }
  names.push_back(node.substr(start));
  return names;
}

bool fits(const Shape& shape, const Shape& expected) {
  bool same = shape.size() == expected.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = expected[i] < 0 || shape[i] == expected[i];
  return same;
}

Tensor typed(const std::string& name, const Port& port, Tensor tensor) {
  if (!fits(tensor.shape, port.shape)) {
    throw Error(name + " of " + shape_text(tensor.shape), shape_text(port.shape) + " as the model has it",
                "copy the folder again: its files are not of one export");
  }
  return cast(tensor, port.type);
}

// Values in a row of an output.
size_t row_width(const std::string& name, const Tensor& tensor) {
  if (tensor.shape.empty()) throw Error("a scalar " + name, "rows of values", "export the model again");
  return static_cast<size_t>(tensor.shape.back());
}

// [..., L, K] → [B, L, K].
Shape three_dimensional(const Shape& shape) {
  if (shape.size() < 2) throw Error("a layer's input of " + shape_text(shape), "[..., L, K]", "copy the folder again");
  Shape made = {1, shape[shape.size() - 2], shape.back()};
  for (size_t i = 0; i + 2 < shape.size(); ++i) made[0] *= shape[i];
  return made;
}

// Columns start … start + count of rows of ``width`` values. Throws Error where rows are shorter.
template <typename T>
std::vector<T> columns(const std::vector<T>& values, size_t width, size_t start, size_t count) {
  if (width == 0 || start > width || count > width - start) {
    throw Error("rows of " + std::to_string(width) + " values", "at least " + std::to_string(start + count),
                "export the model again: its layers are not those of the reference run");
  }
  std::vector<T> made;
  for (size_t row = 0; row + width <= values.size(); row += width) {
    const auto first = values.begin() + static_cast<std::ptrdiff_t>(row + start);
    made.insert(made.end(), first, first + static_cast<std::ptrdiff_t>(count));
  }
  return made;
}

// int32 words of four int8 each → the first K of every row.
std::vector<int64_t> unpacked(const std::string& name, const Tensor& words, int64_t features, int64_t offset) {
  const size_t width = row_width(name, words) * 4;
  std::vector<int64_t> bytes;
  for (const uint8_t byte : words.data) bytes.push_back(static_cast<int8_t>(byte) + offset);
  return columns(bytes, width, 0, static_cast<size_t>(features));
}

const Tensor& output(const Tensors& outputs, const std::string& name) {
  const auto found = outputs.find(name);
  if (found == outputs.end()) throw Error("a model of layers without " + name, "all of its outputs", "export it again");
  return found->second;
}

LayerParity check_layer(const std::string& node, const std::string& name, size_t index, size_t count,
                        const Tensors& outputs, int64_t features, const SafeTensors& reference) {
  const std::string key = kLayer + name + ":";
  LayerParity parity;
  parity.name = name;
  const Tensor& y = output(outputs, node + ":y");
  const size_t width = row_width(node + ":y", y), n = width / count;
  parity.rel_err = relative_error(columns(floats(y), width, index * n, n), floats(reference.read(key + "y")));
  const bool has_symmetric = outputs.count(node + ":x_q") > 0;
  if (has_symmetric || outputs.count(node + ":x_q_less_128")) {
    const std::string stored = node + (has_symmetric ? ":x_q" : ":x_q_less_128");
    const std::vector<int64_t> x_q = integers(reference.read(key + "x_q"));
    parity.xq_compared = static_cast<int64_t>(x_q.size());
    parity.xq_mismatches =
        count_differing(unpacked(stored, output(outputs, stored), features, has_symmetric ? 0 : 128), x_q);
    const std::vector<int64_t> acc = integers(reference.read(key + "acc"));
    parity.acc_compared = static_cast<int64_t>(acc.size());
    parity.acc_mismatches =
        count_differing(columns(integers(output(outputs, node + ":acc")), width, index * n, n), acc);
  }
  return parity;
}

}  // namespace

std::map<std::string, Shape> model_shapes(const SafeTensors& inputs) {
  std::map<std::string, Shape> shapes;
  for (const std::string& name : inputs.names()) {
    if (starts_with(name, kModel)) shapes[name.substr(kModel.size())] = inputs.shape(name);
  }
  return shapes;
}

Tensors model_feed(const Model& model, const SafeTensors& inputs) {
  Tensors feed;
  for (const auto& [name, port] : model.inputs()) feed[name] = typed(name, port, inputs.read(kModel + name));
  return feed;
}

Profile layer_profile(const std::string& port, const SafeTensors& inputs) {
  Profile profile;
  for (const std::string& name : layers_of(node_of(port))) {
    const Shape shape = three_dimensional(inputs.shape(kLayer + name + kX));
    if (profile.typical.empty()) profile = {shape, shape, shape};
    for (size_t i = 0; i < shape.size(); ++i) {
      profile.least[i] = std::min(profile.least[i], shape[i]);
      profile.most[i] = std::max(profile.most[i], shape[i]);
    }
  }
  return profile;
}

ModelParity check_model(Model& model, const SafeTensors& inputs, const SafeTensors& reference,
                        const SafeTensors* half) {
  const Tensors outputs = model.infer(model_feed(model, inputs));
  if (outputs.size() != 1) {
    throw Error("a model of " + std::to_string(outputs.size()) + " outputs", "one", "export the model again");
  }
  const std::vector<float> found = floats(outputs.begin()->second), full = floats(reference.read(kModel + "full"));
  ModelParity parity = compare_models(found, floats(reference.read(kModel + "quantized")), full);
  if (half) {
    const std::vector<float> rounded = floats(half->read(kModel + "half"));
    parity.error_half = relative_error(rounded, full);
    parity.half_rel_err = relative_error(found, rounded);
  }
  return parity;
}

std::vector<LayerParity> check_layers(Model& layers, const SafeTensors& inputs, const SafeTensors& reference) {
  std::vector<LayerParity> found;
  size_t most = 1;
  for (size_t index = 0; index < most; ++index) {
    Tensors feed;
    for (const auto& [port, described] : layers.inputs()) {
      const std::vector<std::string> names = layers_of(node_of(port));
      Tensor x = inputs.read(kLayer + names[std::min(index, names.size() - 1)] + kX);
      x.shape = three_dimensional(x.shape);
      feed[port] = typed(port, described, std::move(x));
      most = std::max(most, names.size());
    }
    const Tensors outputs = layers.infer(feed);
    for (const auto& [port, described] : layers.inputs()) {
      const std::string node = node_of(port);
      const std::vector<std::string> names = layers_of(node);
      if (index >= names.size()) continue;
      const int64_t features = feed.at(port).shape.back();
      found.push_back(check_layer(node, names[index], index, names.size(), outputs, features, reference));
    }
  }
  return found;
}

int64_t count_layers(const SafeTensors& inputs) {
  int64_t count = 0;
  for (const std::string& name : inputs.names()) count += starts_with(name, kLayer);
  return count;
}

}  // namespace qvdit::runner
