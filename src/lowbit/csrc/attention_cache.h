// The pages of one layer's KV cache: how numbers lie in them, and their widening to what is multiplied.
//
// A page holds 16 tokens of one K/V head. What the inner loops (attention_tiles.h) multiply are operands:
//
//   Bfloat  K [k_dim / 2][16 tokens][2]   V [8 token pairs][v_dim][2]
//   float   K [k_dim][16 tokens]          V [16 tokens][v_dim]
//
// bfloat16 and float32 pages are operands as they lie. All others are widened, a page of a segment at a time,
// into a buffer that stays in the core's own cache; they lie as float's, a number in
//
//   F16          2 bytes; widened to float, exactly
//   E4M3 … INT8  1 byte; widened to Bfloat
//   INT4         half a byte: K [k_dim / 2][16 tokens], a pair of dimensions a byte, the even one below;
//                V [16 tokens][v_dim / 16][8], dimensions d and d + 8 a byte. A token owns its bytes: threads
//                that write neighbours never meet.
//
// With group > 0 every `group` dimensions of a token share a scale, found when the token is written from
// these numbers alone. Scales are bfloat16 and follow the codes of the page: [groups][16 tokens], of INT4
// [groups][scale, low][16 tokens]. A number is code * scale (+ low), rounded to bfloat16: the same on every
// instruction set and in attention_reference.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector16.h"

extern "C" {
// One layer's pages. window: 0 for no limit. k_format, v_format: lowbit::Format. k_group, v_group: see above.
// latent: 1 where a value is the first v_dim numbers of its key; v is then null.
struct lowbit_attention_cache {
    void* k;
    void* v;
    std::int64_t pages;
    std::int32_t heads, k_dim, v_dim, window, k_format, v_format, k_group, v_group, latent;
};
}

namespace lowbit {

constexpr int PAGE_TOKENS = 16;
constexpr int MAX_K_DIM = 576, MAX_V_DIM = 512;  // a latent and its rotary part (DeepSeek-V2)

using Bfloat = std::uint16_t;

enum class Format : std::int32_t { F32 = 0, BF16 = 1, F16 = 2, E4M3 = 3, E5M2 = 4, INT8 = 5, INT4 = 6 };
enum Status { OK = 0, BAD_LENGTHS = 1, BAD_PAGE = 2, BAD_SLOT = 3, NO_MEMORY = 4 };

// K's or V's half of a layer's cache.
struct Store {
    std::uint8_t* bytes;
    Format format;
    int heads, dim, group;

    int bits() const {
        switch (format) {
            case Format::F32: return 32;
            case Format::BF16:
            case Format::F16: return 16;
            case Format::INT4: return 4;
            default: return 8;
        }
    }
    bool widened() const { return format != Format::F32 && format != Format::BF16; }
    bool multiplied_as_float() const { return format == Format::F32 || format == Format::F16; }
    int parameters() const { return format == Format::INT4 ? 2 : 1; }  // rows of 16 a group has
    int groups() const { return group > 0 ? (dim + group - 1) / group : 0; }
    std::size_t code_bytes() const { return static_cast<std::size_t>(dim * PAGE_TOKENS / 8 * bits()); }
    std::size_t head_bytes() const {  // of one head's page
        const int scales = groups() * parameters() * PAGE_TOKENS;
        return code_bytes() + sizeof(Bfloat) * static_cast<std::size_t>(scales);
    }
    std::uint8_t* page(std::int64_t number, int head) const {
        return bytes + static_cast<std::size_t>(number * heads + head) * head_bytes();
    }
    Bfloat* scales(std::uint8_t* page) const { return reinterpret_cast<Bfloat*>(page + code_bytes()); }
    const Bfloat* scales(const std::uint8_t* page) const {
        return reinterpret_cast<const Bfloat*>(page + code_bytes());
    }
};

inline Store key_store(const lowbit_attention_cache& cache) {
    return {static_cast<std::uint8_t*>(cache.k), static_cast<Format>(cache.k_format), cache.heads,
            cache.k_dim, cache.k_group};
}
inline Store value_store(const lowbit_attention_cache& cache) {
    return {static_cast<std::uint8_t*>(cache.v), static_cast<Format>(cache.v_format), cache.heads,
            cache.v_dim, cache.v_group};
}

// Sixteen bytes as floats.
#if defined(__AVX512F__)
inline Vector16 from_halves(__m256i halves) { return {_mm512_cvtph_ps(halves)}; }
inline Vector16 from_unsigned(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))}; }
inline Vector16 from_signed(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }
// 32-bit words of the even (lower half) and odd numbers, rounded to bfloat16: to nearest, ties to even;
// subnormal numbers become 0, which vdpbf16ps takes them for.
inline void store_bfloats(Bfloat* to, Vector16 even, Vector16 odd) {
    const __m512i turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                          23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const auto rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.lanes, even.lanes));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(turn, rounded));
}
#elif defined(__AVX2__)
inline Vector16 from_halves(__m256i halves) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
inline Vector16 from_unsigned(__m128i bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Vector16 from_signed(__m128i bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
// 32-bit words of the even (lower half) and odd numbers, rounded to bfloat16: to nearest, ties to even.
inline void store_bfloats(Bfloat* to, Vector16 even, Vector16 odd) {
    const auto rounded = [](__m256 x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        return _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    };
    const auto words = [&](__m256 lower, __m256 upper) {
        return _mm256_blend_epi16(_mm256_srli_epi32(rounded(lower), 16), rounded(upper), 0xaa);
    };
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words(even.low, odd.low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), words(even.high, odd.high));
}
#endif
#if defined(__AVX2__)
using Bytes = __m128i;  // sixteen
inline Bytes load_bytes(const std::uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const Bytes*>(from)); }
// The lower four bits of every byte, the upper ones.
inline Bytes low_digits(Bytes bytes) { return _mm_and_si128(bytes, _mm_set1_epi8(15)); }
inline Bytes high_digits(Bytes bytes) { return _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15)); }
// The lower four bits of eight bytes, then the upper ones.
inline Bytes load_digits(const std::uint8_t* from) {
    const Bytes codes = _mm_loadl_epi64(reinterpret_cast<const Bytes*>(from));
    return low_digits(_mm_unpacklo_epi64(codes, _mm_srli_epi16(codes, 4)));
}
inline Vector16 load_halves(const std::uint8_t* from) {
    return from_halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// An fp8 code becomes the float16 of the same digits, e4m3's 2^-8 times too small: subnormal numbers come right
// by themselves.
inline Vector16 from_e5m2(Bytes codes) { return from_halves(_mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8)); }
inline Vector16 from_e4m3(Bytes codes) {
    const __m256i seven_bits = _mm256_set1_epi16(0x7f);
    const __m256i words = _mm256_cvtepu8_epi16(codes), digits = _mm256_and_si256(words, seven_bits);
    const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(seven_bits, words), 8);
    const __m256i no_number = _mm256_and_si256(_mm256_cmpeq_epi16(digits, seven_bits), _mm256_set1_epi16(0x7c00));
    const __m256i halves = _mm256_or_si256(_mm256_or_si256(sign, _mm256_slli_epi16(digits, 7)), no_number);
    return multiply(from_halves(halves), broadcast(256.0f));
}
#endif

}  // namespace lowbit

#if defined(__ARM_NEON)
#include "attention_neon.h"
#endif

namespace lowbit {

inline float from_bfloat(Bfloat number) {
    const std::uint32_t bits = std::uint32_t{number} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Sixteen consecutive codes of a byte each, as the numbers they stand for.
template <Format FORMAT>
inline Vector16 decode_bytes(const std::uint8_t* from) {
    const Bytes codes = load_bytes(from);
    if constexpr (FORMAT == Format::INT8) {
        return from_signed(codes);
    } else if constexpr (FORMAT == Format::E5M2) {
        return from_e5m2(codes);
    } else {
        static_assert(FORMAT == Format::E4M3);
        return from_e4m3(codes);
    }
}

// Two neighbouring dimensions of 16 keys.
template <Format FORMAT>
inline void decode_keys(const std::uint8_t* page, int pair, Vector16& even, Vector16& odd) {
    if constexpr (FORMAT == Format::INT4) {
        const Bytes codes = load_bytes(page + pair * PAGE_TOKENS);
        even = from_unsigned(low_digits(codes));
        odd = from_unsigned(high_digits(codes));
    } else {
        even = decode_bytes<FORMAT>(page + 2 * pair * PAGE_TOKENS);
        odd = decode_bytes<FORMAT>(page + (2 * pair + 1) * PAGE_TOKENS);
    }
}

// Sixteen dimensions of one token's value.
template <Format FORMAT>
inline Vector16 decode_values(const std::uint8_t* page, int v_dim, int token, int dimension) {
    if constexpr (FORMAT == Format::INT4) {
        return from_unsigned(load_digits(page + (token * v_dim + dimension) / 2));
    } else {
        return decode_bytes<FORMAT>(page + token * v_dim + dimension);
    }
}

template <Format FORMAT>
inline Vector16 scaled(Vector16 codes, Vector16 scale, Vector16 low) {
    return FORMAT == Format::INT4 ? fma(codes, scale, low) : multiply(codes, scale);
}

constexpr int CACHE_LINE = 64;

// Inlined early: GCC 12 takes a function that only fetches for one without effect, and drops its calls.
__attribute__((always_inline)) inline void fetch_line(const std::uint8_t* from) {
    __builtin_prefetch(from, 0, 2);
}

__attribute__((always_inline)) inline void fetch_lines(const float* from, int count) {
    constexpr int NUMBERS = CACHE_LINE / static_cast<int>(sizeof(float));
    for (int at = 0; at < count; at += NUMBERS) fetch_line(reinterpret_cast<const std::uint8_t*>(from + at));
}
template <Format FORMAT>
inline void widen_keys(const Store& store, const std::uint8_t* page, Bfloat* to) {
    const Bfloat* const scales = store.scales(page);
    const int row = store.parameters() * PAGE_TOKENS, group = store.group > 0 ? store.group : store.dim;
    for (int begin = 0; begin < store.dim; begin += group) {
        Vector16 scale = broadcast(1.0f), low = zeros();
        if (store.group > 0) {
            const Bfloat* const mine = scales + begin / group * row;
            scale = load_bfloats(mine);
            if (FORMAT == Format::INT4) low = load_bfloats(mine + PAGE_TOKENS);
        }
        const int end = begin + group < store.dim ? begin + group : store.dim;
        for (int pair = begin / 2; pair < end / 2; ++pair) {
            Vector16 even, odd;
            decode_keys<FORMAT>(page, pair, even, odd);
            store_bfloats(to + 2 * PAGE_TOKENS * pair, scaled<FORMAT>(even, scale, low),
                          scaled<FORMAT>(odd, scale, low));
        }
    }
}

template <Format FORMAT>
inline void widen_values(const Store& store, const std::uint8_t* page, Bfloat* to) {
    const Bfloat* const scales = store.scales(page);
    const int row = store.parameters() * PAGE_TOKENS, group = store.group > 0 ? store.group : store.dim;
    for (int pair = 0; pair < PAGE_TOKENS / 2; ++pair) {
        for (int begin = 0; begin < store.dim; begin += group) {
            Vector16 scale[2] = {broadcast(1.0f), broadcast(1.0f)}, low[2] = {zeros(), zeros()};
            if (store.group > 0) {
                const Bfloat* const mine = scales + begin / group * row + 2 * pair;
                for (int which = 0; which < 2; ++which) {
                    scale[which] = broadcast(from_bfloat(mine[which]));
                    if (FORMAT == Format::INT4)
                        low[which] = broadcast(from_bfloat(mine[PAGE_TOKENS + which]));
                }
            }
            const int end = begin + group < store.dim ? begin + group : store.dim;
            for (int dimension = begin; dimension < end; dimension += LANES) {
                const Vector16 even = decode_values<FORMAT>(page, store.dim, 2 * pair, dimension);
                const Vector16 odd = decode_values<FORMAT>(page, store.dim, 2 * pair + 1, dimension);
                store_bfloats(to + 2 * (pair * store.dim + dimension), scaled<FORMAT>(even, scale[0], low[0]),
                              scaled<FORMAT>(odd, scale[1], low[1]));
            }
        }
    }
}

// A page as an operand. Which operand a format has, the caller has asked multiplied_as_float().
template <bool KEYS>
inline void widen(const Store& store, const std::uint8_t* page, Bfloat* to) {
    const auto each = [&](auto keys, auto values) { (KEYS ? keys : values)(store, page, to); };
    switch (store.format) {
        case Format::E4M3: return each(widen_keys<Format::E4M3>, widen_values<Format::E4M3>);
        case Format::E5M2: return each(widen_keys<Format::E5M2>, widen_values<Format::E5M2>);
        case Format::INT8: return each(widen_keys<Format::INT8>, widen_values<Format::INT8>);
        default: return each(widen_keys<Format::INT4>, widen_values<Format::INT4>);
    }
}
template <bool KEYS>
inline void widen(const Store& store, const std::uint8_t* page, float* to) {
    for (int at = 0; at < store.dim * PAGE_TOKENS; at += LANES) {
        lowbit::store(to + at, load_halves(page + 2 * at));
    }
}

}  // namespace lowbit
