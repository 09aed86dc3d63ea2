#include "residual_core.h"

namespace qvdit::trt {
namespace {

constexpr const char* kNames[kResidualInputs] = {"residual", "x", "gate"};

bool is_half(int32_t type) { return type == QVDIT_F16 || type == QVDIT_BF16; }

bool takes_input(int input, int32_t type) { return input == kAdded ? is_half(type) : type == QVDIT_F32; }

bool check_type(int input, int32_t type, Refusal& refusal) {
  return takes_input(input, type) ||
         refuse(refusal, "got %s of %s, expected %s: export the model again", kNames[input], type_name(type),
                input == kAdded ? "float16 or bfloat16" : "float32");
}

// Whether an input is as the residual is; a gate's rows are one for each [L, K] of it, or one for all.
bool check_shape(int input, const Tensor& tensor, const Tensor& residual, Refusal& refusal) {
  const int64_t* dims = tensor.dims;
  const bool same = tensor.rank == 3 && residual.rank == 3 && fits(dims[2], residual.dims[2]);
  const bool batch = fits(dims[0], residual.dims[0]);
  if (same && (input == kGate ? fits(dims[1], 1) && (batch || dims[0] == 1) : batch && fits(dims[1], residual.dims[1])))
    return true;
  return refuse(refusal, "got %s of %s for a residual of %s, expected %s: export the model again", kNames[input],
                shape_text(dims, tensor.rank).text, shape_text(residual.dims, residual.rank).text,
                input == kGate ? "[B, 1, K] or [1, 1, K] for [B, L, K]" : "[B, L, K]");
}

}  // namespace

int input_count(const ResidualAttributes& attributes) noexcept {
  return attributes.gated ? kResidualInputs : kResidualInputs - 1;
}

bool takes_type(const ResidualAttributes& attributes, int position, int32_t type, int32_t) noexcept {
  const int count = input_count(attributes);
  return position < count ? takes_input(position, type) : position == count && type == QVDIT_F32;
}

int32_t output_type(const ResidualAttributes&, int, int32_t) noexcept { return QVDIT_F32; }

int32_t assumed_type(const ResidualAttributes&, int input) noexcept { return input == kAdded ? QVDIT_F16 : QVDIT_F32; }

bool check_early_type(const ResidualAttributes& attributes, int32_t type, Refusal& refusal) noexcept {
  return check_types(attributes, &type, 1, refusal);
}

bool check_types(const ResidualAttributes& attributes, const int32_t* types, int count, Refusal& refusal) noexcept {
  for (int i = 0; i < count && i < input_count(attributes); ++i) {
    if (!check_type(i, types[i], refusal)) return false;
  }
  return true;
}

bool check_inputs(const ResidualAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept {
  if (count != input_count(attributes)) {
    return refuse(refusal, "got %d inputs, expected the %d that its attributes name: export the model again", count,
                  input_count(attributes));
  }
  const Tensor& residual = inputs[kResidual];
  for (int i = 0; i < count; ++i) {
    if (!check_type(i, inputs[i].type, refusal) || !check_shape(i, inputs[i], residual, refusal)) return false;
  }
  const int64_t leading = residual.dims[0], outer = attributes.swapped;
  return outer == 0 || leading == kUnknown || leading % outer == 0 ||
         refuse(refusal, "got a residual of %s, expected [B · %lld, L, K]: give it a video of the size it was made for",
                shape_text(residual.dims, residual.rank).text, static_cast<long long>(outer));
}

bool check_shapes(const ResidualAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept {
  if (!check_inputs(attributes, inputs, count, refusal)) return false;
  const int64_t* dims = inputs[kResidual].dims;
  int64_t rows;
  if (!__builtin_mul_overflow(dims[0], dims[1], &rows) && rows < INT32_MAX) return true;
  return refuse(refusal, "got a residual of %s, expected less than %d rows: lower the batch",
                shape_text(dims, inputs[kResidual].rank).text, INT32_MAX);
}

bool run(const ResidualAttributes& attributes, const Tensor* descriptions, const void* const* inputs,
         void* const* outputs, void*, void* stream, Refusal& refusal) noexcept {
  if (!check_shapes(attributes, descriptions, input_count(attributes), refusal)) return false;
  const int64_t* dims = descriptions[kResidual].dims;
  qvdit_gated_residual_args args = {};
  args.m = dims[0] * dims[1];
  args.k = dims[2];
  if (args.m == 0 || args.k == 0) return true;
  args.residual = static_cast<const float*>(inputs[kResidual]);
  args.x = inputs[kAdded];
  args.x_dtype = descriptions[kAdded].type;
  if (attributes.gated) {
    args.gate = static_cast<const float*>(inputs[kGate]);
    args.rows_per_gate = descriptions[kGate].dims[0] == 1 ? args.m : dims[1];
  }
  args.swapped = attributes.swapped;
  args.swapped_inner = attributes.swapped ? dims[1] : 0;
  args.y = static_cast<float*>(outputs[0]);
  return succeeded(qvdit_gated_residual(&args, stream), refusal);
}

}  // namespace qvdit::trt
