// What is done with rows of logits: each row's largest, tokens drawn.
#pragma once

#include <cstdint>

#include "lowbit.h"

extern "C" {

// How a token is drawn from row ``row``; field for field kernels/sampling.py's.
struct lowbit_draw {
    std::int64_t row;
    std::uint64_t seed, position;  // of the random number
    double top_p;                  // 1: all
    double min_p;                  // 0: all
    float temperature;             // > 0
    std::int32_t top_k;            // of a row's tokens; else all
};

}  // extern "C"

// x (rows, width) -> values, places (rows,). 0, or 1 where the rows are empty or too wide.
LOWBIT_EXPORT int lowbit_row_peaks(const float* x, std::int64_t x_stride, std::int64_t rows, std::int64_t width,
                                   float* values, std::int64_t* places);

// logits float32 (rows, width), ``peaks`` their largest, finite -> a token for each of ``count`` draws. 0; 1 where the rows
// are empty or too wide, 2 without memory.
LOWBIT_EXPORT int lowbit_draw_tokens(const float* logits, std::int64_t stride, std::int64_t width, const float* peaks,
                                     const lowbit_draw* draws, std::int64_t count, std::int64_t* tokens);
