// Products of whole numbers: codes of a weight as unsigned bytes, inputs as signed ones, sums in 32 bits.
//
// A code's value is (byte + base) * factor: integer formats as they are, 4-bit tables of whole numbers (mxfp4,
// iq4_nl) after a lookup. base * sum(x) starts every sum, so the sums are exact on every instruction set, in any
// order; only what follows in float32 has an order, the one of linear_tiles.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "linear_layout.h"

namespace lowbit {

constexpr int LARGEST_INPUT = 127;
constexpr std::int64_t LARGEST_GROUP = 1 << 15;  // columns whose sum of products stays below 2^31

// How the codes of a weight become bytes.
struct ByteCodes {
    alignas(64) std::uint8_t table[64];  // 16 bytes four times, where codes are looked up
    bool possible = false, looked_up = false;
    int base = 0;
    float factor = 1.0f;

    explicit ByteCodes(const lowbit_weight& weight) {
        const auto codes = static_cast<Codes>(weight.codes);
        if (codes == Codes::int8 || codes == Codes::uint8) {
            possible = true;
            base = codes == Codes::int8 ? -128 : 0;
        } else if (codes >= Codes::bits1 && codes <= Codes::bits7) {
            read(weight.table, codes == Codes::bits7 ? 1 : 1 << static_cast<int>(codes));
        }
    }

  private:
    void read(const std::uint16_t* values, int count) {
        const float first = bfloat_to_float(values[0]);
        bool line = first == std::floor(first) && std::fabs(first) <= 256.0f;
        for (int i = 1; i < count; ++i) line = line && bfloat_to_float(values[i]) == first + static_cast<float>(i);
        if (line) {
            possible = true;
            base = static_cast<int>(first);
            return;
        }
        if (count != 16) return;
        for (const float times : {1.0f, 2.0f}) {
            float low = 0.0f, high = 0.0f;
            bool whole = true;
            for (int i = 0; i < count; ++i) {
                const float value = bfloat_to_float(values[i]) * times;
                whole = whole && value == std::floor(value);
                low = std::min(low, value);
                high = std::max(high, value);
            }
            if (!whole || !(high - low <= 255.0f)) continue;
            for (int i = 0; i < 64; ++i) {
                table[i] = static_cast<std::uint8_t>(bfloat_to_float(values[i % 16]) * times - low);
            }
            base = static_cast<int>(low);
            factor = 1.0f / times;
            possible = looked_up = true;
            return;
        }
    }
};

#if defined(LOWBIT_AVX512)

using ByteTile = __m512i[OPERANDS];
using SixteenInts = __m512i;

inline SixteenInts ints_load(const std::int32_t* from) { return _mm512_loadu_si512(from); }
inline void ints_store(std::int32_t* to, SixteenInts x) { _mm512_storeu_si512(to, x); }
inline SixteenInts ints_set(std::int32_t x) { return _mm512_set1_epi32(x); }
inline SixteenInts ints_add(SixteenInts a, SixteenInts b) { return _mm512_add_epi32(a, b); }
inline Sixteen ints_to_floats(SixteenInts x) { return _mm512_cvtepi32_ps(x); }

template <Codes CODES, bool LOOKED_UP>
inline void decode_bytes(const std::uint8_t* tile, const ByteCodes& codes, ByteTile& w) {
    if constexpr (is_byte(CODES)) {
        // [first.even, second.even, first.odd, second.odd] of four rows a lane
        const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
        UNROLL
        for (int operand = 0; operand < OPERANDS; ++operand) {
            w[operand] = _mm512_shuffle_epi8(_mm512_loadu_si512(tile + operand * 64), order);
        }
        return;
    }
    UNROLL
    for (int operand = 0; operand < OPERANDS; ++operand) {
        __m512i code = _mm512_setzero_si512();
        for (int i = 0; i < plane_count(CODES); ++i) {
            const Plane p = plane(CODES, i);
            const Field f = field(p, 0, pair_of(operand, 0) * 2);
            const __m512i words = _mm512_loadu_si512(tile + f.byte);
            const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << p.width) - 1) << p.shift));
            const __m512i placed = f.shift >= p.shift ? _mm512_srli_epi16(words, static_cast<unsigned>(f.shift - p.shift))
                                                      : _mm512_slli_epi16(words, static_cast<unsigned>(p.shift - f.shift));
            code = i == 0 ? _mm512_and_si512(placed, mask) : _mm512_ternarylogic_epi32(mask, placed, code, 0xEA);
        }
        if constexpr (LOOKED_UP) code = _mm512_shuffle_epi8(_mm512_load_si512(codes.table), code);
        w[operand] = code;
    }
}

// sums[t] += bytes of operands [FIRST, FIRST + COUNT) times those of token t, ``stride`` bytes a token.
template <Codes CODES, bool LOOKED_UP, int FIRST, int COUNT, int TOKENS>
inline void dot_bytes(const ByteTile& w, const std::int8_t* x, std::int64_t stride, SixteenInts* sums) {
    UNROLL
    for (int operand = FIRST; operand < FIRST + COUNT; ++operand) {
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            std::int32_t four;
            std::memcpy(&four, x + t * stride + operand * 4, sizeof four);
            sums[t] = _mm512_dpbusd_epi32(sums[t], w[operand], _mm512_set1_epi32(four));
        }
    }
}

#elif defined(__AVX2__)

struct SixteenInts {
    __m256i low, high;
};
using ByteTile = SixteenInts[OPERANDS];

inline SixteenInts ints_load(const std::int32_t* from) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 8))};
}
inline void ints_store(std::int32_t* to, SixteenInts x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), x.high);
}
inline SixteenInts ints_set(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline SixteenInts ints_add(SixteenInts a, SixteenInts b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline Sixteen ints_to_floats(SixteenInts x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

template <Codes CODES, bool LOOKED_UP>
inline void decode_bytes(const std::uint8_t* tile, const ByteCodes& codes, ByteTile& w) {
    each_constant<OPERANDS>([&](auto index) __attribute__((always_inline)) {
        constexpr int OPERAND = decltype(index)::value;
        const auto half = [&](int at) __attribute__((always_inline)) {
            const __m256i code = operand_codes<CODES, OPERAND>(tile, at);
            if constexpr (!LOOKED_UP) return code;
            return _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(codes.table)), code);
        };
        w[OPERAND] = {half(0), half(32)};
    });
}

// Operands whose 16-bit sums of two products each cannot saturate; looked-up codes have up to 8 bits.
template <Codes CODES, bool LOOKED_UP>
constexpr int together() {
    if (LOOKED_UP || is_byte(CODES) || CODES == Codes::bits7) return 1;
    return CODES == Codes::bits6 ? 2 : CODES == Codes::bits5 ? 4 : 8;
}

INLINE __m256i four_bytes(const std::int8_t* from) {
    std::int32_t four;
    std::memcpy(&four, from, sizeof four);
    return _mm256_set1_epi32(four);
}

template <Codes CODES, bool LOOKED_UP, int FIRST, int COUNT, int TOKENS>
inline void dot_bytes(const ByteTile& w, const std::int8_t* x, std::int64_t stride, SixteenInts* sums) {
    constexpr int TOGETHER = std::min(together<CODES, LOOKED_UP>(), COUNT);
    // Bytes of 8 bits would saturate: as signed numbers their size meets x with their sign. The base is 128 higher.
    constexpr bool SIGNED = LOOKED_UP || is_byte(CODES);
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (TOGETHER == 1) {
        UNROLL
        for (int operand = FIRST; operand < FIRST + COUNT; ++operand) {
            SixteenInts sign = w[operand], size = sign;
            if constexpr (SIGNED) {
                const __m256i top = _mm256_set1_epi8(-128);
                sign = {_mm256_xor_si256(sign.low, top), _mm256_xor_si256(sign.high, top)};
                size = {_mm256_abs_epi8(sign.low), _mm256_abs_epi8(sign.high)};
            }
            UNROLL
            for (int t = 0; t < TOKENS; ++t) {
                const __m256i four = four_bytes(x + t * stride + operand * 4);
                const auto add = [&](__m256i sum, __m256i of_size, __m256i of_sign) __attribute__((always_inline)) {
                    const __m256i two = _mm256_maddubs_epi16(of_size, SIGNED ? _mm256_sign_epi8(four, of_sign) : four);
                    return _mm256_add_epi32(sum, _mm256_madd_epi16(two, ones));
                };
                sums[t] = {add(sums[t].low, size.low, sign.low), add(sums[t].high, size.high, sign.high)};
                KEEP_IN_REGISTER(sums[t].low);  // else many products are made first, and wait for their sums in memory
                KEEP_IN_REGISTER(sums[t].high);
            }
        }
        return;
    }
    constexpr bool ORDERED = TOKENS > 2;  // else many products are made first, and wait for their sums in memory
    UNROLL
    for (int first = FIRST; first < FIRST + COUNT; first += TOGETHER) {
        SixteenInts short_sums[TOKENS];  // of 16 bits
        UNROLL
        for (int operand = first; operand < first + TOGETHER; ++operand) {
            SixteenInts bytes = w[operand];
            if constexpr (ORDERED) {
                KEEP_IN_REGISTER(bytes.low);
                KEEP_IN_REGISTER(bytes.high);
            }
            UNROLL
            for (int t = 0; t < TOKENS; ++t) {
                const __m256i four = four_bytes(x + t * stride + operand * 4);
                const __m256i low = _mm256_maddubs_epi16(bytes.low, four), high = _mm256_maddubs_epi16(bytes.high, four);
                SixteenInts& sum = short_sums[t];
                sum = operand == first ? SixteenInts{low, high}
                                       : SixteenInts{_mm256_add_epi16(sum.low, low), _mm256_add_epi16(sum.high, high)};
                if constexpr (ORDERED) {
                    KEEP_IN_REGISTER(sum.low);
                    KEEP_IN_REGISTER(sum.high);
                }
            }
        }
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            sums[t].low = _mm256_add_epi32(sums[t].low, _mm256_madd_epi16(short_sums[t].low, ones));
            sums[t].high = _mm256_add_epi32(sums[t].high, _mm256_madd_epi16(short_sums[t].high, ones));
        }
    }
}

#endif

// What is added to the base where bytes are multiplied as signed numbers, and whether an input then takes the sign
// of the weight's byte, which -128 cannot.
#if defined(__AVX2__)
constexpr bool MOVES_SIGNS = true;
#else
constexpr bool MOVES_SIGNS = false;
#endif
inline int byte_base_shift(Codes codes, const ByteCodes& bytes) {
#if defined(LOWBIT_AVX512)
    (void)codes, (void)bytes;
    return 0;
#else
    return bytes.looked_up || is_byte(codes) ? 128 : 0;
#endif
}

}  // namespace lowbit

#if defined(__ARM_NEON)
#include "linear_bytes_neon.h"
#endif
