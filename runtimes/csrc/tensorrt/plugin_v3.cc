// The plugins as IPluginV3, for TensorRT 10 and later.
#include "shell.h"

#if QVDIT_PLUGIN_V3

#include <cstdio>
#include <new>

namespace qvdit::trt {
namespace {

using nvinfer1::AsciiChar;
using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginCapability;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr char kStateField[] = "qvdit_state";  // a Blob, as int32

int32_t status(bool succeeded) { return succeeded ? 0 : 1; }

template <typename Attributes>
class Plugin final : public IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Plugin(const Layer<Attributes>& layer) noexcept : layer_(layer), blob_(serialize(layer.attributes())) {
    int used = 0;
    for (const auto& field : Description<Attributes>::kFields) {
      const size_t room = sizeof(summary_) - used;
      used += std::snprintf(summary_ + used, room, "%s=%d;", field.name, layer.attributes().*field.value);
    }
  }

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
      default:
        return nullptr;
    }
  }
  IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(layer_); }

  const AsciiChar* getPluginName() const noexcept override { return Description<Attributes>::kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kPluginVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return ""; }

  int32_t getNbOutputs() const noexcept override { return output_count(layer_.attributes()); }

  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                             int32_t count) const noexcept override {
    if (!layer_.accepts_types(inputs, count)) return status(false);
    for (int i = 0; i < output_count; ++i) outputs[i] = layer_.output_type(i, inputs[0]);
    return status(true);
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t count, const DimsExprs*, int32_t, DimsExprs* outputs,
                          int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept override {
    if (!layer_.accepts(inputs, count)) return status(false);
    for (int i = 0; i < output_count; ++i) outputs[i] = output_shape(layer_.attributes(), i, inputs, builder);
    return status(true);
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t,
                                 int32_t) noexcept override {
    return layer_.takes(position, tensors[position].desc, tensors[0].desc);
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t count, const DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    const Tensors tensors(inputs, count);
    return status(layer_.accepts(tensors.tensor, count));
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    const Tensors largest(inputs, 1, true);
    return layer_.workspace_size(largest.tensor);
  }

  // Equal attributes take equal time: blocks of a model repeat, and each kind is timed once.
  const char* getTimingCacheID() noexcept override { return summary_; }
  const char* getMetadataString() noexcept override { return summary_; }

  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t count, const PluginTensorDesc*,
                        int32_t) noexcept override {
    const Tensors tensors(inputs, count);
    return status(layer_.accepts_shapes(tensors.tensor, count));
  }

  int32_t enqueue(const PluginTensorDesc* descriptions, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return status(layer_.run(descriptions, inputs, outputs, workspace, stream));
  }

  IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    state_ = PluginField(kStateField, blob_.word, PluginFieldType::kINT32, sizeof(blob_) / sizeof(int32_t));
    states_.nbFields = 1;
    states_.fields = &state_;
    return &states_;
  }

 private:
  Layer<Attributes> layer_;
  Blob<Attributes> blob_;
  PluginField state_;
  PluginFieldCollection states_ = {0, nullptr};
  char summary_[320];
};

template <typename Attributes>
class PluginCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  const AsciiChar* getPluginName() const noexcept override { return Description<Attributes>::kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kPluginVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return ""; }
  const PluginFieldCollection* getFieldNames() noexcept override { return field_names<Attributes>(); }

  // At run time the fields are those of getFieldsToSerialize.
  IPluginV3* createPlugin(const AsciiChar* name, const PluginFieldCollection* fields,
                          nvinfer1::TensorRTPhase phase) noexcept override {
    Attributes attributes;
    const bool known = phase == nvinfer1::TensorRTPhase::kRUNTIME ? restored(fields, name, attributes)
                                                                  : attributes_of(fields, name, attributes);
    return known ? new (std::nothrow) Plugin<Attributes>(Layer<Attributes>(attributes, name)) : nullptr;
  }

 private:
  static bool restored(const PluginFieldCollection* fields, const AsciiChar* name, Attributes& attributes) noexcept {
    const PluginField* state = find_field(fields, kStateField);
    const size_t words = state && state->length > 0 ? static_cast<size_t>(state->length) : 0;
    return restored_attributes(words ? state->data : nullptr, words * sizeof(int32_t), name, attributes);
  }
};

}  // namespace

const Creators& creators() noexcept {
  static PluginCreator<LowBitAttributes> low_bit_linear;
  static PluginCreator<AttentionAttributes> headwise_attention;
  static PluginCreator<ResidualAttributes> gated_residual;
  static const Creators made{&low_bit_linear, &headwise_attention, &gated_residual};
  return made;
}

}  // namespace qvdit::trt

#endif
