// x as the linear kernels read it: rounded, tile by tile, so that a tile's columns of consecutive tokens are
// neighbours; beside it the sums that offsets and zero points are multiplied with.
#pragma once

#include <cmath>
#include <limits>

#include "linear_bytes.h"
#include "linear_words.h"

namespace lowbit {

#if defined(LOWBIT_AMX)
constexpr int BYTE_COLUMNS = 64;  // int8 columns of a token that lie together: a row of an AMX tile
constexpr std::int64_t READ_PAST = 1024;  // bytes behind x that may be read: rows of a tile that are no tokens
#else
constexpr int BYTE_COLUMNS = COLUMNS;
constexpr std::int64_t READ_PAST = 0;
#endif

// x of some tokens.
struct Input {
    // (tile, token, 32): bfloat16, float, int16 or int8 in the order of the operands. Under AMX int8 lies as (two tiles,
    // token, 64); whatever fills the second half of a last odd tile meets zeros.
    const std::uint8_t* values = nullptr;
    const float* sums = nullptr;           // (span, token): of the rounded numbers
    const float* scales = nullptr;         // (tile, token), InputKind::groups; (span, token) of words and scaled
    const std::int32_t* bases = nullptr;   // (span, token): base * sum, of whole numbers
    int tokens = 0;
    // Where the results will go; a token's stands ``out_stride`` floats behind the one before. Null: not known.
    const float* out = nullptr;
    std::int64_t out_stride = 0;

    template <class Element>
    const Element* at(std::int64_t tile, int token) const {
        return reinterpret_cast<const Element*>(values) + (tile * tokens + token) * COLUMNS;
    }
};

// What a weight wants of x.
struct InputShape {
    std::int64_t tiles = 0, columns = 0;
    std::int64_t span = 32;  // columns of a sum
    int element = 2;         // bytes of a number
    InputKind kind = InputKind::bfloat;
    bool scaled_sums = false;  // of whole numbers: sums of x rather than of its codes
    int largest = 0;           // InputKind::words: what the largest |x| becomes
    int base = 0;
    float factor = 1.0f;
    int numbers = 0;  // of a vector of a grid, where x comes in the order of linear_grids.h
    // InputKind::words: x is codes that a layer's quantizer made, whole numbers once they are multiplied by it; their
    // scales are laid out first. 0: scales are made here.
    float times = 0.0f;

    std::int64_t spans() const { return tiles * COLUMNS / span; }
    std::int64_t scales() const { return kind == InputKind::scaled || kind == InputKind::words ? spans() : tiles; }
    bool quantized() const { return kind == InputKind::scaled || times != 0.0f; }
    std::int64_t value_bytes() const {
        return whole() ? (tiles * COLUMNS + BYTE_COLUMNS - 1) / BYTE_COLUMNS * BYTE_COLUMNS : tiles * COLUMNS * element;
    }
    bool whole() const { return element == 1; }
    bool based() const { return whole() || kind == InputKind::words; }  // whether there are bases
};

// Where a token tile's input is written.
struct InputPlaces {
    std::uint8_t* values;
    float* sums;
    float* scales;
    std::int32_t* bases;
    std::uint8_t* faulty;  // (token,), of whole numbers: x holds a NaN or an infinity
    int tokens;
};

#if defined(__AVX2__)
// The order of 16 int8 columns in the operands.
using ByteOrder = __m128i;
inline ByteOrder byte_order() { return _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15); }
#endif

#if defined(__AVX512BF16__)

inline Sixteen store_bfloats(std::uint16_t* to, Sixteen x) {  // returns what was stored
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}
inline float sixteen_sum(Sixteen x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// The largest |x|; NaN where there is one.
inline float largest(Sixteen a, Sixteen b) {
    const __m512i size = _mm512_set1_epi32(0x7fffffff);
    const __m512i most = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), size),
                                          _mm512_and_si512(_mm512_castps_si512(b), size));
    const std::int32_t bits = _mm512_reduce_max_epi32(most);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
// Two vectors of 8 columns, or twice two of 4: their columns in turns.
inline Sixteen in_grid_order(Sixteen x, int numbers) {
    const __m512i eights = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    const __m512i fours = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    return _mm512_permutexvar_ps(numbers == 8 ? eights : fours, x);
}
// Rounds 16 numbers to int16, ties to even; returns them.
inline Sixteen store_words(std::int16_t* to, Sixteen x) {
    const __m512i whole = _mm512_cvtps_epi32(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(whole));
    return _mm512_cvtepi32_ps(whole);
}
// Rounds 16 numbers to int8, ties to even; returns them.
inline Sixteen store_ints(std::int8_t* to, Sixteen x, ByteOrder order) {
    const __m512i whole = _mm512_cvtps_epi32(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(whole), order));
    return _mm512_cvtepi32_ps(whole);
}

#elif defined(__AVX2__)

inline __m256i eight_bfloat_bits(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_and_si256(_mm256_blendv_epi8(rounded, quiet, nan), _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
}
inline Sixteen store_bfloats(std::uint16_t* to, Sixteen x) {
    const __m256i low = eight_bfloat_bits(x.low), high = eight_bfloat_bits(x.high);
    const __m256i both = _mm256_packus_epi32(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(both, 0xD8));
    return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
}
inline float sixteen_sum(Sixteen x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Sixteen a, Sixteen b) {
    const __m256i size = _mm256_set1_epi32(0x7fffffff);
    const auto bits = [&](__m256 x) { return _mm256_and_si256(_mm256_castps_si256(x), size); };
    const __m256i eight = _mm256_max_epi32(_mm256_max_epi32(bits(a.low), bits(a.high)),
                                           _mm256_max_epi32(bits(b.low), bits(b.high)));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1));
    const std::int32_t most = _mm_cvtsi128_si32(four);
    float value;
    std::memcpy(&value, &most, sizeof value);
    return value;
}
inline Sixteen in_grid_order(Sixteen x, int numbers) {
    if (numbers == 8) {
        const __m256 first = _mm256_unpacklo_ps(x.low, x.high), second = _mm256_unpackhi_ps(x.low, x.high);
        return {_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31)};
    }
    const __m256i turns = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return {_mm256_permutevar8x32_ps(x.low, turns), _mm256_permutevar8x32_ps(x.high, turns)};
}
inline Sixteen store_words(std::int16_t* to, Sixteen x) {
    const __m256i low = _mm256_cvtps_epi32(x.low), high = _mm256_cvtps_epi32(x.high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8));
    return {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)};
}
inline Sixteen store_ints(std::int8_t* to, Sixteen x, ByteOrder order) {
    const __m256i low = _mm256_cvtps_epi32(x.low), high = _mm256_cvtps_epi32(x.high);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(bytes, order));
    return {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)};
}

#endif

}  // namespace lowbit

#if defined(__ARM_NEON)
#include "linear_input_neon.h"
#endif

namespace lowbit {

// One token's scales of ``group`` columns, one a span. Columns that are not there are zeros under any scale.
inline void lay_out_scales(const float* scales, std::int64_t group, const InputShape& shape, const InputPlaces& to, int token) {
    const float factor = shape.times == 0.0f ? 1.0f : shape.factor / shape.times;  // a power of two
    for (std::int64_t span = 0; span < shape.spans(); ++span) {
        const std::int64_t column = span * shape.span;
        to.scales[span * to.tokens + token] = column < shape.columns ? scales[column / group] * factor : 1.0f;
    }
}

// take(part, sum) for the sums of LEAST_GROUP columns each.
template <class Take>
inline void each_least_sum(Sixteen a, Sixteen b, const Take& take) {
    alignas(64) float numbers[COLUMNS];
    sixteen_store(numbers, a);
    sixteen_store(numbers + 16, b);
    for (int part = 0; part < COLUMNS / LEAST_GROUP; ++part) {
        const float* const eight = numbers + part * LEAST_GROUP;
        take(part, ((eight[0] + eight[4]) + (eight[2] + eight[6])) + ((eight[1] + eight[5]) + (eight[3] + eight[7])));
    }
}

// What numbers up to ``most`` are multiplied with to become whole ones; what has no reciprocal is as good as zero.
inline Sixteen inverse_of(float scale) {
    return sixteen_set(scale < std::numeric_limits<float>::min() ? 0.0f : 1.0f / scale);
}

// The least power of two that is no smaller: numbers of few bits (an input that a layer quantized) stay what they are.
inline float power_of_two_from(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fffffu) & 0xff800000u;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// One token's row.
inline void lay_out(const float* row, const InputShape& shape, const InputPlaces& to, int token) {
    const ByteOrder order = byte_order();
    const std::int64_t tokens = to.tokens;
    float span_sum = 0.0f;  // InputKind::codes: whole numbers below 2^24 or so, else what float32 makes of them
    std::int32_t span_whole = 0;
    bool faulty = false;
    for (std::int64_t tile = 0; tile < shape.tiles; ++tile) {
        alignas(64) float padded[COLUMNS];
        const float* from = row + tile * COLUMNS;
        const std::int64_t left = shape.columns - tile * COLUMNS;
        if (left < COLUMNS) {
            std::memset(padded, 0, sizeof padded);
            if (left > 0) std::memcpy(padded, from, static_cast<std::size_t>(left) * sizeof(float));
            from = padded;
        }
        const std::int64_t place = (tile * tokens + token) * COLUMNS;
        Sixteen a = sixteen_load(from), b = sixteen_load(from + 16);
        if (shape.numbers != 0) {
            a = in_grid_order(a, shape.numbers);
            b = in_grid_order(b, shape.numbers);
        }
        if (shape.kind == InputKind::bfloat || shape.kind == InputKind::scaled) {
            if (shape.element == 4) {
                float* const values = reinterpret_cast<float*>(to.values) + place;
                sixteen_store(values, a);
                sixteen_store(values + 16, b);
                continue;
            }
            std::uint16_t* const values = reinterpret_cast<std::uint16_t*>(to.values) + place;
            a = store_bfloats(values, a);
            b = store_bfloats(values + 16, b);
            if (shape.span == 32) {
                to.sums[tile * tokens + token] = sixteen_sum(sixteen_add(a, b));
            } else if (shape.span > 32) {
                span_sum += sixteen_sum(sixteen_add(a, b));
                if ((tile + 1) * COLUMNS % shape.span == 0) {
                    to.sums[((tile + 1) * COLUMNS / shape.span - 1) * tokens + token] = span_sum;
                    span_sum = 0.0f;
                }
            } else if (shape.span == LEAST_GROUP) {
                each_least_sum(a, b, [&](int part, float sum) {
                    to.sums[(tile * (COLUMNS / LEAST_GROUP) + part) * tokens + token] = sum;
                });
            } else {
                to.sums[tile * 2 * tokens + token] = sixteen_sum(a);
                to.sums[(tile * 2 + 1) * tokens + token] = sixteen_sum(b);
            }
            continue;
        }
        float scale = 1.0f;
        const float most = largest(a, b);
        const bool sound = most <= std::numeric_limits<float>::max();
        faulty = faulty || !sound;
        if (shape.times != 0.0f) {
            a = sixteen_multiply(a, sixteen_set(shape.times));
            b = sixteen_multiply(b, sixteen_set(shape.times));
        } else if (shape.kind != InputKind::codes) {
            scale = most / static_cast<float>(shape.kind == InputKind::words ? shape.largest : LARGEST_INPUT);
            if (shape.largest == largest_word(WordKind::line) && sound) scale = power_of_two_from(scale);
            const Sixteen inverse = inverse_of(scale);
            a = sixteen_multiply(a, inverse);
            b = sixteen_multiply(b, inverse);
        }
        if (!sound) a = b = sixteen_zeros();  // what no whole number says must not overflow one
        const auto put = [&](std::int64_t span, float sum, std::int32_t whole) {
            to.sums[span * tokens + token] = shape.scaled_sums ? sum * scale : sum / shape.factor;
            to.bases[span * tokens + token] = shape.base * whole;
        };
        const auto put_part = [&](std::int64_t span, float sum) { put(span, sum, static_cast<std::int32_t>(sum)); };
        if (shape.kind == InputKind::words) {
            std::int16_t* const values = reinterpret_cast<std::int16_t*>(to.values) + place;
            a = store_words(values, a);
            b = store_words(values + 16, b);
            if (!sound) scale = std::numeric_limits<float>::quiet_NaN();
            const std::int64_t parts = COLUMNS / shape.span;
            for (std::int64_t span = tile * parts; span < (tile + 1) * parts; ++span) {
                if (shape.times == 0.0f || !sound) to.scales[span * tokens + token] = scale * shape.factor;
            }
            // Sums of 32 are whole numbers below 2^20, exact in float32.
            if (shape.span == 32) {
                put_part(tile, sixteen_sum(sixteen_add(a, b)));
            } else if (shape.span == 16) {
                put_part(tile * 2, sixteen_sum(a));
                put_part(tile * 2 + 1, sixteen_sum(b));
            } else {
                each_least_sum(a, b, [&](int part, float sum) { put_part(tile * (COLUMNS / LEAST_GROUP) + part, sum); });
            }
            continue;
        }
        const std::int64_t line = tile * COLUMNS / BYTE_COLUMNS * tokens + token;
        std::int8_t* const values =
            reinterpret_cast<std::int8_t*>(to.values) + line * BYTE_COLUMNS + tile * COLUMNS % BYTE_COLUMNS;
        const float sums[2] = {sixteen_sum(store_ints(values, a, order)), sixteen_sum(store_ints(values + 16, b, order))};
        if (to.scales != nullptr) to.scales[tile * tokens + token] = scale * shape.factor;
        if (shape.span == 16) {
            for (int half = 0; half < 2; ++half) put_part(tile * 2 + half, sums[half]);
            continue;
        }
        span_sum += sums[0] + sums[1];
        span_whole += static_cast<std::int32_t>(sums[0] + sums[1]);
        if ((tile + 1) * COLUMNS % shape.span == 0) {
            put((tile + 1) * COLUMNS / shape.span - 1, span_sum, span_whole);
            span_sum = 0.0f;
            span_whole = 0;
        }
    }
    if (shape.whole()) to.faulty[token] = faulty;
}

}  // namespace lowbit
