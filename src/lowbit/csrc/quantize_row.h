// One row of an input, quantized in groups of columns. activation_quant.cpp
#pragma once

#include <cstdint>

#include "operations.h"

namespace lowbit {

// x (width,) of a quantizer whose rule has groups -> codes (width,) and a scale for each of its groups; what the
// quantizer says of x is code times scale.
void quantize_row(const lowbit_quantizer& quantizer, const float* x, std::int64_t width, float* codes, float* scales);

}  // namespace lowbit
