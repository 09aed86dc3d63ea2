#include "safetensors.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "error.h"
#include "files.h"
#include "json.h"

namespace qvdit::runner {
namespace {

constexpr int64_t kPrefix = 8;
constexpr int64_t kLargestHeader = 100'000'000;  // safetensors' own limit
constexpr char kMetadata[] = "__metadata__";

Type parse_type(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(Type::kBool); ++i) {
    if (name == type_name(static_cast<Type>(i))) return static_cast<Type>(i);
  }
  throw std::invalid_argument("the type " + name);
}

}  // namespace

SafeTensors::SafeTensors(const std::string& path) : path_(path) {
  if (!is_file(path)) throw Error("no file " + path, "a safetensors file", "check the path, or copy it again");
  try {
    read_header();
    check_layout();
  } catch (const std::logic_error& error) {  // Json's
    refuse(error.what());
  } catch (const std::overflow_error& error) {
    refuse(error.what());
  }
}

void SafeTensors::read_header() {
  const int64_t size = file_size(path_);
  std::ifstream file(path_, std::ios::binary);
  uint64_t length = 0;
  if (size < kPrefix || !file.read(reinterpret_cast<char*>(&length), kPrefix)) refuse("shorter than its first field");
  if (length > static_cast<uint64_t>(std::min(size - kPrefix, kLargestHeader))) refuse("a header longer than the file");
  std::string header(static_cast<size_t>(length), '\0');
  if (!file.read(header.data(), static_cast<std::streamsize>(length))) refuse("a header that cannot be read");
  if (header.empty() || header[0] != '{') refuse("a header that is no object");
  start_ = kPrefix + static_cast<int64_t>(length);
  bytes_ = size - start_;
  const Json parsed = Json::parse(header);
  for (const auto& [name, value] : parsed.members()) {
    if (name == kMetadata) {
      for (const auto& [key, text] : value.members()) metadata_[key] = text.string();
      continue;
    }
    if (value.members().size() != 3) refuse("other fields than dtype, shape and data_offsets");
    Entry entry;
    entry.type = parse_type(value.at("dtype").string());
    for (const Json& extent : value.at("shape").items()) entry.shape.push_back(extent.integer());
    const std::vector<Json>& offsets = value.at("data_offsets").items();
    if (offsets.size() != 2) refuse("data_offsets that are no pair");
    entry.begin = offsets[0].integer();
    entry.end = offsets[1].integer();
    entries_.emplace(name, entry);
  }
}

void SafeTensors::check_layout() const {
  std::vector<const Entry*> order;
  for (const auto& [name, entry] : entries_) {
    // One dimension more: what element_count refuses of the bytes, no tensor has.
    Shape bytes = entry.shape;
    bytes.push_back(type_bytes(entry.type));
    if (entry.begin < 0 || entry.end < entry.begin || entry.end > bytes_) refuse(name + " outside the file");
    if (entry.end - entry.begin != element_count(bytes)) refuse(name + " with bytes for another shape");
    order.push_back(&entry);
  }
  std::sort(order.begin(), order.end(), [](const Entry* a, const Entry* b) {
    return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
  });
  int64_t next = 0;
  for (const Entry* entry : order) {
    if (entry->begin != next) refuse(entry->begin < next ? "tensors that overlap" : "holes between its tensors");
    next = entry->end;
  }
  if (next != bytes_)
    refuse(std::to_string(bytes_) + " bytes of data where its header tells of " + std::to_string(next));
}

std::vector<std::string> SafeTensors::names() const {
  std::vector<std::string> found;
  for (const auto& [name, entry] : entries_) found.push_back(name);
  return found;
}

Tensor SafeTensors::read(const std::string& name) const {
  const Entry& found = entry(name);
  Tensor tensor(found.type, found.shape);
  std::ifstream file(path_, std::ios::binary);
  file.seekg(start_ + found.begin);
  if (!file.read(reinterpret_cast<char*>(tensor.data.data()), static_cast<std::streamsize>(tensor.data.size()))) {
    refuse(name + " that cannot be read");
  }
  return tensor;
}

const std::string& SafeTensors::metadata(const std::string& key) const {
  const auto found = metadata_.find(key);
  if (found == metadata_.end()) refuse("no " + key + " in its metadata");
  return found->second;
}

const SafeTensors::Entry& SafeTensors::entry(const std::string& name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end())
    throw Error(path_ + " without " + name, "the files of one export", "copy the folder again");
  return found->second;
}

void SafeTensors::refuse(const std::string& why) const {
  throw Error(path_ + ", which is damaged (" + why + ")", "a whole safetensors file", "copy it again");
}

void write_safetensors(const std::string& path, const Tensors& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::map<std::string, Json> header;
  int64_t next = 0;
  for (const auto& [name, tensor] : tensors) {
    const int64_t end = next + static_cast<int64_t>(tensor.data.size());
    std::vector<Json> shape;
    for (const int64_t extent : tensor.shape) shape.push_back(Json::of(extent));
    header[name] = Json::object({{"dtype", Json::of(std::string(type_name(tensor.type)))},
                                 {"shape", Json::array(shape)},
                                 {"data_offsets", Json::array({Json::of(next), Json::of(end)})}});
    next = end;
  }
  std::map<std::string, Json> texts;
  for (const auto& [key, text] : metadata) texts[key] = Json::of(text);
  if (!texts.empty()) header[kMetadata] = Json::object(texts);
  std::string text = Json::object(header).text();
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  std::string file(kPrefix, '\0');
  std::memcpy(file.data(), &length, kPrefix);
  file += text;
  for (const auto& [name, tensor] : tensors) {
    file.append(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size());
  }
  write_file(path, file.data(), file.size());
}

}  // namespace qvdit::runner
