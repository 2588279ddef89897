// What a step may consist of: native functions that a plan (step_plan.cpp) can record and replay, and the
// structures they read. Each is called from Python by itself, too.
#pragma once

#include <cstdint>

#include "lowbit.h"

// What kernels/activation_native.py describes; field for field its ctypes struct.
struct lowbit_quantizer {
    const float* multiplier;    // (width,), or null
    const float* static_scale;  // one number: of a static rule, or NVFP4's outer scale
    const float* static_zero;
    const float* state_scale;   // delayed: the scale in force, and the largest |x| of this step
    float* state_history;
    std::int32_t rule, format, scale, group;
    float low, high;            // the codes' range, or the largest value
    float limit;                // the value a block's largest |x| becomes
    float floor, upper_bound, outliers, round_up;
    std::int32_t bfloat_input, reciprocal;
};

struct lowbit_delayed_state {
    float* scale;
    float* history;       // (length,), slot 0 is the step in progress
    std::int64_t length;
    float largest;        // the format's largest value over 2^margin
    std::int32_t most_recent;
};

LOWBIT_EXPORT int lowbit_quantize_input(const lowbit_quantizer* quantizer, const float* x, std::int64_t x_stride,
                                        std::int64_t rows, std::int64_t width, float* out,
                                        std::int64_t out_stride, float* factors);
LOWBIT_EXPORT void lowbit_update_delayed(const lowbit_delayed_state* states, std::int64_t count);
