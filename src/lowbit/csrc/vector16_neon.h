// Sixteen floats in four NEON registers: vector16.h's functions for aarch64, included by it.
//
// Every function gives the bits its AVX2 form gives, so that what is built from them does, too: the reductions
// are the same trees, and of two numbers without an order (NaN, zeros) the same one is taken.
#pragma once

#include "vector16.h"

namespace lowbit {

struct Vector16 {
    float32x4_t a, b, c, d;
};
struct Lanes {
    uint32x4_t a, b, c, d;  // all bits of a lane set or clear
};

using Bytes = uint8x16_t;  // sixteen

// The same function of all four registers.
template <class Function, class First, class... Rest>
inline auto each_quarter(const Function& f, First x, Rest... rest) {
    using Result = std::conditional_t<std::is_same_v<decltype(f(x.a, rest.a...)), float32x4_t>, Vector16, Lanes>;
    return Result{f(x.a, rest.a...), f(x.b, rest.b...), f(x.c, rest.c...), f(x.d, rest.d...)};
}

inline Vector16 broadcast(float value) {
    const float32x4_t four = vdupq_n_f32(value);
    return {four, four, four, four};
}
inline Vector16 zeros() { return broadcast(0.0f); }
inline Vector16 load(const float* from) {
    return {vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)};
}
inline void store(float* to, Vector16 x) {
    vst1q_f32(to, x.a);
    vst1q_f32(to + 4, x.b);
    vst1q_f32(to + 8, x.c);
    vst1q_f32(to + 12, x.d);
}
inline Vector16 add(Vector16 x, Vector16 y) {
    return each_quarter([](float32x4_t p, float32x4_t q) { return vaddq_f32(p, q); }, x, y);
}
inline Vector16 subtract(Vector16 x, Vector16 y) {
    return each_quarter([](float32x4_t p, float32x4_t q) { return vsubq_f32(p, q); }, x, y);
}
template <int APART>
inline Vector16 butterfly(Vector16 x) {
    const auto sum = [](float32x4_t p, float32x4_t q) { return vaddq_f32(p, q); };
    const auto difference = [](float32x4_t p, float32x4_t q) { return vsubq_f32(p, q); };
    if constexpr (APART == 8) return {sum(x.a, x.c), sum(x.b, x.d), difference(x.a, x.c), difference(x.b, x.d)};
    if constexpr (APART == 4) return {sum(x.a, x.b), difference(x.a, x.b), sum(x.c, x.d), difference(x.c, x.d)};
    const std::uint32_t second[4] = {0, APART == 1 ? ~0u : 0, APART == 1 ? 0 : ~0u, ~0u};
    const uint32x4_t is_second = vld1q_u32(second);
    return each_quarter(
        [&](float32x4_t lanes) {
            const float32x4_t other = APART == 1 ? vrev64q_f32(lanes) : vextq_f32(lanes, lanes, 2);
            return vbslq_f32(is_second, difference(other, lanes), sum(lanes, other));
        },
        x);
}
inline Vector16 multiply(Vector16 x, Vector16 y) {
    return each_quarter([](float32x4_t p, float32x4_t q) { return vmulq_f32(p, q); }, x, y);
}
inline Vector16 divide(Vector16 x, Vector16 y) {
    return each_quarter([](float32x4_t p, float32x4_t q) { return vdivq_f32(p, q); }, x, y);
}
// x * y + z and z - x * y, rounded once.
inline Vector16 fma(Vector16 x, Vector16 y, Vector16 z) {
    return each_quarter([](float32x4_t p, float32x4_t q, float32x4_t r) { return vfmaq_f32(r, p, q); }, x, y, z);
}
inline Vector16 negative_fma(Vector16 x, Vector16 y, Vector16 z) {
    return each_quarter([](float32x4_t p, float32x4_t q, float32x4_t r) { return vfmsq_f32(r, p, q); }, x, y, z);
}
// The second argument where either is NaN, or both are zero: FMAX and FMIN would choose otherwise.
inline float32x4_t larger_of(float32x4_t p, float32x4_t q) { return vbslq_f32(vcgtq_f32(p, q), p, q); }
inline Vector16 maximum(Vector16 x, Vector16 y) { return each_quarter(larger_of, x, y); }
inline Vector16 minimum(Vector16 x, Vector16 y) {
    return each_quarter([](float32x4_t p, float32x4_t q) { return vbslq_f32(vcltq_f32(p, q), p, q); }, x, y);
}
inline Vector16 round_to_integer(Vector16 x) {
    return each_quarter([](float32x4_t p) { return vrndnq_f32(p); }, x);
}

// Lanes first <= lane < last, both within 0..16.
inline Lanes lane_range(int first, int last) {
    static constexpr std::int32_t NUMBERS[] = {0, 1, 2, 3};
    const int32x4_t numbers = vld1q_s32(NUMBERS);
    const auto inside = [&](int begin) {
        const int32x4_t lane = vaddq_s32(numbers, vdupq_n_s32(begin));
        return vandq_u32(vcgeq_s32(lane, vdupq_n_s32(first)), vcltq_s32(lane, vdupq_n_s32(last)));
    };
    return {inside(0), inside(4), inside(8), inside(12)};
}
inline Vector16 select(Lanes which, Vector16 inside, Vector16 outside) {
    return {vbslq_f32(which.a, inside.a, outside.a), vbslq_f32(which.b, inside.b, outside.b),
            vbslq_f32(which.c, inside.c, outside.c), vbslq_f32(which.d, inside.d, outside.d)};
}
inline Lanes negative(Vector16 x) {
    return each_quarter([](float32x4_t p) { return vcltzq_f32(p); }, x);
}
// False where either is NaN.
inline Lanes less(Vector16 x, Vector16 y) {
    return each_quarter([](float32x4_t p, float32x4_t q) { return vcltq_f32(p, q); }, x, y);
}
inline Lanes equal(Vector16 x, Vector16 y) {
    return each_quarter([](float32x4_t p, float32x4_t q) { return vceqq_f32(p, q); }, x, y);
}
inline Lanes both(Lanes x, Lanes y) {
    return each_quarter([](uint32x4_t p, uint32x4_t q) { return vandq_u32(p, q); }, x, y);
}
// Four bits a lane, in ascending order.
inline std::uint64_t lane_bits(Lanes which) {
    const uint16x8_t low = vcombine_u16(vmovn_u32(which.a), vmovn_u32(which.b));
    const uint16x8_t high = vcombine_u16(vmovn_u32(which.c), vmovn_u32(which.d));
    const uint8x16_t bytes = vcombine_u8(vmovn_u16(low), vmovn_u16(high));
    return vget_lane_u64(vreinterpret_u64_u8(vshrn_n_u16(vreinterpretq_u16_u8(bytes), 4)), 0);
}
inline bool any(Lanes which) { return lane_bits(which) != 0; }
inline int first_of(Lanes which) { return __builtin_ctzll(lane_bits(which)) / 4; }  // the first lane; there is one
inline Vector16 square_root(Vector16 x) {
    return each_quarter([](float32x4_t p) { return vsqrtq_f32(p); }, x);
}
// The whole number that the low 23 bits of x + 1.5 * 2^23 hold, cut to low..high: the nearest one, ties to
// even, where |x| < 2^22; what those bits say beyond, and 0 for NaN.
inline Vector16 nearest_between(Vector16 x, int low, int high) {
    return each_quarter(
        [&](float32x4_t p) {
            const int32x4_t bits = vreinterpretq_s32_f32(vaddq_f32(p, vdupq_n_f32(12582912.0f)));
            const int32x4_t whole = vsubq_s32(vandq_s32(bits, vdupq_n_s32(0x7FFFFF)), vdupq_n_s32(0x400000));
            return vcvtq_f32_s32(vminq_s32(vmaxq_s32(whole, vdupq_n_s32(low)), vdupq_n_s32(high)));
        },
        x);
}
inline Vector16 load_lanes(const float* from, int count) {  // zeros past count; nothing is read there
    float all[LANES] = {};
    std::memcpy(all, from, static_cast<std::size_t>(count) * sizeof(float));
    return load(all);
}
inline void store_lanes(float* to, Vector16 x, int count) {
    float all[LANES];
    store(all, x);
    std::memcpy(to, all, static_cast<std::size_t>(count) * sizeof(float));
}

// fraction * 2^exponent; exactly 0 below 2^-126, NaN stays NaN. exponent is whole.
inline Vector16 times_power_of_two(Vector16 fraction, Vector16 exponent, Vector16 unrounded) {
    return each_quarter(
        [](float32x4_t part, float32x4_t power, float32x4_t wanted) {
            // Above 2^127 the exponent field reads 255: infinity.
            const float32x4_t within = vminnmq_f32(vdupq_n_f32(128.0f), power);
            const int32x4_t field = vaddq_s32(vcvtnq_s32_f32(within), vdupq_n_s32(127));
            const float32x4_t result = vmulq_f32(part, vreinterpretq_f32_s32(vshlq_n_s32(field, 23)));
            const uint32x4_t too_small = vcltq_f32(wanted, vdupq_n_f32(-126.0f));
            return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(result), too_small));
        },
        fraction, exponent, unrounded);
}

// 32-bit words of two bfloat16 each: the lower halves, the upper halves.
inline Vector16 lower_bfloats(const std::uint16_t* pairs) {
    const auto four = [&](int at) {
        return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(pairs + at)), 16));
    };
    return {four(0), four(8), four(16), four(24)};
}
inline Vector16 upper_bfloats(const std::uint16_t* pairs) {
    const auto four = [&](int at) {
        const uint32x4_t words = vreinterpretq_u32_u16(vld1q_u16(pairs + at));
        return vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xFFFF0000u)));
    };
    return {four(0), four(8), four(16), four(24)};
}
inline Vector16 load_bfloats(const std::uint16_t* from) {
    const uint16x8_t low = vld1q_u16(from), high = vld1q_u16(from + 8);
    const auto wide = [](uint32x4_t words) { return vreinterpretq_f32_u32(vshlq_n_u32(words, 16)); };
    return {wide(vmovl_u16(vget_low_u16(low))), wide(vmovl_high_u16(low)), wide(vmovl_u16(vget_low_u16(high))),
            wide(vmovl_high_u16(high))};
}

inline Vector16 from_halves(uint16x8_t low, uint16x8_t high) {
    const auto lower = [](uint16x8_t x) { return vcvt_f32_f16(vget_low_f16(vreinterpretq_f16_u16(x))); };
    const auto upper = [](uint16x8_t x) { return vcvt_high_f32_f16(vreinterpretq_f16_u16(x)); };
    return {lower(low), upper(low), lower(high), upper(high)};
}
inline Vector16 load_halves(const std::uint8_t* from) {
    return from_halves(vreinterpretq_u16_u8(vld1q_u8(from)), vreinterpretq_u16_u8(vld1q_u8(from + 16)));
}
inline Vector16 from_unsigned(Bytes bytes) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))};
}
inline Vector16 from_signed(Bytes bytes) {
    const int8x16_t whole = vreinterpretq_s8_u8(bytes);
    const int16x8_t low = vmovl_s8(vget_low_s8(whole)), high = vmovl_high_s8(whole);
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))};
}
// An fp8 code becomes the float16 of the same digits, e4m3's 2^-8 times too small: subnormal numbers come right
// by themselves.
inline Vector16 from_e5m2(Bytes codes) {
    return from_halves(vshlq_n_u16(vmovl_u8(vget_low_u8(codes)), 8), vshlq_n_u16(vmovl_high_u8(codes), 8));
}
inline Vector16 from_e4m3(Bytes codes) {
    const auto half = [](uint16x8_t words) {
        const uint16x8_t seven_bits = vdupq_n_u16(0x7f), digits = vandq_u16(words, seven_bits);
        const uint16x8_t sign = vshlq_n_u16(vbicq_u16(words, seven_bits), 8);
        const uint16x8_t no_number = vandq_u16(vceqq_u16(digits, seven_bits), vdupq_n_u16(0x7c00));
        return vorrq_u16(vorrq_u16(sign, vshlq_n_u16(digits, 7)), no_number);
    };
    const Vector16 small = from_halves(half(vmovl_u8(vget_low_u8(codes))), half(vmovl_high_u8(codes)));
    return multiply(small, broadcast(256.0f));
}

inline float first_lane(Vector16 x) { return vgetq_lane_f32(x.a, 0); }

inline float reduce_add(Vector16 x) {
    const float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float reduce_max(Vector16 x) {
    const float32x4_t four = larger_of(larger_of(x.a, x.c), larger_of(x.b, x.d));
    const float32x4_t two = larger_of(four, vextq_f32(four, four, 2));
    return vgetq_lane_f32(larger_of(two, vextq_f32(two, two, 1)), 0);
}

}  // namespace lowbit
