// Attention's products on AMX tiles: scores and weighted values of bfloat16 and of narrow pages (attention_tiles.h).
//
// Rows of queries, and of softmax weights, lie as A reads them. B is 32 dimensions of a page's keys, which a page of
// bfloat16 holds as they are; or 32 tokens of 16 dimensions of values, a line a pair of tokens: two pages' lines, which
// are copied together because a tile has one stride. Narrow pages are decoded on the way.
//
// The order of sums is the instruction's: of up to 32 columns the even ones and the odd ones in a chain each, both
// added, then added to C. Which columns meet in a product is fixed by their places, dimensions of a group of scales or
// tokens of two pages, and a row of C knows nothing of the others. One row and many take the same products.
//
// A product's 32 tokens may be such as a row does not see, before its window or after itself. Their weights are 0, and
// their values must then be finite: what no row of a call sees becomes 0, and where a value that only some of them see
// is not finite, each row is computed by itself. Products that are 0 change no sum but the sign of a zero, and a sum
// that is a zero is stored as +0.
//
// Nothing is fetched ahead but where pages have 4 bits a number: wider ones are streams to the hardware's prefetcher,
// and were read up to a fifth faster without the instructions (Emerald Rapids).
#include "attention_tiles.h"

#if defined(LOWBIT_AMX)

#include <cstring>
#include <utility>

#include "amx_tiles.h"

#define INLINED __attribute__((always_inline))  // of lambdas, which would become functions where called twice

namespace lowbit {
namespace {

constexpr int DEPTH = 2 * TILE_ROWS;  // dimensions or tokens that a product sums
constexpr int PAGE_PAIRS = PAGE_TOKENS / 2;
constexpr int FEW_PAGES = 4;           // for these it is not worth while to bring queries into another order
constexpr int MAX_GROUPS_OF_ROWS = 3;  // that share a B: C has four tiles
constexpr long ROW_BYTES = SEGMENT_TOKENS * static_cast<long>(sizeof(float));
static_assert(TILE_ROWS == LANES && TILE_LINE == CACHE_LINE && ROWS_OF_TILE == TILE_ROWS);

constexpr int at_once(int groups) { return groups == 1 ? 4 : groups == 2 ? 2 : 1; }  // Bs that share an A

struct alignas(64) Tile {
    Bfloat lines[TILE_ROWS][2 * LANES];
};
struct alignas(64) Sums {
    float rows[TILE_ROWS][LANES];
};

// Calls each(0), each(1) …, numbers that a tile's name may be made of.
template <int... NUMBERS, class Each>
INLINED inline void unrolled(std::integer_sequence<int, NUMBERS...>, const Each& each) {
    (each(std::integral_constant<int, NUMBERS>{}), ...);
}
template <int COUNT, class Each>
INLINED inline void unrolled(const Each& each) {
    unrolled(std::make_integer_sequence<int, COUNT>{}, each);
}

// C <- C + A B for GROUPS tiles of rows and COUNT Bs: those of group g and B b in tile g * COUNT + b.
template <int GROUPS, int COUNT, class LoadB>
INLINED inline void multiply(const float* a, long stride, const LoadB& load_b) {
    static_assert(GROUPS * COUNT <= 4 && (GROUPS <= 2 || COUNT == 1));
    const auto load_a = [&](auto group) INLINED {
        constexpr int TILE = 4 + group % 2;
        tile_load<TILE>(reinterpret_cast<const char*>(a) + group * TILE_ROWS * stride, stride);
        tile_pause();
    };
    if constexpr (COUNT > 1) unrolled<GROUPS>(load_a);
    unrolled<COUNT>([&](auto which) INLINED {
        constexpr int B = 6 + which % 2;
        load_b(which, std::integral_constant<int, B>{});
        unrolled<GROUPS>([&](auto group) INLINED {
            if constexpr (COUNT == 1) load_a(group);
            tile_dot_bfloats<group * COUNT + which, 4 + group % 2, B>();
            tile_pause();
        });
    });
}

// Tiles of so many rows or of more: to configure costs more than to read and write these.
void configure_rows(int rows) {
    rows = std::min(rows, TILE_ROWS);
    if (configured_tiles() < rows) configure_tiles(rows);
}

// Whether the pages that are read next are fetched.
template <class Element>
constexpr bool FETCHES = std::is_same_v<Element, Code4>;

template <class Element>
const CodeTable* table_of([[maybe_unused]] Format format) {
    if constexpr (IS_CODE<Element>) return &code_table(format);
    return nullptr;
}

// What a product sums of the dimensions: those of a group of scales that lie in one line of A.
struct Part {
    int line;          // of A
    int begin, end;    // rows of B; the others are zeros
    int dimension;     // where the group begins
    bool first, last;  // of the group
};

struct Parts {
    int count = 0;
    Part parts[MAX_K_DIM / DEPTH + MAX_GROUPS];

    Parts(int k_dim, int group) {
        for (int begin = 0; begin < k_dim; begin += group) {
            const int end = std::min(begin + group, k_dim);
            for (int line = begin / DEPTH; line * DEPTH < end; ++line) {
                const int from = std::max(begin - line * DEPTH, 0), to = std::min(end - line * DEPTH, DEPTH);
                parts[count++] = {line, from / 2, to / 2, begin, line == begin / DEPTH, (line + 1) * DEPTH >= end};
            }
        }
    }
};

// B of the keys of page `number`, as it lies or made in `made`.
template <class Element>
INLINED inline const void* keys_of(const Element* page, const Part& part, const CodeTable* table, const Ahead& ahead,
                                   int number, Tile& made) {
    const bool whole = part.begin == 0 && part.end == TILE_ROWS;
    if constexpr (!IS_CODE<Element>) {
        const Element* const lies = page + part.line * TILE_ROWS * 2 * LANES;
        if (whole) return lies;
        for (int row = part.begin; row < part.end; ++row) {
            _mm512_store_si512(made.lines[row], _mm512_loadu_si512(lies + row * 2 * LANES));
        }
    } else {
        const QuadDecoder<Element, true> decoder(*table);
        const auto* from = reinterpret_cast<const std::uint8_t*>(page) + part.line * TILE_ROWS / 2 * decoder.BYTES;
        for (int row = part.begin; row < part.end; row += 2) {
            __m512i first, second;
            if (FETCHES<Element>) ahead.fetch<1>(number, (part.line * TILE_ROWS + row) / 2);
            decoder.decode(from + row / 2 * decoder.BYTES, first, second);
            _mm512_store_si512(made.lines[row], first);
            _mm512_store_si512(made.lines[row + 1], second);
        }
    }
    if (!whole) {
        for (int row = 0; row < TILE_ROWS; ++row) {
            if (row < part.begin || row >= part.end) _mm512_store_si512(made.lines[row], _mm512_setzero_si512());
        }
    }
    return &made;
}

// What all of a call's products of queries and keys have in common.
struct Scoring {
    const Parts& parts;
    const Scales& scales;
    const Queries& queries;
    const CodeTable* table;  // of narrow pages
    const Ahead& ahead;
    int words;  // of a row of queries
    int end;    // of the rows
    int quads;  // of a narrow page
    float* scores;
};

// A page's products with a group, `count` rows of them, go to the scores of rows from `row` on, times their scales.
INLINED inline void scale_products(const Scoring& all, const Part& part, const Sums& products, int from, int row,
                                   int count, int page) {
    const Scales& scales = all.scales;
    const Bfloat* const mine = scales.of(page, part.dimension);
    const Vector16 scale = load_bfloats(mine), low = scales.lows ? load_bfloats(mine + PAGE_TOKENS) : zeros();
    for (int which = 0; which < count; ++which) {
        float* const to = all.scores + (row + which) * SEGMENT_TOKENS + page * PAGE_TOKENS;
        Vector16 total = part.dimension == 0 ? zeros() : load(to);
        if (scales.lows) {
            const float sum = all.queries.sums[(row + which) * MAX_GROUPS + part.dimension / scales.group];
            total = fma(low, broadcast(sum), total);
        }
        store(to, fma(scale, load(products.rows[from + which]), total));
    }
}

// Calls multiply(number of a part, pages' Bs, the first of PAGES pages) for all parts of `count` pages, a multiple of
// PAGES. What is made is made one ahead: a tile does not load what is still on its way to the cache.
template <class Element, int PAGES, class Multiply>
INLINED inline void for_parts(const Scoring& all, const Parts& parts, const Element* const* pages, int page, int count,
                              const Multiply& multiply) {
    Tile made[2][PAGES];
    const void* tiles[2][PAGES];
    const auto make = [&](int number, int first, int place) INLINED {
        for (int which = 0; which < PAGES; ++which) {
            const int here = first + which;
            Tile& tile = made[place][which];
            tiles[place][which] = keys_of(pages[here], parts.parts[number], all.table, all.ahead, here, tile);
            if (FETCHES<Element> && number == 0) all.ahead.fetch_from(here, all.quads);  // what no quad fetches
        }
    };
    make(0, page, 0);
    for (int number = 0, place = 0, past = page + count; page < past; place ^= 1) {
        const bool last = number + 1 == parts.count;
        const int next = last ? 0 : number + 1, next_page = last ? page + PAGES : page;
        if (next_page < past) make(next, next_page, place ^ 1);
        multiply(number, tiles[place], page);
        number = next, page = next_page;
    }
}

// Scores of GROUPS tiles of rows from `row` on with `count` pages from `page` on, a multiple of PAGES.
template <class Element, int GROUPS, int PAGES>
void score_tiles(const Scoring& all, const Element* const* pages, int row, int page, int count) {
    const auto multiply_part = [&](int number, const void* const* tiles, int first) INLINED {
        const Part& part = all.parts.parts[number];
        if (part.first) unrolled<GROUPS * PAGES>([](auto tile) INLINED { tile_zero<tile>(); });
        const float* const a = all.queries.words + row * all.words + part.line * QUERY_LINE;
        multiply<GROUPS, PAGES>(a, all.words * 4L,
                                [&](auto which, auto tile) INLINED { tile_load<tile>(tiles[which], TILE_LINE); });
        if (!part.last) return;
        unrolled<GROUPS * PAGES>([&](auto tile) INLINED {
            constexpr int GROUP = tile / PAGES, WHICH = tile % PAGES;
            const int begin = row + GROUP * TILE_ROWS;
            if (all.scales.group == 0) {
                tile_store<tile>(all.scores + begin * SEGMENT_TOKENS + (first + WHICH) * PAGE_TOKENS, ROW_BYTES);
                return;
            }
            Sums products;
            tile_store<tile>(products.rows, TILE_LINE);
            scale_products(all, part, products, 0, begin, std::min(TILE_ROWS, all.end - begin), first + WHICH);
        });
    };
    for_parts<Element, PAGES>(all, all.parts, pages, page, count, multiply_part);
}

// The same for any count of pages.
template <class Element, int GROUPS, int PAGES = at_once(GROUPS)>
void score_pages(const Scoring& all, const Element* const* pages, int row, int page, int count) {
    const int whole = count / PAGES * PAGES;
    if (whole > 0) score_tiles<Element, GROUPS, PAGES>(all, pages, row, page, whole);
    if constexpr (PAGES > 1) {
        if (whole < count) score_pages<Element, GROUPS, PAGES / 2>(all, pages, row, page + whole, count - whole);
    }
}

// Two groups of scales a line, and up to eight rows: A has each row twice, with zeros for one group's dimensions and
// for the other's, so that one product yields both groups' sums.
template <class Element, int PAGES = 4>
void score_halves(const Scoring& all, const Parts& lines, const float* twice, const Element* const* pages, int row,
                  int page, int count) {
    const int rows = all.end - row;
    const int whole = count / PAGES * PAGES;
    const auto multiply_line = [&](int line, const void* const* tiles, int first) INLINED {
        unrolled<PAGES>([](auto tile) INLINED { tile_zero<tile>(); });
        multiply<1, PAGES>(twice + line * TILE_ROWS * QUERY_LINE, TILE_LINE,
                           [&](auto which, auto tile) INLINED { tile_load<tile>(tiles[which], TILE_LINE); });
        unrolled<PAGES>([&](auto tile) INLINED {
            Sums products;
            tile_store<tile>(products.rows, TILE_LINE);
            for (int half = 0; half < 2; ++half) {
                scale_products(all, all.parts.parts[2 * line + half], products, half * rows, row, rows, first + tile);
            }
        });
    };
    if (whole > 0) for_parts<Element, PAGES>(all, lines, pages, page, whole, multiply_line);
    if constexpr (PAGES > 1) {
        if (whole < count) {
            score_halves<Element, PAGES / 2>(all, lines, twice, pages, row, page + whole, count - whole);
        }
    }
}

template <class Element>
void score_few(const Scoring& all, int k_dim, const Element* const* pages, int row, int page, int count) {
    alignas(64) float twice[MAX_K_DIM / DEPTH * TILE_ROWS * QUERY_LINE];
    const int rows = all.end - row;
    for (int line = 0; line < k_dim / DEPTH; ++line) {
        float* const to = twice + line * TILE_ROWS * QUERY_LINE;
        for (int which = 0; which < rows; ++which) {
            const __m512i words = _mm512_loadu_si512(all.queries.words + (row + which) * all.words + line * QUERY_LINE);
            _mm512_store_si512(to + which * QUERY_LINE, _mm512_maskz_mov_epi32(0x00FF, words));
            _mm512_store_si512(to + (rows + which) * QUERY_LINE, _mm512_maskz_mov_epi32(0xFF00, words));
        }
    }
    configure_rows(2 * rows);
    score_halves<Element>(all, Parts(k_dim, k_dim), twice, pages, row, page, count);
}

// What all of a call's products of weights and values have in common.
struct Weighing {
    const float* weights;
    const int *first, *last;  // that rows see
    int v_dim;
    const CodeTable* table;  // of narrow pages
    float* out;
    int stride;
    const float* start;
    const Ahead& ahead;
    int dim_end;
};

// Pairs of a page's tokens, STRIPS times 16 dimensions, as half of each of STRIPS Bs.
template <class Element, int STRIPS>
INLINED inline void copy_values(const Element* page, int number, const Weighing& all, int dimension, Tile* to) {
    const int half = number % SUMMED_PAGES;
    for (int pair = 0; pair < PAGE_PAIRS; pair += IS_CODE<Element> ? 2 : 1) {
        const int row = half * PAGE_PAIRS + pair;
        if constexpr (!IS_CODE<Element>) {
            const Element* const from = page + 2 * (pair * all.v_dim + dimension);
#pragma GCC unroll 4
            for (int strip = 0; strip < STRIPS; ++strip) {
                _mm512_store_si512(to[strip].lines[row], _mm512_loadu_si512(from + 2 * strip * LANES));
            }
        } else {
            const QuadDecoder<Element, false> decoder(*all.table);
            const int quad = (pair / 2 * all.v_dim + dimension) / LANES;
            const auto* from = reinterpret_cast<const std::uint8_t*>(page) + quad * decoder.BYTES;
            if (FETCHES<Element>) all.ahead.template fetch<STRIPS>(number, quad);
            if (FETCHES<Element> && quad == 0) {  // what no quads fetch
                const int fetched = all.ahead.lines / STRIPS * STRIPS;
                all.ahead.fetch_from(number, std::min(fetched, PAGE_PAIRS / 2 * all.v_dim / LANES));
            }
#pragma GCC unroll 4
            for (int strip = 0; strip < STRIPS; ++strip) {
                __m512i even, odd;
                decoder.decode(from + strip * decoder.BYTES, even, odd);
                _mm512_store_si512(to[strip].lines[row], even);
                _mm512_store_si512(to[strip].lines[row + 1], odd);
            }
        }
    }
}

// Tokens begin <= t < end stay, the others become 0.
void keep_tokens(Tile* tiles, int count, int begin, int end) {
    for (int row = 0; row < TILE_ROWS; ++row) {
        const auto seen = [&](int token) { return token >= begin && token < end; };
        if (seen(2 * row) && seen(2 * row + 1)) continue;
        const unsigned kept = (seen(2 * row) ? 0xFFFFu : 0u) | (seen(2 * row + 1) ? ~0xFFFFu : 0u);
        const __m512i mask = _mm512_set1_epi32(static_cast<int>(kept));
        for (int which = 0; which < count; ++which) {
            Bfloat* const line = tiles[which].lines[row];
            _mm512_store_si512(line, _mm512_and_si512(_mm512_load_si512(line), mask));
        }
    }
}

bool finite(const Tile* tiles, int count) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 not_finite = 0;
    for (int which = 0; which < count; ++which) {
        for (const auto& line : tiles[which].lines) {
            const __m512i here = _mm512_and_si512(_mm512_load_si512(line), exponent);
            not_finite |= _mm512_cmpeq_epi16_mask(here, exponent);
        }
    }
    return not_finite == 0;
}

// Weighted values of rows begin <= row < end, GROUPS tiles of them, and STRIPS times 16 dimensions. False: not done,
// because a value that only some of the rows see is not finite.
template <class Element, int GROUPS, int STRIPS>
bool weigh_tiles(const Weighing& all, const Element* const* pages, int begin, int end, int dimension) {
    int lowest = SEGMENT_TOKENS, all_begin = 0, all_end = SEGMENT_TOKENS, highest = 0;
    bool from_zero = all.start != nullptr;
    for (int row = begin; row < end; ++row) {
        lowest = std::min(lowest, all.first[row]), all_begin = std::max(all_begin, all.first[row]);
        highest = std::max(highest, all.last[row]), all_end = std::min(all_end, all.last[row]);
        from_zero = from_zero && all.start[row] == 0.0f;
    }
    const auto for_rows = [&](int tile, const auto& each) INLINED {  // of a C: its row, where its sums are
        const int first = begin + tile / STRIPS * TILE_ROWS, past = std::min(first + TILE_ROWS, end);
        for (int row = first; row < past; ++row) {
            each(row, row - first, all.out + row * all.stride + dimension + tile % STRIPS * LANES);
        }
    };
    unrolled<GROUPS * STRIPS>([&](auto tile) INLINED {
        if (from_zero) return tile_zero<tile>();
        Sums sums;
        for_rows(tile, [&](int row, int here, const float* out) INLINED {
            store(sums.rows[here], all.start != nullptr ? broadcast(all.start[row]) : load(out));
        });
        tile_load<tile>(sums.rows, TILE_LINE);
    });
    Tile made[2][STRIPS];
    // False: they are not finite.
    const auto make = [&](int token, Tile* tiles) INLINED {
        for (int half = 0; half < 2; ++half) {
            const int page = token / PAGE_TOKENS + half;
            if (page * PAGE_TOKENS < highest && (page + 1) * PAGE_TOKENS > lowest) {
                copy_values<Element, STRIPS>(pages[page], page, all, dimension, tiles);
            } else {
                for (int which = 0; which < STRIPS; ++which) {
                    std::memset(tiles[which].lines[half * PAGE_PAIRS], 0, sizeof(Tile) / 2);
                }
            }
        }
        if (token < lowest || token + DEPTH > highest) keep_tokens(tiles, STRIPS, lowest - token, highest - token);
        const bool all_see = (token >= all_begin || lowest == all_begin) &&
                             (token + DEPTH <= all_end || all_end == highest);  // or none does
        return all_see || finite(tiles, STRIPS);
    };
    // One ahead: a tile does not load what is still on its way to the cache.
    const auto tiles_of = [&](int token) { return made[token / DEPTH % 2]; };
    int token = lowest / DEPTH * DEPTH;
    if (!make(token, tiles_of(token))) return false;
    for (; token < highest; token += DEPTH) {
        if (token + DEPTH < highest && !make(token + DEPTH, tiles_of(token + DEPTH))) return false;
        const Tile* const tiles = tiles_of(token);
        multiply<GROUPS, STRIPS>(all.weights + begin * WEIGHTS_ROW<Element> + token / 2,
                                 WEIGHTS_ROW<Element> * 4L,
                                 [&](auto which, auto tile) INLINED { tile_load<tile>(&tiles[which], TILE_LINE); });
    }
    unrolled<GROUPS * STRIPS>([&](auto tile) INLINED {
        Sums sums;
        tile_store<tile>(sums.rows, TILE_LINE);
        for_rows(tile, [&](int, int here, float* out) INLINED { store(out, add(load(sums.rows[here]), zeros())); });
    });
    return true;
}

// The same for all dimensions.
template <class Element, int GROUPS, int STRIPS = at_once(GROUPS)>
void weigh_strips(const Weighing& all, const Element* const* pages, int begin, int end, int dimension) {
    for (; dimension + STRIPS * LANES <= all.dim_end; dimension += STRIPS * LANES) {
        if (weigh_tiles<Element, GROUPS, STRIPS>(all, pages, begin, end, dimension)) continue;
        for (int row = begin; row < end; ++row) {
            weigh_tiles<Element, 1, STRIPS>(all, pages, row, row + 1, dimension);
        }
    }
    if constexpr (STRIPS > 1) {
        if (dimension < all.dim_end) {
            weigh_strips<Element, GROUPS, STRIPS / 2>(all, pages, begin, end, dimension);
        }
    }
}

// Calls each(tiles that so many rows fill, as a constant).
template <class Each>
INLINED inline void for_groups(int rows, const Each& each) {
    if (rows <= TILE_ROWS) return each(std::integral_constant<int, 1>{});
    if (rows <= 2 * TILE_ROWS) return each(std::integral_constant<int, 2>{});
    each(std::integral_constant<int, MAX_GROUPS_OF_ROWS>{});
}

}  // namespace

template <class Element>
void score_rows(const Queries& queries, const Rows& rows, const Element* const* pages, int page_begin, int page_end,
                int k_dim, const Scales& scales, float* scores, const Ahead& ahead) {
    const Parts parts(k_dim, scales.group > 0 ? scales.group : k_dim);
    const CodeTable* const table = table_of<Element>(scales.format);
    const Scoring all{parts, scales, queries, table, ahead, query_words<Element>(k_dim), rows.end, k_dim / 4, scores};
    const bool few = 2 * (rows.end - rows.begin) <= TILE_ROWS && page_end - page_begin > FEW_PAGES;
    if (few && scales.group == DEPTH / 2 && k_dim % DEPTH == 0) {
        return score_few<Element>(all, k_dim, pages, rows.begin, page_begin, page_end - page_begin);
    }
    const bool one_tile = rows.end - rows.begin <= TILE_ROWS;  // of as many rows as there are
    configure_rows(rows.end - rows.begin);
    int from = rows.begin, to = one_tile ? rows.end : rows.begin;
    for (int page = page_begin; page < page_end;) {
        if (!one_tile) {
            while (from < rows.end && rows.last[from] <= page * PAGE_TOKENS) ++from;  // rows before these pages
            while (to < rows.end && rows.first[to] < (page + 1) * PAGE_TOKENS) ++to;
        }
        const int count = one_tile ? page_end - page : 1;
        for_groups(to - from, [&](auto groups) { score_pages<Element, groups>(all, pages, from, page, count); });
        page += count;
    }
}

template <class Element>
void weigh_rows(const float* weights, const Rows& rows, const Element* const* pages, int v_dim, Format format,
                int dim_begin, int dim_end, float* out, int stride, const float* start, const Ahead& ahead) {
    const CodeTable* const table = table_of<Element>(format);
    const Weighing all{weights, rows.first, rows.last, v_dim, table, out, stride, start, ahead, dim_end};
    configure_rows(rows.end - rows.begin);
    for_groups(rows.end - rows.begin, [&](auto groups) {
        weigh_strips<Element, groups>(all, pages, rows.begin, rows.end, dim_begin);
    });
}

#define LOWBIT_INSTANTIATE(Element)                                                                                  \
    template void score_rows(const Queries&, const Rows&, const Element* const*, int, int, int, const Scales&,       \
                             float*, const Ahead&);                                                                  \
    template void weigh_rows(const float*, const Rows&, const Element* const*, int, Format, int, int, float*, int, \
                             const float*, const Ahead&);
LOWBIT_TILED_ELEMENTS(LOWBIT_INSTANTIATE)

}  // namespace lowbit

#endif
