#include "quantiles.h"

#include <algorithm>

namespace qvdit::runner {

double quantile(std::vector<float> values, double share) {
  std::sort(values.begin(), values.end());
  const double place = share * static_cast<double>(values.size() - 1);
  const size_t below = static_cast<size_t>(place), above = std::min(below + 1, values.size() - 1);
  const double low = values[below], high = values[above];
  return low + (place - static_cast<double>(below)) * (high - low);
}

}  // namespace qvdit::runner
