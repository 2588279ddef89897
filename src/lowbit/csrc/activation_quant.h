// Quantizing one row of a layer's input by itself. activation_quant.cpp
#pragma once

#include <cstdint>

struct lowbit_quantizer;

namespace lowbit {

// out = the row's codes or values; returns what the product is to be scaled by, 1 where the rule makes no factor.
// For rules that treat every row alone: none, fixed, token, asymmetric, grouped.
float quantize_alone(const lowbit_quantizer& quantizer, const float* x, std::int64_t width, float* out);

// x (width,) of a quantizer whose rule has groups -> codes (width,) and a scale for each of its groups; what the
// quantizer says of x is code times scale.
void quantize_row(const lowbit_quantizer& quantizer, const float* x, std::int64_t width, float* codes, float* scales);

// What all codes are whole numbers of up to 10 bits times, 2^n: 2 for e2m1. 0 where they are none.
float codes_per_unit(const lowbit_quantizer& quantizer);

}  // namespace lowbit
