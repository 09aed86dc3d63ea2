// The kernels' interface: plain C launch functions, so that PyTorch (by ctypes), a TensorRT plugin and a C++ program
// can all use one library. No header of any of them is needed.
//
// Symbols: M rows, K input features, K_pad the next multiple of 32, N output features, R rank, T frames,
// P tokens per frame. Arrays are dense, row-major and in device memory unless said otherwise. A launch function checks
// its arguments, starts its kernel on the given stream and returns at once: it allocates nothing and waits for nothing,
// so it can be captured in a CUDA graph. Pointers that are null mean "absent" where that is said.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define QVDIT_API __attribute__((visibility("default")))
#else
#define QVDIT_API
#endif

// Changes whenever a struct or the meaning of a field does.
#define QVDIT_ABI 9

enum qvdit_status {
  QVDIT_OK = 0,
  QVDIT_INVALID = 1,    // an argument that no kernel takes
  QVDIT_NO_KERNEL = 2,  // no kernel in this library for the current device
  QVDIT_CUDA = 3,       // the CUDA runtime refused
};

enum qvdit_dtype { QVDIT_F32 = 0, QVDIT_F16 = 1, QVDIT_BF16 = 2, QVDIT_S32 = 3 };

enum qvdit_prologue {
  QVDIT_PLAIN = 0,      // x as it is
  QVDIT_LAYERNORM = 1,  // LayerNorm without weights, then adaLN: · (1 + scale) + shift
  QVDIT_GELU = 2,       // GELU, tanh approximation
};

enum qvdit_tile {
  QVDIT_TILE_AUTO = 0,           // chosen from the sizes and the device
  QVDIT_TILE_MMA_128X128 = 1,    // mma.sync, every device
  QVDIT_TILE_MMA_128X256 = 2,    // mma.sync, every device
  QVDIT_TILE_WGMMA_128X128 = 3,  // Hopper
  QVDIT_TILE_WGMMA_128X192 = 4,  // Hopper, y of 16 bits
  QVDIT_TILE_WGMMA_128X96 = 5,   // Hopper, y of 16 bits
};

// Steps 1 and 2 of LowBitLinear, and the input side of its low-rank term.
//
//   x̃   = FWHT(prologue(x) · inv_smooth)
//   x_q, scale, zero as qvdit/method/operator.py defines them, to the bit
//   u   = gain[frame] · scale · Σ_k (x_q - zero) alpha[r, k],  frame = (m / P) mod T
//
// Several linears that read the same x share one call: their alphas lie below each other, and each has its own gains.
//
// A row with a NaN or Inf in x̃ gets scale and u NaN, and integers that mean zero.
struct qvdit_quantize_args {
  const void* x;      // [M, K] of x_dtype
  int64_t m, k;       // K at most 16384
  int32_t x_dtype;    // QVDIT_F32, QVDIT_F16 or QVDIT_BF16
  int32_t prologue;   // enum qvdit_prologue
  int32_t act_bits;   // 8 or 6
  int32_t symmetric;  // 0 or 1

  const float* inv_smooth;  // [K] or null
  int64_t rotation;  // features a block of the Walsh-Hadamard transform: a power of two to 1024 that divides K; or 0

  const float*
      modulation_scale;  // [M / rows_per_modulation, K], rows modulation_stride apart, or null. QVDIT_LAYERNORM
  const float* modulation_shift;  // as modulation_scale, or null
  int64_t modulation_stride;      // floats between rows
  int64_t rows_per_modulation;    // rows of x that share a row of the modulation
  float epsilon;                  // of the LayerNorm

  int32_t frames;            // T
  const float* frame_gain;   // [R / ranks_per_gain, T] or null
  int64_t tokens_per_frame;  // P
  int64_t ranks_per_gain;    // rows of alpha that share a row of frame_gain
  const void* alpha;         // float16 [R, K]: transposed, for 16-byte loads along K. Or null
  int64_t rank;              // R, at most 32

  int8_t* x_q;         // [M, K_pad]. Symmetric: x_q; asymmetric: x_q - 128. Columns K … K_pad are 0
  float* scale;        // [M]
  int32_t* zero;       // [M]: the zero point of what is stored, z_x - 128; symmetric: null, or it is filled with 0
  float* u;            // [R, M], or null where rank is 0
  int32_t* row_sum;    // [M]: Σ_k (x_q - zero), exact; or null
  float* transformed;  // [M, K]: x̃, for tests; or null
};

// Canonically packed weights to int8, with the zero point subtracted where the difference fits: b < 8.
struct qvdit_unpack_args {
  const uint32_t* words;  // [N, b · K_pad / 32], as qvdit/contract/packing.py packs them; 16-byte aligned
  int64_t n, k;
  int32_t bits;         // b: 2, 3, 4, 6 or 8
  int32_t reserved;     // 0
  const int8_t* zero;   // [N] or null. Not subtracted for b = 8: give it to the GEMM
  int8_t* weight;       // [N, K_pad]. Columns K … K_pad are 0
  int32_t* weight_sum;  // [N]: Σ_k weight; or null
};

// Steps 3 and 4 on what the two functions above made.
//
//   acc = Σ_k (x_q - zero)(weight - weight_zero)
//       = Σ_k x_q weight - zero weight_sum - weight_zero row_sum                          int32, exact
//   y   = scale · (acc · weight_scale) + Σ_r u[n / segment · R + r, m] beta[r, n] + bias   float32, cast
//
// Several linears that read the same x are one GEMM: their weights lie below each other, and each has ``segment`` of
// the columns and its own R rows of u.
struct qvdit_gemm_args {
  const int8_t* x_q;     // [M, K_pad]
  const int8_t* weight;  // [N, K_pad]
  int64_t m, n, k_pad;   // K_pad a multiple of 32

  const float* scale;         // [M]
  const float* weight_scale;  // [N]

  const int32_t* zero;        // [M] or null; needs weight_sum
  const int32_t* weight_sum;  // [N] or null
  const int8_t* weight_zero;  // [N] or null; needs row_sum
  const int32_t* row_sum;     // [M] or null

  const float* u;     // [N / segment · R, M] or null
  const void* beta;   // [R, N] of beta_dtype, or null
  int64_t rank;       // R, at most 32
  int64_t segment;    // columns of a linear, a multiple of 128 that divides N; or N itself
  const float* bias;  // [N] or null

  void* y;             // [M, N] of y_dtype
  int32_t y_dtype;     // QVDIT_F32, QVDIT_F16, QVDIT_BF16; QVDIT_S32 gives acc itself, for tests
  int32_t tile;        // enum qvdit_tile
  int32_t beta_dtype;  // QVDIT_F32; or QVDIT_F16, as the contract stores it: faster of several ranks, slower of one
  int32_t reserved;    // 0
};

// softmax(scale · q kᵀ) v, head by head, without the scores ever in memory. q, k and v may be parts of one array: each says
// where its batches, rows and heads begin; the D values of a head are dense.
struct qvdit_attention_args {
  const void* q;  // [B, L, H, D] of dtype, in any order that strides tell; 16-byte aligned, as every head's values
  const void* k;  // [B, S, H, D]
  const void* v;  // [B, S, H, D]
  int64_t batch, heads, rows, keys;  // B, H, L, S
  int64_t head_size;                 // D: a multiple of 8 to 128
  int64_t q_batch, q_row, q_head;    // elements from one to the next, multiples of 8
  int64_t k_batch, k_row, k_head;
  int64_t v_batch, v_row, v_head;
  float scale;    // positive
  int32_t dtype;  // QVDIT_F16 or QVDIT_BF16
  void* y;        // [B, L, H · D] of dtype, dense; 16-byte aligned
};

// y = residual + gate · x, each a fused multiply-add in float32: what follows a layer in a block. Without a gate
// y = residual + x.
//
// swapped: rows (b, p, q) of [B, P, Q] become rows (b, q, p) of y, which is how a block's tokens are put in the order
// of the next one that attends along the other axis.
struct qvdit_gated_residual_args {
  const float* residual;  // [M, K]
  const void* x;          // [M, K] of x_dtype
  int64_t m, k;           // M below 2^31
  int32_t x_dtype;        // QVDIT_F16 or QVDIT_BF16
  int32_t reserved;       // 0
  const float* gate;      // [M / rows_per_gate, K] or null
  int64_t rows_per_gate;  // rows that share a row of the gate
  int64_t swapped;        // P, with Q in swapped_inner, where P · Q divides M; 0: rows stay where they are
  int64_t swapped_inner;  // Q
  float* y;               // [M, K]; may be residual where rows stay
};

// What went wrong in this thread's last call that did not return QVDIT_OK. Never null; valid until the next call.
QVDIT_API const char* qvdit_last_error(void);

// QVDIT_ABI of the library.
QVDIT_API int32_t qvdit_abi(void);

// Architectures with kernels in this library, as "80;90a".
QVDIT_API const char* qvdit_architectures(void);

// QVDIT_OK if the current device has kernels, else QVDIT_NO_KERNEL (or QVDIT_CUDA where there is no device at all).
QVDIT_API int32_t qvdit_check_device(void);

// stream: a cudaStream_t. Each returns an enum qvdit_status.
QVDIT_API int32_t qvdit_quantize_rows(const struct qvdit_quantize_args* args, void* stream);
QVDIT_API int32_t qvdit_unpack_weight(const struct qvdit_unpack_args* args, void* stream);
QVDIT_API int32_t qvdit_low_bit_gemm(const struct qvdit_gemm_args* args, void* stream);

// These three for one layer: each takes the pointers and sizes that the one before has. On Hopper and later weights are
// unpacked beside the quantizer rather than after it, so weight and weight_sum must be apart from all that the quantizer
// reads or writes. Where M is 0 nothing is done; where one of the three is refused, those before it have been started.
QVDIT_API int32_t qvdit_low_bit_linear(const struct qvdit_quantize_args* quantize,
                                       const struct qvdit_unpack_args* unpack, const struct qvdit_gemm_args* gemm,
                                       void* stream);

QVDIT_API int32_t qvdit_attention(const struct qvdit_attention_args* args, void* stream);
QVDIT_API int32_t qvdit_gated_residual(const struct qvdit_gated_residual_args* args, void* stream);

#ifdef __cplusplus
}
#endif
