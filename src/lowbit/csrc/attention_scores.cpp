// Attention's scores: rows of queries with the pages of a segment's keys (attention_tiles.h).
#include <algorithm>
#include <cstring>

#include "attention_tiles.h"

namespace lowbit {
namespace {

// A pair of dimensions of 16 keys.
[[maybe_unused]] void load_keys(const Bfloat* page, int pair, Vector16& even, Vector16& odd) {
    even = lower_bfloats(page + 2 * LANES * pair);
    odd = upper_bfloats(page + 2 * LANES * pair);
}
void load_keys(const float* page, int pair, Vector16& even, Vector16& odd) {
    even = load(page + 2 * LANES * pair);
    odd = load(page + 2 * LANES * pair + LANES);
}

// scores[row][page * 16 + token] = query . key for ROWS rows and PAGES pages. Rows of scores are
// SEGMENT_TOKENS apart. `place`: of the first page in `scales` and, for FETCH, in `ahead`.
template <class Element, int ROWS, int PAGES, bool FETCH>
void score_tile(const Queries& queries, const Element* const* pages, int k_dim, const Scales& scales, float* scores,
                const Ahead& ahead, int place) {
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

// The same for `count` pages, PAGES of them at once and then the rest. Only whole tiles have a variant that does not
// fetch: what is left over is rare, and each variant takes time to compile.
template <class Element, bool FETCH, int ROWS, int PAGES = pages_at_once(ROWS)>
__attribute__((noinline)) void score_all(const Queries& queries, const Element* const* pages, int count, int k_dim,
                                         const Scales& scales, float* scores, const Ahead& ahead, int place) {
    int page = 0;
    for (; page + PAGES <= count; page += PAGES) {
        score_tile<Element, ROWS, PAGES, FETCH>(queries, pages + page, k_dim, scales,
                                                scores + page * PAGE_TOKENS, ahead, place + page);
    }
    if constexpr (PAGES > 1) {
        if (page < count) {
            score_all<Element, true, ROWS, PAGES / 2>(queries, pages + page, count - page, k_dim, scales,
                                                      scores + page * PAGE_TOKENS, ahead, place + page);
        }
    }
}

// The same for 1 <= rows <= ROWS rows.
template <class Element, bool FETCH, int ROWS = SCORE_ROWS>
void score_pages(const Queries& queries, int rows, const Element* const* pages, int count, int k_dim,
                 const Scales& scales, float* scores, const Ahead& ahead, int place) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            score_pages<Element, true, ROWS - 1>(queries, rows, pages, count, k_dim, scales, scores, ahead, place);
            return;
        }
    }
    score_all<Element, FETCH, ROWS>(queries, pages, count, k_dim, scales, scores, ahead, place);
}

}  // namespace

template <class Element>
void score_rows(const Queries& queries, const Rows& rows, const Element* const* pages, int page_begin, int page_end,
                int k_dim, const Scales& scales, float* scores, const Ahead& ahead) {
    const int together = pages_at_once(std::min(rows.end - rows.begin, SCORE_ROWS));
    const int words = query_words<Element>(k_dim);
    const Ahead nothing{};
    int from = rows.begin, to = rows.begin;
    for (int page = page_begin; page < page_end; page += together) {
        const int count = std::min(together, page_end - page);
        while (from < rows.end && rows.last[from] <= page * PAGE_TOKENS) ++from;  // rows before these pages
        while (to < rows.end && rows.first[to] < (page + count) * PAGE_TOKENS) ++to;
        for (int row = from; row < to; row += SCORE_ROWS) {
            const bool fetch = row == from && ahead.lines > 0;
            const auto score = fetch ? score_pages<Element, true> : score_pages<Element, IS_CODE<Element>>;
            score({queries.words + row * words, queries.sums + row * MAX_GROUPS}, std::min(SCORE_ROWS, to - row),
                  pages + page, count, k_dim, scales, scores + row * SEGMENT_TOKENS + page * PAGE_TOKENS,
                  fetch ? ahead : nothing, page);
        }
    }
}

#define LOWBIT_INSTANTIATE(Element)                                                                        \
    template void score_rows(const Queries&, const Rows&, const Element* const*, int, int, int, const Scales&, \
                             float*, const Ahead&);
LOWBIT_ATTENTION_ELEMENTS(LOWBIT_INSTANTIATE)

}  // namespace lowbit
