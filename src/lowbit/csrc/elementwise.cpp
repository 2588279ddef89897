// The small operations between matrix products: RMSNorm, LayerNorm, sums, gated activation, rotary embedding,
// factors and biases, gathered rows and columns. float32.
//
// A row is computed by one thread in an order fixed by its width alone, so its bits never depend on the
// other rows. Strides are in floats between rows (tokens).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "activations.h"
#include "lowbit.h"
#include "operations.h"
#include "row_tasks.h"
#include "vector16.h"

namespace lowbit {
namespace {

// out = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019).
void normalize(const float* x, const float* weight, float eps, int width, float* out) {
    Vector16 squares[4] = {zeros(), zeros(), zeros(), zeros()};
    for_vectors(width, [&](int column, int lanes) {
        const Vector16 value = load_some(x + column, lanes);
        Vector16& sum = squares[column / LANES % 4];
        sum = fma(value, value, sum);
    });
    const float sum = reduce_add(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    const Vector16 scale = broadcast(1.0f / std::sqrt(sum / static_cast<float>(width) + eps));
    for_vectors(width, [&](int column, int lanes) {
        const Vector16 value = multiply(load_some(x + column, lanes), scale);
        store_some(out + column, multiply(value, load_some(weight + column, lanes)), lanes);
    });
}

// out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias (Ba et al., 2016); bias may be null.
void center_and_normalize(const float* x, const float* weight, const float* bias, float eps, int width, float* out) {
    Vector16 sums[4] = {zeros(), zeros(), zeros(), zeros()};
    for_vectors(width, [&](int column, int lanes) {
        Vector16& sum = sums[column / LANES % 4];
        sum = add(sum, load_some(x + column, lanes));
    });
    const float count = static_cast<float>(width);
    const Vector16 mean = broadcast(reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) / count);
    Vector16 squares[4] = {zeros(), zeros(), zeros(), zeros()};
    for_vectors(width, [&](int column, int lanes) {
        const Vector16 apart = subtract(load_some(x + column, lanes), mean);
        const Vector16 value = lanes == LANES ? apart : select(lane_range(0, lanes), apart, zeros());
        Vector16& sum = squares[column / LANES % 4];
        sum = fma(value, value, sum);
    });
    const float variance = reduce_add(add(add(squares[0], squares[1]), add(squares[2], squares[3]))) / count;
    const Vector16 scale = broadcast(1.0f / std::sqrt(variance + eps));
    for_vectors(width, [&](int column, int lanes) {
        const Vector16 apart = subtract(load_some(x + column, lanes), mean);
        Vector16 value = multiply(multiply(apart, scale), load_some(weight + column, lanes));
        if (bias != nullptr) value = add(value, load_some(bias + column, lanes));
        store_some(out + column, value, lanes);
    });
}

// x1, x2 <- x1 cos - x2 sin, x2 cos + x1 sin for the halves (or the pairs) of each head's first rotary_dim
// dimensions (Su et al., 2021).
void rotate_heads(float* row, int heads, int head_dim, int half, bool interleaved, const float* cosines,
                  const float* sines) {
    for (int head = 0; head < heads; ++head, row += head_dim) {
        if (interleaved) {
            for (int pair = 0; pair < half; ++pair) {
                const float first = row[2 * pair], second = row[2 * pair + 1];
                row[2 * pair] = std::fma(-second, sines[pair], first * cosines[pair]);
                row[2 * pair + 1] = std::fma(first, sines[pair], second * cosines[pair]);
            }
            continue;
        }
        for_vectors(half, [&](int column, int lanes) {
            const Vector16 first = load_some(row + column, lanes),
                           second = load_some(row + half + column, lanes);
            const Vector16 cosine = load_some(cosines + column, lanes),
                           sine = load_some(sines + column, lanes);
            store_some(row + column, negative_fma(second, sine, multiply(first, cosine)), lanes);
            store_some(row + half + column, fma(first, sine, multiply(second, cosine)), lanes);
        });
    }
}

}  // namespace
}  // namespace lowbit

// x, out (rows, width). out may be x.
LOWBIT_EXPORT void lowbit_rms_norm(const float* x, std::int64_t x_stride, const float* weight, float eps,
                                   std::int64_t rows, std::int32_t width, float* out,
                                   std::int64_t out_stride) {
    lowbit::for_rows(rows, width, [&](std::int64_t row) {
        lowbit::normalize(x + row * x_stride, weight, eps, width, out + row * out_stride);
    });
}

// residual += x; out = rms_norm(residual). out may be x.
LOWBIT_EXPORT void lowbit_add_rms_norm(const float* x, std::int64_t x_stride, float* residual,
                                       std::int64_t residual_stride, const float* weight, float eps,
                                       std::int64_t rows, std::int32_t width, float* out,
                                       std::int64_t out_stride) {
    using namespace lowbit;
    for_rows(rows, width, [&](std::int64_t row) {
        float* sum = residual + row * residual_stride;
        const float* added = x + row * x_stride;
        for_vectors(width, [&](int column, int lanes) {
            store_some(sum + column, add(load_some(sum + column, lanes), load_some(added + column, lanes)),
                       lanes);
        });
        normalize(sum, weight, eps, width, out + row * out_stride);
    });
}

// x, out (rows, groups * width), weight and bias (groups, width), or with a stride of 0 (width,) for all groups:
// LayerNorm of every group. bias may be null, out may be x.
LOWBIT_EXPORT void lowbit_layer_norm(const float* x, std::int64_t x_stride, const float* weight, const float* bias,
                                     std::int64_t weight_stride, float eps, std::int64_t rows, std::int32_t groups,
                                     std::int32_t width, float* out, std::int64_t out_stride) {
    lowbit::for_rows(rows, std::int64_t{groups} * width, [&](std::int64_t row) {
        for (std::int64_t group = 0; group < groups; ++group) {
            const std::int64_t column = group * width, place = group * weight_stride;
            lowbit::center_and_normalize(x + row * x_stride + column, weight + place,
                                         bias == nullptr ? nullptr : bias + place, eps, width,
                                         out + row * out_stride + column);
        }
    });
}

// sum += x, both (rows, width).
LOWBIT_EXPORT void lowbit_add(const float* x, std::int64_t x_stride, float* sum, std::int64_t sum_stride,
                              std::int64_t rows, std::int32_t width) {
    using namespace lowbit;
    for_rows(rows, width, [&](std::int64_t row) {
        const float* from = x + row * x_stride;
        float* to = sum + row * sum_stride;
        for_vectors(width, [&](int column, int lanes) {
            store_some(to + column, add(load_some(to + column, lanes), load_some(from + column, lanes)), lanes);
        });
    });
}

// gate_up (rows, 2 * width) -> activation(gate) * up (rows, width).
LOWBIT_EXPORT void lowbit_gated_activation(const float* gate_up, std::int64_t stride, std::int32_t activation,
                                           std::int64_t rows, std::int32_t width, float* out,
                                           std::int64_t out_stride) {
    using namespace lowbit;
    for_rows(rows, width, [&](std::int64_t row) {
        gate_row(gate_up + row * stride, width, static_cast<Activation>(activation), out + row * out_stride);
    });
}

// out = activation(x), of an MLP without a gate. out may be x.
LOWBIT_EXPORT void lowbit_activation(const float* x, std::int64_t x_stride, std::int32_t activation,
                                     std::int64_t rows, std::int32_t width, float* out,
                                     std::int64_t out_stride) {
    using namespace lowbit;
    for_rows(rows, width, [&](std::int64_t row) {
        for_vectors(width, [&](int column, int lanes) {
            const Vector16 value = load_some(x + row * x_stride + column, lanes);
            store_some(out + row * out_stride + column,
                       gated(value, broadcast(1.0f), static_cast<Activation>(activation)), lanes);
        });
    });
}

// Rotates q (tokens, q_heads, head_dim) and k (tokens, k_heads, head_dim) in place. cosines and sines
// (table_rows, rotary_dim / 2). 0, or 1 where a position is not in the table: then nothing is rotated.
LOWBIT_EXPORT int lowbit_rotary(float* q, std::int64_t q_stride, std::int32_t q_heads, float* k,
                                std::int64_t k_stride, std::int32_t k_heads, std::int32_t head_dim,
                                std::int32_t rotary_dim, const float* cosines, const float* sines,
                                std::int64_t table_rows, const std::int32_t* positions, std::int64_t tokens,
                                std::int32_t interleaved) {
    using namespace lowbit;
    for (std::int64_t token = 0; token < tokens; ++token) {
        if (positions[token] < 0 || positions[token] >= table_rows) return 1;
    }
    const int half = rotary_dim / 2;
    for_rows(tokens, std::int64_t{q_heads + k_heads} * head_dim, [&](std::int64_t token) {
        const float* cosine = cosines + std::int64_t{positions[token]} * half;
        const float* sine = sines + std::int64_t{positions[token]} * half;
        rotate_heads(q + token * q_stride, q_heads, head_dim, half, interleaved != 0, cosine, sine);
        rotate_heads(k + token * k_stride, k_heads, head_dim, half, interleaved != 0, cosine, sine);
    });
    return 0;
}

// RMSNorm of every head of x (tokens, heads, dim), in place.
LOWBIT_EXPORT void lowbit_rms_norm_heads(float* x, std::int64_t x_stride, std::int32_t heads, std::int32_t dim,
                                         const float* weight, float eps, std::int64_t tokens) {
    lowbit::for_rows(tokens, std::int64_t{heads} * dim, [&](std::int64_t token) {
        float* head = x + token * x_stride;
        for (int i = 0; i < heads; ++i, head += dim) lowbit::normalize(head, weight, eps, dim, head);
    });
}

// out = x * column * factor * number / divisor + bias, in this order; what is null or 1 is left out. column,
// bias (width,); factor: one a row, or with a stride of 0 one in all. out may be x.
LOWBIT_EXPORT void lowbit_affine(const float* x, std::int64_t x_stride, std::int64_t rows, std::int32_t width,
                                 const float* column, const float* factor, std::int64_t factor_stride,
                                 float number, float divisor, const float* bias, float* out,
                                 std::int64_t out_stride) {
    using namespace lowbit;
    for_rows(rows, width, [&](std::int64_t row) {
        const float* from = x + row * x_stride;
        float* to = out + row * out_stride;
        const float* const of_row = at_column(factor, row * factor_stride);
        for_vectors(width, [&](int at, int lanes) {
            Vector16 value = affine(load_some(from + at, lanes), at_column(column, at), of_row, nullptr, lanes);
            if (number != 1.0f) value = multiply(value, broadcast(number));
            if (divisor != 1.0f) value = divide(value, broadcast(divisor));
            store_some(to + at, affine(value, nullptr, nullptr, at_column(bias, at), lanes), lanes);
        });
    });
}

// x = cap * tanh(x / cap), in place (Gemma 2, 2024).
LOWBIT_EXPORT void lowbit_softcap(float* x, std::int64_t stride, std::int64_t rows, std::int32_t width,
                                  float cap) {
    using namespace lowbit;
    for_rows(rows, width, [&](std::int64_t row) {
        float* at = x + row * stride;
        for_vectors(width, [&](int column, int lanes) {
            const Vector16 value = load_some(at + column, lanes);
            const Vector16 capped = multiply(broadcast(cap), tanh(divide(value, broadcast(cap))));
            store_some(at + column, capped, lanes);
        });
    });
}

// out[i] = x[wanted[i]]. 0, or 1 where a wanted row is not one of x (rows, width): then nothing is copied.
LOWBIT_EXPORT int lowbit_gather_rows(const float* x, std::int64_t x_stride, std::int64_t rows,
                                     std::int32_t width, const std::int64_t* wanted, std::int64_t count,
                                     float* out, std::int64_t out_stride) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (wanted[i] < 0 || wanted[i] >= rows) return 1;
    }
    lowbit::for_rows(count, width, [&](std::int64_t i) {
        std::memcpy(out + i * out_stride, x + wanted[i] * x_stride, static_cast<std::size_t>(width) * sizeof(float));
    });
    return 0;
}

// out[:, i] = x[:, order[i]]; order (width,) is a permutation.
LOWBIT_EXPORT void lowbit_gather_columns(const float* x, std::int64_t x_stride, std::int64_t rows,
                                         std::int32_t width, const std::int64_t* order, float* out,
                                         std::int64_t out_stride) {
    lowbit::for_rows(rows, width, [&](std::int64_t row) {
        const float* from = x + row * x_stride;
        float* to = out + row * out_stride;
        for (int column = 0; column < width; ++column) to[column] = from[order[column]];
    });
}
