// IQ3_S: four magnitudes at a time from a grid of 512 points (quantize/gguf_iq3.py).
//
// Sub-blocks one after the other; the lanes hold a point's neighbours. Where rounding misses the grid, all
// neighbours are compared, and of equally good ones the first is taken.
#pragma once

#include "vector16.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "quantize_bytes.h"

namespace lowbit {
namespace {

struct Grid {
    const float* points;         // (512, 4) odd numbers 1..15
    const std::int16_t* index;   // (4096,): where the point with code i at bits 3 i is in the grid, or -1
    const std::int32_t* starts;  // (4097,): which rows of 16 neighbours are a point's
    const std::int16_t* near;    // (rows, 16) indices in the grid, nearest first
    const float* numbers;        // (rows, 4, 16), filled up with numbers that are far from all
};

// The best neighbour of a point that is not in the grid.
int best_neighbour(const Grid& grid, int point, const float* x, const float* weights, float scale) {
    float best = std::numeric_limits<float>::infinity();
    int found = 0;
    for (std::int32_t row = grid.starts[point]; row < grid.starts[point + 1]; ++row) {
        Vector16 distance = zeros();
        for (int i = 0; i < 4; ++i) {
            const Vector16 number = load(grid.numbers + (row * 4 + i) * LANES);
            const Vector16 off = subtract(multiply(broadcast(scale), number), broadcast(x[i]));
            distance = add(distance, multiply(multiply(broadcast(weights[i]), off), off));
        }
        const float least = -reduce_max(subtract(zeros(), distance));
        if (!(least < best)) continue;
        best = least;
        found = grid.near[row * LANES + first_of(equal(distance, broadcast(least)))];
    }
    return found;
}

struct SubBlock {
    alignas(64) float x[32], w[32], roots[32];  // magnitudes, their squares, and the roots of those
    int points[8];
};

// Σ w x q, Σ w q q for the numbers of the points.
void sum_points(const Grid& grid, const SubBlock& sub, const int* points, float& sum_qx, float& sum_q2) {
    sum_qx = sum_q2 = 0;
    for (int i = 0; i < 32; ++i) {
        const float number = grid.points[4 * points[i / 4] + i % 4], weighted = sub.w[i] * number;
        sum_qx += sub.w[i] * sub.x[i] * number;
        sum_q2 += weighted * number;
    }
}

float search_points(const Grid& grid, SubBlock& sub) {  // returns the scale; 0 for a sub-block of zeros
    const float largest = *std::max_element(sub.x, sub.x + 32);
    std::fill(sub.points, sub.points + 8, 0);
    if (largest == 0) return 0;
    float scale = largest / 15, best = 0, sum_qx, sum_q2;
    bool all_met = false;
    int tried[8];
    const auto try_scale = [&](float inverse, float factor) {  // whether rounding alone met the grid
        alignas(64) float codes[32];
        for (int i = 0; i < 32; i += LANES) {
            const Vector16 number = subtract(multiply(broadcast(inverse), load(sub.x + i)), broadcast(1.0f));
            store(codes + i, nearest_between(multiply(broadcast(0.5f), number), 0, 7));
        }
        bool met = true;
        for (int k = 0; k < 8; ++k) {
            const float* code = codes + 4 * k;
            const int point = static_cast<int>(code[0] + 8 * code[1] + 64 * code[2] + 512 * code[3]);
            tried[k] = grid.index[point];
            if (tried[k] >= 0) continue;
            tried[k] = best_neighbour(grid, point, sub.x + 4 * k, sub.roots + 4 * k, factor);
            met = false;
        }
        sum_points(grid, sub, tried, sum_qx, sum_q2);
        return met;
    };
    for (int step = -9; step <= 9; ++step) {
        const float inverse = (15 + 0.2f * static_cast<float>(step)) / largest;
        const bool met = try_scale(inverse, 1 / inverse);
        if (!(sum_q2 > 0 && sum_qx * sum_qx > best * sum_q2)) continue;
        scale = sum_qx / sum_q2;
        best = scale * sum_qx;
        std::copy(tried, tried + 8, sub.points);
        all_met = met;
    }
    if (!all_met && scale > 0) {
        try_scale(1 / scale, scale);
        std::copy(tried, tried + 8, sub.points);
        if (sum_q2 > 0) scale = sum_qx / sum_q2;
    }
    return scale;
}

void encode_iq3_s(const Grid& grid, const float* x, std::uint8_t* block) {
    std::uint8_t *low = block + 2, *high = block + 66, *signs = block + 74, *steps = block + 106;
    std::memset(block, 0, 110);
    float scales[8];
    for (int j = 0; j < 8; ++j) {
        SubBlock sub;
        for (int i = 0; i < 32; ++i) {
            const float value = x[32 * j + i];
            sub.x[i] = std::fabs(value);
            sub.w[i] = value * value;
            sub.roots[i] = std::sqrt(sub.w[i]);
            signs[4 * j + i / 8] = static_cast<std::uint8_t>(signs[4 * j + i / 8] | (value < 0 ? 1 : 0) << (i % 8));
        }
        scales[j] = search_points(grid, sub);
        for (int k = 0; k < 8; ++k) {
            low[8 * j + k] = static_cast<std::uint8_t>(sub.points[k]);
            high[j] = static_cast<std::uint8_t>(high[j] | (sub.points[k] >> 8) << k);
        }
    }
    const float largest = *std::max_element(scales, scales + 8);
    if (largest == 0) return;
    const float d = largest / 31, inverse = 1 / d;
    put_half(block, float_to_half(d * 1.033f));
    for (int j = 0; j < 8; ++j) {
        const int step = std::clamp(nearest(0.5f * (inverse * scales[j] - 1)), 0, 15);
        steps[j / 2] = static_cast<std::uint8_t>(steps[j / 2] | step << (4 * (j % 2)));
    }
}

}  // namespace
}  // namespace lowbit
