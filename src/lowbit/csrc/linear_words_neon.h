// linear_words.h for NEON: SMLAL, a product of 16-bit numbers in a 32-bit lane.
#pragma once

#include "linear_words.h"

namespace lowbit {

struct WordTile {
    alignas(16) std::int16_t columns[COLUMNS][ROWS];
};

template <Codes CODES, WordKind KIND>
inline void decode_words(const std::uint8_t* tile, const Table& table, const WordCodes& codes, WordTile& w) {
    if constexpr (is_grid(CODES)) {
        constexpr Codes PLANES = grid_of(CODES).planes();
        std::uint8_t planes[tile_bytes(PLANES)];
        expand_grid<CODES>(tile, table.behind, planes);
        decode_words<PLANES, KIND>(planes, table, codes, w);
        return;
    } else
    each_constant<OPERANDS>([&](auto index) __attribute__((always_inline)) {
        constexpr int OPERAND = decltype(index)::value, FIRST = 2 * pair_of(OPERAND, 0), SECOND = 2 * pair_of(OPERAND, 1);
        constexpr int COLUMN[] = {FIRST, SECOND, FIRST + 1, SECOND + 1};
        constexpr int ENTRIES = KIND == WordKind::wide ? 16 : 1 << std::min(static_cast<int>(CODES), 6);
        for (int half = 0; half < 2; ++half) {
            const auto bytes_of = [&](const std::uint8_t* table_bytes, Bytes code) __attribute__((always_inline)) {
                return KIND == WordKind::line ? code : look_up<ENTRIES>(table_bytes, code);
            };
            const Bytes code = quarter_codes<CODES, OPERAND>(tile, half * 2);
            const Bytes more = quarter_codes<CODES, OPERAND>(tile, half * 2 + 1);
            const uint8x16x2_t low = {{bytes_of(codes.low, code), bytes_of(codes.low, more)}};
            uint8x16x2_t high = {{vdupq_n_u8(0), vdupq_n_u8(0)}};
            if constexpr (KIND == WordKind::wide) high = {{bytes_of(codes.high, code), bytes_of(codes.high, more)}};
            for (int which = 0; which < 4; ++which) {
                // a column's bytes of eight rows
                const uint8x8_t places = vadd_u8(vcreate_u8(0x1c1814100c080400), vdup_n_u8(static_cast<std::uint8_t>(which)));
                const uint8x8x2_t both = vzip_u8(vqtbl2_u8(low, places), vqtbl2_u8(high, places));
                const uint8x16_t words = vcombine_u8(both.val[0], both.val[1]);
                vst1q_s16(w.columns[COLUMN[which]] + half * 8, vreinterpretq_s16_u8(words));
            }
        }
    });
}

// sums[t] += products of columns [FIRST, FIRST + COUNT) with token t.
template <int FIRST, int COUNT, int TOKENS>
inline void dot_words(const WordTile& w, const std::int16_t* x, std::int64_t stride, SixteenInts* sums) {
    for (int first = FIRST; first < FIRST + COUNT; first += 8) {
        int16x8_t inputs[TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) inputs[t] = vld1q_s16(x + t * stride + first);
        each_constant<8>([&](auto lane) __attribute__((always_inline)) {
            constexpr int LANE = decltype(lane)::value;
            const int16x8_t low = vld1q_s16(w.columns[first + LANE]), high = vld1q_s16(w.columns[first + LANE] + 8);
            UNROLL
            for (int t = 0; t < TOKENS; ++t) {
                sums[t].a = vmlal_laneq_s16(sums[t].a, vget_low_s16(low), inputs[t], LANE);
                sums[t].b = vmlal_high_laneq_s16(sums[t].b, low, inputs[t], LANE);
                sums[t].c = vmlal_laneq_s16(sums[t].c, vget_low_s16(high), inputs[t], LANE);
                sums[t].d = vmlal_high_laneq_s16(sums[t].d, high, inputs[t], LANE);
            }
        });
    }
}

}  // namespace lowbit
