// Dense arrays in host memory, in the types that parity files, plans and engines have.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace qvdit::runner {

enum class Type { kF16, kBF16, kF32, kF64, kI8, kU8, kI16, kI32, kI64, kBool };

int64_t type_bytes(Type type);
const char* type_name(Type type);  // safetensors'

using Shape = std::vector<int64_t>;

// The product of the extents. Throws std::overflow_error where an extent is negative or the product does not fit.
int64_t element_count(const Shape& shape);

// As "2x3x16"; "scalar" for none.
std::string shape_text(const Shape& shape);

struct Tensor {
  Type type = Type::kF32;
  Shape shape;
  std::vector<uint8_t> data;  // element_count · type_bytes, little-endian

  Tensor() = default;
  Tensor(Type type, Shape shape);  // of zeros

  int64_t size() const { return element_count(shape); }

  static Tensor of(Shape shape, const std::vector<float>& values);
};

using Tensors = std::map<std::string, Tensor>;

// Values of a floating-point type as float32 (float64 is rounded). Throws std::invalid_argument for any other.
std::vector<float> floats(const Tensor& tensor);
// Values of an integer type, or of booleans. Throws std::invalid_argument for any other.
std::vector<int64_t> integers(const Tensor& tensor);
// A tensor of floating-point values in another floating-point type, rounded to nearest even.
Tensor cast(const Tensor& tensor, Type type);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

}  // namespace qvdit::runner
