// A strict reader and a writer of safetensors files. Nothing in a file is ever executed, and no size in it is believed
// before it has been compared with the file's own.
//
// Format: 8 bytes, the header's length N, little-endian; N bytes of JSON, an object that begins with "{" and may be
// padded with blanks: name → {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__" → {string: string};
// then the data, without holes or overlaps.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "tensor.h"

namespace qvdit::runner {

class SafeTensors {
 public:
  // Reads the header and compares it with the file. Throws Error: a file that is missing, truncated or longer than it
  // says, a header of more than 100 MB, names that come twice, unknown types, and data with holes or overlaps.
  explicit SafeTensors(const std::string& path);

  const std::string& path() const { return path_; }
  std::vector<std::string> names() const;
  bool has(const std::string& name) const { return entries_.count(name) > 0; }
  const Shape& shape(const std::string& name) const { return entry(name).shape; }

  // Reads one tensor. Throws Error where there is none of this name.
  Tensor read(const std::string& name) const;

  // A value of the metadata. Throws Error where there is none.
  const std::string& metadata(const std::string& key) const;

 private:
  struct Entry {
    Type type;
    Shape shape;
    int64_t begin, end;  // bytes, from the data's start
  };

  void read_header();
  void check_layout() const;
  const Entry& entry(const std::string& name) const;
  [[noreturn]] void refuse(const std::string& why) const;

  std::string path_;
  int64_t start_ = 0;  // of the data
  int64_t bytes_ = 0;  // of the data
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

// Writes tensors, whole or not at all.
void write_safetensors(const std::string& path, const Tensors& tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace qvdit::runner
