// The plugins as IPluginV2DynamicExt, for TensorRT 8.6.
#include "shell.h"

#if !QVDIT_PLUGIN_V3

#include <cstdio>
#include <cstring>
#include <new>

// 8.6 deprecates IPluginV2, which its own creator returns.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace qvdit::trt {
namespace {

using nvinfer1::AsciiChar;
using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV2;
using nvinfer1::IPluginV2DynamicExt;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;

// This interface reports shapes and configures without a way to fail. What is wrong then is logged and kept: the plugin
// supports no format any more and does not initialize, and TensorRT gives the build up.
template <typename Attributes>
class Plugin final : public IPluginV2DynamicExt {
 public:
  explicit Plugin(const Layer<Attributes>& layer) noexcept : layer_(layer) {}

  const AsciiChar* getPluginType() const noexcept override { return Description<Attributes>::kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kPluginVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return namespace_; }
  void setPluginNamespace(const AsciiChar* name) noexcept override {
    std::snprintf(namespace_, sizeof(namespace_), "%s", name ? name : "");
  }

  int32_t getNbOutputs() const noexcept override { return output_count(layer_.attributes()); }

  DataType getOutputDataType(int32_t index, const DataType* types, int32_t) const noexcept override {
    layer_.accepts_early_type(types[0]);  // what is wrong is logged; no format will be found for it
    return layer_.output_type(index, types[0]);
  }

  DimsExprs getOutputDimensions(int32_t index, const DimsExprs* inputs, int32_t count,
                                nvinfer1::IExprBuilder& builder) noexcept override {
    if (index == 0) refused_ = !layer_.accepts(inputs, count);
    return output_shape(layer_.attributes(), index, inputs, builder);
  }

  bool supportsFormatCombination(int32_t position, const PluginTensorDesc* tensors, int32_t,
                                 int32_t) noexcept override {
    return !refused_ && layer_.takes(position, tensors[position], tensors[0]);
  }

  void configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t count, const DynamicPluginTensorDesc*,
                       int32_t) noexcept override {
    const Tensors tensors(inputs, count);
    refused_ = !(has_wildcard(inputs, count) ? layer_.accepts(tensors.tensor, count)
                                             : layer_.accepts_shapes(tensors.tensor, count));
  }

  size_t getWorkspaceSize(const PluginTensorDesc* inputs, int32_t, const PluginTensorDesc*,
                          int32_t) const noexcept override {
    const Tensors tensors(inputs, 1);
    return layer_.workspace_size(tensors.tensor);
  }

  int32_t initialize() noexcept override { return !refused_ && layer_.accepts_device() ? 0 : 1; }

  int32_t enqueue(const PluginTensorDesc* descriptions, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return layer_.run(descriptions, inputs, outputs, workspace, stream) ? 0 : 1;
  }

  size_t getSerializationSize() const noexcept override { return sizeof(Blob<Attributes>); }
  void serialize(void* buffer) const noexcept override {
    const auto blob = trt::serialize(layer_.attributes());
    std::memcpy(buffer, &blob, sizeof(blob));
  }

  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  IPluginV2DynamicExt* clone() const noexcept override { return new (std::nothrow) Plugin(*this); }

 private:
  static bool has_wildcard(const DynamicPluginTensorDesc* inputs, int32_t count) noexcept {
    for (int i = 0; i < count; ++i) {
      const nvinfer1::Dims& dims = inputs[i].desc.dims;
      for (int d = 0; d < dims.nbDims; ++d) {
        if (dims.d[d] < 0) return true;
      }
    }
    return false;
  }

  Layer<Attributes> layer_;
  bool refused_ = false;
  char namespace_[64] = "";
};

template <typename Attributes>
class PluginCreator final : public nvinfer1::IPluginCreator {
 public:
  const AsciiChar* getPluginName() const noexcept override { return Description<Attributes>::kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kPluginVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return namespace_; }
  void setPluginNamespace(const AsciiChar* name) noexcept override {
    std::snprintf(namespace_, sizeof(namespace_), "%s", name ? name : "");
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return field_names<Attributes>(); }

  IPluginV2* createPlugin(const AsciiChar* name, const PluginFieldCollection* fields) noexcept override {
    Attributes attributes;
    return attributes_of(fields, name, attributes) ? made(attributes, name) : nullptr;
  }

  IPluginV2* deserializePlugin(const AsciiChar* name, const void* data, size_t bytes) noexcept override {
    Attributes attributes;
    return restored_attributes(data, bytes, name, attributes) ? made(attributes, name) : nullptr;
  }

 private:
  IPluginV2DynamicExt* made(const Attributes& attributes, const AsciiChar* name) const noexcept {
    auto* plugin = new (std::nothrow) Plugin<Attributes>(Layer<Attributes>(attributes, name));
    if (plugin) plugin->setPluginNamespace(namespace_);
    return plugin;
  }

  char namespace_[64] = "";
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
