// A built engine in memory, with its context, buffers and stream: what runs.
#pragma once

#include <NvInferRuntime.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "facts.h"
#include "log.h"
#include "model.h"

namespace qvdit::runner {

class Engine final : public Model {
 public:
  // plan: a serialized engine, which its caller has compared with its facts; profile: of these. Throws Error where
  // TensorRT refuses it.
  Engine(const std::string& plan, std::map<std::string, Profile> profile, Log& log);
  ~Engine() override;

  const std::map<std::string, Port>& inputs() const override { return inputs_; }
  const std::map<std::string, Port>& outputs() const override { return outputs_; }
  Tensors infer(const Tensors& inputs) override;

  // Capture one run of each set of shapes as a CUDA graph and replay it.
  void use_graph(bool use) { graph_wanted_ = use; }

  // Milliseconds of each of ``runs`` runs between CUDA events, after ``warmup`` others; copies of inputs and outputs
  // are not in it.
  std::vector<float> time(const Tensors& inputs, int64_t runs, int64_t warmup);

  int64_t scratch_bytes() const;

 private:
  struct Graph;

  void describe();
  void prepare(const Tensors& inputs);
  void set_shape(const std::string& name, const Shape& shape);
  void place_outputs();
  void launch();
  void capture();
  Shape output_shape(const std::string& name) const;

  std::map<std::string, Profile> profile_;  // by input
  Log& log_;
  // Destroyed from the last to the first: the context before its engine, all before the runtime.
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  Stream stream_;
  std::map<std::string, Port> inputs_, outputs_;
  std::map<std::string, Buffer> buffers_;
  std::map<std::string, Shape> shapes_;  // of the inputs, as they were set last
  std::unique_ptr<Graph> graph_;         // of these shapes
  bool graph_wanted_ = false;
};

}  // namespace qvdit::runner
