#include "sampler.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "safetensors.h"

namespace qvdit::runner {
namespace {

const std::string kFormat = "qvdit-plan-1";
const char kHidden[] = "hidden_states", kTime[] = "timestep", kText[] = "encoder_hidden_states";

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
  throw Error(path + ", " + why, "a plan that qvdit-export wrote (" + kFormat + ")", "export it again");
}

// A tensor ``count`` times, one below the other.
Tensor repeated(const Tensor& tensor, int64_t count) {
  Tensor made = tensor;
  made.shape[0] *= count;
  for (int64_t i = 1; i < count; ++i) made.data.insert(made.data.end(), tensor.data.begin(), tensor.data.end());
  return made;
}

void check_ports(const Model& model, const Plan& plan) {
  const auto& ports = model.inputs();
  if (ports.size() != 3 || !ports.count(kHidden) || !ports.count(kTime) || !ports.count(kText)) {
    throw Error("a model with other inputs", "hidden_states, timestep and encoder_hidden_states", "export it again");
  }
  if (model.outputs().size() != 1) throw Error("a model of several outputs", "one", "export it again");
  const Shape& hidden = ports.at(kHidden).shape;
  if (hidden.size() != plan.latents.shape.size()) {
    throw Error("latents of " + shape_text(plan.latents.shape),
                "as many extents as the model's hidden_states, " + std::to_string(hidden.size()), "export it again");
  }
  const int64_t batch = hidden.front(), needed = plan.condition.shape.front();
  if (batch >= 0 && batch != needed) {
    throw Error("an engine for batches of " + std::to_string(batch), std::to_string(needed) + " as the plan has them",
                "build the engine with that batch in its profile");
  }
}

// [B, n] → [n]: the velocity, guided where there are two.
std::vector<float> guided(const std::vector<float>& output, size_t count, float guidance) {
  std::vector<float> velocity(output.begin(), output.begin() + static_cast<std::ptrdiff_t>(count));
  if (output.size() == count) return velocity;
  for (size_t i = 0; i < count; ++i) velocity[i] += guidance * (output[count + i] - velocity[i]);
  return velocity;
}

}  // namespace

Plan read_plan(const std::string& path) {
  const SafeTensors file(path);
  if (file.metadata("format") != kFormat) refuse(path, "a plan of the format " + file.metadata("format"));
  Plan plan;
  plan.latents = cast(file.read("latents"), Type::kF32);
  plan.timesteps = floats(file.read("timesteps"));
  plan.keep = floats(file.read("keep"));
  plan.gain = floats(file.read("gain"));
  plan.condition = cast(file.read("encoder_hidden_states"), Type::kF32);
  const std::vector<float> guidance = floats(file.read("guidance")), clamp = floats(file.read("clamp"));
  if (file.has("reference")) plan.reference = cast(file.read("reference"), Type::kF32);
  const size_t steps = plan.timesteps.size();
  if (!steps || plan.keep.size() != steps || plan.gain.size() != steps || guidance.size() != 1 || clamp.size() != 1) {
    refuse(path, "whose steps do not have one length");
  }
  plan.guidance = guidance[0];
  plan.clamp = clamp[0] != 0;
  if (plan.latents.shape.size() < 2 || plan.latents.shape[0] != 1) refuse(path, "whose latents are no single video");
  if (plan.condition.shape.size() != 3 || plan.condition.shape[0] < 1 || plan.condition.shape[0] > 2) {
    refuse(path, "whose prompt is none");
  }
  if (file.has("reference") && plan.reference.shape != plan.latents.shape)
    refuse(path, "whose reference is another video");
  return plan;
}

Tensor sample(Model& model, const Plan& plan, const std::function<void(int64_t, int64_t)>& progress) {
  check_ports(model, plan);
  const auto& ports = model.inputs();
  const int64_t batch = plan.condition.shape.front();
  std::vector<float> x = floats(plan.latents);
  const Tensor condition = cast(plan.condition, ports.at(kText).type);
  for (size_t step = 0; step < plan.timesteps.size(); ++step) {
    const Tensor hidden = repeated(Tensor::of(plan.latents.shape, x), batch);
    const Tensor time = Tensor::of({batch}, std::vector<float>(static_cast<size_t>(batch), plan.timesteps[step]));
    const Tensors outputs = model.infer({{kHidden, cast(hidden, ports.at(kHidden).type)},
                                         {kTime, cast(time, ports.at(kTime).type)},
                                         {kText, condition}});
    const std::vector<float> output = floats(outputs.begin()->second);
    if (output.size() != x.size() * static_cast<size_t>(batch)) {
      throw Error("a velocity of " + shape_text(outputs.begin()->second.shape), "one of the latents' shape",
                  "sample with a pipeline: this model predicts something else");
    }
    const std::vector<float> velocity = guided(output, x.size(), plan.guidance);
    for (size_t i = 0; i < x.size(); ++i) x[i] = plan.keep[step] * x[i] + plan.gain[step] * velocity[i];
    if (!std::all_of(x.begin(), x.end(), [](float value) { return std::isfinite(value); })) {
      throw Error("NaN or Inf after step " + std::to_string(step + 1), "finite latents",
                  "check the engine: run parity");
    }
    progress(static_cast<int64_t>(step + 1), static_cast<int64_t>(plan.timesteps.size()));
  }
  if (plan.clamp) {
    for (float& value : x) value = std::clamp(value, -1.0f, 1.0f);
  }
  return Tensor::of(plan.latents.shape, x);
}

}  // namespace qvdit::runner
