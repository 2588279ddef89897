// The tiles of the linear kernels in AVX2 registers, decoded to floats; included by linear_tiles.h.
#pragma once

#include "linear_tiles.h"

// At this place a value is in a register, for the compiler that would rather read it again, or make it later.
#define KEEP_IN_REGISTER(value) asm("" : "+x"(value))

namespace lowbit {

// Integer tables are lines: their values need no lookup.
struct Table {
    alignas(32) float values[64];
    alignas(32) std::uint8_t low[32], high[32];  // bytes of the first 16 entries, twice
    bool line = true;
    const std::uint8_t* behind;  // vectors of grids: the low bytes of all, then the high ones
    explicit Table(const std::uint16_t* from) : behind(reinterpret_cast<const std::uint8_t*>(from + 64)) {
        for (int i = 0; i < 64; ++i) values[i] = bfloat_to_float(from[i]);
        for (int i = 0; i < 32; ++i) {
            low[i] = static_cast<std::uint8_t>(from[i % 16]);
            high[i] = static_cast<std::uint8_t>(from[i % 16] >> 8);
        }
        // Short tables repeat: the first four codes tell a line from nf4-like tables, the widths do the rest.
        for (int i = 1; i < 4; ++i) line = line && values[i] == values[0] + static_cast<float>(i);
    }
};

template <Codes CODES>
inline void expand_grid(const std::uint8_t* tile, const std::uint8_t* grid, std::uint8_t* planes);

struct Sixteen {
    __m256 low, high;
};
inline Sixteen sixteen_zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Sixteen sixteen_load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void sixteen_store(float* to, Sixteen x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
inline void sixteen_store_some(float* to, Sixteen x, int count) {
    float all[ROWS];
    sixteen_store(all, x);
    std::memcpy(to, all, static_cast<std::size_t>(count) * sizeof(float));
}
inline Sixteen sixteen_fma(Sixteen a, Sixteen b, Sixteen c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Sixteen sixteen_multiply(Sixteen a, Sixteen b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Sixteen sixteen_add(Sixteen a, Sixteen b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Sixteen sixteen_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline __m128i eight_shorts(const std::uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline Sixteen sixteen_f16(const std::uint8_t* from) {
    return {_mm256_cvtph_ps(eight_shorts(from)), _mm256_cvtph_ps(eight_shorts(from + 16))};
}
inline __m256 eight_bf16(__m128i shorts) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(shorts), 16));
}
inline Sixteen sixteen_bf16(const std::uint8_t* from) {
    return {eight_bf16(eight_shorts(from)), eight_bf16(eight_shorts(from + 16))};
}
inline __m256 eight_int8(const std::uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Sixteen sixteen_int8(const std::uint8_t* from) { return {eight_int8(from), eight_int8(from + 8)}; }
// Sixteen whole numbers of 4 bits: the low halves of 8 bytes, then the high ones.
inline Sixteen sixteen_nibbles(const std::uint8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), mask = _mm_set1_epi8(15);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_and_si128(bytes, mask))),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask)))};
}
// Scales: never NaN. Through float16, as 8-bit floats that are weights (below).
inline Sixteen sixteen_e4m3(const std::uint8_t* from) {
    const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(static_cast<short>(0xBFFF)));
    const __m256 factor = _mm256_set1_ps(0x1p8f);
    return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), factor),
            _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)), factor)};
}

struct BfloatTile {
    alignas(32) float columns[COLUMNS][ROWS];
};
struct FloatTile {
    alignas(32) float columns[16][ROWS];
};

template <int COLUMN>
INLINE Sixteen column_of(const BfloatTile& w) {
    return sixteen_load(w.columns[COLUMN]);
}

// 8-bit floats are float16 numbers but for a power of two: bits only move, and the conversion of float16 takes
// subnormal numbers at its usual speed, which as operands of float32 products cost some processors 150 cycles. The power
// is left to the totals. What is NaN becomes a number, and the rows that have one are remembered instead.
constexpr float f16_factor(Codes codes) { return codes == Codes::e4m3 ? 0x1p8f : codes == Codes::e4m3fnuz ? 0x1p7f : 1.0f; }

// Rows that are NaN whatever they are multiplied with: codes of a block as far as it was read, two for a row.
template <Codes CODES>
class FaultyRows {
  public:
    // Eight rows' pairs of codes, twice.
    INLINE void look(int half, __m256i codes) {
        __m256i& seen = seen_[half];
        if constexpr (CODES == Codes::e4m3) seen = _mm256_max_epu8(seen, _mm256_and_si256(codes, _mm256_set1_epi8(0x7f)));
        if constexpr (IS_FNUZ) seen = _mm256_min_epi8(seen, codes);  // signed: -128
    }
    // What totals in units of the codes' float16 numbers are worth.
    INLINE Sixteen finished(Sixteen total) const {
        total = sixteen_multiply(total, sixteen_set(f16_factor(CODES)));
        return {_mm256_or_ps(total.low, faulty(0)), _mm256_or_ps(total.high, faulty(1))};
    }

  private:
    static constexpr bool IS_FNUZ = CODES == Codes::e4m3fnuz || CODES == Codes::e5m2fnuz;

    // All bits of those among eight rows.
    INLINE __m256 faulty(int half) const {
        if constexpr (CODES == Codes::e5m2) return _mm256_setzero_ps();
        const __m256i nan = _mm256_set1_epi8(static_cast<char>(CODES == Codes::e4m3 ? 0x7f : 0x80));
        const __m256i found = _mm256_cmpeq_epi8(seen_[half], nan);
        const __m128i either = _mm_or_si128(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
        const __m256i sound = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(either, _mm_setzero_si128()));
        return _mm256_castsi256_ps(_mm256_xor_si256(sound, _mm256_set1_epi32(-1)));
    }

    __m256i seen_[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
};

// An operand's columns as float16, 8 rows: of each pair the even ones (then the odd ones), the first pair's in the lower half.
template <Codes CODES, int OPERAND>
INLINE void operand_halves(const std::uint8_t* tile, int half, FaultyRows<CODES>& rows, __m256i& even, __m256i& odd) {
    const auto* const from = reinterpret_cast<const __m256i*>(tile + OPERAND * 64 + half * 32);
    const __m256i codes = _mm256_permute4x64_epi64(_mm256_loadu_si256(from), 0xD8);
    rows.look(half, codes);
    const __m256i upper_even = _mm256_slli_epi16(codes, 8);
    const __m256i upper_odd = _mm256_and_si256(codes, _mm256_set1_epi16(static_cast<short>(0xff00)));
    if constexpr (CODES == Codes::e5m2) {
        even = upper_even;
        odd = upper_odd;
        return;
    }
    // 128 times a signed byte is the sign, the sign, and the other bits.
    const __m256i bits = _mm256_set1_epi16(static_cast<short>(0xBFFF));
    even = _mm256_and_si256(_mm256_maddubs_epi16(_mm256_set1_epi16(0x0080), codes), bits);
    odd = _mm256_and_si256(_mm256_maddubs_epi16(_mm256_set1_epi16(static_cast<short>(0x8000)), codes), bits);
    if constexpr (CODES == Codes::e5m2fnuz) {
        // Half of an e5m2 number: one less in float16's exponent. Where none is left, the bits moved one place less are
        // float16's subnormal number, and larger; elsewhere they are less. -0, which signs would mix up, does not occur.
        const __m256i one = _mm256_set1_epi16(0x0400);
        even = _mm256_max_epu16(even, _mm256_subs_epu16(upper_even, one));
        odd = _mm256_max_epu16(odd, _mm256_subs_epu16(upper_odd, one));
    }
}

// each(operand, half of the rows, even columns, odd columns) as operand_halves has them.
template <Codes CODES, class Each>
INLINE void each_operand_halves(const std::uint8_t* tile, FaultyRows<CODES>& rows, const Each& each) {
    each_constant<OPERANDS>([&](auto operand) __attribute__((always_inline)) {
        each_constant<2>([&](auto half) __attribute__((always_inline)) {
            __m256i even, odd;
            operand_halves<CODES, decltype(operand)::value>(tile, decltype(half)::value, rows, even, odd);
            each(operand, half, even, odd);
        });
    });
}

// A tile of float16: 8 rows lie together.
struct HalvesTile {
    alignas(32) std::uint16_t eights[OPERANDS][2][2][2][8];  // of an operand, half of the rows, parity of columns, pair
};

template <int COLUMN>
INLINE Sixteen column_of(const HalvesTile& w) {
    constexpr int PAIR = COLUMN / 2;
    const auto eight = [&](int half) __attribute__((always_inline)) {
        const std::uint16_t* const from = w.eights[operand_of(PAIR)][half][COLUMN % 2][side_of(PAIR)];
        return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
    };
    return {eight(0), eight(1)};
}

// A tile of bfloat16 as it lies: a 32-bit lane holds a row's even and odd column.
struct BfloatPairs {
    const std::uint8_t* pairs;
};

template <int COLUMN>
INLINE Sixteen column_of(const BfloatPairs& w) {
    const auto eight = [&](int half) __attribute__((always_inline)) {
        const auto* const from = reinterpret_cast<const __m256i*>(w.pairs + COLUMN / 2 * 64 + half * 32);
        const __m256i both = _mm256_loadu_si256(from);
        if constexpr (COLUMN % 2 == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
    };
    return {eight(0), eight(1)};
}

// Through memory, which the compiler would avoid: conversions that read it leave all else its room.
template <Codes CODES>
INLINE void decode_halves(const std::uint8_t* tile, FaultyRows<CODES>& rows, HalvesTile& w) {
    each_operand_halves<CODES>(tile, rows, [&](auto operand, auto half, __m256i even, __m256i odd) __attribute__((always_inline)) {
        auto* const to = reinterpret_cast<__m256i*>(w.eights[decltype(operand)::value][decltype(half)::value]);
        _mm256_store_si256(to, even);
        _mm256_store_si256(to + 1, odd);
    });
    asm volatile("" : "+m"(w));
}

// The codes of an operand and 8 rows, a byte each: of a row the first pair's even column, the second's, and their odd
// ones. ``at``: 32 for the second 8 rows.
template <Codes CODES, int OPERAND>
INLINE __m256i operand_codes(const std::uint8_t* tile, int at) {
    if constexpr (is_byte(CODES)) {
        const __m256i order =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
        const auto* const from = reinterpret_cast<const __m256i*>(tile + OPERAND * 64 + at);
        return _mm256_shuffle_epi8(_mm256_loadu_si256(from), order);
    }
    __m256i code = _mm256_setzero_si256();
    each_constant<plane_count(CODES)>([&](auto index) __attribute__((always_inline)) {
        constexpr Plane p = plane(CODES, decltype(index)::value);
        constexpr Field f = field(p, 0, pair_of(OPERAND, 0) * 2);
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + f.byte + at));
        const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << p.width) - 1) << p.shift));
        __m256i placed = words;
        if constexpr (f.shift > p.shift) placed = _mm256_srli_epi16(words, f.shift - p.shift);
        if constexpr (f.shift < p.shift) placed = _mm256_slli_epi16(words, p.shift - f.shift);
        code = _mm256_or_si256(code, _mm256_and_si256(placed, mask));
    });
    return code;
}

// What byte BYTE of every lane stands for.
template <Codes CODES, int BYTE>
INLINE __m256 byte_values(__m256i codes, const Table& table) {
    __m256i code = codes;
    if constexpr (BYTE < 3) code = _mm256_and_si256(_mm256_srli_epi32(codes, BYTE * 8), _mm256_set1_epi32(0xff));
    if constexpr (BYTE == 3) code = _mm256_srli_epi32(codes, 24);
    static_assert(!is_byte_float(CODES));
    if constexpr (is_byte(CODES)) {
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(CODES == Codes::int8 ? 128 : 0)));
    } else {
        if (CODES == Codes::bits7 || table.line) {
            return _mm256_add_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(table.values[0]));
        }
        if constexpr (plane_count(CODES) > 1) return _mm256_i32gather_ps(table.values, code, 4);
        // Both bytes of a bfloat16; an index of 0x80 and more gives 0.
        const __m256i index = _mm256_or_si256(code, _mm256_set1_epi32(static_cast<int>(0x80808000u)));
        const __m256i low = _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table.low)), index);
        const __m256i high = _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table.high)), index);
        return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(low, 16), _mm256_slli_epi32(high, 24)));
    }
}

// Into memory, and so one function for all that multiply such codes.
template <Codes CODES>
__attribute__((noinline)) void decode(const std::uint8_t* tile, const Table& table, BfloatTile& w) {
    if constexpr (is_grid(CODES)) {
        alignas(32) std::uint8_t planes[tile_bytes(grid_of(CODES).planes())];
        expand_grid<CODES>(tile, table.behind, planes);
        decode<grid_of(CODES).planes()>(planes, table, w);
    } else if constexpr (CODES == Codes::bf16) {
        each_constant<COLUMNS>([&](auto column) __attribute__((always_inline)) {
            sixteen_store(w.columns[decltype(column)::value], column_of<decltype(column)::value>(BfloatPairs{tile}));
        });
    } else {
        each_constant<OPERANDS>([&](auto index) __attribute__((always_inline)) {
            constexpr int OPERAND = decltype(index)::value, FIRST = 2 * pair_of(OPERAND, 0), SECOND = 2 * pair_of(OPERAND, 1);
            for (int half = 0; half < 2; ++half) {
                const __m256i codes = operand_codes<CODES, OPERAND>(tile, half * 32);
                _mm256_store_ps(&w.columns[FIRST][half * 8], byte_values<CODES, 0>(codes, table));
                _mm256_store_ps(&w.columns[SECOND][half * 8], byte_values<CODES, 1>(codes, table));
                _mm256_store_ps(&w.columns[FIRST + 1][half * 8], byte_values<CODES, 2>(codes, table));
                _mm256_store_ps(&w.columns[SECOND + 1][half * 8], byte_values<CODES, 3>(codes, table));
            }
        });
    }
}

template <Codes CODES>
INLINE Sixteen float_column(const std::uint8_t* tile, int column) {
    if constexpr (CODES == Codes::int8) {
        const int pair = column / 2, first = side_of(pair) * 8 + column % 2;  // of four rows in a lane
        const __m256i rows = _mm256_broadcastsi128_si256(
            _mm_setr_epi32(first | ~0xff, (first + 2) | ~0xff, (first + 4) | ~0xff, (first + 6) | ~0xff));
        const auto eight = [&](int half) __attribute__((always_inline)) {
            const std::uint8_t* const from = tile + operand_of(pair) * 64 + half * 32;
            const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_shuffle_epi8(line, rows), _mm256_set1_epi32(128)));
        };
        return {eight(0), eight(1)};
    } else if constexpr (CODES == Codes::f32) {
        return sixteen_load(reinterpret_cast<const float*>(tile + column * 64));
    } else {
        return sixteen_f16(tile + column * 32);
    }
}

template <Codes CODES>
INLINE void decode_floats(const std::uint8_t* tile, FloatTile& w) {
    UNROLL
    for (int column = 0; column < 16; ++column) sixteen_store(w.columns[column], float_column<CODES>(tile, column));
}

using Bfloat16 = float;  // what x's bfloat16 numbers lie as

template <int FIRST, int COUNT, int TOKENS>
inline void dot(const BfloatTile& w, const Bfloat16* x, std::int64_t stride, Sixteen* sums) {
    for (int t = 0; t < TOKENS; ++t) sums[t] = sixteen_zeros();
    for (int column = FIRST; column < FIRST + COUNT; ++column) {
        const Sixteen values = sixteen_load(w.columns[column]);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            sums[t] = sixteen_fma(values, sixteen_set(x[t * stride + column]), sums[t]);
        }
    }
}

// The same of a tile whose columns are made floats as they are multiplied.
template <int FIRST, int COUNT, int TOKENS, class Tile>
INLINE void dot(const Tile& w, const Bfloat16* x, std::int64_t stride, Sixteen* sums) {
    UNROLL
    for (int t = 0; t < TOKENS; ++t) sums[t] = sixteen_zeros();
    each_constant<COUNT>([&](auto index) __attribute__((always_inline)) {
        constexpr int COLUMN = FIRST + decltype(index)::value;
        const Sixteen values = column_of<COLUMN>(w);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            sums[t] = sixteen_fma(values, sixteen_set(x[t * stride + COLUMN]), sums[t]);
        }
    });
}

// One token times TILES tiles that follow each other: a sum for each SUB columns. In turns, as a product waits for the one
// before.
template <int SUB, int TILES>
INLINE void dot_halves(const HalvesTile (&w)[TILES], const Bfloat16* x, Sixteen (&sums)[TILES][COLUMNS / SUB]) {
    UNROLL
    for (int i = 0; i < TILES * (COLUMNS / SUB); ++i) sums[i / (COLUMNS / SUB)][i % (COLUMNS / SUB)] = sixteen_zeros();
    each_constant<COLUMNS>([&](auto index) __attribute__((always_inline)) {
        constexpr int COLUMN = decltype(index)::value;
        UNROLL
        for (int i = 0; i < TILES; ++i) {
            Sixteen& sum = sums[i][COLUMN / SUB];
            sum = sixteen_fma(column_of<COLUMN>(w[i]), sixteen_set(x[i * COLUMNS + COLUMN]), sum);
        }
    });
}

template <int TOKENS>
INLINE void dot_floats(const FloatTile& w, const float* x, std::int64_t stride, Sixteen* sums) {
    for (int t = 0; t < TOKENS; ++t) sums[t] = sixteen_zeros();
    UNROLL
    for (int column = 0; column < 16; ++column) {
        Sixteen values = sixteen_load(w.columns[column]);
        KEEP_IN_REGISTER(values.low);  // else each token reads them anew, and loads are what is waited for
        KEEP_IN_REGISTER(values.high);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            sums[t] = sixteen_fma(values, sixteen_set(x[t * stride + column]), sums[t]);
        }
    }
}

// The same of one token, from register to register.
template <Codes CODES>
INLINE Sixteen dot_floats_once(const std::uint8_t* tile, const float* x) {
    Sixteen sum = sixteen_zeros();
    UNROLL
    for (int column = 0; column < 16; ++column) {
        sum = sixteen_fma(float_column<CODES>(tile, column), sixteen_set(x[column]), sum);
    }
    return sum;
}

}  // namespace lowbit
