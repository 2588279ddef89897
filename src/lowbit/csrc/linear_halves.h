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

// add(place, outlier) for those of a tile, the ``number``-th of the weight.
template <class Add>
inline void each_outlier(const lowbit_weight& weight, std::int64_t number, const Add& add) {
    for (std::int32_t i = weight.outlier_starts[number]; i < weight.outlier_starts[number + 1]; ++i) {
        add(weight.outliers[i] & 0xFFFFu, half_to_float(static_cast<std::uint16_t>(weight.outliers[i] >> 16)));
    }
}

}  // namespace lowbit
