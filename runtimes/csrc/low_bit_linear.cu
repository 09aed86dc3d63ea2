// qvdit_low_bit_linear: a layer's three kernels, the first two side by side.
#include "error.h"
#include "unpack.h"
#include "unpack_weight.h"

extern "C" int32_t qvdit_low_bit_linear(const qvdit_quantize_args* quantize, const qvdit_unpack_args* unpack,
                                        const qvdit_gemm_args* gemm, void* stream) {
  QVDIT_REQUIRE(quantize->m == gemm->m && unpack->n == gemm->n && unpack->k == quantize->k &&
                    qvdit::padded(quantize->k) == gemm->k_pad,
                "sizes of more layers than one");
  QVDIT_REQUIRE(quantize->x_q == gemm->x_q && quantize->scale == gemm->scale && unpack->weight == gemm->weight &&
                    (!gemm->zero || quantize->zero == gemm->zero) && (!gemm->u || quantize->u == gemm->u) &&
                    (!gemm->weight_sum || unpack->weight_sum == gemm->weight_sum) &&
                    (!gemm->row_sum || quantize->row_sum == gemm->row_sum),
                "pointers of more layers than one");
  if (quantize->m == 0) return QVDIT_OK;  // nothing is launched, and unpacking would follow another kernel
  if (const int32_t status = qvdit_quantize_rows(quantize, stream)) return status;
  constexpr bool kBesideQuantizer = true;
  if (const int32_t status = qvdit::unpack_weight(*unpack, kBesideQuantizer, static_cast<cudaStream_t>(stream))) {
    return status;
  }
  return qvdit_low_bit_gemm(gemm, stream);
}
