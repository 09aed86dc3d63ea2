// qvdit_low_bit_linear: a layer's three kernels, the first two side by side.
#include "error.h"
#include "unpack_weight.h"

extern "C" int32_t qvdit_low_bit_linear(const qvdit_quantize_args* quantize, const qvdit_unpack_args* unpack,
                                        const qvdit_gemm_args* gemm, void* stream) {
  QVDIT_REQUIRE(quantize->m == gemm->m && quantize->x_q == gemm->x_q && unpack->weight == gemm->weight,
                "arguments of more layers than one");
  if (quantize->m == 0) return QVDIT_OK;  // nothing is launched, and unpacking would follow another kernel
  if (const int32_t status = qvdit_quantize_rows(quantize, stream)) return status;
  constexpr bool kBesideQuantizer = true;
  if (const int32_t status = qvdit::unpack_weight(*unpack, kBesideQuantizer, static_cast<cudaStream_t>(stream))) {
    return status;
  }
  return qvdit_low_bit_gemm(gemm, stream);
}
