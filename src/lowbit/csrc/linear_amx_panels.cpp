// Panels (linear_panels.cpp) on AMX tiles.
#include "linear_amx.h"
#include "linear_rounded.h"

#if defined(LOWBIT_AMX)

#define INLINED __attribute__((always_inline))

namespace lowbit {
namespace {

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
