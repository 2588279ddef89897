// The inner loops of paged attention: scores of a page of keys, a segment's weighted values; between them its softmax
// (attention_softmax.h).
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

}  // namespace lowbit
