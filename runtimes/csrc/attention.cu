// qvdit_attention: checks the arguments and chooses the kernel.
#include <cmath>

#include "attention.cuh"

namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// A head's values start on multiples of 16 bytes wherever it is.
bool in_eights(int64_t batch, int64_t row, int64_t head) { return batch % 8 == 0 && row % 8 == 0 && head % 8 == 0; }

int32_t check(const qvdit_attention_args& args) {
  const long long batch = args.batch, heads = args.heads, rows = args.rows, keys = args.keys, size = args.head_size;
  QVDIT_REQUIRE(args.q && args.k && args.v && args.y, "q, k, v and y must be given");
  QVDIT_REQUIRE(batch >= 1 && heads >= 1 && rows < INT32_MAX && keys >= 1 && keys < INT32_MAX,
                "attention of [%lld, %lld, %lld] over %lld keys", batch, heads, rows, keys);
  QVDIT_REQUIRE(size >= 8 && size <= 128 && size % 8 == 0, "heads of %lld; a multiple of 8 to 128", size);
  QVDIT_REQUIRE(args.dtype == QVDIT_F16 || args.dtype == QVDIT_BF16, "attention of type %d; float16 or bfloat16",
                args.dtype);
  QVDIT_REQUIRE(args.scale > 0 && std::isfinite(args.scale), "a scale of %g; positive and finite", args.scale);
  QVDIT_REQUIRE(aligned(args.q) && aligned(args.k) && aligned(args.v) && aligned(args.y),
                "q, k, v or y is not on a multiple of 16 bytes");
  QVDIT_REQUIRE(in_eights(args.q_batch, args.q_row, args.q_head) && in_eights(args.k_batch, args.k_row, args.k_head) &&
                    in_eights(args.v_batch, args.v_row, args.v_head),
                "strides that are no multiples of 8");
  return QVDIT_OK;
}

}  // namespace

extern "C" int32_t qvdit_attention(const qvdit_attention_args* args, void* stream) {
  if (args->batch == 0 || args->rows == 0) return QVDIT_OK;  // whose pointers are null
  if (const int32_t status = check(*args)) return status;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return args->dtype == QVDIT_F16 ? qvdit::attention_f16(*args, on) : qvdit::attention_bf16(*args, on);
}
