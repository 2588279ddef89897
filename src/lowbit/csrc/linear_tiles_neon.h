// linear_tiles.h for NEON: the same layout, decoded to floats, or to pairs of bfloat16 where the processor
// multiplies those (BFDOT). Without BFDOT every sum has the order of AVX2's, and so its bits; BFDOT rounds the sum of
// two products by itself and takes subnormal numbers for 0.
#pragma once

#include "linear_tiles.h"
#include "vector16.h"

namespace lowbit {

using Sixteen = Vector16;
inline Sixteen sixteen_zeros() { return zeros(); }
inline Sixteen sixteen_load(const float* from) { return load(from); }
inline void sixteen_store(float* to, Sixteen x) { store(to, x); }
inline void sixteen_store_some(float* to, Sixteen x, int count) { store_lanes(to, x, count); }
inline Sixteen sixteen_fma(Sixteen x, Sixteen y, Sixteen z) { return fma(x, y, z); }
inline Sixteen sixteen_multiply(Sixteen x, Sixteen y) { return multiply(x, y); }
inline Sixteen sixteen_add(Sixteen x, Sixteen y) { return add(x, y); }
inline Sixteen sixteen_set(float x) { return broadcast(x); }
inline Sixteen sixteen_f16(const std::uint8_t* from) { return load_halves(from); }
inline Sixteen sixteen_bf16(const std::uint8_t* from) { return load_bfloats(reinterpret_cast<const std::uint16_t*>(from)); }
inline Sixteen sixteen_int8(const std::uint8_t* from) { return from_signed(vld1q_u8(from)); }
inline Sixteen sixteen_e4m3(const std::uint8_t* from) { return from_e4m3(vld1q_u8(from)); }

// Sixteen whole numbers of 4 bits: the low halves of 8 bytes, then the high ones.
inline Sixteen sixteen_nibbles(const std::uint8_t* from) {
    const uint8x8_t bytes = vld1_u8(from);
    return from_unsigned(vcombine_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4)));
}

// The bytes of a table's 64 16-bit values.
struct Table {
    alignas(16) std::uint8_t low[64], high[64];
    float first;
    const std::uint8_t* behind;  // vectors of grids: the low bytes of all, then the high ones
    explicit Table(const std::uint16_t* values)
        : first(bfloat_to_float(values[0])), behind(reinterpret_cast<const std::uint8_t*>(values + 64)) {
        for (int i = 0; i < 64; ++i) {
            low[i] = static_cast<std::uint8_t>(values[i]);
            high[i] = static_cast<std::uint8_t>(values[i] >> 8);
        }
    }
};

template <Codes CODES>
inline void expand_grid(const std::uint8_t* tile, const std::uint8_t* grid, std::uint8_t* planes);

// A lookup in the first 16, 32 or 64 bytes.
template <int SIZE>
inline Bytes look_up(const std::uint8_t* table, Bytes codes) {
    if constexpr (SIZE <= 16) {
        return vqtbl1q_u8(vld1q_u8(table), codes);
    } else if constexpr (SIZE == 32) {
        return vqtbl2q_u8({{vld1q_u8(table), vld1q_u8(table + 16)}}, codes);
    } else {
        return vqtbl4q_u8({{vld1q_u8(table), vld1q_u8(table + 16), vld1q_u8(table + 32), vld1q_u8(table + 48)}}, codes);
    }
}

template <Codes CODES>
constexpr bool LOOKED_UP_CODES = CODES == Codes::bits1 || CODES == Codes::bits2 || CODES == Codes::bits3 || CODES == Codes::bits4 ||
                                 CODES == Codes::bits5 || CODES == Codes::bits6;

// The codes of an operand and four rows, a byte each: of every row the even column of the first pair, that of the
// second, and their odd columns.
template <Codes CODES, int OPERAND>
inline Bytes quarter_codes(const std::uint8_t* tile, int quarter) {
    const std::uint8_t* const from = tile + quarter * 16;
    if constexpr (is_byte(CODES)) {
        static constexpr std::uint8_t ORDER[] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
        return vqtbl1q_u8(vld1q_u8(from + OPERAND * 64), vld1q_u8(ORDER));
    } else {
        Bytes code = vdupq_n_u8(0);
        each_constant<plane_count(CODES)>([&](auto index) __attribute__((always_inline)) {
            constexpr Plane p = plane(CODES, decltype(index)::value);
            constexpr Field f = field(p, 0, pair_of(OPERAND, 0) * 2);
            Bytes digits = vld1q_u8(from + f.byte);
            if constexpr (f.shift > 0) digits = vshrq_n_u8(digits, f.shift);
            if constexpr (f.shift + p.width < 8) digits = vandq_u8(digits, vdupq_n_u8((1 << p.width) - 1));
            if constexpr (p.shift == 0) {
                code = digits;
            } else {
                code = vsliq_n_u8(code, digits, p.shift);
            }
        });
        return code;
    }
}

// Four rows of a column that quarter_codes() has in byte WHICH of every 32-bit lane, as numbers; the codes' bytes in
// the table, where they are looked up, in ``low`` and ``high``.
template <Codes CODES, int WHICH>
inline float32x4_t column_of(Bytes codes, Bytes low, Bytes high, const Table& table) {
    constexpr std::uint8_t NONE = 255;  // 0 where a table's index is too large
    if constexpr (LOOKED_UP_CODES<CODES>) {
        static constexpr std::uint8_t PLACES[] = {NONE, NONE, WHICH,     16 + WHICH, NONE, NONE, 4 + WHICH,  20 + WHICH,
                                                  NONE, NONE, 8 + WHICH, 24 + WHICH, NONE, NONE, 12 + WHICH, 28 + WHICH};
        return vreinterpretq_f32_u8(vqtbl2q_u8({{low, high}}, vld1q_u8(PLACES)));
    }
    static constexpr std::uint8_t PLACES[] = {WHICH,     NONE, NONE, NONE, 4 + WHICH,  NONE, NONE, NONE,
                                              8 + WHICH, NONE, NONE, NONE, 12 + WHICH, NONE, NONE, NONE};
    const uint32x4_t whole = vreinterpretq_u32_u8(vqtbl1q_u8(codes, vld1q_u8(PLACES)));
    const float32x4_t number = vcvtq_f32_u32(whole);
    if constexpr (CODES == Codes::uint8) return number;
    return vaddq_f32(number, vdupq_n_f32(CODES == Codes::int8 ? -128.0f : table.first));
}

// FP8 -> floats. The fnuz formats' values are half of the others', without infinities; 0x80 is NaN.
template <Codes CODES>
inline Vector16 from_byte_floats(Bytes codes) {
    if constexpr (CODES == Codes::e4m3) return from_e4m3(codes);
    if constexpr (CODES == Codes::e5m2) return from_e5m2(codes);
    const auto part = [&](uint32x4_t code) {
        const uint32x4_t sign = vshlq_n_u32(vandq_u32(code, vdupq_n_u32(0x80)), 24);
        const uint32x4_t nan = vandq_u32(vceqq_u32(code, vdupq_n_u32(0x80)), vdupq_n_u32(0x7fc00000));
        const uint32x4_t placed = vshlq_n_u32(vandq_u32(code, vdupq_n_u32(0x7f)), magnitude_shift(CODES));
        const float32x4_t value = vmulq_f32(vreinterpretq_f32_u32(placed), vdupq_n_f32(magnitude_factor(CODES)));
        return vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(vreinterpretq_u32_f32(value), sign), nan));
    };
    const uint16x8_t low = vmovl_u8(vget_low_u8(codes)), high = vmovl_high_u8(codes);
    return {part(vmovl_u16(vget_low_u16(low))), part(vmovl_high_u16(low)), part(vmovl_u16(vget_low_u16(high))),
            part(vmovl_high_u16(high))};
}

// The columns of an operand and four rows: even of the first pair, even of the second, then odd.
template <Codes CODES, int OPERAND>
inline Vector16 operand_columns(const std::uint8_t* tile, int quarter, const Table& table) {
    const Bytes codes = quarter_codes<CODES, OPERAND>(tile, quarter);
    if constexpr (is_byte_float(CODES)) {
        static constexpr std::uint8_t TURN[] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
        return from_byte_floats<CODES>(vqtbl1q_u8(codes, vld1q_u8(TURN)));
    }
    Bytes low = codes, high = codes;
    if constexpr (LOOKED_UP_CODES<CODES>) {
        constexpr int SIZE = 1 << static_cast<int>(CODES);
        low = look_up<SIZE>(table.low, codes);
        high = look_up<SIZE>(table.high, codes);
    }
    return {column_of<CODES, 0>(codes, low, high, table), column_of<CODES, 1>(codes, low, high, table),
            column_of<CODES, 2>(codes, low, high, table), column_of<CODES, 3>(codes, low, high, table)};
}

struct FloatTile {
    alignas(16) float columns[16][ROWS];
};

// The columns of some operands, floats.
template <Codes CODES, int COUNT>
inline void decode_operands(const std::uint8_t* tile, const Table& table, float (*columns)[ROWS]) {
    each_constant<COUNT>([&](auto index) __attribute__((always_inline)) {
        constexpr int OPERAND = decltype(index)::value, FIRST = 2 * pair_of(OPERAND, 0), SECOND = 2 * pair_of(OPERAND, 1);
        for (int quarter = 0; quarter < 4; ++quarter) {
            const Vector16 four = operand_columns<CODES, OPERAND>(tile, quarter, table);
            vst1q_f32(columns[FIRST] + quarter * 4, four.a);
            vst1q_f32(columns[SECOND] + quarter * 4, four.b);
            vst1q_f32(columns[FIRST + 1] + quarter * 4, four.c);
            vst1q_f32(columns[SECOND + 1] + quarter * 4, four.d);
        }
    });
}

// 16 columns of floats.
template <Codes CODES>
inline void decode_floats(const std::uint8_t* tile, FloatTile& w) {
    if constexpr (CODES == Codes::f32) {
        std::memcpy(w.columns, tile, sizeof w.columns);
    } else if constexpr (CODES == Codes::f16) {
        for (int column = 0; column < 16; ++column) sixteen_store(w.columns[column], sixteen_f16(tile + column * 32));
    } else {
        static_assert(CODES == Codes::int8);
        static constexpr std::uint16_t NO_TABLE[64] = {};
        decode_operands<CODES, OPERANDS / 2>(tile, Table(NO_TABLE), w.columns);
    }
}

// sum += four of column times x, a lane of ``four``.
template <int LANE>
inline void add_product(Sixteen& sum, Sixteen column, float32x4_t four) {
    sum.a = vfmaq_laneq_f32(sum.a, column.a, four, LANE);
    sum.b = vfmaq_laneq_f32(sum.b, column.b, four, LANE);
    sum.c = vfmaq_laneq_f32(sum.c, column.c, four, LANE);
    sum.d = vfmaq_laneq_f32(sum.d, column.d, four, LANE);
}

using Bfloat16 = std::uint16_t;  // what x's bfloat16 numbers lie as

inline float32x4_t four_floats(const float* from) { return vld1q_f32(from); }
inline float32x4_t four_floats(const std::uint16_t* from) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(from)), 16));
}

template <int COUNT, int TOKENS, class Element>
inline void dot_columns(const float (*columns)[ROWS], const Element* x, std::int64_t stride, Sixteen* sums) {
    UNROLL
    for (int t = 0; t < TOKENS; ++t) sums[t] = sixteen_zeros();
    for (int first = 0; first < COUNT; first += 4) {
        float32x4_t fours[TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) fours[t] = four_floats(x + t * stride + first);
        each_constant<4>([&](auto lane) __attribute__((always_inline)) {
            const Sixteen column = sixteen_load(columns[first + lane]);
            UNROLL
            for (int t = 0; t < TOKENS; ++t) add_product<decltype(lane)::value>(sums[t], column, fours[t]);
        });
    }
}

template <int TOKENS>
inline void dot_floats(const FloatTile& w, const float* x, std::int64_t stride, Sixteen* sums) {
    dot_columns<16, TOKENS>(w.columns, x, stride, sums);
}

#if !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

struct BfloatTile {
    alignas(16) float columns[COLUMNS][ROWS];
};

template <int COLUMN>
inline Sixteen column_of(const BfloatTile& w) {
    return sixteen_load(w.columns[COLUMN]);
}

template <Codes CODES>
inline void decode(const std::uint8_t* tile, const Table& table, BfloatTile& w) {
    if constexpr (CODES == Codes::bf16) {
        for (int pair = 0; pair < PAIRS; ++pair) {
            const auto* const words = reinterpret_cast<const std::uint16_t*>(tile + pair * 64);
            sixteen_store(w.columns[2 * pair], lower_bfloats(words));
            sixteen_store(w.columns[2 * pair + 1], upper_bfloats(words));
        }
    } else if constexpr (is_grid(CODES)) {
        std::uint8_t planes[tile_bytes(grid_of(CODES).planes())];
        expand_grid<CODES>(tile, table.behind, planes);
        decode<grid_of(CODES).planes()>(planes, table, w);
    } else {
        decode_operands<CODES, OPERANDS>(tile, table, w.columns);
    }
}

template <int FIRST, int COUNT, int TOKENS>
inline void dot(const BfloatTile& w, const std::uint16_t* x, std::int64_t stride, Sixteen* sums) {
    dot_columns<COUNT, TOKENS>(w.columns + FIRST, x + FIRST, stride, sums);
}

#else

// A pair of columns is a line: 16 rows of two bfloat16.
struct BfloatTile {
    alignas(16) std::uint16_t pairs[PAIRS][2 * ROWS];
};

template <int COLUMN>
inline Sixteen column_of(const BfloatTile& w) {
    return COLUMN % 2 == 0 ? lower_bfloats(w.pairs[COLUMN / 2]) : upper_bfloats(w.pairs[COLUMN / 2]);
}

template <Codes CODES>
inline void decode(const std::uint8_t* tile, const Table& table, BfloatTile& w) {
    if constexpr (CODES == Codes::bf16) {
        std::memcpy(w.pairs, tile, sizeof w.pairs);
        return;
    } else if constexpr (is_grid(CODES)) {
        std::uint8_t planes[tile_bytes(grid_of(CODES).planes())];
        expand_grid<CODES>(tile, table.behind, planes);
        decode<grid_of(CODES).planes()>(planes, table, w);
        return;
    } else
    each_constant<OPERANDS>([&](auto index) __attribute__((always_inline)) {
        constexpr int OPERAND = decltype(index)::value;
        std::uint16_t* const first = w.pairs[pair_of(OPERAND, 0)];
        std::uint16_t* const second = w.pairs[pair_of(OPERAND, 1)];
        for (int quarter = 0; quarter < 4; ++quarter) {
            if constexpr (LOOKED_UP_CODES<CODES>) {
                constexpr int SIZE = 1 << static_cast<int>(CODES);
                static constexpr std::uint8_t FIRST[] = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
                static constexpr std::uint8_t SECOND[] = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
                const Bytes codes = quarter_codes<CODES, OPERAND>(tile, quarter);
                const uint8x16x2_t both = {{look_up<SIZE>(table.low, codes), look_up<SIZE>(table.high, codes)}};
                vst1q_u16(first + quarter * 8, vreinterpretq_u16_u8(vqtbl2q_u8(both, vld1q_u8(FIRST))));
                vst1q_u16(second + quarter * 8, vreinterpretq_u16_u8(vqtbl2q_u8(both, vld1q_u8(SECOND))));
            } else {  // exact: the upper halves of the floats are all there is
                const Vector16 four = operand_columns<CODES, OPERAND>(tile, quarter, table);
                const auto words = [](float32x4_t even, float32x4_t odd) {
                    return vtrn2q_u16(vreinterpretq_u16_f32(even), vreinterpretq_u16_f32(odd));
                };
                vst1q_u16(first + quarter * 8, words(four.a, four.c));
                vst1q_u16(second + quarter * 8, words(four.b, four.d));
            }
        }
    });
}

template <int FIRST, int COUNT, int TOKENS>
inline void dot(const BfloatTile& w, const std::uint16_t* x, std::int64_t stride, Sixteen* sums) {
    const auto eight = [](const std::uint16_t* from) { return vreinterpretq_bf16_u16(vld1q_u16(from)); };
    UNROLL
    for (int t = 0; t < TOKENS; ++t) sums[t] = sixteen_zeros();
    for (int first = FIRST; first < FIRST + COUNT; first += 8) {
        bfloat16x8_t eights[TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) eights[t] = eight(x + t * stride + first);
        each_constant<4>([&](auto lane) __attribute__((always_inline)) {
            constexpr int LANE = decltype(lane)::value;
            const std::uint16_t* const from = w.pairs[first / 2 + LANE];
            const bfloat16x8_t p = eight(from), q = eight(from + 8), r = eight(from + 16), s = eight(from + 24);
            UNROLL
            for (int t = 0; t < TOKENS; ++t) {
                sums[t].a = vbfdotq_laneq_f32(sums[t].a, p, eights[t], LANE);
                sums[t].b = vbfdotq_laneq_f32(sums[t].b, q, eights[t], LANE);
                sums[t].c = vbfdotq_laneq_f32(sums[t].c, r, eights[t], LANE);
                sums[t].d = vbfdotq_laneq_f32(sums[t].d, s, eights[t], LANE);
            }
        });
    }
}

#endif

}  // namespace lowbit
