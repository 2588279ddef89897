// Prompts' tokens on AMX tiles, where a scale for some columns would end every sum: weights are rounded to bfloat16.
//
// A product that is stored and scaled takes two to four times as long as one that is added to a tile (linear_amx.cpp). So
// a block's rows become bfloat16 numbers once for all tokens, scale and offset in them, and sums go on to the end of the
// row. That rounds a weight by 2^-9 of it at most, as x is. A token that is generated meets the weights as they are,
// because one by one the rounding would cost more than it saves: whose a row is decides, never how many there are.
#include "linear_amx.h"
#include "linear_halves.h"
#include "linear_rounded.h"

#if defined(LOWBIT_AMX)

#define INLINED __attribute__((always_inline))

namespace lowbit {
namespace {

// Whether such codes may have a scale for each LEAST_GROUP columns (linear_exact.cpp).
constexpr bool in_least_groups(Codes codes) {
    return codes == Codes::bits2 || codes == Codes::bits3 || codes == Codes::bits4 || is_byte(codes);
}

template <Codes CODES, int SUB, Addend ADDEND>
void round_block(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    const FlushSubnormals flush(false);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    Walk walk(layout, block);
    PanelWriter writer(panel);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::uint8_t* const codes = walk.next<CODES, SUB, ADDEND>();
        fetch_lines<tile_bytes(CODES) + TILE_LINE>(codes + FETCHED_BYTES_AHEAD);
        BfloatTile w;
        decode<CODES>(codes, decoding.table, w);
        writer.put([&](auto number, Sixteen& even, Sixteen& odd) INLINED {
            constexpr int PAIR = decltype(number)::value, PART = PAIR * (COLUMNS / SUB) / PAIRS;
            const Sixteen scale = walk.scale[PART], addend = walk.addend[PART];
            even = weight_of<ADDEND>(_mm512_castsi512_ps(_mm512_slli_epi32(w[PAIR], 16)), scale, addend);
            odd = weight_of<ADDEND>(_mm512_castsi512_ps(_mm512_and_si512(w[PAIR], upper)), scale, addend);
        });
    }
}

// The codes alone, which are bfloat16 numbers.
template <Codes CODES>
void lay_codes(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    Walk walk(layout, block);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile, panel += PANEL_TILE) {
        const std::uint8_t* const codes = walk.next<CODES, COLUMNS, Addend::none>();
        fetch_lines<tile_bytes(CODES)>(codes + FETCHED_BYTES_AHEAD);
        BfloatTile w;
        decode<CODES>(codes, decoding.table, w);
        UNROLL
        for (int pair = 0; pair < PAIRS; ++pair) _mm512_store_si512(panel + pair * TILE_LINE, w[pair]);
    }
}

// The same as bytes, 64 columns a line.
template <Codes CODES, bool LOOKED_UP>
void lay_bytes(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    Walk walk(layout, block);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile, panel += OPERANDS * TILE_LINE) {
        const std::uint8_t* const codes = walk.next();
        fetch_lines<tile_bytes(CODES)>(codes + FETCHED_BYTES_AHEAD);
        ByteTile w;
        decode_bytes<CODES, LOOKED_UP>(codes, decoding.bytes, w);
        UNROLL
        for (int operand = 0; operand < OPERANDS; ++operand) _mm512_store_si512(panel + operand * TILE_LINE, w[operand]);
    }
    if (layout.tiles % 2 != 0) std::memset(panel, 0, OPERANDS * TILE_LINE);  // what x has there is anything
}

// Of float16 numbers, of which next(tile) says where those of a tile are.
template <class Next>
INLINE void round_halves(std::int64_t tiles, std::uint8_t* panel, const Next& next) {
    PanelWriter writer(panel);
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::uint16_t* const halves = next(tile);
        writer.put([&](auto number, Sixteen& even, Sixteen& odd) INLINED {
            const auto* const at = reinterpret_cast<const std::uint8_t*>(halves + decltype(number)::value * 2 * ROWS);
            even = sixteen_f16(at);
            odd = sixteen_f16(at + 2 * ROWS);
        });
    }
}

void round_plain_halves(const Layout& layout, const std::uint8_t* block, const Decoding&, std::uint8_t* panel) {
    round_halves(layout.tiles, panel, [&](std::int64_t tile) INLINED {
        return reinterpret_cast<const std::uint16_t*>(block + tile * tile_bytes(Codes::f16));
    });
}

void round_spqr(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    Walk walk(layout, block);
    alignas(64) std::uint16_t halves[ROWS * COLUMNS];
    const lowbit_weight& weight = *decoding.weight;
    const std::int64_t first = (block - weight.data) / layout.block_bytes * layout.tiles;
    round_halves(layout.tiles, panel, [&](std::int64_t tile) INLINED {
        const std::uint8_t* const codes = walk.next<Codes::halves3, COLUMNS / 2, Addend::zero>();
        decode_halves(codes, decoding.table, walk, halves);
        each_outlier(weight, first + tile, [&](std::uint32_t place, float outlier) {
            halves[place] = float_to_half(half_to_float(halves[place]) + outlier);
        });
        return halves;
    });
}

template <Codes CODES, int SUB>
RoundFunction by_addend(Addend addend) {
    if constexpr (has_addends(CODES)) {
        if (addend == Addend::offset) return round_block<CODES, SUB, Addend::offset>;
        if (addend == Addend::zero) return round_block<CODES, SUB, Addend::zero>;
    }
    return addend == Addend::none ? round_block<CODES, SUB, Addend::none> : nullptr;
}

// Up to 2 tiles of 16 tokens times up to 2 blocks: each product loads one tile.
template <bool BYTES, int TILES, int BLOCKS>
void multiply_tiles_of(const std::uint8_t* const* panels, const RoundedInput& x, std::int64_t lines,
                       float (*totals)[ROUNDED_TOKENS][ROWS]) {
    each_constant<TILES * BLOCKS>([](auto sum) INLINED { tile_zero<decltype(sum)::value>(); });
    for (std::int64_t line = 0; line < lines; ++line) {
        each_constant<TILES>([&](auto tile) INLINED {
            constexpr int TILE = decltype(tile)::value;
            tile_load<4 + TILE>(x.tiles[TILE] + line * x.line_bytes[TILE], TILE_LINE);
            each_constant<BLOCKS>([&](auto block) INLINED {
                constexpr int BLOCK = decltype(block)::value;
                if constexpr (TILE == 0) tile_load<6 + BLOCK>(panels[BLOCK] + line * PANEL_TILE, TILE_LINE);
                constexpr int C = TILE * BLOCKS + BLOCK;
                if constexpr (BYTES) tile_dot_bytes<C, 4 + TILE, 6 + BLOCK>();
                else tile_dot_bfloats<C, 4 + TILE, 6 + BLOCK>();
            });
        });
    }
    each_constant<TILES>([&](auto tile) INLINED {
        constexpr int TILE = decltype(tile)::value;
        each_constant<BLOCKS>([&](auto block) INLINED {
            constexpr int BLOCK = decltype(block)::value;
            tile_store<TILE * BLOCKS + BLOCK>(totals[BLOCK][TILE * TILE_ROWS], TILE_LINE);
        });
    });
}

}  // namespace

RoundFunction round_function(const Layout& layout, const WordCodes& words) {
    if (layout.codes == Codes::f16) return layout.scales == Scales::none ? round_plain_halves : nullptr;
    if (layout.codes == Codes::halves3) return round_spqr;
    if (words.kind != WordKind::none) return rounded_words(layout, words);
    const bool whole = summed_columns(layout) == layout.tiles * COLUMNS;  // a scale for each row: sums go on anyway
    if (layout.scales == Scales::none || whole) return nullptr;
    return of_exact_codes<RoundFunction>(layout.codes, [&](auto codes) -> RoundFunction {
        constexpr Codes CODES = decltype(codes)::value;
        if constexpr (CODES == Codes::bf16) return nullptr;
        else if (layout.sub == COLUMNS) return by_addend<CODES, COLUMNS>(layout.addend);
        else if (layout.sub == COLUMNS / 2) return by_addend<CODES, COLUMNS / 2>(layout.addend);
        else if constexpr (in_least_groups(CODES)) return by_addend<CODES, LEAST_GROUP>(layout.addend);
        else return nullptr;
    });
}

RoundFunction code_function(const Layout& layout, std::int64_t tokens) {
    const bool whole = layout.scales == Scales::none || layout.unit == layout.tiles * COLUMNS;
    if (tokens < LEAST_OF_PANELS || !whole || layout.sub != COLUMNS || layout.addend != Addend::none) return nullptr;
    return of_exact_codes<RoundFunction>(layout.codes, [&](auto codes) -> RoundFunction {
        constexpr Codes CODES = decltype(codes)::value;
        return CODES != Codes::bf16 || layout.scales == Scales::none ? lay_codes<CODES> : nullptr;
    });
}

RoundFunction byte_code_function(const Layout& layout, const ByteCodes& codes, bool grouped, std::int64_t tokens) {
    if (tokens < LEAST_OF_PANELS || grouped || layout.unit != layout.tiles * COLUMNS) return nullptr;
    switch (layout.codes) {
        case Codes::bits4: return codes.looked_up ? lay_bytes<Codes::bits4, true> : lay_bytes<Codes::bits4, false>;
        case Codes::int8: return lay_bytes<Codes::int8, false>;
        case Codes::uint8: return lay_bytes<Codes::uint8, false>;
        default: return nullptr;
    }
}

void scale_sums(const Layout& layout, const std::uint8_t* block, bool bytes, const Input& x, float (*totals)[ROWS]) {
    if (layout.scales == Scales::none) return;
    const FlushSubnormals flush(false);
    Walk walk(layout, block);
    walk.next();
    for (int t = 0; t < x.tokens; ++t) {
        Sixteen sum = sixteen_load(totals[t]);
        if (bytes) sum = ints_to_floats(_mm512_add_epi32(_mm512_castps_si512(sum), ints_set(x.bases[t])));
        if (layout.addend == Addend::zero) sum = sixteen_fma(walk.addend[0], sixteen_set(x.sums[t]), sum);
        Sixteen total = sixteen_fma(walk.scale[0], sum, sixteen_zeros());
        if (layout.addend == Addend::offset) total = sixteen_fma(walk.addend[0], sixteen_set(x.sums[t]), total);
        sixteen_store(totals[t], total);
    }
}

template <bool BYTES>
static void multiply_panels(const std::uint8_t* const* panels, int blocks, const RoundedInput& x, int tokens,
                            std::int64_t lines, float (*totals)[ROUNDED_TOKENS][ROWS]) {
    const bool both = tokens > TILE_ROWS;
    const auto multiply = blocks > 1 ? (both ? multiply_tiles_of<BYTES, 2, 2> : multiply_tiles_of<BYTES, 1, 2>)
                                     : (both ? multiply_tiles_of<BYTES, 2, 1> : multiply_tiles_of<BYTES, 1, 1>);
    multiply(panels, x, lines, totals);
}

void multiply_rounded(const std::uint8_t* const* panels, int blocks, bool bytes, const RoundedInput& x, int tokens,
                      std::int64_t lines, float (*totals)[ROUNDED_TOKENS][ROWS]) {
    configure_tiles(std::min(TILE_ROWS, tokens));
    (bytes ? multiply_panels<true> : multiply_panels<false>)(panels, blocks, x, tokens, lines, totals);
}

}  // namespace lowbit

#endif
