// What is done with rows of logits: each row's largest, tokens drawn.
#pragma once

#include <cstdint>

#include "lowbit.h"

extern "C" {

// What is done to a row's logits first: biases are added, then penalties taken from tokens that occur; no token occurs
// twice in either list.
struct lowbit_logit_changes {
    const std::int64_t* biased;  // (biases,) tokens
    const float* bias;
    std::int64_t biases;
    const std::int64_t* said;    // (said_count,) tokens of prompt and output
    const std::int32_t* counts;  // how often each stands in the output
    std::int64_t said_count;
    double repetition, frequency, presence;
};

// How a token is chosen from row ``row``; field for field kernels/sampling.py's.
struct lowbit_draw {
    std::int64_t row;
    std::uint64_t seed, position;         // of the random number
    double top_p;                         // 1: all
    double min_p;                         // 0: all
    const lowbit_logit_changes* changes;  // or null
    float temperature;                    // 0: the first of the largest
    std::int32_t top_k;                   // of a row's tokens; else all
};

}  // extern "C"

// x (rows, width) -> values, places (rows,). 0, or 1 where the rows are empty or too wide.
LOWBIT_EXPORT int lowbit_row_peaks(const float* x, std::int64_t x_stride, std::int64_t rows, std::int64_t width,
                                   float* values, std::int64_t* places);

// logits float32 (rows, width), ``peaks`` their largest, finite -> a token for each of ``count`` draws; from a
// row that is changed no other draw is made. Changed logits are afterwards what they were. 0; 1 where the rows are empty or too wide or have
// no such tokens to change, 2 without memory.
LOWBIT_EXPORT int lowbit_draw_tokens(float* logits, std::int64_t stride, std::int64_t width, const float* peaks,
                                     const lowbit_draw* draws, std::int64_t count, std::int64_t* tokens);
