// What paged attention multiplies: queries with a segment's keys (attention_scores.cpp) and what softmax makes of their
// scores (attention_softmax.h) with its values (attention_values.cpp).
//
// Keys and values are operands of bfloat16 or float (attention_cache.h). A line of bfloat16 keys is a pair of
// dimensions of 16 tokens, the operand of vdpbf16ps that yields 16 scores for a broadcast query pair; a line
// of values is 16 dimensions of two tokens. The two may be of different types.
//
// Narrow pages (Code4, Code8) are decoded in registers, a quad just before its two products, where a few rows
// read them; for many rows the caller widens them first. The products and their order are the same.
//
// A latent page has no V: its values are the first v_dim numbers of its keys, which turn_keys() brings into
// V's layout, a strip of dimensions of one segment at a time, just before they are weighed.
//
// Sameness (a token's result must not depend on what is computed with it): keys are cut into segments of
// 16 pages at fixed absolute positions. In a segment every row takes its own maximum, sum and weighted
// values, each a chain over ascending dimensions or tokens that is the same whether the row is computed
// alone or in a block of rows; segments are merged in ascending order. So chunks, threads, batch mates and
// page numbers cannot show. What a row may not see never enters a sum, not even multiplied by zero: unused
// slots may hold NaN.
//
// The AMX library has tiles multiply what elsewhere is vdpbf16ps's (attention_amx.cpp): another order of sums, but one
// for all rows again, and the same functions are called for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention_cache.h"

namespace lowbit {

constexpr int SEGMENT_PAGES = 16;
constexpr int SEGMENT_TOKENS = PAGE_TOKENS * SEGMENT_PAGES;

// Rows and vectors that fill the registers: 32 of 512 bits, 16 of 256 (two a Vector16), or NEON's 32 of 128.
#if defined(__AVX512F__)
constexpr int SCORE_ROWS = 6, VALUE_ROWS = 6, VALUE_VECTORS = 4;
constexpr int pages_at_once(int rows) { return rows == 1 ? 8 : 4; }
constexpr int vectors_at_once(int rows) { return rows <= 3 ? 8 : 4; }
#else
#if defined(__ARM_NEON)
constexpr int SCORE_ROWS = 4, VALUE_ROWS = 2, VALUE_VECTORS = 2;
#else
constexpr int SCORE_ROWS = 4, VALUE_ROWS = 3, VALUE_VECTORS = 2;
#endif
constexpr int pages_at_once(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
constexpr int vectors_at_once(int) { return VALUE_VECTORS; }
#endif
constexpr int STRIP = VALUE_VECTORS * LANES;  // dimensions of a latent segment that are turned at once

// The keys of `width` dimensions of a page (a multiple of 16) in V's layout: no bit changes.
#if defined(__AVX2__)  // NEON: attention_neon.h
inline void turn_keys(const Bfloat* keys, int width, Bfloat* values) {
    // Two tokens' pair of dimensions, [a0 b0 a1 b1], becomes [a0 a1 b0 b1]; such groups are then transposed.
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                           0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    for (int dimension = 0; dimension < width; dimension += 4) {
        for (int pair = 0; pair < PAGE_TOKENS / 2; pair += 4) {
            const auto groups = [&](int line) {
                const Bfloat* from = keys + (dimension + line) * PAGE_TOKENS + 4 * pair;
                return _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), order);
            };
            const __m256i lower = groups(0), upper = groups(2);
            const __m256i even = _mm256_unpacklo_epi64(lower, upper);
            const __m256i odd = _mm256_unpackhi_epi64(lower, upper);
            const auto keep = [&](int which, __m128i four) {
                Bfloat* to = values + 2 * ((pair + which) * width + dimension);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to), four);
            };
            keep(0, _mm256_castsi256_si128(even));
            keep(1, _mm256_castsi256_si128(odd));
            keep(2, _mm256_extracti128_si256(even, 1));
            keep(3, _mm256_extracti128_si256(odd, 1));
        }
    }
}
inline void turn_keys(const float* keys, int width, float* values) {
    for (int dimension = 0; dimension < width; dimension += 4) {
        for (int token = 0; token < PAGE_TOKENS; token += 4) {
            const float* from = keys + dimension * PAGE_TOKENS + token;
            __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + PAGE_TOKENS),
                   c = _mm_loadu_ps(from + 2 * PAGE_TOKENS), d = _mm_loadu_ps(from + 3 * PAGE_TOKENS);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            float* to = values + token * width + dimension;
            _mm_storeu_ps(to, a);
            _mm_storeu_ps(to + width, b);
            _mm_storeu_ps(to + 2 * width, c);
            _mm_storeu_ps(to + 3 * width, d);
        }
    }
}
#endif

// Whether vdpbf16ps multiplies: on AVX-512 beside a bfloat16 cache. Queries and softmax weights are then
// rounded to bfloat16 and lie as pairs in 32-bit words; sums stay float32. Otherwise all is float32.
#if defined(__AVX512BF16__)
template <class Element>
constexpr bool IS_CODE = std::is_same_v<Element, Code4> || std::is_same_v<Element, Code8>;
template <class Element>
constexpr bool BFLOAT_PRODUCTS = IS_CODE<Element> || std::is_same_v<Element, Bfloat>;
#else
template <class Element>
constexpr bool IS_CODE = false;
template <class Element>
constexpr bool BFLOAT_PRODUCTS = false;
#endif

// What pages are read as: elements whose products vectors form, and those of AMX tiles (attention_amx.cpp).
#if defined(LOWBIT_AMX)
#define LOWBIT_ATTENTION_ELEMENTS(each) each(float)
#define LOWBIT_TILED_ELEMENTS(each) each(Bfloat) each(Code4) each(Code8)
#elif defined(__AVX512BF16__)
#define LOWBIT_ATTENTION_ELEMENTS(each) each(float) each(Bfloat) each(Code4) each(Code8)
#else
#define LOWBIT_ATTENTION_ELEMENTS(each) each(float) each(Bfloat)
#endif

#if defined(LOWBIT_AMX)
template <class Element>
constexpr bool TILED = BFLOAT_PRODUCTS<Element>;
constexpr int SUMMED_PAGES = 2;             // pages of values that a product sums: they are not taken apart
constexpr int ROWS_OF_TILE = 16;            // rows are read and written in sixteens, also past a block's end
constexpr int QUERY_LINE = CACHE_LINE / 4;  // words: a row of queries has zeros to the end of its last line
constexpr int PAIRS_LINE = LANES;           // words of 32 tokens' weights: rows that stay in L1
#else
template <class Element>
constexpr bool TILED = false;
constexpr int SUMMED_PAGES = 1, ROWS_OF_TILE = 1, QUERY_LINE = 1;
constexpr int PAIRS_LINE = 2 * LANES;  // in the place of their scores
#endif

template <class Element>
constexpr int query_words(int k_dim) {  // 32-bit words a row
    if (TILED<Element>) return (k_dim / 2 + QUERY_LINE - 1) / QUERY_LINE * QUERY_LINE;
    return BFLOAT_PRODUCTS<Element> ? k_dim / 2 : k_dim;
}

template <class Element>
constexpr int WEIGHTS_ROW = TILED<Element> ? SEGMENT_TOKENS / 2 : SEGMENT_TOKENS;  // words from row to row

template <class Element>
inline void prepare_query(const float* query, int k_dim, float* prepared) {
#if defined(__AVX512BF16__)
    if constexpr (BFLOAT_PRODUCTS<Element>) {  // subnormal numbers become 0, as vdpbf16ps takes them
        for (int dimension = 0; dimension < k_dim; dimension += LANES) {
            const __m256bh rounded = _mm512_cvtneps_pbh(load(query + dimension).lanes);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(prepared + dimension / 2),
                                reinterpret_cast<__m256i>(rounded));
        }
        std::fill(prepared + k_dim / 2, prepared + query_words<Element>(k_dim), 0.0f);
        return;
    }
#endif
    std::copy_n(query, k_dim, prepared);
}

// Sums over groups of dimensions of a prepared query.
template <class Element>
inline void sum_query(const float* prepared, int k_dim, int group, float* sums) {
    for (int begin = 0; begin < k_dim; begin += group) {
        Vector16 sum = zeros();
        for (int dimension = begin; dimension < std::min(begin + group, k_dim); dimension += LANES) {
            if constexpr (BFLOAT_PRODUCTS<Element>) {
                sum = add(sum, load_bfloats(reinterpret_cast<const Bfloat*>(prepared) + dimension));
            } else {
                sum = add(sum, load(prepared + dimension));
            }
        }
        *sums++ = reduce_add(sum);
    }
}

// What a few rows (decode) wait for is memory, and scattered pages defeat the hardware's prefetcher. So
// whoever reads a segment's stored pages fetches, line for line, those that are read next: reading keys, the
// segment's values; reading values, the next segment's keys. Into L2: the first-level cache has too few
// misses in flight for the bandwidth of the memory (half of it is lost on Zen 4).
struct Ahead {
    const std::uint8_t* pages[SEGMENT_PAGES] = {};  // fetched while the page of the same place is read
    int lines = 0;                                  // of 64 bytes a page; 0: none

    template <int COUNT>
    __attribute__((always_inline)) void fetch(int page, int line) const {
        if (line + COUNT > lines) return;
#pragma GCC unroll 8
        for (int which = 0; which < COUNT; ++which) fetch_line(pages[page] + (line + which) * CACHE_LINE);
    }
    __attribute__((always_inline)) void fetch_from(int page, int begin) const {
        for (int line = begin; line < lines; ++line) fetch_line(pages[page] + line * CACHE_LINE);
    }
};

// What belongs to the codes of a segment's narrow pages; group 0: nothing.
struct Scales {
    const Bfloat* pages[SEGMENT_PAGES] = {};  // rows of 16 tokens
    int group = 0;                            // dimensions that share one
    bool lows = false;                        // INT4: each row is followed by the tokens' lowest values
    Format format = Format::BF16;

    const Bfloat* of(int page, int dimension) const {
        return pages[page] + dimension / group * (lows ? 2 : 1) * PAGE_TOKENS;
    }
};

// Rows of queries, and of each row's sums over the groups of Scales with lows, which are multiplied by these.
constexpr int MAX_GROUPS = MAX_K_DIM / LANES;
struct Queries {
    const float* words;
    const float* sums;
};

// sums[row][vector] = made(row, vector), unrolled: what is indexed by a variable would not stay in registers.
template <int ROWS, int VECTORS, class Make>
__attribute__((always_inline)) inline void each_sum(Vector16 (&sums)[ROWS][VECTORS], const Make& make) {
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
        for (int vector = 0; vector < VECTORS; ++vector) sums[row][vector] = make(row, vector);
    }
}

// Rows begin <= row < end of a block. Each sees tokens first[row] <= t < last[row] of the segment.
struct Rows {
    int begin, end;
    const int* first;
    const int* last;
};

// scores[row][token] = query . key for what these rows see of pages page_begin <= page < page_end, and unseen tokens
// beside it; rows of scores are SEGMENT_TOKENS apart. Queries lie as prepare_query() and sum_query() leave them,
// `queries` and `scores` being row 0's. The first rows fetch `ahead`.
template <class Element>
void score_rows(const Queries& queries, const Rows& rows, const Element* const* pages, int page_begin, int page_end,
                int k_dim, const Scales& scales, float* scores, const Ahead& ahead);

// out[row][d] (+)= weight * value over the tokens that a row sees, for dimensions dim_begin <= d < dim_end of pages of
// v_dim; from start[row] on, or where `start` is null from what is there. Rows of weights are WEIGHTS_ROW apart,
// rows of out `stride`; all four are row 0's. Tiles fetch nothing but beside Code4. The first rows fetch `ahead`.
template <class Element>
void weigh_rows(const float* weights, const Rows& rows, const Element* const* pages, int v_dim, Format format,
                int dim_begin, int dim_end, float* out, int stride, const float* start, const Ahead& ahead);

}  // namespace lowbit
