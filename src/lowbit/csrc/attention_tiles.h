// The inner loops of paged attention: scores of a page of keys, softmax of a segment, its weighted values.
//
// Keys and values are operands of bfloat16 or float (attention_cache.h). A line of bfloat16 keys is a pair of
// dimensions of 16 tokens, the operand of vdpbf16ps that yields 16 scores for a broadcast query pair; a line
// of values is 16 dimensions of two tokens. The two may be of different types.
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
#pragma once

#include <algorithm>
#include <cmath>

#include "attention_cache.h"

namespace lowbit {

constexpr int SEGMENT_PAGES = 16;
constexpr int SEGMENT_TOKENS = PAGE_TOKENS * SEGMENT_PAGES;

// Rows and vectors that fill the registers: 32 of 512 bits, or 16 of 256 (two a Vector16).
#if defined(__AVX512F__)
constexpr int SCORE_ROWS = 8, VALUE_ROWS = 6, VALUE_VECTORS = 4;
constexpr int pages_at_once(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }
#else
constexpr int SCORE_ROWS = 4, VALUE_ROWS = 3, VALUE_VECTORS = 2;
constexpr int pages_at_once(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif
constexpr int STRIP = VALUE_VECTORS * LANES;  // dimensions of a latent segment that are turned at once

// A pair of dimensions of 16 keys.
inline void load_keys(const Bfloat* page, int pair, Vector16& even, Vector16& odd) {
    even = lower_bfloats(page + 2 * LANES * pair);
    odd = upper_bfloats(page + 2 * LANES * pair);
}
inline void load_keys(const float* page, int pair, Vector16& even, Vector16& odd) {
    even = load(page + 2 * LANES * pair);
    odd = load(page + 2 * LANES * pair + LANES);
}

// The keys of `width` dimensions of a page (a multiple of 16) in V's layout: no bit changes.
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

// Sixteen dimensions of token pair `pair`.
inline Vector16 first_values(const Bfloat* page, int v_dim, int pair, int dimension) {
    return lower_bfloats(page + 2 * (pair * v_dim + dimension));
}
inline Vector16 second_values(const Bfloat* page, int v_dim, int pair, int dimension) {
    return upper_bfloats(page + 2 * (pair * v_dim + dimension));
}
inline Vector16 first_values(const float* page, int v_dim, int pair, int dimension) {
    return load(page + 2 * pair * v_dim + dimension);
}
inline Vector16 second_values(const float* page, int v_dim, int pair, int dimension) {
    return load(page + (2 * pair + 1) * v_dim + dimension);
}

// Whether vdpbf16ps multiplies: on AVX-512 beside a bfloat16 cache. Queries and softmax weights are then
// rounded to bfloat16 and lie as pairs in 32-bit words; sums stay float32. Otherwise all is float32.
#if defined(__AVX512BF16__)
template <class Element>
constexpr bool BFLOAT_PRODUCTS = sizeof(Element) == sizeof(Bfloat);
#else
template <class Element>
constexpr bool BFLOAT_PRODUCTS = false;
#endif

template <class Element>
constexpr int query_words(int k_dim) {  // 32-bit words a row
    return BFLOAT_PRODUCTS<Element> ? k_dim / 2 : k_dim;
}

template <class Element>
inline void prepare_query(const float* query, int k_dim, float* prepared) {
    if constexpr (BFLOAT_PRODUCTS<Element>) {
        for (int pair = 0; pair < k_dim / 2; ++pair) {
            const std::uint32_t low = to_bfloat(query[2 * pair]), high = to_bfloat(query[2 * pair + 1]);
            const std::uint32_t word = low | high << 16;
            std::memcpy(prepared + pair, &word, sizeof word);
        }
    } else {
        std::copy_n(query, k_dim, prepared);
    }
}

// What a few rows (decode) wait for is memory, and scattered pages defeat the hardware's prefetcher: while
// the keys of a page are read, its values and the keys some pages ahead are fetched, line for line.
template <class Key, class Value>
struct Prefetch {
    const Key* const* keys;  // by page, like the pages themselves
    const Value* const* values;
    int value_lines;  // lines a page, one for each line of keys

    __attribute__((always_inline)) void lines(int page, int line) const {
        constexpr int LINE = 2 * LANES;  // 64 bytes of bfloat16
        _mm_prefetch(reinterpret_cast<const char*>(keys[page] + line * LINE), _MM_HINT_T0);
        if (line < value_lines) {
            _mm_prefetch(reinterpret_cast<const char*>(values[page] + line * LINE), _MM_HINT_T0);
        }
    }
};

// scores[row][page * 16 + token] = query . key for ROWS rows and PAGES pages. Rows of scores are
// SEGMENT_TOKENS apart.
template <class Element, int ROWS, int PAGES, bool PREFETCH, class Value>
inline void score_tile(const float* queries, const Element* const* pages, int k_dim, float* scores,
                       const Prefetch<Element, Value>& prefetch) {
    const int words = query_words<Element>(k_dim);
    Vector16 sums[ROWS][PAGES];
    for (auto& row : sums) {
        for (auto& sum : row) sum = zeros();
    }
    for (int pair = 0; pair < k_dim / 2; ++pair) {
        if constexpr (PREFETCH) {
            for (int page = 0; page < PAGES; ++page) prefetch.lines(page, pair);
        }
#if defined(__AVX512BF16__)
        if constexpr (BFLOAT_PRODUCTS<Element>) {
            __m512bh keys[PAGES];
#pragma GCC unroll 8
            for (int page = 0; page < PAGES; ++page) {
                keys[page] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(pages[page] + 2 * LANES * pair));
            }
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) {
                int word;
                std::memcpy(&word, queries + row * words + pair, sizeof word);
                const __m512bh query = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
#pragma GCC unroll 8
                for (int page = 0; page < PAGES; ++page) {
                    sums[row][page].lanes = _mm512_dpbf16_ps(sums[row][page].lanes, keys[page], query);
                }
            }
            continue;
        }
#endif
#pragma GCC unroll 8
        for (int page = 0; page < PAGES; ++page) {
            Vector16 even, odd;
            load_keys(pages[page], pair, even, odd);
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) {
                const float* query = queries + row * words + 2 * pair;
                sums[row][page] =
                    fma(odd, broadcast(query[1]), fma(even, broadcast(query[0]), sums[row][page]));
            }
        }
    }
    for (int row = 0; row < ROWS; ++row) {
        for (int page = 0; page < PAGES; ++page) {
            store(scores + row * SEGMENT_TOKENS + page * PAGE_TOKENS, sums[row][page]);
        }
    }
}

// The same for 1 <= rows <= ROWS rows and any number of pages.
template <class Element, class Value, bool PREFETCH, int ROWS = SCORE_ROWS>
inline void score_pages(const float* queries, int rows, const Element* const* pages, int count, int k_dim,
                        float* scores, Prefetch<Element, Value> prefetch) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            score_pages<Element, Value, PREFETCH, ROWS - 1>(queries, rows, pages, count, k_dim, scores,
                                                            prefetch);
            return;
        }
    }
    constexpr int TOGETHER = pages_at_once(ROWS);
    int page = 0;
    for (; page + TOGETHER <= count; page += TOGETHER) {
        score_tile<Element, ROWS, TOGETHER, PREFETCH>(queries, pages + page, k_dim,
                                                      scores + page * PAGE_TOKENS, prefetch);
        prefetch.keys += TOGETHER;
        prefetch.values += TOGETHER;
    }
    for (; page < count; ++page) {
        score_tile<Element, ROWS, 1, PREFETCH>(queries, pages + page, k_dim, scores + page * PAGE_TOKENS,
                                               prefetch);
        ++prefetch.keys;
        ++prefetch.values;
    }
}

struct Softmax {
    float scale = 1.0f;  // scores are kept times log2(e): exp(x) = 2^(x log2 e)
    float softcap = 0.0f;
};

// Returns what was stored.
template <class Element>
inline Vector16 store_weights(float* weights, int vector, Vector16 weight) {
#if defined(__AVX512BF16__)
    if constexpr (BFLOAT_PRODUCTS<Element>) {
        const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weight.lanes));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + vector * LANES / 2), rounded);
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16))};
    }
#endif
    store(weights + vector * LANES, weight);
    return weight;
}

// Scores of tokens first <= t < last (of one row, one segment) become weights 2^(score - maximum): floats
// in the place of the scores, or pairs of bfloat16, token t in half-word t. Unseen tokens of a vector get 0.
template <class Element>
inline void softmax_segment(float* scores, int first, int last, const Softmax& softmax, float& maximum_score,
                            float& sum) {
    const int begin = first / LANES, end = (last + LANES - 1) / LANES;
    const Vector16 factor =
        broadcast(softmax.softcap > 0 ? softmax.scale / softmax.softcap : softmax.scale * LOG2_E);
    const Vector16 cap = broadcast(softmax.softcap * LOG2_E);
    Vector16 best = broadcast(MINUS_INFINITY);
    for (int vector = begin; vector < end; ++vector) {
        float* here = scores + vector * LANES;
        Vector16 score = multiply(load(here), factor);
        if (softmax.softcap > 0) score = multiply(tanh(score), cap);
        const int from = std::max(first - vector * LANES, 0), to = std::min(last - vector * LANES, LANES);
        if (from > 0 || to < LANES) score = select(lane_range(from, to), score, broadcast(MINUS_INFINITY));
        store(here, score);
        best = maximum(best, score);
    }
    maximum_score = reduce_max(best);
    const Vector16 top = broadcast(maximum_score);
    Vector16 total = zeros();
    for (int vector = begin; vector < end; ++vector) {
        Vector16 weight = exp2(subtract(load(scores + vector * LANES), top));
        weight = store_weights<Element>(scores, vector, weight);
        total = add(total, weight);  // of the rounded weights: they add up to one
    }
    sum = reduce_add(total);
}

template <int ROWS, int VECTORS>
__attribute__((always_inline)) inline void weigh(const float* weights, int token,
                                                 const Vector16 (&values)[VECTORS],
                                                 Vector16 (&sums)[ROWS][VECTORS]) {
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
        const Vector16 weight = broadcast(weights[row * SEGMENT_TOKENS + token]);
#pragma GCC unroll 8
        for (int vector = 0; vector < VECTORS; ++vector) {
            sums[row][vector] = fma(weight, values[vector], sums[row][vector]);
        }
    }
}

// out[row][dimension ...] += weight * value over tokens first <= t < last of a segment, in ascending order,
// for ROWS rows and VECTORS * 16 dimensions. Rows of weights are SEGMENT_TOKENS apart, rows of out `stride`.
template <class Element, int ROWS, int VECTORS>
inline void value_tile(const float* weights, const Element* const* pages, int v_dim, int first, int last,
                       int dimension, float* out, int stride) {
    Vector16 sums[ROWS][VECTORS], values[VECTORS];
    for (int row = 0; row < ROWS; ++row) {
        for (int vector = 0; vector < VECTORS; ++vector) {
            sums[row][vector] = load(out + row * stride + dimension + vector * LANES);
        }
    }
    for (int token = first; token < last;) {
        const Element* page = pages[token / PAGE_TOKENS];
        const int end = std::min(last, (token / PAGE_TOKENS + 1) * PAGE_TOKENS);
        while (token < end) {
            const int pair = token % PAGE_TOKENS / 2;
            if (token % 2 == 0) {
#pragma GCC unroll 8
                for (int vector = 0; vector < VECTORS; ++vector) {
                    values[vector] = first_values(page, v_dim, pair, dimension + vector * LANES);
                }
                weigh<ROWS, VECTORS>(weights, token++, values, sums);
                if (token == end) break;
            }
#pragma GCC unroll 8
            for (int vector = 0; vector < VECTORS; ++vector) {
                values[vector] = second_values(page, v_dim, pair, dimension + vector * LANES);
            }
            weigh<ROWS, VECTORS>(weights, token++, values, sums);
        }
    }
    for (int row = 0; row < ROWS; ++row) {
        for (int vector = 0; vector < VECTORS; ++vector) {
            store(out + row * stride + dimension + vector * LANES, sums[row][vector]);
        }
    }
}

#if defined(__AVX512BF16__)
// The same for pairs of bfloat16: two tokens an instruction. Where a row sees one token of a pair the other
// is cleared: its weight is 0, but 0 times what an unused slot holds might be NaN.
template <int ROWS, int VECTORS>
inline void value_pairs(const float* weights, const Bfloat* const* pages, int v_dim, int first, int last,
                        int dimension, float* out, int stride) {
    Vector16 sums[ROWS][VECTORS];
    for (int row = 0; row < ROWS; ++row) {
        for (int vector = 0; vector < VECTORS; ++vector) {
            sums[row][vector] = load(out + row * stride + dimension + vector * LANES);
        }
    }
    for (int pair = first / 2; pair < (last + 1) / 2; ++pair) {
        const Bfloat* from =
            pages[pair / (PAGE_TOKENS / 2)] + 2 * (pair % (PAGE_TOKENS / 2) * v_dim + dimension);
        const bool whole = 2 * pair >= first && 2 * pair + 1 < last;
        const unsigned seen =
            whole ? ~0u : (2 * pair >= first ? 0xFFFFu : 0u) | (2 * pair + 1 < last ? ~0xFFFFu : 0u);
        __m512i values[VECTORS];
#pragma GCC unroll 8
        for (int vector = 0; vector < VECTORS; ++vector) {
            values[vector] = _mm512_loadu_si512(from + 2 * vector * LANES);
            if (!whole)
                values[vector] = _mm512_and_si512(values[vector], _mm512_set1_epi32(static_cast<int>(seen)));
        }
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
            int word;
            std::memcpy(&word, weights + row * SEGMENT_TOKENS + pair, sizeof word);
            const auto weight = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
#pragma GCC unroll 8
            for (int vector = 0; vector < VECTORS; ++vector) {
                sums[row][vector].lanes = _mm512_dpbf16_ps(
                    sums[row][vector].lanes, reinterpret_cast<__m512bh>(values[vector]), weight);
            }
        }
    }
    for (int row = 0; row < ROWS; ++row) {
        for (int vector = 0; vector < VECTORS; ++vector) {
            store(out + row * stride + dimension + vector * LANES, sums[row][vector]);
        }
    }
}
#endif

// All dimensions.
template <class Element, int ROWS, int VECTORS = VALUE_VECTORS>
inline void value_rows(const float* weights, const Element* const* pages, int v_dim, int first, int last,
                       float* out, int stride, int dimension = 0) {
    for (; dimension + VECTORS * LANES <= v_dim; dimension += VECTORS * LANES) {
#if defined(__AVX512BF16__)
        if constexpr (BFLOAT_PRODUCTS<Element>) {
            value_pairs<ROWS, VECTORS>(weights, pages, v_dim, first, last, dimension, out, stride);
            continue;
        }
#endif
        value_tile<Element, ROWS, VECTORS>(weights, pages, v_dim, first, last, dimension, out, stride);
    }
    if constexpr (VECTORS > 1) {
        if (dimension < v_dim)
            value_rows<Element, ROWS, VECTORS - 1>(weights, pages, v_dim, first, last, out, stride, dimension);
    }
}

// Tokens first[row] <= t < last[row] for each of 1 <= rows <= ROWS rows; both ascend with the row.
template <class Element, int ROWS = VALUE_ROWS>
inline void value_block(const float* weights, int rows, const Element* const* pages, int v_dim,
                        const int* first, const int* last, float* out, int stride) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            value_block<Element, ROWS - 1>(weights, rows, pages, v_dim, first, last, out, stride);
            return;
        }
    }
    // The tokens all rows see are read once, in whole pairs; the rest is added row by row, before and after.
    const int shared_first = (first[ROWS - 1] + 1) / 2 * 2,
              shared_last = std::max(last[0] / 2 * 2, shared_first);
    const auto alone = [&](int row, int from, int to) {
        if (from >= to) return;
        value_rows<Element, 1>(weights + row * SEGMENT_TOKENS, pages, v_dim, from, to, out + row * stride,
                               stride);
    };
    for (int row = 0; row < ROWS; ++row) alone(row, first[row], std::min(shared_first, last[row]));
    if (shared_first < shared_last)
        value_rows<Element, ROWS>(weights, pages, v_dim, shared_first, shared_last, out, stride);
    for (int row = 0; row < ROWS; ++row) alone(row, std::max(shared_last, first[row]), last[row]);
}

// A row's softmax over some of its tokens: weights relative to 2^maximum, their sum, the weighted values.
struct RowState {
    float maximum = MINUS_INFINITY;
    float sum = 0.0f;
};

inline float exp2(float x) { return first_lane(exp2(broadcast(x))); }

// state, values <- state, values and the next segment's (log-sum-exp merge).
inline void merge_segment(RowState& state, float* values, const RowState& next, const float* next_values,
                          int v_dim) {
    if (state.sum == 0.0f) {  // nothing yet: a sum that has a term has one of 1 (or is NaN)
        state = next;
        std::copy_n(next_values, v_dim, values);
        return;
    }
    const float top = next.maximum > state.maximum ? next.maximum : state.maximum;
    const float kept = exp2(state.maximum - top), added = exp2(next.maximum - top);
    const Vector16 kept_lanes = broadcast(kept), added_lanes = broadcast(added);
    for (int dimension = 0; dimension < v_dim; dimension += LANES) {
        const Vector16 old = multiply(load(values + dimension), kept_lanes);
        store(values + dimension, fma(load(next_values + dimension), added_lanes, old));
    }
    state.sum = std::fma(next.sum, added, state.sum * kept);
    state.maximum = top;
}

// Softmax division; a sink is a logit that takes its share of the sum and has no value.
inline void finish_row(const RowState& state, const float* values, int v_dim, const float* sink, float* out) {
    float sum = state.sum, kept = 1.0f;
    if (sink != nullptr) {
        const float logit = *sink * LOG2_E, top = logit > state.maximum ? logit : state.maximum;
        kept = exp2(state.maximum - top);
        sum = std::fma(sum, kept, exp2(logit - top));
    }
    const Vector16 share = broadcast(kept / sum);
    for (int dimension = 0; dimension < v_dim; dimension += LANES) {
        store(out + dimension, multiply(load(values + dimension), share));
    }
}

}  // namespace lowbit
