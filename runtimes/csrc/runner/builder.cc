#include "builder.h"

#include <dlfcn.h>

#include <memory>

#include "device.h"
#include "error.h"
#include "files.h"
#include "versions.h"

namespace qvdit::runner {
namespace {

using nvinfer1::BuilderFlag;
using nvinfer1::IBuilderConfig;
using nvinfer1::INetworkDefinition;
using nvinfer1::OptProfileSelector;

constexpr int64_t kLargestCache = int64_t{1} << 31;

std::string dotted(int major, int minor, int patch) {
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
}

// Whether NVIDIA's library ``name`` of one of two majors answers with a version: an empty stand-in does not.
bool works(const std::string& name, int major, int older) {
  for (const int tried : {major, older}) {
    void* library = dlopen(("lib" + name + ".so." + std::to_string(tried)).c_str(), RTLD_NOW | RTLD_LOCAL);
    void* version = library ? dlsym(library, (name + "GetVersion").c_str()) : nullptr;
    if (version && reinterpret_cast<size_t (*)()>(version)() >= 1000) return true;
  }
  return false;
}

// The parser holds the weights that the network points to: it must live until the engine is built.
Parser parse_onnx(const std::string& onnx, INetworkDefinition& network, Log& log) {
  Parser parser(nvonnxparser::createParser(network, log));
  if (!parser) throw Error("no ONNX parser (" + log.why() + ")", "one that starts", "see that TensorRT is whole");
  if (parser->parseFromFile(onnx.c_str(), 0)) return parser;
  const auto* first = parser->getNbErrors() > 0 ? parser->getError(0) : nullptr;
  const std::string where = first ? error_node(*first) : "the model";
  throw Error(onnx + ", which TensorRT does not parse at " + where + " (" + log.why() + ")",
              "nodes that this TensorRT and the plugin know", "export the model again; --verbose shows more");
}

// Makes an input's extents constant where its profile has one size: all that is computed from them goes away.
void fix_shape(nvinfer1::ITensor& input, const Profile& profile) {
  nvinfer1::Dims dims = input.getDimensions();
  const nvinfer1::Dims least = dims_of(profile.least);
  for (int i = 0; i < dims.nbDims && i < least.nbDims; ++i) {
    if (dims.d[i] == -1 && profile.least[i] == profile.most[i]) dims.d[i] = least.d[i];
  }
  input.setDimensions(dims);
}

void add_profile(nvinfer1::IBuilder& builder, IBuilderConfig& config, const INetworkDefinition& network,
                 const std::function<Profile(const std::string&)>& profile_of) {
  nvinfer1::IOptimizationProfile& shapes = *builder.createOptimizationProfile();
  for (int i = 0; i < network.getNbInputs(); ++i) {
    const char* name = network.getInput(i)->getName();
    const Profile profile = profile_of(name);
    fix_shape(*network.getInput(i), profile);
    const bool set = shapes.setDimensions(name, OptProfileSelector::kMIN, dims_of(profile.least)) &&
                     shapes.setDimensions(name, OptProfileSelector::kOPT, dims_of(profile.typical)) &&
                     shapes.setDimensions(name, OptProfileSelector::kMAX, dims_of(profile.most));
    if (!set) {
      throw Error(std::string(name) + " of " + shape_text(profile.least) + " to " + shape_text(profile.most),
                  "shapes that the model takes", "check --min and --max");
    }
  }
  if (!shapes.isValid() || config.addOptimizationProfile(&shapes) < 0) {
    throw Error("a profile that TensorRT refuses", "shapes that the model takes", "check --min and --max");
  }
}

// One of another GPU or version is of no use, and an empty one takes its place. It must live as long as the build.
std::unique_ptr<nvinfer1::ITimingCache> use_cache(IBuilderConfig& config, const std::string& path) {
  const std::string content = is_file(path) ? read_file(path, "a timing cache", kLargestCache) : "";
  std::unique_ptr<nvinfer1::ITimingCache> cache(config.createTimingCache(content.data(), content.size()));
  if (!cache || !config.setTimingCache(*cache, false)) {
    cache.reset(config.createTimingCache(nullptr, 0));
    if (cache) config.setTimingCache(*cache, false);
  }
  return cache;
}

void keep_cache(const IBuilderConfig& config, const std::string& path) {
  const nvinfer1::ITimingCache* cache = config.getTimingCache();
  const std::unique_ptr<nvinfer1::IHostMemory> content(cache ? cache->serialize() : nullptr);
  if (content) write_file(path, content->data(), content->size());
}

}  // namespace

std::string tensorrt_version() {
  const int loaded = getInferLibVersion();  // 8601, 100300
  const int unit = loaded >= 10000 ? 10000 : 1000;
  const std::string version = dotted(loaded / unit, loaded % unit / 100, loaded % 100);
  if (loaded / unit != NV_TENSORRT_MAJOR || loaded % unit / 100 != NV_TENSORRT_MINOR) {
    throw Error("TensorRT " + version,
                "the one that the runner was compiled against, " +
                    dotted(NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH),
                "build the runner again: build.sh");
  }
  return version;
}

std::string build_engine(const std::string& onnx, const std::function<Profile(const std::string& input)>& profile_of,
                         const BuildOptions& options, Log& log) {
  if (!is_file(onnx)) throw Error("no file " + onnx, "the folder's ONNX files", "copy the whole folder again");
  const std::unique_ptr<nvinfer1::IBuilder> builder(nvinfer1::createInferBuilder(log));
  if (!builder) throw Error("no TensorRT builder (" + log.why() + ")", "one that starts", "see that TensorRT is whole");
  const std::unique_ptr<INetworkDefinition> network(builder->createNetworkV2(network_flags()));
  const Parser parser = parse_onnx(onnx, *network, log);
  const std::unique_ptr<IBuilderConfig> config(builder->createBuilderConfig());
  // The few products that the graph keeps in float32 steer every token; ten bits of mantissa would undo that.
  config->clearFlag(BuilderFlag::kTF32);
  if (options.workspace) {
    config->setMemoryPoolLimit(nvinfer1::MemoryPoolType::kWORKSPACE, static_cast<size_t>(options.workspace));
  }
  if (options.optimization_level >= 0) {
    config->setBuilderOptimizationLevel(static_cast<int32_t>(options.optimization_level));
  }
  if (!kStronglyTyped) set_types(*network, *config, !works("cublasLt", 12, 11) || !works("cudnn", 8, 8));
  add_profile(*builder, *config, *network, profile_of);
  const auto cache = use_cache(*config, options.timing_cache);
  std::unique_ptr<nvinfer1::IHostMemory> plan(builder->buildSerializedNetwork(*network, *config));
  if (!plan && relax_types(*config)) plan.reset(builder->buildSerializedNetwork(*network, *config));
  if (!plan) {
    throw Error(onnx + ", which TensorRT does not build (" + log.why() + ")",
                "a model that this TensorRT and the plugin take, and enough memory (" + std::to_string(free_memory()) +
                    " bytes are free)",
                "do what the reason says; --verbose shows all of it");
  }
  keep_cache(*config, options.timing_cache);
  return std::string(static_cast<const char*>(plan->data()), plan->size());
}

}  // namespace qvdit::runner
