// Attention's weighted values: rows of weights with the pages of a segment's values (attention_tiles.h).
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "attention_tiles.h"

namespace lowbit {
namespace {

// Sixteen dimensions of token pair `pair`.
[[maybe_unused]] Vector16 first_values(const Bfloat* page, int v_dim, int pair, int dimension) {
    return lower_bfloats(page + 2 * (pair * v_dim + dimension));
}
[[maybe_unused]] Vector16 second_values(const Bfloat* page, int v_dim, int pair, int dimension) {
    return upper_bfloats(page + 2 * (pair * v_dim + dimension));
}
Vector16 first_values(const float* page, int v_dim, int pair, int dimension) {
    return load(page + 2 * pair * v_dim + dimension);
}
Vector16 second_values(const float* page, int v_dim, int pair, int dimension) {
    return load(page + (2 * pair + 1) * v_dim + dimension);
}

// What ROWS rows see of a segment: tokens first[row] <= t < last[row], all of them begin <= t < end.
struct Seen {
    const int* first;
    const int* last;
    int lowest, begin, end, highest;

    // The tokens that all rows see, in whole runs of `count` from a multiple of it on: the first and past the last.
    // What is before and behind takes one and the same code of a loop: a second copy took as long to compile again.
    std::pair<int, int> by_all(int count) const {
        const int from = (begin + count - 1) / count * count;
        return {from, from + std::max(end - from, 0) / count * count};
    }
};

template <int ROWS>
Seen seen_together(const int* first, const int* last) {
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
void value_tile(const float* weights, const Element* const* pages, int v_dim, const Seen& seen, int dimension,
                float* out, int stride, const float* start, const Ahead& ahead) {
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
    const auto [whole_begin, whole_end] = seen.by_all(2);
    int token = seen.lowest;
    while (token < seen.highest) {
        if (token < whole_begin || token >= whole_end) {
            add_token(token++, std::false_type{});
            continue;
        }
        for (; token < whole_end; token += 2) {
            add_token(token, std::true_type{});
            add_token(token + 1, std::true_type{});
        }
    }
    each_sum(sums, [&](int row, int vector) {
        store(out + row * stride + dimension + vector * LANES, sums[row][vector]);
        return sums[row][vector];
    });
}

#if defined(__AVX512BF16__)
// The same for pairs of bfloat16: two tokens an instruction. Where a row sees one token of a pair the other
// is cleared: its weight is 0, but 0 times what an unused slot holds might be NaN.
template <class Element, int ROWS, int VECTORS, bool FETCH>
void value_pairs(const float* weights, const Element* const* pages, int v_dim, Format format, const Seen& seen,
                 int dimension, float* out, int stride, const float* start, const Ahead& ahead) {
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
    // A pair of tokens that some rows do not see, or half.
    const auto add_masked = [&](int pair, const auto& line) __attribute__((always_inline)) {
        __m512i values[VECTORS];
#pragma GCC unroll 8
        for (int vector = 0; vector < VECTORS; ++vector) values[vector] = line(vector);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
            const auto sees = [&](int token) { return token >= seen.first[row] && token < seen.last[row]; };
            const unsigned even = sees(2 * pair) ? 0xFFFFu : 0u;
            const unsigned tokens = even | (sees(2 * pair + 1) ? ~0xFFFFu : 0u);
            if (tokens == 0) continue;
            const __m512i kept = _mm512_set1_epi32(static_cast<int>(tokens));
            const __m512bh weight = weight_of(row, pair);
#pragma GCC unroll 8
            for (int vector = 0; vector < VECTORS; ++vector) {
                add(row, vector, _mm512_and_si512(values[vector], kept), weight);
            }
        }
    };
    const auto [first, past] = seen.by_all(IS_CODE<Element> ? 4 : 2);
    const int whole_begin = first / 2, whole_end = past / 2, end = (seen.highest + 1) / 2;
    int pair = seen.lowest / 2;
    if constexpr (IS_CODE<Element>) {
        constexpr int PAGE_QUADS = PAGE_PAIRS / 2;
        const QuadDecoder<Element, false> decoder(code_table(format));
        const int across = v_dim / LANES, last_fetched = ahead.lines / VECTORS * VECTORS;
        while (pair < end) {
            const int page = pair / PAGE_PAIRS;
            const int quad = pair % PAGE_PAIRS / 2 * across + dimension / LANES;
            const auto* from = reinterpret_cast<const std::uint8_t*>(pages[page]) + quad * decoder.BYTES;
            if (pair < whole_begin || pair >= whole_end) {
                add_masked(pair, [&](int vector) __attribute__((always_inline)) {
                    __m512i even, odd;
                    decoder.decode(from + vector * decoder.BYTES, even, odd);
                    return pair % 2 == 0 ? even : odd;
                });
                ++pair;
                continue;
            }
            ahead.fetch<VECTORS>(page, quad);
            if (quad == 0) ahead.fetch_from(page, std::min(last_fetched, PAGE_QUADS * across));
#pragma GCC unroll 8
            for (int vector = 0; vector < VECTORS; ++vector) {
                __m512i even, odd;
                decoder.decode(from + vector * decoder.BYTES, even, odd);
#pragma GCC unroll 8
                for (int row = 0; row < ROWS; ++row) {
                    add(row, vector, even, weight_of(row, pair));
                    add(row, vector, odd, weight_of(row, pair + 1));
                }
            }
            pair += 2;
        }
    } else {
        while (pair < end) {
            const int page = pair / PAGE_PAIRS;
            const Bfloat* from = pages[page] + 2 * (pair % PAGE_PAIRS * v_dim + dimension);
            const auto line = [&](int vector) __attribute__((always_inline)) {
                return _mm512_loadu_si512(from + 2 * vector * LANES);
            };
            if (pair < whole_begin || pair >= whole_end) {
                add_masked(pair, line);
                ++pair;
                continue;
            }
            const int page_end = std::min(whole_end, (page + 1) * PAGE_PAIRS);
            const float* weight = weights + pair / LANES * 2 * LANES + pair % LANES;
            for (; pair < page_end; ++pair, ++weight, from += 2 * v_dim) {
                if (FETCH) ahead.fetch<VECTORS>(page, (pair % PAGE_PAIRS * v_dim + dimension) / LANES);
                __m512i values[VECTORS];
#pragma GCC unroll 8
                for (int vector = 0; vector < VECTORS; ++vector) values[vector] = line(vector);
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
    each_sum(sums, [&](int row, int vector) {
        store(out + row * stride + dimension + vector * LANES, sums[row][vector]);
        return sums[row][vector];
    });
}
#endif

// Dimensions begin <= d < end of pages that have v_dim. Only whole tiles have a variant that does not fetch, as in
// attention_scores.cpp.
template <class Element, bool FETCH, int ROWS, int VECTORS = vectors_at_once(ROWS)>
__attribute__((noinline)) void value_rows(const float* weights, const Element* const* pages, int v_dim,
                                          Format format, const Seen& seen, int begin, int end, float* out,
                                          int stride, const float* start, const Ahead& ahead) {
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
            value_rows<Element, true, ROWS, VECTORS / 2>(weights, pages, v_dim, format, seen, begin, end, out,
                                                         stride, start, ahead);
        }
    }
}

// Tokens first[row] <= t < last[row] for each of 1 <= rows <= ROWS rows.
template <class Element, bool FETCH, int ROWS = VALUE_ROWS>
void value_block(const float* weights, int rows, const Element* const* pages, int v_dim, Format format,
                 const int* first, const int* last, int begin, int end, float* out, int stride, const float* start,
                 const Ahead& ahead) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            value_block<Element, true, ROWS - 1>(weights, rows, pages, v_dim, format, first, last, begin, end, out,
                                                 stride, start, ahead);
            return;
        }
    }
    value_rows<Element, FETCH, ROWS>(weights, pages, v_dim, format, seen_together<ROWS>(first, last), begin,
                                     end, out, stride, start, ahead);
}

}  // namespace

template <class Element>
void weigh_rows(const float* weights, const Rows& rows, const Element* const* pages, int v_dim, Format format,
                int dim_begin, int dim_end, float* out, int stride, const float* start, const Ahead& ahead) {
    const Ahead nothing{};
    for (int row = rows.begin; row < rows.end; row += VALUE_ROWS) {
        const bool fetch = row == rows.begin && ahead.lines > 0;
        const auto weigh = fetch ? value_block<Element, true> : value_block<Element, IS_CODE<Element>>;
        weigh(weights + row * SEGMENT_TOKENS, std::min(VALUE_ROWS, rows.end - row), pages, v_dim, format,
              rows.first + row, rows.last + row, dim_begin, dim_end, out + row * stride, stride,
              start == nullptr ? nullptr : start + row, fetch ? ahead : nothing);
    }
}

#define LOWBIT_INSTANTIATE(Element)                                                                             \
    template void weigh_rows(const float*, const Rows&, const Element* const*, int, Format, int, int, float*, int, \
                             const float*, const Ahead&);
LOWBIT_ATTENTION_ELEMENTS(LOWBIT_INSTANTIATE)

}  // namespace lowbit
