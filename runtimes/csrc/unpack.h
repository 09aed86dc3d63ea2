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

// The mask that keeps the first count of four bytes.
QVDIT_HOST_DEVICE uint32_t first_bytes(int count) {
  return count >= 4 ? ~0u : count <= 0 ? 0u : (1u << (8 * count)) - 1u;
}

// Codes 4 i … 4 i + 3 of those packed in words, a byte each; a code is its value + 2^(b-1). With i known at compile time
// six operations on words for the four, whatever the width.
template <int kBits, int kWords>
QVDIT_HOST_DEVICE uint32_t unpack_codes(const uint32_t (&words)[kWords], int i) {
  constexpr uint32_t kCodes = ((1u << kBits) - 1u) * 0x01010101u;
  const int bit = 4 * kBits * i, word = bit / 32, shift = bit % 32;
  uint32_t field = words[word] >> shift;
  if (shift + 4 * kBits > 32) field |= words[word + 1] << (32 - shift);
  const uint32_t pairs = (field & 0x0000ffffu) | ((field << (16 - 2 * kBits)) & 0xffff0000u);
  return ((pairs & 0x00ff00ffu) | ((pairs << (8 - kBits)) & 0xff00ff00u)) & kCodes;
}

// What is added to codes so that zero is taken from their values, byte by byte and modulo 256: the low seven bits by
// a sum, which no byte carries into the next, the top bit by an exclusive or.
template <int kBits>
struct CodeOffset {
  uint32_t low, top;

  explicit QVDIT_HOST_DEVICE CodeOffset(int zero) {
    const uint32_t byte = static_cast<uint32_t>(-(1 << (kBits - 1)) - zero) & 0xffu;
    low = (byte & 0x7fu) * 0x01010101u, top = (byte & 0x80u) * 0x01010101u;
  }

  // Four values less zero. Eight-bit codes take no zero: 128 alone is only the top bit.
  QVDIT_HOST_DEVICE uint32_t values(uint32_t codes) const { return (codes + low) ^ top; }
};

}  // namespace qvdit
