#include "attention_core.h"

namespace qvdit::trt {
namespace {

constexpr int64_t kBytes = 2;  // of an element of either type

bool is_half(int32_t type) { return type == QVDIT_F16 || type == QVDIT_BF16; }

// An input, and what it holds side by side.
struct AttentionPort {
  const char* name;
  int32_t parts;
  bool heads_first;
};

AttentionPort port_of(const AttentionAttributes& attributes, int input) {
  if (attributes.packed == kPackedQKV) return {"qkv", 3, false};
  if (input == 0) return {"q", 1, attributes.q_layout != 0};
  if (attributes.packed == kPackedKV) return {"kv", 2, false};
  return input == 1 ? AttentionPort{"k", 1, attributes.k_layout != 0} : AttentionPort{"v", 1, attributes.v_layout != 0};
}

int rows_at(const AttentionPort& port) { return port.heads_first ? 2 : 1; }

bool check_type(const AttentionPort& port, int32_t type, int32_t first, Refusal& refusal) {
  if (!is_half(type)) {
    return refuse(refusal, "got %s of %s, expected float16 or bfloat16: leave this attention to TensorRT", port.name,
                  type_name(type));
  }
  return type == first || refuse(refusal, "got %s of %s beside %s, expected one type: export the model again",
                                 port.name, type_name(type), type_name(first));
}

bool check_shape(const AttentionAttributes& attributes, const AttentionPort& port, const Tensor& tensor,
                 Refusal& refusal) {
  const int64_t heads = attributes.heads, size = attributes.head_size;
  const int64_t* dims = tensor.dims;
  if (tensor.rank == 3 && !port.heads_first && fits(dims[2], port.parts * heads * size)) return true;
  const bool whole = tensor.rank == 4 && port.parts == 1;
  if (whole && fits(dims[port.heads_first ? 1 : 2], heads) && fits(dims[3], size)) return true;
  const char* expected = port.heads_first ? "[B, H, L, D]" : "[B, L, H·D] or [B, L, H, D]";
  const char* side = port.parts == 3 ? "[B, L, 3·H·D]" : port.parts == 2 ? "[B, S, 2·H·D]" : expected;
  return refuse(refusal, "got %s of %s, expected %s with H = %d and D = %d: export the model again", port.name,
                shape_text(dims, tensor.rank).text, side, attributes.heads, attributes.head_size);
}

// Where a part of an input begins, and the elements from one batch, row and head to the next.
struct Strided {
  const void* data;
  int64_t batch, row, head;
};

Strided strided(const AttentionAttributes& attributes, const AttentionPort& port, const Tensor& tensor,
                const void* data, int part) {
  const int64_t size = attributes.head_size, width = features(attributes), rows = tensor.dims[rows_at(port)];
  const void* begin = static_cast<const char*>(data) + part * width * kBytes;
  if (port.heads_first) return {begin, rows * width, size, rows * size};
  return {begin, rows * port.parts * width, port.parts * width, size};
}

}  // namespace

int input_count(const AttentionAttributes& attributes) noexcept {
  return attributes.packed == kPackedQKV ? 1 : attributes.packed == kPackedKV ? 2 : 3;
}

int row_axis(const AttentionAttributes& attributes) noexcept { return rows_at(port_of(attributes, 0)); }

int64_t features(const AttentionAttributes& attributes) noexcept {
  return static_cast<int64_t>(attributes.heads) * attributes.head_size;
}

bool takes_type(const AttentionAttributes& attributes, int position, int32_t type, int32_t first) noexcept {
  return position <= input_count(attributes) && is_half(type) && type == first;
}

int32_t output_type(const AttentionAttributes&, int, int32_t first) noexcept {
  return first == QVDIT_BF16 ? QVDIT_BF16 : QVDIT_F16;
}

bool check_early_type(const AttentionAttributes& attributes, int32_t type, Refusal& refusal) noexcept {
  return is_float(type) || check_types(attributes, &type, 1, refusal);
}

bool check_types(const AttentionAttributes& attributes, const int32_t* types, int count, Refusal& refusal) noexcept {
  for (int i = 0; i < count && i < input_count(attributes); ++i) {
    if (!check_type(port_of(attributes, i), types[i], types[0], refusal)) return false;
  }
  return true;
}

bool check_inputs(const AttentionAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept {
  if (count != input_count(attributes)) {
    return refuse(refusal, "got %d inputs, expected the %d that its attributes name: export the model again", count,
                  input_count(attributes));
  }
  for (int i = 0; i < count; ++i) {
    const AttentionPort port = port_of(attributes, i);
    if (!check_type(port, inputs[i].type, inputs[0].type, refusal)) return false;
    if (!check_shape(attributes, port, inputs[i], refusal)) return false;
    if (fits(inputs[i].dims[0], inputs[0].dims[0])) continue;
    return refuse(refusal, "got %s of %s for q of %s, expected one batch: export the model again", port.name,
                  shape_text(inputs[i].dims, inputs[i].rank).text, shape_text(inputs[0].dims, inputs[0].rank).text);
  }
  if (count < 3) return true;
  const Tensor &k = inputs[1], &v = inputs[2];
  const int64_t keys = k.dims[rows_at(port_of(attributes, 1))], values = v.dims[rows_at(port_of(attributes, 2))];
  return fits(keys, values) ||
         refuse(refusal, "got k of %s and v of %s, expected as many rows of both: export the model again",
                shape_text(k.dims, k.rank).text, shape_text(v.dims, v.rank).text);
}

bool check_shapes(const AttentionAttributes& attributes, const Tensor* inputs, int count, Refusal& refusal) noexcept {
  if (!check_inputs(attributes, inputs, count, refusal)) return false;
  const AttentionPort keys = port_of(attributes, count > 1 ? 1 : 0);
  const Tensor &q = inputs[0], &k = inputs[count > 1 ? 1 : 0];
  const bool empty = q.dims[0] == 0 || q.dims[row_axis(attributes)] == 0;
  return empty || k.dims[rows_at(keys)] != 0 ||
         refuse(refusal, "got %s of %s, expected a row or more: give the model something to attend to", keys.name,
                shape_text(k.dims, k.rank).text);
}

bool run(const AttentionAttributes& attributes, const Tensor* descriptions, const void* const* inputs,
         void* const* outputs, void*, void* stream, Refusal& refusal) noexcept {
  const int count = input_count(attributes);
  if (!check_shapes(attributes, descriptions, count, refusal)) return false;
  qvdit_attention_args args = {};
  args.batch = descriptions[0].dims[0];
  args.rows = descriptions[0].dims[row_axis(attributes)];
  if (args.batch == 0 || args.rows == 0) return true;
  Strided part[3];
  for (int i = 0; i < 3; ++i) {
    const int input = i < count ? i : count - 1;
    part[i] = strided(attributes, port_of(attributes, input), descriptions[input], inputs[input], i - input);
  }
  const int keys = count > 1 ? 1 : 0;
  args.q = part[0].data, args.q_batch = part[0].batch, args.q_row = part[0].row, args.q_head = part[0].head;
  args.k = part[1].data, args.k_batch = part[1].batch, args.k_row = part[1].row, args.k_head = part[1].head;
  args.v = part[2].data, args.v_batch = part[2].batch, args.v_row = part[2].row, args.v_head = part[2].head;
  args.heads = attributes.heads;
  args.keys = descriptions[keys].dims[rows_at(port_of(attributes, keys))];
  args.head_size = attributes.head_size;
  args.scale = float_of(attributes.scale);
  args.dtype = descriptions[0].type;
  args.y = outputs[0];
  return succeeded(qvdit_attention(&args, stream), refusal);
}

}  // namespace qvdit::trt
