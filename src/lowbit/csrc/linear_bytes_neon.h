// linear_bytes.h for NEON: SDOT, four products of signed bytes in a 32-bit lane.
#pragma once

#include "linear_bytes.h"

namespace lowbit {

struct SixteenInts {
    int32x4_t a, b, c, d;
};
// 16 rows of an operand's four columns. Bytes of 8 bits are 128 less, to be signed; their base is 128 more.
struct ByteTile {
    alignas(16) std::int8_t operands[OPERANDS][4 * ROWS];
};

inline SixteenInts ints_load(const std::int32_t* from) {
    return {vld1q_s32(from), vld1q_s32(from + 4), vld1q_s32(from + 8), vld1q_s32(from + 12)};
}
inline void ints_store(std::int32_t* to, SixteenInts x) {
    vst1q_s32(to, x.a);
    vst1q_s32(to + 4, x.b);
    vst1q_s32(to + 8, x.c);
    vst1q_s32(to + 12, x.d);
}
inline SixteenInts ints_set(std::int32_t x) {
    const int32x4_t four = vdupq_n_s32(x);
    return {four, four, four, four};
}
inline SixteenInts ints_add(SixteenInts x, SixteenInts y) {
    return {vaddq_s32(x.a, y.a), vaddq_s32(x.b, y.b), vaddq_s32(x.c, y.c), vaddq_s32(x.d, y.d)};
}
inline Sixteen ints_to_floats(SixteenInts x) {
    return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b), vcvtq_f32_s32(x.c), vcvtq_f32_s32(x.d)};
}

template <Codes CODES, bool LOOKED_UP>
inline void decode_bytes(const std::uint8_t* tile, const ByteCodes& codes, ByteTile& w) {
    each_constant<OPERANDS>([&](auto index) __attribute__((always_inline)) {
        constexpr int OPERAND = decltype(index)::value;
        for (int quarter = 0; quarter < 4; ++quarter) {
            Bytes bytes = quarter_codes<CODES, OPERAND>(tile, quarter);
            if constexpr (LOOKED_UP) bytes = look_up<16>(codes.table, bytes);
            if constexpr (LOOKED_UP || is_byte(CODES)) bytes = veorq_u8(bytes, vdupq_n_u8(0x80));
            vst1q_s8(w.operands[OPERAND] + quarter * 16, vreinterpretq_s8_u8(bytes));
        }
    });
}

// sums[t] += bytes of operands [FIRST, FIRST + COUNT) times those of token t, ``stride`` bytes a token.
template <Codes CODES, bool LOOKED_UP, int FIRST, int COUNT, int TOKENS>
inline void dot_bytes(const ByteTile& w, const std::int8_t* x, std::int64_t stride, SixteenInts* sums) {
    UNROLL
    for (int first = FIRST; first < FIRST + COUNT; first += 4) {
        int8x16_t inputs[TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) inputs[t] = vld1q_s8(x + t * stride + first * 4);
        each_constant<4>([&](auto lane) __attribute__((always_inline)) {
            constexpr int LANE = decltype(lane)::value;
            const std::int8_t* const from = w.operands[first + LANE];
            const int8x16_t p = vld1q_s8(from), q = vld1q_s8(from + 16), r = vld1q_s8(from + 32), s = vld1q_s8(from + 48);
            UNROLL
            for (int t = 0; t < TOKENS; ++t) {
                sums[t].a = vdotq_laneq_s32(sums[t].a, p, inputs[t], LANE);
                sums[t].b = vdotq_laneq_s32(sums[t].b, q, inputs[t], LANE);
                sums[t].c = vdotq_laneq_s32(sums[t].c, r, inputs[t], LANE);
                sums[t].d = vdotq_laneq_s32(sums[t].d, s, inputs[t], LANE);
            }
        });
    }
}

}  // namespace lowbit
