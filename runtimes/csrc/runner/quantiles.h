// Quantiles of measured times.
#pragma once

#include <vector>

namespace qvdit::runner {

// The value below which a share 0 … 1 of the values lies, interpolated linearly as numpy.quantile does; values: one or
// more, in any order.
double quantile(std::vector<float> values, double share);

}  // namespace qvdit::runner
