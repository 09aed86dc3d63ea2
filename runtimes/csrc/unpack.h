// The canonical packing read back: the C++ twin of qvdit/contract/packing.py, for the host and the device.
//
// 32 values of b bits take b words. The stored code is q + 2^(b-1); value i has bits b·i … b·i + b - 1 of the row's
// little-endian bit string.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define QVDIT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QVDIT_HOST_DEVICE inline
#endif

namespace qvdit {

constexpr int kRowPad = 32;  // values; ROW_PAD of qvdit/contract/layer.py

QVDIT_HOST_DEVICE constexpr int64_t padded(int64_t k) { return (k + kRowPad - 1) / kRowPad * kRowPad; }

// Value i of 32 packed in words: -2^(b-1) … 2^(b-1) - 1. With i known at compile time this is a shift and a mask, two
// where the value crosses a word.
template <int kBits>
QVDIT_HOST_DEVICE int unpack_value(const uint32_t (&words)[kBits], int i) {
  const int bit = kBits * i, word = bit / 32, shift = bit % 32;
  uint32_t code = words[word] >> shift;
  if (shift + kBits > 32) code |= words[word + 1] << (32 - shift);
  return static_cast<int>(code & ((1u << kBits) - 1u)) - (1 << (kBits - 1));
}

}  // namespace qvdit
