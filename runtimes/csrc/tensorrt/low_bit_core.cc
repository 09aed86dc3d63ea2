#include "low_bit_core.h"

#include "../unpack.h"

namespace qvdit::trt {
namespace {

bool check_type(const InputPort& port, int32_t type, Refusal& refusal) {
  if (port.type == kOtherType) {
    return is_float(type) ||
           refuse(refusal, "got x of %s, expected float16, bfloat16 or float32: cast it", type_name(type));
  }
  return type == port.type || refuse(refusal, "got %s of %s, expected %s: export the model again", port.name,
                                     type_name(type), type_name(port.type));
}

bool check_x(const LowBitAttributes& attributes, const Tensor& x, Refusal& refusal) {
  if (x.rank < 2 || x.rank > kMaxDims || !fits(x.dims[x.rank - 1], attributes.in_features)) {
    return refuse(refusal, "got x of %s, expected [..., L, %d]: give it the layer's input",
                  shape_text(x.dims, x.rank).text, attributes.in_features);
  }
  return true;
}

bool check_constant(const InputPort& port, const Tensor& tensor, Refusal& refusal) {
  bool same = tensor.rank == port.rank;
  for (int i = 0; same && i < port.rank; ++i) same = fits(tensor.dims[i], port.dims[i]);
  if (same) return true;
  return refuse(refusal, "got %s of %s, expected %s: export the model again", port.name,
                shape_text(tensor.dims, tensor.rank).text, shape_text(port.dims, port.rank).text);
}

bool is_layernorm(const LowBitAttributes& attributes) { return attributes.prologue == QVDIT_LAYERNORM; }

// Whether a modulation of G rows belongs to x. Scale and shift share rows_per_modulation, so both are to have the same.
bool check_modulation(const Tensor* inputs, Refusal& refusal) {
  const Tensor &x = inputs[kX], &scale = inputs[kModulationScale], &shift = inputs[kModulationShift];
  const int64_t rows = scale.dims[0];
  if (fits(shift.dims[0], rows) && (fits(rows, 1) || (x.rank == 3 && fits(x.dims[0], rows)))) return true;
  return refuse(refusal,
                "got modulations of %s and %s for x of %s, expected [G, 1, K] for [G, L, K], or [1, 1, K]: export the "
                "model again",
                shape_text(scale.dims, scale.rank).text, shape_text(shift.dims, shift.rank).text,
                shape_text(x.dims, x.rank).text);
}

// 8-bit weights take no zero points: a difference of two 8-bit integers needs 9 bits.
bool zeros_apart(const LowBitAttributes& attributes) { return attributes.has_zero && attributes.weight_bits == 8; }

// One rank is read faster as float32, several as float16.
int32_t beta_type(const LowBitAttributes& attributes) { return attributes.rank > 1 ? QVDIT_F16 : QVDIT_F32; }

// Where everything is: pointers by role, null where absent.
struct Memory {
  const void* input[kInputs] = {};
  void* output[kOutputs] = {};
  void* piece[kPieces] = {};

  const float* floats(Input role) const { return static_cast<const float*>(input[role]); }
};

Memory memory_of(const LowBitAttributes& attributes, int64_t rows, const void* const* inputs, void* const* outputs,
                 void* workspace) {
  Memory memory;
  const InputPorts ports = input_ports(attributes);
  for (int i = 0; i < ports.count; ++i) memory.input[ports.port[i].input] = inputs[i];
  for (int i = 0; i < output_count(attributes); ++i) memory.output[i] = outputs[i];
  const Workspace layout = workspace_of(attributes, rows);
  const uintptr_t base = (reinterpret_cast<uintptr_t>(workspace) + kAlignment - 1) / kAlignment * kAlignment;
  for (int i = 0; i < kPieces; ++i) {
    if (layout.offset[i] >= 0) memory.piece[i] = reinterpret_cast<void*>(base + layout.offset[i]);
  }
  if (attributes.test_outputs) {
    memory.piece[kPieceXq] = memory.output[kXq];
    memory.piece[kPieceScale] = memory.output[kScale];
    memory.piece[kPieceZero] = memory.output[kZero];
  }
  return memory;
}

qvdit_unpack_args unpack_args(const LowBitAttributes& attributes, const Memory& memory) {
  qvdit_unpack_args args = {};
  args.words = static_cast<const uint32_t*>(memory.input[kWords]);
  args.n = attributes.out_features;
  args.k = attributes.in_features;
  args.bits = attributes.weight_bits;
  args.zero = static_cast<const int8_t*>(memory.input[kWeightZero]);
  args.weight = static_cast<int8_t*>(memory.piece[kPieceWeight]);
  args.weight_sum = static_cast<int32_t*>(memory.piece[kPieceWeightSum]);
  return args;
}

qvdit_quantize_args quantize_args(const LowBitAttributes& attributes, const Memory& memory, const Tensor* inputs,
                                  int64_t rows, int64_t tokens) {
  const Tensor& x = inputs[kX];
  qvdit_quantize_args args = {};
  args.x = memory.input[kX];
  args.m = rows;
  args.k = attributes.in_features;
  args.x_dtype = x.type;
  args.prologue = attributes.prologue;
  args.act_bits = attributes.act_bits;
  args.symmetric = attributes.act_symmetric;
  args.inv_smooth = memory.floats(kInvSmooth);
  args.rotation = attributes.rotation;
  if (is_layernorm(attributes)) {
    args.modulation_scale = memory.floats(kModulationScale);
    args.modulation_shift = memory.floats(kModulationShift);
    args.modulation_stride = attributes.in_features;
    args.rows_per_modulation = inputs[kModulationScale].dims[0] == 1 ? rows : x.dims[x.rank - 2];
    args.epsilon = float_of(attributes.epsilon);
  }
  args.frames = attributes.frames;
  args.frame_gain = memory.floats(kFrameGain);
  args.tokens_per_frame = tokens;
  args.ranks_per_gain = attributes.rank;
  args.alpha = memory.input[kAlpha];
  args.rank = static_cast<int64_t>(segments(attributes)) * attributes.rank;
  args.x_q = static_cast<int8_t*>(memory.piece[kPieceXq]);
  args.scale = static_cast<float*>(memory.piece[kPieceScale]);
  args.zero = static_cast<int32_t*>(memory.piece[kPieceZero]);
  args.u = static_cast<float*>(memory.piece[kPieceU]);
  args.row_sum = static_cast<int32_t*>(memory.piece[kPieceRowSum]);
  return args;
}

qvdit_gemm_args gemm_args(const LowBitAttributes& attributes, const Memory& memory, int64_t rows) {
  qvdit_gemm_args args = {};
  args.x_q = static_cast<const int8_t*>(memory.piece[kPieceXq]);
  args.weight = static_cast<const int8_t*>(memory.piece[kPieceWeight]);
  args.m = rows;
  args.n = attributes.out_features;
  args.k_pad = padded(attributes.in_features);
  args.scale = static_cast<const float*>(memory.piece[kPieceScale]);
  args.weight_scale = memory.floats(kWeightScale);
  if (!attributes.act_symmetric) {
    args.zero = static_cast<const int32_t*>(memory.piece[kPieceZero]);
    args.weight_sum = static_cast<const int32_t*>(memory.piece[kPieceWeightSum]);
  }
  if (zeros_apart(attributes)) {
    args.weight_zero = static_cast<const int8_t*>(memory.input[kWeightZero]);
    args.row_sum = static_cast<const int32_t*>(memory.piece[kPieceRowSum]);
  }
  args.u = static_cast<const float*>(memory.piece[kPieceU]);
  args.beta = memory.input[kBeta];
  args.beta_dtype = beta_type(attributes);
  args.rank = attributes.rank;
  args.segment = attributes.segment;
  args.bias = memory.floats(kBias);
  args.y = memory.output[kY];
  args.y_dtype = attributes.y_type;
  args.tile = QVDIT_TILE_AUTO;
  return args;
}

}  // namespace

InputPorts input_ports(const LowBitAttributes& attributes) noexcept {
  const int64_t k = attributes.in_features, n = attributes.out_features, r = attributes.rank, s = segments(attributes);
  InputPorts ports = {};
  const auto add = [&ports](bool present, const InputPort& port) {
    if (present) ports.port[ports.count++] = port;
  };
  const bool layernorm = is_layernorm(attributes);
  // Not half-precision: TensorRT 8.6 would be free to narrow a residual stream that is float32 to hold what it holds.
  add(true, {kX, "x", layernorm ? static_cast<int32_t>(QVDIT_F32) : kOtherType, 2, {kUnknown, kUnknown}});
  add(layernorm, {kModulationScale, "modulation_scale", QVDIT_F32, 3, {kUnknown, 1, k}});
  add(layernorm, {kModulationShift, "modulation_shift", QVDIT_F32, 3, {kUnknown, 1, k}});
  add(true, {kWords, "words", QVDIT_S32, 2, {n, attributes.weight_bits * padded(k) / 32}});
  add(true, {kWeightScale, "weight_scale", QVDIT_F32, 1, {n, 0}});
  add(attributes.has_zero, {kWeightZero, "weight_zero", QVDIT_S32, 1, {(n + 3) / 4, 0}});
  add(attributes.has_bias, {kBias, "bias", QVDIT_F32, 1, {n, 0}});
  add(attributes.has_smooth, {kInvSmooth, "inv_smooth", QVDIT_F32, 1, {k, 0}});
  add(r > 0, {kAlpha, "alpha", QVDIT_F16, 2, {s * r, k}});
  add(r > 0, {kBeta, "beta", beta_type(attributes), 2, {r, n}});
  add(attributes.frames > 0, {kFrameGain, "frame_gain", QVDIT_F32, 2, {s, attributes.frames}});
  return ports;
}

int output_count(const LowBitAttributes& attributes) noexcept { return attributes.test_outputs ? kOutputs : 1; }

OutputPort output_port(const LowBitAttributes& attributes, int output) noexcept {
  switch (output) {
    case kXq:
      return {QVDIT_S32, padded(attributes.in_features) / 4};
    case kScale:
      return {QVDIT_F32, 0};
    case kZero:
      return {QVDIT_S32, 0};
    case kAcc:
      return {QVDIT_S32, attributes.out_features};
    default:
      return {attributes.y_type, attributes.out_features};
  }
}

int input_count(const LowBitAttributes& attributes) noexcept { return input_ports(attributes).count; }

bool takes_type(const LowBitAttributes& attributes, int position, int32_t type, int32_t) noexcept {
  const InputPorts ports = input_ports(attributes);
  if (position < ports.count) {
    const int32_t wanted = ports.port[position].type;
    return wanted == kOtherType ? is_float(type) : type == wanted;
  }
  const int output = position - ports.count;
  return output < output_count(attributes) && type == output_port(attributes, output).type;
}

int32_t output_type(const LowBitAttributes& attributes, int output, int32_t) noexcept {
  return output_port(attributes, output).type;
}

int32_t assumed_type(const LowBitAttributes& attributes, int input) noexcept {
  const InputPorts ports = input_ports(attributes);
  const int32_t wanted = input < ports.count ? ports.port[input].type : kOtherType;
  return wanted == kOtherType ? static_cast<int32_t>(QVDIT_F32) : wanted;
}

bool check_early_type(const LowBitAttributes& attributes, int32_t type, Refusal& refusal) noexcept {
  return check_types(attributes, &type, 1, refusal);
}

bool check_types(const LowBitAttributes& attributes, const int32_t* types, int count, Refusal& refusal) noexcept {
  const InputPorts ports = input_ports(attributes);
  for (int i = 0; i < count && i < ports.count; ++i) {
    if (!check_type(ports.port[i], types[i], refusal)) return false;
  }
  return true;
}

bool check_inputs(const LowBitAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept {
  const InputPorts ports = input_ports(attributes);
  if (count != ports.count) {
    return refuse(refusal, "got %d inputs, expected the %d that its attributes name: export the model again", count,
                  ports.count);
  }
  for (int i = 0; i < count; ++i) {
    const InputPort& port = ports.port[i];
    if (!check_type(port, inputs[i].type, refusal)) return false;
    if (!(i == kX ? check_x(attributes, inputs[i], refusal) : check_constant(port, inputs[i], refusal))) return false;
  }
  return !is_layernorm(attributes) || check_modulation(inputs, refusal);
}

int64_t row_count(const Tensor& x) noexcept {
  bool fits_64 = true, empty = false;
  int64_t rows = 1;
  for (int i = 0; i + 1 < x.rank; ++i) {
    empty = empty || x.dims[i] <= 0;
    fits_64 = fits_64 && !__builtin_mul_overflow(rows, x.dims[i], &rows);
  }
  return empty ? 0 : fits_64 ? rows : INT64_MAX;
}

bool tokens_per_frame(const LowBitAttributes& attributes, int64_t length, int64_t& tokens, Refusal& refusal) noexcept {
  tokens = 1;
  if (attributes.frames == 0 || length == 0) return true;
  if (attributes.rows == kRowsSpatial) tokens = length;
  if (attributes.rows != kRowsSequence) return true;
  if (length % attributes.frames) {
    return refuse(
        refusal,
        "got a sequence of %lld tokens, expected %d frames of one size: give it a video of that many frames, or "
        "export for another number",
        static_cast<long long>(length), attributes.frames);
  }
  tokens = length / attributes.frames;
  return true;
}

bool check_shapes(const LowBitAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept {
  if (!check_inputs(attributes, inputs, count, refusal)) return false;
  const Tensor& x = inputs[kX];
  const int64_t rows = row_count(x);
  if (rows >= INT32_MAX) {
    return refuse(refusal, "got x of %s, expected less than %d rows: lower the batch", shape_text(x.dims, x.rank).text,
                  INT32_MAX);
  }
  int64_t tokens;
  return tokens_per_frame(attributes, x.dims[x.rank - 2], tokens, refusal);
}

Workspace workspace_of(const LowBitAttributes& attributes, int64_t rows) noexcept {
  if (rows > INT32_MAX) rows = INT32_MAX;  // more are refused
  const int64_t n = attributes.out_features, k_pad = padded(attributes.in_features);
  const int64_t ranks = static_cast<int64_t>(segments(attributes)) * attributes.rank;
  const bool own = !attributes.test_outputs, asymmetric = !attributes.act_symmetric;
  int64_t bytes[kPieces];
  bytes[kPieceWeight] = n * k_pad;
  bytes[kPieceWeightSum] = asymmetric ? 4 * n : 0;
  bytes[kPieceXq] = own ? rows * k_pad : 0;
  bytes[kPieceScale] = own ? 4 * rows : 0;
  bytes[kPieceZero] = own && asymmetric ? 4 * rows : 0;
  bytes[kPieceU] = 4 * ranks * rows;
  bytes[kPieceRowSum] = zeros_apart(attributes) ? 4 * rows : 0;
  Workspace layout;
  int64_t end = 0;
  for (int i = 0; i < kPieces; ++i) {
    layout.offset[i] = bytes[i] ? end : -1;
    end += (bytes[i] + kAlignment - 1) / kAlignment * kAlignment;
  }
  layout.bytes = end + kAlignment;
  return layout;
}

int64_t workspace_bytes(const LowBitAttributes& attributes, const Tensor* inputs) noexcept {
  return workspace_of(attributes, row_count(inputs[kX])).bytes;
}

bool run(const LowBitAttributes& attributes, const Tensor* descriptions, const void* const* inputs,
         void* const* outputs, void* workspace, void* stream, Refusal& refusal) noexcept {
  if (!check_shapes(attributes, descriptions, input_ports(attributes).count, refusal)) return false;
  const Tensor& x = descriptions[kX];
  const int64_t rows = row_count(x);
  if (rows == 0) return true;
  int64_t tokens;
  if (!tokens_per_frame(attributes, x.dims[x.rank - 2], tokens, refusal)) return false;
  const Memory memory = memory_of(attributes, rows, inputs, outputs, workspace);

  const qvdit_quantize_args quantize = quantize_args(attributes, memory, descriptions, rows, tokens);
  const qvdit_unpack_args unpack = unpack_args(attributes, memory);
  qvdit_gemm_args gemm = gemm_args(attributes, memory, rows);
  if (!succeeded(qvdit_low_bit_linear(&quantize, &unpack, &gemm, stream), refusal)) return false;
  if (!attributes.test_outputs) return true;
  gemm.y = memory.output[kAcc];
  gemm.y_dtype = QVDIT_S32;
  return succeeded(qvdit_low_bit_gemm(&gemm, stream), refusal);
}

}  // namespace qvdit::trt
