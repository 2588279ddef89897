// Weights that float16 arithmetic makes of 3-bit codes, scales and zero points (SpQR), with outliers among them.
//
// With every result rounded to float16,
//
//     weight = (code - zero) * scale [+ outlier]
//
// Two roundings stand between a code and its weight, so that no sum of codes can take the scale over: a tile is made the
// float16 numbers it stands for and multiplied as those are (Codes::f16), bit by bit. In float32 differences, products
// and sums of float16 numbers have enough bits for the second rounding to be the only one that counts.
#pragma once

#include "linear_layout.h"

namespace lowbit {

#if defined(LOWBIT_AVX512)

constexpr BytePlaces bytes_of_words(int second) {
    BytePlaces order{};
    for (int i = 0; i < 64; ++i) order.bytes[i] = static_cast<std::uint8_t>(i * 2 + second);
    return order;
}
// Bytes of a line of codes are those of four columns of a row: a pair, and the one two further at ``side`` 1.
constexpr BytePlaces columns_of_side(int side) {
    BytePlaces order{};
    for (int i = 0; i < 64; ++i) order.bytes[i] = static_cast<std::uint8_t>(i / 2 % ROWS * 4 + i / 32 * 2 + side + i % 2 * 64);
    return order;
}
constexpr BytePlaces row_of_bytes() {
    BytePlaces order{};
    for (int i = 0; i < 64; ++i) order.bytes[i] = static_cast<std::uint8_t>(i / 4);
    return order;
}
constexpr BytePlaces LOW_BYTES = bytes_of_words(0), HIGH_BYTES = bytes_of_words(1);
constexpr BytePlaces FIRST_PAIR = columns_of_side(0), SECOND_PAIR = columns_of_side(1), ROW_OF_BYTE = row_of_bytes();

// Code less a zero point, rounded as float16 would, to nearest and ties to even: a number that ends with float16's last
// place for this exponent pushes the rest out. None is a subnormal one: from 1 on, what a zero point leaves of a code is 0
// or as large as the zero point's last place. The power has a limit so that infinity stays what it is.
INLINE Sixteen above_zero(int code, Sixteen minus_zero) {
    if (code == 0) return minus_zero;
    const Sixteen exact = sixteen_add(sixteen_set(static_cast<float>(code)), minus_zero);
    const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(exact), _mm512_set1_epi32(0x7F800000));
    const Sixteen power = _mm512_min_ps(_mm512_castsi512_ps(exponent), sixteen_set(0x1p16f));
    const Sixteen last_place = sixteen_set(0x1.8p13f);
    return _mm512_fnmadd_ps(power, last_place, sixteen_fma(power, last_place, exact));
}

// What the 8 codes of 16 rows and as many columns are worth: byte code * 16 + row of the low bytes and of the high ones.
struct HalvesOfCodes {
    __m512i low[2], high[2];

    INLINE HalvesOfCodes(Sixteen scale, Sixteen minus_zero) {
        UNROLL
        for (int four = 0; four < 2; ++four) {
            __m512i two[2];
            UNROLL
            for (int i = 0; i < 2; ++i) {
                const auto worth = [&](int code) __attribute__((always_inline)) {
                    return _mm512_cvtps_ph(sixteen_multiply(above_zero(code, minus_zero), scale), _MM_FROUND_TO_NEAREST_INT);
                };
                const int code = four * 4 + i * 2;
                two[i] = _mm512_inserti64x4(_mm512_castsi256_si512(worth(code)), worth(code + 1), 1);
            }
            low[four] = _mm512_permutex2var_epi8(two[0], LOW_BYTES.load(), two[1]);
            high[four] = _mm512_permutex2var_epi8(two[0], HIGH_BYTES.load(), two[1]);
        }
    }
};

// A tile as Codes::f16 has it: 32 columns of 16 rows. ``walk`` has the scales and, of the zero points, -zero. Each code's
// number is made once for 16 columns, and then looked up byte by byte, 4 columns at a time.
INLINE void decode_halves(const std::uint8_t* tile, const Table&, const Walk& walk, std::uint16_t* to) {
    constexpr Plane LOW = plane(Codes::halves3, 0), HIGH = plane(Codes::halves3, 1);
    const __m512i rows = ROW_OF_BYTE.load(), code_bits = _mm512_set1_epi8(0x70), high_bit = _mm512_set1_epi8(0x40);
    each_constant<2>([&](auto half) __attribute__((always_inline)) {
        constexpr int HALF = decltype(half)::value;
        const HalvesOfCodes worth(walk.scale[HALF], walk.addend[HALF]);
        each_constant<4>([&](auto operand) __attribute__((always_inline)) {
            constexpr int COLUMN = 2 * pair_of(HALF * 4 + decltype(operand)::value, 0);
            constexpr Field A = field(LOW, 0, COLUMN), B = field(HIGH, 0, COLUMN);
            const __m512i two = shifted(_mm512_loadu_si512(tile + A.byte), A.shift - 4);
            const __m512i three = chosen_bits(high_bit, shifted(_mm512_loadu_si512(tile + B.byte), B.shift - 6), two);
            const __m512i index = chosen_bits(code_bits, three, rows);
            const __m512i low = _mm512_permutex2var_epi8(worth.low[0], index, worth.low[1]);
            const __m512i high = _mm512_permutex2var_epi8(worth.high[0], index, worth.high[1]);
            _mm512_storeu_si512(to + COLUMN * ROWS, _mm512_permutex2var_epi8(low, FIRST_PAIR.load(), high));
            _mm512_storeu_si512(to + (COLUMN + 4) * ROWS, _mm512_permutex2var_epi8(low, SECOND_PAIR.load(), high));
        });
    });
}

#elif defined(__AVX2__)

// What the 8 codes of 16 rows and as many columns are worth: low bytes and high ones, those of two rows (2 i and 2 i + 1;
// rows 8 further) in each half of a register.
struct HalvesOfCodes {
    __m256i low[4], high[4];

    INLINE HalvesOfCodes(Sixteen scale, Sixteen minus_zero) {
        const auto worth = [&](int code) __attribute__((always_inline)) {
            Sixteen above_zero = minus_zero;
            if (code != 0) above_zero = sixteen_round_f16(sixteen_add(sixteen_set(static_cast<float>(code)), minus_zero));
            const Sixteen exact = sixteen_multiply(above_zero, scale);
            const __m128i first = _mm256_cvtps_ph(exact.low, _MM_FROUND_TO_NEAREST_INT);
            const __m128i second = _mm256_cvtps_ph(exact.high, _MM_FROUND_TO_NEAREST_INT);
            return _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
        };
        const __m256i even = _mm256_set1_epi16(0xff);
        __m256i low_bytes[4], high_bytes[4];  // of two codes beside one another
        UNROLL
        for (int i = 0; i < 4; ++i) {
            const __m256i one = worth(i * 2), other = worth(i * 2 + 1);
            low_bytes[i] = _mm256_or_si256(_mm256_and_si256(even, one), _mm256_slli_epi16(other, 8));
            high_bytes[i] = _mm256_or_si256(_mm256_srli_epi16(one, 8), _mm256_andnot_si256(even, other));
        }
        by_row(low_bytes, low);
        by_row(high_bytes, high);
    }

  private:
    static INLINE void by_row(const __m256i (&codes)[4], __m256i (&to)[4]) {
        const __m256i a = _mm256_unpacklo_epi16(codes[0], codes[1]), b = _mm256_unpacklo_epi16(codes[2], codes[3]);
        const __m256i c = _mm256_unpackhi_epi16(codes[0], codes[1]), d = _mm256_unpackhi_epi16(codes[2], codes[3]);
        to[0] = _mm256_unpacklo_epi32(a, b), to[1] = _mm256_unpackhi_epi32(a, b);
        to[2] = _mm256_unpacklo_epi32(c, d), to[3] = _mm256_unpackhi_epi32(c, d);
    }
};

// A tile as Codes::f16 has it: 32 columns of 16 rows. ``walk`` has the scales and, of the zero points, -zero. Each code's
// number is made once for 16 columns, and then looked up byte by byte, 4 columns at a time: of rows 0 to 3 and 8 to 11, and
// of those 4 further.
INLINE void decode_halves(const std::uint8_t* tile, const Table&, const Walk& walk, std::uint16_t* to) {
    const __m256i by_column = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15));
    const __m256i second_row = _mm256_set1_epi16(0x800);
    const auto store = [&](int column, __m256i values) __attribute__((always_inline)) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + column * ROWS), values);
    };
    // Both before the first lookup, which waits for them.
    const HalvesOfCodes both[2] = {{walk.scale[0], walk.addend[0]}, {walk.scale[1], walk.addend[1]}};
    asm volatile("" ::: "memory");
    each_constant<2>([&](auto half) __attribute__((always_inline)) {
        constexpr int HALF = decltype(half)::value;
        const HalvesOfCodes& worth = both[HALF];
        each_constant<4>([&](auto number) __attribute__((always_inline)) {
            constexpr int OPERAND = HALF * 4 + decltype(number)::value;
            constexpr int COLUMN = 2 * pair_of(OPERAND, 0), FURTHER = 2 * pair_of(OPERAND, 1);
            const __m256i low_rows = operand_codes<Codes::bits3, OPERAND>(tile, 0);
            const __m256i high_rows = operand_codes<Codes::bits3, OPERAND>(tile, 32);
            __m256i pair[2], further[2];
            UNROLL
            for (int i = 0; i < 2; ++i) {
                const __m256i codes = i == 0 ? _mm256_permute2x128_si256(low_rows, high_rows, 0x20)
                                             : _mm256_permute2x128_si256(low_rows, high_rows, 0x31);
                const __m256i index = _mm256_or_si256(_mm256_shuffle_epi8(codes, by_column), second_row);
                const auto look_up = [&](const __m256i (&bytes)[4]) __attribute__((always_inline)) {
                    const __m256i first = _mm256_shuffle_epi8(bytes[i * 2], index);
                    return _mm256_blend_epi16(first, _mm256_shuffle_epi8(bytes[i * 2 + 1], index), 0xAA);
                };
                const __m256i low = look_up(worth.low), high = look_up(worth.high);
                pair[i] = _mm256_unpacklo_epi8(low, high), further[i] = _mm256_unpackhi_epi8(low, high);
            }
            store(COLUMN, _mm256_unpacklo_epi64(pair[0], pair[1]));
            store(COLUMN + 1, _mm256_unpackhi_epi64(pair[0], pair[1]));
            store(FURTHER, _mm256_unpacklo_epi64(further[0], further[1]));
            store(FURTHER + 1, _mm256_unpackhi_epi64(further[0], further[1]));
        });
    });
}

#else

// A tile as Codes::f16 has it: 32 columns of 16 rows. ``walk`` has the scales and, of the zero points, -zero.
INLINE void decode_halves(const std::uint8_t* tile, const Table& table, const Walk& walk, std::uint16_t* to) {
    BfloatTile codes;
    decode<Codes::bits3>(tile, table, codes);
    each_constant<COLUMNS>([&](auto column) __attribute__((always_inline)) {
        constexpr int COLUMN = decltype(column)::value, PART = COLUMN / 16;
        const Sixteen above_zero = sixteen_round_f16(sixteen_add(column_of<COLUMN>(codes), walk.addend[PART]));
        sixteen_store_f16(to + COLUMN * ROWS, sixteen_multiply(above_zero, walk.scale[PART]));
    });
}

#endif

// add(place, outlier) for those of a tile, the ``number``-th of the weight.
template <class Add>
inline void each_outlier(const lowbit_weight& weight, std::int64_t number, const Add& add) {
    for (std::int32_t i = weight.outlier_starts[number]; i < weight.outlier_starts[number + 1]; ++i) {
        add(weight.outliers[i] & 0xFFFFu, half_to_float(static_cast<std::uint16_t>(weight.outliers[i] >> 16)));
    }
}

}  // namespace lowbit
