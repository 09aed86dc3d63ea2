#include "proof.h"

#include <algorithm>
#include <cstdio>
#include <map>

#include "json.h"

namespace qvdit::runner {
namespace {

constexpr int kNamed = 5;  // layers that fail and are named; a model has hundreds

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof(text), pattern, value);
  return text;
}

// All layers as one.
LayerParity total(const std::vector<LayerParity>& layers) {
  LayerParity sum;
  for (const LayerParity& layer : layers) {
    sum.xq_compared += layer.xq_compared;
    sum.xq_mismatches += layer.xq_mismatches;
    sum.acc_compared += layer.acc_compared;
    sum.acc_mismatches += layer.acc_mismatches;
    sum.rel_err = std::max(sum.rel_err, layer.rel_err);
  }
  return sum;
}

}  // namespace

bool Proof::passed() const {
  return model.passed() && std::all_of(layers.begin(), layers.end(), [](const LayerParity& l) { return l.passed(); });
}

std::string Proof::text() const {
  std::string text;
  int named = 0;
  for (const LayerParity& layer : layers) {
    if (layer.passed() || ++named > kNamed) continue;
    text += "  " + layer.name + ": " + std::to_string(layer.xq_mismatches) + " x_q and " +
            std::to_string(layer.acc_mismatches) + " acc differ, relative error " + format("%.1e", layer.rel_err) +
            "\n";
  }
  const LayerParity all = total(layers);
  text += "layers   " + std::to_string(layers.size()) + " of " + std::to_string(layers_saved) +
          " compared: " + std::to_string(all.xq_mismatches) + " of " + std::to_string(all.xq_compared) + " x_q and " +
          std::to_string(all.acc_mismatches) + " of " + std::to_string(all.acc_compared) +
          " acc differ, relative error at most " + format("%.1e", all.rel_err) + "\n";
  const double ratio = model.has_half() ? model.half_error_ratio() : model.error_ratio();
  text += "model    relative error " + format("%.2e", model.rel_err) + " to PyTorch's quantized model, cosine " +
          format("%.6f", model.cosine) + ", error against full precision " + format("%.3f", ratio) + " of that of " +
          (model.has_half() ? "its 16-bit run\n" : "its float32 run\n");
  return text;
}

std::string Proof::json() const {
  std::vector<Json> rows;
  for (const LayerParity& layer : layers) {
    rows.push_back(Json::object({{"name", Json::of(layer.name)},
                                 {"xq_compared", Json::of(layer.xq_compared)},
                                 {"xq_mismatches", Json::of(layer.xq_mismatches)},
                                 {"acc_compared", Json::of(layer.acc_compared)},
                                 {"acc_mismatches", Json::of(layer.acc_mismatches)},
                                 {"runtime_rel_err", Json::of(layer.rel_err)},
                                 {"integers", Json::boolean(layer.acc_compared > 0)}}));
  }
  const LayerParity all = total(layers);
  std::map<std::string, Json> told = {{"layers_compared", Json::of(static_cast<int64_t>(layers.size()))},
                                      {"xq_compared", Json::of(all.xq_compared)},
                                      {"xq_mismatches", Json::of(all.xq_mismatches)},
                                      {"acc_compared", Json::of(all.acc_compared)},
                                      {"acc_mismatches", Json::of(all.acc_mismatches)},
                                      {"model_rel_err", Json::of(model.rel_err)},
                                      {"model_cosine", Json::of(model.cosine)},
                                      {"error_runtime", Json::of(model.error_runtime)},
                                      {"error_reference", Json::of(model.error_reference)},
                                      {"error_ratio", Json::of(model.error_ratio())},
                                      {"layers", Json::array(rows)}};
  if (model.has_half()) {
    told["error_half"] = Json::of(model.error_half);
    told["half_rel_err"] = Json::of(model.half_rel_err);
    told["half_error_ratio"] = Json::of(model.half_error_ratio());
  }
  return Json::object(told).text();
}

}  // namespace qvdit::runner
