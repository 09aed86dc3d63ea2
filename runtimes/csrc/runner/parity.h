// A model against the reference run that a folder carries: parity/inputs.safetensors and parity/reference.safetensors.
#pragma once

#include <vector>

#include "compare.h"
#include "facts.h"
#include "model.h"
#include "safetensors.h"

namespace qvdit::runner {

// The inputs of the whole model, in its types. Throws Error where the file has others.
Tensors model_feed(const Model& model, const SafeTensors& inputs);

// The whole model's shapes, by input, as the reference run has them.
std::map<std::string, Shape> model_shapes(const SafeTensors& inputs);

// The shapes [B, L, K] that input ``port`` of a model of single layers has in the reference run: NODE:x, where NODE is
// a layer's name, or several that one node computes, between commas.
Profile layer_profile(const std::string& port, const SafeTensors& inputs);

// half: of PyTorch's 16-bit run of the quantized model, or null.
ModelParity check_model(Model& model, const SafeTensors& inputs, const SafeTensors& reference, const SafeTensors* half);

// Every layer of a model of single layers on its own saved input: layers of one node have the same one as a rule, and
// as many runs are made as the largest node has layers. The outputs: NODE:y [B, L, S·N], and but for static layers
// NODE:x_q int32 [B, L, K_pad / 4] (NODE:x_q_less_128 where activations are unsigned) and NODE:acc int32 [B, L, S·N]:
// export/layers.py.
std::vector<LayerParity> check_layers(Model& layers, const SafeTensors& inputs, const SafeTensors& reference);

// How many layers the reference run has.
int64_t count_layers(const SafeTensors& inputs);

}  // namespace qvdit::runner
