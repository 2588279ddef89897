// Products on AMX tiles: 16 output rows times 16 tokens for 64 bytes of columns in one instruction.
//
// A decoded tile of linear_tiles.h is B as it is, x of 16 tokens is A, C holds their sums, and what follows in
// float32 is AVX-512. For codes of bfloat16 the sum of a group of 64 and more columns stays in C to its end; a
// sub-block of 16 or 32 has a C of its own. Narrow sums of bytes, and of 16 columns, do not fill A's 64: they
// meet a B that is zero elsewhere, because a product of half the depth takes as long and A is then read once.
// A row of C knows nothing of the others, so a token's bits are the same in any company; the order of the sum is
// that of the instruction, and not the one of linear_exact.cpp. Sums of bytes are exact and give the same bits.
//
// For many tokens the work goes by chunks of columns: the next 8 KB of B of four blocks are decoded, then the tokens meet
// them. Where sums go on, 32 tokens and two blocks share their tiles, so that each product loads one. Where each product
// is scaled, the totals of 16 tokens stay in registers meanwhile.
//
// On an Intel Xeon (Emerald Rapids) at its best a product takes 16 cycles, a load 9, and a product that is
// stored 29, as nothing is multiplied while a tile is stored; a scaled product of 16 tokens takes some 65 in all. Where
// another thread seems to have the core's other half, they wait for each other: 40, 31, 38 and 120 cycles.
#include "linear_amx.h"

#if defined(LOWBIT_AMX)

#include <type_traits>

#define INLINED __attribute__((always_inline))  // of lambdas, which would become functions where called twice

namespace lowbit {
namespace {

constexpr int SLOTS = 8;  // Bs of a block decoded at a time
constexpr int SLOTS_OF_FEW = 4;  // of all blocks, for 16 tokens and fewer: the processor then does both at once
constexpr int SLOT_BYTES = TILE_ROWS * TILE_LINE;
constexpr int FETCHING_MOST = 32;  // tokens that wait for a bfloat16 weight: with 128, asking for it took a fifth of the time

static_assert(TOKEN_TILE % TILE_ROWS == 0);

// What is decoded, and the sums that are not yet scaled.
struct Scratch {
    alignas(64) std::uint8_t panels[BLOCKS_TOGETHER][SLOTS][SLOT_BYTES];
    float scales[BLOCKS_TOGETHER][SLOTS][ROWS], addends[BLOCKS_TOGETHER][SLOTS][ROWS];
    float products[BLOCKS_TOGETHER][TOKEN_TILE][ROWS];  // or int32
    bool asked;  // the weight was asked for by the products before
    int parts;  // which rows of the panels were written before: the others are zeros
};

// How A, B and C follow each other. A line of A holds 32 columns of bfloat16 or 64 bytes.
struct Order {
    Order(const Layout& layout, bool bytes_, bool grouped) : bytes(bytes_), halves(layout.sub == 16) {
        const std::int64_t line = bytes ? BYTE_COLUMNS : COLUMNS;
        narrow = grouped || (!bytes && summed_columns(layout) <= COLUMNS && layout.scales != Scales::none);
        parts = narrow ? static_cast<int>(line / layout.sub) : 1;
        lines = (layout.tiles * COLUMNS + line - 1) / line;
        tiles_of_line = static_cast<int>(line / COLUMNS);  // 1 or 2
        lines_of_group = narrow ? 1 : layout.scales == Scales::none ? lines : layout.unit / line;
    }
    // Where a half tile is decoded to.
    int slot(int tile, int half) const { return (tile * 2 + half) * parts >> tiles_of_line; }

    bool bytes;
    bool halves;  // scales for 16 columns
    bool narrow;  // every product is scaled
    int parts;    // Bs, and products, of a line
    int tiles_of_line;
    std::int64_t lines, lines_of_group;
};

// Decodes ``tiles`` tiles of block ``block``.
using Fill = void (*)(Walk&, const Decoding&, const Order&, int tiles, Scratch&, int block);

template <Codes CODES, int SUB, Addend ADDEND>
INLINE const std::uint8_t* next_tile(Walk& walk, const Order& order, int tile, Scratch& scratch, int block) {
    const std::uint8_t* const codes = walk.next<CODES, SUB, ADDEND>();
    if (!scratch.asked) fetch_lines<tile_bytes(CODES)>(codes + FETCHED_BYTES_AHEAD);
    UNROLL
    for (int half = 0; half < COLUMNS / SUB; ++half) {
        const int slot = order.slot(tile, half);
        sixteen_store(scratch.scales[block][slot], walk.scale[half]);
        if constexpr (ADDEND != Addend::none) sixteen_store(scratch.addends[block][slot], walk.addend[half]);
    }
    return codes;
}

template <Codes CODES, int SUB, Addend ADDEND>
void fill_bfloats(Walk& walk, const Decoding& decoding, const Order& order, int tiles, Scratch& scratch, int block) {
    for (int tile = 0; tile < tiles; ++tile) {
        BfloatTile w;
        decode<CODES>(next_tile<CODES, SUB, ADDEND>(walk, order, tile, scratch, block), decoding.table, w);
        std::uint8_t* const to[2] = {scratch.panels[block][order.slot(tile, 0)],
                                     scratch.panels[block][order.slot(tile, 1)]};
        UNROLL
        for (int pair = 0; pair < PAIRS; ++pair) {
            _mm512_store_si512(to[pair / (PAIRS / 2)] + pair * TILE_LINE, w[pair]);
        }
    }
}

template <Codes CODES, bool LOOKED_UP, int SUB, Addend ADDEND>
void fill_bytes(Walk& walk, const Decoding& decoding, const Order& order, int tiles, Scratch& scratch, int block) {
    for (int tile = 0; tile < tiles; ++tile) {
        ByteTile w;
        decode_bytes<CODES, LOOKED_UP>(next_tile<CODES, SUB, ADDEND>(walk, order, tile, scratch, block), decoding.bytes, w);
        const int place = tile % 2 * OPERANDS * TILE_LINE;
        std::uint8_t* const to[2] = {scratch.panels[block][order.slot(tile, 0)] + place,
                                     scratch.panels[block][order.slot(tile, 1)] + place};
        UNROLL
        for (int operand = 0; operand < OPERANDS; ++operand) {
            _mm512_store_si512(to[operand / (OPERANDS / 2)] + operand * TILE_LINE, w[operand]);
        }
    }
}

// The Fill for a layout: of(sub, addend).
template <bool ADDENDS, typename Of>
Fill fill_for(const Layout& layout, const Of& of) {
    const auto by_sub = [&](auto addend) {
        return layout.sub == COLUMNS / 2 ? of(std::integral_constant<int, COLUMNS / 2>(), addend)
                                         : of(std::integral_constant<int, COLUMNS>(), addend);
    };
    if constexpr (ADDENDS) {
        if (layout.addend == Addend::offset) return by_sub(std::integral_constant<Addend, Addend::offset>());
        if (layout.addend == Addend::zero) return by_sub(std::integral_constant<Addend, Addend::zero>());
    }
    return by_sub(std::integral_constant<Addend, Addend::none>());
}

template <bool BYTES, int C, int A, int B>
inline void tile_dot() {
    if constexpr (BYTES) {
        tile_dot_bytes<C, A, B>();
    } else {
        tile_dot_bfloats<C, A, B>();
    }
}

template <bool BYTES>
inline Sixteen product_of(const float* product, std::int32_t base) {
    if constexpr (BYTES) return ints_to_floats(_mm512_add_epi32(_mm512_load_si512(product), ints_set(base)));
    return sixteen_load(product);
}

template <typename Each>
inline void for_blocks(int blocks, Each&& each) {
    each(std::integral_constant<int, 0>());
    if (blocks > 1) each(std::integral_constant<int, 1>());
    if (blocks > 2) each(std::integral_constant<int, 2>());
    if (blocks > 3) each(std::integral_constant<int, 3>());
}

// Adds the scaled products of tokens ``token`` on with the B in ``slot``: total(t, add) is given what adds to token t's.
template <bool BYTES, int PARTS, Addend ADDEND, bool X_SCALED, typename Each, typename Total>
INLINE void scale_products(const Chunk& chunk, const Scratch& scratch, int block, int slot, const Input& x, int token,
                           const float (*products)[ROWS], const Each& each, const Total& total) {
    constexpr int SPANS = PARTS == 4 ? 2 : 1;  // of x's scale
    const std::int64_t span = chunk.span + slot;
    const std::int64_t at = span * x.tokens + token;
    const float* const x_sums = x.sums + at;
    const std::int32_t* const bases = x.bases + at;
    const float* const x_scales = X_SCALED ? x.scales + span / SPANS * x.tokens + token : nullptr;
    const Sixteen w_scale = sixteen_load(scratch.scales[block][slot]);
    const Sixteen addend = sixteen_load(scratch.addends[block][slot]);
    each([&](int t) INLINED {
        Sixteen sum = product_of<BYTES>(products[t], BYTES ? bases[t] : 0);
        if constexpr (ADDEND == Addend::zero) sum = sixteen_fma(addend, sixteen_set(x_sums[t]), sum);
        const Sixteen by = X_SCALED ? sixteen_multiply(w_scale, sixteen_set(x_scales[t])) : w_scale;
        total(t, [&](Sixteen held) INLINED {
            held = sixteen_fma(by, sum, held);
            if constexpr (ADDEND == Addend::offset) held = sixteen_fma(addend, sixteen_set(x_sums[t]), held);
            return held;
        });
    });
}

// begin(parity, slot) a product and end(parity) it for all slots, one begun before the last is ended; scale(slot) meanwhile.
template <typename Begin, typename End, typename Scale>
INLINE void for_slots_in_turns(int slots, const Begin& begin, const End& end, const Scale& scale) {
    const std::integral_constant<int, 0> even;
    const std::integral_constant<int, 1> odd;
    begin(even, 0);
    for (int slot = 0; slot < slots; slot += 2) {
        const bool second = slot + 1 < slots;
        if (second) begin(odd, slot + 1);
        end(even);
        if (slot > 0) scale(slot - 1);
        if (slot + 2 < slots) begin(even, slot + 2);
        if (second) end(odd);
        scale(slot);
    }
    if (slots % 2 == 0) scale(slots - 1);
}

// 16 tokens from ``token`` on times the Bs of a block; their totals stay in registers. X_SCALED: x has scales, as bytes
// always do. ``asked``: what will be decoded next, or null.
template <bool BYTES, int PARTS, Addend ADDEND, bool X_SCALED>
void multiply_narrow(const Chunk& chunk, const Scratch& scratch, int block, const Input& x, int token,
                     const std::uint8_t* asked, float (*totals)[ROWS]) {
    alignas(64) float products[2][TILE_ROWS][ROWS];
    const auto each = [&](auto&& body) INLINED {
        UNROLL
        for (int t = 0; t < TILE_ROWS; ++t) body(t);
    };
    Sixteen held[TILE_ROWS];
    each([&](int t) INLINED { held[t] = sixteen_load(totals[t]); });
    const auto begin = [&](auto parity, int slot) INLINED {
        constexpr int C = decltype(parity)::value, A = PARTS == 1 ? 4 + C : 4, B = 6 + C;
        if (slot % PARTS == 0) tile_load<A>(line_of(x, chunk.line + slot / PARTS, token), TILE_LINE);
        tile_load<B>(scratch.panels[block][slot], TILE_LINE);
        tile_zero<C>();
        tile_dot<BYTES, C, A, B>();
        if (asked == nullptr) return;
        const std::uint8_t* const lines = asked + slot * chunk.asked_lines * TILE_LINE;
        for (std::int64_t line = 0; line < chunk.asked_lines; ++line) fetch_lines<TILE_LINE>(lines + line * TILE_LINE);
    };
    const auto end = [&](auto parity) INLINED { tile_store<decltype(parity)::value>(products[decltype(parity)::value], TILE_LINE); };
    const auto scale = [&](int slot) INLINED {
        scale_products<BYTES, PARTS, ADDEND, X_SCALED>(chunk, scratch, block, slot, x, token, products[slot % 2], each,
                                                       [&](int t, auto&& add) INLINED { held[t] = add(held[t]); });
    };
    for_slots_in_turns(chunk.slots, begin, end, scale);
    each([&](int t) INLINED { sixteen_store(totals[t], held[t]); });
}

// multiply(parity, slot) for all slots, and while the next product is formed scale(slot).
template <typename Multiply, typename Scale>
INLINE void for_slots(int slots, const Multiply& multiply, const Scale& scale) {
    const std::integral_constant<int, 0> even;
    const std::integral_constant<int, 1> odd;
    for (int slot = 0; slot < slots; slot += 2) {
        multiply(even, slot);
        if (slot > 0) scale(slot - 1);
        if (slot + 1 < slots) multiply(odd, slot + 1);
        scale(slot);
    }
    if (slots % 2 == 0) scale(slots - 1);
}

// Fewer than 16 tokens from ``token`` on times the Bs of some blocks: A is loaded once for all of them. Totals, which are
// few, wait in memory.
template <bool BYTES, int PARTS, Addend ADDEND, bool X_SCALED>
void multiply_narrow_rest(const Chunk& chunk, const Scratch& scratch, int blocks, const Input& x, int token,
                          float (*totals)[TOKEN_TILE][ROWS]) {
    alignas(64) float products[2][BLOCKS_TOGETHER][TILE_ROWS][ROWS];
    const int tokens = x.tokens - token;
    const auto each = [&](auto&& body) INLINED {
        for (int t = 0; t < tokens; ++t) body(t);
    };
    const auto multiply = [&](auto parity, int slot) INLINED {
        constexpr int PARITY = decltype(parity)::value, A = PARTS == 1 ? 4 + PARITY : 4;
        if (slot % PARTS == 0) tile_load<A>(line_of(x, chunk.line + slot / PARTS, token), TILE_LINE);
        for_blocks(blocks, [&](auto block) INLINED {
            constexpr int C = decltype(block)::value, B = 6 + C % 2;
            tile_load<B>(scratch.panels[C][slot], TILE_LINE);
            tile_zero<C>();
            tile_dot<BYTES, C, A, B>();
            tile_store<C>(products[PARITY][C], TILE_LINE);
        });
    };
    const auto scale = [&](int slot) INLINED {
        for (int block = 0; block < blocks; ++block) {
            float(*const own)[ROWS] = totals[block] + token;
            scale_products<BYTES, PARTS, ADDEND, X_SCALED>(
                chunk, scratch, block, slot, x, token, products[slot % 2][block], each,
                [&](int t, auto&& add) INLINED { sixteen_store(own[t], add(sixteen_load(own[t]))); });
        }
    };
    for_slots(chunk.slots, multiply, scale);
}

struct Narrow {
    void (*whole)(const Chunk&, const Scratch&, int block, const Input&, int token, const std::uint8_t* asked,
                  float (*totals)[ROWS]);
    void (*rest)(const Chunk&, const Scratch&, int blocks, const Input&, int token, float (*totals)[TOKEN_TILE][ROWS]);
};

template <bool BYTES, int PARTS, Addend ADDEND, bool X_SCALED>
Narrow narrow() {
    return {multiply_narrow<BYTES, PARTS, ADDEND, X_SCALED>, multiply_narrow_rest<BYTES, PARTS, ADDEND, X_SCALED>};
}

template <bool BYTES, int PARTS>
Narrow narrow_by_addend(Addend addend) {
    switch (addend) {
        case Addend::none: return narrow<BYTES, PARTS, Addend::none, BYTES>();
        case Addend::offset: return narrow<BYTES, PARTS, Addend::offset, BYTES>();
        case Addend::zero: return narrow<BYTES, PARTS, Addend::zero, BYTES>();
    }
    return {};
}

Narrow narrow_functions(const Order& order, Addend addend, bool x_scaled) {
    if (order.bytes) return order.halves ? narrow_by_addend<true, 4>(addend) : narrow_by_addend<true, 2>(addend);
    if (x_scaled) return order.halves ? narrow<false, 2, Addend::none, true>() : narrow<false, 1, Addend::none, true>();
    return order.halves ? narrow_by_addend<false, 2>(addend) : narrow_by_addend<false, 1>(addend);
}

// TILES times 16 tokens from ``token`` on times the Bs of up to 4 / TILES blocks from ``first`` on, a C for each; scaled
// where a group ends. Sums of a group that goes on wait in memory, or, ``stays``, in their tiles.
template <bool BYTES, Addend ADDEND, int TILES>
void multiply_wide_tiles(const Chunk& chunk, const Order& order, Scratch& scratch, const std::uint8_t* const* panels,
                         int first, int blocks, const Input& x, bool scaled, float (*totals)[TOKEN_TILE][ROWS], int token,
                         bool stays) {
    constexpr int MOST = BLOCKS_TOGETHER / TILES;
    std::int64_t group = chunk.line / order.lines_of_group, left = order.lines_of_group - chunk.line % order.lines_of_group;
    // body(C, block, where its tokens' products are)
    const auto each_sum = [&](auto&& body) INLINED {
        for_blocks(std::min(blocks, MOST), [&](auto block) INLINED {
            constexpr int BLOCK = decltype(block)::value;
            if constexpr (BLOCK < MOST) {
                each_constant<TILES>([&](auto tile) INLINED {
                    constexpr int C = decltype(tile)::value * MOST + BLOCK;
                    body(std::integral_constant<int, C>(), scratch.products[first + BLOCK][token + TILE_ROWS * tile]);
                });
            }
        });
    };
    each_sum([&](auto sum, float* product) INLINED {
        constexpr int C = decltype(sum)::value;
        if (left == order.lines_of_group) {
            tile_zero<C>();
        } else if (!stays) {
            tile_load<C>(product, TILE_LINE);
        }
    });
    const auto scale = [&](int slot) INLINED {
        const int tokens = std::min(TILES * TILE_ROWS, x.tokens - token);
        const std::int64_t at = group * x.tokens + token;
        for (int block = first; block < first + blocks; ++block) {
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
        constexpr int A = 4 + decltype(parity)::value;  // of the one tile of tokens
        const auto product = [&](auto tile, auto block) INLINED {
            constexpr int BLOCK = decltype(block)::value, TILE = decltype(tile)::value;
            if constexpr (BLOCK < MOST) {
                constexpr int C = TILE * MOST + BLOCK, B = 6 + BLOCK % 2, OF = TILES == 1 ? A : 4 + TILE;
                if constexpr (TILE == 0) tile_load<B>(panels[first + BLOCK] + slot * SLOT_BYTES, TILE_LINE);
                tile_dot<BYTES, C, OF, B>();
            }
        };
        each_constant<TILES>([&](auto tile) INLINED {
            constexpr int TILE = decltype(tile)::value;
            tile_load<TILES == 1 ? A : 4 + TILE>(line_of(x, chunk.line + slot, token + TILE_ROWS * TILE), TILE_LINE);
            for_blocks(std::min(blocks, MOST), [&](auto block) INLINED { product(tile, block); });
        });
        if (--left > 0) return;
        each_sum([&](auto sum, float* product_of_sum) INLINED {
            constexpr int C = decltype(sum)::value;
            tile_store<C>(product_of_sum, TILE_LINE);
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
    if (stays || left == order.lines_of_group) return;
    each_sum([&](auto sum, float* product) INLINED { tile_store<decltype(sum)::value>(product, TILE_LINE); });
}

// All tokens times the Bs of some blocks. 32 tokens and two blocks load one tile for each product; 16 tokens and four
// blocks, five for four.
template <bool BYTES, Addend ADDEND>
void multiply_wide(const Chunk& chunk, const Order& order, Scratch& scratch, const std::uint8_t* const* panels,
                   int blocks, const Input& x, bool scaled, float (*totals)[TOKEN_TILE][ROWS]) {
    const bool stays = x.tokens <= TILE_ROWS;
    int token = 0;
    for (; x.tokens - token > TILE_ROWS; token += 2 * TILE_ROWS) {
        for (int first = 0; first < blocks; first += 2) {
            multiply_wide_tiles<BYTES, ADDEND, 2>(chunk, order, scratch, panels, first, std::min(2, blocks - first), x,
                                                  scaled, totals, token, false);
        }
    }
    if (token < x.tokens) {
        multiply_wide_tiles<BYTES, ADDEND, 1>(chunk, order, scratch, panels, 0, blocks, x, scaled, totals, token, stays);
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
    if (x.tokens == TILE_ROWS && order.narrow && blocks > 1) {  // one stream of weights, rather than four
        for (int block = 0; block < blocks; ++block) {
            multiply_blocks(fill, order, layout, first + block * layout.block_bytes, 1, decoding, x, totals + block);
        }
        return;
    }
    const FlushSubnormals flush(false);
    configure_tiles(std::min(TILE_ROWS, x.tokens));
    if (scratch.parts != order.parts) {
        std::memset(scratch.panels, 0, sizeof scratch.panels);
        scratch.parts = order.parts;
    }
    const auto walk = [&](int block) { return Walk(layout, first + std::min(block, blocks - 1) * layout.block_bytes); };
    Walk walks[BLOCKS_TOGETHER] = {walk(0), walk(1), walk(2), walk(3)};
    const std::uint8_t* panels[BLOCKS_TOGETHER] = {};
    const bool x_scaled = x.scales != nullptr;
    const Narrow narrow = narrow_functions(order, layout.addend, x_scaled);
    const Wide wide = order.bytes ? wide_function<true>(layout.addend) : wide_function<false>(layout.addend);
    const std::int64_t lines = (!few ? SLOTS : std::max(2, SLOTS_OF_FEW / blocks)) / order.parts;
    for (std::int64_t line = 0; line < order.lines; line += lines) {
        const std::int64_t tile = line * order.tiles_of_line;
        const auto tiles = static_cast<int>(std::min(lines * order.tiles_of_line, layout.tiles - tile));
        Chunk chunk{line, line * order.parts, order.slot(tiles - 1, 1) + 1};
        // What follows, of this block or of the one that far behind, is asked for while 16 tokens are multiplied.
        const std::int64_t next = tile + tiles;
        const bool ends = next >= layout.tiles;
        const std::int64_t beyond = ends ? (blocks - 1) * layout.block_bytes : 0;
        const std::int64_t wanted = std::min(lines * order.tiles_of_line, ends ? layout.tiles : layout.tiles - next);
        const std::int64_t of_tile = layout.block_bytes / layout.tiles + 1;
        chunk.asked_lines = (wanted * of_tile / chunk.slots + TILE_LINE - 1) / TILE_LINE;
        const bool asks = fill != nullptr && order.narrow && x.tokens >= TILE_ROWS;
        for (int block = 0; block < blocks; ++block) {
            panels[block] = scratch.panels[block][0];
            if (fill != nullptr) {
                scratch.asked = line > 0 && order.narrow && x.tokens >= TILE_ROWS;
                fill(walks[block], decoding, order, tiles, scratch, block);
                continue;
            }
            panels[block] = first + block * layout.block_bytes + line * SLOT_BYTES;
            if (x.tokens > FETCHING_MOST) continue;
            for (int slot = 0; slot < chunk.slots; ++slot) {
                fetch_lines<SLOT_BYTES>(panels[block] + FETCHED_BYTES_AHEAD + slot * SLOT_BYTES);
            }
        }
        if (!order.narrow) {
            wide(chunk, order, scratch, panels, blocks, x, layout.scales != Scales::none, totals);
            continue;
        }
        for (int token = 0; token < x.tokens; token += TILE_ROWS) {
            if (token + TILE_ROWS > x.tokens) {
                narrow.rest(chunk, scratch, blocks, x, token, totals);
                continue;
            }
            for (int block = 0; block < blocks; ++block) {
                const std::uint8_t* const asked =
                    first + block * layout.block_bytes + beyond + next * layout.block_bytes / layout.tiles;
                narrow.whole(chunk, scratch, block, x, token, asks && token == 0 ? asked : nullptr, totals[block] + token);
            }
        }
    }
}

template <Codes CODES, bool X_SCALED = false>
void multiply_exact(const Layout& layout, const std::uint8_t* first, int blocks, const Decoding& decoding, const Input& x,
                    float (*totals)[TOKEN_TILE][ROWS]) {
    const Order order(layout, false, X_SCALED);
    Fill fill = nullptr;
    if constexpr (CODES != Codes::bf16) {
        fill = fill_for<has_addends(CODES)>(layout, [](auto sub, auto addend) -> Fill {
            return fill_bfloats<CODES, decltype(sub)::value, decltype(addend)::value>;
        });
    }
    multiply_blocks(fill, order, layout, first, blocks, decoding, x, totals);
}

template <Codes CODES, bool LOOKED_UP, bool GROUPED>
void multiply_bytes(const Layout& layout, const std::uint8_t* first, int blocks, const Decoding& decoding, const Input& x,
                    float (*totals)[TOKEN_TILE][ROWS]) {
    const Order order(layout, true, GROUPED);
    const Fill fill = fill_for<true>(layout, [](auto sub, auto addend) -> Fill {
        return fill_bytes<CODES, LOOKED_UP, decltype(sub)::value, decltype(addend)::value>;
    });
    multiply_blocks(fill, order, layout, first, blocks, decoding, x, totals);
}

template <Codes CODES, bool LOOKED_UP = false>
BlocksFunction bytes_by_group(bool grouped) {
    return grouped ? multiply_bytes<CODES, LOOKED_UP, true> : multiply_bytes<CODES, LOOKED_UP, false>;
}

}  // namespace

BlocksFunction exact_tiles(const Layout& layout, std::int64_t tokens) {
    if (layout.sub == LEAST_GROUP) return nullptr;
    if (tokens == 1) return exact_once(layout);
    return of_exact_codes<BlocksFunction>(layout.codes, [](auto codes) -> BlocksFunction { return multiply_exact<decltype(codes)::value>; });
}

BlocksFunction scaled_tiles(const Layout& layout, std::int64_t tokens) {
    if (layout.addend != Addend::none || layout.scales == Scales::none || layout.sub == LEAST_GROUP) return nullptr;
    if (tokens == 1) return scaled_once(layout);
    return of_scaled_codes(layout.codes,
                           [](auto codes) -> BlocksFunction { return multiply_exact<decltype(codes)::value, true>; });
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
