// Hopper's GEMM of rank 0 or 1, its epilogue from CUTLASS's visitors:
//
//   y = u · beta + (bias + scale · (weight_scale · acc))    float32; u of the column's segment; null counts as 0
//
// and with kZero, acc = Σ_k x_q weight - zero weight_sum before it, in int32: as one more rank in float32 its rounding
// would be that of the uncorrected sum.
#pragma once

#include "gemm_wgmma.cuh"

namespace qvdit {

namespace fusion = cutlass::epilogue::fusion;

constexpr auto kNearest = cutlass::FloatRoundStyle::round_to_nearest;

// Of M values, one a row of y; and of N, one a column. Null: zeros. Aligned to one element: u of a further segment
// begins anywhere.
template <int kBlockN, typename T>
using OfRow = fusion::Sm90ColBroadcast<0, WgmmaTile<kBlockN>, T, T, cute::Stride<cute::_1, cute::_0, int64_t>, 1>;
template <int kBlockN, typename T>
using OfColumn = fusion::Sm90RowBroadcast<0, WgmmaTile<kBlockN>, T, T, cute::Stride<cute::_0, cute::_1, int64_t>>;

template <class Values>
struct MinusProduct;

template <typename T, int kSize>
struct MinusProduct<cutlass::Array<T, kSize>> {
  using Values = cutlass::Array<T, kSize>;
  CUTLASS_DEVICE Values operator()(Values const& a, Values const& b, Values const& from) const {
    Values result;
#pragma unroll
    for (int i = 0; i < kSize; ++i) result[i] = from[i] - a[i] * b[i];
    return result;
  }
};

struct SegmentArguments {
  const float* u = nullptr;
  int segment = 1;
};

// u: OfRow, M values for each segment of columns. A tile lies in one segment.
template <int kBlockN>
struct OfRowAndSegment : OfRow<kBlockN, float>, VisitorHost<SegmentArguments> {
  using Base = OfRow<kBlockN, float>;
  using Host = VisitorHost<SegmentArguments>;
  using Host::to_underlying_arguments, Host::can_implement, Host::get_workspace_size, Host::initialize_workspace;
  using typename Host::Arguments, typename Host::Params;

  CUTLASS_HOST_DEVICE OfRowAndSegment() {}
  CUTLASS_HOST_DEVICE OfRowAndSegment(Params const& params, typename Base::SharedStorage const& shared)
      : Base({params.u, 0.f, {}}, shared), first_(params.u), segment_(params.segment) {}

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::ConsumerStoreArgs<Args...> const& args) {
    if (first_) {
      const int column = cute::get<1>(args.tile_coord_mnkl) * kBlockN;
      Base::params.ptr_col = first_ + static_cast<int64_t>(column / segment_) * cute::get<0>(args.problem_shape_mnkl);
    }
    return Base::template get_consumer_store_callbacks<kReferenceSource>(args);
  }

 private:
  const float* first_ = nullptr;  // of the first segment
  int segment_ = 1;
};

template <typename Out, int kBlockN, bool kZero>
int32_t launch_wgmma_rank1(const qvdit_gemm_args& args, cudaStream_t stream) {
  using Times = fusion::Sm90Compute<cutlass::multiplies, float, float, kNearest>;
  using Plus = fusion::Sm90Compute<cutlass::plus, float, float, kNearest>;
  using Finish = fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Out, float, kNearest>;
  using Corrected = fusion::Sm90EVT<fusion::Sm90Compute<MinusProduct, int32_t, int32_t, kNearest>,
                                    OfRow<kBlockN, int32_t>, OfColumn<kBlockN, int32_t>, fusion::Sm90AccFetch>;
  using Acc = std::conditional_t<kZero, Corrected, fusion::Sm90AccFetch>;
  using Scaled = fusion::Sm90EVT<Times, OfRow<kBlockN, float>, fusion::Sm90EVT<Times, OfColumn<kBlockN, float>, Acc>>;
  using Biased = fusion::Sm90EVT<Plus, OfColumn<kBlockN, float>, Scaled>;
  using Visitor = fusion::Sm90EVT<Finish, OfRowAndSegment<kBlockN>, OfColumn<kBlockN, float>, Biased>;
  using Gemm = WgmmaGemm<Out, kBlockN, Visitor>;

  typename Acc::Arguments acc{};
  if constexpr (kZero) acc = {{args.zero}, {args.weight_sum}, {}, {}};
  const bool ranked = args.rank == 1;
  const typename Gemm::Fused fused{{ranked ? args.u : nullptr, static_cast<int>(args.segment)},
                                   {ranked ? args.beta : nullptr},
                                   {{args.bias}, {{args.scale}, {{args.weight_scale}, acc, {}}, {}}, {}},
                                   {}};
  return Gemm::run(args, fused, stream);
}

}  // namespace qvdit
