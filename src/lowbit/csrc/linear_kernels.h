// What the kinds of linear kernels share: one block of 16 rows times one tile of tokens.
#pragma once

#include <limits>

#include "activations.h"
#include "linear_input.h"

namespace lowbit {

#if defined(LOWBIT_AMX)
// Each token tile decodes the weight anew: some 25 cycles for 512 codes, which 16 tokens then meet in 16 to 32. With
// 128 tokens that is an eighth of the time, by estimate.
constexpr int TOKEN_TILE = 128;
#else
constexpr int TOKEN_TILE = 64;    // tokens whose totals fit in L1
#endif
constexpr int MOST_TOKENS = 128;  // of any library's TOKEN_TILE: AMX takes objects that are compiled for AVX-512
static_assert(TOKEN_TILE <= MOST_TOKENS);
#if defined(LOWBIT_AVX512)
constexpr int TOKEN_STEP = 8;     // tokens whose sums fit in registers beside a tile
#else
constexpr int TOKEN_STEP = 4;
#endif

// With some tokens a tile is computed on long enough for the ones behind it to be fetched meanwhile; the hardware's
// own prefetcher stops at every page. With few, memory is what is waited for, and more requests only stand in line.
constexpr int FETCHING_TOKENS = 8;
constexpr std::int64_t FETCHED_AHEAD = 1024;  // bytes, and two tiles at least
// Always inline: GCC 12 drops calls of functions that do nothing but prefetch.
INLINE void fetch_tile(const std::uint8_t* from, std::int64_t bytes) {
    for (std::int64_t line = 0; line <= bytes; line += 64) __builtin_prefetch(from + line);
}
INLINE void fetch_ahead(const std::uint8_t* tile, std::int64_t bytes) {
    fetch_tile(tile + std::max(FETCHED_AHEAD, 2 * bytes), bytes);
}

// How far ahead tiles are asked for whatever the tokens; 0: only with some of them. AMD Zen 5 by itself loses streams whose
// lines do not follow one another at one distance (a K-quant's, with scales of scales after every eighth tile, it read at
// 33 GB/s with two threads, and reads at 55), and others gain a tenth to a fifth; Zen 4 lost a third of int4's speed.
std::int64_t always_ahead_here();  // of the library that is loaded. linear.cpp
inline std::int64_t always_ahead() {
#if defined(__AVX512BF16__)
    return always_ahead_here();
#elif defined(LOWBIT_AVX512)
    return 4096;  // an Intel Xeon, whose own fetching reads 11 GB/s of a layer where this reads 14
#else
    return 0;
#endif
}

// What is asked for ahead of a block's tiles.
class Ahead {
  public:
    explicit Ahead(int tokens, std::int64_t always = always_ahead())
        : bytes_(always != 0 ? always : tokens >= FETCHING_TOKENS ? FETCHED_AHEAD : 0) {}
    INLINE void fetch(const std::uint8_t* tile, std::int64_t bytes) const {
        if (bytes_ != 0) fetch_tile(tile + std::max(bytes_, 2 * bytes), bytes);
    }

  private:
    const std::int64_t bytes_;
};
template <std::int64_t BYTES>
INLINE void fetch_ahead(const std::uint8_t* tile) {
    fetch_ahead(tile, BYTES);
}

// Takes hold of the lines results will be written to, some at each tile: written one by one at the end, each would
// be waited for.
INLINE void fetch_results(const Input& x, std::int64_t tile, std::int64_t tiles) {
    if (x.out == nullptr) return;
    const std::int64_t last = x.tokens * (tile + 1) / tiles;
    for (std::int64_t token = x.tokens * tile / tiles; token < last; ++token) {
        __builtin_prefetch(x.out + token * x.out_stride, 1);
    }
}

// How a weight's codes become numbers.
struct Decoding {
    explicit Decoding(const lowbit_weight& weight)
        : weight(&weight),
          table(weight.table),
          bytes(weight),
          words(weight),
#if defined(LOWBIT_AVX512)
          words_of_table(words.looked_up ? words.table(table.behind) : table),
#endif
          vectors(reinterpret_cast<const std::int16_t*>(weight.table)) {
    }
    // What codes that meet x as words are looked up in.
    const Table& word_table() const {
#if defined(LOWBIT_AVX512)
        return words_of_table;
#else
        return table;
#endif
    }

    const lowbit_weight* weight;
    Table table;
    ByteCodes bytes;
    WordCodes words;
#if defined(LOWBIT_AVX512)
    Table words_of_table;
#endif
    const std::int16_t* vectors;  // of codebooks
};

// totals[token] += the block's rows times x; totals start at zero.
using BlockFunction = void (*)(const Layout&, const std::uint8_t* block, const Decoding&, const Input&,
                               float (*totals)[ROWS]);

// x rounded to bfloat16, or float32 where codes are floats. linear_exact.cpp
BlockFunction exact_function(const Layout& layout);

// x in float32. Null where there is none for the codes.
BlockFunction float_function(const Layout& layout);

// Whether codes are whole numbers under scales, which int8 inputs can meet.
inline bool meets_bytes(const Layout& layout, const ByteCodes& codes) {
    return codes.possible && layout.scales != Scales::none && layout.sub != LEAST_GROUP;
}

// x as whole numbers: int8 with a scale for each 32 columns, or, ``grouped`` false, sums over whole groups of the
// weight; for codes that meets_bytes accepts. linear_bytes.cpp
BlockFunction byte_function(const Layout& layout, const ByteCodes& codes, bool grouped);

// x as InputKind::scaled. Null where there is none for the codes; AMX has scaled_tiles instead. linear_exact.cpp
BlockFunction scaled_function(const Layout& layout);

// x as InputKind::words. Null where there is none. linear_words.cpp
BlockFunction word_function(const Layout& layout, const WordCodes& codes);

// The same of codebooks' vectors. linear_vectors.cpp
BlockFunction vector_function(const Layout& layout);

// The same of vectors of rows. linear_row_vectors.cpp
BlockFunction row_vector_function(const Layout& layout);

// The same of trellises. linear_trellis.cpp
BlockFunction trellis_function(const Layout& layout);

// Few tokens beside many rows of codebooks of 256 vectors: the products of all vectors with all columns are made first,
// and rows look theirs up. Bits are the same.
constexpr std::int64_t MOST_PRODUCTS = 16 << 20;  // bytes that are kept for them
#if defined(LOWBIT_AVX512)
constexpr std::int64_t MOST_LOOKED_UP = 3;    // tokens
constexpr std::int64_t LEAST_LOOKED_UP = 24;  // blocks
constexpr int LOOKED_UP_TOGETHER = 8;         // blocks

// Bytes of all products, at a cache line; 0: none are made.
std::int64_t product_bytes(const Layout& layout, std::int64_t tokens);
// Those of tiles first to last, exclusive.
void make_products(const Layout& layout, const Decoding&, const Input&, std::int64_t first, std::int64_t last,
                   std::uint8_t* to);
// totals[block * tokens + token] = blocks times x; there is room for whole LOOKED_UP_TOGETHER.
void look_up_products(const Layout& layout, const std::uint8_t* first, int blocks, const Input&,
                      const std::uint8_t* products, float (*totals)[ROWS]);
#else
constexpr int LOOKED_UP_TOGETHER = 1;
inline std::int64_t product_bytes(const Layout&, std::int64_t) { return 0; }
inline void make_products(const Layout&, const Decoding&, const Input&, std::int64_t, std::int64_t, std::uint8_t*) {}
inline void look_up_products(const Layout&, const std::uint8_t*, int, const Input&, const std::uint8_t*, float (*)[ROWS]) {}
#endif

// The same for up to BLOCKS_TOGETHER blocks that follow each other: on AMX tiles, or two in turns under AVX-512
// (linear_pairs.cpp); totals[block][token].
using BlocksFunction = void (*)(const Layout&, const std::uint8_t* first, int blocks, const Decoding&, const Input&,
                                float (*totals)[TOKEN_TILE][ROWS]);

// Makes a block's rows bfloat16 numbers, scales and offsets in them (linear_rounded.h).
using RoundFunction = void (*)(const Layout& layout, const std::uint8_t* block, const Decoding&, std::uint8_t* panel);
constexpr int ROUNDED_TOKENS = 32;            // that meet such blocks together
#if defined(LOWBIT_AMX)
constexpr bool CODES_HAVE_TILES = true;  // sums of codes go on to the end of a row on tiles, for all tokens
constexpr std::int64_t MOST_PANEL_LINES = 20;  // of two blocks that all tokens meet: 40 of the 48 KB of the first cache
#else
constexpr bool CODES_HAVE_TILES = false;
constexpr std::int64_t MOST_PANEL_LINES = 64;  // of 2,048 columns: with x of 32 tokens a quarter of Zen 4's second-level cache
#endif
constexpr std::int64_t WORD_PANEL_LINES = WORD_PANEL_COLUMNS / COLUMNS;
constexpr std::int64_t WORD_PANEL_SCALES = ROWS * sizeof(float);  // bytes before the lines they belong to
constexpr std::int64_t LEAST_OF_PANELS = 64;  // tokens for which codes are laid out once where bits are the same

// What panels are multiplied with: two tiles of up to 16 tokens, the bytes from a line of 32 columns, or 64 bytes, to the
// next; of words the tokens' scales for each WORD_PANEL_COLUMNS.
struct RoundedInput {
    const std::uint8_t* tiles[2];
    std::int64_t line_bytes[2];
    const float* scales[2];
    int tokens[2];
};

// Totals of some tokens that have still to be written: of two blocks, one or both, or a gate's and its partner's.
struct Unwritten {
    const float (*totals)[ROUNDED_TOKENS][ROWS] = nullptr;
    float* out = nullptr;
    std::int64_t stride = 0;
    int left = 0;  // tokens
    bool gated = false, both = false;

    INLINE void write_one() {
        const Vector16 one = load(totals[0][0]), other = load(totals[1][0]);
        store(out, gated ? lowbit::gated(one, other, Activation::SILU) : one);
        if (both) store(out + ROWS, other);
        totals = reinterpret_cast<const float(*)[ROUNDED_TOKENS][ROWS]>(totals[0][1]);
        out += stride;
        --left;
    }
    void write_all() {
        while (left > 0) write_one();
    }
    // Takes hold of the lines that will be written.
    void fetch() const {
        for (int token = 0; token < left; ++token) {
            __builtin_prefetch(out + token * stride, 1);
            if (both) __builtin_prefetch(out + token * stride + ROWS, 1);
        }
    }
};

#if defined(__AVX2__)

// Whether such codes may have offsets or zero points.
constexpr bool has_addends(Codes codes) {
    return codes == Codes::bits1 || codes == Codes::bits2 || codes == Codes::bits3 || codes == Codes::bits4 ||
           codes == Codes::bits5 || codes == Codes::bits6 || codes == Codes::bits7 || codes == Codes::int8 ||
           codes == Codes::uint8;
}

// with(codes) that are bfloat16 numbers; else null.
template <typename Function, typename With>
Function of_exact_codes(Codes codes, const With& with) {
    switch (codes) {
        case Codes::bits1: return with(std::integral_constant<Codes, Codes::bits1>());
        case Codes::bits2: return with(std::integral_constant<Codes, Codes::bits2>());
        case Codes::bits3: return with(std::integral_constant<Codes, Codes::bits3>());
        case Codes::bits4: return with(std::integral_constant<Codes, Codes::bits4>());
        case Codes::bits5: return with(std::integral_constant<Codes, Codes::bits5>());
        case Codes::bits6: return with(std::integral_constant<Codes, Codes::bits6>());
        case Codes::bits7: return with(std::integral_constant<Codes, Codes::bits7>());
        case Codes::int8: return with(std::integral_constant<Codes, Codes::int8>());
        case Codes::uint8: return with(std::integral_constant<Codes, Codes::uint8>());
        case Codes::e4m3: return with(std::integral_constant<Codes, Codes::e4m3>());
        case Codes::e5m2: return with(std::integral_constant<Codes, Codes::e5m2>());
        case Codes::e4m3fnuz: return with(std::integral_constant<Codes, Codes::e4m3fnuz>());
        case Codes::e5m2fnuz: return with(std::integral_constant<Codes, Codes::e5m2fnuz>());
        case Codes::grid2_256: return with(std::integral_constant<Codes, Codes::grid2_256>());
        case Codes::grid2_512: return with(std::integral_constant<Codes, Codes::grid2_512>());
        case Codes::grid2_1024: return with(std::integral_constant<Codes, Codes::grid2_1024>());
        case Codes::grid1_2048: return with(std::integral_constant<Codes, Codes::grid1_2048>());
        case Codes::grid3_256: return with(std::integral_constant<Codes, Codes::grid3_256>());
        case Codes::grid3_512: return with(std::integral_constant<Codes, Codes::grid3_512>());
        case Codes::bf16: return with(std::integral_constant<Codes, Codes::bf16>());
        default: return nullptr;
    }
}

// What decodes a tile to memory, whatever its codes; null for codes that are no numbers by themselves. linear_panels.cpp
using TileDecoder = void (*)(const std::uint8_t* tile, const Table&, BfloatTile& w);
TileDecoder decode_function(Codes codes);

// Null where rounding saves nothing, or the codes have none. ``exact``: nor may it change products of whole numbers, as a
// layer's are that quantizes its inputs. linear_panels.cpp
RoundFunction round_function(const Layout& layout, const WordCodes& codes, bool exact);
// A row's codes alone, where its sums go on to its end; AMX then has the bits of exact_tiles.
RoundFunction code_function(const Layout& layout);
// Bytes that x meets as whole numbers, for so many tokens, with the bits of byte_function.
RoundFunction byte_code_function(const Layout& layout, const ByteCodes& codes, bool grouped, std::int64_t tokens);
// Makes the totals of some tokens with such codes what they are worth.
void scale_sums(const Layout& layout, const std::uint8_t* block, bool bytes, const Input& x, float (*totals)[ROWS]);

// totals[block][token] = up to 2 blocks of rounded rows times x; of ``bytes`` whole numbers. ``goes_on``: from what totals
// hold. What is ``unwritten`` of others is written meanwhile.
void multiply_rounded(const std::uint8_t* const* panels, int blocks, bool bytes, const RoundedInput& x, int tokens,
                      std::int64_t lines, bool goes_on, Unwritten& unwritten, float (*totals)[ROUNDED_TOKENS][ROWS]);

#endif

#if defined(LOWBIT_AMX)

constexpr int BLOCKS_TOGETHER = 4;  // a register of sums each
// For so many tokens and codes that are bfloat16 numbers; else null. linear_amx.cpp
BlocksFunction exact_tiles(const Layout& layout, std::int64_t tokens);
// Null for one token, which byte_function has.
BlocksFunction byte_tiles(const Layout& layout, const ByteCodes& codes, bool grouped, std::int64_t tokens);
// x as InputKind::scaled.
BlocksFunction scaled_tiles(const Layout& layout, std::int64_t tokens);

// Columns whose sum of products is scaled at once.
inline std::int64_t summed_columns(const Layout& layout) {
    return layout.sub < COLUMNS || layout.scales == Scales::none ? layout.sub : layout.unit;
}

inline BlocksFunction word_tiles(const Layout&, const WordCodes&, std::int64_t) { return nullptr; }
inline bool takes_scaled(const Layout& layout) { return scaled_tiles(layout, 1) != nullptr; }

#else

#if !defined(__AVX2__)
inline RoundFunction round_function(const Layout&, const WordCodes&, bool) { return nullptr; }
inline RoundFunction code_function(const Layout&) { return nullptr; }
inline RoundFunction byte_code_function(const Layout&, const ByteCodes&, bool, std::int64_t) { return nullptr; }
inline void scale_sums(const Layout&, const std::uint8_t*, bool, const Input&, float (*)[ROWS]) {}
inline void multiply_rounded(const std::uint8_t* const*, int, bool, const RoundedInput&, int, std::int64_t, bool,
                             Unwritten&, float (*)[ROUNDED_TOKENS][ROWS]) {}
#endif
inline std::int64_t summed_columns(const Layout& layout) { return layout.sub; }
inline bool takes_scaled(const Layout& layout) { return scaled_function(layout) != nullptr; }

#if defined(LOWBIT_AVX512)

// Each with the bits of the function for one block, for so many tokens; null where those do as well. linear_pairs.cpp
constexpr int BLOCKS_TOGETHER = 2;
BlocksFunction exact_tiles(const Layout& layout, std::int64_t tokens);
BlocksFunction byte_tiles(const Layout& layout, const ByteCodes& codes, bool grouped, std::int64_t tokens);
BlocksFunction scaled_tiles(const Layout& layout, std::int64_t tokens);
BlocksFunction word_tiles(const Layout& layout, const WordCodes& codes, std::int64_t tokens);

#else

constexpr int BLOCKS_TOGETHER = 1;
inline BlocksFunction exact_tiles(const Layout&, std::int64_t) { return nullptr; }
inline BlocksFunction byte_tiles(const Layout&, const ByteCodes&, bool, std::int64_t) { return nullptr; }
inline BlocksFunction scaled_tiles(const Layout&, std::int64_t) { return nullptr; }
inline BlocksFunction word_tiles(const Layout&, const WordCodes&, std::int64_t) { return nullptr; }

#endif

#endif

// step<TOKENS>(token) for all tokens, TOKEN_STEP at a time and the rest in halves. Steps are inlined, so that the
// tile they share stays in registers: through memory two tokens take twice as long.
template <typename Step>
INLINE void for_tokens(int tokens, Step&& step) {
    int token = 0;
    for (; token + TOKEN_STEP <= tokens; token += TOKEN_STEP) step.template operator()<TOKEN_STEP>(token);
    if constexpr (TOKEN_STEP > 4) {
        if (token + 4 <= tokens) step.template operator()<4>(token), token += 4;
    }
    if (token + 2 <= tokens) step.template operator()<2>(token), token += 2;
    if (token < tokens) step.template operator()<1>(token);
}

// A sum of products on top of a total.
template <Addend ADDEND, bool SCALED>
INLINE Sixteen accumulate(Sixteen total, Sixteen sum, Sixteen scale, Sixteen addend, float x_sum) {
    if constexpr (ADDEND == Addend::zero) sum = sixteen_fma(addend, sixteen_set(x_sum), sum);
    total = SCALED ? sixteen_fma(scale, sum, total) : sixteen_add(total, sum);
    if constexpr (ADDEND == Addend::offset) total = sixteen_fma(addend, sixteen_set(x_sum), total);
    return total;
}

// The weight's scale, or its product with x's.
template <bool X_SCALED>
INLINE Sixteen scale_of(Sixteen weight, const float* x_scale) {
    if constexpr (X_SCALED) return sixteen_multiply(weight, sixteen_set(*x_scale));
    return weight;
}

// A sum of whole numbers, scaled, on top of a total. ``x_sum``: of x's whole numbers, or, for offsets, of x.
template <Addend ADDEND>
INLINE Sixteen add_scaled(Sixteen total, SixteenInts whole, const Walk& walk, int part, float x_scale, float x_sum) {
    return accumulate<ADDEND, true>(total, ints_to_floats(whole), scale_of<true>(walk.scale[part], &x_scale),
                                    walk.addend[part], x_sum);
}

// Sums of whole numbers of a group's columns on top of totals; x has no scales.
template <Addend ADDEND>
INLINE void add_group(const Walk& walk, const Input& x, std::int64_t group, const std::int32_t (*sums)[ROWS], float (*totals)[ROWS]) {
    for (int t = 0; t < x.tokens; ++t) {
        const Sixteen sum = ints_to_floats(ints_load(sums[t])), total = sixteen_load(totals[t]);
        const float x_sum = ADDEND == Addend::none ? 0.0f : x.sums[group * x.tokens + t];
        sixteen_store(totals[t], accumulate<ADDEND, true>(total, sum, walk.scale[0], walk.addend[0], x_sum));
    }
}

// What multiplies all tokens with a decoded tile. Only AVX-512 has registers for one; elsewhere it lies in memory, and this
// is one function for whatever codes it was: inlined for each it was half of what those files took to compile.
#if defined(LOWBIT_AVX512)
#define TILE_FUNCTION INLINE
#else
#define TILE_FUNCTION __attribute__((noinline)) inline
#endif

// Some tokens times a tile of 16-bit numbers that have no scales of their own.
struct PlainWordStep {
    const WordTile& w;
    const Input& x;
    std::int64_t tile;
    float (*totals)[ROWS];

    template <int TOKENS>
    INLINE void operator()(int token) const {
        SixteenInts sums[TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) sums[t] = ints_set(0);
        dot_words<0, COLUMNS, TOKENS>(w, x.at<std::int16_t>(tile, token), COLUMNS, sums);
        const float* const scales = x.scales + tile * x.tokens + token;
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const Sixteen total = sixteen_load(totals[token + t]);
            sixteen_store(totals[token + t], sixteen_fma(sixteen_set(scales[t]), ints_to_floats(sums[t]), total));
        }
    }
};

TILE_FUNCTION void multiply_plain_tile(const WordTile& w, const Input& x, std::int64_t tile, float (*totals)[ROWS]) {
    for_tokens(x.tokens, PlainWordStep{w, x, tile, totals});
}

// One token times a tile of such numbers: half of it beside the other, as a product waits for the one before.
INLINE SixteenInts dot_tile(const WordTile& w, const std::int16_t* x) {
    SixteenInts halves[2][1] = {{ints_set(0)}, {ints_set(0)}};
    dot_words<0, COLUMNS / 2, 1>(w, x, COLUMNS, halves[0]);
    dot_words<COLUMNS / 2, COLUMNS / 2, 1>(w, x, COLUMNS, halves[1]);
    return ints_add(halves[0][0], halves[1][0]);
}

// Tiles first <= tile < last of a block, of ``bytes`` each from ``at`` on.
struct Tiles {
    const std::uint8_t* at;
    std::int64_t bytes, first, last;
};

// Adds one token's products with them. dot(tile, x): the sums of one.
template <class Dot>
INLINE Sixteen add_tiles(Sixteen total, Tiles tiles, const Input& x, const Dot& dot) {
    for (std::int64_t tile = tiles.first; tile < tiles.last; ++tile, tiles.at += tiles.bytes) {
        const SixteenInts sum = dot(tiles.at, x.at<std::int16_t>(tile, 0));
        total = sixteen_fma(sixteen_set(x.scales[tile]), ints_to_floats(sum), total);
    }
    return total;
}

// The same of more tokens; decode(tile, w) makes the numbers. ``fetched``: bytes of each tile that are asked for before.
template <class Decode>
INLINE void multiply_tiles(Tiles tiles, std::int64_t fetched, const Layout& layout, const Input& x, float (*totals)[ROWS],
                           const Decode& decode) {
    for (std::int64_t tile = tiles.first; tile < tiles.last; ++tile, tiles.at += tiles.bytes) {
        if (fetched != 0 && x.tokens >= FETCHING_TOKENS) {
            fetch_ahead(tiles.at, fetched);
            fetch_results(x, tile, layout.tiles);
        }
        WordTile w;
        decode(tiles.at, w);
        multiply_plain_tile(w, x, tile, totals);
    }
}

// Indices of a tile that few tokens meet: among scattered reads of a table the processor does not see that they are a
// stream.
INLINE void fetch_indices(const std::uint8_t* tile, std::int64_t bytes) {
    constexpr std::int64_t AHEAD = 2048;
    for (std::int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(tile + AHEAD + line);
}

// Has a table of ``bytes`` near that was not the last one used: read from end to end, where one by one each line would be
// waited for. Where a weight has fewer ``indices`` than it has lines, those that are needed come by themselves.
// linear_vectors.cpp
void have_near(const std::int16_t* table, std::int64_t bytes, std::int64_t indices);

}  // namespace lowbit
