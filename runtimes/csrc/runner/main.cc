// qvdit-run: builds, proves, times and samples with TensorRT what qvdit-export --device wrote. Exit status: 0; 1 where
// `parity` fails; 2 and one line for whatever cannot be done, an engine of `build` that fails parity among it.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>

#include "arguments.h"
#include "compare.h"
#include "error.h"
#include "files.h"
#include "folder.h"
#include "json.h"
#include "parity.h"
#include "quantiles.h"
#include "safetensors.h"
#include "sampler.h"
#include "session.h"

namespace qvdit::runner {
namespace {

int build(const Arguments& arguments) {
  Session(arguments).build();
  std::printf("kept in %s/tensorrt\n", arguments.folder.c_str());
  return 0;
}

int prove(const Arguments& arguments) {
  Session session(arguments);
  const std::unique_ptr<Engine> layers = session.has_layers() ? session.load_layers() : nullptr;
  const std::unique_ptr<Engine> model = session.load_model();
  const Proof proof = session.prove(layers.get(), *model);
  std::fputs(proof.text().c_str(), stdout);
  std::puts(proof.passed() ? "parity   passed" : "parity   FAILED");
  return proof.passed() ? 0 : 1;
}

int bench(const Arguments& arguments) {
  Session session(arguments);
  const int64_t free_before = free_memory();
  const std::unique_ptr<Engine> model = session.load_model();
  model->use_graph(arguments.graph);
  const SafeTensors inputs(session.path(kParityInputs));
  std::vector<float> times = model->time(model_feed(*model, inputs), arguments.runs, arguments.warmup);
  const int64_t held = free_before - free_memory();
  const double median = quantile(times, 0.5), p10 = quantile(times, 0.1), p90 = quantile(times, 0.9);
  const char* how = arguments.graph ? "CUDA graph" : "enqueued";
  std::printf("latency  median %.3f ms, p10 %.3f, p90 %.3f (%zu runs, %s, CUDA events, %s)\n", median, p10, p90,
              times.size(), how, session.gpu().name.c_str());
  std::printf("memory   %lld bytes in use on the device, of which scratch %lld; engine %lld bytes\n",
              static_cast<long long>(held), static_cast<long long>(model->scratch_bytes()),
              static_cast<long long>(session.model_facts().engine_bytes));
  if (arguments.out.empty()) return 0;
  const std::string report = Json::object({{"ms", Json::of(median)},
                                           {"p10", Json::of(p10)},
                                           {"p90", Json::of(p90)},
                                           {"runs", Json::of(static_cast<int64_t>(times.size()))},
                                           {"launch", Json::of(std::string(how))},
                                           {"device_bytes", Json::of(held)},
                                           {"scratch_bytes", Json::of(model->scratch_bytes())},
                                           {"engine_bytes", Json::of(session.model_facts().engine_bytes)},
                                           {"gpu", Json::of(session.gpu().name)},
                                           {"driver", Json::of(session.gpu().driver)},
                                           {"tensorrt", Json::of(session.tensorrt())}})
                                 .text();
  write_file(arguments.out, report.data(), report.size());
  return 0;
}

int sample_video(const Arguments& arguments) {
  Session session(arguments);
  const Plan plan = read_plan(arguments.plan.empty() ? session.path(kPlan) : arguments.plan);
  const std::unique_ptr<Engine> model = session.load_model();
  model->use_graph(arguments.graph);
  const Tensor video = sample(*model, plan, [](int64_t done, int64_t steps) {
    std::printf("\rstep %lld of %lld", static_cast<long long>(done), static_cast<long long>(steps));
    std::fflush(stdout);
  });
  write_safetensors(arguments.out, {{"video", video}}, {});
  std::printf("\nwrote %s, %s\n", arguments.out.c_str(), shape_text(video.shape).c_str());
  if (!plan.reference.data.empty()) {
    std::printf("PSNR     %.1f dB to what ONNX Runtime sampled\n", psnr_db(floats(video), floats(plan.reference)));
  }
  return 0;
}

int run(const std::vector<std::string>& words) {
  const Arguments arguments = parse_arguments(words);
  if (arguments.command == "build") return build(arguments);
  if (arguments.command == "parity") return prove(arguments);
  if (arguments.command == "bench") return bench(arguments);
  if (arguments.command == "sample") return sample_video(arguments);
  std::fputs(kUsage, stdout);
  return 0;
}

}  // namespace
}  // namespace qvdit::runner

int main(int count, char** words) {
  try {
    return qvdit::runner::run({words + 1, words + count});
  } catch (const std::bad_alloc&) {
    std::fputs("error: got no memory; expected enough for the files; close other programs\n", stderr);
  } catch (const qvdit::runner::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: got %s; expected files of one export; copy the folder again\n", error.what());
  }
  return 2;
}
