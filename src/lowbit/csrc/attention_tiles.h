// The inner loops of paged attention: scores of a page of keys, softmax of a segment, its weighted values.
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
constexpr bool IS_CODE = std::is_same_v<Element, Code4> || std::is_same_v<Element, Code8>;
template <class Element>
constexpr bool BFLOAT_PRODUCTS = IS_CODE<Element> || std::is_same_v<Element, Bfloat>;
#else
template <class Element>
constexpr bool IS_CODE = false;
template <class Element>
constexpr bool BFLOAT_PRODUCTS = false;
#endif

template <class Element>
constexpr int query_words(int k_dim) {  // 32-bit words a row
    return BFLOAT_PRODUCTS<Element> ? k_dim / 2 : k_dim;
}

template <class Element>
inline void prepare_query(const float* query, int k_dim, float* prepared) {
#if defined(__AVX512BF16__)
    if constexpr (BFLOAT_PRODUCTS<Element>) {  // subnormal numbers become 0, as vdpbf16ps takes them
        for (int dimension = 0; dimension < k_dim; dimension += LANES) {
            const __m256bh rounded = _mm512_cvtneps_pbh(load(query + dimension).lanes);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(prepared + dimension / 2),
                                reinterpret_cast<__m256i>(rounded));
        }
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

// scores[row][page * 16 + token] = query . key for ROWS rows and PAGES pages. Rows of scores are
// SEGMENT_TOKENS apart. `place`: of the first page in `scales` and, for FETCH, in `ahead`.
template <class Element, int ROWS, int PAGES, bool FETCH>
inline void score_tile(const Queries& queries, const Element* const* pages, int k_dim, const Scales& scales,
                       float* scores, const Ahead& ahead, int place) {
    constexpr int LINES = sizeof(Element) / sizeof(Bfloat);  // of 64 bytes a pair of dimensions has
    const int words = query_words<Element>(k_dim), group = scales.group > 0 ? scales.group : k_dim;
    const std::uint8_t* fetched[PAGES];
    for (int page = 0; page < PAGES; ++page) fetched[page] = FETCH ? ahead.pages[place + page] : nullptr;
    Vector16 sums[ROWS][PAGES];
    const auto add_pairs = [&](int begin, int end) __attribute__((always_inline)) {
#if defined(__AVX512BF16__)
        const auto add = [&](int page, int row, int pair, __m512i keys) __attribute__((always_inline)) {
            int word;
            std::memcpy(&word, queries.words + row * words + pair, sizeof word);
            sums[row][page].lanes =
                _mm512_dpbf16_ps(sums[row][page].lanes, reinterpret_cast<__m512bh>(keys),
                                 reinterpret_cast<__m512bh>(_mm512_set1_epi32(word)));
        };
        if constexpr (IS_CODE<Element>) {
            const QuadDecoder<Element, true> decoder(code_table(scales.format));
            for (int quad = begin / 2; quad < end / 2; ++quad) {
                if (quad < ahead.lines) {
#pragma GCC unroll 8
                    for (int page = 0; page < PAGES; ++page) fetch_line(fetched[page] + quad * CACHE_LINE);
                }
#pragma GCC unroll 8
                for (int page = 0; page < PAGES; ++page) {
                    __m512i first, second;
                    decoder.decode(reinterpret_cast<const std::uint8_t*>(pages[page]) + quad * decoder.BYTES,
                                   first, second);
#pragma GCC unroll 8
                    for (int row = 0; row < ROWS; ++row) {
                        add(page, row, 2 * quad, first);
                        add(page, row, 2 * quad + 1, second);
                    }
                }
            }
            return;
        }
#endif
        for (int pair = begin; pair < end; ++pair) {
            if (FETCH && LINES * pair + LINES <= ahead.lines) {
#pragma GCC unroll 8
                for (int page = 0; page < PAGES; ++page) {
                    const std::uint8_t* from = fetched[page] + LINES * pair * CACHE_LINE;
                    for (int line = 0; line < LINES; ++line) fetch_line(from + line * CACHE_LINE);
                }
            }
#if defined(__AVX512BF16__)
            if constexpr (BFLOAT_PRODUCTS<Element>) {
                __m512i keys[PAGES];
#pragma GCC unroll 8
                for (int page = 0; page < PAGES; ++page) {
                    keys[page] = _mm512_loadu_si512(pages[page] + 2 * LANES * pair);
                }
#pragma GCC unroll 8
                for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
                    for (int page = 0; page < PAGES; ++page) add(page, row, pair, keys[page]);
                }
                continue;
            }
#endif
            if constexpr (!IS_CODE<Element>) {
#pragma GCC unroll 8
                for (int page = 0; page < PAGES; ++page) {
                    Vector16 even, odd;
                    load_keys(pages[page], pair, even, odd);
#pragma GCC unroll 8
                    for (int row = 0; row < ROWS; ++row) {
                        const float* query = queries.words + row * words + 2 * pair;
                        sums[row][page] =
                            fma(odd, broadcast(query[1]), fma(even, broadcast(query[0]), sums[row][page]));
                    }
                }
            }
        }
    };
    if (IS_CODE<Element>) {  // what no quad fetches
        for (int page = 0; page < PAGES; ++page) ahead.fetch_from(place + page, k_dim / 4);
    }
    for (int begin = 0; begin < k_dim; begin += group) {
        each_sum(sums, [](int, int) { return zeros(); });
        add_pairs(begin / 2, std::min(begin + group, k_dim) / 2);
        if (scales.group == 0) {
            each_sum(sums, [&](int row, int page) {
                store(scores + row * SEGMENT_TOKENS + page * PAGE_TOKENS, sums[row][page]);
                return sums[row][page];
            });
            return;
        }
        Vector16 scale[PAGES], low[PAGES];
#pragma GCC unroll 8
        for (int page = 0; page < PAGES; ++page) {
            const Bfloat* const mine = scales.of(place + page, begin);
            scale[page] = load_bfloats(mine);
            low[page] = scales.lows ? load_bfloats(mine + PAGE_TOKENS) : zeros();
        }
        each_sum(sums, [&](int row, int page) {
            float* const here = scores + row * SEGMENT_TOKENS + page * PAGE_TOKENS;
            Vector16 total = begin == 0 ? zeros() : load(here);
            if (scales.lows) {
                total = fma(low[page], broadcast(queries.sums[row * MAX_GROUPS + begin / group]), total);
            }
            store(here, fma(scale[page], sums[row][page], total));
            return sums[row][page];
        });
    }
}

// The same for `count` pages, PAGES of them at once and then the rest.
template <class Element, bool FETCH, int ROWS, int PAGES = pages_at_once(ROWS)>
inline void score_all(const Queries& queries, const Element* const* pages, int count, int k_dim,
                      const Scales& scales, float* scores, const Ahead& ahead, int place) {
    int page = 0;
    for (; page + PAGES <= count; page += PAGES) {
        score_tile<Element, ROWS, PAGES, FETCH>(queries, pages + page, k_dim, scales,
                                                scores + page * PAGE_TOKENS, ahead, place + page);
    }
    if constexpr (PAGES > 1) {
        if (page < count) {
            score_all<Element, FETCH, ROWS, PAGES / 2>(queries, pages + page, count - page, k_dim, scales,
                                                       scores + page * PAGE_TOKENS, ahead, place + page);
        }
    }
}

// The same for 1 <= rows <= ROWS rows.
template <class Element, bool FETCH, int ROWS = SCORE_ROWS>
inline void score_pages(const Queries& queries, int rows, const Element* const* pages, int count, int k_dim,
                        const Scales& scales, float* scores, const Ahead& ahead, int place) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            score_pages<Element, FETCH, ROWS - 1>(queries, rows, pages, count, k_dim, scales, scores, ahead,
                                                  place);
            return;
        }
    }
    score_all<Element, FETCH, ROWS>(queries, pages, count, k_dim, scales, scores, ahead, place);
}

struct Softmax {
    float scale = 1.0f;  // scores are kept times log2(e): exp(x) = 2^(x log2 e)
    float softcap = 0.0f;
};

#if defined(__AVX512BF16__)
// 2^x for 0 <= x < 1: minimax polynomial, relative error 3e-6, which eight bits do not show; 1 of 0.
constexpr float POWER_OF_TWO[] = {0.0134266857f, 0.0522424728f, 0.241280213f, 0.693044841f, 1.0f};

// 2^x for x <= 0, of lanes that are seen, and 0; below 2^-126 0 as well.
__attribute__((always_inline)) inline __m512 weights_of(__m512 x, Lanes seen) {
    x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);  // NaN stays NaN
    const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 sum = _mm512_set1_ps(POWER_OF_TWO[0]);
    for (int term = 1; term < 5; ++term) {
        sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(POWER_OF_TWO[term]));
    }
    return _mm512_maskz_scalef_ps(seen, sum, x);  // times 2^floor(x)
}

// Weights of 32 tokens, 2^(score * factor - top), as pairs of bfloat16 in the place of the first 16 scores.
inline __m512bh pair_weights(float* scores, __m512 factor, __m512 top, Lanes low_seen, Lanes high_seen) {
    const auto weights = [&](const float* from, Lanes seen) {
        return weights_of(_mm512_fmsub_ps(load(from).lanes, factor, top), seen);
    };
    const __m512 low = weights(scores, low_seen), high = weights(scores + LANES, high_seen);
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(scores, reinterpret_cast<__m512i>(rounded));
    return rounded;
}
#endif

// Lanes of a vector of tokens that are first <= t < last.
inline Lanes seen_lanes(int first, int last, int vector) {
    const int from = std::max(first - vector * LANES, 0), to = std::min(last - vector * LANES, LANES);
    return lane_range(std::min(from, LANES), std::max(to, 0));
}

// What weights are, in the place of the scores: pairs of bfloat16, token t in half-word t % 32 from the place
// of token t / 32 on, or floats.
enum class Weights { PAIRS, FLOATS };

// Scores of tokens first <= t < last (of one row, one segment) become weights 2^(score - maximum). Unseen
// tokens of a vector (of two, where they are pairs) get 0. ROUNDED: they become bfloat16 in the end.
template <Weights WEIGHTS, bool ROUNDED>
inline void softmax_segment(float* scores, int first, int last, const Softmax& softmax, float& maximum_score,
                            float& sum) {
    const int begin = first / LANES, end = (last + LANES - 1) / LANES;
    const auto seen = [&](int vector) { return seen_lanes(first, last, vector); };
    float factor = softmax.scale * LOG2_E;
    if (softmax.softcap > 0 || factor < 0) {  // a maximum can only be scaled by what keeps the order
        for (int vector = begin; vector < end; ++vector) {
            float* here = scores + vector * LANES;
            if (softmax.softcap > 0) {
                const Vector16 part = multiply(load(here), broadcast(softmax.scale / softmax.softcap));
                store(here, multiply(tanh(part), broadcast(softmax.softcap * LOG2_E)));
            } else {
                store(here, multiply(load(here), broadcast(factor)));
            }
        }
        factor = 1.0f;
    }
    const int whole_begin = (first + LANES - 1) / LANES, whole_end = last / LANES;  // vectors seen wholly
    Vector16 best = broadcast(MINUS_INFINITY);
    for (int vector = begin; vector < end; ++vector) {
        Vector16 score = load(scores + vector * LANES);
        if (vector < whole_begin || vector >= whole_end) {
            score = select(seen(vector), score, broadcast(MINUS_INFINITY));
        }
        best = maximum(best, score);
    }
    maximum_score = reduce_max(best) * factor;
#if defined(__AVX512BF16__)
    if constexpr (WEIGHTS == Weights::PAIRS) {
        const __m512 top = _mm512_set1_ps(maximum_score), factors = _mm512_set1_ps(factor);
        const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
        __m512 total = _mm512_setzero_ps();
        for (int vector = begin / 2 * 2; vector < end; vector += 2) {
            const bool whole = vector >= whole_begin && vector + 2 <= whole_end;
            const Lanes all = lane_range(0, LANES);
            const __m512bh weights = pair_weights(scores + vector * LANES, factors, top,
                                                  whole ? all : seen(vector),
                                                  whole ? all : seen(vector + 1));
            total = _mm512_dpbf16_ps(total, weights, ones);  // of the rounded weights: they add up to one
        }
        sum = reduce_add({total});
        return;
    }
#endif
    const Vector16 top = broadcast(maximum_score), factors = broadcast(factor);
    Vector16 total = zeros();
    for (int vector = begin; vector < end; ++vector) {
        float* here = scores + vector * LANES;
        // Rounded as the maximum was, not fused: its own weight is one.
        const Vector16 power = subtract(multiply(load(here), factors), top);
        Vector16 weight;
#if defined(__AVX512BF16__)
        if constexpr (ROUNDED) {
            weight = {weights_of(power.lanes, lane_range(0, LANES))};
        } else
#endif
            weight = exp2(power);
        if (vector < whole_begin || vector >= whole_end) weight = select(seen(vector), weight, zeros());
        store(here, weight);
        total = add(total, weight);
    }
    sum = reduce_add(total);
}

// Scales, and with `lows` lowest values, of the tokens of a segment as floats.
struct TokenScales {
    float scale[SEGMENT_TOKENS], low[SEGMENT_TOKENS];

    void load(const Scales& from, int page_begin, int page_end, int dimension) {
        static_assert(LANES == PAGE_TOKENS);
        for (int page = page_begin; page < page_end; ++page) {
            const Bfloat* const mine = from.of(page, dimension);
            store(scale + page * LANES, load_bfloats(mine));
            if (from.lows) store(low + page * LANES, load_bfloats(mine + LANES));
        }
    }
};

// folded <- weights times scales of tokens first <= t < last, 0 of unseen ones beside them: floats, or pairs
// as above. Returns the sum of weights times lows. May be in place.
template <Weights FOLDED, bool LOWS>
inline float fold_scales(const float* weights, int first, int last, const TokenScales& scales,
                         float* folded) {
    const int begin = first / LANES, end = (last + LANES - 1) / LANES;
    Vector16 lows = zeros();
    const auto scaled = [&](int vector, auto whole) __attribute__((always_inline)) {
        const Vector16 here = load(weights + vector * LANES);
        const Vector16 product = multiply(here, load(scales.scale + vector * LANES));
        if (whole) {
            if (LOWS) lows = fma(here, load(scales.low + vector * LANES), lows);
            return product;
        }
        if (vector < begin || vector >= end) return zeros();
        const Lanes seen = seen_lanes(first, last, vector);
        if (LOWS) lows = select(seen, fma(here, load(scales.low + vector * LANES), lows), lows);
        return select(seen, product, zeros());
    };
    const auto fold = [&](int vector, auto whole) __attribute__((always_inline)) {
        const Vector16 lower = scaled(vector, whole), upper = scaled(vector + 1, whole);
#if defined(__AVX512BF16__)
        if constexpr (FOLDED == Weights::PAIRS) {
            const auto rounded = _mm512_cvtne2ps_pbh(upper.lanes, lower.lanes);
            _mm512_storeu_si512(folded + vector * LANES, reinterpret_cast<__m512i>(rounded));
            return;
        }
#endif
        store(folded + vector * LANES, lower);
        store(folded + vector * LANES + LANES, upper);
    };
    for (int vector = begin / 2 * 2; vector < end; vector += 2) {
        if (vector * LANES >= first && (vector + 2) * LANES <= last) {
            fold(vector, std::true_type{});
        } else {
            fold(vector, std::false_type{});
        }
    }
    return LOWS ? reduce_add(lows) : 0.0f;
}

// What ROWS rows see of a segment: tokens first[row] <= t < last[row], all of them begin <= t < end.
struct Seen {
    const int* first;
    const int* last;
    int lowest, begin, end, highest;
};

template <int ROWS>
inline Seen seen_together(const int* first, const int* last) {
    Seen seen{first, last, first[0], first[0], last[0], last[0]};
    for (int row = 1; row < ROWS; ++row) {
        seen.lowest = std::min(seen.lowest, first[row]);
        seen.begin = std::max(seen.begin, first[row]);
        seen.end = std::min(seen.end, last[row]);
        seen.highest = std::max(seen.highest, last[row]);
    }
    return seen;
}

// out[row][dimension ...] (+)= weight * value over what each of ROWS rows sees, in ascending order of tokens,
// for VECTORS * 16 dimensions; from start[row] on, or where that is null from what is there. Rows of weights
// are SEGMENT_TOKENS apart, rows of out `stride`.
template <class Element, int ROWS, int VECTORS, bool FETCH>
inline void value_tile(const float* weights, const Element* const* pages, int v_dim, const Seen& seen,
                       int dimension, float* out, int stride, const float* start, const Ahead& ahead) {
    Vector16 sums[ROWS][VECTORS];
    each_sum(sums, [&](int row, int vector) {
        if (start != nullptr) return broadcast(start[row]);
        return load(out + row * stride + dimension + vector * LANES);
    });
    const auto add_token = [&](int token, auto all_see) __attribute__((always_inline)) {
        const Element* page = pages[token / PAGE_TOKENS];
        const int pair = token % PAGE_TOKENS / 2;
        if (FETCH && (sizeof(Element) > sizeof(Bfloat) || token % 2 == 0)) {
            const int row = sizeof(Element) > sizeof(Bfloat) ? token % PAGE_TOKENS : pair;
            ahead.fetch<VECTORS>(token / PAGE_TOKENS, (row * v_dim + dimension) / LANES);
        }
        Vector16 values[VECTORS];
#pragma GCC unroll 8
        for (int vector = 0; vector < VECTORS; ++vector) {
            const int at = dimension + vector * LANES;
            values[vector] =
                token % 2 == 0 ? first_values(page, v_dim, pair, at) : second_values(page, v_dim, pair, at);
        }
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
            if (!all_see && (token < seen.first[row] || token >= seen.last[row])) continue;
            const Vector16 weight = broadcast(weights[row * SEGMENT_TOKENS + token]);
#pragma GCC unroll 8
            for (int vector = 0; vector < VECTORS; ++vector) {
                sums[row][vector] = fma(weight, values[vector], sums[row][vector]);
            }
        }
    };
    int token = seen.lowest;
    const auto up_to = [&](int end) {
        for (; token < end; ++token) add_token(token, std::false_type{});
    };
    up_to(std::min((seen.begin + 1) / 2 * 2, seen.highest));
    for (; token + 1 < seen.end; token += 2) {
        add_token(token, std::true_type{});
        add_token(token + 1, std::true_type{});
    }
    up_to(seen.highest);
    each_sum(sums, [&](int row, int vector) {
        store(out + row * stride + dimension + vector * LANES, sums[row][vector]);
        return sums[row][vector];
    });
}

#if defined(__AVX512BF16__)
// The same for pairs of bfloat16: two tokens an instruction. Where a row sees one token of a pair the other
// is cleared: its weight is 0, but 0 times what an unused slot holds might be NaN.
template <class Element, int ROWS, int VECTORS, bool FETCH>
inline void value_pairs(const float* weights, const Element* const* pages, int v_dim, Format format,
                        const Seen& seen, int dimension, float* out, int stride, const float* start,
                        const Ahead& ahead) {
    constexpr int PAGE_PAIRS = PAGE_TOKENS / 2;
    Vector16 sums[ROWS][VECTORS];
    each_sum(sums, [&](int row, int vector) {
        if (start != nullptr) return broadcast(start[row]);
        return load(out + row * stride + dimension + vector * LANES);
    });
    const auto weight_of = [&](int row, int pair) __attribute__((always_inline)) {
        int word;
        const float* from = weights + row * SEGMENT_TOKENS + pair / LANES * 2 * LANES + pair % LANES;
        std::memcpy(&word, from, sizeof word);
        return reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
    };
    const auto add = [&](int row, int vector, __m512i values,
                         __m512bh weight) __attribute__((always_inline)) {
        sums[row][vector].lanes =
            _mm512_dpbf16_ps(sums[row][vector].lanes, reinterpret_cast<__m512bh>(values), weight);
    };
    // Calls with(get), get(pair, vector) being a line of values.
    const auto with_lines = [&](const auto& with) __attribute__((always_inline)) {
        if constexpr (IS_CODE<Element>) {
            const QuadDecoder<Element, false> decoder(code_table(format));
            with([&](int pair, int vector) __attribute__((always_inline)) {
                const int quad = pair % PAGE_PAIRS / 2 * (v_dim / LANES) + dimension / LANES + vector;
                const auto* page = reinterpret_cast<const std::uint8_t*>(pages[pair / PAGE_PAIRS]);
                __m512i first, second;
                decoder.decode(page + quad * decoder.BYTES, first, second);
                return pair % 2 == 0 ? first : second;
            });
        } else {
            with([&](int pair, int vector) __attribute__((always_inline)) {
                return _mm512_loadu_si512(pages[pair / PAGE_PAIRS] +
                                          2 * (pair % PAGE_PAIRS * v_dim + dimension + vector * LANES));
            });
        }
    };
    int pair = seen.lowest / 2;
    const auto up_to = [&](int end) __attribute__((always_inline)) {
        if (pair >= end) return;
        with_lines([&](const auto& line) __attribute__((always_inline)) {
            for (; pair < end; ++pair) {
#pragma GCC unroll 8
                for (int vector = 0; vector < VECTORS; ++vector) {
                    const __m512i values = line(pair, vector);
#pragma GCC unroll 8
                    for (int row = 0; row < ROWS; ++row) {
                        const auto sees =
                            [&](int token) { return token >= seen.first[row] && token < seen.last[row]; };
                        const unsigned even = sees(2 * pair) ? 0xFFFFu : 0u;
                        const unsigned tokens = even | (sees(2 * pair + 1) ? ~0xFFFFu : 0u);
                        if (tokens == 0) continue;
                        const __m512i kept = _mm512_set1_epi32(static_cast<int>(tokens));
                        add(row, vector, _mm512_and_si512(values, kept), weight_of(row, pair));
                    }
                }
            }
        });
    };
    const int end = (seen.highest + 1) / 2;
    if constexpr (IS_CODE<Element>) {
        constexpr int PAGE_QUADS = PAGE_PAIRS / 2;
        up_to(std::min((seen.begin + 3) / 4 * 2, end));
        const QuadDecoder<Element, false> decoder(code_table(format));
        const int across = v_dim / LANES, last_fetched = ahead.lines / VECTORS * VECTORS;
        for (; pair + 2 <= seen.end / 2; pair += 2) {
            const int page = pair / PAGE_PAIRS;
            const int quad = pair % PAGE_PAIRS / 2 * across + dimension / LANES;
            const auto* from = reinterpret_cast<const std::uint8_t*>(pages[page]) + quad * decoder.BYTES;
            ahead.fetch<VECTORS>(page, quad);
            if (quad == 0) ahead.fetch_from(page, std::min(last_fetched, PAGE_QUADS * across));
#pragma GCC unroll 8
            for (int vector = 0; vector < VECTORS; ++vector) {
                __m512i first, second;
                decoder.decode(from + vector * decoder.BYTES, first, second);
#pragma GCC unroll 8
                for (int row = 0; row < ROWS; ++row) {
                    add(row, vector, first, weight_of(row, pair));
                    add(row, vector, second, weight_of(row, pair + 1));
                }
            }
        }
    } else {
        up_to(std::min((seen.begin + 1) / 2, end));
        while (pair < seen.end / 2) {
            const int page = pair / PAGE_PAIRS, page_end = std::min(seen.end / 2, (page + 1) * PAGE_PAIRS);
            const Bfloat* from = pages[page] + 2 * (pair % PAGE_PAIRS * v_dim + dimension);
            const float* weight = weights + pair / LANES * 2 * LANES + pair % LANES;
            for (; pair < page_end; ++pair, ++weight, from += 2 * v_dim) {
                if (FETCH) ahead.fetch<VECTORS>(page, (pair % PAGE_PAIRS * v_dim + dimension) / LANES);
                __m512i values[VECTORS];
#pragma GCC unroll 8
                for (int vector = 0; vector < VECTORS; ++vector) {
                    values[vector] = _mm512_loadu_si512(from + 2 * vector * LANES);
                }
#pragma GCC unroll 8
                for (int row = 0; row < ROWS; ++row) {
                    int word;
                    std::memcpy(&word, weight + row * SEGMENT_TOKENS, sizeof word);
                    const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
#pragma GCC unroll 8
                    for (int vector = 0; vector < VECTORS; ++vector) add(row, vector, values[vector], both);
                }
            }
        }
    }
    up_to(end);
    each_sum(sums, [&](int row, int vector) {
        store(out + row * stride + dimension + vector * LANES, sums[row][vector]);
        return sums[row][vector];
    });
}
#endif

// Dimensions begin <= d < end of pages that have v_dim.
template <class Element, bool FETCH, int ROWS, int VECTORS = vectors_at_once(ROWS)>
inline void value_rows(const float* weights, const Element* const* pages, int v_dim, Format format,
                       const Seen& seen, int begin, int end, float* out, int stride, const float* start,
                       const Ahead& ahead) {
    for (; begin + VECTORS * LANES <= end; begin += VECTORS * LANES) {
#if defined(__AVX512BF16__)
        if constexpr (BFLOAT_PRODUCTS<Element>) {
            value_pairs<Element, ROWS, VECTORS, FETCH>(weights, pages, v_dim, format, seen, begin, out,
                                                       stride, start, ahead);
            continue;
        }
#endif
        if constexpr (!IS_CODE<Element>) {
            value_tile<Element, ROWS, VECTORS, FETCH>(weights, pages, v_dim, seen, begin, out, stride, start,
                                                      ahead);
        }
    }
    if constexpr (VECTORS > 1) {
        if (begin < end) {
            value_rows<Element, FETCH, ROWS, VECTORS / 2>(weights, pages, v_dim, format, seen, begin, end,
                                                          out, stride, start, ahead);
        }
    }
}

// Tokens first[row] <= t < last[row] for each of 1 <= rows <= ROWS rows.
template <class Element, bool FETCH, int ROWS = VALUE_ROWS>
inline void value_block(const float* weights, int rows, const Element* const* pages, int v_dim, Format format,
                        const int* first, const int* last, int begin, int end, float* out, int stride,
                        const float* start, const Ahead& ahead) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            value_block<Element, FETCH, ROWS - 1>(weights, rows, pages, v_dim, format, first, last, begin,
                                                  end, out, stride, start, ahead);
            return;
        }
    }
    value_rows<Element, FETCH, ROWS>(weights, pages, v_dim, format, seen_together<ROWS>(first, last), begin,
                                     end, out, stride, start, ahead);
}

// Rows' softmax over some of their tokens: weights relative to 2^maximum, their sum (0 where a row has seen
// no token: a sum that has a term has one of about 1, or is NaN), the weighted values, v_dim a row.
struct States {
    float* maximum;
    float* sum;
    float* values;
};

inline float exp2(float x) { return first_lane(exp2(broadcast(x))); }

// all <- all and the next segment's (log-sum-exp merge), for `rows` rows; states may be read and written up
// to a multiple of 16 rows.
inline void merge_segment(const States& all, const States& next, int rows, int v_dim) {
    for (int begin = 0; begin < rows; begin += LANES) {
        const Vector16 old_top = load(all.maximum + begin), next_top = load(next.maximum + begin);
        const Vector16 top = select(less(old_top, next_top), next_top, old_top);
        float kept[LANES], added[LANES], sums[LANES];
        const Vector16 keep = exp2(subtract(old_top, top)), gain = exp2(subtract(next_top, top));
        store(kept, keep);
        store(added, gain);
        store(sums, fma(load(next.sum + begin), gain, multiply(load(all.sum + begin), keep)));
        for (int row = begin; row < std::min(rows, begin + LANES); ++row) {
            if (next.sum[row] == 0.0f) continue;
            float* values = all.values + row * v_dim;
            const float* next_values = next.values + row * v_dim;
            if (all.sum[row] == 0.0f) {
                std::copy_n(next_values, v_dim, values);
                all.maximum[row] = next.maximum[row];
                all.sum[row] = next.sum[row];
                continue;
            }
            const Vector16 keep_lanes = broadcast(kept[row - begin]),
                gain_lanes = broadcast(added[row - begin]);
            for (int dimension = 0; dimension < v_dim; dimension += LANES) {
                const Vector16 old = multiply(load(values + dimension), keep_lanes);
                store(values + dimension, fma(load(next_values + dimension), gain_lanes, old));
            }
            all.sum[row] = sums[row - begin];
            if (all.maximum[row] < next.maximum[row]) all.maximum[row] = next.maximum[row];
        }
    }
}

// Softmax division; a sink is a logit that takes its share of the sum and has no value.
inline void finish_row(float maximum, float sum, const float* values, int v_dim, const float* sink,
                       float* out) {
    float kept = 1.0f;
    if (sink != nullptr) {
        const float logit = *sink * LOG2_E, top = logit > maximum ? logit : maximum;
        kept = exp2(maximum - top);
        sum = std::fma(sum, kept, exp2(logit - top));
    }
    const Vector16 share = broadcast(kept / sum);
    for (int dimension = 0; dimension < v_dim; dimension += LANES) {
        store(out + dimension, multiply(load(values + dimension), share));
    }
}

}  // namespace lowbit
