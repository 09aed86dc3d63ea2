// Does with a plugin what TensorRT does, for ctypes: the one interface over both versions of the plugin's.
//
// With FAKE_TENSORRT the process has no TensorRT: the logger keeps the last message and there is no registry. Without,
// creators come from TensorRT's registry and TensorRT must have been loaded.
#include <cstdio>
#include <cstring>
#include <deque>
#include <vector>

#include "../../../runtimes/csrc/tensorrt/shell.h"

// 8.6 deprecates the interface that it offers.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace trt = qvdit::trt;
using namespace nvinfer1;

#if QVDIT_PLUGIN_V3
using Plugin = IPluginV3;
using PluginCreator = IPluginCreatorV3One;
#else
using Plugin = IPluginV2DynamicExt;
using PluginCreator = IPluginCreator;
#endif

namespace {

char message[2048] = "";

#ifdef FAKE_TENSORRT
class Logger : public ILogger {
  void log(Severity, const char* text) noexcept override { std::snprintf(message, sizeof(message), "%s", text); }
};
#endif

PluginCreator* creator(const char* kind) {
#ifdef FAKE_TENSORRT
  const trt::Creators& all = trt::creators();
  for (trt::Creator* made : {all.low_bit_linear, all.headwise_attention, all.gated_residual}) {
    auto* found = static_cast<PluginCreator*>(made);
    if (std::strcmp(found->getPluginName(), kind) == 0) return found;
  }
  return nullptr;
#elif QVDIT_PLUGIN_V3
  return static_cast<PluginCreator*>(getPluginRegistry()->getCreator(kind, trt::kPluginVersion, ""));
#else
  return getPluginRegistry()->getPluginCreator(kind, trt::kPluginVersion, "");
#endif
}

DataType data_type(int32_t type) {
  switch (type) {
    case QVDIT_F32:
      return DataType::kFLOAT;
    case QVDIT_F16:
      return DataType::kHALF;
    case QVDIT_S32:
      return DataType::kINT32;
#if NV_TENSORRT_MAJOR >= 9
    case QVDIT_BF16:
      return DataType::kBF16;
#endif
    default:
      return DataType::kINT8;
  }
}

Dims dims_of(const trt::Tensor& tensor) {
  Dims dims = {};
  dims.nbDims = tensor.rank;
  for (int i = 0; i < tensor.rank; ++i) dims.d[i] = static_cast<trt::Extent>(tensor.dims[i]);
  return dims;
}

PluginTensorDesc description(const trt::Tensor& tensor, TensorFormat format = TensorFormat::kLINEAR) {
  PluginTensorDesc made = {};
  made.dims = dims_of(tensor);
  made.type = data_type(tensor.type);
  made.format = format;
  made.scale = 1.f;
  return made;
}

std::vector<PluginTensorDesc> descriptions(const trt::Tensor* tensors, int count) {
  std::vector<PluginTensorDesc> made;
  for (int i = 0; i < count; ++i) made.push_back(description(tensors[i]));
  return made;
}

// Unknown extents are at most ``most``.
std::vector<DynamicPluginTensorDesc> dynamic(const trt::Tensor* tensors, int count, int64_t most) {
  std::vector<DynamicPluginTensorDesc> made(count);
  for (int i = 0; i < count; ++i) {
    made[i].desc = description(tensors[i]);
    made[i].min = made[i].max = made[i].desc.dims;
    for (int d = 0; d < tensors[i].rank; ++d) {
      if (tensors[i].dims[d] >= 0) continue;
      made[i].min.d[d] = 1;
      made[i].max.d[d] = static_cast<trt::Extent>(most);
    }
  }
  return made;
}

// An extent that is a number, or -1: one that is not known yet.
class Expression : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  explicit Expression(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const { return value_ >= 0; }
  trt::Extent getConstantValue() const { return static_cast<trt::Extent>(value_); }
  bool isSizeTensor() const { return false; }

 private:
  int64_t value_;
};

class Builder : public IExprBuilder, public apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  const IDimensionExpr* constant(trt::Extent value) {
    made_.emplace_back(value);
    return &made_.back();
  }
  const IDimensionExpr* operation(DimensionOperation kind, const IDimensionExpr& a, const IDimensionExpr& b) {
    if (!a.isConstant() || !b.isConstant()) return constant(-1);
    const int64_t one = a.getConstantValue(), other = b.getConstantValue();
    if (kind == DimensionOperation::kPROD) return constant(static_cast<trt::Extent>(one * other));
    return kind == DimensionOperation::kFLOOR_DIV ? constant(static_cast<trt::Extent>(one / other)) : nullptr;
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) { return nullptr; }

  DimsExprs shape(const trt::Tensor& tensor) {
    DimsExprs dims = {};
    dims.nbDims = tensor.rank;
    for (int i = 0; i < tensor.rank; ++i) dims.d[i] = constant(static_cast<trt::Extent>(tensor.dims[i]));
    return dims;
  }

 private:
  std::deque<Expression> made_;
};

Plugin* plugin_of(void* plugin) { return static_cast<Plugin*>(plugin); }

#if QVDIT_PLUGIN_V3
auto* build_side(void* plugin) {
  return static_cast<IPluginV3OneBuild*>(plugin_of(plugin)->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
auto* runtime_side(void* plugin) {
  return static_cast<IPluginV3OneRuntime*>(plugin_of(plugin)->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}
const char* kind_of(void* plugin) {
  auto* core = plugin_of(plugin)->getCapabilityInterface(PluginCapabilityType::kCORE);
  return static_cast<IPluginV3OneCore*>(core)->getPluginName();
}
#else
const char* kind_of(void* plugin) { return plugin_of(plugin)->getPluginType(); }
#endif

}  // namespace

#ifdef FAKE_TENSORRT
extern "C" IPluginRegistry* getPluginRegistry() noexcept { return nullptr; }
extern "C" ILogger* getLogger() noexcept {
  static Logger logger;
  return &logger;
}
#endif

extern "C" {

QVDIT_API const char* plugin_message() { return message; }
QVDIT_API int32_t plugin_tensorrt() { return NV_TENSORRT_MAJOR; }
QVDIT_API int32_t plugin_has_creator(const char* kind) { return creator(kind) != nullptr; }

QVDIT_API void* plugin_create(const char* kind, const char* layer, const char* const* names, const int32_t* values,
                              int32_t count) {
  std::vector<PluginField> fields;
  for (int i = 0; i < count; ++i) fields.emplace_back(names[i], &values[i], PluginFieldType::kINT32, 1);
  const PluginFieldCollection collection{count, fields.data()};
#if QVDIT_PLUGIN_V3
  return creator(kind)->createPlugin(layer, &collection, TensorRTPhase::kBUILD);
#else
  return creator(kind)->createPlugin(layer, &collection);
#endif
}

// What an engine keeps of a plugin, with one bit changed unless bit is -1 → the plugin that the engine makes of it.
QVDIT_API void* plugin_restore(void* plugin, const char* layer, int32_t bit) {
#if QVDIT_PLUGIN_V3
  const PluginField& field = runtime_side(plugin)->getFieldsToSerialize()->fields[0];
  std::vector<unsigned char> state(field.length * sizeof(int32_t));
  std::memcpy(state.data(), field.data, state.size());
  if (bit >= 0) state[bit / 8] ^= 1 << bit % 8;
  const PluginField changed(field.name, state.data(), field.type, field.length);
  const PluginFieldCollection collection{1, &changed};
  return creator(kind_of(plugin))->createPlugin(layer, &collection, TensorRTPhase::kRUNTIME);
#else
  std::vector<unsigned char> state(plugin_of(plugin)->getSerializationSize());
  plugin_of(plugin)->serialize(state.data());
  if (bit >= 0) state[bit / 8] ^= 1 << bit % 8;
  return creator(kind_of(plugin))->deserializePlugin(layer, state.data(), state.size());
#endif
}

QVDIT_API void* plugin_clone(void* plugin) { return plugin_of(plugin)->clone(); }

QVDIT_API void plugin_destroy(void* plugin) {
#if QVDIT_PLUGIN_V3
  delete plugin_of(plugin);
#else
  plugin_of(plugin)->destroy();
#endif
}

QVDIT_API int32_t plugin_outputs(void* plugin) {
#if QVDIT_PLUGIN_V3
  return build_side(plugin)->getNbOutputs();
#else
  return plugin_of(plugin)->getNbOutputs();
#endif
}

// Types of the outputs, as nvinfer1::DataType; returns 0 if they are refused.
QVDIT_API int32_t plugin_types(void* plugin, const trt::Tensor* inputs, int32_t count, int32_t* types) {
  std::vector<DataType> given, found(plugin_outputs(plugin));
  for (int i = 0; i < count; ++i) given.push_back(data_type(inputs[i].type));
  const int32_t outputs = static_cast<int32_t>(found.size());
#if QVDIT_PLUGIN_V3
  if (build_side(plugin)->getOutputDataTypes(found.data(), outputs, given.data(), count)) return 0;
#else
  for (int i = 0; i < outputs; ++i) found[i] = plugin_of(plugin)->getOutputDataType(i, given.data(), count);
#endif
  for (int i = 0; i < outputs; ++i) types[i] = static_cast<int32_t>(found[i]);
  return 1;
}

// Shapes of the outputs, -1 for what is not known; returns 0 if they are refused.
QVDIT_API int32_t plugin_shapes(void* plugin, const trt::Tensor* inputs, int32_t count, trt::Tensor* shapes) {
  Builder builder;
  std::vector<DimsExprs> given, found(plugin_outputs(plugin));
  for (int i = 0; i < count; ++i) given.push_back(builder.shape(inputs[i]));
  const int32_t outputs = static_cast<int32_t>(found.size());
#if QVDIT_PLUGIN_V3
  if (build_side(plugin)->getOutputShapes(given.data(), count, nullptr, 0, found.data(), outputs, builder)) return 0;
#else
  for (int i = 0; i < outputs; ++i) {
    found[i] = plugin_of(plugin)->getOutputDimensions(i, given.data(), count, builder);
  }
#endif
  for (int i = 0; i < outputs; ++i) {
    shapes[i].rank = found[i].nbDims;
    for (int d = 0; d < found[i].nbDims; ++d) {
      shapes[i].dims[d] = found[i].d[d]->isConstant() ? found[i].d[d]->getConstantValue() : -1;
    }
  }
  return 1;
}

// Whether input or output ``position`` may be what tensors[position] is, in that TensorFormat.
QVDIT_API int32_t plugin_takes(void* plugin, int32_t position, const trt::Tensor* tensors, int32_t inputs,
                               int32_t outputs, int32_t format) {
  auto all = dynamic(tensors, inputs + outputs, 1);
  all[position].desc.format = static_cast<TensorFormat>(format);
#if QVDIT_PLUGIN_V3
  return build_side(plugin)->supportsFormatCombination(position, all.data(), inputs, outputs);
#else
  std::vector<PluginTensorDesc> plain;
  for (const auto& one : all) plain.push_back(one.desc);
  return plugin_of(plugin)->supportsFormatCombination(position, plain.data(), inputs, outputs);
#endif
}

// Prepares the plugin as a build does, or, with extents that are all known, as a context does. Returns 0 if it refuses.
QVDIT_API int32_t plugin_configure(void* plugin, const trt::Tensor* inputs, int32_t count) {
  const auto all = dynamic(inputs, count, 64);
#if QVDIT_PLUGIN_V3
  if (build_side(plugin)->configurePlugin(all.data(), count, nullptr, 0)) return 0;
  for (int i = 0; i < count; ++i) {
    for (int d = 0; d < inputs[i].rank; ++d) {
      if (inputs[i].dims[d] < 0) return 1;
    }
  }
  const auto plain = descriptions(inputs, count);
  return runtime_side(plugin)->onShapeChange(plain.data(), count, nullptr, 0) == 0;
#else
  plugin_of(plugin)->configurePlugin(all.data(), count, nullptr, 0);
  return plugin_of(plugin)->initialize() == 0;
#endif
}

// Bytes for extents of which the unknown ones are at most ``most``.
QVDIT_API int64_t plugin_workspace(void* plugin, const trt::Tensor* inputs, int32_t count, int64_t most) {
  const auto all = dynamic(inputs, count, most);
#if QVDIT_PLUGIN_V3
  return static_cast<int64_t>(build_side(plugin)->getWorkspaceSize(all.data(), count, nullptr, 0));
#else
  auto plain = descriptions(inputs, count);
  for (int i = 0; i < count; ++i) plain[i].dims = all[i].max;
  return static_cast<int64_t>(plugin_of(plugin)->getWorkspaceSize(plain.data(), count, nullptr, 0));
#endif
}

// Returns 0 if it refuses.
QVDIT_API int32_t plugin_enqueue(void* plugin, const trt::Tensor* descriptions_, int32_t count,
                                 const void* const* inputs, void* const* outputs, void* workspace, void* stream) {
  const auto plain = descriptions(descriptions_, count);
#if QVDIT_PLUGIN_V3
  IPluginV3* attached = runtime_side(plugin)->attachToContext(nullptr);
  const int32_t status = runtime_side(attached)->enqueue(plain.data(), nullptr, inputs, outputs, workspace,
                                                         static_cast<cudaStream_t>(stream));
  delete attached;
#else
  const int32_t status =
      plugin_of(plugin)->enqueue(plain.data(), nullptr, inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
#endif
  return status == 0;
}

}  // extern "C"
