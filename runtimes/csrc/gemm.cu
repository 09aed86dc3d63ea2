// qvdit_low_bit_gemm: checks the arguments and chooses the kernel.
#include "gemm.h"

namespace {

constexpr int kMaxRank = 32;
constexpr long long kMostRows = INT32_MAX - 256;  // and columns: those of a tile past the last have an int32 index too
constexpr int kSegmentStep = 128;                 // a tile must lie in one segment

bool on_multiple(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int32_t check(const qvdit_gemm_args& args) {
  const long long m = args.m, n = args.n, k_pad = args.k_pad, rank = args.rank;
  QVDIT_REQUIRE(m >= 1 && m <= kMostRows && n >= 1 && n <= kMostRows, "y of [%lld, %lld]; at most %lld of both", m, n,
                kMostRows);
  QVDIT_REQUIRE(k_pad >= 32 && k_pad % 32 == 0 && k_pad <= 1 << 20, "K_pad %lld; a multiple of 32", k_pad);
  QVDIT_REQUIRE(args.x_q && args.weight && args.y, "x_q, weight and y must be given");
  QVDIT_REQUIRE(args.y_dtype >= QVDIT_F32 && args.y_dtype <= QVDIT_S32, "y of type %d", args.y_dtype);
  QVDIT_REQUIRE(args.y_dtype == QVDIT_S32 || (args.scale && args.weight_scale), "scale and weight_scale must be given");
  QVDIT_REQUIRE(!args.zero || args.weight_sum, "zero needs weight_sum");
  QVDIT_REQUIRE(!args.weight_zero || args.row_sum, "weight_zero needs row_sum");
  QVDIT_REQUIRE(rank >= 0 && rank <= kMaxRank, "rank %lld; at most %d", rank, kMaxRank);
  QVDIT_REQUIRE(rank == 0 || (args.u && args.beta), "rank %lld needs u and beta", rank);
  QVDIT_REQUIRE(args.beta_dtype == QVDIT_F32 || args.beta_dtype == QVDIT_F16, "beta of type %d; float32 or float16",
                args.beta_dtype);
  const long long segment = args.segment;
  QVDIT_REQUIRE(segment == n || (segment >= kSegmentStep && segment % kSegmentStep == 0 && n % segment == 0),
                "segments of %lld columns, of %lld; multiples of %d that divide them", segment, n, kSegmentStep);
  QVDIT_REQUIRE(args.tile >= QVDIT_TILE_AUTO && args.tile <= QVDIT_TILE_WGMMA_128X96, "tile %d", args.tile);
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

// Whether a tile of so many columns lies in one segment.
bool in_one_segment(const qvdit_gemm_args& args, int columns) {
  return args.segment == args.n || args.segment % columns == 0;
}

#if defined(QVDIT_WITH_WGMMA)
int multiprocessors() {
  int device = 0, found = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
  }
  return found;
}

// How many tiles of 128 rows each of so many multiprocessors computes at most. Two of them are a cluster: CUTLASS takes
// an even number of rows of tiles.
int64_t waves(const qvdit_gemm_args& args, int columns, int processors) {
  const int64_t tiles = (args.m + 255) / 256 * 2 * ((args.n + columns - 1) / columns);
  return (tiles + processors - 1) / processors;
}

// A tile's time, relative, is its columns' times K, but the widest take least a column; what comes before the first
// product and after the last takes as long as kAround more of K. On an H200, 2026-11-28, bf16 out, rank 1, µs of tiles
// of 192 / 128 / 96 columns:
//
//   32768 x  1152 x  1152         66 / 71 / 76     512 x  1152 x  1152      8.5 / 6.4 / 5.6
//   32768 x  3456 x  1152      199 / 216 / 241     512 x  4608 x  1152      8.9 / 9.0 / 7.9
//   32768 x  4608 x  1152      254 / 279 / 306     512 x  8960 x  1536   14.8 / 14.9 / 13.1
//   32768 x  8960 x  1536      660 / 723 / 765     512 x  7680 x  1920   17.5 / 13.1 / 14.5
//   16384 x  7680 x  1920      346 / 375 / 382     512 x 12288 x  3072   28.5 / 29.7 / 29.2
//   32768 x  5120 x  5120   1325 / 1357 / 1435     512 x  3072 x 12288   46.5 / 33.4 / 27.3
//   32768 x  3072 x 12288   1882 / 1882 / 2028     512 x  5120 x  5120   23.4 / 28.6 / 22.5
//
// Of 24 such sizes 512 x 5120 x 5120 alone takes more than 1 % longer than with its fastest tile.
struct WgmmaTileTime {
  int tile, columns, time;
};
constexpr WgmmaTileTime kTileTimes[] = {
    {QVDIT_TILE_WGMMA_128X192, 192, 70}, {QVDIT_TILE_WGMMA_128X128, 128, 50}, {QVDIT_TILE_WGMMA_128X96, 96, 37}};
constexpr int64_t kAround = 600;

int fastest_wgmma(const qvdit_gemm_args& args) {
  int best = QVDIT_TILE_WGMMA_128X128;
  if (args.y_dtype == QVDIT_S32) return best;
  int64_t least = INT64_MAX;
  const int processors = multiprocessors();
  for (const WgmmaTileTime& each : kTileTimes) {
    const int64_t time = (waves(args, each.columns, processors) * args.k_pad + kAround) * each.time;
    if (in_one_segment(args, each.columns) && time < least) best = each.tile, least = time;
  }
  return best;
}
#endif

int choose_tile(const qvdit_gemm_args& args) {
#if defined(QVDIT_WITH_WGMMA)
  if (is_hopper() && suits_wgmma(args)) return fastest_wgmma(args);
#endif
  return QVDIT_TILE_MMA_128X128;  // on an H200 faster than 128x256 at every shape, and its tiles are more
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

int32_t run_wgmma(const qvdit_gemm_args& args, int columns, cudaStream_t stream) {
#if defined(QVDIT_WITH_WGMMA)
  if (!is_hopper()) return qvdit::fail(QVDIT_NO_KERNEL, "wgmma tiles run on Hopper only");
  QVDIT_REQUIRE(suits_wgmma(args),
                "wgmma tiles write 16-bit or int32 rows of a multiple of 16 bytes, not %lld of type %d",
                static_cast<long long>(args.n), args.y_dtype);
  const bool f16 = args.y_dtype == QVDIT_F16;
  if (args.y_dtype == QVDIT_S32) {
    QVDIT_REQUIRE(columns == 128, "tiles of %d columns are for 16-bit outputs, not for int32", columns);
    return qvdit::gemm_wgmma_128_s32(args, stream);
  }
  switch (columns) {
    case 96:
      return f16 ? qvdit::gemm_wgmma_96_f16(args, stream) : qvdit::gemm_wgmma_96_bf16(args, stream);
    case 192:
      return f16 ? qvdit::gemm_wgmma_192_f16(args, stream) : qvdit::gemm_wgmma_192_bf16(args, stream);
    default:
      return f16 ? qvdit::gemm_wgmma_128_f16(args, stream) : qvdit::gemm_wgmma_128_bf16(args, stream);
  }
#else
  (void)args, (void)columns, (void)stream;
  return qvdit::fail(QVDIT_NO_KERNEL, "this library was built without the wgmma kernels (no CUTLASS, or not for 90a)");
#endif
}

// Columns of its tiles.
int columns_of(int tile) {
  switch (tile) {
    case QVDIT_TILE_MMA_128X256:
      return 256;
    case QVDIT_TILE_WGMMA_128X192:
      return 192;
    case QVDIT_TILE_WGMMA_128X96:
      return 96;
    default:
      return 128;
  }
}

}  // namespace

extern "C" int32_t qvdit_low_bit_gemm(const qvdit_gemm_args* args, void* stream) {
  if (args->m == 0) return QVDIT_OK;  // whose pointers are null
  if (const int32_t status = check(*args)) return status;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int tile = args->tile == QVDIT_TILE_AUTO ? choose_tile(*args) : args->tile;
  const int columns = columns_of(tile);
  QVDIT_REQUIRE(in_one_segment(*args, columns), "segments of %lld columns with tiles of %d",
                static_cast<long long>(args->segment), columns);
  switch (tile) {
    case QVDIT_TILE_MMA_128X128:
      return run_mma(*args, false, on);
    case QVDIT_TILE_MMA_128X256:
      return run_mma(*args, true, on);
    default:
      return run_wgmma(*args, columns, on);
  }
}
