// The gated delta rule (Yang et al., 2024) between a layer's projections, as kernels/recurrent.py defines it.
//
// A task is a value head of one sequence, or some channels of one sequence in the convolution. Tokens go one
// after another, and each column of a state is a chain of its own: q S and k S are summed row by row. So bits
// depend neither on the chunks that a prompt comes in, nor on what else is in the step, nor on the threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "activations.h"
#include "lowbit.h"
#include "operations.h"
#include "row_tasks.h"
#include "vector16.h"

struct lowbit_delta_layer {
    float* inputs;    // (slots, taps - 1, channels)
    float* matrices;  // (slots, heads, k_dim, v_dim)
    const float* taps;   // (taps, channels)
    const float* decay;  // (heads,)
    const float* bias;   // (heads,)
    const float* norm;   // (v_dim,)
    std::int64_t slots;  // the last is nobody's
    std::int32_t k_heads, heads, k_dim, v_dim, tap_count;
    float eps;
};

struct lowbit_delta_batch {
    const std::int32_t* query_lengths;    // (sequences,)
    const std::int32_t* context_lengths;  // (sequences,)
    const std::int32_t* slots;            // (sequences,)
    std::int32_t sequences;
};

namespace lowbit {
namespace {

constexpr float LENGTH_EPS = 1e-6f;
constexpr int RUN = 32;           // tokens whose q and k are made ready together
constexpr int STRIP = 16 * LANES;  // channels of a task
constexpr int NO_SLOT = 1, NO_MEMORY = 2;

std::int64_t channels_of(const lowbit_delta_layer& layer) {
    return 2 * std::int64_t{layer.k_heads} * layer.k_dim + std::int64_t{layer.heads} * layer.v_dim;
}

// A sequence's part of a step.
struct Part {
    std::int64_t slot, first, count;
    bool begins;  // at position 0
};

// False where a slot is none.
bool parts_of(const lowbit_delta_layer& layer, const lowbit_delta_batch& batch, std::vector<Part>& parts) {
    parts.clear();
    std::int64_t first = 0;
    for (int sequence = 0; sequence < batch.sequences; ++sequence) {
        const std::int64_t slot = batch.slots[sequence], count = batch.query_lengths[sequence];
        if (slot < -1 || slot >= layer.slots - 1) return false;
        const std::int64_t own = slot < 0 ? layer.slots - 1 : slot;
        parts.push_back({own, first, count, batch.context_lengths[sequence] <= count});
        first += count;
    }
    return true;
}

// run(parts, channels) where every slot is one; 0, or a status.
template <class Run>
int with_parts(const lowbit_delta_layer& layer, const lowbit_delta_batch& batch, const Run& run) {
    thread_local std::vector<Part> kept;
    std::vector<Part>& parts = kept;  // tasks must see the caller's
    try {
        if (!parts_of(layer, batch, parts)) return NO_SLOT;
        run(parts.data(), channels_of(layer));
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
    return 0;
}

// Channels `channel` to `channel + width` of a sequence: x (tokens), stride apart -> silu of the sum of taps.
void convolve(const lowbit_delta_layer& layer, const Part& part, std::int64_t channel, int width, const float* mixed,
              std::int64_t stride, float* out, std::int64_t channels) {
    const int kept = layer.tap_count - 1;
    float* old = layer.inputs + part.slot * kept * channels + channel;
    const auto input = [&](std::int64_t token) -> const float* {  // of this step, or of those before
        return token >= 0 ? mixed + (part.first + token) * stride + channel : old + (token + kept) * channels;
    };
    if (part.begins) {
        for (int row = 0; row < kept; ++row) std::memset(old + row * channels, 0, sizeof(float) * width);
    }
    for (std::int64_t token = 0; token < part.count; ++token) {
        float* made = out + (part.first + token) * channels + channel;
        for_vectors(width, [&](int column, int lanes) {
            Vector16 sum = zeros();
            for (int tap = 0; tap <= kept; ++tap) {
                const float* weight = layer.taps + tap * channels + channel + column;
                sum = fma(load_some(input(token - kept + tap) + column, lanes), load_some(weight, lanes), sum);
            }
            store_some(made + column, sigmoid_times(sum, sum), lanes);
        });
    }
    for (int row = 0; row < kept; ++row) {  // what is read lies at or behind what is written
        std::memmove(old + row * channels, input(part.count - kept + row), sizeof(float) * width);
    }
}

// out = x / |x| * factor
void to_unit(const float* x, int width, float factor, float* out) {
    Vector16 squares = zeros();
    for_vectors(width, [&](int column, int lanes) {
        const Vector16 value = load_some(x + column, lanes);
        squares = fma(value, value, squares);
    });
    const Vector16 scale = broadcast(factor / std::sqrt(reduce_add(squares) + LENGTH_EPS));
    for_vectors(width, [&](int column, int lanes) {
        store_some(out + column, multiply(load_some(x + column, lanes), scale), lanes);
    });
}

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// What the rule needs of a run of tokens, of one head.
struct Run {
    std::vector<float> q, k;  // (RUN, k_dim)
    float keep[RUN], beta[RUN];
};

// One token, W * 16 columns of a state whose rows are v_dim apart: S = keep S, S += k (beta (v - k S)), out = q S.
template <int W>
void move_on(float* state, int k_dim, std::int64_t v_dim, const float* q, const float* k, const float* v, float keep,
             float beta, float* out) {
    Vector16 told[W], made[W];
    for (int w = 0; w < W; ++w) told[w] = made[w] = zeros();
    for (int row = 0; row < k_dim; ++row) {
        const Vector16 key = broadcast(k[row]);
        for (int w = 0; w < W; ++w) told[w] = fma(key, load(state + row * v_dim + w * LANES), told[w]);
    }
    const Vector16 kept = broadcast(keep), rate = broadcast(beta);
    for (int w = 0; w < W; ++w) told[w] = multiply(rate, negative_fma(kept, told[w], load(v + w * LANES)));
    for (int row = 0; row < k_dim; ++row) {
        const Vector16 key = broadcast(k[row]), query = broadcast(q[row]);
        for (int w = 0; w < W; ++w) {
            float* at = state + row * v_dim + w * LANES;
            const Vector16 value = fma(key, told[w], multiply(kept, load(at)));
            store(at, value);
            made[w] = fma(query, value, made[w]);
        }
    }
    for (int w = 0; w < W; ++w) store(out + w * LANES, made[w]);
}

// rms_norm(x) * norm * silu(z), in place
void norm_and_gate(float* x, const float* z, const float* norm, int width, float eps) {
    Vector16 squares = zeros();
    for_vectors(width, [&](int column, int) {
        const Vector16 value = load(x + column);
        squares = fma(value, value, squares);
    });
    const float mean = reduce_add(squares) / static_cast<float>(width);
    const Vector16 scale = broadcast(1.0f / std::sqrt(mean + eps));
    for_vectors(width, [&](int column, int) {
        const Vector16 gate = load(z + column);
        const Vector16 normed = multiply(multiply(load(x + column), scale), load(norm + column));
        store(x + column, multiply(normed, sigmoid_times(gate, gate)));
    });
}

void run_head(const lowbit_delta_layer& layer, const Part& part, int head, const float* mixed, std::int64_t stride,
              const float* convolved, float* out) {
    thread_local Run run;
    const int k_dim = layer.k_dim, v_dim = layer.v_dim, key_head = head / (layer.heads / layer.k_heads);
    const std::int64_t channels = channels_of(layer), keys = std::int64_t{layer.k_heads} * k_dim;
    const std::int64_t values = std::int64_t{layer.heads} * v_dim;
    float* state = layer.matrices + (part.slot * layer.heads + head) * k_dim * v_dim;
    if (part.begins) std::memset(state, 0, sizeof(float) * k_dim * v_dim);
    run.q.resize(static_cast<std::size_t>(RUN * k_dim));
    run.k.resize(static_cast<std::size_t>(RUN * k_dim));
    const float scale = 1.0f / std::sqrt(static_cast<float>(k_dim));
    for (std::int64_t begin = 0; begin < part.count; begin += RUN) {
        const int count = static_cast<int>(std::min<std::int64_t>(RUN, part.count - begin));
        const std::int64_t first = part.first + begin;
        for (int token = 0; token < count; ++token) {
            const float* row = convolved + (first + token) * channels + key_head * k_dim;
            to_unit(row, k_dim, scale, run.q.data() + token * k_dim);
            to_unit(row + keys, k_dim, 1.0f, run.k.data() + token * k_dim);
            const float* gates = mixed + (first + token) * stride + channels + values;  // b, then a
            run.beta[token] = 1.0f / (1.0f + std::exp(-gates[head]));
            run.keep[token] = std::exp(layer.decay[head] * softplus(gates[layer.heads + head] + layer.bias[head]));
        }
        for (int column = 0; column < v_dim;) {
            const int wide = v_dim - column >= 4 * LANES ? 4 : 1;
            for (int token = 0; token < count; ++token) {
                const float* v = convolved + (first + token) * channels + 2 * keys + head * v_dim + column;
                float* made = out + (first + token) * values + head * v_dim + column;
                const auto step = wide == 4 ? move_on<4> : move_on<1>;
                step(state + column, k_dim, v_dim, run.q.data() + token * k_dim, run.k.data() + token * k_dim, v,
                     run.keep[token], run.beta[token], made);
            }
            column += wide * LANES;
        }
        for (int token = 0; token < count; ++token) {
            const float* z = mixed + (first + token) * stride + channels + head * v_dim;
            norm_and_gate(out + (first + token) * values + head * v_dim, z, layer.norm, v_dim, layer.eps);
        }
    }
}

}  // namespace
}  // namespace lowbit

// mixed (tokens, channels and more) -> convolved (tokens, channels). 1: a slot is none; 2: no memory.
LOWBIT_EXPORT int lowbit_delta_convolve(const lowbit_delta_layer* layer, const lowbit_delta_batch* batch,
                                        const float* mixed, std::int64_t stride, float* convolved) {
    using namespace lowbit;
    return with_parts(*layer, *batch, [&](const Part* parts, std::int64_t channels) {
        const std::int64_t strips = (channels + STRIP - 1) / STRIP;
        parallel_for(strips * batch->sequences, [&](std::int64_t task) {
            const std::int64_t channel = task % strips * STRIP;
            const int width = static_cast<int>(std::min<std::int64_t>(STRIP, channels - channel));
            convolve(*layer, parts[task / strips], channel, width, mixed, stride, convolved, channels);
        });
    });
}

// mixed (tokens, channels | z | b | a) and what came of its channels -> out (tokens, heads * v_dim). The same.
LOWBIT_EXPORT int lowbit_delta_rule(const lowbit_delta_layer* layer, const lowbit_delta_batch* batch,
                                    const float* mixed, std::int64_t stride, const float* convolved, float* out) {
    using namespace lowbit;
    return with_parts(*layer, *batch, [&](const Part* parts, std::int64_t) {
        parallel_for(std::int64_t{layer->heads} * batch->sequences, [&](std::int64_t task) {
            run_head(*layer, parts[task / layer->heads], static_cast<int>(task % layer->heads), mixed, stride,
                     convolved, out);
        });
    });
}

// x (rows, width) * sigmoid(gate), in place.
LOWBIT_EXPORT void lowbit_sigmoid_gate(float* x, std::int64_t x_stride, const float* gate, std::int64_t gate_stride,
                                       std::int64_t rows, std::int32_t width) {
    using namespace lowbit;
    for_rows(rows, width, [&](std::int64_t row) {
        for_vectors(width, [&](int column, int lanes) {
            float* at = x + row * x_stride + column;
            store_some(at, sigmoid_times(load_some(at, lanes), load_some(gate + row * gate_stride + column, lanes)),
                       lanes);
        });
    });
}
