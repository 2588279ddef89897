// Attention's cached numbers and operands in NEON registers; included by attention_cache.h, whose AVX2 functions
// these agree with to the bit.
#pragma once

#include "attention_cache.h"

namespace lowbit {

inline Bytes load_bytes(const std::uint8_t* from) { return vld1q_u8(from); }
inline Vector16 from_bytes(Bytes bytes) { return from_signed(bytes); }
// A sign, and seven bits of magnitude.
inline Vector16 from_sign_and_size(Bytes codes) {
    const int8x16_t size = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(0x7f)));
    const uint8x16_t negative = vcltzq_s8(vreinterpretq_s8_u8(codes));
    return from_signed(vreinterpretq_u8_s8(vbslq_s8(negative, vnegq_s8(size), size)));
}
// The codes of four bits in eight bytes, lower ones first: a byte's two are neighbours, or two bytes' pairs.
template <bool PAIRS>
inline Bytes load_digits(const std::uint8_t* from) {
    const uint8x8_t stored = vld1_u8(from), lower = vand_u8(stored, vdup_n_u8(15)), upper = vshr_n_u8(stored, 4);
    if constexpr (PAIRS) {
        const uint16x4x2_t zipped = vzip_u16(vreinterpret_u16_u8(lower), vreinterpret_u16_u8(upper));
        return vreinterpretq_u8_u16(vcombine_u16(zipped.val[0], zipped.val[1]));
    } else {
        const uint8x8x2_t zipped = vzip_u8(lower, upper);
        return vcombine_u8(zipped.val[0], zipped.val[1]);
    }
}
// The upper halves of eight numbers and of eight more.
inline void store_upper_halves(Bfloat* first, Bfloat* second, Vector16 x) {
    const auto eight = [](float32x4_t low, float32x4_t high) {
        return vuzp2q_u16(vreinterpretq_u16_f32(low), vreinterpretq_u16_f32(high));
    };
    vst1q_u16(first, eight(x.a, x.b));
    vst1q_u16(second, eight(x.c, x.d));
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
