// Products of 16-bit whole numbers, for tables that bfloat16 would round (nf4): a table of 13 bits, x of 15 bits with
// a scale for each token and 32 columns. As many products an instruction as of bfloat16, and both are rounded less:
// of a table's largest value and of a group's largest x the last half bit, 2^-13 and 2^-15. Sums of 32 columns are
// exact in 32 bits.
#pragma once

#include "linear_bytes.h"

namespace lowbit {

constexpr int LARGEST_WORD = (1 << 14) - 1;   // of x
constexpr int LARGEST_VALUE = (1 << 12) - 1;  // of a table
static_assert(static_cast<std::int64_t>(LARGEST_WORD) * LARGEST_VALUE * COLUMNS < std::int64_t{1} << 31);

#if defined(__AVX512BF16__)

// One register of 16 rows x 2 columns for each pair of columns.
using WordTile = __m512i[PAIRS];

template <Codes CODES>
inline void decode_words(const std::uint8_t* tile, const Table& table, WordTile& w) {
    decode<CODES>(tile, table, w);
}

// Dot products of columns [FIRST, FIRST + COUNT) with TOKENS tokens, each in an accumulator of its own.
template <int FIRST, int COUNT, int TOKENS>
inline void dot_words(const WordTile& w, const std::int16_t* x, std::int64_t stride, SixteenInts* sums) {
    for (int t = 0; t < TOKENS; ++t) sums[t] = _mm512_setzero_si512();
    UNROLL
    for (int pair = FIRST / 2; pair < (FIRST + COUNT) / 2; ++pair) {
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            std::int32_t two;
            std::memcpy(&two, x + t * stride + pair * 2, sizeof two);
            sums[t] = _mm512_dpwssd_epi32(sums[t], w[pair], _mm512_set1_epi32(two));
        }
    }
}

#elif defined(__AVX2__)

using WordTile = SixteenInts[PAIRS];

template <Codes CODES>
inline void decode_words(const std::uint8_t* tile, const Table& table, WordTile& w) {
    static_assert(CODES == Codes::words4);
    const auto half = [&](int pair, int at) {
        const Field f = field(plane(CODES, 0), 0, pair * 2);
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + f.byte + at));
        const __m256i code = _mm256_and_si256(_mm256_srli_epi16(words, f.shift), _mm256_set1_epi16(15));
        // A byte of an index with its upper bit set gives zero.
        const __m256i low = _mm256_or_si256(code, _mm256_set1_epi16(static_cast<short>(0x8000)));
        const __m256i high = _mm256_or_si256(_mm256_slli_epi16(code, 8), _mm256_set1_epi16(0x80));
        return _mm256_or_si256(_mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table.low)), low),
                               _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table.high)), high));
    };
    for (int pair = 0; pair < PAIRS; ++pair) w[pair] = {half(pair, 0), half(pair, 32)};
}

template <int FIRST, int COUNT, int TOKENS>
inline void dot_words(const WordTile& w, const std::int16_t* x, std::int64_t stride, SixteenInts* sums) {
    for (int t = 0; t < TOKENS; ++t) sums[t] = ints_set(0);
    UNROLL
    for (int pair = FIRST / 2; pair < (FIRST + COUNT) / 2; ++pair) {
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            std::int32_t two;
            std::memcpy(&two, x + t * stride + pair * 2, sizeof two);
            const __m256i both = _mm256_set1_epi32(two);
            sums[t].low = _mm256_add_epi32(sums[t].low, _mm256_madd_epi16(w[pair].low, both));
            sums[t].high = _mm256_add_epi32(sums[t].high, _mm256_madd_epi16(w[pair].high, both));
        }
    }
}

#endif

}  // namespace lowbit

#if defined(__ARM_NEON)
#include "linear_words_neon.h"
#endif
