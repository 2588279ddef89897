// Tiles of vectors of 2 or 4 columns (HIGGS) as operands; see linear_vectors.h for how they lie.
//
// AVX-512 looks the numbers' bytes up in registers, 64 vectors at once: a table of 256 bytes is four of them. AVX2 gathers.
#pragma once

#include "linear_kernels.h"
#include "linear_vectors.h"

namespace lowbit {

constexpr int SHORT_VECTORS = 256;  // of a codebook

#if defined(LOWBIT_AVX512)

template <int LENGTH>
INLINE void decode_short(const std::uint8_t* tile, const std::int16_t* table, WordTile& w) {
    const auto* const planes = reinterpret_cast<const std::uint8_t*>(table + SHORT_VECTORS * LENGTH);
    each_constant<COLUMNS / LENGTH / VECTORS_TOGETHER>([&](auto number) __attribute__((always_inline)) {
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
            UNROLL
            for (int half = 0; half < 2; ++half) {
                const int vector = FOUR * VECTORS_TOGETHER + half * 2;
                w[vector * LENGTH / 2 + pair] = _mm512_unpacklo_epi16(low[half], high[half]);
                w[(vector + 1) * LENGTH / 2 + pair] = _mm512_unpackhi_epi16(low[half], high[half]);
            }
        }
    });
}

#elif defined(__AVX2__)

template <int LENGTH>
INLINE void decode_short(const std::uint8_t* tile, const std::int16_t* table, WordTile& w) {
    const auto* const pairs = reinterpret_cast<const int*>(table);
    for (int vector = 0; vector < COLUMNS / LENGTH; ++vector) {
        const auto four_rows = [&](int row) {
            std::int32_t indices;
            std::memcpy(&indices, tile + vector / VECTORS_TOGETHER * VECTORS_TOGETHER * ROWS +
                                      short_place(row, vector % VECTORS_TOGETHER), sizeof indices);
            return indices;
        };
        const __m128i index = _mm_setr_epi32(four_rows(0), four_rows(4), four_rows(8), four_rows(12));
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
        const std::uint8_t* const indices = tile + vector / VECTORS_TOGETHER * VECTORS_TOGETHER * ROWS;
        for (int row = 0; row < ROWS; ++row) {
            const std::int16_t* const numbers = table + indices[short_place(row, vector % VECTORS_TOGETHER)] * LENGTH;
            for (int i = 0; i < LENGTH; ++i) w.columns[vector * LENGTH + i][row] = numbers[i];
        }
    }
}

#endif

}  // namespace lowbit
