// What differs between the versions of TensorRT that the runner is compiled against, each difference named once.
#pragma once

#include <NvInfer.h>
#include <NvOnnxParser.h>

#include <memory>
#include <string>

#include "../tensorrt/versions.h"
#include "tensor.h"

namespace qvdit::runner {

using trt::Extent;

// Networks are typed by their graph alone from 10 on; 8.6 has precisions of layers instead, 11 has no such thing.
constexpr bool kStronglyTyped = NV_TENSORRT_MAJOR >= 10;

inline uint32_t network_flags() {
#if NV_TENSORRT_MAJOR >= 11
  return 0;  // every network is strongly typed
#elif NV_TENSORRT_MAJOR >= 10
  return 1U << static_cast<uint32_t>(nvinfer1::NetworkDefinitionCreationFlag::kSTRONGLY_TYPED);
#else
  // From 10 on there is no other kind.
  return 1U << static_cast<uint32_t>(nvinfer1::NetworkDefinitionCreationFlag::kEXPLICIT_BATCH);
#endif
}

inline Shape shape_of(const nvinfer1::Dims& dims) {
  return dims.nbDims < 0 ? Shape() : Shape(dims.d, dims.d + dims.nbDims);
}

// Throws Error for more extents than TensorRT has.
nvinfer1::Dims dims_of(const Shape& shape);

// A type of an engine's input or output; false where the runner has none for it.
inline bool host_type(nvinfer1::DataType type, Type& found) {
  using nvinfer1::DataType;
  switch (type) {
    case DataType::kFLOAT:
      found = Type::kF32;
      return true;
    case DataType::kHALF:
      found = Type::kF16;
      return true;
    case DataType::kINT32:
      found = Type::kI32;
      return true;
#if NV_TENSORRT_MAJOR >= 10
    case DataType::kBF16:
      found = Type::kBF16;
      return true;
    case DataType::kINT64:
      found = Type::kI64;
      return true;
#endif
    default:
      return false;
  }
}

inline int64_t scratch_bytes(const nvinfer1::ICudaEngine& engine) {
#if NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 1)
  return engine.getDeviceMemorySizeV2();
#else
  return static_cast<int64_t>(engine.getDeviceMemorySize());
#endif
}

// In 8, by a function at whose place all its headers agree: the parser of 8.6.0 knows no flags, whose functions stand
// before the destructor in the published header of 8.6.
struct DestroyParser {
  void operator()(nvonnxparser::IParser* parser) const {
#if NV_TENSORRT_MAJOR < 10
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    parser->destroy();
#pragma GCC diagnostic pop
#else
    delete parser;
#endif
  }
};
using Parser = std::unique_ptr<nvonnxparser::IParser, DestroyParser>;

// Which node a parser's error is about: its name is known from 10 on, its index before.
inline std::string error_node(const nvonnxparser::IParserError& error) {
#if NV_TENSORRT_MAJOR >= 10
  if (error.nodeName() && *error.nodeName()) return std::string("node ") + error.nodeName();
#endif
  return error.node() >= 0 ? "node " + std::to_string(error.node()) : "the model";
}

inline bool has_plugin(const char* name, const char* version) {
#if QVDIT_PLUGIN_V3
  return getPluginRegistry()->getCreator(name, version, "") != nullptr;  // finds both interfaces' plugins
#else
  return getPluginRegistry()->getPluginCreator(name, version, "") != nullptr;
#endif
}

// Gives a weakly typed network the types of its graph's Casts; needed, and possible, before 10 alone.
// own_kernels: TensorRT's kernels alone, where cuBLAS or cuDNN are missing, which 8.6 would use.
void set_types(nvinfer1::INetworkDefinition& network, nvinfer1::IBuilderConfig& config, bool own_kernels);

// Lets a build that failed stray from those types where there is no other way; false where that changes nothing.
bool relax_types(nvinfer1::IBuilderConfig& config);

}  // namespace qvdit::runner
