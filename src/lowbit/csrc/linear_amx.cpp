// Products on AMX tiles: 16 output rows times 16 tokens for 64 bytes of columns in one instruction.
//
// A decoded tile of linear_tiles.h is B as it is, x of 16 tokens is A, C holds their sums, and what follows in
// float32 is AVX-512. For codes of bfloat16 the sum of a group of 64 and more columns stays in C to its end; a
// sub-block of 16 or 32 has a C of its own. Narrow sums of bytes, and of 16 columns, do not fill A's 64: they
// meet a B that is zero elsewhere, because a product of half the depth takes as long and A is then read once.
// A row of C knows nothing of the others, so a token's bits are the same in any company; the order of the sum is
// that of the instruction, and not the one of linear_exact.cpp. Sums of bytes are exact and give the same bits.
//
// For many tokens the work goes by chunks of columns: the next 8 KB of B of four blocks are decoded, then every
// 16 tokens meet them. B is read from L1 and A from L2 once for four blocks; where each product is scaled, the
// totals of 16 tokens stay in registers meanwhile. By the measured costs of the instructions (16 cycles a
// product, 8 a load, 16 a store) the scaling of groups of 32 takes 24 to 32 cycles a product.
#include "linear_amx.h"

#if defined(LOWBIT_AMX)

#include <type_traits>

#include "amx_tiles.h"

#define INLINED __attribute__((always_inline))  // of lambdas, which would become functions where called twice

namespace lowbit {
namespace {

constexpr int SLOTS = 8;  // Bs of a block decoded at a time
constexpr int SLOTS_OF_FEW = 4;  // of all blocks, for 16 tokens and fewer: the processor then does both at once
constexpr int SLOT_BYTES = TILE_ROWS * TILE_LINE;
constexpr int PREFETCH = 4096;  // bytes ahead of what is decoded: 13 % of the bandwidth on the machine measured

static_assert(TOKEN_TILE % TILE_ROWS == 0);

// What is decoded, and the sums that are not yet scaled.
struct Scratch {
    alignas(64) std::uint8_t panels[BLOCKS_TOGETHER][SLOTS][SLOT_BYTES];
    float scales[BLOCKS_TOGETHER][SLOTS][ROWS], addends[BLOCKS_TOGETHER][SLOTS][ROWS];
    float products[BLOCKS_TOGETHER][TOKEN_TILE][ROWS];  // or int32
    int parts;  // which rows of the panels were written before: the others are zeros
};

// How A, B and C follow each other. A line of A holds 32 columns of bfloat16 or 64 bytes.
struct Order {
    Order(const Layout& layout, bool bytes_, bool grouped) : bytes(bytes_), halves(layout.sub == 16) {
        const std::int64_t line = bytes ? BYTE_COLUMNS : COLUMNS;
        narrow = grouped || (!bytes && summed_columns(layout) <= COLUMNS && layout.scales != Scales::none);
        parts = narrow ? static_cast<int>(line / layout.sub) : 1;
        lines = (layout.tiles * COLUMNS + line - 1) / line;
        tiles_of_line = static_cast<int>(line / COLUMNS);
        lines_of_group = narrow ? 1 : layout.scales == Scales::none ? lines : layout.unit / line;
    }
    // Where a half tile is decoded to.
    int slot(int tile, int half) const { return (tile * 2 + half) * parts / (2 * tiles_of_line); }

    bool bytes;
    bool halves;  // scales for 16 columns
    bool narrow;  // every product is scaled
    int parts;    // Bs, and products, of a line
    int tiles_of_line;
    std::int64_t lines, lines_of_group;
};

// Decodes ``tiles`` tiles of block ``block``.
using Fill = void (*)(Walk&, const Decoding&, const Order&, int tiles, const Layout&, Scratch&, int block);

inline const std::uint8_t* next_tile(Walk& walk, const Order& order, int tile, const Layout& layout, Scratch& scratch,
                                     int block) {
    const std::uint8_t* const codes = walk.next();
    for (std::int64_t at = 0; at < tile_bytes(layout.codes); at += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes) + PREFETCH + at, _MM_HINT_T0);
    }
    for (int half = 0; half < (order.halves ? 2 : 1); ++half) {
        const int slot = order.slot(tile, half);
        sixteen_store(scratch.scales[block][slot], walk.scale[half]);
        if (layout.addend != Addend::none) sixteen_store(scratch.addends[block][slot], walk.addend[half]);
    }
    return codes;
}

template <Codes CODES>
void fill_bfloats(Walk& walk, const Decoding& decoding, const Order& order, int tiles, const Layout& layout,
                  Scratch& scratch, int block) {
    for (int tile = 0; tile < tiles; ++tile) {
        BfloatTile w;
        decode<CODES>(next_tile(walk, order, tile, layout, scratch, block), decoding.table, w);
        std::uint8_t* const to[2] = {scratch.panels[block][order.slot(tile, 0)],
                                     scratch.panels[block][order.slot(tile, 1)]};
        UNROLL
        for (int pair = 0; pair < PAIRS; ++pair) {
            _mm512_store_si512(to[pair / (PAIRS / 2)] + pair * TILE_LINE, w[pair]);
        }
    }
}

template <Codes CODES, bool LOOKED_UP>
void fill_bytes(Walk& walk, const Decoding& decoding, const Order& order, int tiles, const Layout& layout,
                Scratch& scratch, int block) {
    for (int tile = 0; tile < tiles; ++tile) {
        ByteTile w;
        decode_bytes<CODES, LOOKED_UP>(next_tile(walk, order, tile, layout, scratch, block), decoding.bytes, w);
        const int place = tile % 2 * OPERANDS * TILE_LINE;
        std::uint8_t* const to[2] = {scratch.panels[block][order.slot(tile, 0)] + place,
                                     scratch.panels[block][order.slot(tile, 1)] + place};
        UNROLL
        for (int operand = 0; operand < OPERANDS; ++operand) {
            _mm512_store_si512(to[operand / (OPERANDS / 2)] + operand * TILE_LINE, w[operand]);
        }
    }
}

// Some lines of columns.
struct Chunk {
    std::int64_t line;  // the first
    std::int64_t span;  // the first of the spans of sums, one for each B
    int slots;
};

inline const std::uint8_t* line_of(const Input& x, std::int64_t line, int token) {
    return x.values + (line * x.tokens + token) * TILE_LINE;
}

template <bool BYTES>
inline Sixteen product_of(const float* product, std::int32_t base) {
    if constexpr (BYTES) return ints_to_floats(_mm512_add_epi32(_mm512_load_si512(product), ints_set(base)));
    return sixteen_load(product);
}

// Up to 16 tokens from ``token`` on times the Bs of a block, each product scaled while the next one is formed.
// ALL: there are 16, and their totals stay in registers. X_SCALED: x has scales, as bytes always do.
template <bool BYTES, int PARTS, Addend ADDEND, bool ALL, bool X_SCALED>
void multiply_narrow(const Chunk& chunk, const Scratch& scratch, int block, const Input& x, int token,
                     float (*totals)[ROWS]) {
    constexpr int SPANS = PARTS == 4 ? 2 : 1;  // of x's scale
    alignas(64) float products[2][TILE_ROWS][ROWS];
    const int tokens = ALL ? TILE_ROWS : x.tokens - token;
    const auto each = [&](auto&& body) INLINED {
        if constexpr (ALL) {
            UNROLL
            for (int t = 0; t < TILE_ROWS; ++t) body(t);
        } else {
            for (int t = 0; t < tokens; ++t) body(t);
        }
    };
    Sixteen held[TILE_ROWS];
    each([&](int t) INLINED { held[t] = sixteen_load(totals[t]); });

    const auto multiply = [&](auto parity, int slot) INLINED {
        constexpr int C = decltype(parity)::value, A = PARTS == 1 ? 4 + C : 4, B = 6 + C;
        if (slot % PARTS == 0) tile_load<A>(line_of(x, chunk.line + slot / PARTS, token), TILE_LINE);
        tile_load<B>(scratch.panels[block][slot], TILE_LINE);
        tile_zero<C>();
        if constexpr (BYTES) {
            tile_dot_bytes<C, A, B>();
        } else {
            tile_dot_bfloats<C, A, B>();
        }
        tile_store<C>(products[C], TILE_LINE);
    };
    const auto scale = [&](int slot) INLINED {
        const float(*const product)[ROWS] = products[slot % 2];
        const std::int64_t span = chunk.span + slot;
        const std::int64_t at = span * x.tokens + token;
        const float* const x_sums = x.sums + at;
        const std::int32_t* const bases = x.bases + at;
        const float* const x_scales = X_SCALED ? x.scales + span / SPANS * x.tokens + token : nullptr;
        const Sixteen w_scale = sixteen_load(scratch.scales[block][slot]);
        const Sixteen addend = sixteen_load(scratch.addends[block][slot]);
        each([&](int t) INLINED {
            Sixteen sum = product_of<BYTES>(product[t], BYTES ? bases[t] : 0);
            if constexpr (ADDEND == Addend::zero) sum = sixteen_fma(addend, sixteen_set(x_sums[t]), sum);
            const Sixteen by = X_SCALED ? sixteen_multiply(w_scale, sixteen_set(x_scales[t])) : w_scale;
            held[t] = sixteen_fma(by, sum, held[t]);
            if constexpr (ADDEND == Addend::offset) held[t] = sixteen_fma(addend, sixteen_set(x_sums[t]), held[t]);
        });
    };
    const std::integral_constant<int, 0> even;
    const std::integral_constant<int, 1> odd;
    for (int slot = 0; slot < chunk.slots; slot += 2) {
        multiply(even, slot);
        if (slot > 0) scale(slot - 1);
        if (slot + 1 < chunk.slots) multiply(odd, slot + 1);
        scale(slot);
    }
    if (chunk.slots % 2 == 0) scale(chunk.slots - 1);
    each([&](int t) INLINED { sixteen_store(totals[t], held[t]); });
}

using Narrow = void (*)(const Chunk&, const Scratch&, int block, const Input&, int token, float (*totals)[ROWS]);

template <bool BYTES, int PARTS, bool ALL>
Narrow narrow_by_addend(Addend addend) {
    switch (addend) {
        case Addend::none: return multiply_narrow<BYTES, PARTS, Addend::none, ALL, BYTES>;
        case Addend::offset: return multiply_narrow<BYTES, PARTS, Addend::offset, ALL, BYTES>;
        case Addend::zero: return multiply_narrow<BYTES, PARTS, Addend::zero, ALL, BYTES>;
    }
    return nullptr;
}

template <bool ALL>
Narrow narrow_function(const Order& order, Addend addend, bool x_scaled) {
    if (x_scaled && !order.bytes) {
        return order.halves ? multiply_narrow<false, 2, Addend::none, ALL, true> : multiply_narrow<false, 1, Addend::none, ALL, true>;
    }
    if (!order.bytes) return order.halves ? narrow_by_addend<false, 2, ALL>(addend) : narrow_by_addend<false, 1, ALL>(addend);
    return order.halves ? narrow_by_addend<true, 4, ALL>(addend) : narrow_by_addend<true, 2, ALL>(addend);
}

template <typename Each>
inline void for_blocks(int blocks, Each&& each) {
    each(std::integral_constant<int, 0>());
    if (blocks > 1) each(std::integral_constant<int, 1>());
    if (blocks > 2) each(std::integral_constant<int, 2>());
    if (blocks > 3) each(std::integral_constant<int, 3>());
}

// All tokens times the Bs of some blocks, a C for each block; scaled where a group ends. Sums of a group that goes
// on wait in memory, or in their tiles where there is one tile of tokens only.
template <bool BYTES, Addend ADDEND>
void multiply_wide(const Chunk& chunk, const Order& order, Scratch& scratch, const std::uint8_t* const* panels,
                   int blocks, const Input& x, bool scaled, float (*totals)[TOKEN_TILE][ROWS]) {
    const bool stays = x.tokens <= TILE_ROWS;
    for (int token = 0; token < x.tokens; token += TILE_ROWS) {
        std::int64_t group = chunk.line / order.lines_of_group, left = order.lines_of_group - chunk.line % order.lines_of_group;
        for_blocks(blocks, [&](auto block) INLINED {
            constexpr int C = decltype(block)::value;
            if (left == order.lines_of_group) {
                tile_zero<C>();
            } else if (!stays) {
                tile_load<C>(scratch.products[C][token], TILE_LINE);
            }
        });
        const auto scale = [&](int slot) INLINED {
            const int tokens = std::min(TILE_ROWS, x.tokens - token);
            const std::int64_t at = group * x.tokens + token;
            for (int block = 0; block < blocks; ++block) {
                const Sixteen w_scale = sixteen_load(scratch.scales[block][slot]);
                const Sixteen addend = sixteen_load(scratch.addends[block][slot]);
                for (int t = 0; t < tokens; ++t) {
                    Sixteen sum = product_of<BYTES>(scratch.products[block][token + t], BYTES ? x.bases[at + t] : 0);
                    float* const to = totals[block][token + t];
                    Sixteen total = sixteen_load(to);
                    if (!scaled) {
                        total = sixteen_add(total, sum);
                    } else {
                        if constexpr (ADDEND == Addend::zero) sum = sixteen_fma(addend, sixteen_set(x.sums[at + t]), sum);
                        total = sixteen_fma(w_scale, sum, total);
                        if constexpr (ADDEND == Addend::offset) {
                            total = sixteen_fma(addend, sixteen_set(x.sums[at + t]), total);
                        }
                    }
                    sixteen_store(to, total);
                }
            }
        };
        const auto multiply = [&](auto parity, int slot) INLINED {
            constexpr int A = 4 + decltype(parity)::value;
            tile_load<A>(line_of(x, chunk.line + slot, token), TILE_LINE);
            for_blocks(blocks, [&](auto block) INLINED {
                constexpr int C = decltype(block)::value, B = 6 + C % 2;
                tile_load<B>(panels[C] + slot * SLOT_BYTES, TILE_LINE);
                if constexpr (BYTES) {
                    tile_dot_bytes<C, A, B>();
                } else {
                    tile_dot_bfloats<C, A, B>();
                }
            });
            if (--left > 0) return;
            for_blocks(blocks, [&](auto block) INLINED {
                constexpr int C = decltype(block)::value;
                tile_store<C>(scratch.products[C][token], TILE_LINE);
                tile_zero<C>();
            });
            scale(slot);
            left = order.lines_of_group;
            ++group;
        };
        int slot = 0;
        for (; slot + 2 <= chunk.slots; slot += 2) {
            multiply(std::integral_constant<int, 0>(), slot);
            multiply(std::integral_constant<int, 1>(), slot + 1);
        }
        if (slot < chunk.slots) multiply(std::integral_constant<int, 0>(), slot);
        if (stays || left == order.lines_of_group) continue;
        for_blocks(blocks, [&](auto block) INLINED {
            constexpr int C = decltype(block)::value;
            tile_store<C>(scratch.products[C][token], TILE_LINE);
        });
    }
}

using Wide = void (*)(const Chunk&, const Order&, Scratch&, const std::uint8_t* const* panels, int blocks, const Input&,
                      bool scaled, float (*totals)[TOKEN_TILE][ROWS]);

template <bool BYTES>
Wide wide_function(Addend addend) {
    switch (addend) {
        case Addend::none: return multiply_wide<BYTES, Addend::none>;
        case Addend::offset: return multiply_wide<BYTES, Addend::offset>;
        case Addend::zero: return multiply_wide<BYTES, Addend::zero>;
    }
    return nullptr;
}

// Without ``fill`` the weight's tiles are Bs as they lie.
void multiply_blocks(Fill fill, const Order& order, const Layout& layout, const std::uint8_t* first, int blocks,
                     const Decoding& decoding, const Input& x, float (*totals)[TOKEN_TILE][ROWS]) {
    static thread_local Scratch scratch;
    const bool few = x.tokens <= TILE_ROWS;
    if (few && order.narrow && blocks > 1) {  // one stream of weights, rather than four
        for (int block = 0; block < blocks; ++block) {
            multiply_blocks(fill, order, layout, first + block * layout.block_bytes, 1, decoding, x, totals + block);
        }
        return;
    }
    const FlushSubnormals flush;
    configure_tiles(std::min(TILE_ROWS, x.tokens));
    if (scratch.parts != order.parts) {
        std::memset(scratch.panels, 0, sizeof scratch.panels);
        scratch.parts = order.parts;
    }
    const auto walk = [&](int block) { return Walk(layout, first + std::min(block, blocks - 1) * layout.block_bytes); };
    Walk walks[BLOCKS_TOGETHER] = {walk(0), walk(1), walk(2), walk(3)};
    const std::uint8_t* panels[BLOCKS_TOGETHER] = {};
    const bool x_scaled = x.scales != nullptr;
    const Narrow narrow = narrow_function<true>(order, layout.addend, x_scaled),
                 rest = narrow_function<false>(order, layout.addend, x_scaled);
    const Wide wide = order.bytes ? wide_function<true>(layout.addend) : wide_function<false>(layout.addend);
    const std::int64_t lines = (!few ? SLOTS : std::max(2, SLOTS_OF_FEW / blocks)) / order.parts;
    for (std::int64_t line = 0; line < order.lines; line += lines) {
        const std::int64_t tile = line * order.tiles_of_line;
        const auto tiles = static_cast<int>(std::min(lines * order.tiles_of_line, layout.tiles - tile));
        const Chunk chunk{line, line * order.parts, order.slot(tiles - 1, 1) + 1};
        for (int block = 0; block < blocks; ++block) {
            panels[block] = scratch.panels[block][0];
            if (fill != nullptr) {
                fill(walks[block], decoding, order, tiles, layout, scratch, block);
                continue;
            }
            panels[block] = first + block * layout.block_bytes + line * SLOT_BYTES;
            for (std::int64_t at = 0; at < chunk.slots * SLOT_BYTES; at += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(panels[block]) + PREFETCH + at, _MM_HINT_T0);
            }
        }
        if (!order.narrow) {
            wide(chunk, order, scratch, panels, blocks, x, layout.scales != Scales::none, totals);
            continue;
        }
        for (int token = 0; token < x.tokens; token += TILE_ROWS) {
            for (int block = 0; block < blocks; ++block) {
                (token + TILE_ROWS <= x.tokens ? narrow : rest)(chunk, scratch, block, x, token, totals[block] + token);
            }
        }
    }
}

template <Codes CODES, bool X_SCALED = false>
void multiply_exact(const Layout& layout, const std::uint8_t* first, int blocks, const Decoding& decoding, const Input& x,
                    float (*totals)[TOKEN_TILE][ROWS]) {
    const Order order(layout, false, X_SCALED);
    multiply_blocks(CODES == Codes::bf16 ? nullptr : fill_bfloats<CODES>, order, layout, first, blocks, decoding, x, totals);
}

template <Codes CODES, bool LOOKED_UP, bool GROUPED>
void multiply_bytes(const Layout& layout, const std::uint8_t* first, int blocks, const Decoding& decoding, const Input& x,
                    float (*totals)[TOKEN_TILE][ROWS]) {
    const Order order(layout, true, GROUPED);
    multiply_blocks(fill_bytes<CODES, LOOKED_UP>, order, layout, first, blocks, decoding, x, totals);
}

template <Codes CODES, bool LOOKED_UP = false>
BlocksFunction bytes_by_group(bool grouped) {
    return grouped ? multiply_bytes<CODES, LOOKED_UP, true> : multiply_bytes<CODES, LOOKED_UP, false>;
}

}  // namespace

BlocksFunction exact_tiles(const Layout& layout, std::int64_t tokens) {
    if (layout.sub == LEAST_GROUP) return nullptr;
    if (tokens == 1) return exact_once(layout);
    switch (layout.codes) {
        case Codes::bits1: return multiply_exact<Codes::bits1>;
        case Codes::bits2: return multiply_exact<Codes::bits2>;
        case Codes::bits3: return multiply_exact<Codes::bits3>;
        case Codes::bits4: return multiply_exact<Codes::bits4>;
        case Codes::bits5: return multiply_exact<Codes::bits5>;
        case Codes::bits6: return multiply_exact<Codes::bits6>;
        case Codes::bits7: return multiply_exact<Codes::bits7>;
        case Codes::int8: return multiply_exact<Codes::int8>;
        case Codes::uint8: return multiply_exact<Codes::uint8>;
        case Codes::e4m3: return multiply_exact<Codes::e4m3>;
        case Codes::e5m2: return multiply_exact<Codes::e5m2>;
        case Codes::e4m3fnuz: return multiply_exact<Codes::e4m3fnuz>;
        case Codes::e5m2fnuz: return multiply_exact<Codes::e5m2fnuz>;
        case Codes::grid2_256: return multiply_exact<Codes::grid2_256>;
        case Codes::grid2_512: return multiply_exact<Codes::grid2_512>;
        case Codes::grid2_1024: return multiply_exact<Codes::grid2_1024>;
        case Codes::grid1_2048: return multiply_exact<Codes::grid1_2048>;
        case Codes::grid3_256: return multiply_exact<Codes::grid3_256>;
        case Codes::grid3_512: return multiply_exact<Codes::grid3_512>;
        case Codes::bf16: return multiply_exact<Codes::bf16>;
        case Codes::words4:
        case Codes::e8p:
        case Codes::e8p_pair:
        case Codes::row_vectors:
        case Codes::f16:
        case Codes::halves3:
        case Codes::f32: return nullptr;
    }
    return nullptr;
}

BlocksFunction scaled_tiles(const Layout& layout, std::int64_t tokens) {
    if (layout.addend != Addend::none || layout.scales == Scales::none || layout.sub == LEAST_GROUP) return nullptr;
    if (tokens == 1) return scaled_once(layout);
    switch (layout.codes) {
        case Codes::bits4: return multiply_exact<Codes::bits4, true>;
        case Codes::bits6: return multiply_exact<Codes::bits6, true>;
        case Codes::int8: return multiply_exact<Codes::int8, true>;
        case Codes::e4m3: return multiply_exact<Codes::e4m3, true>;
        case Codes::e5m2: return multiply_exact<Codes::e5m2, true>;
        default: return nullptr;
    }
}

BlocksFunction byte_tiles(const Layout& layout, const ByteCodes& codes, bool grouped, std::int64_t tokens) {
    if (tokens == 1) return nullptr;
    switch (layout.codes) {
        case Codes::bits1: return bytes_by_group<Codes::bits1>(grouped);
        case Codes::bits2: return bytes_by_group<Codes::bits2>(grouped);
        case Codes::bits3: return bytes_by_group<Codes::bits3>(grouped);
        case Codes::bits4:
            return codes.looked_up ? bytes_by_group<Codes::bits4, true>(grouped) : bytes_by_group<Codes::bits4>(grouped);
        case Codes::bits5: return bytes_by_group<Codes::bits5>(grouped);
        case Codes::bits6: return bytes_by_group<Codes::bits6>(grouped);
        case Codes::bits7: return bytes_by_group<Codes::bits7>(grouped);
        case Codes::int8: return bytes_by_group<Codes::int8>(grouped);
        case Codes::uint8: return bytes_by_group<Codes::uint8>(grouped);
        default: return nullptr;
    }
}

}  // namespace lowbit

#endif
