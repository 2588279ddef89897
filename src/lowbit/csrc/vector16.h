// Sixteen floats and the few functions attention and the elementwise kernels need of them.
//
// One AVX-512 register, two AVX2 or four NEON registers (vector16_neon.h). Every function works lane by lane in one fixed way, and the
// reductions are fixed trees, so that a value never depends on which lanes or rows were computed with it.
// A product that feeds a sum is always written as fma(): the compiler has nothing left to contract.
#pragma once

#include "intrinsics.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

namespace lowbit {

constexpr int LANES = 16;
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LOG2_E_REST = 1.92596299112661746e-8f;  // log2(e) - LOG2_E
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

}  // namespace lowbit

#if defined(__ARM_NEON)
#include "vector16_neon.h"
#endif

namespace lowbit {

#if defined(__AVX512F__)

struct Vector16 {
    __m512 lanes;
};
using Lanes = __mmask16;  // which lanes: one bit each

inline Vector16 broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline Vector16 zeros() { return {_mm512_setzero_ps()}; }
inline Vector16 load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline void store(float* to, Vector16 x) { _mm512_storeu_ps(to, x.lanes); }
inline Vector16 add(Vector16 a, Vector16 b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
inline Vector16 subtract(Vector16 a, Vector16 b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
inline Vector16 multiply(Vector16 a, Vector16 b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
inline Vector16 divide(Vector16 a, Vector16 b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }
// a * b + c and c - a * b, rounded once.
inline Vector16 fma(Vector16 a, Vector16 b, Vector16 c) {
    return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)};
}
inline Vector16 negative_fma(Vector16 a, Vector16 b, Vector16 c) {
    return {_mm512_fnmadd_ps(a.lanes, b.lanes, c.lanes)};
}
// The second argument where either is NaN.
inline Vector16 maximum(Vector16 a, Vector16 b) { return {_mm512_max_ps(a.lanes, b.lanes)}; }
inline Vector16 minimum(Vector16 a, Vector16 b) { return {_mm512_min_ps(a.lanes, b.lanes)}; }
inline Vector16 round_to_integer(Vector16 x) {
    return {_mm512_roundscale_ps(x.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// Lanes first <= lane < last, both within 0..16.
inline Lanes lane_range(int first, int last) {
    return static_cast<Lanes>(((1u << last) - 1u) & ~((1u << first) - 1u));
}
inline Vector16 select(Lanes which, Vector16 inside, Vector16 outside) {
    return {_mm512_mask_blend_ps(which, outside.lanes, inside.lanes)};
}
inline Lanes negative(Vector16 x) { return _mm512_cmp_ps_mask(x.lanes, _mm512_setzero_ps(), _CMP_LT_OQ); }
// False where either is NaN.
inline Lanes less(Vector16 a, Vector16 b) { return _mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_LT_OQ); }
inline Lanes equal(Vector16 a, Vector16 b) { return _mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_EQ_OQ); }
inline Lanes both(Lanes a, Lanes b) { return static_cast<Lanes>(a & b); }
inline bool any(Lanes which) { return which != 0; }
inline int first_of(Lanes which) { return __builtin_ctz(which); }  // the first lane; there is one
inline Vector16 square_root(Vector16 x) { return {_mm512_sqrt_ps(x.lanes)}; }
// The whole number that the low 23 bits of x + 1.5 * 2^23 hold, cut to low..high: the nearest one, ties to
// even, where |x| < 2^22; what those bits say beyond, and 0 for NaN.
inline Vector16 nearest_between(Vector16 x, int low, int high) {
    const __m512i bits = _mm512_castps_si512(_mm512_add_ps(x.lanes, _mm512_set1_ps(12582912.0f)));
    const __m512i whole =
        _mm512_sub_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFF)), _mm512_set1_epi32(0x400000));
    const __m512i cut = _mm512_min_epi32(_mm512_max_epi32(whole, _mm512_set1_epi32(low)), _mm512_set1_epi32(high));
    return {_mm512_cvtepi32_ps(cut)};
}
inline Vector16 load_lanes(const float* from, int count) {  // zeros past count; nothing is read there
    return {_mm512_maskz_loadu_ps(lane_range(0, count), from)};
}
inline void store_lanes(float* to, Vector16 x, int count) {
    _mm512_mask_storeu_ps(to, lane_range(0, count), x.lanes);
}

// fraction * 2^exponent; exactly 0 below 2^-126, NaN stays NaN. exponent is whole.
inline Vector16 times_power_of_two(Vector16 fraction, Vector16 exponent, Vector16 unrounded) {
    const __mmask16 normal = _mm512_cmp_ps_mask(unrounded.lanes, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return {_mm512_maskz_scalef_ps(normal, fraction.lanes, exponent.lanes)};
}

// 32-bit words of two bfloat16 each: the lower halves, the upper halves.
inline Vector16 lower_bfloats(const std::uint16_t* pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16))};
}
inline Vector16 upper_bfloats(const std::uint16_t* pairs) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(pairs), mask))};
}

inline Vector16 load_bfloats(const std::uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}

// Of every two lanes ``APART``, the first becomes their sum, the second their difference.
template <int APART>
inline Vector16 butterfly(Vector16 x) {
    __m512 other;
    if constexpr (APART == 1) other = _mm512_permute_ps(x.lanes, 0xB1);
    if constexpr (APART == 2) other = _mm512_permute_ps(x.lanes, 0x4E);
    if constexpr (APART == 4) other = _mm512_shuffle_f32x4(x.lanes, x.lanes, 0xB1);
    if constexpr (APART == 8) other = _mm512_shuffle_f32x4(x.lanes, x.lanes, 0x4E);
    constexpr __mmask16 SECOND = APART == 1 ? 0xAAAA : APART == 2 ? 0xCCCC : APART == 4 ? 0xF0F0 : 0xFF00;
    return {_mm512_mask_sub_ps(_mm512_add_ps(x.lanes, other), SECOND, other, x.lanes)};
}
inline float first_lane(Vector16 x) { return _mm512_cvtss_f32(x.lanes); }

inline float reduce_add(Vector16 x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.lanes), _mm512_extractf32x8_ps(x.lanes, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(Vector16 x) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.lanes), _mm512_extractf32x8_ps(x.lanes, 1));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#elif defined(__AVX2__)

struct Vector16 {
    __m256 low, high;
};
struct Lanes {
    __m256 low, high;  // all bits of a lane set or clear
};

inline Vector16 broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Vector16 zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vector16 load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Vector16 x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
inline Vector16 add(Vector16 a, Vector16 b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Vector16 subtract(Vector16 a, Vector16 b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Vector16 multiply(Vector16 a, Vector16 b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Vector16 divide(Vector16 a, Vector16 b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
// a * b + c and c - a * b, rounded once.
inline Vector16 fma(Vector16 a, Vector16 b, Vector16 c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vector16 negative_fma(Vector16 a, Vector16 b, Vector16 c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
// The second argument where either is NaN.
inline Vector16 maximum(Vector16 a, Vector16 b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Vector16 minimum(Vector16 a, Vector16 b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline Vector16 round_to_integer(Vector16 x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, nearest), _mm256_round_ps(x.high, nearest)};
}

// Lanes first <= lane < last, both within 0..16.
inline Lanes lane_range(int first, int last) {
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    const __m256i below = _mm256_set1_epi32(first - 1), end = _mm256_set1_epi32(last);
    const auto inside = [&](__m256i lane) {
        return _mm256_castsi256_ps(
            _mm256_and_si256(_mm256_cmpgt_epi32(lane, below), _mm256_cmpgt_epi32(end, lane)));
    };
    return {inside(low), inside(high)};
}
inline Vector16 select(Lanes which, Vector16 inside, Vector16 outside) {
    return {_mm256_blendv_ps(outside.low, inside.low, which.low),
            _mm256_blendv_ps(outside.high, inside.high, which.high)};
}
inline Lanes negative(Vector16 x) {
    return {_mm256_cmp_ps(x.low, _mm256_setzero_ps(), _CMP_LT_OQ),
            _mm256_cmp_ps(x.high, _mm256_setzero_ps(), _CMP_LT_OQ)};
}
// False where either is NaN.
inline Lanes less(Vector16 a, Vector16 b) {
    return {_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)};
}
inline Lanes equal(Vector16 a, Vector16 b) {
    return {_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ)};
}
inline Lanes both(Lanes a, Lanes b) { return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)}; }
inline bool any(Lanes which) { return _mm256_movemask_ps(_mm256_or_ps(which.low, which.high)) != 0; }
inline int first_of(Lanes which) {  // the first lane; there is one
    return __builtin_ctz(static_cast<unsigned>(_mm256_movemask_ps(which.low)) |
                         static_cast<unsigned>(_mm256_movemask_ps(which.high)) << 8);
}
inline Vector16 square_root(Vector16 x) { return {_mm256_sqrt_ps(x.low), _mm256_sqrt_ps(x.high)}; }
// The whole number that the low 23 bits of x + 1.5 * 2^23 hold, cut to low..high: the nearest one, ties to
// even, where |x| < 2^22; what those bits say beyond, and 0 for NaN.
inline Vector16 nearest_between(Vector16 x, int low, int high) {
    const auto half = [&](__m256 part) {
        const __m256i bits = _mm256_castps_si256(_mm256_add_ps(part, _mm256_set1_ps(12582912.0f)));
        const __m256i whole = _mm256_sub_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFF)),
                                               _mm256_set1_epi32(0x400000));
        return _mm256_cvtepi32_ps(_mm256_min_epi32(_mm256_max_epi32(whole, _mm256_set1_epi32(low)),
                                                   _mm256_set1_epi32(high)));
    };
    return {half(x.low), half(x.high)};
}
inline Vector16 load_lanes(const float* from, int count) {  // zeros past count; nothing is read there
    const Lanes which = lane_range(0, count);
    return {_mm256_maskload_ps(from, _mm256_castps_si256(which.low)),
            _mm256_maskload_ps(from + 8, _mm256_castps_si256(which.high))};
}
inline void store_lanes(float* to, Vector16 x, int count) {
    const Lanes which = lane_range(0, count);
    _mm256_maskstore_ps(to, _mm256_castps_si256(which.low), x.low);
    _mm256_maskstore_ps(to + 8, _mm256_castps_si256(which.high), x.high);
}

// fraction * 2^exponent; exactly 0 below 2^-126, NaN stays NaN. exponent is whole.
inline Vector16 times_power_of_two(Vector16 fraction, Vector16 exponent, Vector16 unrounded) {
    const auto scaled = [](__m256 part, __m256 power, __m256 wanted) {
        // Above 2^127 the exponent field reads 255: infinity.
        const __m256i field = _mm256_add_epi32(
            _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(128.0f), power)), _mm256_set1_epi32(127));
        const __m256 result = _mm256_mul_ps(part, _mm256_castsi256_ps(_mm256_slli_epi32(field, 23)));
        const __m256 normal = _mm256_cmp_ps(wanted, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
        return _mm256_and_ps(normal, result);
    };
    return {scaled(fraction.low, exponent.low, unrounded.low),
            scaled(fraction.high, exponent.high, unrounded.high)};
}

// 32-bit words of two bfloat16 each: the lower halves, the upper halves.
inline Vector16 lower_bfloats(const std::uint16_t* pairs) {
    const auto half = [](const std::uint16_t* from) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    };
    return {half(pairs), half(pairs + 16)};
}
inline Vector16 upper_bfloats(const std::uint16_t* pairs) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    const auto half = [&](const std::uint16_t* from) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm256_castsi256_ps(_mm256_and_si256(words, mask));
    };
    return {half(pairs), half(pairs + 16)};
}

inline Vector16 load_bfloats(const std::uint16_t* from) {
    const auto half = [](const std::uint16_t* eight) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(eight));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    };
    return {half(from), half(from + 8)};
}

template <int APART>
inline Vector16 butterfly(Vector16 x) {
    if constexpr (APART == 8) return {_mm256_add_ps(x.low, x.high), _mm256_sub_ps(x.low, x.high)};
    const auto half = [](__m256 lanes) {
        __m256 other;
        if constexpr (APART == 1) other = _mm256_permute_ps(lanes, 0xB1);
        if constexpr (APART == 2) other = _mm256_permute_ps(lanes, 0x4E);
        if constexpr (APART == 4) other = _mm256_permute2f128_ps(lanes, lanes, 0x01);
        constexpr int SECOND = APART == 1 ? 0xAA : APART == 2 ? 0xCC : 0xF0;
        return _mm256_blend_ps(_mm256_add_ps(lanes, other), _mm256_sub_ps(other, lanes), SECOND);
    };
    return {half(x.low), half(x.high)};
}
inline float first_lane(Vector16 x) { return _mm256_cvtss_f32(x.low); }

inline float reduce_add(Vector16 x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(Vector16 x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#endif

// 2^fraction for |fraction| <= 0.5: minimax polynomial, relative error 2e-9 before rounding.
inline Vector16 exp2_fraction(Vector16 fraction) {
    Vector16 sum = broadcast(0.000153533621f);
    for (const float next :
         {0.00133988746f, 0.00961843736f, 0.0555033247f, 0.240226479f, 0.693147203f, 1.0f}) {
        sum = fma(sum, fraction, broadcast(next));
    }
    return sum;
}

// 2^x, relative error about 1e-7; 0 below -126, infinity above 128, NaN for NaN.
inline Vector16 exp2(Vector16 x) {
    const Vector16 whole = round_to_integer(x);
    return times_power_of_two(exp2_fraction(subtract(x, whole)), whole, x);
}

// e^x: x log2(e) is formed in two parts, so that the relative error stays near 1e-7 for large |x| too.
inline Vector16 exp(Vector16 x) {
    x = maximum(broadcast(-1e4f), minimum(broadcast(1e4f), x));  // infinity would give inf - inf below
    const Vector16 power = multiply(x, broadcast(LOG2_E));
    const Vector16 whole = round_to_integer(power);
    const Vector16 head = fma(x, broadcast(LOG2_E), subtract(zeros(), whole));
    const Vector16 fraction = fma(x, broadcast(LOG2_E_REST), head);
    return times_power_of_two(exp2_fraction(fraction), whole, power);
}

// Absolute error about 1e-7.
inline Vector16 tanh(Vector16 x) {
    x = maximum(broadcast(-20.0f), minimum(broadcast(20.0f), x));
    const Vector16 squared = exp2(multiply(x, broadcast(2.0f * LOG2_E)));
    return subtract(broadcast(1.0f), divide(broadcast(2.0f), add(squared, broadcast(1.0f))));
}

// float32 -> bfloat16, to nearest, ties to even: what torch does, on every instruction set.
inline std::uint16_t to_bfloat(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;  // any NaN: rounding could carry it into infinity
    return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace lowbit
