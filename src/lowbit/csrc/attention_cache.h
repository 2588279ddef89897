// The pages of one layer's KV cache: how numbers lie in them, and their widening to what is multiplied.
//
// A page holds 16 tokens of one K/V head. What the inner loops (attention_tiles.h) multiply are operands:
//
//   Bfloat  K [k_dim / 2][16 tokens][2]   V [8 token pairs][v_dim][2]
//   float   K [k_dim][16 tokens]          V [16 tokens][v_dim]
//
// bfloat16 and float32 pages are operands as they lie. F16 pages lie as float's, 2 bytes a number, and are
// widened, exactly. The narrow formats are codes that bfloat16 holds exactly too:
//
//   E4M3, E5M2   1 byte
//   INT8         1 byte: a sign and 7 bits of magnitude
//   INT4         half a byte: 0 .. 15
//
// They lie in quads of 64, of which a decoder makes two lines of a Bfloat operand (32 numbers: 16 lanes of
// two): of K 4 dimensions of 16 tokens, of V 4 tokens and 16 dimensions, [4][v_dim / 16] quads a page. See
// place_of() for the order in a quad. A token owns its bytes: threads that write neighbours never meet.
//
// With group > 0 every `group` dimensions of a token share a scale, found when the token is written from
// these numbers alone. Scales are bfloat16 and follow the codes of the page: [groups][16 tokens], of INT4
// [groups][scale, low][16 tokens]. A number is code * scale (+ low). What is multiplied are the codes: a
// key's scale meets the sum over its group, a value's the softmax weight.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

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
    bool narrow() const { return bits() < 16; }
    bool widened() const { return narrow() || format == Format::F16; }
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

// Sixteen numbers as floats; bytes are signed.
#if defined(__AVX512F__)
inline Vector16 from_halves(__m256i halves) { return {_mm512_cvtph_ps(halves)}; }
inline Vector16 from_bytes(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }
#elif defined(__AVX2__)
inline Vector16 from_halves(__m256i halves) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
inline Vector16 from_bytes(__m128i bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
#endif
#if defined(__AVX2__)
using Bytes = __m128i;  // sixteen
inline Bytes load_bytes(const std::uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const Bytes*>(from)); }
// The codes of four bits in eight bytes, lower ones first: a byte's two are neighbours, or two bytes' pairs.
template <bool PAIRS>
inline Bytes load_digits(const std::uint8_t* from) {
    const Bytes stored = _mm_loadl_epi64(reinterpret_cast<const Bytes*>(from)), four_bits = _mm_set1_epi8(15);
    const Bytes lower = _mm_and_si128(stored, four_bits), upper = _mm_and_si128(_mm_srli_epi16(stored, 4), four_bits);
    return PAIRS ? _mm_unpacklo_epi16(lower, upper) : _mm_unpacklo_epi8(lower, upper);
}
// A sign, and seven bits of magnitude.
inline Vector16 from_sign_and_size(Bytes codes) {
    const Bytes sign = _mm_cmplt_epi8(codes, _mm_setzero_si128()), size = _mm_and_si128(codes, _mm_set1_epi8(0x7f));
    return from_bytes(_mm_sub_epi8(_mm_xor_si128(size, sign), sign));
}
inline Vector16 load_halves(const std::uint8_t* from) {
    return from_halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#if !defined(__AVX512BF16__)
// The upper halves of eight numbers and of eight more.
inline void store_upper_halves(Bfloat* first, Bfloat* second, Vector16 x) {
#if defined(__AVX512F__)
    const __m256i lines = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x.lanes), 16));
#else
    const __m256i words = _mm256_packus_epi32(_mm256_srli_epi32(_mm256_castps_si256(x.low), 16),
                                              _mm256_srli_epi32(_mm256_castps_si256(x.high), 16));
    const __m256i lines = _mm256_permute4x64_epi64(words, 0xd8);
#endif
    _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128(lines));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm256_extracti128_si256(lines, 1));
}
#endif
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
inline Vector16 decode_bytes(Bytes codes) {
    if constexpr (FORMAT == Format::INT4) {
        return from_bytes(codes);
    } else if constexpr (FORMAT == Format::INT8) {
        return from_sign_and_size(codes);
    } else if constexpr (FORMAT == Format::E5M2) {
        return from_e5m2(codes);
    } else {
        static_assert(FORMAT == Format::E4M3);
        return from_e4m3(codes);
    }
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

// Bytes of a quad, of codes of a byte or of NIBBLES.
template <bool NIBBLES>
constexpr int QUAD_BYTES = NIBBLES ? 32 : 64;

// Where in its quad a code lies, in codes. K: dimension `row` % 4 of token `lane`; V: token `row` % 4,
// dimension `lane` % 16.
template <bool KEYS, bool NIBBLES>
constexpr int place_of(int row, int lane) {
    const int eight = lane / 4 * 2 + row / 2, within = lane % 4;  // eight codes of a line that stay together
    if (!NIBBLES || KEYS) return 8 * eight + 2 * within + row % 2;
    return 8 * eight + within / 2 * 4 + row % 2 * 2 + within % 2;  // a byte is two dimensions of a token
}

#if defined(__AVX512BF16__)
struct Code4 {  // elements of pages that are read as they are stored
    std::uint8_t bits;
};
struct Code8 {
    std::uint8_t bits;
};

// What codes stand for, as bfloat16: low and high bytes apart, those of the lower seven bits of a code.
struct CodeTable {
    alignas(64) std::uint8_t low[128], high[128];
};

template <Format FORMAT>
inline CodeTable made_table() {
    CodeTable made;
    constexpr int PERIOD = FORMAT == Format::INT4 ? 16 : 128;  // beyond four bits is what follows a nibble
    for (int begin = 0; begin < 128; begin += LANES) {
        std::uint8_t codes[LANES];
        float values[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            codes[lane] = static_cast<std::uint8_t>((begin + lane) % PERIOD);
        }
        store(values, decode_bytes<FORMAT>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
        for (int lane = 0; lane < LANES; ++lane) {
            const Bfloat bits = to_bfloat(values[lane]);
            made.low[begin + lane] = static_cast<std::uint8_t>(bits);
            made.high[begin + lane] = static_cast<std::uint8_t>(bits >> 8);
        }
    }
    return made;
}

inline const CodeTable& code_table(Format format) {
    static const CodeTable e4m3 = made_table<Format::E4M3>(), e5m2 = made_table<Format::E5M2>(),
                           int8 = made_table<Format::INT8>(), int4 = made_table<Format::INT4>();
    switch (format) {
        case Format::E4M3: return e4m3;
        case Format::E5M2: return e5m2;
        case Format::INT8: return int8;
        default: return int4;
    }
}

// Two lines of a quad.
template <class Code, bool KEYS>
struct QuadDecoder {
    static constexpr int BYTES = QUAD_BYTES<std::is_same_v<Code, Code4>>;
    __m512i low, low_end, high, high_end;

    explicit QuadDecoder(const CodeTable& table)
        : low(_mm512_load_si512(table.low)),
          low_end(_mm512_load_si512(table.low + 64)),
          high(_mm512_load_si512(table.high)),
          high_end(_mm512_load_si512(table.high + 64)) {}

    __attribute__((always_inline)) void decode(const std::uint8_t* from, __m512i& first,
                                               __m512i& second) const {
        __m512i lower, upper;
        if constexpr (std::is_same_v<Code, Code4>) {
            const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            const __m512i turn = _mm512_set1_epi64(KEYS ? 0x1c1814100c080400 : 0x1c1418100c040800);
            const __m512i codes = _mm512_multishift_epi64_epi8(turn, _mm512_cvtepu32_epi64(stored));
            lower = _mm512_permutexvar_epi8(codes, low);
            upper = _mm512_permutexvar_epi8(codes, high);
        } else {
            __m512i codes = _mm512_loadu_si512(from);
            asm("" : "+" ZMM(codes));  // GCC 12 would load them anew for each use
            const __m512i sign = _mm512_set1_epi8(-128);
            lower = _mm512_permutex2var_epi8(low, codes, low_end);
            upper = _mm512_permutex2var_epi8(high, codes, high_end);
            upper = _mm512_ternarylogic_epi64(upper, codes, sign, 0xf8);  // upper | (codes & sign)
        }
        first = _mm512_unpacklo_epi8(lower, upper);
        second = _mm512_unpackhi_epi8(lower, upper);
    }
};

template <class Code, bool KEYS>
inline void widen_quads(const Store& store, const std::uint8_t* page, Bfloat* to) {
    const QuadDecoder<Code, KEYS> decoder(code_table(store.format));
    const int across = KEYS ? 1 : store.dim / LANES, line = 2 * LANES * across;
    for (int row = 0; row < (KEYS ? store.dim : PAGE_TOKENS); row += 4, to += line) {
        for (int lane = 0; lane < across; ++lane, page += decoder.BYTES, to += 2 * LANES) {
            __m512i first, second;
            decoder.decode(page, first, second);
            _mm512_storeu_si512(to, first);
            _mm512_storeu_si512(to + line, second);
        }
    }
}

// A narrow page as an operand: its codes, without scales.
template <bool KEYS>
inline void widen(const Store& store, const std::uint8_t* page, Bfloat* to) {
    (store.format == Format::INT4 ? widen_quads<Code4, KEYS> : widen_quads<Code8, KEYS>)(store, page, to);
}
#else
template <Format FORMAT, bool KEYS>
inline void widen_quads(const Store& store, const std::uint8_t* page, Bfloat* to) {
    constexpr int BYTES = FORMAT == Format::INT4 ? 8 : 16;  // of sixteen codes, eight of each line
    const int across = KEYS ? 1 : store.dim / LANES, line = 2 * LANES * across;
    for (int row = 0; row < (KEYS ? store.dim : PAGE_TOKENS); row += 4, to += line) {
        for (int eight = 0; eight < 4 * across; ++eight, page += BYTES, to += 8) {
            Bytes codes;
            if constexpr (FORMAT == Format::INT4) {
                codes = load_digits<!KEYS>(page);
            } else {
                codes = load_bytes(page);
            }
            const Vector16 values = decode_bytes<FORMAT>(codes);  // exact in the upper halves
            store_upper_halves(to, to + line, values);
        }
    }
}

// A narrow page as an operand: its codes, without scales.
template <bool KEYS>
inline void widen(const Store& store, const std::uint8_t* page, Bfloat* to) {
    switch (store.format) {
        case Format::E4M3: return widen_quads<Format::E4M3, KEYS>(store, page, to);
        case Format::E5M2: return widen_quads<Format::E5M2, KEYS>(store, page, to);
        case Format::INT8: return widen_quads<Format::INT8, KEYS>(store, page, to);
        default: return widen_quads<Format::INT4, KEYS>(store, page, to);
    }
}
#endif

// A page of F16.
template <bool KEYS>
inline void widen(const Store& store, const std::uint8_t* page, float* to) {
    for (int at = 0; at < store.dim * PAGE_TOKENS; at += LANES) {
        lowbit::store(to + at, load_halves(page + 2 * at));
    }
}

}  // namespace lowbit
