// Where things lie in a folder that qvdit-export --device wrote: paths of qvdit/contract/bundle.py.
#pragma once

namespace qvdit::runner {

constexpr char kModelOnnx[] = "tensorrt/model.onnx", kLayersOnnx[] = "tensorrt/layers.onnx";
constexpr char kModelEngine[] = "tensorrt/model.plan", kModelFacts[] = "tensorrt/engine.json";
constexpr char kLayersEngine[] = "tensorrt/layers.plan", kLayersFacts[] = "tensorrt/layers.json";
constexpr char kTimingCache[] = "tensorrt/timing.cache";
constexpr char kParity[] = "tensorrt/parity.json";
constexpr char kParityInputs[] = "parity/inputs.safetensors", kParityReference[] = "parity/reference.safetensors";
constexpr char kParityHalf[] = "parity/half.safetensors";  // where a GPU made one
constexpr char kPlan[] = "sample/plan.safetensors";
// A plugin that was built here comes before the one that came along.
constexpr const char* kPlugins[] = {"build/libqvdit_tensorrt.so", "tensorrt/libqvdit_tensorrt.so"};

}  // namespace qvdit::runner
