#include "versions.h"

#include <unordered_map>
#include <unordered_set>

#include "error.h"

namespace qvdit::runner {

nvinfer1::Dims dims_of(const Shape& shape) {
  nvinfer1::Dims dims = {};
  if (shape.size() > nvinfer1::Dims::MAX_DIMS) {
    throw Error("a tensor of " + shape_text(shape), "at most 8 extents", "export the model again");
  }
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) dims.d[i] = static_cast<Extent>(shape[i]);
  return dims;
}

#if NV_TENSORRT_MAJOR >= 10

void set_types(nvinfer1::INetworkDefinition&, nvinfer1::IBuilderConfig&, bool) {}
bool relax_types(nvinfer1::IBuilderConfig&) { return false; }

#else

namespace {

using nvinfer1::BuilderFlag;
using nvinfer1::DataType;
using nvinfer1::ILayer;
using nvinfer1::INetworkDefinition;
using nvinfer1::ITensor;
using nvinfer1::LayerType;
using Types = std::unordered_map<const ITensor*, DataType>;

bool is_float(DataType type) { return type == DataType::kFLOAT || type == DataType::kHALF; }

// Layers whose types are their own, and which take no precision.
bool is_free(LayerType type) {
  return type == LayerType::kCONSTANT || type == LayerType::kSHAPE || type == LayerType::kPLUGIN_V2 ||
         type == LayerType::kCAST || type == LayerType::kQUANTIZE || type == LayerType::kDEQUANTIZE;
}

// What only moves values. Told to give kHALF, fused with another of its kind, it is refused by the one backend that may
// run it ("Mismatched type for tensor ..., f32 vs. expected type:f16"): TensorRT keeps float32 between layers.
bool is_move(LayerType type) {
  return type == LayerType::kSHUFFLE || type == LayerType::kSLICE || type == LayerType::kCONCATENATION ||
         type == LayerType::kGATHER || type == LayerType::kIDENTITY || type == LayerType::kPADDING ||
         type == LayerType::kSCATTER || type == LayerType::kSELECT;
}

// Whether a layer is a plugin's that normalizes a float32 x and gives kHALF: a modulation follows x, then integers.
// Integers follow any other layer's x at once, and there are none where attention or a residual sum is computed.
bool normalizes(const ILayer& layer) {
  if (layer.getType() != LayerType::kPLUGIN_V2 || layer.getNbInputs() < 2) return false;
  bool integers = false;
  for (int i = 0; i < layer.getNbInputs(); ++i) integers = integers || !is_float(layer.getInput(i)->getType());
  return integers && is_float(layer.getInput(1)->getType());
}

// The type that a layer has of itself, or else that of its first floating-point input.
DataType type_of(const ILayer& layer, const Types& types) {
  if (layer.getType() == LayerType::kCAST) return static_cast<const nvinfer1::ICastLayer&>(layer).getToType();
  if (layer.getType() == LayerType::kDEQUANTIZE) return DataType::kFLOAT;
  if (normalizes(layer)) return DataType::kHALF;
  if (layer.getType() == LayerType::kCONSTANT) {
    return static_cast<const nvinfer1::IConstantLayer&>(layer).getWeights().type;
  }
  for (int i = 0; i < layer.getNbInputs(); ++i) {
    const auto known = types.find(layer.getInput(i));
    if (known != types.end() && is_float(known->second)) return known->second;
  }
  return DataType::kFLOAT;
}

// The type of every tensor, as the graph has them: 8.6 calls all floating-point tensors but inputs kFLOAT until an
// engine is built. Only a plugin's first output is of a type of this kind; the others are for tests.
Types tensor_types(const INetworkDefinition& network) {
  Types types;
  for (int i = 0; i < network.getNbInputs(); ++i) types[network.getInput(i)] = network.getInput(i)->getType();
  for (int i = 0; i < network.getNbLayers(); ++i) {
    const ILayer& layer = *network.getLayer(i);
    const DataType type = type_of(layer, types);
    for (int output = 0; output < layer.getNbOutputs(); ++output) {
      const DataType own = layer.getOutput(output)->getType();
      const bool follows = is_float(own) && !(output && layer.getType() == LayerType::kPLUGIN_V2);
      types[layer.getOutput(output)] = follows ? type : own;
    }
  }
  return types;
}

// Whether a layer's inputs all come from DequantizeLinear: TensorRT has INT8 kernels for such a product.
bool is_dequantized(const ILayer& layer, const std::unordered_set<const ITensor*>& dequantized) {
  for (int i = 0; i < layer.getNbInputs(); ++i) {
    if (layer.getInput(i) && !dequantized.count(layer.getInput(i))) return false;
  }
  return layer.getNbInputs() > 0;
}

// Outputs before inputs: a comparison computes in its inputs' type.
void set_type(ILayer& layer, const Types& types) {
  if (is_move(layer.getType()) && types.at(layer.getOutput(0)) == DataType::kHALF) return;
  bool decided = false;
  for (int output = 0; output < layer.getNbOutputs(); ++output) {
    const DataType type = types.at(layer.getOutput(output));
    if (!is_float(type)) continue;
    if (!decided) layer.setPrecision(type);
    decided = true;
    layer.setOutputType(output, type);
  }
  for (int i = 0; i < layer.getNbInputs() && !decided; ++i) {
    const auto known = types.find(layer.getInput(i));
    decided = known != types.end() && is_float(known->second);
    if (decided) layer.setPrecision(known->second);
  }
}

}  // namespace

void set_types(INetworkDefinition& network, nvinfer1::IBuilderConfig& config, bool own_kernels) {
  const Types types = tensor_types(network);
  std::unordered_set<const ITensor*> dequantized;
  for (int i = 0; i < network.getNbLayers(); ++i) {
    ILayer& layer = *network.getLayer(i);
    if (layer.getType() == LayerType::kDEQUANTIZE) dequantized.insert(layer.getOutput(0));
    if (!is_free(layer.getType()) && !is_dequantized(layer, dequantized)) set_type(layer, types);
  }
  config.setFlag(BuilderFlag::kFP16);
  if (dequantized.empty()) {
    config.setFlag(BuilderFlag::kOBEY_PRECISION_CONSTRAINTS);
  } else {
    config.setFlag(BuilderFlag::kINT8);
    // What INT8 kernels there are for a product decides in which type it ends.
    config.setFlag(BuilderFlag::kPREFER_PRECISION_CONSTRAINTS);
  }
  if (own_kernels) config.setTacticSources(0);
}

bool relax_types(nvinfer1::IBuilderConfig& config) {
  if (!config.getFlag(BuilderFlag::kOBEY_PRECISION_CONSTRAINTS)) return false;
  config.clearFlag(BuilderFlag::kOBEY_PRECISION_CONSTRAINTS);
  config.setFlag(BuilderFlag::kPREFER_PRECISION_CONSTRAINTS);
  return true;
}

#endif

}  // namespace qvdit::runner
