#include "log.h"

#include <algorithm>
#include <cstdio>

namespace qvdit::runner {
namespace {

constexpr size_t kKept = 3;  // the first errors are the cause, the rest follow from them

// Blanks and line ends as one blank.
std::string one_line(const char* text) {
  std::string line;
  for (; *text; ++text) {
    const bool blank = *text == ' ' || *text == '\n' || *text == '\r' || *text == '\t';
    if (!blank) {
      line.push_back(*text);
    } else if (!line.empty() && line.back() != ' ') {
      line.push_back(' ');
    }
  }
  return line;
}

}  // namespace

void Log::log(Severity severity, const char* text) noexcept {
  if (verbose_) std::fprintf(stderr, "%s\n", text);
  if (severity > Severity::kERROR) return;
  try {
    std::string line = one_line(text);
    const bool known = std::find(errors_.begin(), errors_.end(), line) != errors_.end();
    if (!known && errors_.size() < kKept) errors_.push_back(std::move(line));
  } catch (...) {  // no memory for a message: the error itself is still reported
  }
}

std::string Log::why() {
  std::string text;
  for (const std::string& line : errors_) text += (text.empty() ? "" : "; ") + line;
  errors_.clear();
  return text.empty() ? "it does not say why" : text;
}

}  // namespace qvdit::runner
