# qvdit-run, the program that builds, proves, times and samples with an engine where there is no Python. Needs TensorRT's
# headers (NvOnnxParser.h among them) and libraries, the CUDA runtime, and no nvcc.
foreach(header IN ITEMS NvInfer.h NvOnnxParser.h)
  if(NOT EXISTS ${QVDIT_TENSORRT_INCLUDE}/${header})
    message(FATAL_ERROR "no ${header} in ${QVDIT_TENSORRT_INCLUDE}: give QVDIT_TENSORRT_INCLUDE TensorRT's include folder")
  endif()
endforeach()
# The parser lies beside the library, with the same ending: libnvinfer.so.8 and libnvonnxparser.so.8.
string(REPLACE libnvinfer libnvonnxparser parser "${QVDIT_TENSORRT_LIB}")
foreach(library IN ITEMS "${QVDIT_TENSORRT_LIB}" "${parser}")
  if(NOT EXISTS "${library}")
    message(FATAL_ERROR "no library '${library}': give QVDIT_TENSORRT_LIB the file libnvinfer.so, or that of a version")
  endif()
endforeach()

find_package(CUDAToolkit REQUIRED)
find_package(Threads REQUIRED)

set(here ${CMAKE_CURRENT_LIST_DIR})
add_executable(
  qvdit-run
  ${here}/arguments.cc
  ${here}/builder.cc
  ${here}/compare.cc
  ${here}/device.cc
  ${here}/engine.cc
  ${here}/facts.cc
  ${here}/files.cc
  ${here}/json.cc
  ${here}/log.cc
  ${here}/main.cc
  ${here}/parity.cc
  ${here}/plugin.cc
  ${here}/plugin_file.cc
  ${here}/proof.cc
  ${here}/quantiles.cc
  ${here}/safetensors.cc
  ${here}/sampler.cc
  ${here}/session.cc
  ${here}/sha256.cc
  ${here}/tensor.cc
  ${here}/versions.cc)
target_include_directories(qvdit-run SYSTEM PRIVATE ${QVDIT_TENSORRT_INCLUDE} ${CUDAToolkit_INCLUDE_DIRS})
# No contraction: the sampler's arithmetic is that of PyTorch, which rounds between product and sum.
target_compile_options(qvdit-run PRIVATE -Wall -Wextra -ffp-contract=off)
target_link_libraries(qvdit-run PRIVATE ${QVDIT_TENSORRT_LIB} ${parser} CUDA::cudart_static Threads::Threads ${CMAKE_DL_LIBS})
# 8.6's libraries name others (cuDNN, cuBLAS) that the loader finds, or not, at run time.
target_link_options(qvdit-run PRIVATE -Wl,--allow-shlib-undefined)
