// A strict reader and a writer of JSON: enough for safetensors' headers and for what is known of an engine.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace qvdit::runner {

class Json {
 public:
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };

  Json() = default;
  static Json of(const std::string& text);
  static Json of(int64_t number);
  static Json of(double number);  // null where it is not finite: JSON cannot hold it
  static Json boolean(bool value);
  static Json object(std::map<std::string, Json> members);
  static Json array(std::vector<Json> items);

  // The value of a whole text (RFC 8259). Throws std::invalid_argument for anything else, for a key that comes twice
  // and for more than 32 levels.
  static Json parse(const std::string& text);

  Kind kind() const { return kind_; }

  // Each throws std::invalid_argument where the value is of another kind; integer also for fractions, exponents and
  // what int64_t cannot hold.
  const std::string& string() const;
  int64_t integer() const;
  const std::vector<Json>& items() const;
  const std::map<std::string, Json>& members() const;
  // A member; throws std::invalid_argument where there is none.
  const Json& at(const std::string& key) const;

  // With an indent of one space, keys sorted: as qvdit/contract/files.py writes it.
  std::string text() const;

 private:
  friend class JsonReader;
  void write(std::string& out, int level) const;

  Kind kind_ = Kind::kNull;
  std::string text_;  // of a string; of a number as it is written; "true" or "false"
  std::vector<Json> items_;
  std::map<std::string, Json> members_;
};

}  // namespace qvdit::runner
