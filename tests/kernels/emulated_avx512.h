// AVX-512 on a CPU that has AVX2 only: the functions of <immintrin.h> that the kernels use, in plain C++ and AVX2.
//
// Included before a whole source (GCC's -include; CMake's LOWBIT_EMULATE_AVX512), it says what a compiler says that has
// AVX-512 with VNNI and VBMI, with LOWBIT_EMULATE_BF16 also BF16, and declares the functions anew in the kernels' own
// namespace, where they hide the processor's: a kernel that uses one which is not here does not compile. They follow
// the pseudocode of Intel's manual; a use that the processor would fault ends the program, and what it leaves undefined
// is not zero.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>

#define LOWBIT_EMULATED_AVX512
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1
#define __AVX512VBMI__ 1
#if defined(LOWBIT_EMULATE_BF16)
#define __AVX512BF16__ 1
#endif

#define EMULATED __attribute__((always_inline)) inline
#define CALLED __attribute__((noinline)) inline  // loops over lanes, which would take minutes to compile in every place

namespace lowbit {
namespace emulated_avx512 {

// The lanes of a register.
template <class Element, int COUNT = 64 / static_cast<int>(sizeof(Element))>
struct Lanes {
    alignas(64) Element at[COUNT];
};

template <class Element, class Register>
EMULATED auto lanes(Register x) {
    Lanes<Element, static_cast<int>(sizeof x / sizeof(Element))> all;
    std::memcpy(all.at, &x, sizeof x);
    return all;
}

// The register whose lanes are ``lane(i)``.
template <class Register, class Element, class Lane>
EMULATED Register made(const Lane& lane) {
    constexpr int COUNT = static_cast<int>(sizeof(Register) / sizeof(Element));
    Lanes<Element, COUNT> all;
    for (int i = 0; i < COUNT; ++i) all.at[i] = lane(i);
    Register x;
    std::memcpy(&x, all.at, sizeof x);
    return x;
}

// A bit for each lane where ``lane(i)``.
template <class Mask, class Lane>
EMULATED Mask mask_of(const Lane& lane) {
    Mask mask = 0;
    for (int i = 0; i < static_cast<int>(sizeof mask) * 8; ++i) mask = static_cast<Mask>(mask | Mask{lane(i)} << i);
    return mask;
}
template <class Mask>
EMULATED bool has(Mask mask, int lane) {
    return (mask >> lane & 1) != 0;
}

template <class Element, class Mask, class Register>
EMULATED Register chosen(Mask mask, Register inside, Register outside) {
    const auto yes = lanes<Element>(inside), no = lanes<Element>(outside);
    return made<Register, Element>([&](int i) { return has(mask, i) ? yes.at[i] : no.at[i]; });
}

EMULATED void need(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "lowbit: emulated AVX-512: %s\n", what);
    std::abort();
}
EMULATED void need_aligned(const void* address) {
    need(reinterpret_cast<std::uintptr_t>(address) % 64 == 0, "an address that is no multiple of 64 would fault");
}

template <class Narrow, class Wide>
EMULATED Narrow part(Wide x, int which) {
    constexpr auto SIZE = sizeof(Narrow);
    Narrow found;
    std::memcpy(&found, reinterpret_cast<const char*>(&x) + static_cast<std::size_t>(which) * SIZE, SIZE);
    return found;
}
EMULATED __m256 half(__m512 x, int which) { return part<__m256>(x, which); }
EMULATED __m256i half(__m512i x, int which) { return part<__m256i>(x, which); }
EMULATED __m128i half(__m256i x, int which) { return part<__m128i>(x, which); }
template <class Wide, class Narrow>
EMULATED Wide whole(const Narrow& parts) {
    Wide made;
    static_assert(sizeof made == sizeof parts);
    std::memcpy(&made, &parts, sizeof made);
    return made;
}
EMULATED __m512 joined(__m256 low, __m256 high) {
    const __m256 both[2] = {low, high};
    return whole<__m512>(both);
}
EMULATED __m512i joined(__m256i low, __m256i high) {
    const __m256i both[2] = {low, high};
    return whole<__m512i>(both);
}

EMULATED std::uint32_t bits_of(float x) { return part<std::uint32_t>(x, 0); }
EMULATED float float_of(std::uint32_t bits) { return part<float>(bits, 0); }
// Subnormal numbers count as zeros.
EMULATED float flushed(float x) { return (bits_of(x) & 0x7F800000u) == 0 ? float_of(bits_of(x) & 0x80000000u) : x; }
EMULATED __m256 flushed(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x), size = _mm256_set1_epi32(0x7FFFFFFF);
    const __m256i exponent = _mm256_and_si256(bits, _mm256_set1_epi32(0x7F800000));
    const __m256i small = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_and_si256(small, size), bits));
}
EMULATED std::uint16_t narrowed(float x) {  // to nearest, ties to even
    const std::uint32_t bits = bits_of(flushed(x));
    if (x != x) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// x times 2^floor(power).
EMULATED float scaled(float x, float power) {
    constexpr float INF = std::numeric_limits<float>::infinity(), NOT = std::numeric_limits<float>::quiet_NaN();
    const auto whole = [&] { return static_cast<int>(std::floor(power)); };
    if (power >= -126.0f && power < 128.0f) return x * float_of(static_cast<std::uint32_t>(whole() + 127) << 23);
    if (x != x) return power == INF ? INF : power == -INF ? 0.0f : x;
    if (power != power) return power;
    if (power == INF) return x == 0.0f ? NOT : std::copysign(INF, x);
    if (power == -INF) return std::isinf(x) ? NOT : std::copysign(0.0f, x);
    return std::ldexp(x, power < -1000.0f ? -1000 : power > 1000.0f ? 1000 : whole());
}
// x less floor(x), rounded downwards like floor's own result.
EMULATED float less_floor(float x) {
    if (x != x) return x;
    if (std::isinf(x)) return 0.0f;
    const float rest = x - std::floor(x);
    if (rest == 0.0f) return -0.0f;
    return x < 0.0f && x > -1.0f && rest - 1.0f > x ? std::nextafter(rest, 0.0f) : rest;
}

EMULATED bool compares(float a, float b, int predicate) {
    switch (predicate) {
        case _CMP_EQ_OQ: return a == b;
        case _CMP_LT_OQ: return a < b;
        case _CMP_NLT_UQ: return !(a < b);
        case _CMP_UNORD_Q: return a != a || b != b;
        default: break;
    }
    need(false, "a comparison that is not emulated");
    return false;
}

// 16-byte quarters: two of a, then two of b.
template <class Register>
EMULATED Register quarters(Register a, Register b, int chosen) {
    const __m128i all[4] = {part<__m128i>(a, chosen & 3), part<__m128i>(a, chosen >> 2 & 3),
                            part<__m128i>(b, chosen >> 4 & 3), part<__m128i>(b, chosen >> 6 & 3)};
    return whole<Register>(all);
}
template <class Element, class Register>
EMULATED Register permuted(__m512i index, Register x) {
    const auto from = lanes<Element>(x);
    const auto places = lanes<Element>(index);
    constexpr unsigned COUNT = 64 / sizeof(Element);
    return made<Register, Element>([&](int i) { return from.at[static_cast<unsigned>(places.at[i]) % COUNT]; });
}
template <class Element>
EMULATED __m512i permuted_of_two(__m512i a, __m512i index, __m512i b) {
    const __m512i both[2] = {a, b};
    Lanes<Element, 128 / static_cast<int>(sizeof(Element))> from;
    std::memcpy(from.at, both, sizeof both);
    const auto places = lanes<Element>(index);
    constexpr unsigned COUNT = 128 / sizeof(Element);
    return made<__m512i, Element>([&](int i) { return from.at[static_cast<unsigned>(places.at[i]) % COUNT]; });
}

namespace functions {

// Memory.
EMULATED __m512i _mm512_loadu_si512(const void* from) {
    __m512i x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
EMULATED __m512 _mm512_loadu_ps(const void* from) {
    __m512 x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
EMULATED void _mm512_storeu_si512(void* to, __m512i x) { std::memcpy(to, &x, sizeof x); }
EMULATED void _mm512_storeu_ps(void* to, __m512 x) { std::memcpy(to, &x, sizeof x); }
EMULATED __m512i _mm512_load_si512(const void* from) {
    need_aligned(from);
    return _mm512_loadu_si512(from);
}
EMULATED void _mm512_store_si512(void* to, __m512i x) {
    need_aligned(to);
    _mm512_storeu_si512(to, x);
}
CALLED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {  // touches the chosen lanes alone
    float all[16] = {};
    for (int i = 0; i < 16; ++i) {
        if (has(mask, i)) std::memcpy(&all[i], static_cast<const float*>(from) + i, sizeof(float));
    }
    return _mm512_loadu_ps(all);
}
CALLED void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 x) {
    const auto all = lanes<float>(x);
    for (int i = 0; i < 16; ++i) {
        if (has(mask, i)) std::memcpy(static_cast<float*>(to) + i, &all.at[i], sizeof(float));
    }
}

// Constants.
EMULATED __m512i _mm512_set1_epi8(char x) { return joined(_mm256_set1_epi8(x), _mm256_set1_epi8(x)); }
EMULATED __m512i _mm512_set1_epi16(short x) { return joined(_mm256_set1_epi16(x), _mm256_set1_epi16(x)); }
EMULATED __m512i _mm512_set1_epi32(int x) { return joined(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
EMULATED __m512i _mm512_set1_epi64(long long x) { return joined(_mm256_set1_epi64x(x), _mm256_set1_epi64x(x)); }
EMULATED __m512 _mm512_set1_ps(float x) { return joined(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
EMULATED __m512i _mm512_setzero_si512() { return __m512i{}; }
EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
#undef _mm512_setr_epi32
template <class... Numbers>
EMULATED __m512i _mm512_setr_epi32(Numbers... x) {
    static_assert(sizeof...(x) == 16);
    const int all[16] = {x...};
    return _mm512_loadu_si512(all);
}
EMULATED __m512i _mm512_broadcast_i32x4(__m128i x) {
    const __m128i all[4] = {x, x, x, x};
    return _mm512_loadu_si512(all);
}

// The same bits as another type, and parts of registers.
EMULATED __m512i _mm512_castps_si512(__m512 x) { return reinterpret_cast<__m512i>(x); }
EMULATED __m512 _mm512_castsi512_ps(__m512i x) { return reinterpret_cast<__m512>(x); }
EMULATED __m256 _mm512_castps512_ps256(__m512 x) { return half(x, 0); }
EMULATED __m128i _mm512_castsi512_si128(__m512i x) { return part<__m128i>(x, 0); }
EMULATED __m512i _mm512_castsi256_si512(__m256i x) { return joined(x, _mm256_set1_epi8(0x5A)); }
EMULATED float _mm512_cvtss_f32(__m512 x) { return part<float>(x, 0); }
EMULATED __m256 _mm512_extractf32x8_ps(__m512 x, int which) { return half(x, which & 1); }
EMULATED __m512i _mm512_inserti64x4(__m512i x, __m256i y, int which) {
    return which & 1 ? joined(half(x, 0), y)
                     : joined(y, half(x, 1));
}

// What AVX2 has too, twice.
#define TWICE(TYPE, NAME)                                                                           \
    EMULATED TYPE _mm512_##NAME(TYPE a, TYPE b) {                                                   \
        return joined(_mm256_##NAME(half(a, 0), half(b, 0)), _mm256_##NAME(half(a, 1), half(b, 1))); \
    }
TWICE(__m512, add_ps)
TWICE(__m512, sub_ps)
TWICE(__m512, mul_ps)
TWICE(__m512, div_ps)
TWICE(__m512, max_ps)
TWICE(__m512, min_ps)
TWICE(__m512i, add_epi8)
TWICE(__m512i, add_epi16)
TWICE(__m512i, add_epi32)
TWICE(__m512i, add_epi64)
TWICE(__m512i, sub_epi16)
TWICE(__m512i, sub_epi32)
TWICE(__m512i, max_epi32)
TWICE(__m512i, min_epi32)
TWICE(__m512i, mullo_epi32)
TWICE(__m512i, shuffle_epi8)
TWICE(__m512i, unpacklo_epi8)
TWICE(__m512i, unpackhi_epi8)
TWICE(__m512i, unpacklo_epi16)
TWICE(__m512i, unpackhi_epi16)
TWICE(__m512i, unpacklo_epi32)
TWICE(__m512i, unpackhi_epi32)
TWICE(__m512i, unpacklo_epi64)
TWICE(__m512i, unpackhi_epi64)
#undef TWICE
#define TWICE(NAME)                                                                    \
    EMULATED __m512i _mm512_##NAME(__m512i a, unsigned count) {                        \
        const int by = static_cast<int>(count);                                        \
        return joined(_mm256_##NAME(half(a, 0), by), _mm256_##NAME(half(a, 1), by)); \
    }
TWICE(slli_epi16)
TWICE(slli_epi32)
TWICE(srli_epi16)
TWICE(srli_epi32)
TWICE(srai_epi32)
#undef TWICE
#define TWICE(NAME)                                                       \
    EMULATED __m512 _mm512_##NAME(__m512 a, __m512 b, __m512 c) {         \
        return joined(_mm256_##NAME(half(a, 0), half(b, 0), half(c, 0)),  \
                      _mm256_##NAME(half(a, 1), half(b, 1), half(c, 1))); \
    }
TWICE(fmadd_ps)
TWICE(fmsub_ps)
TWICE(fnmadd_ps)
#undef TWICE
#define TWICE(TO, FROM, NAME)                                                                                \
    EMULATED TO _mm512_##NAME(FROM a) { return joined(_mm256_##NAME(half(a, 0)), _mm256_##NAME(half(a, 1))); }
TWICE(__m512, __m512, sqrt_ps)
TWICE(__m512, __m512i, cvtepi32_ps)
TWICE(__m512i, __m512, cvtps_epi32)
TWICE(__m512, __m256i, cvtph_ps)
TWICE(__m512i, __m256i, cvtepu8_epi16)
TWICE(__m512i, __m256i, cvtepu16_epi32)
TWICE(__m512i, __m256i, cvtepu32_epi64)
#undef TWICE
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
CALLED __m512 _mm512_roundscale_ps(__m512 a, int how) {
    need(how == 8, "a rounding that is not emulated");  // to whole numbers, ties to even
    return joined(_mm256_round_ps(half(a, 0), 8), _mm256_round_ps(half(a, 1), 8));
}
CALLED __m256i _mm512_cvtps_ph(__m512 x, int how) {
    need(how == 0, "a rounding that is not emulated");
    const __m128i both[2] = {_mm256_cvtps_ph(half(x, 0), 0),
                             _mm256_cvtps_ph(half(x, 1), 0)};
    return whole<__m256i>(both);
}

// Other widths.
EMULATED __m512i _mm512_cvtepi8_epi32(__m128i x) {
    return joined(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)));
}
EMULATED __m512i _mm512_cvtepu8_epi32(__m128i x) {
    return joined(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
}
CALLED __m256i _mm512_cvtepi32_epi16(__m512i x) {
    const auto wide = lanes<int>(x);
    return made<__m256i, short>([&](int i) { return static_cast<short>(wide.at[i]); });
}
CALLED __m128i _mm512_cvtepi32_epi8(__m512i x) {
    const auto wide = lanes<int>(x);
    return made<__m128i, signed char>([&](int i) { return static_cast<signed char>(wide.at[i]); });
}

// Lanes in another order.
EMULATED __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int chosen) { return quarters(a, b, chosen); }
EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int chosen) { return quarters(a, b, chosen); }
EMULATED __m512i _mm512_shuffle_i64x2(__m512i a, __m512i b, int chosen) { return quarters(a, b, chosen); }
CALLED __m512 _mm512_permute_ps(__m512 x, int chosen) {
    const auto from = lanes<float>(x);
    return made<__m512, float>([&](int i) { return from.at[i / 4 * 4 + (chosen >> i % 4 * 2 & 3)]; });
}
CALLED __m512i _mm512_permutexvar_epi8(__m512i index, __m512i x) { return permuted<std::uint8_t>(index, x); }
CALLED __m512i _mm512_permutexvar_epi16(__m512i index, __m512i x) { return permuted<std::uint16_t>(index, x); }
CALLED __m512i _mm512_permutexvar_epi32(__m512i index, __m512i x) { return permuted<std::uint32_t>(index, x); }
CALLED __m512 _mm512_permutexvar_ps(__m512i index, __m512 x) { return permuted<std::uint32_t>(index, x); }
CALLED __m512i _mm512_permutex2var_epi8(__m512i a, __m512i index, __m512i b) {
    return permuted_of_two<std::uint8_t>(a, index, b);
}
CALLED __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    return permuted_of_two<std::uint16_t>(a, index, b);
}
CALLED __m512i _mm512_permutex2var_epi32(__m512i a, __m512i index, __m512i b) {
    return permuted_of_two<std::uint32_t>(a, index, b);
}

// Bits.
CALLED __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
    __m512i bits = {};
    for (int entry = 0; entry < 8; ++entry) {
        if ((table >> entry & 1) != 0) bits |= (entry & 4 ? a : ~a) & (entry & 2 ? b : ~b) & (entry & 1 ? c : ~c);
    }
    return bits;
}
EMULATED __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    return _mm512_ternarylogic_epi64(a, b, c, table);
}
CALLED __m512i _mm512_multishift_epi64_epi8(__m512i places, __m512i x) {
    const auto from = lanes<std::uint8_t>(places);
    const auto words = lanes<std::uint64_t>(x);
    return made<__m512i, std::uint8_t>([&](int i) {
        const std::uint64_t word = words.at[i / 8];
        const int place = from.at[i] & 63;
        return static_cast<std::uint8_t>(word >> place | word << (64 - place) % 64);
    });
}

// Masks.
CALLED __m512i _mm512_mask_blend_epi8(__mmask64 mask, __m512i outside, __m512i inside) {
    return chosen<std::uint8_t>(mask, inside, outside);
}
CALLED __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i outside, __m512i inside) {
    return chosen<std::uint16_t>(mask, inside, outside);
}
CALLED __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i outside, __m512i inside) {
    return chosen<std::uint32_t>(mask, inside, outside);
}
CALLED __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 outside, __m512 inside) {
    return chosen<std::uint32_t>(mask, inside, outside);
}
EMULATED __m512i _mm512_maskz_mov_epi32(__mmask16 mask, __m512i x) {
    return _mm512_mask_blend_epi32(mask, _mm512_setzero_si512(), x);
}
EMULATED __m512 _mm512_mask_sub_ps(__m512 outside, __mmask16 mask, __m512 a, __m512 b) {
    return _mm512_mask_blend_ps(mask, outside, _mm512_sub_ps(a, b));
}
EMULATED __m512 _mm512_maskz_div_ps(__mmask16 mask, __m512 a, __m512 b) {
    return _mm512_mask_blend_ps(mask, _mm512_setzero_ps(), _mm512_div_ps(a, b));
}
EMULATED __m512i _mm512_maskz_multishift_epi64_epi8(__mmask64 mask, __m512i places, __m512i x) {
    return _mm512_mask_blend_epi8(mask, _mm512_setzero_si512(),
                                          _mm512_multishift_epi64_epi8(places, x));
}
CALLED __mmask64 _mm512_movepi8_mask(__m512i x) {
    const auto bytes = lanes<signed char>(x);
    return mask_of<__mmask64>([&](int i) { return bytes.at[i] < 0; });
}
EMULATED __m512i _mm512_movm_epi8(__mmask64 mask) {
    return _mm512_mask_blend_epi8(mask, _mm512_setzero_si512(), _mm512_set1_epi8(-1));
}
CALLED __mmask32 _mm512_cmpeq_epi16_mask(__m512i a, __m512i b) {
    const auto x = lanes<short>(a), y = lanes<short>(b);
    return mask_of<__mmask32>([&](int i) { return x.at[i] == y.at[i]; });
}
CALLED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    const auto x = lanes<float>(a), y = lanes<float>(b);
    return mask_of<__mmask16>(
        [&](int i) { return compares(x.at[i], y.at[i], predicate); });
}

// Powers of two and parts of numbers.
CALLED __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
    const auto x = lanes<float>(a), power = lanes<float>(b);
    return made<__m512, float>([&](int i) {
        return has(mask, i) ? scaled(x.at[i], power.at[i]) : 0.0f;
    });
}
CALLED __m512 _mm512_reduce_ps(__m512 a, int how) {
    need(how == 9, "a rounding that is not emulated");  // of whole numbers, downwards
    const auto x = lanes<float>(a);
    return made<__m512, float>([&](int i) { return less_floor(x.at[i]); });
}
CALLED int _mm512_reduce_max_epi32(__m512i a) {
    const auto x = lanes<int>(a);
    int most = x.at[0];
    for (const int each : x.at) most = most < each ? each : most;
    return most;
}

// VNNI: sums wrap around.
EMULATED __m512i _mm512_dpwssd_epi32(__m512i sums, __m512i a, __m512i b) {
    return _mm512_add_epi32(sums, joined(_mm256_madd_epi16(half(a, 0), half(b, 0)),
                                         _mm256_madd_epi16(half(a, 1), half(b, 1))));
}
CALLED __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {  // a's bytes have no sign
    for (const bool odd : {false, true}) {
        const auto words_of = [&](int which) {
            const __m256i x = half(a, which), y = odd ? half(b, which) : _mm256_slli_epi16(half(b, which), 8);
            const __m256i bytes = odd ? _mm256_srli_epi16(x, 8) : _mm256_and_si256(x, _mm256_set1_epi16(0xFF));
            return _mm256_madd_epi16(bytes, _mm256_srai_epi16(y, 8));
        };
        sums = _mm512_add_epi32(sums, joined(words_of(0), words_of(1)));
    }
    return sums;
}
#undef _mm_dpwssd_epi32
EMULATED __m128i _mm_dpwssd_epi32(__m128i sum, __m128i a, __m128i b) {
    return _mm_add_epi32(sum, _mm_madd_epi16(a, b));
}

// BF16: the upper one of each pair is added first, each sum is rounded, and subnormal numbers are zeros.
CALLED __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
    const __m512i pairs = reinterpret_cast<__m512i>(a), others = reinterpret_cast<__m512i>(b);
    const auto sum_of = [&](int which) {
        const __m256i x = half(pairs, which), y = half(others, which), upper = _mm256_set1_epi32(-65536);
        const __m256 first = flushed(_mm256_fmadd_ps(flushed(_mm256_castsi256_ps(_mm256_and_si256(x, upper))),
                                                     flushed(_mm256_castsi256_ps(_mm256_and_si256(y, upper))),
                                                     flushed(half(sums, which))));
        return flushed(_mm256_fmadd_ps(flushed(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))),
                                       flushed(_mm256_castsi256_ps(_mm256_slli_epi32(y, 16))), first));
    };
    return joined(sum_of(0), sum_of(1));
}
CALLED __m256bh _mm512_cvtneps_pbh(__m512 a) {
    const auto x = lanes<float>(a);
    return made<__m256bh, std::uint16_t>([&](int i) { return narrowed(x.at[i]); });
}
CALLED __m512bh _mm512_cvtne2ps_pbh(__m512 upper, __m512 lower) {
    const auto x = lanes<float>(lower), y = lanes<float>(upper);
    return made<__m512bh, std::uint16_t>(
        [&](int i) { return narrowed(i < 16 ? x.at[i] : y.at[i - 16]); });
}

}  // namespace functions
}  // namespace emulated_avx512

using namespace emulated_avx512::functions;

}  // namespace lowbit
