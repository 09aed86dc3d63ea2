#include "shell.h"

#include <cstdio>
#include <cstring>

namespace qvdit::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::ILogger;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

// TensorRT's logger exists while one of its builders, runtimes or refitters does.
void log_error(const char* text) {
  if (ILogger* logger = getLogger()) {
    logger->log(ILogger::Severity::kERROR, text);
  } else {
    std::fprintf(stderr, "%s\n", text);
  }
}

// What this library was built for, to be found in its file before anything loads it: qvdit/runtimes/tensorrt/plugin.py.
#define QVDIT_TEXT_OF(value) #value
#define QVDIT_TEXT(value) QVDIT_TEXT_OF(value)
#define QVDIT_TENSORRT QVDIT_TEXT(NV_TENSORRT_MAJOR) "." QVDIT_TEXT(NV_TENSORRT_MINOR) "." QVDIT_TEXT(NV_TENSORRT_PATCH)
__attribute__((used)) const char kBuiltFor[] = "qvdit LowBitLinear 4 for TensorRT " QVDIT_TENSORRT;

}  // namespace

bool report(const char* kind, const char* layer, const Refusal& refusal) noexcept {
  char line[1024];
  std::snprintf(line, sizeof(line), "%s \"%.255s\": %s", kind, layer ? layer : "", refusal.text);
  log_error(line);
  return false;
}

Tensor tensor_of(DataType type, const nvinfer1::Dims& dims) noexcept {
  Tensor tensor = {};
  tensor.type = kernel_type(type);
  tensor.rank = dims.nbDims;
  for (int i = 0; i < dims.nbDims && i < kMaxDims; ++i) tensor.dims[i] = dims.d[i];
  return tensor;
}

Tensors::Tensors(const PluginTensorDesc* descriptions, int count) noexcept {
  for (int i = 0; i < limited(count); ++i) tensor[i] = tensor_of(descriptions[i].type, descriptions[i].dims);
}

Tensors::Tensors(const DynamicPluginTensorDesc* descriptions, int count, bool largest) noexcept {
  for (int i = 0; i < limited(count); ++i) {
    const PluginTensorDesc& description = descriptions[i].desc;
    tensor[i] = tensor_of(description.type, largest ? descriptions[i].max : description.dims);
  }
}

Tensors::Tensors(const DimsExprs* shapes, int count) noexcept {
  for (int i = 0; i < limited(count); ++i) {
    tensor[i] = {};
    tensor[i].type = kOtherType;
    tensor[i].rank = shapes[i].nbDims;
    for (int d = 0; d < shapes[i].nbDims && d < kMaxDims; ++d) {
      const auto* extent = shapes[i].d[d];
      tensor[i].dims[d] = extent->isConstant() ? static_cast<int64_t>(extent->getConstantValue()) : kUnknown;
    }
  }
}

DimsExprs output_shape(const LowBitAttributes& attributes, int output, const DimsExprs* inputs,
                       nvinfer1::IExprBuilder& builder) noexcept {
  const int64_t columns = output_port(attributes, output).columns;
  DimsExprs shape = inputs[kX];
  if (shape.nbDims < 1) return shape;
  if (columns) {
    shape.d[shape.nbDims - 1] = builder.constant(static_cast<Extent>(columns));
  } else {
    shape.nbDims -= 1;
  }
  return shape;
}

DimsExprs output_shape(const AttentionAttributes& attributes, int, const DimsExprs* inputs,
                       nvinfer1::IExprBuilder& builder) noexcept {
  DimsExprs shape = inputs[0];
  if (shape.nbDims < 3) return shape;  // refused
  shape.d[1] = shape.d[row_axis(attributes)];
  shape.d[2] = builder.constant(static_cast<Extent>(features(attributes)));
  shape.nbDims = 3;
  return shape;
}

DimsExprs output_shape(const ResidualAttributes& attributes, int, const DimsExprs* inputs,
                       nvinfer1::IExprBuilder& builder) noexcept {
  DimsExprs shape = inputs[kResidual];
  if (attributes.swapped == 0 || shape.nbDims != 3) return shape;
  const auto* outer = builder.constant(static_cast<Extent>(attributes.swapped));
  const auto* inner = shape.d[1];
  const auto* batch = builder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *shape.d[0], *outer);
  shape.d[0] = builder.operation(nvinfer1::DimensionOperation::kPROD, *batch, *inner);
  shape.d[1] = outer;
  return shape;
}

const PluginField* find_field(const PluginFieldCollection* fields, const char* name) noexcept {
  for (int i = 0; fields && i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    const bool suits = field.type == PluginFieldType::kINT32 && field.data;
    if (suits && field.name && std::strcmp(field.name, name) == 0) return &field;
  }
  return nullptr;
}

const int32_t* find_attribute(const void* fields, const char* name) noexcept {
  const PluginField* field = find_field(static_cast<const PluginFieldCollection*>(fields), name);
  return field && field->length == 1 ? static_cast<const int32_t*>(field->data) : nullptr;
}

}  // namespace qvdit::trt

// Registers the plugins, which loading the library does by itself. Returns 1 if the registry has them, now or already,
// else 0.
extern "C" QVDIT_API int32_t qvdit_register_plugins() {
  static const bool registered = [] {
    nvinfer1::IPluginRegistry* registry = getPluginRegistry();
    if (!registry) return false;
    const qvdit::trt::Creators& made = qvdit::trt::creators();
    const bool linear = registry->registerCreator(*made.low_bit_linear, "");
    const bool attention = registry->registerCreator(*made.headwise_attention, "");
    return registry->registerCreator(*made.gated_residual, "") && attention && linear;
  }();
  return registered;
}

namespace {
const int32_t kRegistered = qvdit_register_plugins();
}  // namespace
