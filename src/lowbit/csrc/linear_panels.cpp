// Prompts' tokens, whose weights are made bfloat16 numbers once for all of a step, or without BF16 whole numbers
// (linear_rounded.h): panels, a block's rows one behind another.
//
// A scale for some columns ends a sum. With AMX a product that is stored and scaled takes two to four times as long as one
// that is added to a tile (linear_amx.cpp), with AVX-512 every 16 products of a token take two or three instructions of the
// same units, and a total's way to memory and back. So a block's rows become bfloat16 numbers, scale and offset in them, and
// sums go on to the end of the row. That rounds a weight by 2^-9 of it at most, as x is. Weights with one scale a row
// keep their codes, and their sums are scaled at the end. A token that is generated meets the weights as they are, because
// one by one the rounding would cost more than it saves: whose a row is decides, never how many there are.
#include "linear_rounded.h"

#include "linear_columns.h"
#include "linear_outliers.h"

#if defined(__AVX2__)

namespace lowbit {
namespace {

template <Codes CODES>
void decode_numbers(const std::uint8_t* tile, const Table& table, BfloatTile& w) {
#if !defined(LOWBIT_AVX512)
    if constexpr (is_byte_float(CODES)) {
        FaultyRows<CODES> rows;
        HalvesTile halves;
        decode_halves(tile, rows, halves);
        each_constant<COLUMNS>([&](auto number) __attribute__((always_inline)) {
            constexpr int COLUMN = decltype(number)::value;
            sixteen_store(w.columns[COLUMN], rows.finished(column_of<COLUMN>(halves)));
        });
    } else
#endif
        decode<CODES>(tile, table, w);
}

}  // namespace

TileDecoder decode_function(Codes codes) {
    return of_exact_codes<TileDecoder>(codes, [](auto constant) -> TileDecoder { return decode_numbers<decltype(constant)::value>; });
}

namespace {

#if defined(LOWBIT_AVX512)

constexpr int OPERAND_BYTES = 64;
// How far ahead of what is rounded weights are asked for.
constexpr std::int64_t ROUNDED_AHEAD = 4096;

// The codes of whole numbers as bytes; a last odd tile has zeros behind it.
template <Codes CODES, bool LOOKED_UP>
void lay_bytes(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    Walk walk(layout, block);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile, panel += OPERANDS * OPERAND_BYTES) {
        const std::uint8_t* const codes = walk.next();
        fetch_tile(codes + ROUNDED_AHEAD, tile_bytes(CODES));
        ByteTile w;
        decode_bytes<CODES, LOOKED_UP>(codes, decoding.bytes, w);
        UNROLL
        for (int operand = 0; operand < OPERANDS; ++operand) _mm512_store_si512(panel + operand * OPERAND_BYTES, w[operand]);
    }
    if (layout.tiles % 2 != 0) std::memset(panel, 0, OPERANDS * OPERAND_BYTES);  // AMX: what x has there is anything
}

#endif

// The columns of a pair.
INLINE void columns_of(const BfloatTile& w, int pair, Sixteen& even, Sixteen& odd) {
#if defined(LOWBIT_AVX512)
    even = _mm512_castsi512_ps(_mm512_slli_epi32(w[pair], 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(w[pair], _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
#else
    even = sixteen_load(w.columns[pair * 2]);
    odd = sixteen_load(w.columns[pair * 2 + 1]);
#endif
}

INLINE void decode_ahead(TileDecoder decode, const std::uint8_t* codes, [[maybe_unused]] std::int64_t bytes,
                         const Decoding& decoding, BfloatTile& w) {
#if defined(LOWBIT_AVX512)
    fetch_tile(codes + ROUNDED_AHEAD, bytes);
#endif
    decode(codes, decoding.table, w);
}

// A block of codes with scales of their own, tile by tile: begin(tile) comes before each, worth(weight, column) says what a
// number is in the panel.
template <Addend ADDEND, class Begin, class Worth>
INLINE void round_decoded(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel,
                          const Begin& begin, const Worth& worth) {
    const TileDecoder decode = decode_function(layout.codes);
    const std::int64_t bytes = tile_bytes(layout.codes);
    const int pairs = layout.sub / 2;  // that share a scale
    Walk walk(layout, block);
    PanelWriter writer(panel);
    BfloatTile w;
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        decode_ahead(decode, walk.next(), bytes, decoding, w);
        begin(tile);
        writer.put([&](auto number, Sixteen& even, Sixteen& odd) __attribute__((always_inline)) {
            constexpr int PAIR = decltype(number)::value;
            const Sixteen scale = walk.scale[PAIR / pairs], addend = walk.addend[PAIR / pairs];
            columns_of(w, PAIR, even, odd);
            even = worth(weight_of<ADDEND>(even, scale, addend), PAIR * 2);
            odd = worth(weight_of<ADDEND>(odd, scale, addend), PAIR * 2 + 1);
        });
    }
}

#if defined(__AVX512BF16__)

// Whether such codes may have a scale for each LEAST_GROUP columns (linear_exact.cpp).
constexpr bool in_least_groups(Codes codes) {
    return codes == Codes::bits2 || codes == Codes::bits3 || codes == Codes::bits4 || is_byte(codes);
}

template <Codes CODES, int SUB, Addend ADDEND>
void round_block(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    Walk walk(layout, block);
    PanelWriter writer(panel);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::uint8_t* const codes = walk.next<CODES, SUB, ADDEND>();
        fetch_tile(codes + ROUNDED_AHEAD, tile_bytes(CODES));
        BfloatTile w;
        decode<CODES>(codes, decoding.table, w);
        writer.put([&](auto number, Sixteen& even, Sixteen& odd) __attribute__((always_inline)) {
            constexpr int PAIR = decltype(number)::value, PART = PAIR * (COLUMNS / SUB) / PAIRS;
            const Sixteen scale = walk.scale[PART], addend = walk.addend[PART];
            columns_of(w, PAIR, even, odd);
            even = weight_of<ADDEND>(even, scale, addend);
            odd = weight_of<ADDEND>(odd, scale, addend);
        });
    }
}

// The codes alone, which are bfloat16 numbers.
template <Codes CODES>
void lay_codes(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    Walk walk(layout, block);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile, panel += PANEL_TILE) {
        const std::uint8_t* const codes = walk.next<CODES, COLUMNS, Addend::none>();
        fetch_tile(codes + ROUNDED_AHEAD, tile_bytes(CODES));
        BfloatTile w;
        decode<CODES>(codes, decoding.table, w);
        UNROLL
        for (int pair = 0; pair < PAIRS; ++pair) _mm512_store_si512(panel + pair * OPERAND_BYTES, w[pair]);
    }
}

#else

template <Addend ADDEND>
void round_block(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    round_decoded<ADDEND>(layout, block, decoding, panel, [](std::int64_t) {}, [](Sixteen weight, int) { return weight; });
}

// Numbers without scales.
void round_codes(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    const TileDecoder decode = decode_function(layout.codes);
    const std::int64_t bytes = tile_bytes(layout.codes);
    PanelWriter writer(panel);
    BfloatTile w;
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        decode_ahead(decode, block + tile * bytes, bytes, decoding, w);
        writer.put([&](auto number, Sixteen& even, Sixteen& odd) __attribute__((always_inline)) {
            columns_of(w, decltype(number)::value, even, odd);
        });
    }
}

#endif

#if !defined(LOWBIT_AVX512)

// Some tokens times up to WORD_PANEL_COLUMNS columns of two blocks, one after the other.
struct PanelStep {
    const std::uint8_t* const (&panels)[2];
    const std::uint8_t* x;
    const float* x_scales;
    std::int64_t line_bytes, lines;
    bool first;  // of the row
    float (*const (&totals)[2])[ROWS];

    template <int TOKENS>
    INLINE void operator()(int token) const {
        for (int block = 0; block < 2; ++block) {
            SixteenInts sums[TOKENS];
            each_constant<TOKENS>([&](auto t) __attribute__((always_inline)) { sums[decltype(t)::value] = ints_set(0); });
            const std::uint8_t *w = panels[block] + WORD_PANEL_SCALES, *at = x + token * COLUMNS * 2;
            for (std::int64_t line = 0; line < lines; ++line, w += PANEL_TILE, at += line_bytes) add_line(w, at, sums);
            add_panel_sums(panels[block], sums, x_scales + token, first, totals[block] + token);
        }
    }

  private:
    // dot_words without loops: over these the sums would stay in memory from line to line.
    template <int TOKENS>
    static INLINE void add_line(const std::uint8_t* w, const std::uint8_t* x, SixteenInts (&sums)[TOKENS]) {
        each_constant<PAIRS>([&](auto pair) __attribute__((always_inline)) {
            constexpr int PAIR = decltype(pair)::value;
            SixteenInts both = ints_load(reinterpret_cast<const std::int32_t*>(w + PAIR * 64));
            KEEP_IN_REGISTER(both.low);
            KEEP_IN_REGISTER(both.high);
            each_constant<TOKENS>([&](auto t) __attribute__((always_inline)) {
                constexpr int TOKEN = decltype(t)::value;
                add_words(sums[TOKEN], both.low, both.high, two_words(reinterpret_cast<const std::int16_t*>(x) + TOKEN * COLUMNS + PAIR * 2));
            });
        });
    }
};

#endif

void round_plain_halves(const Layout& layout, const std::uint8_t* block, const Decoding&, std::uint8_t* panel) {
    PanelWriter writer(panel);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::uint8_t* const halves = block + tile * tile_bytes(Codes::f16);
        writer.put([&](auto number, Sixteen& even, Sixteen& odd) __attribute__((always_inline)) {
            const std::uint8_t* const at = halves + decltype(number)::value * 4 * ROWS;
            even = sixteen_f16(at);
            odd = sixteen_f16(at + 2 * ROWS);
        });
    }
}

// Codes with a scale, and perhaps a zero point, of each column beside those of their own.
template <Addend ADDEND>
void round_columns(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, Scales kind,
                   const ColumnScales& columns, std::uint8_t* panel) {
    alignas(64) float scales[COLUMNS], zeros[COLUMNS] = {};
    const auto begin = [&](std::int64_t tile) {
        by_column_kind(kind, [&](auto constant) {
            for (int half = 0; half < COLUMNS; half += 16) {
                const auto read = [&](const std::uint8_t* from) { return read_columns<decltype(constant)::value>(from, tile * COLUMNS + half); };
                sixteen_store(scales + half, read(columns.scales));
                if (columns.zeros != nullptr) sixteen_store(zeros + half, read(columns.zeros));
            }
        });
    };
    const auto worth = [&](Sixteen weight, int column) __attribute__((always_inline)) {
        return sixteen_multiply(sixteen_add(weight, sixteen_set(-zeros[column])), sixteen_set(scales[column]));
    };
    round_decoded<ADDEND>(layout, block, decoding, panel, begin, worth);
}

// Codes with outliers, which are put in one by one.
void round_with_outliers(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    const lowbit_weight& weight = *decoding.weight;
    const std::int64_t first = (block - weight.data) / layout.block_bytes * ROWS;
    Walk walk(layout, block);
    PanelWriter writer(panel);
    BfloatTile w;
    alignas(64) float numbers[COLUMNS][ROWS];
    std::int64_t done[ROWS] = {};  // outliers of each row
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        decode<Codes::bits3>(walk.next<Codes::bits3, COLUMNS / 2, Addend::zero>(), decoding.table, w);
        each_constant<PAIRS>([&](auto pair) __attribute__((always_inline)) {
            constexpr int PAIR = decltype(pair)::value, PART = PAIR * 2 / PAIRS;
            Sixteen even, odd;
            columns_of(w, PAIR, even, odd);
            sixteen_store(numbers[PAIR * 2], weight_of<Addend::zero>(even, walk.scale[PART], walk.addend[PART]));
            sixteen_store(numbers[PAIR * 2 + 1], weight_of<Addend::zero>(odd, walk.scale[PART], walk.addend[PART]));
        });
        for (int row = 0; row < ROWS && first + row < weight.rows; ++row) {
            RowOutliers outliers(weight, first + row);
            for (outliers.at += done[row]; outliers.at < outliers.end; ++outliers.at, ++done[row]) {
                const std::int64_t column = outlier_column(*outliers.at) - tile * COLUMNS;
                if (column >= COLUMNS) break;
                numbers[column][row] += outlier_number(*outliers.at);
            }
        }
        writer.put([&](auto pair, Sixteen& even, Sixteen& odd) __attribute__((always_inline)) {
            even = sixteen_load(numbers[decltype(pair)::value * 2]);
            odd = sixteen_load(numbers[decltype(pair)::value * 2 + 1]);
        });
    }
}

#if defined(__AVX512BF16__)
template <Codes CODES, int SUB>
RoundFunction by_addend(Addend addend) {
    if constexpr (has_addends(CODES)) {
        if (addend == Addend::offset) return round_block<CODES, SUB, Addend::offset>;
        if (addend == Addend::zero) return round_block<CODES, SUB, Addend::zero>;
    }
    return addend == Addend::none ? round_block<CODES, SUB, Addend::none> : nullptr;
}
#endif

// Whether a row's sums have one scale, or none.
bool sums_go_on(const Layout& layout) {
    return layout.scales == Scales::none || (layout.sub == COLUMNS && layout.unit == layout.tiles * COLUMNS);
}

}  // namespace

RoundFunction round_function(const Layout& layout, const WordCodes& words, bool exact) {
    if (layout.codes == Codes::f16) return layout.scales == Scales::none ? round_plain_halves : nullptr;
    if (layout.outliers) return round_with_outliers;
    if (is_words(layout.codes) || layout.codes == Codes::e8p || layout.codes == Codes::e8p_pair) return rounded_words(layout, words);
    const bool keeps_codes = !WORD_PANELS || (exact && !is_byte_float(layout.codes));
    if (keeps_codes && sums_go_on(layout)) return nullptr;
#if defined(__AVX512BF16__)
    if (layout.scales == Scales::none) return nullptr;
    return of_exact_codes<RoundFunction>(layout.codes, [&](auto codes) -> RoundFunction {
        constexpr Codes CODES = decltype(codes)::value;
        if constexpr (CODES == Codes::bf16) return nullptr;
        else if (layout.sub == COLUMNS) return by_addend<CODES, COLUMNS>(layout.addend);
        else if (layout.sub == COLUMNS / 2) return by_addend<CODES, COLUMNS / 2>(layout.addend);
        else if constexpr (in_least_groups(CODES)) return by_addend<CODES, LEAST_GROUP>(layout.addend);
        else return nullptr;
    });
#else
    if (decode_function(layout.codes) == nullptr) return nullptr;
    if (layout.scales == Scales::none) return round_codes;
    switch (layout.addend) {
        case Addend::none: return round_block<Addend::none>;
        case Addend::offset: return round_block<Addend::offset>;
        case Addend::zero: return round_block<Addend::zero>;
    }
    return nullptr;
#endif
}

RoundColumnsFunction round_columns_function(const Layout& layout) {
    if (decode_function(layout.codes) == nullptr || layout.scales == Scales::none) return nullptr;
    switch (layout.addend) {
        case Addend::none: return round_columns<Addend::none>;
        case Addend::offset: return round_columns<Addend::offset>;
        case Addend::zero: return round_columns<Addend::zero>;
    }
    return nullptr;
}

#if defined(__AVX512BF16__)

RoundFunction code_function(const Layout& layout) {
    if (!sums_go_on(layout) || layout.addend != Addend::none) return nullptr;
    return of_exact_codes<RoundFunction>(layout.codes, [&](auto codes) -> RoundFunction {
        constexpr Codes CODES = decltype(codes)::value;
        return CODES != Codes::bf16 || layout.scales == Scales::none ? lay_codes<CODES> : nullptr;
    });
}

#else

RoundFunction code_function(const Layout&) { return nullptr; }

#endif

#if defined(LOWBIT_AVX512)

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

#else

RoundFunction byte_code_function(const Layout&, const ByteCodes&, bool, std::int64_t) { return nullptr; }
void scale_sums(const Layout&, const std::uint8_t*, bool, const Input&, float (*)[ROWS]) {}  // of code_function's alone

void multiply_rounded(const std::uint8_t* const* panels, int blocks, bool, const RoundedInput& x, int tokens, std::int64_t lines,
                      bool goes_on, Unwritten& unwritten, float (*totals)[ROUNDED_TOKENS][ROWS]) {
    unwritten.fetch();
    multiply_word_panels<PanelStep>(panels, blocks, x, tokens, lines, goes_on, unwritten, totals);
}

#endif

}  // namespace lowbit

#endif
