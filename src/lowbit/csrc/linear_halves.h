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
