// Quantizing a layer's input as its checkpoint asks: what kernels/activation_quant.py defines in torch, bit
// for bit. float32 in, float32 out: codes (or dequantized values) and the factors the product is scaled by.
//
// A row is copied to the output first (rotated, times a multiplier, rounded to bfloat16 where asked) and quantized
// there in place. Every step but a rotation (rotation.cpp) is elementwise IEEE arithmetic, or a maximum of absolute values taken on their
// bits, where NaN is the largest: results do not depend on the instruction set, the neighbours or the threads.
//
// Where other processes have more columns of the rows, that is two calls: lowbit_stage_input says what is seen of each
// row here, and lowbit_quantize_staged is told what all of them saw.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "activation_quant.h"
#include "lowbit.h"
#include "operations.h"
#include "rotation.h"
#include "row_tasks.h"

namespace lowbit {
namespace {

enum class Rule : std::int32_t {
    none = 0, fixed = 1, token = 2, asymmetric = 3, tensor = 4, delayed = 5, grouped = 6, columns = 7
};
enum class Format : std::int32_t { integer = 0, e4m3 = 1, e5m2 = 2, e2m1 = 3, e2m3 = 4, e3m2 = 5 };
enum class Scale : std::int32_t { f32 = 0, bf16 = 1, e8m0 = 2, e8m0_up = 3, e4m3 = 4, e8m0_spread = 5 };

constexpr std::uint32_t MAGNITUDE = 0x7FFFFFFFu, INFINITE = 0x7F800000u;

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// To bfloat16 and back: nearest, ties to even; NaN stays NaN.
inline float through_bfloat(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
    return float_of((bits & MAGNITUDE) > INFINITE ? bits | 0x00400000u : rounded);
}

// Comparisons with NaN are false: it passes through.
inline float clamped(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

struct Integer {
    float low, high;
    float operator()(float step) const { return clamped(std::rint(step), low, high); }
};

// The nearest number with MANTISSA bits after the point and exponents from LEAST, saturating; ties to even.
// The distance of neighbours is a power of two, so that scaling by it is exact. Formats that are tables in
// Python have no negative zero.
template <int LEAST, int MANTISSA, bool NEGATIVE_ZERO>
struct SmallFloat {
    float largest;
    float operator()(float step) const {
        const float x = clamped(step, -largest, largest);
        constexpr std::uint32_t least = static_cast<std::uint32_t>(127 + LEAST) << 23;
        const std::uint32_t field = bits_of(x) & INFINITE;
        const std::uint32_t distance = (field < least ? least : field) - (std::uint32_t{MANTISSA} << 23);
        const float rounded = std::rint(x * float_of((254u << 23) - distance)) * float_of(distance);
        return NEGATIVE_ZERO ? rounded : rounded + 0.0f;
    }
};
using E4m3 = SmallFloat<-6, 3, true>;
using E5m2 = SmallFloat<-14, 2, true>;
using E2m1 = SmallFloat<0, 1, false>;
using E2m3 = SmallFloat<0, 3, false>;
using E3m2 = SmallFloat<-2, 2, false>;

// The largest |x|, NaN where there is one.
float largest_magnitude(const float* x, std::int64_t count) {
    std::uint32_t largest = 0;
    for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, bits_of(x[i]) & MAGNITUDE);
    return float_of(largest);
}

// The same of what is smaller than an outlier.
float largest_inlier(const float* x, std::int64_t count, float outliers) {
    std::uint32_t largest = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const float magnitude = std::fabs(x[i]);
        largest = std::max(largest, bits_of(magnitude >= outliers ? 0.0f : magnitude));
    }
    return float_of(largest);
}

float power_of_two(int exponent) { return std::ldexp(1.0f, std::min(std::max(exponent, -127), 127)); }

// The scale of a block whose largest |x| is amax; 1 where there is nothing to scale by.
float scale_of(float amax, const lowbit_quantizer& q) {
    if (q.upper_bound > 0.0f && amax > q.upper_bound) amax = q.upper_bound;
    float scale;
    int exponent;
    switch (static_cast<Scale>(q.scale)) {
        case Scale::e8m0_up: {  // the next power of two
            const float fraction = std::frexp(amax / q.limit, &exponent);
            scale = power_of_two(std::isinf(amax) ? 127 : exponent - (fraction == 0.5f));
            if (std::isnan(amax)) scale = 1.0f;
            break;
        }
        case Scale::e8m0: {  // the block's largest power of two over the format's own
            int own;
            std::frexp(q.limit, &own);
            const float fraction = std::frexp(amax, &exponent);
            const bool up = q.round_up > 0.0f && 2.0f * fraction >= q.round_up;
            scale = power_of_two(std::isinf(amax) ? 127 : exponent - own + up);
            if (std::isnan(amax)) scale = 1.0f;
            break;
        }
        default:
            scale = amax / q.limit;
            if (static_cast<Scale>(q.scale) == Scale::bf16) scale = through_bfloat(scale);
    }
    if (q.floor > 0.0f) return std::isnan(scale) ? 1.0f : std::max(scale, q.floor);
    return scale > 0.0f && amax != 0.0f ? scale : 1.0f;
}

// FP-Quant's "quest": the largest power of two that is not above so many standard deviations of a block. Sums are
// of halves, so that their order is that of the torch definition. size is a power of two, up to 64; behind count
// numbers are zeros.
float scale_of_spread(const float* x, std::int64_t count, std::int64_t size, float spread) {
    float sums[64] = {}, squares[64] = {};
    for (std::int64_t i = 0; i < count; ++i) {
        sums[i] = x[i];
        squares[i] = x[i] * x[i];
    }
    for (std::int64_t half = size / 2; half > 0; half /= 2) {
        for (std::int64_t i = 0; i < half; ++i) {
            sums[i] = sums[i] + sums[i + half];
            squares[i] = squares[i] + squares[i + half];
        }
    }
    const float mean = sums[0] / static_cast<float>(size);
    const float variance = squares[0] / static_cast<float>(size) - mean * mean;
    const float wanted = spread * std::sqrt(variance > 0.0f ? variance : variance * 0.0f) + 1e-8f;
    if (std::isinf(squares[0])) return power_of_two(127);
    if (std::isnan(wanted)) return 1.0f;
    int exponent;
    std::frexp(wanted, &exponent);
    return power_of_two(exponent - 1);
}

// steps of x: x / scale, or x times the reciprocal, to the nearest value.
template <class Nearest>
void quantize_block(float* x, std::int64_t count, float scale, bool reciprocal, const Nearest& nearest) {
    if (reciprocal) {
        const float factor = 1.0f / scale;
        for (std::int64_t i = 0; i < count; ++i) x[i] = nearest(x[i] * factor);
    } else {
        for (std::int64_t i = 0; i < count; ++i) x[i] = nearest(x[i] / scale);
    }
}

template <class Nearest>
void quantize_fixed(float* x, std::int64_t count, float scale, const float* zero, const Nearest& nearest) {
    const float shift = zero == nullptr ? 0.0f : *zero;
    for (std::int64_t i = 0; i < count; ++i) {
        const float step = scale == 0.0f ? 0.0f : x[i] / scale;
        x[i] = zero == nullptr ? nearest(step) : nearest(step + shift) - shift;
    }
}

// What a scale depends on of a staged row: its largest |x|, and of LLM.int8 the largest that is no outlier; of a zero
// point how far the row reaches below and above 0. Of a row in parts they are the largest of each part's, NaN above all.
struct Seen {
    float first, second;
};

Seen seen_of(const float* x, std::int64_t count, const lowbit_quantizer& q) {
    const auto rule = static_cast<Rule>(q.rule);
    if (rule == Rule::asymmetric) {
        float low = 0.0f, high = 0.0f;
        bool nan = false;
        for (std::int64_t i = 0; i < count; ++i) {
            low = x[i] < low ? x[i] : low;
            high = x[i] > high ? x[i] : high;
            nan |= x[i] != x[i];
        }
        constexpr float none = std::numeric_limits<float>::quiet_NaN();
        return nan ? Seen{none, none} : Seen{-low, high};
    }
    return {largest_magnitude(x, count), rule == Rule::columns ? largest_inlier(x, count, q.outliers) : 0.0f};
}

// Integers with a zero point: 0 is always representable.
template <class Nearest>
float quantize_asymmetric(float* x, std::int64_t count, const Seen& seen, float low_code, float high_code,
                          const Nearest& nearest) {
    const float low = -seen.first, high = seen.second;
    float scale = (high - low) / (high_code - low_code);
    if (scale == 0.0f) scale = 1.0f;
    const float zero = clamped(std::rint(low_code - low / scale), low_code, high_code);
    for (std::int64_t i = 0; i < count; ++i) x[i] = nearest(x[i] / scale + zero) - zero;
    return scale;
}

// In place: values, or where there are ``scales`` codes.
template <class Nearest>
void quantize_groups(float* x, std::int64_t count, const lowbit_quantizer& q, const Nearest& nearest, float* scales) {
    const bool inner = static_cast<Scale>(q.scale) == Scale::e4m3;  // NVFP4: e4m3 scales under one float32
    const float outer = q.static_scale == nullptr ? 1.0f : *q.static_scale;
    for (std::int64_t first = 0; first < count; first += q.group) {
        const std::int64_t width = std::min<std::int64_t>(q.group, count - first);
        float* const group = x + first;
        const float amax = largest_magnitude(group, width);
        float scale;
        if (inner) {
            scale = E4m3{448.0f}(clamped(amax / (q.limit * outer), 0.001953125f, 448.0f)) * outer;
            if (scale == 0.0f) scale = 1.0f;
        } else {
            const bool spread = static_cast<Scale>(q.scale) == Scale::e8m0_spread;
            scale = (spread ? scale_of_spread(group, width, q.group, q.limit) : scale_of(amax, q)) * outer;
        }
        quantize_block(group, width, scale, q.reciprocal != 0, nearest);
        if (scales != nullptr) {
            scales[first / q.group] = scale;
            continue;
        }
        for (std::int64_t i = 0; i < width; ++i) group[i] *= scale;
    }
}

// out = x, rotated, times the multiplier, through bfloat16.
void stage(const float* x, std::int64_t width, const lowbit_quantizer& q, float* out) {
    if (q.rotation != nullptr) {
        rotate_row(*q.rotation, x, width, out);
        x = out;
    }
    if (q.multiplier != nullptr) {
        for (std::int64_t i = 0; i < width; ++i) out[i] = x[i] * q.multiplier[i];
    } else if (out != x) {
        std::memcpy(out, x, static_cast<std::size_t>(width) * sizeof(float));
    }
    if (q.bfloat_input) {
        for (std::int64_t i = 0; i < width; ++i) out[i] = through_bfloat(out[i]);
    }
}

void stage_rows(const lowbit_quantizer& q, const float* x, std::int64_t x_stride, std::int64_t rows,
                std::int64_t width, float* out, std::int64_t out_stride, Seen* seen) {
    for_rows(rows, width, [&](std::int64_t row) {
        float* const to = out + row * out_stride;
        stage(x + row * x_stride, width, q, to);
        seen[row] = seen_of(to, width, q);
    });
}

// The largest |x| of the staged rows. ``finite``: rows with NaN or infinity take no part.
float largest_of_rows(const Seen* seen, std::int64_t rows, bool finite) {
    std::uint32_t largest = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::uint32_t bits = bits_of(seen[row].first) & MAGNITUDE;
        if (!finite || bits < INFINITE) largest = std::max(largest, bits);
    }
    return float_of(largest);
}

// LLM.int8: a column where a token of the batch has an outlier is divided by the scales but not rounded, in all
// rows. Rows with NaN or infinity have no say in it, and become NaN.
template <class Nearest>
void quantize_beside_columns(const lowbit_quantizer& q, float* out, std::int64_t out_stride, std::int64_t rows,
                             std::int64_t width, const Seen* seen, float* scales, const Nearest& nearest) {
    constexpr std::int64_t TOGETHER = 64;  // columns, each of which is one task's own
    std::vector<std::int32_t> is_outlier(static_cast<std::size_t>(width));
    for_rows((width + TOGETHER - 1) / TOGETHER, rows * TOGETHER, [&](std::int64_t group) {
        const std::int64_t first = group * TOGETHER, count = std::min(TOGETHER, width - first);
        std::int32_t* const found = is_outlier.data() + first;
        for (std::int64_t row = 0; row < rows; ++row) {
            const float magnitude = seen[row].first;
            if (!(magnitude >= q.outliers && magnitude <= FLT_MAX)) continue;
            const float* const from = out + row * out_stride + first;
            for (std::int64_t i = 0; i < count; ++i) found[i] |= std::fabs(from[i]) >= q.outliers;
        }
    });
    for_rows(rows, width, [&](std::int64_t row) {
        float* const to = out + row * out_stride;
        const float scale = scale_of(seen[row].second, q), factor = 1.0f / scale;
        scales[row] = scale;
        if (!(seen[row].first <= FLT_MAX)) {
            std::fill_n(to, width, std::numeric_limits<float>::quiet_NaN());
            return;
        }
        for (std::int64_t i = 0; i < width; ++i) {
            const float step = q.reciprocal ? to[i] * factor : to[i] / scale;
            const float code = nearest(step);
            to[i] = is_outlier[static_cast<std::size_t>(i)] ? step : code;
        }
    });
}

// A staged row under a scale of its own, which is returned.
template <class Nearest>
float quantize_staged_row(const lowbit_quantizer& q, float* x, std::int64_t width, const Seen& seen,
                          const Nearest& nearest) {
    if (static_cast<Rule>(q.rule) == Rule::asymmetric) {
        return quantize_asymmetric(x, width, seen, q.low, q.high, nearest);
    }
    const float scale = scale_of(seen.first, q);
    quantize_block(x, width, scale, q.reciprocal != 0, nearest);
    return scale;
}

// Staged rows whose scales depend on what was seen of them, in place.
template <class Nearest>
void quantize_staged(const lowbit_quantizer& q, float* x, std::int64_t stride, std::int64_t rows, std::int64_t width,
                     const Seen* seen, float* factors, const Nearest& nearest) {
    const auto rule = static_cast<Rule>(q.rule);
    if (rule == Rule::columns) {
        quantize_beside_columns(q, x, stride, rows, width, seen, factors, nearest);
        return;
    }
    if (rule != Rule::tensor) {
        for_rows(rows, width, [&](std::int64_t row) {
            factors[row] = quantize_staged_row(q, x + row * stride, width, seen[row], nearest);
        });
        return;
    }
    const float scale = scale_of(largest_of_rows(seen, rows, true), q);
    factors[0] = scale;
    for_rows(rows, width, [&](std::int64_t row) {
        float* const to = x + row * stride;
        quantize_block(to, width, scale, q.reciprocal != 0, nearest);
        if (!(seen[row].first <= FLT_MAX)) {
            std::fill_n(to, width, std::numeric_limits<float>::quiet_NaN());
        }
    });
}

// A row of a rule that treats rows alone; returns its factor, 1 where the rule makes none.
template <class Nearest>
float quantize_alone(const lowbit_quantizer& q, const float* x, std::int64_t width, float* out, const Nearest& nearest) {
    stage(x, width, q, out);
    switch (static_cast<Rule>(q.rule)) {
        case Rule::fixed: quantize_fixed(out, width, *q.static_scale, q.static_zero, nearest); return 1.0f;
        case Rule::token:
        case Rule::asymmetric: return quantize_staged_row(q, out, width, seen_of(out, width, q), nearest);
        case Rule::grouped: quantize_groups(out, width, q, nearest, nullptr); return 1.0f;
        default: return 1.0f;
    }
}

// with(nearest), for the format's rounding.
template <class With>
auto rounded_by(const lowbit_quantizer& q, const With& with) {
    switch (static_cast<Format>(q.format)) {
        case Format::e4m3: return with(E4m3{q.high});
        case Format::e5m2: return with(E5m2{q.high});
        case Format::e2m1: return with(E2m1{q.high});
        case Format::e2m3: return with(E2m3{q.high});
        case Format::e3m2: return with(E3m2{q.high});
        default: return with(Integer{q.low, q.high});
    }
}

template <class Nearest>
void quantize(const lowbit_quantizer& q, const float* x, std::int64_t x_stride, std::int64_t rows,
              std::int64_t width, float* out, std::int64_t out_stride, float* factors, const Nearest& nearest) {
    const auto rule = static_cast<Rule>(q.rule);
    if (rule == Rule::columns || rule == Rule::tensor || rule == Rule::delayed) {
        std::vector<Seen> seen(static_cast<std::size_t>(rows));
        stage_rows(q, x, x_stride, rows, width, out, out_stride, seen.data());
        if (rule != Rule::delayed) {
            quantize_staged(q, out, out_stride, rows, width, seen.data(), factors, nearest);
            return;
        }
        const float now = *q.state_scale, amax = largest_of_rows(seen.data(), rows, false);
        factors[0] = 1.0f / now;
        // On the bits, so that NaN is kept as the largest.
        if (bits_of(amax) > (bits_of(q.state_history[0]) & MAGNITUDE)) q.state_history[0] = amax;
        for_rows(rows, width, [&](std::int64_t row) {
            float* const to = out + row * out_stride;
            for (std::int64_t i = 0; i < width; ++i) to[i] = nearest(to[i] * now);
        });
        return;
    }
    for_rows(rows, width, [&](std::int64_t row) {
        const float factor = quantize_alone(q, x + row * x_stride, width, out + row * out_stride, nearest);
        if (rule == Rule::token || rule == Rule::asymmetric) factors[row] = factor;
    });
}

// One state at the end of a step: what delayed scaling does with the amax of the step (kernels/activation_state.py).
void update(const lowbit_delayed_state& state) {
    float* const history = state.history;
    const float newest = history[0];
    if (newest == 0.0f) return;  // not used in this step
    const float amax = state.most_recent ? newest : largest_magnitude(history, state.length);
    if (state.length > 1) {
        std::memmove(history + 1, history + 2, static_cast<std::size_t>(state.length - 2) * sizeof(float));
        history[state.length - 1] = newest;
    }
    history[0] = 0.0f;
    if (!(amax > 0.0f && amax <= FLT_MAX)) return;
    const float scale = state.largest / amax;
    *state.scale = std::isinf(scale) ? FLT_MAX : scale;
}

}  // namespace

float quantize_alone(const lowbit_quantizer& q, const float* x, std::int64_t width, float* out) {
    return rounded_by(q, [&](const auto& nearest) { return quantize_alone(q, x, width, out, nearest); });
}

void quantize_row(const lowbit_quantizer& q, const float* x, std::int64_t width, float* codes, float* scales) {
    stage(x, width, q, codes);
    rounded_by(q, [&](const auto& nearest) { quantize_groups(codes, width, q, nearest, scales); });
}

float codes_per_unit(const lowbit_quantizer& q) {
    switch (static_cast<Format>(q.format)) {
        case Format::integer: return 1.0f;
        case Format::e2m1: return 2.0f;
        case Format::e2m3: return 8.0f;
        case Format::e3m2: return 16.0f;
        default: return 0.0f;
    }
}

}  // namespace lowbit

// x (rows, width) -> out (rows, width), strides in floats between rows; factors: one a row, one in all, or none,
// as the rule has it. out may be x. 0, or 1 where memory ran out.
LOWBIT_EXPORT int lowbit_quantize_input(const lowbit_quantizer* quantizer, const float* x, std::int64_t x_stride,
                                        std::int64_t rows, std::int64_t width, float* out,
                                        std::int64_t out_stride, float* factors) {
    using namespace lowbit;
    const lowbit_quantizer& q = *quantizer;
    try {
        rounded_by(q, [&](const auto& nearest) {
            quantize(q, x, x_stride, rows, width, out, out_stride, factors, nearest);
        });
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// x (rows, width) of a rule with a scale for each row or one for all -> out, as it will be quantized, and what is seen
// of each row (rows, 2); see Seen. out may be x. 0, or 1 where memory ran out.
LOWBIT_EXPORT int lowbit_stage_input(const lowbit_quantizer* quantizer, const float* x, std::int64_t x_stride,
                                     std::int64_t rows, std::int64_t width, float* out, std::int64_t out_stride,
                                     float* seen) {
    try {
        lowbit::stage_rows(*quantizer, x, x_stride, rows, width, out, out_stride, reinterpret_cast<lowbit::Seen*>(seen));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// The rest of quantizing what lowbit_stage_input gave, in place, by what was seen of the rows here and elsewhere.
// 0, or 1 where memory ran out.
LOWBIT_EXPORT int lowbit_quantize_staged(const lowbit_quantizer* quantizer, float* x, std::int64_t stride,
                                         std::int64_t rows, std::int64_t width, const float* seen, float* factors) {
    using namespace lowbit;
    const lowbit_quantizer& q = *quantizer;
    const auto* const of_rows = reinterpret_cast<const Seen*>(seen);
    try {
        rounded_by(q, [&](const auto& nearest) {
            quantize_staged(q, x, stride, rows, width, of_rows, factors, nearest);
        });
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// The end of a step, for every state of a model.
LOWBIT_EXPORT void lowbit_update_delayed(const lowbit_delayed_state* states, std::int64_t count) {
    lowbit::for_rows(count, states == nullptr || count == 0 ? 1 : states[0].length,
                     [&](std::int64_t index) { lowbit::update(states[index]); });
}
