// qvdit_low_bit_gemm: checks the arguments and chooses the kernel.
#include "gemm.h"

namespace {

constexpr int kMaxRank = 32;
constexpr int kSegmentStep = 128;  // a tile must lie in one segment

bool on_multiple(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int32_t check(const qvdit_gemm_args& args) {
  const long long m = args.m, n = args.n, k_pad = args.k_pad, rank = args.rank;
  QVDIT_REQUIRE(m >= 1 && m < INT32_MAX && n >= 1 && n < INT32_MAX, "y of [%lld, %lld]", m, n);
  QVDIT_REQUIRE(k_pad >= 32 && k_pad % 32 == 0 && k_pad <= 1 << 20, "K_pad %lld; a multiple of 32", k_pad);
  QVDIT_REQUIRE(args.x_q && args.weight && args.y, "x_q, weight and y must be given");
  QVDIT_REQUIRE(args.y_dtype >= QVDIT_F32 && args.y_dtype <= QVDIT_S32, "y of type %d", args.y_dtype);
  QVDIT_REQUIRE(args.y_dtype == QVDIT_S32 || (args.scale && args.weight_scale), "scale and weight_scale must be given");
  QVDIT_REQUIRE(!args.zero || args.weight_sum, "zero needs weight_sum");
  QVDIT_REQUIRE(!args.weight_zero || args.row_sum, "weight_zero needs row_sum");
  QVDIT_REQUIRE(rank >= 0 && rank <= kMaxRank, "rank %lld; at most %d", rank, kMaxRank);
  QVDIT_REQUIRE(rank == 0 || (args.u && args.beta), "rank %lld needs u and beta", rank);
  const long long segment = args.segment;
  QVDIT_REQUIRE(segment == n || (segment >= kSegmentStep && segment % kSegmentStep == 0 && n % segment == 0),
                "segments of %lld columns, of %lld; multiples of %d that divide them", segment, n, kSegmentStep);
  QVDIT_REQUIRE(args.tile >= QVDIT_TILE_AUTO && args.tile <= QVDIT_TILE_WGMMA_128X256, "tile %d", args.tile);
  QVDIT_REQUIRE(on_multiple(args.x_q, 16) && on_multiple(args.weight, 16),
                "x_q or weight not on a multiple of 16 bytes");
  QVDIT_REQUIRE(on_multiple(args.y, 8) && on_multiple(args.weight_scale, 8) && on_multiple(args.weight_sum, 8) &&
                    on_multiple(args.weight_zero, 8) && on_multiple(args.beta, 8) && on_multiple(args.bias, 8),
                "y, weight_scale, weight_sum, weight_zero, beta or bias not on a multiple of 8 bytes");
  return QVDIT_OK;
}

#if defined(QVDIT_WITH_WGMMA)
bool is_hopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

// What TMA can write: rows of y on multiples of 16 bytes.
bool suits_wgmma(const qvdit_gemm_args& args) {
  const int64_t size = args.y_dtype == QVDIT_S32 ? 4 : 2;
  return args.y_dtype != QVDIT_F32 && args.n * size % 16 == 0 && on_multiple(args.y, 16);
}
#endif

// Whether a tile of 256 columns lies in one segment.
bool wide_fits(const qvdit_gemm_args& args) { return args.segment == args.n || args.segment % 256 == 0; }

// The tile for these sizes. Hopper, of what was measured on an H200 (TOP/s at 32768 rows, rank 1, 128x128 ping-pong
// against 128x256 cooperative): K 1152, N 3456: 819 / 781; K 4608, N 1152: 1429 / 1191; K 5120, N 5120: 1566 / 1158;
// K 8960, N 1536: 1497 / 1565. mma.sync: 128x128 was faster at every one of these, and its tiles are more.
int choose_tile(const qvdit_gemm_args& args) {
#if defined(QVDIT_WITH_WGMMA)
  constexpr int64_t kWideFromK = 8192;
  if (is_hopper() && suits_wgmma(args)) {
    const bool wide = args.k_pad >= kWideFromK && args.n >= 256 && wide_fits(args);
    return wide ? QVDIT_TILE_WGMMA_128X256 : QVDIT_TILE_WGMMA_128X128;
  }
#endif
  return QVDIT_TILE_MMA_128X128;
}

int32_t run_mma(const qvdit_gemm_args& args, bool wide, cudaStream_t stream) {
  switch (args.y_dtype) {
    case QVDIT_F32:
      return qvdit::gemm_mma_f32(args, wide, stream);
    case QVDIT_F16:
      return qvdit::gemm_mma_f16(args, wide, stream);
    case QVDIT_BF16:
      return qvdit::gemm_mma_bf16(args, wide, stream);
    default:
      return qvdit::gemm_mma_s32(args, wide, stream);
  }
}

int32_t run_wgmma(const qvdit_gemm_args& args, bool wide, cudaStream_t stream) {
#if defined(QVDIT_WITH_WGMMA)
  if (!is_hopper()) return qvdit::fail(QVDIT_NO_KERNEL, "wgmma tiles run on Hopper only");
  QVDIT_REQUIRE(suits_wgmma(args),
                "wgmma tiles write 16-bit or int32 rows of a multiple of 16 bytes, not %lld of type %d",
                static_cast<long long>(args.n), args.y_dtype);
  switch (args.y_dtype) {
    case QVDIT_F16:
      return wide ? qvdit::gemm_wgmma_128x256_f16(args, stream) : qvdit::gemm_wgmma_128x128_f16(args, stream);
    case QVDIT_BF16:
      return wide ? qvdit::gemm_wgmma_128x256_bf16(args, stream) : qvdit::gemm_wgmma_128x128_bf16(args, stream);
    default:
      return wide ? qvdit::gemm_wgmma_128x256_s32(args, stream) : qvdit::gemm_wgmma_128x128_s32(args, stream);
  }
#else
  (void)args, (void)wide, (void)stream;
  return qvdit::fail(QVDIT_NO_KERNEL, "this library was built without the wgmma kernels (no CUTLASS, or not for 90a)");
#endif
}

}  // namespace

extern "C" int32_t qvdit_low_bit_gemm(const qvdit_gemm_args* args, void* stream) {
  if (args->m == 0) return QVDIT_OK;  // whose pointers are null
  if (const int32_t status = check(*args)) return status;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int tile = args->tile == QVDIT_TILE_AUTO ? choose_tile(*args) : args->tile;
  QVDIT_REQUIRE(tile == QVDIT_TILE_MMA_128X128 || tile == QVDIT_TILE_WGMMA_128X128 || wide_fits(*args),
                "segments of %lld columns with tiles of 256", static_cast<long long>(args->segment));
  switch (tile) {
    case QVDIT_TILE_MMA_128X128:
      return run_mma(*args, false, on);
    case QVDIT_TILE_MMA_128X256:
      return run_mma(*args, true, on);
    case QVDIT_TILE_WGMMA_128X128:
      return run_wgmma(*args, false, on);
    default:
      return run_wgmma(*args, true, on);
  }
}
