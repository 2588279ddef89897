// Attention's cached numbers and operands in NEON registers; included by attention_cache.h, whose AVX2 functions
// these agree with to the bit.
#pragma once

#include "attention_cache.h"

namespace lowbit {

inline Bytes load_bytes(const std::uint8_t* from) { return vld1q_u8(from); }
// 32-bit words of the even (lower half) and odd numbers, rounded to bfloat16: to nearest, ties to even.
inline void store_bfloats(Bfloat* to, Vector16 even, Vector16 odd) {
    const auto rounded = [](float32x4_t x) {
        const uint32x4_t bits = vreinterpretq_u32_f32(x);
        const uint32x4_t last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        return vaddq_u32(bits, vaddq_u32(last, vdupq_n_u32(0x7fff)));
    };
    const auto four = [&](int at, float32x4_t lower, float32x4_t upper) {
        // the upper halves of both, in turn
        vst1q_u16(to + at, vtrn2q_u16(vreinterpretq_u16_u32(rounded(lower)), vreinterpretq_u16_u32(rounded(upper))));
    };
    four(0, even.a, odd.a);
    four(8, even.b, odd.b);
    four(16, even.c, odd.c);
    four(24, even.d, odd.d);
}

// The keys of `width` dimensions of a page (a multiple of 16) in V's layout: no bit changes.
inline void turn_keys(const Bfloat* keys, int width, Bfloat* values) {
    // Two tokens' pair of dimensions, [a0 b0 a1 b1], becomes [a0 a1 b0 b1]; such groups are then transposed.
    static constexpr std::uint8_t PLACES[] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
    const uint8x16_t order = vld1q_u8(PLACES);
    for (int dimension = 0; dimension < width; dimension += 4) {
        for (int pair = 0; pair < PAGE_TOKENS / 2; pair += 2) {
            const auto groups = [&](int line) {
                const Bfloat* const from = keys + (dimension + line) * PAGE_TOKENS + 4 * pair;
                return vreinterpretq_u64_u8(vqtbl1q_u8(vreinterpretq_u8_u16(vld1q_u16(from)), order));
            };
            const uint64x2_t lower = groups(0), upper = groups(2);
            Bfloat* const to = values + 2 * (pair * width + dimension);
            vst1q_u16(to, vreinterpretq_u16_u64(vzip1q_u64(lower, upper)));
            vst1q_u16(to + 2 * width, vreinterpretq_u16_u64(vzip2q_u64(lower, upper)));
        }
    }
}
inline void turn_keys(const float* keys, int width, float* values) {
    for (int dimension = 0; dimension < width; dimension += 4) {
        for (int token = 0; token < PAGE_TOKENS; token += 4) {
            const float* const from = keys + dimension * PAGE_TOKENS + token;
            const float32x4_t a = vld1q_f32(from), b = vld1q_f32(from + PAGE_TOKENS),
                              c = vld1q_f32(from + 2 * PAGE_TOKENS), d = vld1q_f32(from + 3 * PAGE_TOKENS);
            const auto wide = [](float32x4_t x) { return vreinterpretq_f64_f32(x); };
            const float64x2_t even_ab = wide(vtrn1q_f32(a, b)), odd_ab = wide(vtrn2q_f32(a, b));
            const float64x2_t even_cd = wide(vtrn1q_f32(c, d)), odd_cd = wide(vtrn2q_f32(c, d));
            const auto keep = [&](int which, float64x2_t four) {
                vst1q_f32(values + (token + which) * width + dimension, vreinterpretq_f32_f64(four));
            };
            keep(0, vtrn1q_f64(even_ab, even_cd));
            keep(1, vtrn1q_f64(odd_ab, odd_cd));
            keep(2, vtrn2q_f64(even_ab, even_cd));
            keep(3, vtrn2q_f64(odd_ab, odd_cd));
        }
    }
}

}  // namespace lowbit
