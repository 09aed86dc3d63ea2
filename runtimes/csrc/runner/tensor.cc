#include "tensor.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "error.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are read as they lie in memory");

namespace qvdit::runner {
namespace {

struct TypeFacts {
  const char* name;
  int64_t bytes;
};
constexpr TypeFacts kTypes[] = {{"F16", 2}, {"BF16", 2}, {"F32", 4}, {"F64", 8}, {"I8", 1},
                                {"U8", 1},  {"I16", 2},  {"I32", 4}, {"I64", 8}, {"BOOL", 1}};

const TypeFacts& facts(Type type) { return kTypes[static_cast<int>(type)]; }

// Element i of raw data; memcpy, because a file may place it anywhere.
template <typename T>
T element(const Tensor& tensor, int64_t i) {
  T value;
  std::memcpy(&value, tensor.data.data() + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

float bfloat_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace

int64_t type_bytes(Type type) { return facts(type).bytes; }
const char* type_name(Type type) { return facts(type).name; }

int64_t element_count(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(count, extent, &count))
      throw std::overflow_error("a size that fits nowhere");
  }
  return count;
}

std::string shape_text(const Shape& shape) {
  std::string text;
  for (const int64_t extent : shape) text += (text.empty() ? "" : "x") + std::to_string(extent);
  return shape.empty() ? "scalar" : text;
}

Tensor::Tensor(Type type, Shape shape)
    : type(type), shape(std::move(shape)), data(static_cast<size_t>(element_count(this->shape) * type_bytes(type))) {}

Tensor Tensor::of(Shape shape, const std::vector<float>& values) {
  Tensor tensor(Type::kF32, std::move(shape));
  if (tensor.data.size() != values.size() * sizeof(float)) throw std::invalid_argument("values of another shape");
  if (!values.empty()) std::memcpy(tensor.data.data(), values.data(), tensor.data.size());
  return tensor;
}

std::vector<float> floats(const Tensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.size()));
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i);
    switch (tensor.type) {
      case Type::kF16:
        values[i] = half_to_float(element<uint16_t>(tensor, at));
        break;
      case Type::kBF16:
        values[i] = bfloat_to_float(element<uint16_t>(tensor, at));
        break;
      case Type::kF32:
        values[i] = element<float>(tensor, at);
        break;
      case Type::kF64:
        values[i] = static_cast<float>(element<double>(tensor, at));
        break;
      default:
        throw std::invalid_argument(std::string(type_name(tensor.type)) + " where floats belong");
    }
  }
  return values;
}

std::vector<int64_t> integers(const Tensor& tensor) {
  std::vector<int64_t> values(static_cast<size_t>(tensor.size()));
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i);
    switch (tensor.type) {
      case Type::kI8:
        values[i] = element<int8_t>(tensor, at);
        break;
      case Type::kU8:
      case Type::kBool:
        values[i] = element<uint8_t>(tensor, at);
        break;
      case Type::kI16:
        values[i] = element<int16_t>(tensor, at);
        break;
      case Type::kI32:
        values[i] = element<int32_t>(tensor, at);
        break;
      case Type::kI64:
        values[i] = element<int64_t>(tensor, at);
        break;
      default:
        throw std::invalid_argument(std::string(type_name(tensor.type)) + " where integers belong");
    }
  }
  return values;
}

Tensor cast(const Tensor& tensor, Type type) {
  if (tensor.type == type) return tensor;
  const std::vector<float> values = floats(tensor);
  if (type == Type::kF32) return Tensor::of(tensor.shape, values);
  if (type != Type::kF16 && type != Type::kBF16) {
    throw std::invalid_argument(std::string(type_name(type)) + " made of floats");
  }
  Tensor made(type, tensor.shape);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits = type == Type::kF16 ? float_to_half(values[i]) : float_to_bfloat(values[i]);
    std::memcpy(made.data.data() + 2 * i, &bits, 2);
  }
  return made;
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction | 1024), exponent - 25);
}

uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7E00;
  if (magnitude >= 65520.0f) return sign | 0x7C00;  // half a step above the largest, 65504
  // Units in the last place of the result: 2^-24 below the smallest normal number. The product is exact.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int last = magnitude < 6.103515625e-05f ? -24 : exponent - 11;
  const float rounded = std::nearbyint(std::ldexp(magnitude, -last));  // to even, the default mode
  const int units = static_cast<int>(rounded);
  if (last == -24) return static_cast<uint16_t>(sign | units);  // 1024 is the smallest normal number's own pattern
  return static_cast<uint16_t>(sign | (((last + 25 - 1) << 10) + units));
}

}  // namespace qvdit::runner
