// Products of tables of whole numbers with x as InputKind::words; see linear_words.h.

#include "linear_kernels.h"

namespace lowbit {
namespace {

template <int SUB>
struct WordStep {
    const WordTile& w;
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
        SixteenInts sums[TOKENS];
        dot_words<HALF * SUB, SUB, TOKENS>(w, x.at<std::int16_t>(tile, token), COLUMNS, sums);
        const float* const x_scales = x.scales + tile * x.tokens + token;
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const Sixteen scale = sixteen_multiply(walk.scale[HALF], sixteen_set(x_scales[t]));
            const Sixteen total = sixteen_load(totals[token + t]);
            sixteen_store(totals[token + t], sixteen_fma(scale, ints_to_floats(sums[t]), total));
        }
    }
};

template <Codes CODES, int SUB>
void multiply_words(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                    float (*totals)[ROWS]) {
    Walk walk(layout, block);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        WordTile w;
        const std::uint8_t* const codes = walk.next();
        if (x.tokens >= FETCHING_TOKENS) fetch_ahead<tile_bytes(CODES)>(codes);
        decode_words<CODES>(codes, decoding.table, w);
        for_tokens(x.tokens, WordStep<SUB>{w, walk, x, tile, totals});
    }
}

}  // namespace

BlockFunction word_function(const Layout& layout) {
    if (layout.codes != Codes::words4 || layout.addend != Addend::none) return nullptr;
    return layout.sub == 16 ? multiply_words<Codes::words4, 16> : multiply_words<Codes::words4, 32>;
}

}  // namespace lowbit
