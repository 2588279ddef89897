// Tiles of vectors of 2 or 4 columns (HIGGS) as operands; see linear_vectors.h for how they lie.
//
// AVX-512 looks the numbers' bytes up in registers, 64 vectors at once: a table of 256 bytes is four of them. AVX2 loads
// vector by vector into the places of a register, which takes half of what gathers do on Zen 4.
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

// Indices of eight vectors, taken two by two out of a register: with a load for each, loads are what is waited for.
template <int LENGTH>
class EightVectors {
    using Vector = std::conditional_t<LENGTH == 2, std::int32_t, std::int64_t>;

  public:
    EightVectors(const std::uint8_t* indices, const std::int16_t* table) : table_(reinterpret_cast<const Vector*>(table)) {
        std::memcpy(&left_, indices, sizeof left_);
    }
    // What the next 8 / LENGTH hold.
    INLINE __m128i next() {
        const auto [first, second] = next_two();
        if constexpr (LENGTH == 4) {
            const __m128i one = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(first));
            return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(one), reinterpret_cast<const __m64*>(second)));
        } else {
            const auto [third, fourth] = next_two();
            const __m128i two = _mm_insert_epi32(_mm_cvtsi32_si128(pair_at(first)), pair_at(second), 1);
            return _mm_insert_epi32(_mm_insert_epi32(two, pair_at(third), 2), pair_at(fourth), 3);
        }
    }

  private:
    INLINE std::pair<const Vector*, const Vector*> next_two() {
        const auto low = static_cast<std::uint32_t>(left_);
        left_ >>= 16;
        return {table_ + (low & 255), table_ + (low >> 8 & 255)};
    }
    static INLINE std::int32_t pair_at(const Vector* from) {
        std::int32_t pair;
        std::memcpy(&pair, from, sizeof pair);
        return pair;
    }

    const Vector* const table_;
    std::uint64_t left_;
};

// each(vector, half, words) for each vector of a row and eight rows: the pair of each row; of vectors of 4 columns both
// pairs of rows 0, 1, 4 and 5, then of 2, 3, 6 and 7. Vectors and halves are constants.
template <int LENGTH, class Each>
INLINE void each_short(const std::uint8_t* tile, const std::int16_t* table, const Each& each) {
    each_constant<COLUMNS / LENGTH>([&](auto number) __attribute__((always_inline)) {
        constexpr int VECTOR = decltype(number)::value / 2 * 2, HALF = decltype(number)::value % 2;
        const std::uint8_t* const indices = tile + VECTOR / VECTORS_TOGETHER * VECTORS_TOGETHER * ROWS;
        EightVectors<LENGTH> first(indices + short_place(HALF * 8, VECTOR % VECTORS_TOGETHER), table);
        EightVectors<LENGTH> second(indices + short_place(HALF * 8 + 4, VECTOR % VECTORS_TOGETHER), table);
        each_constant<2>([&](auto which) __attribute__((always_inline)) {
            __m256i words[LENGTH / 2];
            UNROLL
            for (__m256i& both : words) {
                const __m128i low = first.next(), high = second.next();
                both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            }
            each(std::integral_constant<int, VECTOR + decltype(which)::value>{}, std::integral_constant<int, HALF>{}, words);
        });
    });
}

template <int LENGTH>
INLINE void decode_short(const std::uint8_t* tile, const std::int16_t* table, WordTile& w) {
    using Words = const __m256i (&)[LENGTH / 2];
    each_short<LENGTH>(tile, table, [&](int vector, int half, Words words) __attribute__((always_inline)) {
        const auto put = [&](int pair, __m256i rows) __attribute__((always_inline)) {
            (half == 0 ? w[pair].low : w[pair].high) = rows;
        };
        if constexpr (LENGTH == 2) {
            put(vector, words[0]);
        } else {
            const __m256 first = _mm256_castsi256_ps(words[0]), second = _mm256_castsi256_ps(words[1]);
            put(vector * 2, _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88)));
            put(vector * 2 + 1, _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xDD)));
        }
    });
}

// One token times a tile, from register to register. Both pairs of vectors of 4 columns have sums of their own.
template <int LENGTH>
INLINE SixteenInts dot_short_once(const std::uint8_t* tile, const std::int16_t* table, const std::int16_t* x) {
    __m256i sums[2][LENGTH / 2];
    UNROLL
    for (int i = 0; i < LENGTH / 2; ++i) sums[0][i] = sums[1][i] = _mm256_setzero_si256();
    using Words = const __m256i (&)[LENGTH / 2];
    each_short<LENGTH>(tile, table, [&](int vector, int half, Words words) __attribute__((always_inline)) {
        std::int64_t columns = 0;
        std::memcpy(&columns, x + vector * LENGTH, LENGTH * sizeof *x);
        const auto pair = static_cast<std::int32_t>(columns);
        const __m256i all = LENGTH == 2 ? _mm256_set1_epi32(pair) : _mm256_set1_epi64x(columns);
        UNROLL
        for (int i = 0; i < LENGTH / 2; ++i) add_words(sums[half][i], words[i], all);
    });
    if constexpr (LENGTH == 2) return {sums[0][0], sums[1][0]};
    else return {_mm256_hadd_epi32(sums[0][0], sums[0][1]), _mm256_hadd_epi32(sums[1][0], sums[1][1])};
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

#if defined(LOWBIT_AVX512) || !defined(__AVX2__)

template <int LENGTH>
INLINE SixteenInts dot_short_once(const std::uint8_t* tile, const std::int16_t* table, const std::int16_t* x) {
    WordTile w;
    decode_short<LENGTH>(tile, table, w);
    return dot_tile(w, x);
}

#endif

}  // namespace lowbit
