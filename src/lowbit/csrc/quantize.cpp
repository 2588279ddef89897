// Float weights -> GGUF blocks, as ggml makes them without an importance matrix.
//
// The torch versions, bit-equal, are in quantize/gguf_blocks.py and quantize/gguf_searches.py. Neither the
// instruction set nor the number of threads shows in the bytes.
//
// A unit is what is encoded at once: a block, or what fills sixteen lanes: 16 sub-blocks of 16 weights (one
// super-block of Q2_K, Q3_K, Q6_K) or of 32 (two super-blocks of Q4_K, Q5_K, IQ4_XS, or 16 blocks of IQ4_NL).
// The last unit is filled up with zeros.
#include "vector16.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lowbit.h"
#include "quantize_bytes.h"
#include "quantize_grid.h"
#include "quantize_rounded.h"
#include "quantize_searches.h"
#include "thread_pool.h"

namespace lowbit {
namespace {

// GGUF's numbers.
enum class Type {
    Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
    IQ4_NL = 20, IQ4_XS = 23, TQ1_0 = 34, TQ2_0 = 35, MXFP4 = 39, NVFP4 = 40, Q1_0 = 41
};
enum class Source { F32 = 0, F16 = 1, BF16 = 2 };

constexpr int SUPER = 256;  // weights of a super-block
constexpr std::int64_t TASK_WEIGHTS = 1 << 15;

// ---- Blocks ----

// The codes of one super-block in order of its weights: its first sub-block is in ``lane``.
template <int N>
void codes_in_order(const Unit<N>& unit, int lane, std::uint8_t* codes) {
    for (int sub = 0; sub < SUPER / N; ++sub) {
        for (int i = 0; i < N; ++i) codes[sub * N + i] = static_cast<std::uint8_t>(unit.codes[i][lane + sub]);
    }
}

// Codes again, with the scales that were stored; where a scale is zero the search's codes stay.
template <int N>
void requantize(Unit<N>& unit, const float* scales, const float* mins, int low, int high) {
    const Vector16 scale = load(scales), min = load(mins);
    const Lanes none = equal(scale, zeros());
    for (int i = 0; i < N; ++i) {
        const Vector16 code = nearest_between(divide(add(unit.weight(i), min), scale), low, high);
        unit.set_code(i, select(none, unit.code(i), subtract(code, broadcast(static_cast<float>(low)))));
    }
}

void encode_q2_k(Unit<16>& unit, std::uint8_t* block) {
    alignas(64) float weights[16][LANES], scales[LANES], mins[LANES];
    for (int i = 0; i < 16; ++i) store(weights[i], absolute(unit.weight(i)));
    const ScaleAndMin found = make_offset_codes(unit, weights, {3, -0.5f, 0.1f, 15, true});
    store(scales, found.scale);
    store(mins, found.min);
    const float max_scale = std::max(0.0f, *std::max_element(scales, scales + 16));
    const float max_min = std::max(0.0f, *std::max_element(mins, mins + 16));
    const float to_scale = max_scale > 0 ? 15.0f / max_scale : 0.0f, to_min = max_min > 0 ? 15.0f / max_min : 0.0f;
    const std::uint16_t d = float_to_half(max_scale / 15.0f), dmin = float_to_half(max_min / 15.0f);
    put_half(block + 80, d);
    put_half(block + 82, dmin);
    for (int j = 0; j < 16; ++j) {
        const auto scale = static_cast<unsigned>(nearest(to_scale * scales[j]));
        const auto min = static_cast<unsigned>(nearest(to_min * mins[j]));
        block[j] = static_cast<std::uint8_t>(scale | min << 4);
        scales[j] = half_to_float(d) * static_cast<float>(block[j] & 15);
        mins[j] = half_to_float(dmin) * static_cast<float>(block[j] >> 4);
    }
    requantize(unit, scales, mins, 0, 3);
    std::uint8_t codes[SUPER];
    codes_in_order(unit, 0, codes);
    pack_two_bits(codes, block + 16);
}

void encode_q3_k(Unit<16>& unit, std::uint8_t* block) {
    alignas(64) float scales[LANES];
    constexpr float none[LANES] = {};
    store(scales, make_q3_codes(unit));
    float largest = 0, max_scale = 0;
    for (const float scale : scales) {
        if (std::fabs(scale) > largest) {
            largest = std::fabs(scale);
            max_scale = scale;
        }
    }
    std::memset(block, 0, 110);
    const float inverse = max_scale != 0 ? -32.0f / max_scale : 0.0f;
    const std::uint16_t d = float_to_half(max_scale != 0 ? 1 / inverse : 0.0f);
    put_half(block + 108, d);
    for (int j = 0; j < 16; ++j) {
        // All zero: bytes of zero, which read as -32 times d = 0.
        const int scale = max_scale != 0 ? std::clamp(nearest(inverse * scales[j]), -32, 31) + 32 : 0;
        std::uint8_t& low = block[96 + j % 8];
        low = static_cast<std::uint8_t>(low | (scale & 15) << (j < 8 ? 0 : 4));
        std::uint8_t& high = block[104 + j % 4];
        high = static_cast<std::uint8_t>(high | (scale >> 4) << (2 * (j / 4)));
        scales[j] = half_to_float(d) * static_cast<float>(scale - 32);
    }
    requantize(unit, scales, none, -4, 3);
    std::uint8_t codes[SUPER];
    codes_in_order(unit, 0, codes);
    for (int i = 0; i < SUPER; ++i) {
        block[i % 32] = static_cast<std::uint8_t>(block[i % 32] | (codes[i] >> 2) << (i / 32));
    }
    pack_two_bits(codes, block + 32);
}

// The twelve bytes of eight 6-bit scales and eight 6-bit minimums.
void pack_six_bits(const std::uint8_t* scales, const std::uint8_t* mins, std::uint8_t* packed) {
    for (int j = 0; j < 4; ++j) {
        packed[j] = static_cast<std::uint8_t>(scales[j] | (scales[j + 4] >> 4) << 6);
        packed[j + 4] = static_cast<std::uint8_t>(mins[j] | (mins[j + 4] >> 4) << 6);
        packed[j + 8] = static_cast<std::uint8_t>((scales[j + 4] & 15) | (mins[j + 4] & 15) << 4);
    }
}

// Q4_K (bits 4) and Q5_K (bits 5): two blocks.
void encode_q45_k(Unit<32>& unit, int bits, std::uint8_t* blocks) {
    alignas(64) float weights[32][LANES], scales[LANES], mins[LANES];
    Vector16 squares = zeros();
    for (int i = 0; i < 32; ++i) squares = add(squares, multiply(unit.weight(i), unit.weight(i)));
    const Vector16 spread = square_root(divide(squares, broadcast(32.0f)));
    for (int i = 0; i < 32; ++i) store(weights[i], add(spread, absolute(unit.weight(i))));
    const OffsetSearch search =
        bits == 4 ? OffsetSearch{15, -1.0f, 0.1f, 20, false} : OffsetSearch{31, -0.5f, 0.1f, 15, false};
    const ScaleAndMin found = make_offset_codes(unit, weights, search);
    store(scales, found.scale);
    store(mins, found.min);
    const int size = bits == 4 ? 144 : 176;
    for (int half = 0; half < 2; ++half) {
        std::uint8_t* block = blocks + half * size;
        float *scale = scales + 8 * half, *min = mins + 8 * half;
        const float max_scale = std::max(0.0f, *std::max_element(scale, scale + 8));
        const float max_min = std::max(0.0f, *std::max_element(min, min + 8));
        const float to_scale = max_scale > 0 ? 63.0f / max_scale : 0.0f;
        const float to_min = max_min > 0 ? 63.0f / max_min : 0.0f;
        const std::uint16_t d = float_to_half(max_scale / 63.0f), dmin = float_to_half(max_min / 63.0f);
        put_half(block, d);
        put_half(block + 2, dmin);
        std::uint8_t six[8], six_min[8];
        for (int j = 0; j < 8; ++j) {
            six[j] = std::min<std::uint8_t>(63, static_cast<std::uint8_t>(nearest(to_scale * scale[j])));
            six_min[j] = std::min<std::uint8_t>(63, static_cast<std::uint8_t>(nearest(to_min * min[j])));
            scale[j] = half_to_float(d) * static_cast<float>(six[j]);
            min[j] = half_to_float(dmin) * static_cast<float>(six_min[j]);
        }
        pack_six_bits(six, six_min, block + 4);
    }
    requantize(unit, scales, mins, 0, search.levels);
    for (int half = 0; half < 2; ++half) {
        std::uint8_t codes[SUPER];
        codes_in_order(unit, 8 * half, codes);
        std::uint8_t* block = blocks + half * size;
        std::uint8_t* low = block + (bits == 4 ? 16 : 48);
        for (int chunk = 0; chunk < 4; ++chunk) pack_nibbles(codes + 64 * chunk, 32, low + 32 * chunk);
        if (bits == 4) continue;
        std::memset(block + 16, 0, 32);
        for (int i = 0; i < SUPER; ++i) {
            std::uint8_t& high = block[16 + i % 32];
            high = static_cast<std::uint8_t>(high | (codes[i] >> 4) << (i / 32));
        }
    }
}

void encode_q6_k(Unit<16>& unit, std::uint8_t* block) {
    alignas(64) float scales[LANES];
    constexpr float none[LANES] = {};
    store(scales, make_symmetric_codes(unit));
    float largest = 0, max_scale = 0;
    for (const float scale : scales) {
        if (std::fabs(scale) > largest) {
            largest = std::fabs(scale);
            max_scale = scale;
        }
    }
    std::memset(block, 0, 210);
    if (largest < TINY) return;
    const float inverse = -128.0f / max_scale;
    const std::uint16_t d = float_to_half(1 / inverse);
    put_half(block + 208, d);
    for (int j = 0; j < 16; ++j) {
        const int scale = static_cast<std::int8_t>(std::min(127, nearest(inverse * scales[j])));
        block[192 + j] = static_cast<std::uint8_t>(scale);
        scales[j] = half_to_float(d) * static_cast<float>(scale);
    }
    requantize(unit, scales, none, -32, 31);
    std::uint8_t codes[SUPER], high[SUPER];
    codes_in_order(unit, 0, codes);
    for (int i = 0; i < SUPER; ++i) high[i] = codes[i] >> 4;
    for (int chunk = 0; chunk < 2; ++chunk) pack_nibbles(codes + 128 * chunk, 64, block + 64 * chunk);
    pack_two_bits(high, block + 128);
}

void encode_iq4_nl(Unit<32>& unit, std::uint8_t* blocks) {  // sixteen blocks
    alignas(64) float scales[LANES];
    const Vector16 scale = make_non_linear_scale(unit);
    store(scales, scale);
    const Vector16 inverse = select(equal(scale, zeros()), zeros(), divide(broadcast(1.0f), scale));
    for (int i = 0; i < 32; ++i) unit.set_code(i, nearest_entry_index(multiply(inverse, unit.weight(i))));
    for (int lane = 0; lane < LANES; ++lane, blocks += 18) {
        std::uint8_t codes[32];
        for (int i = 0; i < 32; ++i) codes[i] = static_cast<std::uint8_t>(unit.codes[i][lane]);
        put_half(blocks, float_to_half(scales[lane]));
        pack_nibbles(codes, 16, blocks + 2);
    }
}

void encode_iq4_xs(Unit<32>& unit, std::uint8_t* blocks) {  // two blocks
    alignas(64) float scales[LANES], inverses[LANES];
    store(scales, make_non_linear_scale(unit));
    for (int half = 0; half < 2; ++half) {
        std::uint8_t* block = blocks + 136 * half;
        std::memset(block, 0, 8);
        float largest = 0, max_scale = 0;
        for (int j = 8 * half; j < 8 * half + 8; ++j) {
            if (std::fabs(scales[j]) > largest) {
                largest = std::fabs(scales[j]);
                max_scale = scales[j];
            }
        }
        const float d = -max_scale / 32;
        const float inverse = d != 0 ? 1 / d : 0.0f;
        put_half(block, float_to_half(d));
        std::uint16_t high = 0;
        for (int j = 0; j < 8; ++j) {
            const int step = std::clamp(nearest(inverse * scales[8 * half + j]), -32, 31);
            const float scale = d * static_cast<float>(step);
            inverses[8 * half + j] = scale != 0 ? 1 / scale : 0.0f;
            block[4 + j / 2] = static_cast<std::uint8_t>(block[4 + j / 2] | ((step + 32) & 15) << (4 * (j % 2)));
            high = static_cast<std::uint16_t>(high | ((step + 32) >> 4) << (2 * j));
        }
        put_half(block + 2, high);
    }
    const Vector16 inverse = load(inverses);
    for (int i = 0; i < 32; ++i) unit.set_code(i, nearest_entry_index(multiply(inverse, unit.weight(i))));
    for (int half = 0; half < 2; ++half) {
        std::uint8_t codes[SUPER];
        codes_in_order(unit, 8 * half, codes);
        for (int sub = 0; sub < 8; ++sub) pack_nibbles(codes + 32 * sub, 16, blocks + 136 * half + 8 + 16 * sub);
    }
}

// ---- Rows ----

void load_floats(const void* from, Source source, std::int64_t first, std::int64_t count, float* to) {
    const auto* halves = static_cast<const std::uint16_t*>(from) + first;
    switch (source) {
        case Source::F32:
            std::memcpy(to, static_cast<const float*>(from) + first, static_cast<std::size_t>(count) * sizeof(float));
            return;
        case Source::F16:
            for (std::int64_t i = 0; i < count; ++i) to[i] = half_to_float(halves[i]);
            return;
        case Source::BF16:
            for (std::int64_t i = 0; i < count; ++i) {
                const std::uint32_t bits = static_cast<std::uint32_t>(halves[i]) << 16;
                std::memcpy(to + i, &bits, sizeof bits);
            }
            return;
    }
}

bool all_finite(const float* x, int count) {
    Vector16 sum = zeros();  // of zeros, and of NaN for what is NaN or infinite
    for (int i = 0; i < count; i += LANES) sum = add(sum, multiply(load(x + i), zeros()));
    return reduce_add(sum) == 0;
}

struct Layout {
    int unit, weights, bytes;  // weights of a unit; weights and bytes of a block
};

Layout layout_of(Type type) {
    switch (type) {
        case Type::Q4_0: return {32, 32, 18};
        case Type::Q4_1: return {32, 32, 20};
        case Type::Q5_0: return {32, 32, 22};
        case Type::Q5_1: return {32, 32, 24};
        case Type::Q8_0: return {32, 32, 34};
        case Type::Q1_0: return {128, 128, 18};
        case Type::TQ1_0: return {256, 256, 54};
        case Type::TQ2_0: return {256, 256, 66};
        case Type::Q2_K: return {256, 256, 84};
        case Type::Q3_K: return {256, 256, 110};
        case Type::Q4_K: return {512, 256, 144};
        case Type::Q5_K: return {512, 256, 176};
        case Type::Q6_K: return {256, 256, 210};
        case Type::IQ4_NL: return {512, 32, 18};
        case Type::IQ4_XS: return {512, 256, 136};
        case Type::MXFP4: return {32, 32, 17};
        case Type::NVFP4: return {64, 64, 36};
    }
    return {0, 0, 0};
}

template <int N, class Encode>
void with_lanes(const float* x, const Encode& encode) {
    Unit<N> unit;
    for (int lane = 0; lane < LANES; ++lane) {
        for (int i = 0; i < N; ++i) unit.x[i][lane] = x[lane * N + i];
    }
    encode(unit);
}

void encode_unit(Type type, const float* x, std::uint8_t* out) {
    switch (type) {
        case Type::Q4_0: return encode_symmetric(x, 8, out);
        case Type::Q4_1: return encode_with_minimum(x, 15, out);
        case Type::Q5_0: return encode_symmetric(x, 16, out);
        case Type::Q5_1: return encode_with_minimum(x, 31, out);
        case Type::Q8_0: return encode_q8_0(x, out);
        case Type::Q1_0: return encode_q1_0(x, out);
        case Type::TQ1_0: return encode_tq1_0(x, out);
        case Type::TQ2_0: return encode_tq2_0(x, out);
        case Type::Q2_K: return with_lanes<16>(x, [&](Unit<16>& unit) { encode_q2_k(unit, out); });
        case Type::Q3_K: return with_lanes<16>(x, [&](Unit<16>& unit) { encode_q3_k(unit, out); });
        case Type::Q4_K: return with_lanes<32>(x, [&](Unit<32>& unit) { encode_q45_k(unit, 4, out); });
        case Type::Q5_K: return with_lanes<32>(x, [&](Unit<32>& unit) { encode_q45_k(unit, 5, out); });
        case Type::Q6_K: return with_lanes<16>(x, [&](Unit<16>& unit) { encode_q6_k(unit, out); });
        case Type::IQ4_NL: return with_lanes<32>(x, [&](Unit<32>& unit) { encode_iq4_nl(unit, out); });
        case Type::IQ4_XS: return with_lanes<32>(x, [&](Unit<32>& unit) { encode_iq4_xs(unit, out); });
        case Type::MXFP4: return encode_mxfp4(x, out);
        case Type::NVFP4: return encode_nvfp4(x, out);
    }
}

// Calls encode(x, out) for every unit of contiguous weights; false where one of them is NaN or infinite.
template <class Encode>
bool encode_units(const Layout& layout, Source source, const void* weights, std::int64_t blocks, std::uint8_t* out,
                  const Encode& encode) {
    const std::int64_t total = blocks * layout.weights;
    const std::int64_t tasks = (total + TASK_WEIGHTS - 1) / TASK_WEIGHTS;
    std::atomic<bool> finite{true};
    parallel_for(tasks, [&](std::int64_t task) {
        alignas(64) float x[512];
        std::uint8_t encoded[2 * 176];  // of the largest unit
        const std::int64_t end = std::min((task + 1) * TASK_WEIGHTS, total);
        for (std::int64_t first = task * TASK_WEIGHTS; first < end; first += layout.unit) {
            const std::int64_t count = std::min<std::int64_t>(layout.unit, end - first);
            load_floats(weights, source, first, count, x);
            std::fill(x + count, x + layout.unit, 0.0f);
            if (!all_finite(x, layout.unit)) {
                finite.store(false, std::memory_order_relaxed);
                return;
            }
            encode(x, encoded);
            std::memcpy(out + first / layout.weights * layout.bytes, encoded,
                        static_cast<std::size_t>(count / layout.weights * layout.bytes));
        }
    });
    return finite.load();
}

}  // namespace
}  // namespace lowbit

// ``blocks`` blocks of GGUF type ``type`` from contiguous weights of kind ``source`` (0 f32, 1 f16, 2 bf16).
// 0; 1 where the type is not known here; 2 where a weight is NaN or infinite (the blocks then mean nothing).
LOWBIT_EXPORT int lowbit_quantize_blocks(std::int32_t type, std::int32_t source, const void* weights,
                                         std::int64_t blocks, std::uint8_t* out) {
    using namespace lowbit;
    const auto kind = static_cast<Type>(type);
    const Layout layout = layout_of(kind);
    if (layout.unit == 0 || source < 0 || source > 2) return 1;
    const auto encode = [&](const float* x, std::uint8_t* encoded) { encode_unit(kind, x, encoded); };
    return encode_units(layout, static_cast<Source>(source), weights, blocks, out, encode) ? 0 : 2;
}

// The same for IQ3_S, with the tables that quantize/gguf_iq3.py makes (struct Grid says what they hold).
LOWBIT_EXPORT int lowbit_quantize_iq3_s(const float* points, const std::int16_t* index, const std::int32_t* starts,
                                        const std::int16_t* near, const float* numbers, std::int32_t source,
                                        const void* weights, std::int64_t blocks, std::uint8_t* out) {
    using namespace lowbit;
    if (source < 0 || source > 2) return 1;
    const Grid grid = {points, index, starts, near, numbers};
    const auto encode = [&](const float* x, std::uint8_t* encoded) { encode_iq3_s(grid, x, encoded); };
    return encode_units({256, 256, 110}, static_cast<Source>(source), weights, blocks, out, encode) ? 0 : 2;
}
