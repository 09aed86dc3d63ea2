// The one exception of the runner: something the user gave cannot be used. main prints it as one line, exit status 2.
#pragma once

#include <stdexcept>
#include <string>

namespace qvdit::runner {

// What was got, what was expected, what to do about it: QvditError of qvdit/contract/errors.py.
class Error : public std::runtime_error {
 public:
  Error(const std::string& got, const std::string& expected, const std::string& fix)
      : std::runtime_error("got " + got + "; expected " + expected + "; " + fix) {}
};

}  // namespace qvdit::runner
