#include "../../../runtimes/csrc/tensorrt/attention_core.h"
#include "core_driver.h"

QVDIT_CORE_DRIVER(attention, qvdit::trt::AttentionAttributes)
