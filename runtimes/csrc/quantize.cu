// qvdit_quantize_rows: checks the arguments and chooses the kernel.
#include <algorithm>

#include "quantize.cuh"

namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int32_t check(const qvdit_quantize_args& args) {
  const long long m = args.m, k = args.k, rank = args.rank;
  QVDIT_REQUIRE(args.x && args.x_q && args.scale, "x, x_q and scale must be given");
  QVDIT_REQUIRE(m >= 1 && m < INT32_MAX && k >= 1 && k <= qvdit::kMaxFeatures, "x of [%lld, %lld]; K may be 1 to %lld",
                m, k, static_cast<long long>(qvdit::kMaxFeatures));
  QVDIT_REQUIRE(args.x_dtype >= QVDIT_F32 && args.x_dtype <= QVDIT_BF16, "x of type %d; float32, float16 or bfloat16",
                args.x_dtype);
  QVDIT_REQUIRE(args.act_bits == 8 || args.act_bits == 6, "%d activation bits; 8 or 6", args.act_bits);
  QVDIT_REQUIRE(args.symmetric || args.zero, "asymmetric activations need zero");
  QVDIT_REQUIRE(rank >= 0 && rank <= qvdit::kMaxRank, "rank %lld; at most %d", rank, qvdit::kMaxRank);
  QVDIT_REQUIRE(rank == 0 || (args.alpha && args.u), "rank %lld needs alpha and u", rank);
  const long long tokens = args.tokens_per_frame, ranks = args.ranks_per_gain;
  QVDIT_REQUIRE(!args.frame_gain || (args.frames > 0 && tokens > 0 && tokens <= INT32_MAX),
                "a frame gain of %d frames with %lld tokens a frame", args.frames, tokens);
  QVDIT_REQUIRE(!args.frame_gain || rank == 0 || (ranks > 0 && rank % ranks == 0),
                "%lld ranks of %lld share a frame gain", ranks, rank);
  const long long rotation = args.rotation;
  QVDIT_REQUIRE(
      rotation == 0 ||
          (rotation > 0 && rotation <= qvdit::kMaxRotation && (rotation & (rotation - 1)) == 0 && k % rotation == 0),
      "a rotation of blocks of %lld; a power of two to %d that divides K = %lld", rotation, qvdit::kMaxRotation, k);
  QVDIT_REQUIRE(aligned(args.x_q), "x_q is not on a multiple of 16 bytes");
  const bool modulated = args.modulation_scale || args.modulation_shift;
  QVDIT_REQUIRE(!modulated || args.prologue == QVDIT_LAYERNORM, "a modulation without a LayerNorm");
  QVDIT_REQUIRE(args.prologue != QVDIT_LAYERNORM || args.rows_per_modulation > 0, "rows_per_modulation of %lld",
                static_cast<long long>(args.rows_per_modulation));
  return QVDIT_OK;
}

}  // namespace

namespace qvdit {

int dynamic_shared_limit(const void* kernel) {
  int device = 0, most = 0;
  cudaFuncAttributes declared = {};
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
                     cudaFuncGetAttributes(&declared, kernel) == cudaSuccess;
  if (!known) {
    cudaGetLastError();  // resident_blocks meets it again
    return 0;
  }
  return most - static_cast<int>(declared.sharedSizeBytes);
}

Multiprocessor multiprocessor(const void* kernel) {
  int device = 0, shared = 0, registers = 0;
  cudaFuncAttributes declared = {};
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&registers, cudaDevAttrMaxRegistersPerMultiprocessor, device) == cudaSuccess &&
      cudaFuncGetAttributes(&declared, kernel) == cudaSuccess;
  if (!known) {
    cudaGetLastError();  // resident_blocks meets it again
    return {};
  }
  return {registers / (32 * declared.numRegs), shared};
}

int32_t resident_blocks(const void* kernel, int threads, int shared, int most_shared, int& blocks) {
  constexpr int kAlwaysAllowed = 44 << 10;  // of the 48 KB that need no leave, beside what kernels declare themselves
  int device = 0, multiprocessors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess && most_shared > kAlwaysAllowed) {  // always the same: a smaller one would lower others'
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
  }
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
  if (error != cudaSuccess || each < 1) {
    cudaGetLastError();  // it is reported here, not by the next launch
    if (const int32_t status = qvdit_check_device()) return status;
    return fail(QVDIT_CUDA, "quantize_rows: %d bytes of shared memory for %d threads (%s)", shared, threads,
                error == cudaSuccess ? "no room" : cudaGetErrorString(error));
  }
  blocks = each * multiprocessors;
  return QVDIT_OK;
}

}  // namespace qvdit

extern "C" int32_t qvdit_quantize_rows(const qvdit_quantize_args* args, void* stream) {
  if (args->m == 0) return QVDIT_OK;  // whose pointers are null
  if (const int32_t status = check(*args)) return status;
  qvdit::QuantizeParams params;
  params.args = *args;
  params.k_pad = qvdit::padded(args->k);
  params.levels = static_cast<float>((1 << (args->act_bits - (args->symmetric ? 1 : 0))) - 1);
  params.levels_reciprocal = 1.f / params.levels;
  params.vectorized = args->k % qvdit::kVector == 0 && args->modulation_stride % 4 == 0 && aligned(args->x) &&
                      aligned(args->inv_smooth) && aligned(args->alpha) && aligned(args->modulation_scale) &&
                      aligned(args->modulation_shift);
  if (args->frame_gain) {
    params.tokens = qvdit::Divisor(static_cast<uint32_t>(args->tokens_per_frame));
    params.frames = qvdit::Divisor(static_cast<uint32_t>(args->frames));
    params.ranks = qvdit::Divisor(static_cast<uint32_t>(std::max<int64_t>(args->ranks_per_gain, 1)));
  }
  params.modulated = qvdit::Divisor(static_cast<uint32_t>(std::min<int64_t>(args->rows_per_modulation, INT32_MAX)));
  const bool as_it_is = args->prologue == QVDIT_PLAIN && !args->inv_smooth && args->rotation <= 1 && !args->transformed;
  if (as_it_is && params.vectorized && args->x_dtype != QVDIT_F32) {
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (args->rank <= 1) {
      return args->x_dtype == QVDIT_F16 ? qvdit::quantize_f16(params, on) : qvdit::quantize_bf16(params, on);
    }
    bool fits = false;
    const int32_t status = qvdit::quantize_groups(params, fits, on);
    if (fits) return status;
  }
  switch (args->prologue) {
    case QVDIT_PLAIN:
      return qvdit::quantize_plain(params, static_cast<cudaStream_t>(stream));
    case QVDIT_LAYERNORM:
      return qvdit::quantize_layernorm(params, static_cast<cudaStream_t>(stream));
    case QVDIT_GELU:
      return qvdit::quantize_gelu(params, static_cast<cudaStream_t>(stream));
    default:
      return qvdit::fail(QVDIT_INVALID, "prologue %d", args->prologue);
  }
}
