// What the kinds of linear kernels share: one block of 16 rows times one tile of tokens.
#pragma once

#include "linear_input.h"

namespace lowbit {

constexpr int TOKEN_TILE = 64;    // tokens whose totals fit in L1
#if defined(__AVX512BF16__)
constexpr int TOKEN_STEP = 8;     // tokens whose sums fit in registers beside a tile
#else
constexpr int TOKEN_STEP = 4;
#endif

// How a weight's codes become numbers.
struct Decoding {
    explicit Decoding(const lowbit_weight& weight) : table(weight.table), bytes(weight) {}
    Table table;
    ByteCodes bytes;
};

// totals[token] += the block's rows times x; totals start at zero.
using BlockFunction = void (*)(const Layout&, const std::uint8_t* block, const Decoding&, const Input&,
                               float (*totals)[ROWS]);

// x rounded to bfloat16, or float32 where codes are floats. linear_exact.cpp
BlockFunction exact_function(const Layout& layout);

// x as whole numbers: int8 with a scale for each 32 columns, or, ``grouped`` false, sums over whole groups of the
// weight. Null where the codes are no bytes. linear_bytes.cpp
BlockFunction byte_function(const Layout& layout, const ByteCodes& codes, bool grouped);

// step<TOKENS>(token) for all tokens, TOKEN_STEP at a time and the rest in halves.
template <typename Step>
inline void for_tokens(int tokens, Step&& step) {
    int token = 0;
    for (; token + TOKEN_STEP <= tokens; token += TOKEN_STEP) step.template operator()<TOKEN_STEP>(token);
    if constexpr (TOKEN_STEP > 4) {
        if (token + 4 <= tokens) step.template operator()<4>(token), token += 4;
    }
    if (token + 2 <= tokens) step.template operator()<2>(token), token += 2;
    if (token < tokens) step.template operator()<1>(token);
}

}  // namespace lowbit
