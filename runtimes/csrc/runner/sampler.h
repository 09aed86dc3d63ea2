// Sampling a video's latents: a loop of plain arithmetic around the model. What needs the pipeline (its scheduler, text
// encoder and random numbers) is in a plan that export/plan.py made.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "model.h"

namespace qvdit::runner {

struct Plan {
  Tensor latents;                // float32 [1, …]: the noise to start from
  std::vector<float> timesteps;  // [S], as the model is given them
  // [S]: x ← keep x + gain v, which is the scheduler's step. Flow matching: keep 1, gain σ' - σ.
  std::vector<float> keep, gain;
  Tensor condition;    // float32 [2, L, D] without and with the prompt; [1, L, D] where there is no guidance
  float guidance = 1;  // v = v_without + guidance (v_with - v_without)
  bool clamp = false;  // to -1 … 1 in the end: pixels
  Tensor reference;    // float32 [1, …]: what ONNX Runtime made of this plan; no elements where nobody sampled it
};

// Throws Error where the file is none, or of another version.
Plan read_plan(const std::string& path);

// float32 [1, …]. progress(done, steps) is called after every step.
Tensor sample(Model& model, const Plan& plan, const std::function<void(int64_t, int64_t)>& progress);

}  // namespace qvdit::runner
