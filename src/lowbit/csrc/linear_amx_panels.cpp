// Panels (linear_panels.cpp) on AMX tiles.
#include "linear_amx.h"
#include "linear_rounded.h"

#if defined(LOWBIT_AMX)

#define INLINED __attribute__((always_inline))

namespace lowbit {
namespace {

// Up to 2 tiles of 16 tokens times up to 2 blocks: each product loads one tile. Panels stay in the first cache, which x
// passes by. Between products some of what is unwritten is written: those units are idle.
template <bool BYTES, int TILES, int BLOCKS>
void multiply_tiles_of(const std::uint8_t* const* panels, const RoundedInput& x, std::int64_t lines, bool goes_on,
                       Unwritten& unwritten, float (*totals)[ROUNDED_TOKENS][ROWS]) {
    const auto each_sum = [&](auto&& body) INLINED {
        each_constant<TILES>([&](auto tile) INLINED {
            constexpr int TILE = decltype(tile)::value;
            each_constant<BLOCKS>([&](auto block) INLINED {
                constexpr int BLOCK = decltype(block)::value;
                body(std::integral_constant<int, TILE * BLOCKS + BLOCK>(), totals[BLOCK][TILE * TILE_ROWS]);
            });
        });
    };
    each_sum([&](auto sum, float* total) INLINED {
        if (goes_on) tile_load<decltype(sum)::value>(total, TILE_LINE);
        else tile_zero<decltype(sum)::value>();
    });
    for (std::int64_t line = 0; line < lines; ++line) {
        tile_load_once<4>(x.tiles[0] + line * x.line_bytes[0], TILE_LINE);
        tile_pause();
        each_constant<BLOCKS>([&](auto block) INLINED {
            constexpr int BLOCK = decltype(block)::value;
            tile_load<6 + BLOCK>(panels[BLOCK] + line * PANEL_TILE, TILE_LINE);
            tile_pause();
        });
        if constexpr (TILES > 1) {
            tile_load_once<5>(x.tiles[1] + line * x.line_bytes[1], TILE_LINE);
            tile_pause();
        }
        each_sum([&](auto sum, float*) INLINED {
            constexpr int C = decltype(sum)::value, A = 4 + C / BLOCKS, B = 6 + C % BLOCKS;
            if constexpr (BYTES) tile_dot_bytes<C, A, B>();
            else tile_dot_bfloats<C, A, B>();
            if (unwritten.left > 0) unwritten.write_one();
            else tile_pause();
        });
    }
    unwritten.write_all();
    each_sum([&](auto sum, float* total) INLINED { tile_store<decltype(sum)::value>(total, TILE_LINE); });
}

}  // namespace

template <bool BYTES>
static void multiply_panels(const std::uint8_t* const* panels, int blocks, const RoundedInput& x, int tokens,
                            std::int64_t lines, bool goes_on, Unwritten& unwritten,
                            float (*totals)[ROUNDED_TOKENS][ROWS]) {
    const bool both = tokens > TILE_ROWS;
    const auto multiply = blocks > 1 ? (both ? multiply_tiles_of<BYTES, 2, 2> : multiply_tiles_of<BYTES, 1, 2>)
                                     : (both ? multiply_tiles_of<BYTES, 2, 1> : multiply_tiles_of<BYTES, 1, 1>);
    multiply(panels, x, lines, goes_on, unwritten, totals);
}

void multiply_rounded(const std::uint8_t* const* panels, int blocks, bool bytes, const RoundedInput& x, int tokens,
                      std::int64_t lines, bool goes_on, Unwritten& unwritten, float (*totals)[ROUNDED_TOKENS][ROWS]) {
    configure_tiles(std::min(TILE_ROWS, tokens));
    (bytes ? multiply_panels<true> : multiply_panels<false>)(panels, blocks, x, tokens, lines, goes_on, unwritten, totals);
}

}  // namespace lowbit

#endif
