// The runner's core for ctypes, without TensorRT: each function writes what it found, or the error's sentence, as a
// text.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "../../../runtimes/csrc/runner/arguments.h"
#include "../../../runtimes/csrc/runner/compare.h"
#include "../../../runtimes/csrc/runner/error.h"
#include "../../../runtimes/csrc/runner/facts.h"
#include "../../../runtimes/csrc/runner/files.h"
#include "../../../runtimes/csrc/runner/json.h"
#include "../../../runtimes/csrc/runner/parity.h"
#include "../../../runtimes/csrc/runner/plugin_file.h"
#include "../../../runtimes/csrc/runner/proof.h"
#include "../../../runtimes/csrc/runner/quantiles.h"
#include "../../../runtimes/csrc/runner/safetensors.h"
#include "../../../runtimes/csrc/runner/sampler.h"

using namespace qvdit::runner;

namespace {

constexpr size_t kRoom = 1 << 16;  // of every text

// 1 and what ``work`` returns, or 0 and why it could not.
template <typename Work>
int32_t told(char* text, Work work) {
  std::string found;
  int32_t status = 1;
  try {
    found = work();
  } catch (const std::exception& error) {
    found = error.what();
    status = 0;
  }
  std::snprintf(text, kRoom, "%s", found.c_str());
  return status;
}

std::map<std::string, Port> ports_of(const SafeTensors& file) {
  std::map<std::string, Port> ports;
  for (const std::string& name : file.names()) ports[name] = {file.read(name).type, file.shape(name)};
  return ports;
}

// A model that Python computes: inputs and outputs go through safetensors files. Its ports are those of two files.
class Exchange final : public Model {
 public:
  Exchange(const std::string& folder, int32_t (*compute)())
      : folder_(folder),
        compute_(compute),
        inputs_(ports_of(SafeTensors(folder + "/inputs.safetensors"))),
        outputs_(ports_of(SafeTensors(folder + "/outputs.safetensors"))) {}

  const std::map<std::string, Port>& inputs() const override { return inputs_; }
  const std::map<std::string, Port>& outputs() const override { return outputs_; }

  Tensors infer(const Tensors& inputs) override {
    write_safetensors(folder_ + "/inputs.safetensors", inputs, {});
    if (!compute_()) throw std::runtime_error("Python failed");
    const SafeTensors file(folder_ + "/outputs.safetensors");
    Tensors found;
    for (const std::string& name : file.names()) found[name] = file.read(name);
    return found;
  }

 private:
  std::string folder_;
  int32_t (*compute_)();
  std::map<std::string, Port> inputs_, outputs_;
};

}  // namespace

extern "C" {

int32_t runner_json(const char* given, char* text) {
  return told(text, [&] { return Json::parse(given).text(); });
}

int32_t runner_sha256(const char* path, char* text) {
  return told(text, [&] { return sha256_file(path); });
}

// Reads every tensor and writes it to another file.
int32_t runner_copy(const char* from, const char* to, char* text) {
  return told(text, [&] {
    const SafeTensors file(from);
    Tensors tensors;
    for (const std::string& name : file.names()) tensors[name] = file.read(name);
    write_safetensors(to, tensors, {{"origin", from}});
    return std::string();
  });
}

void runner_to_half(const float* values, int64_t count, uint16_t* halves) {
  for (int64_t i = 0; i < count; ++i) halves[i] = float_to_half(values[i]);
}

void runner_from_half(const uint16_t* halves, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = half_to_float(halves[i]);
}

// Every float tensor of a file in another type: 0 F16, 1 BF16, 2 F32.
int32_t runner_cast(const char* from, int32_t type, const char* to, char* text) {
  return told(text, [&] {
    const SafeTensors file(from);
    Tensors tensors;
    for (const std::string& name : file.names()) tensors[name] = cast(file.read(name), static_cast<Type>(type));
    write_safetensors(to, tensors, {});
    return std::string();
  });
}

void runner_compare(const float* r, const float* q, const float* f, int64_t count, double* found) {
  const ModelParity parity = compare_models({r, r + count}, {q, q + count}, {f, f + count});
  found[0] = parity.rel_err, found[1] = parity.cosine, found[2] = parity.error_runtime;
  found[3] = parity.error_reference, found[4] = parity.error_ratio(), found[5] = parity.passed();
}

double runner_psnr(const float* video, const float* reference, int64_t count) {
  return psnr_db({video, video + count}, {reference, reference + count});
}

double runner_quantile(const float* values, int64_t count, double share) {
  return quantile({values, values + count}, share);
}

int32_t runner_arguments(const char* const* words, int32_t count, char* text) {
  return told(text, [&] {
    const Arguments a = parse_arguments({words, words + count});
    std::string found = a.command + " " + a.folder + " " + std::to_string(a.runs) + " " + std::to_string(a.graph);
    for (const auto& [name, shape] : a.least) found += " min " + name + " " + shape_text(shape);
    for (const auto& [name, shape] : a.most) found += " max " + name + " " + shape_text(shape);
    return found;
  });
}

// Reads facts and writes them again.
int32_t runner_facts(const char* given, char* text) {
  return told(text, [&] { return Facts::parse(given, "engine.json").json(); });
}

int32_t runner_check_facts(const char* given, const char* here, char* text) {
  return told(text, [&] {
    check_facts(Facts::parse(given, "engine.json"), Facts::parse(here, "here"), "model.plan");
    return std::string();
  });
}

int32_t runner_check_profile(const char* given, const char* input, const int64_t* extents, int32_t count, char* text) {
  return told(text, [&] {
    check_profile(input, Facts::parse(given, "engine.json").profile.at(input), {extents, extents + count});
    return std::string();
  });
}

// The profile of input x that serves a shape and what the command line adds to it.
int32_t runner_widened(const int64_t* extents, int32_t count, const char* const* words, int32_t word_count,
                       char* text) {
  return told(text, [&] {
    const Arguments a = parse_arguments({words, words + word_count});
    const Profile profile = widened({{"x", {extents, extents + count}}}, a.least, a.most).at("x");
    return shape_text(profile.least) + " " + shape_text(profile.typical) + " " + shape_text(profile.most);
  });
}

int32_t runner_plugin(const char* path, int32_t major, char* text) {
  return told(text, [&] {
    const PluginFacts facts = inspect_plugin(path);
    check_plugin(facts, major);
    return facts.version + " " + facts.tensorrt;
  });
}

int32_t runner_needs_plugin(const char* onnx) { return needs_plugin(onnx); }

// A line "NAME xq_compared xq_mismatches acc_compared acc_mismatches rel_err passed" for each layer.
int32_t runner_layers(const char* parity, const char* folder, int32_t (*compute)(), char* text) {
  return told(text, [&] {
    const SafeTensors inputs(std::string(parity) + "/inputs.safetensors");
    const SafeTensors reference(std::string(parity) + "/reference.safetensors");
    Exchange model(folder, compute);
    std::string found;
    for (const LayerParity& layer : check_layers(model, inputs, reference)) {
      char line[512];
      std::snprintf(line, sizeof(line), "%s %lld %lld %lld %lld %.17g %d\n", layer.name.c_str(),
                    static_cast<long long>(layer.xq_compared), static_cast<long long>(layer.xq_mismatches),
                    static_cast<long long>(layer.acc_compared), static_cast<long long>(layer.acc_mismatches),
                    layer.rel_err, layer.passed());
      found += line;
    }
    return found;
  });
}

// The shapes [B, L, K] of an input of a model of layers: least, most.
int32_t runner_layer_profile(const char* inputs, const char* port, char* text) {
  return told(text, [&] {
    const Profile profile = layer_profile(port, SafeTensors(inputs));
    return shape_text(profile.least) + " " + shape_text(profile.most);
  });
}

int32_t runner_model(const char* parity, const char* folder, int32_t (*compute)(), double* found, char* text) {
  return told(text, [&] {
    const SafeTensors inputs(std::string(parity) + "/inputs.safetensors");
    const SafeTensors reference(std::string(parity) + "/reference.safetensors");
    Exchange model(folder, compute);
    const std::string rounded = std::string(parity) + "/half.safetensors";
    std::unique_ptr<SafeTensors> half;
    if (is_file(rounded)) half = std::make_unique<SafeTensors>(rounded);
    const ModelParity result = check_model(model, inputs, reference, half.get());
    found[0] = result.rel_err, found[1] = result.cosine, found[2] = result.error_ratio();
    found[3] = result.has_half() ? result.half_error_ratio() : 0;
    found[4] = result.half_rel_err, found[5] = result.passed();
    return std::string();
  });
}

// A proof of ``count`` layers whose numbers are xq_compared, xq_mismatches, acc_compared, acc_mismatches, and of models
// r, q and f of one value each; as text or as JSON.
int32_t runner_proof(const char* const* names, const int64_t* numbers, const double* errors, int32_t count,
                     const float* models, int32_t json, char* text) {
  return told(text, [&] {
    Proof proof;
    for (int i = 0; i < count; ++i, numbers += 4) {
      proof.layers.push_back({names[i], numbers[0], numbers[1], numbers[2], numbers[3], errors[i]});
    }
    proof.layers_saved = count;
    proof.model = compare_models({models[0]}, {models[1]}, {models[2]});
    return json ? proof.json() : proof.text() + (proof.passed() ? "passed" : "failed");
  });
}

int32_t runner_sample(const char* plan, const char* folder, int32_t (*compute)(), const char* out, char* text) {
  return told(text, [&] {
    Exchange model(folder, compute);
    int64_t last = 0;
    const Tensor video = sample(model, read_plan(plan), [&last](int64_t done, int64_t) { last = done; });
    write_safetensors(out, {{"video", video}}, {});
    return std::to_string(last);
  });
}

}  // extern "C"
