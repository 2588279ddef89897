// Two blocks of 16 rows in turns, for some tokens and more under AVX-512.
//
// A core of AMD Zen 5 starts two products a cycle, and a sum waits six cycles for the product before (of bfloat16): the
// eight tokens whose sums fit beside a tile in registers leave a third of it idle. Here the tiles of two blocks lie in
// memory, so that 16 sums are under way, and what is read of x serves both. Where a core starts one product a cycle (Zen 4)
// eight sums are enough, and tiles stay in registers: panels alone are taken in pairs there.
//
// The order of every sum is that of one block alone (linear_tiles.h), and so are the bits.

#include "amd_family.h"
#include "linear_kernels.h"
#include "linear_rounded.h"

#if defined(LOWBIT_AVX512) && !defined(LOWBIT_AMX)

namespace lowbit {
namespace {

constexpr std::int64_t PAIRED_TOKENS = 16;
bool pairs_are_faster(std::int64_t tokens) {
#if defined(__AVX512BF16__)
    if (amd_family() != 0 && amd_family() < ZEN5) return false;
#endif
    return tokens >= PAIRED_TOKENS;
}

constexpr std::int64_t PAIR_AHEAD = 2048;  // bytes that a tile is fetched ahead: a block's are few
constexpr int OPERAND_BYTES = 64;

// Writes a tile's operands, one behind another.
using Decode = void (*)(const std::uint8_t* tile, const Decoding&, std::uint8_t* to);

// What is multiplied. Sum: 16 rows' sums of products. An operand meets four bytes of a token's x.

#if defined(__AVX512BF16__)

// Numbers of bfloat16. A null ``decoder``: the weight's tiles are operands as they lie.
template <bool SCALED, bool X_SCALED>
struct Bfloats {
    using Sum = Sixteen;
    static constexpr int OPERANDS_OF_TILE = PAIRS;

    static INLINE Sum start(const Input&, std::int64_t) { return sixteen_zeros(); }
    static INLINE Sum dot(Sum sum, __m512i w, __m512i x) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
    }
    template <Addend ADDEND>
    static INLINE Sixteen added(Sixteen total, Sum sum, const Walk& walk, int part, const Input& x, std::int64_t span, std::int64_t) {
        const Sixteen scale = scale_of<X_SCALED>(walk.scale[part], X_SCALED ? x.scales + span : nullptr);
        return accumulate<ADDEND, SCALED>(total, sum, scale, walk.addend[part], ADDEND == Addend::none ? 0.0f : x.sums[span]);
    }
    static Decode decoder(const Layout& layout, const Decoding&);
    static BlockFunction alone(const Layout& layout, const Decoding&) {
        return X_SCALED ? scaled_function(layout) : exact_function(layout);
    }
};

#endif

// Whole numbers of 16 bits. BASED: x's sums times a base start the sums.
template <bool BASED>
struct Words {
    using Sum = SixteenInts;
    static constexpr int OPERANDS_OF_TILE = PAIRS;

    static INLINE Sum start(const Input& x, std::int64_t span) { return ints_set(BASED ? x.bases[span] : 0); }
    static INLINE Sum dot(Sum sum, __m512i w, __m512i x) {
#if defined(LOWBIT_EMULATED_AVX512)
        return _mm512_dpwssd_epi32(sum, w, x);
#else
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));  // GCC 12 copies the sums of its own function at every turn
        return sum;
#endif
    }
    template <Addend ADDEND>
    static INLINE Sixteen added(Sixteen total, Sum sum, const Walk& walk, int part, const Input& x, std::int64_t span, std::int64_t) {
        return add_scaled<ADDEND>(total, sum, walk, part, x.scales[span], ADDEND == Addend::none ? 0.0f : x.sums[span]);
    }
    static Decode decoder(const Layout& layout, const Decoding&);
    static BlockFunction alone(const Layout& layout, const Decoding& decoding) { return word_function(layout, decoding.words); }
};

// Unsigned bytes; x has a scale for each tile.
struct Bytes {
    using Sum = SixteenInts;
    static constexpr int OPERANDS_OF_TILE = OPERANDS;

    static INLINE Sum start(const Input& x, std::int64_t span) { return ints_set(x.bases[span]); }
    static INLINE Sum dot(Sum sum, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(sum, w, x); }
    template <Addend ADDEND>
    static INLINE Sixteen added(Sixteen total, Sum sum, const Walk& walk, int part, const Input& x, std::int64_t span,
                                std::int64_t place) {
        return add_scaled<ADDEND>(total, sum, walk, part, x.scales[place], ADDEND == Addend::none ? 0.0f : x.sums[span]);
    }
    static Decode decoder(const Layout& layout, const Decoding&);
    static BlockFunction alone(const Layout& layout, const Decoding& decoding) {
        return byte_function(layout, decoding.bytes, true);
    }
};

// sums[block][t] += COUNT operands of both tiles times those of token t, ``stride`` bytes a token.
template <class Kind, int COUNT, int TOKENS>
INLINE void dot_both(const std::uint8_t* const (&w)[2], const std::uint8_t* x, std::int64_t stride,
                     typename Kind::Sum (&sums)[2][TOKENS]) {
    UNROLL
    for (int operand = 0; operand < COUNT; ++operand) {
        __m512i one = _mm512_loadu_si512(w[0] + operand * OPERAND_BYTES), other = _mm512_loadu_si512(w[1] + operand * OPERAND_BYTES);
        // Each is read once, and not by every product.
        asm volatile("" : "+" ZMM(one), "+" ZMM(other));
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            std::int32_t four;
            std::memcpy(&four, x + t * stride + operand * 4, sizeof four);
            __m512i both = _mm512_set1_epi32(four);
            asm volatile("" : "+" ZMM(both));
            sums[0][t] = Kind::dot(sums[0][t], one, both);
            sums[1][t] = Kind::dot(sums[1][t], other, both);
        }
    }
}

// Some tokens times a tile of each block.
template <class Kind, int SUB, Addend ADDEND>
struct PairStep {
    const std::uint8_t* const (&w)[2];
    const Walk (&walks)[2];
    const Input& x;
    std::int64_t tile;
    float (*const (&totals)[2])[ROWS];

    template <int TOKENS>
    INLINE void operator()(int token) const {
        multiply<0, TOKENS>(token);
        if constexpr (SUB < COLUMNS) multiply<1, TOKENS>(token);
    }

  private:
    template <int PART, int TOKENS>
    INLINE void multiply(int token) const {
        constexpr int COUNT = Kind::OPERANDS_OF_TILE * SUB / COLUMNS, STRIDE = Kind::OPERANDS_OF_TILE * 4;
        const std::int64_t place = tile * x.tokens + token;
        const std::int64_t span = (tile * (COLUMNS / SUB) + PART) * x.tokens + token;
        typename Kind::Sum sums[2][TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) sums[0][t] = sums[1][t] = Kind::start(x, span + t);
        const std::uint8_t* const operands[2] = {w[0] + PART * COUNT * OPERAND_BYTES, w[1] + PART * COUNT * OPERAND_BYTES};
        dot_both<Kind, COUNT, TOKENS>(operands, x.values + place * STRIDE + PART * COUNT * 4, STRIDE, sums);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            UNROLL
            for (int block = 0; block < 2; ++block) {
                float* const at = totals[block][token + t];
                const Sixteen total = sixteen_load(at);
                sixteen_store(at, Kind::template added<ADDEND>(total, sums[block][t], walks[block], PART, x, span + t, place + t));
            }
        }
    }
};

// A tile of each block, made or as it lies.
template <int OPERANDS_OF_TILE>
class TilePair {
  public:
    TilePair(const Layout& layout, const std::uint8_t* first, Decode decode, const Decoding& decoding, const Input& x)
        : layout_(layout),
          ends_{first + layout.block_bytes, first + 2 * layout.block_bytes},
          decode_(decode),
          decoding_(decoding),
          x_(x),
          bytes_(tile_bytes(layout.codes)) {}

    template <int SUB, Addend ADDEND>
    INLINE void next(Walk (&walks)[2], std::int64_t tile) {
        UNROLL
        for (int block = 0; block < 2; ++block) {
            const std::uint8_t* const codes = walks[block].next<SUB, ADDEND>(bytes_);
            // Behind a block comes what the other one has read, or will have: the next pair's is asked for.
            const std::int64_t ahead = std::max(PAIR_AHEAD, 2 * bytes_);
            fetch_tile(codes + ahead + (ends_[block] - codes > ahead ? 0 : layout_.block_bytes), bytes_);
            at[block] = codes;
            if (decode_ == nullptr) continue;
            decode_(codes, decoding_, made_[block]);
            at[block] = made_[block];
        }
        // The results of both are neighbours.
        fetch_results(x_, tile, layout_.tiles);
    }

    const std::uint8_t* at[2];

  private:
    const Layout& layout_;
    const std::uint8_t* const ends_[2];
    const Decode decode_;
    const Decoding& decoding_;
    const Input& x_;
    const std::int64_t bytes_;
    alignas(64) std::uint8_t made_[2][OPERANDS_OF_TILE * OPERAND_BYTES];
};

using BlockTotals = float (*)[TOKEN_TILE][ROWS];

// What there is no pair of, or too few tokens for one.
void multiply_alone(BlockFunction function, const Layout& layout, const std::uint8_t* first, int blocks, const Decoding& decoding,
                    const Input& x, BlockTotals totals) {
    for (int i = 0; i < blocks; ++i) function(layout, first + i * layout.block_bytes, decoding, x, totals[i]);
}

template <class Kind, int SUB, Addend ADDEND>
void multiply_pair(const Layout& layout, const std::uint8_t* first, int blocks, const Decoding& decoding, const Input& x,
                   BlockTotals totals) {
    if (blocks != 2 || x.tokens < PAIRED_TOKENS) {
        return multiply_alone(Kind::alone(layout, decoding), layout, first, blocks, decoding, x, totals);
    }
    Walk walks[2] = {{layout, first}, {layout, first + layout.block_bytes}};
    TilePair<Kind::OPERANDS_OF_TILE> pair(layout, first, Kind::decoder(layout, decoding), decoding, x);
    float(*const of_blocks[2])[ROWS] = {totals[0], totals[1]};
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        pair.template next<SUB, ADDEND>(walks, tile);
        for_tokens(x.tokens, PairStep<Kind, SUB, ADDEND>{pair.at, walks, x, tile, of_blocks});
    }
}

// Decoders.

// Numbers of 16 bits: bfloat16s, or whole ones.
template <Codes CODES, bool WHOLE>
void decode_numbers(const std::uint8_t* tile, const Decoding& decoding, std::uint8_t* to) {
    __m512i w[PAIRS];
    if constexpr (WHOLE) decode_words<CODES>(tile, decoding.word_table(), w);
    else decode<CODES>(tile, decoding.table, w);
    UNROLL
    for (int pair = 0; pair < PAIRS; ++pair) _mm512_store_si512(to + pair * OPERAND_BYTES, w[pair]);
}

template <Codes CODES, bool LOOKED_UP>
void decode_byte_operands(const std::uint8_t* tile, const Decoding& decoding, std::uint8_t* to) {
    ByteTile w;
    decode_bytes<CODES, LOOKED_UP>(tile, decoding.bytes, w);
    UNROLL
    for (int operand = 0; operand < OPERANDS; ++operand) _mm512_store_si512(to + operand * OPERAND_BYTES, w[operand]);
}

#if defined(__AVX512BF16__)
template <bool SCALED, bool X_SCALED>
Decode Bfloats<SCALED, X_SCALED>::decoder(const Layout& layout, const Decoding&) {
    return of_exact_codes<Decode>(layout.codes, [](auto codes) -> Decode {
        constexpr Codes CODES = decltype(codes)::value;
        return CODES == Codes::bf16 ? nullptr : decode_numbers<CODES, false>;
    });
}
#endif

template <bool BASED>
Decode Words<BASED>::decoder(const Layout& layout, const Decoding&) {
    if constexpr (CODES_AS_WORDS) {
        const Decode found = of_exact_codes<Decode>(layout.codes, [](auto codes) -> Decode {
            constexpr Codes CODES = decltype(codes)::value;
            constexpr bool NUMBERS = CODES == Codes::bf16 || is_byte_float(CODES);
            if constexpr (NUMBERS) return nullptr;
            else return decode_numbers<CODES, true>;
        });
        if (found != nullptr) return found;
    }
    return decode_numbers<BASED ? Codes::e8p : Codes::words4, true>;
}

Decode Bytes::decoder(const Layout& layout, const Decoding& decoding) {
    switch (layout.codes) {
        case Codes::bits1: return decode_byte_operands<Codes::bits1, false>;
        case Codes::bits2: return decode_byte_operands<Codes::bits2, false>;
        case Codes::bits3: return decode_byte_operands<Codes::bits3, false>;
        case Codes::bits4:
            return decoding.bytes.looked_up ? decode_byte_operands<Codes::bits4, true> : decode_byte_operands<Codes::bits4, false>;
        case Codes::bits5: return decode_byte_operands<Codes::bits5, false>;
        case Codes::bits6: return decode_byte_operands<Codes::bits6, false>;
        case Codes::bits7: return decode_byte_operands<Codes::bits7, false>;
        case Codes::int8: return decode_byte_operands<Codes::int8, false>;
        default: return decode_byte_operands<Codes::uint8, false>;
    }
}

// Functions.

template <class Kind, int SUB>
BlocksFunction by_addend(Addend addend) {
    switch (addend) {
        case Addend::none: return multiply_pair<Kind, SUB, Addend::none>;
        case Addend::offset: return multiply_pair<Kind, SUB, Addend::offset>;
        case Addend::zero: return multiply_pair<Kind, SUB, Addend::zero>;
    }
    return nullptr;
}

template <class Kind>
BlocksFunction by_sub(const Layout& layout) {
    if (layout.sub == LEAST_GROUP) return nullptr;
    return layout.sub == COLUMNS ? by_addend<Kind, COLUMNS>(layout.addend) : by_addend<Kind, COLUMNS / 2>(layout.addend);
}

// Some tokens times the panels of two blocks, or of one twice.
template <class Kind>
struct PanelStep {
    const std::uint8_t* const (&panels)[2];
    const std::uint8_t* x;
    std::int64_t line_bytes, lines;
    bool goes_on;
    float (*const (&totals)[2])[ROWS];

    template <int TOKENS>
    INLINE void operator()(int token) const {
        constexpr int STRIDE = Kind::OPERANDS_OF_TILE * 4;
        typename Kind::Sum sums[2][TOKENS];
        std::memset(sums, 0, sizeof sums);
        if (goes_on) {
            UNROLL
            for (int t = 0; t < TOKENS; ++t) {
                for (int block = 0; block < 2; ++block) std::memcpy(&sums[block][t], totals[block][token + t], sizeof sums[block][t]);
            }
        }
        const std::uint8_t* w[2] = {panels[0], panels[1]};
        const std::uint8_t* at = x + token * STRIDE;
        for (std::int64_t line = 0; line < lines; ++line, at += line_bytes) {
            dot_both<Kind, Kind::OPERANDS_OF_TILE, TOKENS>(w, at, STRIDE, sums);
            for (int block = 0; block < 2; ++block) w[block] += Kind::OPERANDS_OF_TILE * OPERAND_BYTES;
        }
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            for (int block = 0; block < 2; ++block) std::memcpy(totals[block][token + t], &sums[block][t], sizeof sums[block][t]);
        }
    }
};

template <class Kind>
void multiply_panels(const std::uint8_t* const* panels, int blocks, const RoundedInput& x, int tokens, std::int64_t lines,
                     bool goes_on, float (*totals)[ROUNDED_TOKENS][ROWS]) {
    const std::uint8_t* const both[2] = {panels[0], panels[blocks - 1]};
    for (int first = 0; first < tokens; first += ROUNDED_TOKENS / 2) {
        const int tile = first / (ROUNDED_TOKENS / 2);
        float(*const to[2])[ROWS] = {totals[0] + first, totals[blocks - 1] + first};
        for_tokens(std::min(tokens - first, ROUNDED_TOKENS / 2),
                   PanelStep<Kind>{both, x.tiles[tile], x.line_bytes[tile], lines, goes_on, to});
    }
}

#if !defined(__AVX512BF16__)

// The same with up to WORD_PANEL_COLUMNS columns of panels of whole numbers, whose sums are scaled.
struct WordPanelStep {
    const std::uint8_t* const (&panels)[2];
    const std::uint8_t* x;
    const float* x_scales;
    std::int64_t line_bytes, lines;
    bool first;  // of the row
    float (*const (&totals)[2])[ROWS];

    template <int TOKENS>
    INLINE void operator()(int token) const {
        using Kind = Words<false>;
        constexpr int STRIDE = PAIRS * 4;
        const std::uint8_t* w[2] = {panels[0] + WORD_PANEL_SCALES, panels[1] + WORD_PANEL_SCALES};
        const std::uint8_t* at = x + token * STRIDE;
        Kind::Sum sums[2][TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) sums[0][t] = sums[1][t] = ints_set(0);
        for (std::int64_t line = 0; line < lines; ++line, at += line_bytes) {
            dot_both<Kind, PAIRS, TOKENS>(w, at, STRIDE, sums);
            for (const std::uint8_t*& operands : w) operands += PAIRS * OPERAND_BYTES;
        }
        for (int block = 0; block < 2; ++block) add_panel_sums(panels[block], sums[block], x_scales + token, first, totals[block] + token);
    }
};

#endif

}  // namespace

void multiply_rounded(const std::uint8_t* const* panels, int blocks, bool bytes, const RoundedInput& x, int tokens,
                      std::int64_t lines, bool goes_on, Unwritten& unwritten, float (*totals)[ROUNDED_TOKENS][ROWS]) {
    if (WORD_PANELS && !bytes) unwritten.fetch();
    else unwritten.write_all();
    if (bytes) return multiply_panels<Bytes>(panels, blocks, x, tokens, lines, goes_on, totals);
#if defined(__AVX512BF16__)
    multiply_panels<Bfloats<false, false>>(panels, blocks, x, tokens, lines, goes_on, totals);
#else
    multiply_word_panels<WordPanelStep>(panels, blocks, x, tokens, lines, goes_on, unwritten, totals);
#endif
}

#if defined(__AVX512BF16__)

BlocksFunction exact_tiles(const Layout& layout, std::int64_t tokens) {
    if (!pairs_are_faster(tokens) || is_float(layout.codes)) return nullptr;
    if (layout.codes == Codes::bf16) return multiply_pair<Bfloats<false, false>, COLUMNS, Addend::none>;
    return by_sub<Bfloats<true, false>>(layout);
}

BlocksFunction scaled_tiles(const Layout& layout, std::int64_t tokens) {
    if (!pairs_are_faster(tokens) || scaled_function(layout) == nullptr) return nullptr;
    using Kind = Bfloats<true, true>;
    return layout.sub == COLUMNS ? multiply_pair<Kind, COLUMNS, Addend::none> : multiply_pair<Kind, COLUMNS / 2, Addend::none>;
}

#else

BlocksFunction exact_tiles(const Layout&, std::int64_t) { return nullptr; }
BlocksFunction scaled_tiles(const Layout&, std::int64_t) { return nullptr; }

#endif

BlocksFunction byte_tiles(const Layout& layout, const ByteCodes&, bool grouped, std::int64_t tokens) {
    if (!pairs_are_faster(tokens)) return nullptr;
    return grouped ? by_sub<Bytes>(layout) : nullptr;  // where sums go on, more of them in memory cost what they save
}

BlocksFunction word_tiles(const Layout& layout, const WordCodes& codes, std::int64_t tokens) {
    if (!pairs_are_faster(tokens) || layout.scales == Scales::none) return nullptr;
    if (layout.codes == Codes::e8p) return multiply_pair<Words<true>, COLUMNS, Addend::none>;
    if (CODES_AS_WORDS && (codes.kind == WordKind::line || codes.kind == WordKind::bytes)) return by_sub<Words<true>>(layout);
    const bool table = layout.codes == Codes::words4 || layout.codes == Codes::bits4 || layout.codes == Codes::bits6;
    return table && codes.kind == WordKind::wide ? by_sub<Words<false>>(layout) : nullptr;
}

}  // namespace lowbit

#endif
