#include "facts.h"

#include <algorithm>
#include <stdexcept>

#include "error.h"

namespace qvdit::runner {
namespace {

constexpr int64_t kFormat = 1;
const char kAgain[] = "build it again: qvdit-run build";

Json json_of(const Shape& shape) {
  std::vector<Json> items;
  for (const int64_t extent : shape) items.push_back(Json::of(extent));
  return Json::array(items);
}

Shape shape_of(const Json& json) {
  Shape shape;
  for (const Json& extent : json.items()) shape.push_back(extent.integer());
  return shape;
}

Json text_or_null(const std::string& text) { return text.empty() ? Json() : Json::of(text); }

}  // namespace

std::string Facts::json() const {
  std::map<std::string, Json> files, shapes;
  for (const auto& [name, digest] : onnx) files[name] = Json::of(digest);
  for (const auto& [name, range] : profile) {
    shapes[name] = Json::array({json_of(range.least), json_of(range.typical), json_of(range.most)});
  }
  return Json::object({{"format", Json::of(kFormat)},
                       {"tensorrt", Json::of(tensorrt)},
                       {"gpu", Json::of(gpu)},
                       {"compute", Json::of(compute)},
                       {"driver", Json::of(driver)},
                       {"profile", Json::object(shapes)},
                       {"onnx_sha256", Json::object(files)},
                       {"plugin_sha256", text_or_null(plugin_sha256)},
                       {"plugin_version", text_or_null(plugin_version)},
                       {"plugin_tensorrt", text_or_null(plugin_tensorrt)},
                       {"optimization_level", optimization_level < 0 ? Json() : Json::of(optimization_level)},
                       {"workspace", workspace ? Json::of(workspace) : Json()},
                       {"build_seconds", Json::of(build_seconds)},
                       {"engine_sha256", Json::of(engine_sha256)},
                       {"engine_bytes", Json::of(engine_bytes)},
                       {"device_bytes", Json::of(device_bytes)}})
      .text();
}

Facts Facts::parse(const std::string& text, const std::string& path) {
  try {
    const Json json = Json::parse(text);
    if (json.at("format").integer() != kFormat) throw std::invalid_argument("another format");
    Facts facts;
    facts.tensorrt = json.at("tensorrt").string();
    facts.gpu = json.at("gpu").string();
    facts.compute = json.at("compute").string();
    facts.engine_sha256 = json.at("engine_sha256").string();
    facts.engine_bytes = json.at("engine_bytes").integer();
    facts.device_bytes = json.at("device_bytes").integer();
    for (const auto& [name, digest] : json.at("onnx_sha256").members()) facts.onnx[name] = digest.string();
    for (const auto& [name, shapes] : json.at("profile").members()) {
      if (shapes.items().size() != 3) throw std::invalid_argument("a profile that is not three shapes");
      const auto& range = shapes.items();
      facts.profile[name] = {shape_of(range[0]), shape_of(range[1]), shape_of(range[2])};
      const Profile& made = facts.profile[name];
      if (made.least.size() != made.most.size()) throw std::invalid_argument("a profile of two ranks");
    }
    return facts;
  } catch (const std::logic_error& error) {
    throw Error(path + ", which does not describe an engine (" + error.what() + ")", "what the build wrote", kAgain);
  }
}

void check_facts(const Facts& facts, const Facts& here, const std::string& path) {
  if (facts.tensorrt != here.tensorrt) {
    throw Error(path + ", an engine of TensorRT " + facts.tensorrt, "one of " + here.tensorrt + ", which is here",
                kAgain);
  }
  if (facts.gpu != here.gpu || facts.compute != here.compute) {
    throw Error(path + ", an engine for " + facts.gpu + " (sm " + facts.compute + ")",
                "one for " + here.gpu + " (sm " + here.compute + ")", kAgain);
  }
  if (facts.onnx != here.onnx) throw Error(path + ", an engine of another model", "one of the ONNX beside it", kAgain);
  if (facts.engine_bytes != here.engine_bytes) {
    throw Error(path + " of " + std::to_string(here.engine_bytes) + " bytes", std::to_string(facts.engine_bytes),
                kAgain);
  }
  if (facts.engine_sha256 != here.engine_sha256) {
    throw Error(path + ", which is damaged", "the engine that was built, by its sha256", kAgain);
  }
}

std::map<std::string, Profile> widened(const std::map<std::string, Shape>& shapes,
                                       const std::map<std::string, Shape>& least,
                                       const std::map<std::string, Shape>& most) {
  std::map<std::string, Profile> profiles;
  for (const auto& [name, shape] : shapes) profiles[name] = {shape, shape, shape};
  const auto profile_of = [&profiles](const std::string& name, const Shape& asked) -> Profile& {
    const auto found = profiles.find(name);
    if (found == profiles.end())
      throw Error("sizes of an input " + name, "one that the model has", "check --min and --max");
    const Shape& known = found->second.typical;
    if (known.size() == asked.size()) return found->second;
    throw Error(name + "=" + shape_text(asked), "as many extents as " + shape_text(known), "check --min and --max");
  };
  for (const auto& [name, shape] : least) {
    Profile& profile = profile_of(name, shape);
    for (size_t i = 0; i < shape.size(); ++i) profile.least[i] = std::min(profile.least[i], shape[i]);
  }
  for (const auto& [name, shape] : most) {
    Profile& profile = profile_of(name, shape);
    for (size_t i = 0; i < shape.size(); ++i) profile.most[i] = std::max(profile.most[i], shape[i]);
  }
  return profiles;
}

void check_profile(const std::string& input, const Profile& profile, const Shape& shape) {
  bool inside = shape.size() == profile.least.size();
  for (size_t i = 0; inside && i < shape.size(); ++i) {
    inside = shape[i] >= profile.least[i] && shape[i] <= profile.most[i];
  }
  if (inside) return;
  throw Error(input + " of " + shape_text(shape),
              shape_text(profile.least) + " to " + shape_text(profile.most) + ", the engine's profile",
              "build it again with --min and --max");
}

}  // namespace qvdit::runner
