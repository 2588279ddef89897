// Products of every head with a matrix of its own: what absorbing the up-projections into latent attention
// leaves to do (DeepSeek-V2, 2024). y[token, head] = x[token, head] @ W[head], float32 sums.
//
// W is (heads, in, padded out), float32 or bfloat16, padded with zeros to whole vectors. An output is one
// chain over ascending inputs, the same for any number of tokens: its bits never depend on the other rows.
#include <algorithm>
#include <cstdint>

#include "vector16.h"

#include "lowbit.h"
#include "operations.h"
#include "thread_pool.h"

extern "C" {
// Strides of x and y in floats.
struct lowbit_head_products {
    const float* x;
    std::int64_t x_token, x_head;
    const void* weights;
    float* y;
    std::int64_t y_token, y_head;
    std::int64_t tokens;
    std::int32_t heads, inputs, outputs, bfloat;
};
}

namespace lowbit {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 6, VECTORS = 4;
#elif defined(__ARM_NEON)
constexpr int ROWS = 4, VECTORS = 1;
#else
constexpr int ROWS = 3, VECTORS = 2;
#endif
constexpr int STRIP = VECTORS * LANES;  // outputs a task computes

inline Vector16 load_weights(const float* from) { return load(from); }

inline Vector16 load_weights(const std::uint16_t* from) { return load_bfloats(from); }

// rows of x -> rows of y, COUNT vectors of outputs; the last holds `tail` of them.
template <class Element, int TOKENS, int COUNT>
void tile(const lowbit_head_products& job, const float* x, const Element* weights, std::int64_t stride,
          int tail, float* y) {
    Vector16 sums[TOKENS][COUNT];
    for (auto& row : sums) {
        for (auto& sum : row) sum = zeros();
    }
    for (int input = 0; input < job.inputs; ++input, weights += stride) {
        Vector16 columns[COUNT];
#pragma GCC unroll 8
        for (int vector = 0; vector < COUNT; ++vector) columns[vector] = load_weights(weights + vector * LANES);
#pragma GCC unroll 8
        for (int row = 0; row < TOKENS; ++row) {
            const Vector16 factor = broadcast(x[row * job.x_token + input]);
#pragma GCC unroll 8
            for (int vector = 0; vector < COUNT; ++vector) {
                sums[row][vector] = fma(factor, columns[vector], sums[row][vector]);
            }
        }
    }
    for (int row = 0; row < TOKENS; ++row) {
        for (int vector = 0; vector < COUNT; ++vector) {
            float* to = y + row * job.y_token + vector * LANES;
            if (vector + 1 < COUNT) {
                store(to, sums[row][vector]);
            } else {
                store_lanes(to, sums[row][vector], tail);
            }
        }
    }
}

template <class Element, int TOKENS, int COUNT = VECTORS>
void strip(const lowbit_head_products& job, const float* x, const Element* weights, std::int64_t stride,
           int outputs, float* y) {
    if constexpr (COUNT > 1) {
        if (outputs <= (COUNT - 1) * LANES) {
            strip<Element, TOKENS, COUNT - 1>(job, x, weights, stride, outputs, y);
            return;
        }
    }
    tile<Element, TOKENS, COUNT>(job, x, weights, stride, outputs - (COUNT - 1) * LANES, y);
}

// The same for 1 <= tokens <= TOKENS tokens.
template <class Element, int TOKENS = ROWS>
void rows(const lowbit_head_products& job, std::int64_t tokens, const float* x, const Element* weights,
          std::int64_t stride, int outputs, float* y) {
    if constexpr (TOKENS > 1) {
        if (tokens < TOKENS) {
            rows<Element, TOKENS - 1>(job, tokens, x, weights, stride, outputs, y);
            return;
        }
    }
    strip<Element, TOKENS>(job, x, weights, stride, outputs, y);
}

template <class Element>
void run(const lowbit_head_products& job) {
    const std::int64_t stride = (job.outputs + LANES - 1) / LANES * LANES;
    const int strips = (job.outputs + STRIP - 1) / STRIP;
    parallel_for(std::int64_t{job.heads} * strips, [&](std::int64_t task) {
        const std::int64_t head = task / strips;
        const int output = static_cast<int>(task % strips) * STRIP;
        const Element* weights = static_cast<const Element*>(job.weights) + head * job.inputs * stride + output;
        for (std::int64_t token = 0; token < job.tokens; token += ROWS) {
            rows<Element>(job, std::min<std::int64_t>(ROWS, job.tokens - token),
                          job.x + token * job.x_token + head * job.x_head, weights, stride,
                          std::min(STRIP, job.outputs - output),
                          job.y + token * job.y_token + head * job.y_head + output);
        }
    });
}

}  // namespace
}  // namespace lowbit

LOWBIT_EXPORT void lowbit_multiply_heads(const lowbit_head_products* job) {
    if (job->bfloat != 0) {
        lowbit::run<std::uint16_t>(*job);
    } else {
        lowbit::run<float>(*job);
    }
}
