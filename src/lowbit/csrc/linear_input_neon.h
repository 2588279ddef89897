// linear_input.h for NEON: what rounding x takes, as AVX2 rounds it.
#pragma once

#include "linear_input.h"

namespace lowbit {

// The order of 16 int8 columns in the operands.
using ByteOrder = uint8x16_t;
inline ByteOrder byte_order() {
    static constexpr std::uint8_t PLACES[] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    return vld1q_u8(PLACES);
}

inline Sixteen store_bfloats(std::uint16_t* to, Sixteen x) {  // returns what was stored
    const Sixteen stored = each_quarter(
        [](float32x4_t four) {
            const uint32x4_t bits = vreinterpretq_u32_f32(four);
            const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
            const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
            const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
            const uint32x4_t kept = vbslq_u32(vceqq_f32(four, four), rounded, quiet);
            return vreinterpretq_f32_u32(vandq_u32(kept, vdupq_n_u32(0xffff0000u)));
        },
        x);
    const auto eight = [](float32x4_t low, float32x4_t high) {
        return vuzp2q_u16(vreinterpretq_u16_f32(low), vreinterpretq_u16_f32(high));
    };
    vst1q_u16(to, eight(stored.a, stored.b));
    vst1q_u16(to + 8, eight(stored.c, stored.d));
    return stored;
}
inline float sixteen_sum(Sixteen x) { return reduce_add(x); }
// The largest |x|; NaN where there is one.
inline float largest(Sixteen x, Sixteen y) {
    const auto most_of = [](Sixteen sixteen) {
        const auto size = [](float32x4_t four) {
            return vandq_u32(vreinterpretq_u32_f32(four), vdupq_n_u32(0x7fffffff));
        };
        return vmaxq_u32(vmaxq_u32(size(sixteen.a), size(sixteen.b)), vmaxq_u32(size(sixteen.c), size(sixteen.d)));
    };
    const std::uint32_t most = vmaxvq_u32(vmaxq_u32(most_of(x), most_of(y)));
    float value;
    std::memcpy(&value, &most, sizeof value);
    return value;
}
// Two vectors of 8 columns, or twice two of 4: their columns in turns.
inline Sixteen in_grid_order(Sixteen x, int numbers) {
    if (numbers == 8) {
        return {vzip1q_f32(x.a, x.c), vzip2q_f32(x.a, x.c), vzip1q_f32(x.b, x.d), vzip2q_f32(x.b, x.d)};
    }
    return {vzip1q_f32(x.a, x.b), vzip2q_f32(x.a, x.b), vzip1q_f32(x.c, x.d), vzip2q_f32(x.c, x.d)};
}
// Rounds 16 numbers to int16, ties to even; returns them.
inline Sixteen store_words(std::int16_t* to, Sixteen x) {
    const int32x4_t a = vcvtnq_s32_f32(x.a), b = vcvtnq_s32_f32(x.b), c = vcvtnq_s32_f32(x.c), d = vcvtnq_s32_f32(x.d);
    vst1q_s16(to, vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)));
    vst1q_s16(to + 8, vcombine_s16(vqmovn_s32(c), vqmovn_s32(d)));
    return {vcvtq_f32_s32(a), vcvtq_f32_s32(b), vcvtq_f32_s32(c), vcvtq_f32_s32(d)};
}
// Rounds 16 numbers to int8, ties to even; returns them.
inline Sixteen store_ints(std::int8_t* to, Sixteen x, ByteOrder order) {
    const int32x4_t a = vcvtnq_s32_f32(x.a), b = vcvtnq_s32_f32(x.b), c = vcvtnq_s32_f32(x.c), d = vcvtnq_s32_f32(x.d);
    const int16x8_t low = vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)), high = vcombine_s16(vqmovn_s32(c), vqmovn_s32(d));
    vst1q_s8(to, vqtbl1q_s8(vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)), order));
    return {vcvtq_f32_s32(a), vcvtq_f32_s32(b), vcvtq_f32_s32(c), vcvtq_f32_s32(d)};
}

}  // namespace lowbit
