// Writing to the KV cache: what is stored of a token depends on that token alone (attention_cache.h).
#include <algorithm>
#include <cmath>
#include <utility>

#include "attention_cache.h"
#include "lowbit.h"
#include "thread_pool.h"

namespace lowbit {
namespace {

std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The nearest number of an 8-bit float, ties to even; what is too large becomes LARGEST, a code of NaN stays.
template <int MANTISSA, int BIAS, std::uint32_t LARGEST, std::uint32_t NO_NUMBER>
std::uint8_t to_small_float(float value) {
    constexpr int DROPPED = 23 - MANTISSA;
    constexpr std::uint32_t REBIASED = static_cast<std::uint32_t>(127 - BIAS) << MANTISSA;
    constexpr std::uint32_t END = (LARGEST + REBIASED) << DROPPED;           // LARGEST as a float
    constexpr std::uint32_t NORMAL = static_cast<std::uint32_t>(128 - BIAS) << 23;  // the smallest normal one
    const std::uint32_t bits = bits_of(value) & 0x7fffffffu, sign = bits_of(value) >> 24 & 0x80u;
    if (bits > 0x7f800000u) return static_cast<std::uint8_t>(sign | NO_NUMBER);
    if (bits >= END) return static_cast<std::uint8_t>(sign | LARGEST);
    if (bits < NORMAL) {  // subnormal steps are all alike: this sum has them as its last bits
        const float shift = float_of(static_cast<std::uint32_t>(127 + 24 - BIAS - MANTISSA) << 23);
        const std::uint32_t steps = bits_of(float_of(bits) + shift) & ((2u << MANTISSA) - 1u);
        return static_cast<std::uint8_t>(sign | steps);
    }
    const std::uint32_t rounded = bits + ((1u << (DROPPED - 1)) - 1u) + (bits >> DROPPED & 1u);
    return static_cast<std::uint8_t>(sign | ((rounded >> DROPPED) - REBIASED));
}

std::uint8_t to_e4m3(float value) { return to_small_float<3, 7, 0x7e, 0x7f>(value); }
std::uint8_t to_e5m2(float value) { return to_small_float<2, 15, 0x7b, 0x7f>(value); }

// The bfloat16 next to a number, away from zero or towards it.
Bfloat away_from_zero(float value) { return static_cast<Bfloat>((bits_of(value) + 0xffffu) >> 16); }
Bfloat towards_zero(float value) { return static_cast<Bfloat>(bits_of(value) >> 16); }

constexpr Bfloat NO_SCALE = 0x7fc0;  // NaN

// What a group's codes are relative to. A NaN or an infinity in it makes all of it NaN.
struct Range {
    float lowest, highest;
    bool finite;
};

Range range_of(const float* numbers, int count) {
    Vector16 lowest = load(numbers), highest = lowest, poison = zeros();
    for (int at = 0; at < count; at += LANES) {
        const Vector16 here = load(numbers + at);
        lowest = minimum(lowest, here);
        highest = maximum(highest, here);
        poison = fma(here, zeros(), poison);
    }
    const float low = -reduce_max(subtract(zeros(), lowest));
    return {low, reduce_max(highest), reduce_add(poison) == 0.0f};
}

// The numbers divided by their scale and rounded, as codes; 0 where there is no scale to divide by.
template <class Code>
void encode_group(const float* numbers, int count, float low, float scale, std::uint8_t* codes, Code&& code) {
    if (!(scale > 0.0f && scale < -MINUS_INFINITY)) {
        std::fill_n(codes, count, std::uint8_t{0});
        return;
    }
    alignas(64) float quotients[LANES];
    for (int at = 0; at < count; at += LANES) {
        store(quotients, divide(subtract(load(numbers + at), broadcast(low)), broadcast(scale)));
        for (int lane = 0; lane < LANES; ++lane) codes[at + lane] = code(quotients[lane]);
    }
}

std::uint8_t to_integer(float value) {  // of 0 .. 15
    return static_cast<std::uint8_t>(static_cast<std::int32_t>(std::nearbyint(value)));
}

std::uint8_t to_signed_integer(float value) {
    return static_cast<std::uint8_t>(to_integer(std::fabs(value)) | (std::signbit(value) ? 0x80u : 0u));
}

// One code a byte for each number of a head's vector, and its scales, `stride` apart.
void encode(const Store& to, const float* numbers, std::uint8_t* codes, Bfloat* scales, int stride) {
    const int group = to.group > 0 ? to.group : to.dim;
    for (int begin = 0; begin < to.dim; begin += group) {
        const int count = std::min(group, to.dim - begin);
        float low = 0.0f, scale = 1.0f;
        if (to.group > 0) {
            const Range range = range_of(numbers + begin, count);
            const float largest = std::max(-range.lowest, range.highest);
            Bfloat* const mine = scales + begin / group * to.parameters() * stride;
            Bfloat stored;
            if (to.format == Format::INT4) {
                const Bfloat lowest =
                    range.lowest < 0.0f ? away_from_zero(range.lowest) : towards_zero(range.lowest);
                low = from_bfloat(lowest);
                mine[stride] = lowest;
                stored = away_from_zero((range.highest - low) / 15.0f);
            } else {
                const float codes_reach = to.format == Format::INT8   ? 127.0f
                                          : to.format == Format::E4M3 ? 448.0f
                                                                      : 57344.0f;
                stored = away_from_zero(largest / codes_reach);
            }
            mine[0] = range.finite ? stored : NO_SCALE;
            scale = from_bfloat(mine[0]);
        }
        const float* const from = numbers + begin;
        switch (to.format) {
            case Format::E4M3: encode_group(from, count, low, scale, codes + begin, to_e4m3); break;
            case Format::E5M2: encode_group(from, count, low, scale, codes + begin, to_e5m2); break;
            case Format::INT8: encode_group(from, count, low, scale, codes + begin, to_signed_integer); break;
            default: encode_group(from, count, low, scale, codes + begin, to_integer);
        }
    }
}

std::uint16_t to_half(float value) {  // saturates: an infinity in the cache would spoil every later token
    const float within = value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value;
    return float_to_half(within);
}

// One token's codes into a page, two dimensions a time: K's are rows of its quads, V's lanes.
template <bool KEYS, bool NIBBLES>
void write_codes(const Store& to, std::uint8_t* page, int offset, const std::uint8_t* codes) {
    constexpr int PER_BYTE = NIBBLES ? 2 : 1, BYTES = QUAD_BYTES<NIBBLES>;
    const int place = KEYS ? place_of<KEYS, NIBBLES>(0, offset) : place_of<KEYS, NIBBLES>(offset % 4, 0);
    page += place / PER_BYTE + (KEYS ? 0 : offset / 4 * (to.dim / LANES) * BYTES);
    constexpr int QUAD = KEYS ? 4 : LANES;  // dimensions of it
    for (int begin = 0; begin < to.dim; begin += QUAD, page += BYTES) {
        for (int dimension = 0; dimension < QUAD; dimension += 2) {
            const auto at = [](int which) {
                const int code = KEYS ? place_of<KEYS, NIBBLES>(which, 0) : place_of<KEYS, NIBBLES>(0, which);
                return code / PER_BYTE;
            };
            const std::uint8_t first = codes[begin + dimension], second = codes[begin + dimension + 1];
            if (NIBBLES) {
                page[at(dimension)] = static_cast<std::uint8_t>(first | second << 4);
            } else {
                page[at(dimension)] = first;
                page[at(dimension + 1)] = second;
            }
        }
    }
}

template <bool KEYS>
void write_codes(const Store& to, std::uint8_t* page, int offset, const std::uint8_t* codes) {
    const bool nibbles = to.format == Format::INT4;
    (nibbles ? write_codes<KEYS, true> : write_codes<KEYS, false>)(to, page, offset, codes);
}

void round_row(const float* row, int dim, Bfloat* to) {
    for (int dimension = 0; dimension < dim; ++dimension) to[dimension] = to_bfloat(row[dimension]);
}

void write_key(const Store& to, std::uint8_t* page, int offset, const float* key) {
    if (to.format == Format::BF16) {
        alignas(64) Bfloat rounded[MAX_K_DIM];
        round_row(key, to.dim, rounded);
        page += offset * 2 * sizeof(Bfloat);
        for (int dimension = 0; dimension < to.dim; dimension += 2)
            std::memcpy(page + dimension * PAGE_TOKENS * sizeof(Bfloat), rounded + dimension, 2 * sizeof(Bfloat));
    } else if (to.format == Format::F32) {
        for (int dimension = 0; dimension < to.dim; ++dimension)
            reinterpret_cast<float*>(page)[dimension * PAGE_TOKENS + offset] = key[dimension];
    } else if (to.format == Format::F16) {
        auto* const halves = reinterpret_cast<std::uint16_t*>(page) + offset;
        for (int dimension = 0; dimension < to.dim; ++dimension)
            halves[dimension * PAGE_TOKENS] = to_half(key[dimension]);
    } else {
        std::uint8_t codes[MAX_K_DIM];
        encode(to, key, codes, to.scales(page) + offset, PAGE_TOKENS);
        write_codes<true>(to, page, offset, codes);
    }
}

// Two tokens' of a page in bfloat16, the first at an even place.
void write_values(const Store& to, std::uint8_t* page, int offset, const float* first, const float* second) {
    Bfloat* const pairs = reinterpret_cast<Bfloat*>(page) + offset * to.dim;
    for (int dimension = 0; dimension < to.dim; ++dimension) {
        pairs[2 * dimension] = to_bfloat(first[dimension]);
        pairs[2 * dimension + 1] = to_bfloat(second[dimension]);
    }
}

void write_value(const Store& to, std::uint8_t* page, int offset, const float* value) {
    if (to.format == Format::BF16) {
        alignas(64) Bfloat rounded[MAX_V_DIM];
        round_row(value, to.dim, rounded);
        Bfloat* const pairs = reinterpret_cast<Bfloat*>(page) + offset / 2 * 2 * to.dim + offset % 2;
        for (int dimension = 0; dimension < to.dim; ++dimension) pairs[2 * dimension] = rounded[dimension];
    } else if (to.format == Format::F32) {
        std::copy_n(value, to.dim, reinterpret_cast<float*>(page) + offset * to.dim);
    } else if (to.format == Format::F16) {
        std::transform(value, value + to.dim, reinterpret_cast<std::uint16_t*>(page) + offset * to.dim,
                       to_half);
    } else {
        std::uint8_t codes[MAX_V_DIM];
        encode(to, value, codes, to.scales(page) + offset, PAGE_TOKENS);
        write_codes<false>(to, page, offset, codes);
    }
}

// Takes hold of the lines that a token's vector goes to: a decode step's tokens lie in pages of their own, which
// nobody has touched since the step before, and line by line each would be waited for.
void fetch_lines(const Store& to, const std::uint8_t* page, int offset, bool keys) {
    const auto row = static_cast<std::int64_t>(to.code_bytes() / PAGE_TOKENS);
    const int together = keys ? PAGE_TOKENS : to.narrow() ? 4 : to.format == Format::BF16 ? 2 : 1;  // tokens of a line
    const std::uint8_t* const from = page + offset / together * together * row;
    for (std::int64_t byte = 0; byte < together * row; byte += 64) __builtin_prefetch(from + byte, 1);
}

}  // namespace
}  // namespace lowbit

// k (tokens, heads, k_dim) and v (tokens, heads, v_dim; null for a latent cache), strides in floats between
// tokens. 0, or a Status.
LOWBIT_EXPORT int lowbit_attention_write(const lowbit_attention_cache* cache, const float* k,
                                         std::int64_t k_stride, const float* v, std::int64_t v_stride,
                                         const std::int32_t* slots, std::int32_t tokens) {
    using namespace lowbit;
    for (int token = 0; token < tokens; ++token) {
        if (slots[token] < 0 || slots[token] / PAGE_TOKENS >= cache->pages) return BAD_SLOT;
    }
    const Store keys = key_store(*cache), values = value_store(*cache);
    constexpr int TOGETHER = 32;  // tokens a task: neighbours share pages, and so cache lines
    constexpr int FEW = 8;        // are written sooner than another thread wakes up
    const std::int64_t tiles = (tokens + TOGETHER - 1) / TOGETHER, parts = tokens < FEW ? 1 : cache->heads;
    const int heads = parts == 1 ? cache->heads : 1;  // of a task
    parallel_for(tiles * parts, [&](std::int64_t task) {
        const int first = static_cast<int>(task / parts) * TOGETHER, end = std::min(first + TOGETHER, tokens);
        const int first_head = static_cast<int>(task % parts);
        for (int head = first_head; head < first_head + heads; ++head) {
            bool written = false;  // its value, with that of the token before
            for (int token = first; token < end; ++token) {
                const int page = slots[token] / PAGE_TOKENS, offset = slots[token] % PAGE_TOKENS;
                if (token + 1 < end && slots[token + 1] / PAGE_TOKENS != page) {
                    const int next = slots[token + 1] / PAGE_TOKENS, place = slots[token + 1] % PAGE_TOKENS;
                    fetch_lines(keys, keys.page(next, head), place, true);
                    if (!cache->latent) fetch_lines(values, values.page(next, head), place, false);
                }
                write_key(keys, keys.page(page, head), offset, k + token * k_stride + head * keys.dim);
                if (cache->latent) continue;
                if (std::exchange(written, false)) continue;
                std::uint8_t* const to = values.page(page, head);
                const float* const value = v + token * v_stride + head * values.dim;
                const bool pairs = values.format == Format::BF16 && offset % 2 == 0;
                if (pairs && token + 1 < end && slots[token + 1] == slots[token] + 1) {
                    write_values(values, to, offset, value, value + v_stride);
                    written = true;
                    continue;
                }
                write_value(values, to, offset, value);
            }
        }
    });
    return OK;
}
