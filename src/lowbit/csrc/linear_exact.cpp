// Exact products: codes as bfloat16 numbers (integers, table values) or floats, x rounded to bfloat16 at most.
//
// A tile is decoded once and multiplied with every token; totals stay in L1.

#include "linear_kernels.h"

namespace lowbit {
namespace {

template <int SUB, int PART, Addend ADDEND, bool SCALED, bool X_SCALED, int TOKENS, class Tile>
INLINE void multiply_part(const Tile& w, const Walk& walk, const Input& x, std::int64_t tile, int token,
                          float (*totals)[ROWS]) {
    Sixteen sums[TOKENS];
    dot<PART * SUB, SUB, TOKENS>(w, x.at<Bfloat16>(tile, token), COLUMNS, sums);
    const std::int64_t span = (tile * (COLUMNS / SUB) + PART) * x.tokens + token;
    const float* const x_sums = x.sums + span;
    const float* const x_scales = X_SCALED ? x.scales + span : nullptr;
    const Sixteen own = walk.scale[PART];  // once: totals that are stored might be these
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        Sixteen total = sixteen_load(totals[token + t]);
        const Sixteen scale = scale_of<X_SCALED>(own, x_scales + t);
        total = accumulate<ADDEND, SCALED>(total, sums[t], scale, walk.addend[PART],
                                           ADDEND == Addend::none ? 0.0f : x_sums[t]);
        sixteen_store(totals[token + t], total);
    }
    if constexpr ((PART + 1) * SUB < COLUMNS) {
        // Totals are read again: kept for the next part they and the second scales would not all find a register.
        if constexpr (X_SCALED) asm volatile("" ::: "memory");
        multiply_part<SUB, PART + 1, ADDEND, SCALED, X_SCALED, TOKENS>(w, walk, x, tile, token, totals);
    }
}

template <int SUB, Addend ADDEND, bool SCALED, bool X_SCALED, class Tile>
struct TileStep {
    const Tile& w;
    const Walk& walk;
    const Input& x;
    std::int64_t tile;
    float (*totals)[ROWS];
    template <int TOKENS>
    INLINE void operator()(int token) const {
        multiply_part<SUB, 0, ADDEND, SCALED, X_SCALED, TOKENS>(w, walk, x, tile, token, totals);
    }
};

#if defined(__AVX2__) && !defined(LOWBIT_AVX512)
// As for_tokens, and 6 at a time where there are many: sums of 6, a column and a number of x are 15 of 16 registers.
template <class Step>
INLINE void for_float_tokens(int tokens, const Step& step) {
    int token = 0;
    for (; tokens - token >= 6 && tokens - token != 8; token += 6) step.template operator()<6>(token);
    for (; tokens - token >= 4; token += 4) step.template operator()<4>(token);
    if (tokens - token >= 2) step.template operator()<2>(token), token += 2;
    if (token < tokens) step.template operator()<1>(token);
}
#else
template <class Step>
INLINE void for_float_tokens(int tokens, const Step& step) {
    for_tokens(tokens, step);
}
#endif

template <int SUB, Addend ADDEND, bool SCALED, bool X_SCALED, class Tile>
TILE_FUNCTION void multiply_tile(const Tile& w, const Walk& walk, const Input& x, std::int64_t tile,
                                 float (*totals)[ROWS]) {
    for_float_tokens(x.tokens, TileStep<SUB, ADDEND, SCALED, X_SCALED, Tile>{w, walk, x, tile, totals});
}

// 16 columns, the HALF-th of a tile's.
template <int HALF, bool SCALED>
struct FloatStep {
    const FloatTile& w;
    const Input& x;
    std::int64_t tile;
    Sixteen scale;
    float (*totals)[ROWS];
    template <int TOKENS>
    INLINE void operator()(int token) const {
        Sixteen sums[TOKENS];
        dot_floats<TOKENS>(w, x.at<float>(tile, token) + HALF * 16, COLUMNS, sums);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const Sixteen total = sixteen_load(totals[token + t]);
            sixteen_store(totals[token + t], SCALED ? sixteen_fma(scale, sums[t], total) : sixteen_add(total, sums[t]));
        }
    }
};

// One token: its total stays in a register, and nothing that is decoded goes through memory.
template <Codes CODES, int SUB, Addend ADDEND, bool SCALED, bool X_SCALED = false>
__attribute__((noinline)) void multiply_block_once(const Layout& layout, const std::uint8_t* block,
                                                   const Decoding& decoding, const Input& x, float* totals) {
    constexpr int PARTS = COLUMNS / SUB;
    Walk walk(layout, block);
    const Ahead ahead(1);
    Sixteen total = sixteen_load(totals);
    const auto add_tiles = [&](std::int64_t tile, auto count) __attribute__((always_inline)) {
        constexpr int TILES = decltype(count)::value;
        Sixteen scales[TILES][PARTS], addends[TILES][PARTS], sums[TILES][PARTS];
        const auto next = [&](int i) __attribute__((always_inline)) {
            const std::uint8_t* const codes = walk.next<CODES, SUB, ADDEND>();
            ahead.fetch(codes, tile_bytes(CODES));
            UNROLL
            for (int part = 0; part < PARTS; ++part) {
                if constexpr (SCALED) scales[i][part] = walk.scale[part];
                if constexpr (ADDEND != Addend::none) addends[i][part] = walk.addend[part];
            }
            return codes;
        };
        dot_once<CODES, SUB, TILES>(next, decoding.table, x.at<Bfloat16>(tile, 0), sums);
        UNROLL
        for (int i = 0; i < TILES; ++i) {
            UNROLL
            for (int part = 0; part < PARTS; ++part) {
                const std::int64_t span = (tile + i) * PARTS + part;
                const Sixteen scale = scale_of<X_SCALED>(scales[i][part], X_SCALED ? x.scales + span : nullptr);
                const float x_sum = ADDEND == Addend::none ? 0.0f : x.sums[span];
                total = accumulate<ADDEND, SCALED>(total, sums[i][part], scale, addends[i][part], x_sum);
            }
        }
    };
    std::int64_t tile = 0;
    if constexpr (tiles_in_turns(CODES, SUB)) {
        for (; tile + 2 <= layout.tiles; tile += 2) add_tiles(tile, std::integral_constant<int, 2>{});
    }
    for (; tile < layout.tiles; ++tile) add_tiles(tile, std::integral_constant<int, 1>{});
    sixteen_store(totals, total);
}

template <Codes CODES, int SUB, Addend ADDEND, bool SCALED, bool X_SCALED = false>
void multiply_block(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                    float (*totals)[ROWS]) {
    if (x.tokens == 1) {
        multiply_block_once<CODES, SUB, ADDEND, SCALED, X_SCALED>(layout, block, decoding, x, totals[0]);
        return;
    }
    Walk walk(layout, block);
    const Ahead ahead(x.tokens);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        BfloatTile w;
        const std::uint8_t* const codes = walk.next<CODES, SUB, ADDEND>();
        ahead.fetch(codes, tile_bytes(CODES));
        if (x.tokens >= FETCHING_TOKENS) fetch_results(x, tile, layout.tiles);
        decode<CODES>(codes, decoding.table, w);
        multiply_tile<SUB, ADDEND, SCALED, X_SCALED>(w, walk, x, tile, totals);
    }
}

#if defined(__AVX2__) && !defined(LOWBIT_AVX512)

// Tiles of 16-bit floats are converted anew for each few tokens: as floats they would be twice as much to read for all.
void multiply_bfloats(const Layout& layout, const std::uint8_t* block, const Decoding&, const Input& x,
                      float (*totals)[ROWS]) {
    const Walk walk(layout, block);  // without scales
    const Ahead ahead(x.tokens);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::uint8_t* const codes = block + tile * tile_bytes(Codes::bf16);
        ahead.fetch(codes, tile_bytes(Codes::bf16));
        if (x.tokens >= FETCHING_TOKENS) fetch_results(x, tile, layout.tiles);
        multiply_tile<COLUMNS, Addend::none, false, false>(BfloatPairs{codes}, walk, x, tile, totals);
    }
}

// One token and 8-bit floats, as float16.
template <Codes CODES, int SUB, bool X_SCALED>
__attribute__((noinline)) void multiply_byte_floats_once(const Layout& layout, const std::uint8_t* block, const Input& x,
                                                         float* totals) {
    constexpr int PARTS = COLUMNS / SUB;
    Walk walk(layout, block);
    FaultyRows<CODES> rows;
    Sixteen total = sixteen_load(totals);
    const auto add_tiles = [&](std::int64_t tile, auto count) __attribute__((always_inline)) {
        constexpr int TILES = decltype(count)::value;
        HalvesTile w[TILES];
        Sixteen scales[TILES][PARTS], sums[TILES][PARTS];
        UNROLL
        for (int i = 0; i < TILES; ++i) {
            decode_halves<CODES>(walk.next<CODES, SUB, Addend::none>(), rows, w[i]);
            UNROLL
            for (int part = 0; part < PARTS; ++part) scales[i][part] = walk.scale[part];
        }
        dot_halves<SUB, TILES>(w, x.at<Bfloat16>(tile, 0), sums);
        UNROLL
        for (int i = 0; i < TILES * PARTS; ++i) {
            const float* const x_scale = X_SCALED ? x.scales + tile * PARTS + i : nullptr;
            const Sixteen scale = scale_of<X_SCALED>(scales[i / PARTS][i % PARTS], x_scale);
            total = sixteen_fma(scale, sums[i / PARTS][i % PARTS], total);
        }
    };
    std::int64_t tile = 0;
    for (; tile + 2 <= layout.tiles; tile += 2) add_tiles(tile, std::integral_constant<int, 2>{});
    if (tile < layout.tiles) add_tiles(tile, std::integral_constant<int, 1>{});
    sixteen_store(totals, rows.finished(total));
}

template <Codes CODES, int SUB, bool X_SCALED>
void multiply_byte_floats(const Layout& layout, const std::uint8_t* block, const Decoding&, const Input& x,
                          float (*totals)[ROWS]) {
    if (x.tokens == 1) return multiply_byte_floats_once<CODES, SUB, X_SCALED>(layout, block, x, totals[0]);
    Walk walk(layout, block);
    FaultyRows<CODES> rows;
    const Ahead ahead(x.tokens);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::uint8_t* const codes = walk.next<CODES, SUB, Addend::none>();
        ahead.fetch(codes, tile_bytes(CODES));
        if (x.tokens >= FETCHING_TOKENS) fetch_results(x, tile, layout.tiles);
        HalvesTile w;
        decode_halves<CODES>(codes, rows, w);
        multiply_tile<SUB, Addend::none, true, X_SCALED>(w, walk, x, tile, totals);
    }
    for (int t = 0; t < x.tokens; ++t) sixteen_store(totals[t], rows.finished(sixteen_load(totals[t])));
}

#endif

// Codes under scales alone.
template <Codes CODES, int SUB, bool X_SCALED = false>
constexpr BlockFunction scaled_block() {
#if defined(__AVX2__) && !defined(LOWBIT_AVX512)
    if constexpr (is_byte_float(CODES)) return multiply_byte_floats<CODES, SUB, X_SCALED>;
    else
#endif
    return multiply_block<CODES, SUB, Addend::none, true, X_SCALED>;
}

template <Codes CODES, bool SCALED>
INLINE void multiply_float_tile(const std::uint8_t* codes, const Sixteen* scales, const Input& x, std::int64_t tile,
                                float (*totals)[ROWS]) {
    each_constant<2>([&](auto half) __attribute__((always_inline)) {
        constexpr int HALF = decltype(half)::value;
        const std::uint8_t* const from = codes + HALF * tile_bytes(CODES) / 2;
        const Sixteen scale = SCALED ? scales[HALF] : sixteen_zeros();
#if defined(__AVX2__) && !defined(LOWBIT_AVX512)
        if (x.tokens == 1) {  // from register to register
            const Sixteen sum = dot_floats_once<CODES>(from, x.at<float>(tile, 0) + HALF * 16);
            const Sixteen total = sixteen_load(totals[0]);
            return sixteen_store(totals[0], SCALED ? sixteen_fma(scale, sum, total) : sixteen_add(total, sum));
        }
#endif
        FloatTile w;
        decode_floats<CODES>(from, w);
        for_tokens(x.tokens, FloatStep<HALF, SCALED>{w, x, tile, scale, totals});
    });
}

// Floats, or SCALED: whole bytes under scales, which meet x in float32 16 columns at a time.
template <Codes CODES, bool SCALED>
void multiply_float_block(const Layout& layout, const std::uint8_t* block, const Decoding&, const Input& x,
                          float (*totals)[ROWS]) {
    Walk walk(layout, block);
    const int second = layout.sub == 16 ? 1 : 0;  // the second half's scale
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::uint8_t* codes = block + tile * tile_bytes(CODES);
        if constexpr (SCALED) codes = walk.next();
        if (x.tokens >= FETCHING_TOKENS) {
            fetch_ahead<tile_bytes(CODES)>(codes);
            fetch_results(x, tile, layout.tiles);
        }
        const Sixteen scales[2] = {walk.scale[0], walk.scale[second]};
        multiply_float_tile<CODES, SCALED>(codes, scales, x, tile, totals);
    }
}

#if defined(__AVX2__) && !defined(__AVX512BF16__)

// Codes that are nearly always whole numbers, and so meet x as words: one function for all tables that are not.
template <int SUB, Addend ADDEND>
void multiply_any(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                  float (*totals)[ROWS]) {
    const TileDecoder decode = decode_function(layout.codes);
    const std::int64_t bytes = tile_bytes(layout.codes);
    Walk walk(layout, block);
    BfloatTile w;
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        decode(walk.next<SUB, ADDEND>(bytes), decoding.table, w);
        multiply_tile<SUB, ADDEND, true, false>(w, walk, x, tile, totals);
    }
}
template <Codes, int SUB, Addend ADDEND>
constexpr BlockFunction block_function() {
    return multiply_any<SUB, ADDEND>;
}

#else

template <Codes CODES, int SUB, Addend ADDEND>
constexpr BlockFunction block_function() {
    return multiply_block<CODES, SUB, ADDEND, true>;
}

#endif

template <Codes CODES, int SUB>
BlockFunction by_addend(Addend addend) {
    switch (addend) {
        case Addend::none: return block_function<CODES, SUB, Addend::none>();
        case Addend::offset: return block_function<CODES, SUB, Addend::offset>();
        case Addend::zero: return block_function<CODES, SUB, Addend::zero>();
    }
    return nullptr;
}

template <Codes CODES>
BlockFunction by_sub(const Layout& layout) {
    return layout.sub == 16 ? by_addend<CODES, 16>(layout.addend) : by_addend<CODES, 32>(layout.addend);
}

template <Codes CODES>
BlockFunction without_addend(const Layout& layout) {
    if (layout.addend != Addend::none) return nullptr;
    if constexpr (is_grid(CODES)) {
        return layout.sub == 16 ? block_function<CODES, 16, Addend::none>() : block_function<CODES, 32, Addend::none>();
    }
    return layout.sub == 16 ? scaled_block<CODES, 16>() : scaled_block<CODES, 32>();
}

}  // namespace

BlockFunction float_function(const Layout& layout) {
    const bool scaled = layout.addend == Addend::none && layout.scales != Scales::none && layout.sub != LEAST_GROUP;
    return scaled && layout.codes == Codes::int8 ? multiply_float_block<Codes::int8, true> : nullptr;
}

#if !defined(LOWBIT_AMX)
template <Codes CODES>
static BlockFunction scaled_by_sub(const Layout& layout) {
    return layout.sub == 16 ? scaled_block<CODES, 16, true>() : scaled_block<CODES, 32, true>();
}
#endif

BlockFunction scaled_function(const Layout& layout) {
    if (layout.addend != Addend::none || layout.scales == Scales::none || layout.sub == LEAST_GROUP) return nullptr;
    switch (layout.codes) {
#if !defined(LOWBIT_AMX)
        case Codes::bits4: return scaled_by_sub<Codes::bits4>(layout);
        case Codes::bits6: return scaled_by_sub<Codes::bits6>(layout);
        case Codes::int8: return scaled_by_sub<Codes::int8>(layout);
        case Codes::e4m3: return scaled_by_sub<Codes::e4m3>(layout);
        case Codes::e5m2: return scaled_by_sub<Codes::e5m2>(layout);
#endif
        default: return nullptr;
    }
}

// Whole bytes, unless they meet x as words.
template <Codes CODES>
static BlockFunction whole_bytes([[maybe_unused]] const Layout& layout) {
    if constexpr (CODES_AS_WORDS) return nullptr;
    else if (layout.sub == LEAST_GROUP) return by_addend<CODES, LEAST_GROUP>(layout.addend);
#if !defined(LOWBIT_AMX)
    else return by_sub<CODES>(layout);
#else
    else return nullptr;
#endif
}

template <Codes CODES>
static BlockFunction byte_floats_in_eights(const Layout& layout) {
    return layout.addend == Addend::none ? scaled_block<CODES, LEAST_GROUP>() : nullptr;
}

BlockFunction exact_function(const Layout& layout) {
    if (layout.sub == LEAST_GROUP) {  // under AMX too
        switch (layout.codes) {
            case Codes::bits2: return by_addend<Codes::bits2, LEAST_GROUP>(layout.addend);
            case Codes::bits3: return by_addend<Codes::bits3, LEAST_GROUP>(layout.addend);
            case Codes::bits4: return by_addend<Codes::bits4, LEAST_GROUP>(layout.addend);
            case Codes::int8: return whole_bytes<Codes::int8>(layout);
            case Codes::uint8: return whole_bytes<Codes::uint8>(layout);
            case Codes::e4m3: return byte_floats_in_eights<Codes::e4m3>(layout);
            case Codes::e5m2: return byte_floats_in_eights<Codes::e5m2>(layout);
            case Codes::e4m3fnuz: return byte_floats_in_eights<Codes::e4m3fnuz>(layout);
            case Codes::e5m2fnuz: return byte_floats_in_eights<Codes::e5m2fnuz>(layout);
            default: return nullptr;
        }
    }
    switch (layout.codes) {
#if !defined(LOWBIT_AMX)  // there exact_tiles has them
        case Codes::bits1: return by_sub<Codes::bits1>(layout);
        case Codes::bits2: return by_sub<Codes::bits2>(layout);
        case Codes::bits3: return by_sub<Codes::bits3>(layout);
        case Codes::bits4: return by_sub<Codes::bits4>(layout);
        case Codes::bits5: return by_sub<Codes::bits5>(layout);
        case Codes::bits6: return by_sub<Codes::bits6>(layout);
        case Codes::bits7: return by_sub<Codes::bits7>(layout);
        case Codes::int8: return whole_bytes<Codes::int8>(layout);
        case Codes::uint8: return whole_bytes<Codes::uint8>(layout);
        case Codes::e4m3: return without_addend<Codes::e4m3>(layout);
        case Codes::e5m2: return without_addend<Codes::e5m2>(layout);
        case Codes::e4m3fnuz: return without_addend<Codes::e4m3fnuz>(layout);
        case Codes::e5m2fnuz: return without_addend<Codes::e5m2fnuz>(layout);
        case Codes::grid2_256: return without_addend<Codes::grid2_256>(layout);
        case Codes::grid2_512: return without_addend<Codes::grid2_512>(layout);
        case Codes::grid2_1024: return without_addend<Codes::grid2_1024>(layout);
        case Codes::grid1_2048: return without_addend<Codes::grid1_2048>(layout);
        case Codes::grid3_256: return without_addend<Codes::grid3_256>(layout);
        case Codes::grid3_512: return without_addend<Codes::grid3_512>(layout);
#if defined(__AVX2__) && !defined(LOWBIT_AVX512)
        case Codes::bf16: return multiply_bfloats;
#else
        case Codes::bf16: return multiply_block<Codes::bf16, COLUMNS, Addend::none, false>;
#endif
#endif
        case Codes::f16: return multiply_float_block<Codes::f16, false>;
        case Codes::f32: return multiply_float_block<Codes::f32, false>;
        default: return nullptr;
    }
}

}  // namespace lowbit
