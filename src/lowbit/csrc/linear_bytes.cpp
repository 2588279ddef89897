// Products with x as int8 numbers; see linear_bytes.h. AMX has byte_tiles for more than one token.
//
// Nothing here may differ with BF16: avx512 takes avx512_vnni's object (CMakeLists.txt; test_instruction_sets.py).

#include "linear_kernels.h"

namespace lowbit {
namespace {

// Where there are tiles for more than one token, the others need not be compiled.
template <typename Step>
INLINE void each_token([[maybe_unused]] int tokens, Step&& step) {
#if defined(LOWBIT_AMX)
    step.template operator()<1>(0);
#else
    for_tokens(tokens, step);
#endif
}

template <Codes CODES, bool LOOKED_UP, int SUB, Addend ADDEND>
struct GroupStep {
    const ByteTile& w;
    const Walk& walk;
    const Input& x;
    std::int64_t tile;
    float (*totals)[ROWS];

    template <int TOKENS>
    INLINE void operator()(int token) const {
        multiply<0, TOKENS>(token);
        if constexpr (SUB == 16) multiply<1, TOKENS>(token);
    }

  private:
    template <int HALF, int TOKENS>
    INLINE void multiply(int token) const {
        constexpr int COUNT = SUB * OPERANDS / COLUMNS;
        const std::int64_t span = tile * (COLUMNS / SUB) + HALF;
        const std::int32_t* const bases = x.bases + span * x.tokens + token;
        SixteenInts sums[TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) sums[t] = ints_set(bases[t]);
        dot_bytes<CODES, LOOKED_UP, HALF * COUNT, COUNT, TOKENS>(w, x.at<std::int8_t>(tile, token), COLUMNS, sums);
        const float* const x_sums = x.sums + span * x.tokens + token;
        const float* const x_scales = x.scales + tile * x.tokens + token;
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const Sixteen total = sixteen_load(totals[token + t]);
            const float x_sum = ADDEND == Addend::none ? 0.0f : x_sums[t];
            sixteen_store(totals[token + t], add_scaled<ADDEND>(total, sums[t], walk, HALF, x_scales[t], x_sum));
        }
    }
};

template <Codes CODES, bool LOOKED_UP, int SUB, Addend ADDEND>
void multiply_groups(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                     float (*totals)[ROWS]) {
    Walk walk(layout, block);
    const Ahead ahead(x.tokens, always_ahead_here());
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        ByteTile w;
        const std::uint8_t* const codes = walk.next<CODES, SUB, ADDEND>();
        ahead.fetch(codes, tile_bytes(CODES));
        if (x.tokens >= FETCHING_TOKENS) fetch_results(x, tile, layout.tiles);
        decode_bytes<CODES, LOOKED_UP>(codes, decoding.bytes, w);
        each_token(x.tokens, GroupStep<CODES, LOOKED_UP, SUB, ADDEND>{w, walk, x, tile, totals});
    }
}

template <Codes CODES, bool LOOKED_UP>
struct WideStep {
    const ByteTile& w;
    const Input& x;
    std::int64_t tile;
    std::int32_t (*sums)[ROWS];

    template <int TOKENS>
    INLINE void operator()(int token) const {
        SixteenInts held[TOKENS];
        // Few tokens are few chains of sums: fresh ones do not wait for the tile before.
        constexpr bool FRESH = TOKENS < 4;
        UNROLL
        for (int t = 0; t < TOKENS; ++t) held[t] = FRESH ? ints_set(0) : ints_load(sums[token + t]);
        dot_bytes<CODES, LOOKED_UP, 0, OPERANDS, TOKENS>(w, x.at<std::int8_t>(tile, token), COLUMNS, held);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            ints_store(sums[token + t], FRESH ? ints_add(held[t], ints_load(sums[token + t])) : held[t]);
        }
    }
};

// Sums stay whole numbers for all columns that share a scale.
template <Codes CODES, bool LOOKED_UP, Addend ADDEND>
void multiply_wide(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                   float (*totals)[ROWS]) {
    Walk walk(layout, block);
    const Ahead ahead(x.tokens, always_ahead_here());
    const std::int64_t per_group = layout.unit / COLUMNS;
    alignas(64) std::int32_t sums[TOKEN_TILE][ROWS];
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::int64_t group = tile / per_group;
        if (tile % per_group == 0) {
            for (int t = 0; t < x.tokens; ++t) ints_store(sums[t], ints_set(x.bases[group * x.tokens + t]));
        }
        ByteTile w;
        const std::uint8_t* const codes = walk.next<CODES, COLUMNS, ADDEND>();
        ahead.fetch(codes, tile_bytes(CODES));
        if (x.tokens >= FETCHING_TOKENS) fetch_results(x, tile, layout.tiles);
        decode_bytes<CODES, LOOKED_UP>(codes, decoding.bytes, w);
        each_token(x.tokens, WideStep<CODES, LOOKED_UP>{w, x, tile, sums});
        if ((tile + 1) % per_group == 0) add_group<ADDEND>(walk, x, group, sums, totals);
    }
}

template <Codes CODES, bool LOOKED_UP, Addend ADDEND>
BlockFunction by_group(const Layout& layout, bool grouped) {
    if (!grouped) return multiply_wide<CODES, LOOKED_UP, ADDEND>;
    return layout.sub == 16 ? multiply_groups<CODES, LOOKED_UP, 16, ADDEND> : multiply_groups<CODES, LOOKED_UP, 32, ADDEND>;
}

template <Codes CODES, bool LOOKED_UP = false>
BlockFunction by_addend(const Layout& layout, bool grouped) {
    switch (layout.addend) {
        case Addend::none: return by_group<CODES, LOOKED_UP, Addend::none>(layout, grouped);
        case Addend::offset: return by_group<CODES, LOOKED_UP, Addend::offset>(layout, grouped);
        case Addend::zero: return by_group<CODES, LOOKED_UP, Addend::zero>(layout, grouped);
    }
    return nullptr;
}

}  // namespace

BlockFunction byte_function(const Layout& layout, const ByteCodes& codes, bool grouped) {
    switch (layout.codes) {
        case Codes::bits1: return by_addend<Codes::bits1>(layout, grouped);
        case Codes::bits2: return by_addend<Codes::bits2>(layout, grouped);
        case Codes::bits3: return by_addend<Codes::bits3>(layout, grouped);
        case Codes::bits4:
            return codes.looked_up ? by_addend<Codes::bits4, true>(layout, grouped) : by_addend<Codes::bits4>(layout, grouped);
        case Codes::bits5: return by_addend<Codes::bits5>(layout, grouped);
        case Codes::bits6: return by_addend<Codes::bits6>(layout, grouped);
        case Codes::bits7: return by_addend<Codes::bits7>(layout, grouped);
        case Codes::int8: return by_addend<Codes::int8>(layout, grouped);
        case Codes::uint8: return by_addend<Codes::uint8>(layout, grouped);
        default: return nullptr;
    }
}

}  // namespace lowbit

