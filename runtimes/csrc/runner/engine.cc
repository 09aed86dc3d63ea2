#include "engine.h"

#include "error.h"
#include "versions.h"

namespace qvdit::runner {

struct Engine::Graph {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;

  ~Graph() {
    if (exec) cudaGraphExecDestroy(exec);
    if (graph) cudaGraphDestroy(graph);
  }
};

Engine::Engine(const std::string& plan, std::map<std::string, Profile> profile, Log& log)
    : profile_(std::move(profile)), log_(log), runtime_(nvinfer1::createInferRuntime(log)) {
  const std::string fix = "build it again: qvdit-run build";
  if (!runtime_)
    throw Error("no TensorRT runtime (" + log.why() + ")", "one that starts", "see that TensorRT is whole");
  engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine_) {
    const std::string why = log.why();
    if (why.find("out of memory") != std::string::npos) {
      throw Error("no room for the engine (" + why + ")",
                  std::to_string(plan.size()) + " bytes of free GPU memory and more", "end other programs on this GPU");
    }
    throw Error("an engine that TensorRT refuses (" + why + ")", "one built here", fix);
  }
  context_.reset(engine_->createExecutionContext());
  if (!context_) {
    throw Error("no context for the engine (" + log.why() + ")", "memory for its scratch", "free memory on the GPU");
  }
  describe();
}

Engine::~Engine() = default;

void Engine::describe() {
  for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
    const char* name = engine_->getIOTensorName(i);
    Port port;
    if (!host_type(engine_->getTensorDataType(name), port.type)) {
      throw Error(std::string("a tensor ") + name + " of a type that the runner does not know", "floats or integers",
                  "export the model again");
    }
    port.shape = shape_of(engine_->getTensorShape(name));
    (engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT ? inputs_ : outputs_)[name] = port;
  }
}

int64_t Engine::scratch_bytes() const { return runner::scratch_bytes(*engine_); }

Tensors Engine::infer(const Tensors& inputs) {
  prepare(inputs);
  launch();
  Tensors found;
  for (const auto& [name, port] : outputs_) {
    Tensor tensor(port.type, output_shape(name));
    check_cuda(cudaMemcpyAsync(tensor.data.data(), buffers_[name].data(), tensor.data.size(), cudaMemcpyDeviceToHost,
                               stream_.get()),
               "copying " + name);
    found[name] = std::move(tensor);
  }
  stream_.wait();
  return found;
}

std::vector<float> Engine::time(const Tensors& inputs, int64_t runs, int64_t warmup) {
  prepare(inputs);
  for (int64_t i = 0; i < warmup; ++i) launch();
  stream_.wait();
  const Event start, stop;
  std::vector<float> milliseconds;
  for (int64_t i = 0; i < runs; ++i) {
    start.record(stream_);
    launch();
    stop.record(stream_);
    stop.wait();
    milliseconds.push_back(stop.milliseconds_since(start));
  }
  return milliseconds;
}

void Engine::prepare(const Tensors& inputs) {
  std::map<std::string, Shape> shapes;
  for (const auto& [name, tensor] : inputs) shapes[name] = tensor.shape;
  if (shapes != shapes_) {
    graph_.reset();
    shapes_.clear();
    for (const auto& [name, shape] : shapes) set_shape(name, shape);
    place_outputs();
    shapes_ = shapes;
  }
  for (const auto& [name, tensor] : inputs) {
    check_cuda(cudaMemcpyAsync(buffers_[name].data(), tensor.data.data(), tensor.data.size(), cudaMemcpyHostToDevice,
                               stream_.get()),
               "copying " + name);
  }
}

void Engine::set_shape(const std::string& name, const Shape& shape) {
  const auto port = inputs_.find(name);
  if (port == inputs_.end()) throw Error("an input " + name, "one that the engine has", "build the engine again");
  if (const auto served = profile_.find(name); served != profile_.end()) check_profile(name, served->second, shape);
  if (!context_->setInputShape(name.c_str(), dims_of(shape))) {
    throw Error(name + " of " + shape_text(shape) + " (" + log_.why() + ")", "a shape in the engine's profile",
                "build it again with --min and --max");
  }
  buffers_[name].reserve(element_count(shape) * type_bytes(port->second.type));
  context_->setTensorAddress(name.c_str(), buffers_[name].data());
}

void Engine::place_outputs() {
  for (const auto& [name, port] : outputs_) {
    buffers_[name].reserve(element_count(output_shape(name)) * type_bytes(port.type));
    context_->setTensorAddress(name.c_str(), buffers_[name].data());
  }
}

Shape Engine::output_shape(const std::string& name) const {
  const Shape shape = shape_of(context_->getTensorShape(name.c_str()));
  for (const int64_t extent : shape) {
    if (extent < 0) throw Error(name + " of a size that its inputs do not tell", "one that they do", "export it again");
  }
  return shape;
}

void Engine::launch() {
  if (graph_wanted_ && !graph_) capture();
  if (graph_) {
    check_cuda(cudaGraphLaunch(graph_->exec, stream_.get()), "the CUDA graph");
  } else if (!context_->enqueueV3(stream_.get())) {
    throw Error("a run that TensorRT refuses (" + log_.why() + ")", "one that it starts",
                "run parity; or build it again");
  }
}

void Engine::capture() {
  // A first run of new shapes may set things up, which a capture does not allow.
  if (!context_->enqueueV3(stream_.get())) {
    throw Error("a run that TensorRT refuses (" + log_.why() + ")", "one that it starts",
                "run parity; or build it again");
  }
  stream_.wait();
  auto made = std::make_unique<Graph>();
  check_cuda(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "a CUDA graph");
  const bool started = context_->enqueueV3(stream_.get());
  const cudaError_t ended = cudaStreamEndCapture(stream_.get(), &made->graph);
  if (!started || ended != cudaSuccess) {
    throw Error("an engine that cannot be captured (" + log_.why() + ")", "one that can", "leave out --graph");
  }
  check_cuda(cudaGraphInstantiate(&made->exec, made->graph, 0), "the CUDA graph");
  graph_ = std::move(made);
}

}  // namespace qvdit::runner
