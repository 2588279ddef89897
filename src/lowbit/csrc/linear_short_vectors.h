// Tiles of vectors of 2 or 4 columns (HIGGS) as operands; see linear_vectors.h for how they lie.
//
// AVX-512 looks the numbers' bytes up in registers, 64 vectors at once: a table of 256 bytes is four of them. AVX2 gathers.
#pragma once

#include "linear_kernels.h"

namespace lowbit {

constexpr int SHORT_VECTORS = 256;  // of a codebook

#if defined(LOWBIT_AVX512)

// Four vectors of 16 rows, lane after lane: rows j, 4 + j, 8 + j, 12 + j in register j -> each vector's rows in order.
INLINE void vectors_in_rows(const __m512i (&from)[4], __m512i (&to)[4]) {
    const __m512i a = _mm512_unpacklo_epi32(from[0], from[1]), b = _mm512_unpackhi_epi32(from[0], from[1]);
    const __m512i c = _mm512_unpacklo_epi32(from[2], from[3]), d = _mm512_unpackhi_epi32(from[2], from[3]);
    const __m512i first = _mm512_unpacklo_epi64(a, c), second = _mm512_unpackhi_epi64(a, c);  // rows 0 on, 4 on
    const __m512i third = _mm512_unpacklo_epi64(b, d), fourth = _mm512_unpackhi_epi64(b, d);
    const __m512i low[2] = {_mm512_shuffle_i64x2(first, second, 0x44), _mm512_shuffle_i64x2(first, second, 0xEE)};
    const __m512i high[2] = {_mm512_shuffle_i64x2(third, fourth, 0x44), _mm512_shuffle_i64x2(third, fourth, 0xEE)};
    UNROLL
    for (int half = 0; half < 2; ++half) {
        to[half * 2] = _mm512_shuffle_i64x2(low[half], high[half], 0x88);
        to[half * 2 + 1] = _mm512_shuffle_i64x2(low[half], high[half], 0xDD);
    }
}

template <int LENGTH>
INLINE void decode_short(const std::uint8_t* tile, const std::int16_t* table, WordTile& w) {
    const auto* const planes = reinterpret_cast<const std::uint8_t*>(table + SHORT_VECTORS * LENGTH);
    each_constant<COLUMNS / LENGTH / 4>([&](auto number) __attribute__((always_inline)) {
        constexpr int FOUR = decltype(number)::value;
        const __m512i index = _mm512_loadu_si512(tile + FOUR * 64);
        const __mmask64 upper = _mm512_movepi8_mask(index);
        UNROLL
        for (int pair = 0; pair < LENGTH / 2; ++pair) {
            __m512i bytes[4];
            UNROLL
            for (int i = 0; i < 4; ++i) {
                const std::uint8_t* const plane = planes + (pair * 4 + i) * SHORT_VECTORS;
                bytes[i] = _mm512_mask_blend_epi8(
                    upper, _mm512_permutex2var_epi8(_mm512_loadu_si512(plane), index, _mm512_loadu_si512(plane + 64)),
                    _mm512_permutex2var_epi8(_mm512_loadu_si512(plane + 128), index, _mm512_loadu_si512(plane + 192)));
            }
            const __m512i low[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1])};
            const __m512i high[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3])};
            __m512i places[4], rows[4];
            UNROLL
            for (int half = 0; half < 2; ++half) {
                places[half * 2] = _mm512_unpacklo_epi16(low[half], high[half]);
                places[half * 2 + 1] = _mm512_unpackhi_epi16(low[half], high[half]);
            }
            vectors_in_rows(places, rows);
            UNROLL
            for (int i = 0; i < 4; ++i) w[((FOUR * 4 + i) * LENGTH) / 2 + pair] = rows[i];
        }
    });
}

#elif defined(__AVX2__)

template <int LENGTH>
INLINE void decode_short(const std::uint8_t* tile, const std::int16_t* table, WordTile& w) {
    const __m128i in_rows = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const auto* const pairs = reinterpret_cast<const int*>(table);
    for (int vector = 0; vector < COLUMNS / LENGTH; ++vector) {
        const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + vector * ROWS));
        const __m128i index = _mm_shuffle_epi8(stored, in_rows);
        const __m256i low = _mm256_slli_epi32(_mm256_cvtepu8_epi32(index), LENGTH / 4);
        const __m256i high = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(index, 8)), LENGTH / 4);
        UNROLL
        for (int pair = 0; pair < LENGTH / 2; ++pair) {
            w[vector * LENGTH / 2 + pair].low = _mm256_i32gather_epi32(pairs + pair, low, 4);
            w[vector * LENGTH / 2 + pair].high = _mm256_i32gather_epi32(pairs + pair, high, 4);
        }
    }
}

#else

template <int LENGTH>
INLINE void decode_short(const std::uint8_t* tile, const std::int16_t* table, WordTile& w) {
    for (int vector = 0; vector < COLUMNS / LENGTH; ++vector) {
        for (int place = 0; place < ROWS; ++place) {
            const std::int16_t* const numbers = table + tile[vector * ROWS + place] * LENGTH;
            for (int i = 0; i < LENGTH; ++i) w.columns[vector * LENGTH + i][place % 4 * 4 + place / 4] = numbers[i];
        }
    }
}

#endif

}  // namespace lowbit
