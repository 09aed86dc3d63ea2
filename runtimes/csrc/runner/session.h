// The engines of a folder: built and proven before they take the last ones' place, loaded after a check of their facts.
#pragma once

#include <memory>
#include <string>

#include "arguments.h"
#include "builder.h"
#include "engine.h"
#include "facts.h"
#include "log.h"
#include "plugin_file.h"
#include "proof.h"

namespace qvdit::runner {

class Session {
 public:
  // Finds the GPU, and the plugin where the model has nodes of it. Throws Error.
  explicit Session(const Arguments& arguments);

  // Builds and proves the engines; they are kept only if they pass.
  void build();

  // Loads the model's engine, or that of its layers. Throws Error where it is not what its facts say, or of elsewhere.
  std::unique_ptr<Engine> load_model() { return load(model_); }
  std::unique_ptr<Engine> load_layers() { return load(layers_); }
  bool has_layers() const;

  const Facts& model_facts() const { return model_.facts; }
  Proof prove(Engine* layers, Engine& model) const;
  std::string path(const std::string& name) const { return arguments_.folder + "/" + name; }
  const Gpu& gpu() const { return gpu_; }
  const std::string& tensorrt() const { return tensorrt_; }

 private:
  struct Place {
    std::string onnx, engine, facts_file;
    Facts facts;  // of what was built or loaded last
  };

  std::string build_one(Place& place, int64_t optimization_level);
  std::unique_ptr<Engine> load(Place& place);
  Profile profile_of(const Place& place, const std::string& input) const;
  // What an engine of the place would have to be built with and from.
  Facts facts_here(const Place& place) const;
  void keep(const Place& place, const std::string& plan) const;
  void find_plugin();

  Arguments arguments_;
  Log log_;
  Gpu gpu_;
  std::string tensorrt_;
  PluginFacts plugin_;
  Place model_, layers_;
};

}  // namespace qvdit::runner
