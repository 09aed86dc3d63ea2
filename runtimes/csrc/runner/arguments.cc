#include "arguments.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <functional>

#include "error.h"

namespace qvdit::runner {

const char kUsage[] =
    "usage: qvdit-run COMMAND FOLDER [options]\n"
    "\n"
    "Runs what qvdit-export --device wrote, FOLDER, in TensorRT.\n"
    "\n"
    "  build   build the engines, compare them with the reference run, keep them if they pass\n"
    "  parity  compare the built engines with the reference run\n"
    "  bench   time the model's engine\n"
    "  sample  sample a video's latents, to --out FILE.safetensors\n"
    "\n"
    "  --plugin FILE             the plugin's library (default: that in FOLDER/build or FOLDER/tensorrt)\n"
    "  --runs N, --warmup N      of bench (default: 50 after 10); with --out FILE.json it writes them too\n"
    "  --graph                   bench and sample: replay a CUDA graph\n"
    "  --plan FILE, --out FILE   of sample (default plan: FOLDER/sample/plan.safetensors)\n"
    "  --min INPUT=2x3x16x32x32  build: sizes to serve beside those of the reference run; may be repeated\n"
    "  --max INPUT=2x3x16x64x64\n"
    "  --workspace-mib N         build: the most workspace (default: all memory)\n"
    "  --optimization-level N    build: 0 … 5; less is faster to build and slower to run\n"
    "  --verbose                 TensorRT's own log\n";

namespace {

const char kSee[] = "see qvdit-run help";

int64_t parse_number(const std::string& option, const std::string& text, int64_t least, int64_t most) {
  char* end = nullptr;
  errno = 0;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (errno || text.empty() || *end || value < least || value > most) {
    throw Error(option + " " + text, std::to_string(least) + " … " + std::to_string(most), kSee);
  }
  return value;
}

void parse_shape(const std::string& option, const std::string& text, std::map<std::string, Shape>& shapes) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0) throw Error(option + " " + text, "INPUT=2x3x16x32x32", kSee);
  Shape shape;
  for (size_t start = equals + 1; start <= text.size();) {
    const size_t end = std::min(text.find('x', start), text.size());
    shape.push_back(parse_number(option, text.substr(start, end - start), 1, INT32_MAX));
    start = end + 1;
  }
  shapes[text.substr(0, equals)] = shape;
}

}  // namespace

Arguments parse_arguments(const std::vector<std::string>& words) {
  Arguments parsed;
  using Take = std::function<void(const std::string& option, const std::string& value)>;
  const auto text = [](std::string& field) -> Take {
    return [&field](const std::string&, const std::string& value) { field = value; };
  };
  const auto number = [](int64_t& field, int64_t least, int64_t most) -> Take {
    return [&field, least, most](const std::string& option, const std::string& value) {
      field = parse_number(option, value, least, most);
    };
  };
  const auto shapes = [](std::map<std::string, Shape>& field) -> Take {
    return [&field](const std::string& option, const std::string& value) { parse_shape(option, value, field); };
  };
  const std::map<std::string, Take> options = {
      {"--plugin", text(parsed.plugin)},
      {"--out", text(parsed.out)},
      {"--plan", text(parsed.plan)},
      {"--runs", number(parsed.runs, 1, 1'000'000)},
      {"--warmup", number(parsed.warmup, 0, 1'000'000)},
      {"--workspace-mib", number(parsed.workspace_mib, 1, 1 << 20)},
      {"--optimization-level", number(parsed.optimization_level, 0, 5)},
      {"--min", shapes(parsed.least)},
      {"--max", shapes(parsed.most)},
  };
  const std::map<std::string, bool*> flags = {{"--graph", &parsed.graph}, {"--verbose", &parsed.verbose}};
  std::vector<std::string> places;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (const auto flag = flags.find(word); flag != flags.end()) {
      *flag->second = true;
    } else if (const auto option = options.find(word); option != options.end()) {
      if (++i == words.size()) throw Error(word + " without a value", "a value", kSee);
      option->second(word, words[i]);
    } else if (word == "--help" || word == "-h") {
      places.insert(places.begin(), "help");
    } else if (word.compare(0, 1, "-") == 0) {
      throw Error("the option " + word, "one that qvdit-run has", kSee);
    } else {
      places.push_back(word);
    }
  }
  parsed.command = places.empty() ? "help" : places[0];
  if (parsed.command == "help") return parsed;
  if (parsed.command != "build" && parsed.command != "parity" && parsed.command != "bench" &&
      parsed.command != "sample") {
    throw Error("the command " + parsed.command, "build, parity, bench or sample", kSee);
  }
  if (places.size() != 2) throw Error(std::to_string(places.size() - 1) + " folders", "one", kSee);
  parsed.folder = places[1];
  if (parsed.command == "sample" && parsed.out.empty()) throw Error("sample without --out", "--out FILE", kSee);
  return parsed;
}

}  // namespace qvdit::runner
