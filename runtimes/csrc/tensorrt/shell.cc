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

Tensor tensor_of(DataType type, const nvinfer1::Dims& dims) {
  Tensor tensor = {};
  tensor.type = kernel_type(type);
  tensor.rank = dims.nbDims;
  for (int i = 0; i < dims.nbDims && i < kMaxDims; ++i) tensor.dims[i] = dims.d[i];
  return tensor;
}

int limited(int count) { return count < kInputs ? count : static_cast<int>(kInputs); }

const int32_t* find_attribute(const void* source, const char* name) {
  const PluginField* field = find_field(static_cast<const PluginFieldCollection*>(source), name);
  return field && field->length == 1 ? static_cast<const int32_t*>(field->data) : nullptr;
}

// What this library was built for, to be found in its file before anything loads it: qvdit/runtimes/tensorrt/plugin.py.
#define QVDIT_TEXT_OF(value) #value
#define QVDIT_TEXT(value) QVDIT_TEXT_OF(value)
#define QVDIT_TENSORRT QVDIT_TEXT(NV_TENSORRT_MAJOR) "." QVDIT_TEXT(NV_TENSORRT_MINOR) "." QVDIT_TEXT(NV_TENSORRT_PATCH)
__attribute__((used)) const char kBuiltFor[] = "qvdit LowBitLinear 1 for TensorRT " QVDIT_TENSORRT;

}  // namespace

bool report(const char* layer, const Refusal& refusal) noexcept {
  char line[1024];
  std::snprintf(line, sizeof(line), "%s \"%.255s\": %s", kPluginName, layer ? layer : "", refusal.text);
  log_error(line);
  return false;
}

Layer::Layer(const Attributes& attributes, const char* name) noexcept : attributes_(attributes) {
  std::snprintf(name_, sizeof(name_), "%s", name ? name : "");
}

bool Layer::accepts_device() const noexcept {
  Refusal refusal;
  return check_device(refusal) || report(name_, refusal);
}

bool Layer::accepts_types(const DataType* types, int count) const noexcept {
  int32_t known[kInputs];
  for (int i = 0; i < limited(count); ++i) known[i] = kernel_type(types[i]);
  Refusal refusal;
  return check_types(attributes_, known, limited(count), refusal) || report(name_, refusal);
}

bool Layer::accepts(const Tensor* inputs, int count) const noexcept {
  Refusal refusal;
  return (check_inputs(attributes_, inputs, count, refusal) || report(name_, refusal)) && accepts_device();
}

bool Layer::accepts_shapes(const Tensor* inputs, int count) const noexcept {
  Refusal refusal;
  return (check_shapes(attributes_, inputs, count, refusal) || report(name_, refusal)) && accepts_device();
}

bool Layer::takes(int position, const PluginTensorDesc& tensor) const noexcept {
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  const InputPorts ports = input_ports(attributes_);
  const int32_t type = kernel_type(tensor.type);
  if (position < ports.count) {
    const int32_t wanted = ports.port[position].type;
    return wanted == kOtherType ? type == QVDIT_F16 || type == QVDIT_BF16 || type == QVDIT_F32 : type == wanted;
  }
  const int output = position - ports.count;
  return output < output_count(attributes_) && type == output_port(attributes_, output).type;
}

DataType Layer::output_type(int output) const noexcept { return tensorrt_type(output_port(attributes_, output).type); }

DimsExprs Layer::output_shape(int output, const DimsExprs& x, nvinfer1::IExprBuilder& builder) const noexcept {
  const int64_t columns = output_port(attributes_, output).columns;
  DimsExprs shape = x;
  if (x.nbDims < 1) return shape;
  if (columns) {
    shape.d[x.nbDims - 1] = builder.constant(static_cast<Extent>(columns));
  } else {
    shape.nbDims -= 1;
  }
  return shape;
}

bool Layer::run(const PluginTensorDesc* descriptions, const void* const* inputs, void* const* outputs, void* workspace,
                cudaStream_t stream) const noexcept {
  const Tensors tensors(descriptions, input_ports(attributes_).count);
  Refusal refusal;
  return trt::run(attributes_, tensors.tensor, inputs, outputs, workspace, stream, refusal) || report(name_, refusal);
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

Tensors::Tensors(const DimsExprs* shapes, int count, const Attributes& attributes) noexcept {
  const InputPorts ports = input_ports(attributes);
  for (int i = 0; i < limited(count); ++i) {
    const int32_t wanted = i < ports.count ? ports.port[i].type : kOtherType;
    tensor[i].type = wanted == kOtherType ? static_cast<int32_t>(QVDIT_F32) : wanted;
    tensor[i].rank = shapes[i].nbDims;
    for (int d = 0; d < shapes[i].nbDims && d < kMaxDims; ++d) {
      const auto* extent = shapes[i].d[d];
      tensor[i].dims[d] = extent->isConstant() ? static_cast<int64_t>(extent->getConstantValue()) : kUnknown;
    }
  }
}

const PluginFieldCollection* field_names() noexcept {
  static PluginField fields[kFieldCount];
  static const PluginFieldCollection collection = [] {
    for (int i = 0; i < kFieldCount; ++i) fields[i] = PluginField(kFields[i].name, nullptr, PluginFieldType::kINT32, 1);
    return PluginFieldCollection{kFieldCount, fields};
  }();
  return &collection;
}

const PluginField* find_field(const PluginFieldCollection* fields, const char* name) noexcept {
  for (int i = 0; fields && i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    const bool suits = field.type == PluginFieldType::kINT32 && field.data;
    if (suits && field.name && std::strcmp(field.name, name) == 0) return &field;
  }
  return nullptr;
}

bool attributes_of(const PluginFieldCollection* fields, const char* name, Attributes& attributes) noexcept {
  Refusal refusal;
  return read_attributes(find_attribute, fields, attributes, refusal) || report(name, refusal);
}

}  // namespace qvdit::trt

// Registers the plugin, which loading the library does by itself. Returns 1 if the registry has it, now or already,
// else 0.
extern "C" QVDIT_API int32_t qvdit_register_plugins() {
  static const bool registered = [] {
    nvinfer1::IPluginRegistry* registry = getPluginRegistry();
    return registry && registry->registerCreator(qvdit::trt::creator(), "");
  }();
  return registered;
}

namespace {
const int32_t kRegistered = qvdit_register_plugins();
}  // namespace
