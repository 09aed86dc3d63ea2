#include "session.h"

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "error.h"
#include "files.h"
#include "folder.h"
#include "parity.h"
#include "plugin.h"
#include "safetensors.h"
#include "sha256.h"

namespace qvdit::runner {
namespace {

constexpr int64_t kLargestEngine = int64_t{1} << 36;
constexpr int64_t kLargestFacts = 1 << 20;
constexpr int64_t kLayersLevel = 0;  // their engine runs once: quick to build; its kernels are the plugin's anyway

// An engine until it has been proven. Not hidden: a build that was killed may be looked at.
std::string pending(const std::string& path) { return path + ".new"; }

std::string sha256_text(const std::string& text) {
  Sha256 digest;
  digest.update(text.data(), text.size());
  return digest.hex();
}

}  // namespace

Session::Session(const Arguments& arguments)
    : arguments_(arguments),
      log_(arguments.verbose),
      gpu_(find_gpu()),
      tensorrt_(tensorrt_version()),
      model_{path(kModelOnnx), path(kModelEngine), path(kModelFacts), {}},
      layers_{path(kLayersOnnx), path(kLayersEngine), path(kLayersFacts), {}} {
  if (!is_file(model_.onnx)) {
    throw Error("no file " + model_.onnx, "a folder that qvdit-export --device wrote", "check the path");
  }
  if (needs_plugin(model_.onnx)) find_plugin();
}

void Session::find_plugin() {
  if (!arguments_.plugin.empty()) {
    plugin_ = inspect_plugin(arguments_.plugin);
  } else {
    for (const char* place : kPlugins) {
      if (plugin_.path.empty() && is_file(path(place))) plugin_ = inspect_plugin(path(place));
    }
  }
  if (plugin_.path.empty()) {
    throw Error("no plugin in " + arguments_.folder, std::string(kPlugins[0]) + " or " + kPlugins[1],
                "build it on this machine: build.sh; or name it with --plugin");
  }
  load_plugin(plugin_, log_);
}

bool Session::has_layers() const { return is_file(layers_.onnx); }

void Session::build() {
  // What can be refused at once is, before minutes are spent.
  const SafeTensors inputs(path(kParityInputs)), reference(path(kParityReference));
  widened(model_shapes(inputs), arguments_.least, arguments_.most);
  std::unique_ptr<Engine> layers;
  std::string layers_plan;
  if (has_layers()) {
    layers_plan = build_one(layers_, kLayersLevel);
    layers = std::make_unique<Engine>(layers_plan, layers_.facts.profile, log_);
  }
  const std::string model_plan = build_one(model_, arguments_.optimization_level);
  Engine model(model_plan, model_.facts.profile, log_);
  model_.facts.device_bytes = model.scratch_bytes();
  const Proof proof = prove(layers.get(), model);
  std::fputs(proof.text().c_str(), stdout);
  const std::string report = proof.json();
  if (!proof.passed()) {
    const std::string where = pending(path(kParity));
    write_file(where, report.data(), report.size());
    throw Error("engines that fail parity", "equal integers, and an error of at most 1.1 of that and at least 0.9 of the float32 run's",
                "look at " + where + "; the engines that were there before are untouched");
  }
  if (layers) {
    layers_.facts.device_bytes = layers->scratch_bytes();
    keep(layers_, layers_plan);
  }
  keep(model_, model_plan);
  write_file(path(kParity), report.data(), report.size());
}

std::string Session::build_one(Place& place, int64_t optimization_level) {
  std::printf("building %s with TensorRT %s on %s\n", place.engine.c_str(), tensorrt_.c_str(), gpu_.name.c_str());
  std::fflush(stdout);
  const auto start = std::chrono::steady_clock::now();
  BuildOptions options;
  options.workspace = arguments_.workspace_mib << 20;
  options.optimization_level = optimization_level;
  options.timing_cache = path(kTimingCache);
  std::map<std::string, Profile> profile;
  const auto profiled = [&](const std::string& input) { return profile[input] = profile_of(place, input); };
  std::string plan = build_engine(place.onnx, profiled, options, log_);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("built in %.1f s, %zu bytes\n", seconds.count(), plan.size());
  Facts& facts = place.facts;
  facts = facts_here(place);
  facts.profile = profile;
  if (!plugin_.path.empty()) {
    facts.plugin_sha256 = sha256_file(plugin_.path);
    facts.plugin_version = plugin_.version;
    facts.plugin_tensorrt = plugin_.tensorrt;
  }
  facts.optimization_level = optimization_level;
  facts.workspace = options.workspace;
  facts.build_seconds = seconds.count();
  facts.engine_sha256 = sha256_text(plan);
  facts.engine_bytes = static_cast<int64_t>(plan.size());
  return plan;
}

void Session::keep(const Place& place, const std::string& plan) const {
  const std::string facts = place.facts.json();
  write_file(pending(place.engine), plan.data(), plan.size());
  write_file(pending(place.facts_file), facts.data(), facts.size());
  rename_file(pending(place.engine), place.engine);
  rename_file(pending(place.facts_file), place.facts_file);
}

std::unique_ptr<Engine> Session::load(Place& place) {
  if (!is_file(place.engine)) throw Error("no file " + place.engine, "an engine", "build it: qvdit-run build");
  place.facts =
      Facts::parse(read_file(place.facts_file, "what the engine was built from", kLargestFacts), place.facts_file);
  const std::string plan = read_file(place.engine, "an engine", kLargestEngine);
  Facts here = facts_here(place);
  here.engine_bytes = static_cast<int64_t>(plan.size());
  here.engine_sha256 = sha256_text(plan);
  check_facts(place.facts, here, place.engine);
  return std::make_unique<Engine>(plan, place.facts.profile, log_);
}

Profile Session::profile_of(const Place& place, const std::string& input) const {
  const SafeTensors saved(path(kParityInputs));
  if (&place == &layers_) return layer_profile(input, saved);
  const std::map<std::string, Profile> profiles = widened(model_shapes(saved), arguments_.least, arguments_.most);
  const auto found = profiles.find(input);
  if (found == profiles.end()) {
    throw Error("no saved input " + input, "one for each of the model's", "copy the whole folder again");
  }
  return found->second;
}

Facts Session::facts_here(const Place& place) const {
  Facts here;
  here.tensorrt = tensorrt_;
  here.gpu = gpu_.name;
  here.compute = gpu_.compute;
  here.driver = gpu_.driver;
  // The layers' constants may lie in the model's external data.
  for (const std::string& file : {place.onnx, place.onnx + ".data", model_.onnx + ".data"}) {
    if (is_file(file)) here.onnx[file.substr(arguments_.folder.size() + 1)] = sha256_file(file);
  }
  return here;
}

Proof Session::prove(Engine* layers, Engine& model) const {
  const SafeTensors inputs(path(kParityInputs)), reference(path(kParityReference));
  Proof proof;
  proof.layers_saved = count_layers(inputs);
  if (layers) proof.layers = check_layers(*layers, inputs, reference);
  std::unique_ptr<SafeTensors> half;
  if (is_file(path(kParityHalf))) half = std::make_unique<SafeTensors>(path(kParityHalf));
  proof.model = check_model(model, inputs, reference, half.get());
  return proof;
}

}  // namespace qvdit::runner
