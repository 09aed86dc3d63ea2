#include "../../../runtimes/csrc/tensorrt/residual_core.h"
#include "core_driver.h"

QVDIT_CORE_DRIVER(residual, qvdit::trt::ResidualAttributes)
