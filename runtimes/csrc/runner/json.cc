#include "json.h"

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace qvdit::runner {
namespace {

constexpr int kDeepest = 32;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

bool is_digit(char c) { return c >= '0' && c <= '9'; }

void append_utf8(std::string& out, uint32_t point) {
  const auto push = [&out](uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (point < 0x80) {
    push(point);
  } else if (point < 0x800) {
    push(0xC0 | point >> 6), push(0x80 | (point & 0x3F));
  } else if (point < 0x10000) {
    push(0xE0 | point >> 12), push(0x80 | (point >> 6 & 0x3F)), push(0x80 | (point & 0x3F));
  } else {
    push(0xF0 | point >> 18), push(0x80 | (point >> 12 & 0x3F));
    push(0x80 | (point >> 6 & 0x3F)), push(0x80 | (point & 0x3F));
  }
}

// Whether a text is UTF-8 (RFC 3629): no overlong forms, no surrogates, nothing above U+10FFFF.
bool is_utf8(const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const uint8_t first = static_cast<uint8_t>(text[i++]);
    if (first < 0x80) continue;
    const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
    static const uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    if (first < 0xC2 || first > 0xF4 || text.size() - i < static_cast<size_t>(more)) return false;
    uint32_t point = first & (0x3F >> more);
    for (int k = 0; k < more; ++k) {
      const uint8_t next = static_cast<uint8_t>(text[i++]);
      if ((next & 0xC0) != 0x80) return false;
      point = point << 6 | (next & 0x3F);
    }
    if (point < kLeast[more] || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) return false;
  }
  return true;
}

void write_string(std::string& out, const std::string& text) {
  static const char kHex[] = "0123456789abcdef";
  out.push_back('"');
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out.push_back('\\');
      out.push_back(c);
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += "\\u00";
      out.push_back(kHex[c >> 4]);
      out.push_back(kHex[c & 15]);
    } else {
      out.push_back(c);
    }
  }
  out.push_back('"');
}

}  // namespace

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : text_(text) {}

  Json whole() {
    if (!is_utf8(text_)) refuse("bytes that are not UTF-8");
    Json value = read(0);
    skip_blanks();
    if (position_ != text_.size()) refuse("more text after its end");
    return value;
  }

 private:
  Json read(int level) {
    if (level > kDeepest) refuse("more than 32 levels");
    skip_blanks();
    switch (peek()) {
      case '{':
        return read_object(level);
      case '[':
        return read_array(level);
      case '"':
        return Json::of(read_string());
      case 't':
        return read_word("true", Json::Kind::kBool);
      case 'f':
        return read_word("false", Json::Kind::kBool);
      case 'n':
        return read_word("null", Json::Kind::kNull);
      default:
        return read_number();
    }
  }

  Json read_object(int level) {
    Json value;
    value.kind_ = Json::Kind::kObject;
    ++position_;
    if (taken('}')) return value;
    do {
      skip_blanks();
      if (peek() != '"') refuse("a key without quotes");
      const std::string key = read_string();
      if (!taken(':')) refuse("no colon after a key");
      if (!value.members_.emplace(key, read(level + 1)).second) refuse("the key " + key + " twice");
    } while (taken(','));
    if (!taken('}')) refuse("an object without an end");
    return value;
  }

  Json read_array(int level) {
    Json value;
    value.kind_ = Json::Kind::kArray;
    ++position_;
    if (taken(']')) return value;
    do {
      value.items_.push_back(read(level + 1));
    } while (taken(','));
    if (!taken(']')) refuse("an array without an end");
    return value;
  }

  Json read_word(const char* word, Json::Kind kind) {
    Json value;
    value.kind_ = kind;
    value.text_ = word;
    if (text_.compare(position_, value.text_.size(), value.text_) != 0) refuse("an unknown word");
    position_ += value.text_.size();
    return value;
  }

  Json read_number() {
    const size_t start = position_;
    if (peek() == '-') ++position_;
    if (!is_digit(peek())) refuse("no value");
    if (peek() == '0') {
      ++position_;
    } else {
      skip_digits();
    }
    if (peek() == '.') ++position_, expect_digits();
    if (peek() == 'e' || peek() == 'E') {
      ++position_;
      if (peek() == '+' || peek() == '-') ++position_;
      expect_digits();
    }
    Json value;
    value.kind_ = Json::Kind::kNumber;
    value.text_ = text_.substr(start, position_ - start);
    return value;
  }

  std::string read_string() {
    std::string out;
    for (++position_; peek() != '"';) {
      if (position_ >= text_.size()) refuse("a string without an end");
      const char c = text_[position_++];
      if (static_cast<unsigned char>(c) < 0x20) refuse("a control character in a string");
      if (c == '\\') {
        read_escape(out);
      } else {
        out.push_back(c);
      }
    }
    ++position_;
    return out;
  }

  void read_escape(std::string& out) {
    static const std::string kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
    const char c = peek();
    ++position_;
    if (c == 'u') {
      uint32_t point = read_hex();
      if (point >= 0xD800 && point < 0xDC00) {
        if (text_.compare(position_, 2, "\\u") != 0) refuse("half a surrogate pair");
        position_ += 2;
        const uint32_t low = read_hex();
        if (low < 0xDC00 || low > 0xDFFF) refuse("half a surrogate pair");
        point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
      } else if (point >= 0xDC00 && point < 0xE000) {
        refuse("half a surrogate pair");
      }
      append_utf8(out, point);
      return;
    }
    const size_t index = c ? kNames.find(c) : std::string::npos;
    if (index == std::string::npos) refuse("an unknown escape in a string");
    out.push_back(kValues[index]);
  }

  uint32_t read_hex() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = peek();
      ++position_;
      const char lower = c >= 'A' && c <= 'F' ? static_cast<char>(c - 'A' + 'a') : c;
      if (!is_digit(c) && (lower < 'a' || lower > 'f')) refuse("an unknown escape in a string");
      value = value * 16 + static_cast<uint32_t>(is_digit(c) ? c - '0' : lower - 'a' + 10);
    }
    return value;
  }

  // The next character; 0 at the end, which no rule takes.
  char peek() const { return position_ < text_.size() ? text_[position_] : '\0'; }
  void skip_digits() {
    while (is_digit(peek())) ++position_;
  }
  void expect_digits() {
    if (!is_digit(peek())) refuse("a number without digits");
    skip_digits();
  }
  void skip_blanks() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t') ++position_;
  }
  bool taken(char c) {
    skip_blanks();
    if (peek() != c) return false;
    ++position_;
    return true;
  }

  const std::string& text_;
  size_t position_ = 0;
};

Json Json::of(const std::string& text) {
  Json value;
  value.kind_ = Kind::kString;
  value.text_ = text;
  return value;
}

Json Json::of(int64_t number) {
  Json value;
  value.kind_ = Kind::kNumber;
  value.text_ = std::to_string(number);
  return value;
}

Json Json::of(double number) {
  Json value;
  if (!std::isfinite(number)) return value;
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", number);
  value.kind_ = Kind::kNumber;
  value.text_ = text;
  return value;
}

Json Json::boolean(bool value) {
  Json made;
  made.kind_ = Kind::kBool;
  made.text_ = value ? "true" : "false";
  return made;
}

Json Json::object(std::map<std::string, Json> members) {
  Json value;
  value.kind_ = Kind::kObject;
  value.members_ = std::move(members);
  return value;
}

Json Json::array(std::vector<Json> items) {
  Json value;
  value.kind_ = Kind::kArray;
  value.items_ = std::move(items);
  return value;
}

Json Json::parse(const std::string& text) { return JsonReader(text).whole(); }

const std::string& Json::string() const {
  if (kind_ != Kind::kString) refuse("no string where one belongs");
  return text_;
}

int64_t Json::integer() const {
  if (kind_ != Kind::kNumber || text_.find_first_of(".eE") != std::string::npos) {
    refuse("no integer where one belongs");
  }
  errno = 0;
  const int64_t value = std::strtoll(text_.c_str(), nullptr, 10);
  if (errno) refuse("an integer of more than 64 bits");
  return value;
}

const std::vector<Json>& Json::items() const {
  if (kind_ != Kind::kArray) refuse("no array where one belongs");
  return items_;
}

const std::map<std::string, Json>& Json::members() const {
  if (kind_ != Kind::kObject) refuse("no object where one belongs");
  return members_;
}

const Json& Json::at(const std::string& key) const {
  const auto found = members().find(key);
  if (found == members().end()) refuse("no " + key);
  return found->second;
}

std::string Json::text() const {
  std::string out;
  write(out, 0);
  return out + "\n";
}

void Json::write(std::string& out, int level) const {
  const auto next_line = [&out](int depth) { out += "\n" + std::string(depth, ' '); };
  const char* separator = "";
  switch (kind_) {
    case Kind::kString:
      return write_string(out, text_);
    case Kind::kNull:
      out += "null";
      return;
    case Kind::kBool:
    case Kind::kNumber:
      out += text_;
      return;
    case Kind::kArray:
      out += "[";
      for (const Json& item : items_) {
        out += separator;
        next_line(level + 1);
        item.write(out, level + 1);
        separator = ",";
      }
      if (!items_.empty()) next_line(level);
      out += "]";
      return;
    case Kind::kObject:
      out += "{";
      for (const auto& [key, value] : members_) {
        out += separator;
        next_line(level + 1);
        write_string(out, key);
        out += ": ";
        value.write(out, level + 1);
        separator = ",";
      }
      if (!members_.empty()) next_line(level);
      out += "}";
      return;
  }
}

}  // namespace qvdit::runner
