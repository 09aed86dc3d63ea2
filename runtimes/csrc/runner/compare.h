// How two results compare: the figures of qvdit/contract/parity.py, by the same formulas in float64.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace qvdit::runner {

struct LayerParity {
  std::string name;
  int64_t xq_compared = 0, xq_mismatches = 0;
  int64_t acc_compared = 0, acc_mismatches = 0;
  double rel_err = 0;  // of y

  // Integers all equal, and y as near as float16 gets to float32.
  bool passed() const;
};

struct ModelParity {
  double rel_err = 0;          // ‖r - q‖ / ‖q‖: runtime r, quantized reference q, full precision f
  double cosine = 0;           // of r and q
  double error_runtime = 0;    // ‖r - f‖ / ‖f‖
  double error_reference = 0;  // ‖q - f‖ / ‖f‖
  // Where there is a 16-bit run h of PyTorch's quantized model, whose rounding is an engine's kind; negative elsewhere.
  double error_half = -1;    // ‖h - f‖ / ‖f‖
  double half_rel_err = -1;  // ‖r - h‖ / ‖h‖

  // The runtime's error against full precision over the reference's: 1 is parity.
  double error_ratio() const;
  bool has_half() const { return error_half >= 0; }
  // The same over the 16-bit run's.
  double half_error_ratio() const;
  // Whether the error is at most 10 % above the 16-bit run's, or where there is none the reference's, and no more than
  // 10 % below the reference's: without its error it would be another model.
  bool passed() const;
};

// ‖value - reference‖ / ‖reference‖; infinity for another number of values.
double relative_error(const std::vector<float>& value, const std::vector<float>& reference);

ModelParity compare_models(const std::vector<float>& runtime, const std::vector<float>& quantized,
                           const std::vector<float>& full);

// How many differ; all of them where there are more or fewer than expected.
int64_t count_differing(const std::vector<int64_t>& found, const std::vector<int64_t>& expected);

// Peak signal-to-noise ratio in dB of values clipped to -1 … 1: psnr of qvdit/reference/measure.py. -infinity for
// another number of values.
double psnr_db(const std::vector<float>& video, const std::vector<float>& reference);

}  // namespace qvdit::runner
