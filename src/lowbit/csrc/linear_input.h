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

// Whether prompts' tokens meet panels of whole numbers, with a scale for so many columns, and are such numbers themselves
// (linear_rounded.h).
#if defined(__AVX2__) && !defined(__AVX512BF16__)
constexpr bool WORD_PANELS = true;
#else
constexpr bool WORD_PANELS = false;
#endif
constexpr int WORD_PANEL_COLUMNS = 128;
constexpr int LARGEST_PANEL_INPUT = (1 << 13) - 1;

// x of some tokens.
struct Input {
    // (tile, token, 32): bfloat16 (as Bfloat16), float, int16 or int8 in the order of the operands. Under AMX int8 lies as (two tiles,
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
    bool rounded = true;     // to bfloat16, of InputKind::bfloat and floats
    InputKind kind = InputKind::bfloat;
    bool scaled_sums = false;  // of whole numbers: sums of x rather than of its codes
    int largest = 0;           // InputKind::words: what the largest |x| becomes
    int base = 0;
    float factor = 1.0f;
    int numbers = 0;  // of a vector of a grid, where x comes in the order of linear_grids.h
    // InputKind::words: x is codes that a layer's quantizer made, whole numbers once they are multiplied by it; their
    // scales are laid out first. 0: scales are made here.
    float times = 0.0f;

    std::int64_t spans() const { return (tiles * COLUMNS + span - 1) / span; }
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

#if defined(LOWBIT_AVX512)

#if defined(__AVX512BF16__)
inline Sixteen store_bfloats(Bfloat16* to, Sixteen x) {  // returns what was stored
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}
#else
inline Sixteen store_bfloats(Bfloat16* to, Sixteen x) {
    const __m512i bits = _mm512_castps_si512(x), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_and_si512(_mm512_mask_blend_epi32(nan, nearest, quiet), upper);
    _mm512_storeu_si512(to, rounded);
    return _mm512_castsi512_ps(rounded);
}
#endif
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
// Of each lane what is further from zero, as bits: NaN is furthest. The sign is lost.
inline Sixteen sixteen_larger(Sixteen a, Sixteen b) {
    const __m512i size = _mm512_set1_epi32(0x7fffffff);
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), size),
                                                _mm512_and_si512(_mm512_castps_si512(b), size)));
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
inline Sixteen store_bfloats(Bfloat16* to, Sixteen x) {
    const Sixteen rounded{_mm256_castsi256_ps(eight_bfloat_bits(x.low)), _mm256_castsi256_ps(eight_bfloat_bits(x.high))};
    sixteen_store(to, rounded);
    return rounded;
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
inline Sixteen sixteen_larger(Sixteen a, Sixteen b) {
    const __m256i size = _mm256_set1_epi32(0x7fffffff);
    const auto bits = [&](__m256 x) { return _mm256_and_si256(_mm256_castps_si256(x), size); };
    return {_mm256_castsi256_ps(_mm256_max_epi32(bits(a.low), bits(b.low))),
            _mm256_castsi256_ps(_mm256_max_epi32(bits(a.high), bits(b.high)))};
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

// take(tile, its first 16 columns, the others) for each tile of a row; behind the last column there are zeros.
template <class Take>
INLINE void each_tile(const float* row, const InputShape& shape, const Take& take) {
    const std::int64_t columns = shape.columns, tiles = shape.tiles;
    const int numbers = shape.numbers;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
        alignas(64) float padded[COLUMNS];
        const float* from = row + tile * COLUMNS;
        const std::int64_t left = columns - tile * COLUMNS;
        if (left < COLUMNS) {
            std::memset(padded, 0, sizeof padded);
            if (left > 0) std::memcpy(padded, from, static_cast<std::size_t>(left) * sizeof(float));
            from = padded;
        }
        Sixteen a = sixteen_load(from), b = sixteen_load(from + 16);
        if (numbers != 0) {
            a = in_grid_order(a, numbers);
            b = in_grid_order(b, numbers);
        }
        take(tile, a, b);
    }
}

constexpr int WIDE = 0;  // spans of several tiles

// with(columns of a sum) as a constant, WIDE where they are more than a tile's.
template <class With>
INLINE void by_span(std::int64_t span, const With& with) {
    switch (span) {
        case LEAST_GROUP: return with(std::integral_constant<int, LEAST_GROUP>{});
        case 16: return with(std::integral_constant<int, 16>{});
        case COLUMNS: return with(std::integral_constant<int, COLUMNS>{});
        default: return with(std::integral_constant<int, WIDE>{});
    }
}

// Counts the tiles of wide spans, of which each ends with its last.
struct WideSpans {
    explicit WideSpans(const InputShape& shape) : tiles(shape.span / COLUMNS), left(tiles) {}
    bool ends() {
        if (--left > 0) return false;
        left = tiles;
        return true;
    }
    std::int64_t tiles, left, span = 0;
};

// x in bfloat16, and its sums.
template <int SPAN>
INLINE void lay_out_bfloats(const float* row, const InputShape& shape, const InputPlaces& to, int token) {
    const std::int64_t tokens = to.tokens;
    auto* values = reinterpret_cast<Bfloat16*>(to.values) + static_cast<std::int64_t>(token) * COLUMNS;
    float* const sums = to.sums + token;
    WideSpans wide(shape);
    float wide_sum = 0.0f;
    each_tile(row, shape, [&](std::int64_t tile, Sixteen a, Sixteen b) __attribute__((always_inline)) {
        a = store_bfloats(values, a);
        b = store_bfloats(values + 16, b);
        values += tokens * COLUMNS;
        if constexpr (SPAN == COLUMNS) {
            sums[tile * tokens] = sixteen_sum(sixteen_add(a, b));
        } else if constexpr (SPAN == 16) {
            sums[tile * 2 * tokens] = sixteen_sum(a);
            sums[(tile * 2 + 1) * tokens] = sixteen_sum(b);
        } else if constexpr (SPAN == LEAST_GROUP) {
            each_least_sum(a, b, [&](int part, float sum) {
                sums[(tile * (COLUMNS / LEAST_GROUP) + part) * tokens] = sum;
            });
        } else {
            wide_sum += sixteen_sum(sixteen_add(a, b));
            if (!wide.ends()) return;
            sums[wide.span++ * tokens] = wide_sum;
            wide_sum = 0.0f;
        }
    });
}

inline void lay_out_floats(const float* row, const InputShape& shape, const InputPlaces& to, int token) {
    auto* const values = reinterpret_cast<float*>(to.values);
    each_tile(row, shape, [&](std::int64_t tile, Sixteen a, Sixteen b) {
        const std::int64_t place = (tile * to.tokens + token) * COLUMNS;
        sixteen_store(values + place, a);
        sixteen_store(values + place + 16, b);
    });
}

// A tile's 32 numbers as whole ones up to ``most``, still to be rounded, and their scale.
struct Whole {
    Sixteen a, b;
    float scale;
    bool sound;  // neither NaN nor infinity; else there are zeros, which overflow nothing
};

INLINE Whole to_whole(Sixteen a, Sixteen b, InputKind kind, float times, int most) {
    Whole made{a, b, 1.0f, true};
    const float found = largest(a, b);
    made.sound = found <= std::numeric_limits<float>::max();
    if (times != 0.0f) {
        made.a = sixteen_multiply(a, sixteen_set(times));
        made.b = sixteen_multiply(b, sixteen_set(times));
    } else if (kind != InputKind::codes) {
        made.scale = found / static_cast<float>(most);
        if (most == largest_word(WordKind::line) && made.sound) made.scale = power_of_two_from(made.scale);
        const Sixteen inverse = inverse_of(made.scale);
        made.a = sixteen_multiply(a, inverse);
        made.b = sixteen_multiply(b, inverse);
    }
    if (!made.sound) made.a = made.b = sixteen_zeros();
    return made;
}

// x as whole numbers of 16 bits.
template <int SPAN>
INLINE void lay_out_words(const float* row, const InputShape& shape, const InputPlaces& to, int token) {
    static_assert(SPAN != WIDE, "their scales are of 32 columns at most");
    constexpr int PARTS = COLUMNS / SPAN;
    const std::int64_t tokens = to.tokens;
    const float times = shape.times, factor = shape.factor;
    const bool scaled_sums = shape.scaled_sums;
    const int base = shape.base, most = shape.largest;
    auto* const values = reinterpret_cast<std::int16_t*>(to.values);
    each_tile(row, shape, [&](std::int64_t tile, Sixteen a, Sixteen b) __attribute__((always_inline)) {
        const std::int64_t place = (tile * tokens + token) * COLUMNS;
        Whole whole = to_whole(a, b, InputKind::words, times, most);
        a = store_words(values + place, whole.a);
        b = store_words(values + place + 16, whole.b);
        if (!whole.sound) whole.scale = std::numeric_limits<float>::quiet_NaN();
        // Sums of 32 are whole numbers below 2^20, exact in float32.
        const auto put = [&](int part, float sum) __attribute__((always_inline)) {
            const std::int64_t at = (tile * PARTS + part) * tokens + token;
            if (times == 0.0f || !whole.sound) to.scales[at] = whole.scale * factor;
            to.sums[at] = scaled_sums ? sum * whole.scale : sum / factor;
            to.bases[at] = base * static_cast<std::int32_t>(sum);
        };
        if constexpr (SPAN == COLUMNS) {
            put(0, sixteen_sum(sixteen_add(a, b)));
        } else if constexpr (SPAN == 16) {
            put(0, sixteen_sum(a));
            put(1, sixteen_sum(b));
        } else {
            each_least_sum(a, b, put);
        }
    });
}

#if defined(__AVX2__)
// The same with a scale for each ``shape.span`` columns, several tiles; the last ones may be fewer. No sums.
inline void lay_out_wide_words(const float* row, const InputShape& shape, const InputPlaces& to, int token) {
    const std::int64_t of_span = shape.span / COLUMNS;
    for (std::int64_t first = 0, span = 0; first < shape.tiles; first += of_span, ++span) {
        InputShape part = shape;
        part.tiles = std::min(of_span, shape.tiles - first);
        part.columns = shape.columns - first * COLUMNS;
        Sixteen held[2] = {sixteen_zeros(), sixteen_zeros()};
        each_tile(row + first * COLUMNS, part, [&](std::int64_t, Sixteen a, Sixteen b) __attribute__((always_inline)) {
            held[0] = sixteen_larger(held[0], a);
            held[1] = sixteen_larger(held[1], b);
        });
        const float most = largest(held[0], held[1]);
        const bool sound = most <= std::numeric_limits<float>::max();
        const float scale = sound ? power_of_two_from(most / static_cast<float>(shape.largest)) : most;
        const Sixteen inverse = sound ? inverse_of(scale) : sixteen_zeros();
        to.scales[span * to.tokens + token] = sound ? scale : std::numeric_limits<float>::quiet_NaN();
        auto* const values = reinterpret_cast<std::int16_t*>(to.values) + (first * to.tokens + token) * COLUMNS;
        each_tile(row + first * COLUMNS, part, [&](std::int64_t tile, Sixteen a, Sixteen b) __attribute__((always_inline)) {
            std::int16_t* const at = values + tile * to.tokens * COLUMNS;
            store_words(at, sound ? sixteen_multiply(a, inverse) : inverse);
            store_words(at + 16, sound ? sixteen_multiply(b, inverse) : inverse);
        });
    }
}
#endif

// x as int8. Of InputKind::codes it holds such numbers already: wide sums of them are whole numbers below 2^24 or so,
// else what float32 makes of them.
template <int SPAN>
INLINE void lay_out_bytes(const float* row, const InputShape& shape, const InputPlaces& to, int token) {
    const std::int64_t tokens = to.tokens;
    const float factor = shape.factor;
    const bool scaled_sums = shape.scaled_sums;
    const int base = shape.base;
    const InputKind kind = shape.kind;
    const ByteOrder order = byte_order();
    auto* const values = reinterpret_cast<std::int8_t*>(to.values);
    float* const sums = to.sums + token;
    std::int32_t* const bases = to.bases + token;
    float* const scales = to.scales == nullptr ? nullptr : to.scales + token;
    WideSpans wide(shape);
    float wide_sum = 0.0f;
    std::int32_t wide_whole = 0;
    bool faulty = false;
    each_tile(row, shape, [&](std::int64_t tile, Sixteen a, Sixteen b) __attribute__((always_inline)) {
        const Whole whole = to_whole(a, b, kind, 0.0f, LARGEST_INPUT);
        faulty = faulty || !whole.sound;
        const std::int64_t line = tile * COLUMNS / BYTE_COLUMNS * tokens + token;
        std::int8_t* const here = values + line * BYTE_COLUMNS + tile * COLUMNS % BYTE_COLUMNS;
        a = store_ints(here, whole.a, order);
        b = store_ints(here + 16, whole.b, order);
        if (scales != nullptr) scales[tile * tokens] = whole.scale * factor;
        const auto put = [&](std::int64_t span, float sum, std::int32_t exact) __attribute__((always_inline)) {
            sums[span * tokens] = scaled_sums ? sum * whole.scale : sum / factor;
            bases[span * tokens] = base * exact;
        };
        if constexpr (SPAN == 16) {
            const float halves[2] = {sixteen_sum(a), sixteen_sum(b)};
            for (int half = 0; half < 2; ++half) put(tile * 2 + half, halves[half], static_cast<std::int32_t>(halves[half]));
            return;
        }
        const float sum = sixteen_sum(sixteen_add(a, b));
        if constexpr (SPAN == COLUMNS) {
            put(tile, sum, static_cast<std::int32_t>(sum));
        } else {
            wide_sum += sum;
            wide_whole += static_cast<std::int32_t>(sum);
            if (!wide.ends()) return;
            put(wide.span++, wide_sum, wide_whole);
            wide_sum = 0.0f;
            wide_whole = 0;
        }
    });
    to.faulty[token] = faulty;
}

// One token's row, as ``shape`` wants it.
inline void lay_out(const float* row, const InputShape& shape, const InputPlaces& to, int token) {
    const bool bfloat = shape.kind == InputKind::bfloat || shape.kind == InputKind::scaled;
    if (bfloat && !shape.rounded) return lay_out_floats(row, shape, to, token);
    by_span(shape.span, [&](auto span) __attribute__((always_inline)) {
        constexpr int SPAN = decltype(span)::value;
        if (bfloat) {
            lay_out_bfloats<SPAN>(row, shape, to, token);
        } else if (shape.kind == InputKind::words) {
            if constexpr (SPAN != WIDE) lay_out_words<SPAN>(row, shape, to, token);
#if defined(__AVX2__)
            else lay_out_wide_words(row, shape, to, token);
#endif
        } else if constexpr (SPAN != LEAST_GROUP) {  // meets_bytes
            lay_out_bytes<SPAN>(row, shape, to, token);
        }
    });
}

}  // namespace lowbit
