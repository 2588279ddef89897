// Products of whole numbers with x as InputKind::words; see linear_words.h.

#include "linear_kernels.h"
#include "linear_rounded.h"
#if defined(LOWBIT_GRID_VECTORS)
#include <list>
#include <mutex>
#endif

namespace lowbit {
namespace {

// A block's tiles, as decode_words and dot_words_once take them.
template <Codes CODES>
struct PlainTiles {
    PlainTiles(const Walk&, std::int64_t) {}
    INLINE const std::uint8_t* at(const Walk&, const std::uint8_t* codes) const { return codes; }
};

#if defined(LOWBIT_GRID_VECTORS)

template <Codes CODES>
class GridTiles {
  public:
    INLINE GridTiles(const Walk& walk, std::int64_t tiles) : left_(tiles) { indices_[left_ % 2].read(walk.following()); }

    // ``codes``: on which the walk stands.
    INLINE GridTile<CODES> at(const Walk& walk, const std::uint8_t* codes) {
        const GridIndices<CODES>& own = indices_[left_ % 2];
        --left_;
        indices_[left_ % 2].read(left_ > 0 ? walk.following() : codes);
        return {codes, own};
    }

  private:
    std::int64_t left_;
    GridIndices<CODES> indices_[2];
};

template <Codes CODES>
using BlockTiles = std::conditional_t<is_grid(CODES), GridTiles<CODES>, PlainTiles<CODES>>;

#else

template <Codes CODES>
using BlockTiles = PlainTiles<CODES>;

#endif

template <WordKind KIND, int SUB, Addend ADDEND>
struct WordStep {
    const WordTile& w;
    const Walk& walk;
    const Input& x;
    std::int64_t tile;
    float (*totals)[ROWS];

    template <int TOKENS>
    INLINE void operator()(int token) const {
        each_constant<COLUMNS / SUB>([&](auto part) __attribute__((always_inline)) {
            multiply<decltype(part)::value, TOKENS>(token);
        });
    }

  private:
    template <int PART, int TOKENS>
    INLINE void multiply(int token) const {
        const std::int64_t span = (tile * (COLUMNS / SUB) + PART) * x.tokens + token;
        SixteenInts sums[TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) sums[t] = ints_set(KIND == WordKind::wide ? 0 : x.bases[span + t]);
        dot_words<PART * SUB, SUB, TOKENS>(w, x.at<std::int16_t>(tile, token), COLUMNS, sums);
        const float* const x_scales = x.scales + span;
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const float x_sum = ADDEND == Addend::none ? 0.0f : x.sums[span + t];
            const Sixteen total = sixteen_load(totals[token + t]);
            sixteen_store(totals[token + t], add_scaled<ADDEND>(total, sums[t], walk, PART, x_scales[t], x_sum));
        }
    }
};

template <WordKind KIND, int SUB, Addend ADDEND>
TILE_FUNCTION void multiply_tile(const WordTile& w, const Walk& walk, const Input& x, std::int64_t tile,
                                 float (*totals)[ROWS]) {
    for_tokens(x.tokens, WordStep<KIND, SUB, ADDEND>{w, walk, x, tile, totals});
}

// One token: its total stays in registers, and nothing that is decoded goes through memory.
template <Codes CODES, WordKind KIND, int SUB, Addend ADDEND>
__attribute__((noinline)) void multiply_words_once(const Layout& layout, const std::uint8_t* block,
                                                   const Decoding& decoding, const Input& x, float* totals) {
    constexpr int PARTS = COLUMNS / SUB;
    Walk walk(layout, block);
    const Ahead ahead(1);
    Sixteen total = sixteen_load(totals);
#if defined(LOWBIT_AVX512)
    const auto add_tiles = [&](std::int64_t tile, auto count) __attribute__((always_inline)) {
        constexpr int TILES = decltype(count)::value;
        Sixteen scales[TILES][PARTS], addends[TILES][PARTS];
        SixteenInts sums[TILES][PARTS];
        const auto next = [&](int i) __attribute__((always_inline)) {
            const std::uint8_t* const codes = walk.next<CODES, SUB, ADDEND>();
            ahead.fetch(codes, tile_bytes(CODES));
            UNROLL
            for (int part = 0; part < PARTS; ++part) {
                scales[i][part] = walk.scale[part];
                if constexpr (ADDEND != Addend::none) addends[i][part] = walk.addend[part];
            }
            return codes;
        };
        UNROLL
        for (int i = 0; i < TILES * PARTS; ++i) {
            sums[i / PARTS][i % PARTS] = ints_set(KIND == WordKind::wide ? 0 : x.bases[tile * PARTS + i]);
        }
        dot_words_in_turns<CODES, SUB>(next, decoding.word_table(), x.at<std::int16_t>(tile, 0), sums);
        UNROLL
        for (int i = 0; i < TILES * PARTS; ++i) {
            const int own = i / PARTS, part = i % PARTS;
            const float x_sum = ADDEND == Addend::none ? 0.0f : x.sums[tile * PARTS + i];
            const Sixteen scale = sixteen_multiply(scales[own][part], sixteen_set(x.scales[tile * PARTS + i]));
            total = accumulate<ADDEND, true>(total, ints_to_floats(sums[own][part]), scale, addends[own][part], x_sum);
        }
    };
    std::int64_t tile = 0;
    if constexpr (tiles_in_turns(CODES, SUB)) {
        for (; tile + 2 <= layout.tiles; tile += 2) add_tiles(tile, std::integral_constant<int, 2>{});
    }
    for (; tile < layout.tiles; ++tile) add_tiles(tile, std::integral_constant<int, 1>{});
#else
    BlockTiles<CODES> tiles(walk, layout.tiles);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::uint8_t* const codes = walk.next<CODES, SUB, ADDEND>();
        ahead.fetch(codes, tile_bytes(CODES));
        const std::int64_t span = tile * PARTS;
        SixteenInts sums[PARTS];
        UNROLL
        for (int part = 0; part < PARTS; ++part) sums[part] = ints_set(KIND == WordKind::wide ? 0 : x.bases[span + part]);
        dot_words_once<CODES, KIND, SUB>(tiles.at(walk, codes), decoding.table, decoding.words, x.at<std::int16_t>(tile, 0), sums);
        UNROLL
        for (int part = 0; part < PARTS; ++part) {
            const float x_sum = ADDEND == Addend::none ? 0.0f : x.sums[span + part];
            total = add_scaled<ADDEND>(total, sums[part], walk, part, x.scales[span + part], x_sum);
        }
    }
#endif
    sixteen_store(totals, total);
}

#if defined(LOWBIT_AVX512)

template <Codes CODES, WordKind KIND, int SUB, Addend ADDEND>
INLINE void multiply_words_many(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                                float (*totals)[ROWS]) {
    Walk walk(layout, block);
    const Ahead ahead(x.tokens);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        WordTile w;
        const std::uint8_t* const codes = walk.next<CODES, SUB, ADDEND>();
        ahead.fetch(codes, tile_bytes(CODES));
        if (x.tokens >= FETCHING_TOKENS) fetch_results(x, tile, layout.tiles);
        decode_words<CODES, KIND>(codes, decoding.word_table(), decoding.words, w);
        multiply_tile<KIND, SUB, ADDEND>(w, walk, x, tile, totals);
    }
}

#else

// Whether something may be added to numbers of this kind: by_addend below.
constexpr bool takes_addends(Codes codes, WordKind kind) {
    return kind == WordKind::line || (kind == WordKind::wide && codes != Codes::bits6);
}

// A tile lies in memory here, and what multiplies it is called (TILE_FUNCTION): for which addend may as well be asked then.
template <Codes CODES, WordKind KIND, int SUB, bool ADDENDS>
__attribute__((noinline)) void multiply_words_of_any_addend(const Layout& layout, const std::uint8_t* block,
                                                            const Decoding& decoding, const Input& x, float (*totals)[ROWS]) {
    Walk walk(layout, block);
    const Ahead ahead(x.tokens);
    BlockTiles<CODES> tiles(walk, layout.tiles);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        WordTile w;
        const std::uint8_t* codes;
        if constexpr (ADDENDS) codes = walk.next_of_any_addend<CODES, SUB>();
        else codes = walk.next<CODES, SUB, Addend::none>();
        ahead.fetch(codes, tile_bytes(CODES));
        if (x.tokens >= FETCHING_TOKENS) fetch_results(x, tile, layout.tiles);
        decode_words<CODES, KIND>(tiles.at(walk, codes), decoding.word_table(), decoding.words, w);
        if (!ADDENDS || layout.addend == Addend::none) multiply_tile<KIND, SUB, Addend::none>(w, walk, x, tile, totals);
        else if (layout.addend == Addend::offset) multiply_tile<KIND, SUB, Addend::offset>(w, walk, x, tile, totals);
        else multiply_tile<KIND, SUB, Addend::zero>(w, walk, x, tile, totals);
    }
}

template <Codes CODES, WordKind KIND, int SUB, Addend>
INLINE void multiply_words_many(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                                float (*totals)[ROWS]) {
    multiply_words_of_any_addend<CODES, KIND, SUB, takes_addends(CODES, KIND)>(layout, block, decoding, x, totals);
}

#endif

template <Codes CODES, WordKind KIND, int SUB, Addend ADDEND>
void multiply_words(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                    float (*totals)[ROWS]) {
    if (x.tokens == 1) {
        multiply_words_once<CODES, KIND, SUB, ADDEND>(layout, block, decoding, x, totals[0]);
        return;
    }
    multiply_words_many<CODES, KIND, SUB, ADDEND>(layout, block, decoding, x, totals);
}

// E8P in two codes: a tile of each book's, whose numbers are added.
constexpr std::int64_t BOOK_BYTES = tile_bytes(Codes::e8p);

#if defined(LOWBIT_AVX512)

struct PairTables {
    explicit PairTables(const Decoding& decoding) : table(decoding.table) {}
    const Table& table;  // each book's numbers
};

// each(number of the pair of columns, its operand).
template <class Each>
INLINE void each_pair(const std::uint8_t* tile, const PairTables& tables, const Each& each) {
    const std::uint8_t* const books[] = {tile, tile + BOOK_BYTES};
    __m512i nibbles[2][OPERANDS / 2];
    expand_grid<Codes::e8p>(books, tables.table.behind, nibbles);
    each_constant<PAIRS>([&](auto pair) __attribute__((always_inline)) {
        constexpr int OPERAND = operand_of(decltype(pair)::value), LINE = OPERAND / 4 * 2 + OPERAND % 2;
        constexpr int RIGHT = OPERAND % 4 / 2 * 4 + side_of(decltype(pair)::value) * 8;
        const __m512i first = _mm512_permutexvar_epi16(shifted(nibbles[0][LINE], RIGHT), tables.table.low);
        const __m512i second = _mm512_permutexvar_epi16(shifted(nibbles[1][LINE], RIGHT), tables.table.high);
        each(pair, _mm512_add_epi16(first, second));
    });
}

INLINE void decode_pairs(const std::uint8_t* tile, const PairTables& tables, WordTile& w) {
    each_pair(tile, tables, [&](auto pair, __m512i both) __attribute__((always_inline)) { w[decltype(pair)::value] = both; });
}

INLINE SixteenInts dot_pairs_once(const std::uint8_t* tile, const PairTables& tables, const std::int16_t* x) {
    __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    each_pair(tile, tables, [&](auto pair, __m512i both) __attribute__((always_inline)) {
        constexpr int PAIR = decltype(pair)::value;
        std::int32_t two;
        std::memcpy(&two, x + PAIR * 2, sizeof two);
        sums[PAIR % 2] = _mm512_dpwssd_epi32(sums[PAIR % 2], both, _mm512_set1_epi32(two));
    });
    return _mm512_add_epi32(sums[0], sums[1]);
}

#elif defined(LOWBIT_GRID_VECTORS)

struct PairTables {
    explicit PairTables(const Decoding& decoding)
        : grid(*decoding.words.grid), times{decoding.words.times, book_share(decoding.weight->table + 32)} {}
    const GridVectors& grid;
    const int times[2];  // 186 at most (LARGEST_OF_PAIR / 11), as an unsigned byte
};

// each(pair of columns, half of the rows, their numbers).
template <class Each>
INLINE void each_pair(const std::uint8_t* tile, const PairTables& tables, const Each& each) {
    const GridIndices<Codes::e8p> bytes{};
    const GridTile<Codes::e8p> books[] = {{tile, bytes}, {tile + BOOK_BYTES, bytes}};
    const auto add = [&](auto index, auto half, __m256i one, __m256i other) __attribute__((always_inline)) {
        each_constant<2>([&](auto side) __attribute__((always_inline)) {
            constexpr int SIDE = decltype(side)::value, PAIR = pair_of(decltype(index)::value, SIDE);
            each(std::integral_constant<int, PAIR>{}, half,
                 _mm256_add_epi16(grid_words<SIDE>(one, tables.times[0]), grid_words<SIDE>(other, tables.times[1])));
        });
    };
    each_pair_operand(books, tables.grid, add);
}

template <class Half>
INLINE __m256i& half_of(SixteenInts& sixteen, Half half) {
    return half == 0 ? sixteen.low : sixteen.high;
}

INLINE void decode_pairs(const std::uint8_t* tile, const PairTables& tables, WordTile& w) {
    each_pair(tile, tables, [&](auto pair, auto half, __m256i both) __attribute__((always_inline)) {
        half_of(w[pair], half) = both;
    });
}

INLINE SixteenInts dot_pairs_once(const std::uint8_t* tile, const PairTables& tables, const std::int16_t* x) {
    SixteenInts sums = ints_set(0);
    each_pair(tile, tables, [&](auto pair, auto half, __m256i both) __attribute__((always_inline)) {
        __m256i& sum = half_of(sums, half);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(both, two_words(x + pair * 2)));
    });
    return sums;
}

#else

struct PairTables {
    explicit PairTables(const Decoding& decoding)
        : table(decoding.table), first(decoding.words), second(decoding.weight->table + 32) {}
    const Table& table;
    const WordCodes& first;
    WordCodes second;
};

INLINE void decode_pairs(const std::uint8_t* tile, const PairTables& tables, WordTile& w) {
    alignas(64) std::uint8_t nibbles[tile_bytes(Codes::bits4)];
    WordTile more;
    expand_grid<Codes::e8p>(tile, tables.table.behind, nibbles);
    decode_words<Codes::bits4, WordKind::wide>(nibbles, tables.table, tables.first, w);
    expand_grid<Codes::e8p>(tile + BOOK_BYTES, tables.table.behind, nibbles);
    decode_words<Codes::bits4, WordKind::wide>(nibbles, tables.table, tables.second, more);
    for (int column = 0; column < COLUMNS; ++column) {
        std::int16_t *const to = w.columns[column], *const from = more.columns[column];
        for (int row = 0; row < ROWS; ++row) to[row] = static_cast<std::int16_t>(to[row] + from[row]);
    }
}

INLINE SixteenInts dot_pairs_once(const std::uint8_t* tile, const PairTables& tables, const std::int16_t* x) {
    WordTile w;
    decode_pairs(tile, tables, w);
    return dot_tile(w, x);
}

#endif

void multiply_pairs(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                    float (*totals)[ROWS]) {
    const PairTables tables(decoding);
    const Tiles tiles{block, 2 * BOOK_BYTES, 0, layout.tiles};
    if (x.tokens == 1) {
        const auto dot = [&](const std::uint8_t* tile, const std::int16_t* columns) __attribute__((always_inline)) {
            return dot_pairs_once(tile, tables, columns);
        };
        sixteen_store(totals[0], add_tiles(sixteen_load(totals[0]), tiles, x, dot));
    } else {
        multiply_tiles(tiles, tiles.bytes, layout, x, totals,
                       [&](const std::uint8_t* tile, WordTile& w) __attribute__((always_inline)) { decode_pairs(tile, tables, w); });
    }
    const Sixteen factor = sixteen_set(layout.factor);
    for (int t = 0; t < x.tokens; ++t) sixteen_store(totals[t], sixteen_multiply(sixteen_load(totals[t]), factor));
}

template <Codes CODES, WordKind KIND>
BlockFunction without_addend(const Layout& layout) {
    if (layout.addend != Addend::none || layout.sub == LEAST_GROUP) return nullptr;
    return layout.sub == 16 ? multiply_words<CODES, KIND, 16, Addend::none> : multiply_words<CODES, KIND, 32, Addend::none>;
}

template <Codes CODES, WordKind KIND, int SUB>
BlockFunction by_addend(Addend addend) {
    switch (addend) {
        case Addend::none: return multiply_words<CODES, KIND, SUB, Addend::none>;
        case Addend::offset: return multiply_words<CODES, KIND, SUB, Addend::offset>;
        case Addend::zero: return multiply_words<CODES, KIND, SUB, Addend::zero>;
    }
    return nullptr;
}

template <Codes CODES, WordKind KIND>
BlockFunction by_sub(const Layout& layout) {
    return layout.sub == 16 ? by_addend<CODES, KIND, 16>(layout.addend) : by_addend<CODES, KIND, 32>(layout.addend);
}

template <Codes CODES>
BlockFunction line(const Layout& layout) {
    constexpr bool LEAST = CODES == Codes::bits2 || CODES == Codes::bits3 || CODES == Codes::bits4 || is_byte(CODES);
    if (layout.sub == LEAST_GROUP) {
        if constexpr (LEAST) return by_addend<CODES, WordKind::line, LEAST_GROUP>(layout.addend);
        return nullptr;
    }
    return by_sub<CODES, WordKind::line>(layout);
}

BlockFunction line_function([[maybe_unused]] const Layout& layout) {
    if constexpr (CODES_AS_WORDS) {
        switch (layout.codes) {
            case Codes::bits1: return line<Codes::bits1>(layout);
            case Codes::bits2: return line<Codes::bits2>(layout);
            case Codes::bits3: return line<Codes::bits3>(layout);
            case Codes::bits4: return line<Codes::bits4>(layout);
            case Codes::bits5: return line<Codes::bits5>(layout);
            case Codes::bits6: return line<Codes::bits6>(layout);
            case Codes::bits7: return line<Codes::bits7>(layout);
            case Codes::int8: return line<Codes::int8>(layout);
            case Codes::uint8: return line<Codes::uint8>(layout);
            default: break;
        }
    }
    return nullptr;
}

BlockFunction byte_table_function(const Layout& layout) {
    constexpr WordKind KIND = WordKind::bytes;
    if (layout.codes == Codes::e8p) return multiply_words<Codes::e8p, KIND, COLUMNS, Addend::none>;
    if constexpr (CODES_AS_WORDS) {
        switch (layout.codes) {
            case Codes::bits1: return without_addend<Codes::bits1, KIND>(layout);
            case Codes::bits2: return without_addend<Codes::bits2, KIND>(layout);
            case Codes::bits3: return without_addend<Codes::bits3, KIND>(layout);
            case Codes::bits4: return without_addend<Codes::bits4, KIND>(layout);
            case Codes::bits5: return without_addend<Codes::bits5, KIND>(layout);
            case Codes::bits6: return without_addend<Codes::bits6, KIND>(layout);
            case Codes::grid2_256: return without_addend<Codes::grid2_256, KIND>(layout);
            case Codes::grid2_512: return without_addend<Codes::grid2_512, KIND>(layout);
            case Codes::grid2_1024: return without_addend<Codes::grid2_1024, KIND>(layout);
            case Codes::grid1_2048: return without_addend<Codes::grid1_2048, KIND>(layout);
            case Codes::grid3_256: return without_addend<Codes::grid3_256, KIND>(layout);
            case Codes::grid3_512: return without_addend<Codes::grid3_512, KIND>(layout);
            default: break;
        }
    }
    return nullptr;
}

BlockFunction sign_function([[maybe_unused]] const Layout& layout) {
#if defined(__AVX2__) && !defined(LOWBIT_AVX512)
    return without_addend<Codes::bits6, WordKind::signs>(layout);
#else
    return nullptr;
#endif
}

BlockFunction wide_function(const Layout& layout) {
    if (is_vectors(layout.codes)) return vector_function(layout);
    if (layout.sub == LEAST_GROUP) return nullptr;
    if (layout.codes == Codes::words4) return by_sub<Codes::words4, WordKind::wide>(layout);
    if constexpr (CODES_AS_WORDS) {
        if (layout.codes == Codes::bits4) return by_sub<Codes::bits4, WordKind::wide>(layout);
    }
    if constexpr (CODES_AS_WORDS && LARGEST_WIDE_TABLE == 64) {
        if (layout.codes == Codes::bits6) return without_addend<Codes::bits6, WordKind::wide>(layout);
    }
    return nullptr;
}

#if defined(__AVX2__)

template <Codes CODES, WordKind KIND, int SUB, Addend ADDEND>
void round_words(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    const Sixteen base = sixteen_set(static_cast<float>(decoding.words.base)), factor = sixteen_set(decoding.words.factor);
    Walk walk(layout, block);
    PanelWriter writer(panel);
    BlockTiles<CODES> tiles(walk, layout.tiles);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::uint8_t* const codes = walk.next<CODES, SUB, ADDEND>();
        WordTile w;
        decode_words<CODES, KIND>(tiles.at(walk, codes), decoding.table, decoding.words, w);
        Sixteen scales[COLUMNS / SUB];
        for (int part = 0; part < COLUMNS / SUB; ++part) scales[part] = sixteen_multiply(walk.scale[part], factor);
        writer.put([&](auto number, Sixteen& even, Sixteen& odd) __attribute__((always_inline)) {
            constexpr int PAIR = decltype(number)::value, PART = PAIR * (COLUMNS / SUB) / PAIRS;
            floats_of_words(w[PAIR], even, odd);
            even = weight_of<ADDEND>(sixteen_add(even, base), scales[PART], walk.addend[PART]);
            odd = weight_of<ADDEND>(sixteen_add(odd, base), scales[PART], walk.addend[PART]);
        });
    }
}

void round_pairs(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    const PairTables tables(decoding);
    const Sixteen factor = sixteen_set(layout.factor);
    PanelWriter writer(panel);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        WordTile w;
        decode_pairs(block + tile * 2 * BOOK_BYTES, tables, w);
        writer.put_words(w, factor);
    }
}

template <int SUB>
RoundFunction rounded_tables(Addend addend) {
    switch (addend) {
        case Addend::none: return round_words<Codes::words4, WordKind::wide, SUB, Addend::none>;
        case Addend::offset: return round_words<Codes::words4, WordKind::wide, SUB, Addend::offset>;
        case Addend::zero: return round_words<Codes::words4, WordKind::wide, SUB, Addend::zero>;
    }
    return nullptr;
}

#endif

}  // namespace

#if defined(__AVX2__)

RoundFunction rounded_words(const Layout& layout, const WordCodes& codes) {
    if (codes.kind == WordKind::pairs) return round_pairs;
    if (codes.kind == WordKind::trellis) return rounded_trellis(layout);
    if (layout.codes == Codes::row_vectors) return rounded_row_vectors(layout);
    if (is_vectors(layout.codes)) return rounded_vectors(layout);
    if (layout.codes == Codes::e8p) return round_words<Codes::e8p, WordKind::bytes, COLUMNS, Addend::none>;
    if (layout.codes != Codes::words4 || layout.sub == LEAST_GROUP || layout.scales == Scales::none) return nullptr;
    return layout.sub == COLUMNS ? rounded_tables<COLUMNS>(layout.addend) : rounded_tables<COLUMNS / 2>(layout.addend);
}

#endif

#if defined(LOWBIT_GRID_VECTORS)

const GridVectors* grid_vectors(Codes codes, const int (&values)[32], const std::uint8_t* behind) {
    struct Made {
        int bits, numbers;
        std::int8_t values[16];
        std::uint8_t words[2 * MOST_GRID_VECTORS];
        GridVectors grid;
    };
    static std::mutex mutex;
    static std::list<Made>& all = *new std::list<Made>;  // some ten for all of a process, needed to its end
    const Grid grid = grid_of(codes);
    const int count = 1 << grid.bits, width = grid.numbers == 8 ? 2 : 4, last = 1 << width;
    const int side = grid.shifted ? 1 : -1;
    std::int8_t numbers[16] = {};
    for (int i = 0; i < last; ++i) numbers[i] = static_cast<std::int8_t>((values[i] + side * values[i + last]) / 2);
    const auto shift = static_cast<std::int8_t>((values[0] - side * values[last]) / 2);

    const std::lock_guard<std::mutex> lock(mutex);
    for (const Made& made : all) {
        const bool same = made.bits == grid.bits && made.numbers == grid.numbers && made.grid.shift == shift &&
                          std::memcmp(made.values, numbers, sizeof numbers) == 0;
        if (same && std::memcmp(made.words, behind, static_cast<std::size_t>(2 * count)) == 0) return &made.grid;
    }
    Made& made = all.emplace_back();
    made.bits = grid.bits;
    made.numbers = grid.numbers;
    std::memcpy(made.values, numbers, sizeof numbers);
    std::memcpy(made.words, behind, static_cast<std::size_t>(2 * count));
    made.grid.shift = shift;
    for (int vector = 0; vector < count; ++vector) {
        std::uint8_t* const to = made.grid.vectors + vector * grid.numbers;
        for (int i = 0; i < grid.numbers; ++i) {
            to[i] = static_cast<std::uint8_t>(numbers[behind[i % 2 * count + vector] >> i / 2 * width & (last - 1)]);
        }
    }
    return &made.grid;
}

#endif

BlockFunction word_function(const Layout& layout, const WordCodes& codes) {
    if (layout.codes == Codes::row_vectors) return row_vector_function(layout);
    const bool unscaled = codes.kind == WordKind::trellis || codes.kind == WordKind::pairs;
    if (layout.scales == Scales::none && !unscaled) return nullptr;
    switch (codes.kind) {
        case WordKind::none: return nullptr;
        case WordKind::line: return line_function(layout);
        case WordKind::bytes: return byte_table_function(layout);
        case WordKind::wide: return wide_function(layout);
        case WordKind::signs: return sign_function(layout);
        case WordKind::trellis: return trellis_function(layout);
        case WordKind::pairs: return multiply_pairs;
    }
    return nullptr;
}

}  // namespace lowbit
