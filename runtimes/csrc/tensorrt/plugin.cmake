# TensorRT's plugins. One library with the kernels in it: a bundle, trtexec --staticPlugins and ctypes then need one file
# and no search path. It shows nothing but qvdit_register_plugins (exports.map), so that another copy of the kernels in
# the process, PyTorch's, does not take its place.
if(NOT EXISTS ${QVDIT_TENSORRT_INCLUDE}/NvInferRuntime.h)
  message(FATAL_ERROR "no NvInferRuntime.h in ${QVDIT_TENSORRT_INCLUDE}: give QVDIT_TENSORRT_INCLUDE TensorRT's include folder")
endif()
if(QVDIT_TENSORRT_LIB AND NOT EXISTS ${QVDIT_TENSORRT_LIB})
  message(FATAL_ERROR "no ${QVDIT_TENSORRT_LIB}: give QVDIT_TENSORRT_LIB the file libnvinfer.so.8, or that of another version")
endif()

find_package(CUDAToolkit REQUIRED)  # cuda_runtime_api.h, which TensorRT's headers include

set(here ${CMAKE_CURRENT_LIST_DIR})
add_library(
  qvdit_tensorrt SHARED
  ${here}/attention_core.cc
  ${here}/attributes.cc
  ${here}/low_bit_core.cc
  ${here}/node.cc
  ${here}/plugin_v2.cc
  ${here}/plugin_v3.cc
  ${here}/residual_core.cc
  ${here}/shell.cc
  ${objects})
target_include_directories(qvdit_tensorrt SYSTEM PRIVATE ${QVDIT_TENSORRT_INCLUDE} ${CUDAToolkit_INCLUDE_DIRS})
target_compile_options(qvdit_tensorrt PRIVATE -Wall -Wextra -fno-exceptions)
target_link_options(qvdit_tensorrt PRIVATE -Wl,--version-script=${here}/exports.map)
set_target_properties(qvdit_tensorrt PROPERTIES LINKER_LANGUAGE CUDA LINK_DEPENDS ${here}/exports.map)
if(QVDIT_TENSORRT_LIB)
  target_link_libraries(qvdit_tensorrt PRIVATE ${QVDIT_TENSORRT_LIB})
endif()
