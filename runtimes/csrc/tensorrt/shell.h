// What both plugin interfaces share: the cores' structs from TensorRT's, and messages through its logger.
#pragma once

#include <cstdio>

#include "attention_core.h"
#include "low_bit_core.h"
#include "residual_core.h"
#include "versions.h"

namespace qvdit::trt {

constexpr int kMostInputs = kInputs;  // LowBitLinear's; the others have less

// Writes a refusal, with the kind of node and the layer's name (null: it has none), to TensorRT's logger; returns
// false.
bool report(const char* kind, const char* layer, const Refusal& refusal) noexcept;

// A tensor of a type as TensorRT describes it.
Tensor tensor_of(nvinfer1::DataType type, const nvinfer1::Dims& dims) noexcept;

// Up to kMostInputs tensors; more are counted only.
struct Tensors {
  Tensor tensor[kMostInputs];

  Tensors(const nvinfer1::PluginTensorDesc* descriptions, int count) noexcept;
  // As known so far, or at a profile's largest.
  Tensors(const nvinfer1::DynamicPluginTensorDesc* descriptions, int count, bool largest = false) noexcept;
  // Shapes alone, of the type kOtherType.
  Tensors(const nvinfer1::DimsExprs* shapes, int count) noexcept;

  static int limited(int count) noexcept { return count < kMostInputs ? count : kMostInputs; }
};

nvinfer1::DimsExprs output_shape(const LowBitAttributes& attributes, int output, const nvinfer1::DimsExprs* inputs,
                                 nvinfer1::IExprBuilder& builder) noexcept;
nvinfer1::DimsExprs output_shape(const AttentionAttributes& attributes, int output, const nvinfer1::DimsExprs* inputs,
                                 nvinfer1::IExprBuilder& builder) noexcept;
nvinfer1::DimsExprs output_shape(const ResidualAttributes& attributes, int output, const nvinfer1::DimsExprs* inputs,
                                 nvinfer1::IExprBuilder& builder) noexcept;

// A node of a network, as both interfaces keep it: of any kind that attributes.h describes.
template <typename Attributes>
class Layer {
 public:
  // name: TensorRT's for the node; null: none. Longer ones are cut.
  Layer(const Attributes& attributes, const char* name) noexcept : attributes_(attributes) {
    std::snprintf(name_, sizeof(name_), "%s", name ? name : "");
  }

  const Attributes& attributes() const noexcept { return attributes_; }

  // Whether the current device has kernels; reports what is wrong, as all of these do.
  bool accepts_device() const noexcept {
    Refusal refusal;
    return check_device(refusal) || reported(refusal);
  }
  // For the types of the first ``count`` inputs.
  bool accepts_types(const nvinfer1::DataType* types, int count) const noexcept {
    int32_t known[kMostInputs];
    for (int i = 0; i < Tensors::limited(count); ++i) known[i] = kernel_type(types[i]);
    Refusal refusal;
    return check_types(attributes_, known, Tensors::limited(count), refusal) || reported(refusal);
  }
  // For the type that the first input has before an engine is built, where types are not decided before.
  bool accepts_early_type(nvinfer1::DataType type) const noexcept {
    Refusal refusal;
    return check_early_type(attributes_, kernel_type(type), refusal) || reported(refusal);
  }
  // For inputs whose extents may be unknown yet, and the current device.
  bool accepts(const Tensor* inputs, int count) const noexcept {
    Refusal refusal;
    return (check_inputs(attributes_, inputs, count, refusal) || reported(refusal)) && accepts_device();
  }
  // The same for shapes alone.
  bool accepts(const nvinfer1::DimsExprs* shapes, int count) const noexcept {
    Tensors tensors(shapes, count);
    for (int i = 0; i < Tensors::limited(count); ++i) tensors.tensor[i].type = assumed_type(attributes_, i);
    return accepts(tensors.tensor, count);
  }
  // For inputs as they are at run time, and the current device.
  bool accepts_shapes(const Tensor* inputs, int count) const noexcept {
    Refusal refusal;
    return (check_shapes(attributes_, inputs, count, refusal) || reported(refusal)) && accepts_device();
  }

  // Whether input or output ``position``, counted through both, may be of a type and format beside a first input.
  bool takes(int position, const nvinfer1::PluginTensorDesc& tensor,
             const nvinfer1::PluginTensorDesc& first) const noexcept {
    return tensor.format == nvinfer1::TensorFormat::kLINEAR &&
           takes_type(attributes_, position, kernel_type(tensor.type), kernel_type(first.type));
  }

  // Of an output beside a first input of a type.
  nvinfer1::DataType output_type(int output, nvinfer1::DataType first) const noexcept {
    return tensorrt_type(trt::output_type(attributes_, output, kernel_type(first)));
  }

  size_t workspace_size(const Tensor* inputs) const noexcept {
    return static_cast<size_t>(workspace_bytes(attributes_, inputs));
  }

  // See run() in the cores.
  bool run(const nvinfer1::PluginTensorDesc* descriptions, const void* const* inputs, void* const* outputs,
           void* workspace, cudaStream_t stream) const noexcept {
    const Tensors tensors(descriptions, input_count(attributes_));
    Refusal refusal;
    return trt::run(attributes_, tensors.tensor, inputs, outputs, workspace, stream, refusal) || reported(refusal);
  }

 private:
  bool reported(const Refusal& refusal) const noexcept {
    return report(Description<Attributes>::kName, name_, refusal);
  }

  Attributes attributes_;
  char name_[256];
};

// The names and types of a kind's attributes.
template <typename Attributes>
const nvinfer1::PluginFieldCollection* field_names() noexcept {
  using nvinfer1::PluginField;
  constexpr int count = field_count<Attributes>();
  static PluginField fields[count];
  static const nvinfer1::PluginFieldCollection collection = [] {
    for (int i = 0; i < count; ++i) {
      const char* name = Description<Attributes>::kFields[i].name;
      fields[i] = PluginField(name, nullptr, nvinfer1::PluginFieldType::kINT32, 1);
    }
    return nvinfer1::PluginFieldCollection{count, fields};
  }();
  return &collection;
}

// A field of int32 by its name, or null.
const nvinfer1::PluginField* find_field(const nvinfer1::PluginFieldCollection* fields, const char* name) noexcept;

// The same as read_attributes asks for it: the one number of a field of a PluginFieldCollection.
const int32_t* find_attribute(const void* fields, const char* name) noexcept;

// A node's attributes, validated; reports what is wrong, with the layer's name, and returns false.
template <typename Attributes>
bool attributes_of(const nvinfer1::PluginFieldCollection* fields, const char* name, Attributes& attributes) noexcept {
  Refusal refusal;
  return read_attributes(find_attribute, fields, attributes, refusal) ||
         report(Description<Attributes>::kName, name, refusal);
}

// The same of what an engine keeps.
template <typename Attributes>
bool restored_attributes(const void* data, size_t bytes, const char* name, Attributes& attributes) noexcept {
  Refusal refusal;
  return deserialize(data, bytes, attributes, refusal) || report(Description<Attributes>::kName, name, refusal);
}

// This library's creators, one for each kind, which live as long as it does: plugin_v2.cc's or plugin_v3.cc's.
#if QVDIT_PLUGIN_V3
using Creator = nvinfer1::IPluginCreatorInterface;
#else
using Creator = nvinfer1::IPluginCreator;
#endif
struct Creators {
  Creator *low_bit_linear, *headwise_attention, *gated_residual;
};
const Creators& creators() noexcept;

}  // namespace qvdit::trt
