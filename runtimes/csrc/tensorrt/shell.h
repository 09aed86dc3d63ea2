// What both plugin interfaces share: the core's structs from TensorRT's, and messages through its logger.
#pragma once

#include "low_bit_core.h"
#include "versions.h"

namespace qvdit::trt {

// Writes a refusal, with the layer's name (null: it has none), to TensorRT's logger; returns false.
bool report(const char* layer, const Refusal& refusal) noexcept;

// A node of a network, as both interfaces keep it.
class Layer {
 public:
  // name: TensorRT's for the node; null: none. Longer ones are cut.
  Layer(const Attributes& attributes, const char* name) noexcept;

  const Attributes& attributes() const noexcept { return attributes_; }

  // Whether the current device has kernels; reports what is wrong, as all of these do.
  bool accepts_device() const noexcept;
  // For the types of the first ``count`` inputs.
  bool accepts_types(const nvinfer1::DataType* types, int count) const noexcept;
  // For inputs whose extents may be unknown yet, and the current device.
  bool accepts(const Tensor* inputs, int count) const noexcept;
  // For inputs as they are at run time, and the current device.
  bool accepts_shapes(const Tensor* inputs, int count) const noexcept;

  // Whether input or output ``position``, counted through both, may be of a type and format.
  bool takes(int position, const nvinfer1::PluginTensorDesc& tensor) const noexcept;

  nvinfer1::DataType output_type(int output) const noexcept;
  nvinfer1::DimsExprs output_shape(int output, const nvinfer1::DimsExprs& x,
                                   nvinfer1::IExprBuilder& builder) const noexcept;

  // See run() in low_bit_core.h.
  bool run(const nvinfer1::PluginTensorDesc* descriptions, const void* const* inputs, void* const* outputs,
           void* workspace, cudaStream_t stream) const noexcept;

 private:
  Attributes attributes_;
  char name_[256];
};

// Up to kInputs tensors; more are counted only.
struct Tensors {
  Tensor tensor[kInputs];

  Tensors(const nvinfer1::PluginTensorDesc* descriptions, int count) noexcept;
  // As known so far, or at a profile's largest.
  Tensors(const nvinfer1::DynamicPluginTensorDesc* descriptions, int count, bool largest = false) noexcept;
  // Shapes alone: types are those that a node wants, float32 where it takes several.
  Tensors(const nvinfer1::DimsExprs* shapes, int count, const Attributes& attributes) noexcept;
};

// The names and types of a node's attributes.
const nvinfer1::PluginFieldCollection* field_names() noexcept;

// A field of int32 by its name, or null.
const nvinfer1::PluginField* find_field(const nvinfer1::PluginFieldCollection* fields, const char* name) noexcept;

// A node's attributes, validated; reports what is wrong, with the layer's name, and returns false.
bool attributes_of(const nvinfer1::PluginFieldCollection* fields, const char* name, Attributes& attributes) noexcept;

// The one creator of this library, which lives as long as it does: plugin_v2.cc's or plugin_v3.cc's.
#if QVDIT_PLUGIN_V3
using Creator = nvinfer1::IPluginCreatorInterface;
#else
using Creator = nvinfer1::IPluginCreator;
#endif
Creator& creator() noexcept;

}  // namespace qvdit::trt
