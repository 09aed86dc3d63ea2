// What differs between the versions of TensorRT that the plugin is compiled against, each difference named once.
//
// 8.6 (JetPack 6.0), 10.3 (JetPack 6.1), 10.13 (JetPack 7) and 11.1 are compiled in tests. 9.x was a preview.
#pragma once

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <type_traits>

#include "low_bit_core.h"

// IPluginV3 exists from 10.0 on, beside an IPluginV2DynamicExt that is deprecated; before, that is the only one.
#define QVDIT_PLUGIN_V3 (NV_TENSORRT_MAJOR >= 10)

namespace qvdit::trt {

// An extent in nvinfer1::Dims: int32_t before 10.0, int64_t since.
using Extent = std::remove_all_extents_t<decltype(nvinfer1::Dims::d)>;

// A type as enum qvdit_dtype, kOtherType where no kernel takes it. bfloat16 exists from 9.0 on.
inline int32_t kernel_type(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return QVDIT_F32;
    case nvinfer1::DataType::kHALF:
      return QVDIT_F16;
    case nvinfer1::DataType::kINT32:
      return QVDIT_S32;
#if NV_TENSORRT_MAJOR >= 9
    case nvinfer1::DataType::kBF16:
      return QVDIT_BF16;
#endif
    default:
      return kOtherType;
  }
}

// The inverse. A bfloat16 that this TensorRT has not is float32 here, and no format will be found for it.
inline nvinfer1::DataType tensorrt_type(int32_t type) {
  switch (type) {
    case QVDIT_F16:
      return nvinfer1::DataType::kHALF;
    case QVDIT_S32:
      return nvinfer1::DataType::kINT32;
#if NV_TENSORRT_MAJOR >= 9
    case QVDIT_BF16:
      return nvinfer1::DataType::kBF16;
#endif
    default:
      return nvinfer1::DataType::kFLOAT;
  }
}

}  // namespace qvdit::trt
