#include "compare.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace qvdit::runner {
namespace {

constexpr double kSmallest = 1e-30;       // a divisor instead of 0
constexpr double kLayerTolerance = 1e-2;  // FP16 outputs differ by 3e-4; a wrong gain or bias by more than this
constexpr double kRatioTolerance = 0.1;

double norm(const std::vector<float>& values) {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return std::sqrt(sum);
}

}  // namespace

bool LayerParity::passed() const { return !xq_mismatches && !acc_mismatches && rel_err <= kLayerTolerance; }

double ModelParity::error_ratio() const { return error_runtime / std::max(error_reference, kSmallest); }

double ModelParity::half_error_ratio() const { return error_runtime / std::max(error_half, kSmallest); }

bool ModelParity::passed() const {
  const double ratio = has_half() ? half_error_ratio() : error_ratio();
  return ratio <= 1 + kRatioTolerance && error_ratio() >= 1 - kRatioTolerance;
}

double relative_error(const std::vector<float>& value, const std::vector<float>& reference) {
  if (value.size() != reference.size()) return std::numeric_limits<double>::infinity();
  double sum = 0;
  for (size_t i = 0; i < value.size(); ++i) {
    const double difference = static_cast<double>(value[i]) - static_cast<double>(reference[i]);
    sum += difference * difference;
  }
  return std::sqrt(sum) / std::max(norm(reference), kSmallest);
}

ModelParity compare_models(const std::vector<float>& runtime, const std::vector<float>& quantized,
                           const std::vector<float>& full) {
  ModelParity parity;
  parity.rel_err = relative_error(runtime, quantized);
  parity.error_runtime = relative_error(runtime, full);
  parity.error_reference = relative_error(quantized, full);
  double product = 0;
  for (size_t i = 0; i < std::min(runtime.size(), quantized.size()); ++i) {
    product += static_cast<double>(runtime[i]) * static_cast<double>(quantized[i]);
  }
  parity.cosine = product / std::max(norm(runtime) * norm(quantized), kSmallest);
  return parity;
}

int64_t count_differing(const std::vector<int64_t>& found, const std::vector<int64_t>& expected) {
  if (found.size() != expected.size()) return static_cast<int64_t>(expected.size());
  int64_t count = 0;
  for (size_t i = 0; i < found.size(); ++i) count += found[i] != expected[i];
  return count;
}

double psnr_db(const std::vector<float>& video, const std::vector<float>& reference) {
  if (video.size() != reference.size()) return -std::numeric_limits<double>::infinity();
  double sum = 0;
  for (size_t i = 0; i < video.size(); ++i) {
    const double difference = std::clamp(video[i], -1.0f, 1.0f) - std::clamp(reference[i], -1.0f, 1.0f);
    sum += difference * difference;
  }
  const double error = sum / static_cast<double>(std::max<size_t>(video.size(), 1));
  return 10 * std::log10(4 / std::max(error, 1e-10));
}

}  // namespace qvdit::runner
