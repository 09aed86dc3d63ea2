#include "versions.h"

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

#else

namespace {

using nvinfer1::BuilderFlag;
using nvinfer1::DataType;
using nvinfer1::ILayer;
using nvinfer1::ITensor;
using nvinfer1::LayerType;

bool is_float(const ITensor* tensor) {
  return tensor && (tensor->getType() == DataType::kFLOAT || tensor->getType() == DataType::kHALF);
}

// Layers whose types are their own, and which take no precision.
bool is_free(LayerType type) {
  return type == LayerType::kCONSTANT || type == LayerType::kSHAPE || type == LayerType::kPLUGIN_V2 ||
         type == LayerType::kCAST || type == LayerType::kQUANTIZE || type == LayerType::kDEQUANTIZE;
}

// The first float tensor of a layer, outputs before inputs.
const ITensor* deciding(const ILayer& layer) {
  for (int i = 0; i < layer.getNbOutputs(); ++i) {
    if (is_float(layer.getOutput(i))) return layer.getOutput(i);
  }
  for (int i = 0; i < layer.getNbInputs(); ++i) {
    if (is_float(layer.getInput(i))) return layer.getInput(i);
  }
  return nullptr;
}

}  // namespace

void set_types(nvinfer1::INetworkDefinition& network, nvinfer1::IBuilderConfig& config, bool own_kernels) {
  bool quantized = false;
  for (int i = 0; i < network.getNbLayers(); ++i) {
    ILayer& layer = *network.getLayer(i);
    quantized |= layer.getType() == LayerType::kQUANTIZE;
    const ITensor* decides = is_free(layer.getType()) ? nullptr : deciding(layer);
    if (!decides) continue;
    layer.setPrecision(decides->getType());
    for (int output = 0; output < layer.getNbOutputs(); ++output) {
      const ITensor* tensor = layer.getOutput(output);
      if (is_float(tensor)) layer.setOutputType(output, tensor->getType());
    }
  }
  config.setFlag(BuilderFlag::kFP16);
  config.setFlag(BuilderFlag::kOBEY_PRECISION_CONSTRAINTS);
  if (quantized) config.setFlag(BuilderFlag::kINT8);
  if (own_kernels) config.setTacticSources(0);
}

#endif

}  // namespace qvdit::runner
