// The functions between an MLP's two products, sixteen floats at a time.
#pragma once

#include <cstdint>

#include "row_tasks.h"
#include "vector16.h"

namespace lowbit {

enum class Activation : std::int32_t { SILU = 0, GELU_TANH = 1, GELU = 2, SWIGLU_CLAMPED = 3, RELU = 4, RELU2 = 5 };

inline Vector16 sigmoid_times(Vector16 x, Vector16 argument) {  // x / (1 + e^-argument)
    return divide(x, add(broadcast(1.0f), exp(subtract(zeros(), argument))));
}

// x times the normal distribution function, by formula 7.1.26 of Abramowitz and Stegun: absolute error
// below 1.5e-7 |x|.
inline Vector16 gelu(Vector16 x) {
    const Vector16 scaled = multiply(maximum(x, subtract(zeros(), x)), broadcast(0.70710678118654752f));
    const Vector16 t = divide(broadcast(1.0f), fma(scaled, broadcast(0.3275911f), broadcast(1.0f)));
    Vector16 sum = broadcast(1.061405429f);
    for (const float next : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f}) {
        sum = fma(sum, t, broadcast(next));
    }
    const Vector16 bell = exp(negative_fma(scaled, scaled, zeros()));
    const Vector16 tail = multiply(multiply(sum, broadcast(0.5f)), bell);
    return multiply(x, select(negative(x), tail, negative_fma(tail, broadcast(1.0f), broadcast(1.0f))));
}

// gpt-oss (OpenAI, 2025): (up + 1) * gate * sigmoid(1.702 gate), gate <= 7 and |up| <= 7.
inline Vector16 swiglu_clamped(Vector16 gate, Vector16 up) {
    constexpr float LIMIT = 7.0f, SLOPE = 1.702f;
    // minimum and maximum give their second argument where one is NaN
    const Vector16 steep = multiply(minimum(broadcast(LIMIT), gate), broadcast(SLOPE));
    const Vector16 within = maximum(broadcast(-LIMIT), minimum(broadcast(LIMIT), up));
    return multiply(sigmoid_times(steep, steep), divide(add(within, broadcast(1.0f)), broadcast(SLOPE)));
}

inline Vector16 relu(Vector16 x) { return maximum(zeros(), x); }  // NaN stays NaN: the second is given then

// activation(gate) * up
inline Vector16 gated(Vector16 gate, Vector16 up, Activation activation) {
    switch (activation) {
        case Activation::GELU:
            return multiply(gelu(gate), up);
        case Activation::GELU_TANH: {  // 0.5 x (1 + tanh y) = x / (1 + e^-2y)
            const Vector16 cubic = fma(multiply(gate, gate), broadcast(0.044715f), broadcast(1.0f));
            const Vector16 argument = multiply(multiply(gate, cubic), broadcast(1.5957691216057308f));
            return multiply(sigmoid_times(gate, argument), up);
        }
        case Activation::SWIGLU_CLAMPED:
            return swiglu_clamped(gate, up);
        case Activation::RELU:
            return multiply(relu(gate), up);
        case Activation::RELU2:
            return multiply(multiply(relu(gate), relu(gate)), up);
        default:
            return multiply(sigmoid_times(gate, gate), up);
    }
}

// gate_up (2 * width,), gate first -> out (width,).
inline void gate_row(const float* gate_up, int width, Activation activation, float* out) {
    for_vectors(width, [&](int column, int lanes) {
        const Vector16 gate = load_some(gate_up + column, lanes), up = load_some(gate_up + width + column, lanes);
        store_some(out + column, gated(gate, up, activation), lanes);
    });
}

}  // namespace lowbit
