// Linear layers on packed weights: y = x W^T for one token or a thousand, one routine for all of them.
//
// A task is a few blocks of 16 output rows and up to 64 tokens. It walks its tiles once, front to back (one
// sequential stream of weights), decodes each tile and multiplies it with every token; totals stay in L1.
// x is first rounded to bfloat16 and laid out so that a tile's columns of consecutive tokens are neighbours.

#include <algorithm>
#include <cmath>
#include <vector>

#include "linear_tiles.h"
#include "lowbit.h"
#include "operations.h"
#include "thread_pool.h"

// What kernels/packed_linear.py describes; field for field its ctypes struct.
struct lowbit_weight {
    const std::uint8_t* data;
    const std::uint16_t* table;  // 64 bfloat16 values, for codes of 2 to 7 bits; 16 floats for wide4
    std::int64_t rows;
    std::int64_t columns;  // padded to whole tiles
    std::int32_t codes;
    std::int32_t group;   // columns that share a scale; 16, or a multiple of 32
    std::int32_t scales;  // enum Scales
    std::int32_t addend;  // enum Addend
};

namespace lowbit {
namespace {

// two_level: int8 x f16 per 256
enum class Scales : std::int32_t { none = 0, f16 = 1, bf16 = 2, f32 = 3, two_level = 4, e4m3 = 5 };
enum class Addend : std::int32_t { none = 0, offset = 1, zero = 2 };  // offset: as the scales; zero: f16 codes

constexpr int SUPER = 256;        // columns of an outer block of two-level scales
constexpr int TOKEN_TILE = 64;    // tokens whose totals fit in L1
#if defined(__AVX512BF16__)
constexpr int TOKEN_STEP = 8;     // tokens whose sums fit in registers beside a tile
#else
constexpr int TOKEN_STEP = 4;
#endif

// Sizes that follow from a weight's description.
struct Layout {
    explicit Layout(const lowbit_weight& w)
        : codes(static_cast<Codes>(w.codes)),
          scales(static_cast<Scales>(w.scales)),
          addend(static_cast<Addend>(w.addend)),
          tiles(w.columns / COLUMNS),
          blocks((w.rows + ROWS - 1) / ROWS),
          sub(w.group == 16 ? 16 : 32) {
        const bool byte_scales = scales == Scales::two_level || scales == Scales::e4m3;
        scale_bytes = scales == Scales::none ? 0 : scales == Scales::f32 ? 64 : byte_scales ? 16 : 32;
        addend_bytes = addend == Addend::none ? 0 : addend == Addend::zero ? 32 : scale_bytes;
        super_bytes = scales == Scales::two_level ? (addend == Addend::offset ? 64 : 32) : 0;
        unit = std::max(w.group, COLUMNS);
        headers = unit / w.group;
        unit_bytes = headers * (scale_bytes + addend_bytes) + unit / COLUMNS * tile_bytes(codes);
        block_bytes = w.columns / unit * unit_bytes + (super_bytes ? w.columns / SUPER * super_bytes : 0);
    }

    Codes codes;
    Scales scales;
    Addend addend;
    std::int64_t tiles, blocks;
    int sub;                      // columns summed before a scale is applied
    std::int64_t scale_bytes, addend_bytes, super_bytes;
    std::int64_t unit;            // columns whose headers stand together, before their tiles
    std::int64_t headers;
    std::int64_t unit_bytes, block_bytes;
};

Sixteen read_sixteen(const std::uint8_t* from, Scales kind) {
    switch (kind) {
        case Scales::f16: return sixteen_f16(from);
        case Scales::bf16: return sixteen_bf16(from);
        case Scales::two_level: return sixteen_int8(from);
        case Scales::e4m3: return sixteen_e4m3(from);
        default: {
            float values[ROWS];
            std::memcpy(values, from, sizeof values);
            return sixteen_load(values);
        }
    }
}

// Walks one block of 16 rows tile by tile and keeps the scales of the tile it stands on.
class Walk {
  public:
    Walk(const Layout& layout, const std::uint8_t* block) : layout_(layout), at_(block) {}

    // The codes of the next tile.
    const std::uint8_t* next() {
        if (layout_.super_bytes && column_ % SUPER == 0) {
            outer_scale_ = sixteen_f16(at_);
            if (layout_.addend == Addend::offset) outer_addend_ = sixteen_f16(at_ + 32);
            at_ += layout_.super_bytes;
        }
        if (column_ % layout_.unit == 0) {
            for (std::int64_t header = 0; header < layout_.headers; ++header) read_header(header);
        }
        const std::uint8_t* tile = at_;
        at_ += tile_bytes(layout_.codes);
        column_ += COLUMNS;
        return tile;
    }

    Sixteen scale[2];
    Sixteen addend[2];

  private:
    void read_header(std::int64_t header) {
        if (layout_.scales != Scales::none) {
            scale[header] = read_sixteen(at_, layout_.scales);
            if (layout_.super_bytes) scale[header] = sixteen_multiply(scale[header], outer_scale_);
        }
        at_ += layout_.scale_bytes;
        if (layout_.addend == Addend::offset) {
            addend[header] = read_sixteen(at_, layout_.scales);
            if (layout_.super_bytes) addend[header] = sixteen_multiply(addend[header], outer_addend_);
        } else if (layout_.addend == Addend::zero) {
            // -zero: what is added to a sum of codes for each unit of x
            addend[header] = sixteen_multiply(sixteen_f16(at_), sixteen_set(-1.0f));
        }
        at_ += layout_.addend_bytes;
    }

    const Layout& layout_;
    const std::uint8_t* at_;
    std::int64_t column_ = 0;
    Sixteen outer_scale_ = sixteen_zeros(), outer_addend_ = sixteen_zeros();
};

// x of some tokens, tile by tile: element (tile, token, column) and the sum of each token's sub-blocks.
struct Input {
    const std::uint16_t* bfloats = nullptr;
    const float* floats = nullptr;
    const float* sums = nullptr;  // (tile, sub-block of the tile, token)
    int tokens = 0;
};

template <Addend ADDEND, bool SCALED>
inline Sixteen accumulate(Sixteen total, Sixteen sum, Sixteen scale, Sixteen addend, float x_sum) {
    if constexpr (ADDEND == Addend::zero) sum = sixteen_fma(addend, sixteen_set(x_sum), sum);
    total = SCALED ? sixteen_fma(scale, sum, total) : sixteen_add(total, sum);
    if constexpr (ADDEND == Addend::offset) total = sixteen_fma(addend, sixteen_set(x_sum), total);
    return total;
}

template <int SUB, Addend ADDEND, bool SCALED, int TOKENS>
inline void multiply_tile(const BfloatTile& w, const Walk& walk, const Input& x, std::int64_t tile, int token,
                          float (*totals)[ROWS]) {
    const std::uint16_t* const from = x.bfloats + (tile * x.tokens + token) * COLUMNS;
    Sixteen sums[TOKENS];
    dot<0, SUB, TOKENS>(w, from, COLUMNS, sums);
    const float* const x_sums = x.sums + tile * (COLUMNS / SUB) * x.tokens + token;
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        Sixteen total = sixteen_load(totals[token + t]);
        total = accumulate<ADDEND, SCALED>(total, sums[t], walk.scale[0], walk.addend[0],
                                           ADDEND == Addend::none ? 0.0f : x_sums[t]);
        sixteen_store(totals[token + t], total);
    }
    if constexpr (SUB == 16) {
        dot<16, 16, TOKENS>(w, from, COLUMNS, sums);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            Sixteen total = sixteen_load(totals[token + t]);
            total = accumulate<ADDEND, SCALED>(total, sums[t], walk.scale[1], walk.addend[1],
                                               ADDEND == Addend::none ? 0.0f : x_sums[x.tokens + t]);
            sixteen_store(totals[token + t], total);
        }
    }
}

template <int TOKENS>
inline void multiply_floats(const FloatTile& w, const Input& x, std::int64_t tile, int half, int token,
                            float (*totals)[ROWS]) {
    Sixteen sums[TOKENS];
    dot_floats<TOKENS>(w, x.floats + (tile * x.tokens + token) * COLUMNS + half * 16, COLUMNS, sums);
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        sixteen_store(totals[token + t], sixteen_add(sixteen_load(totals[token + t]), sums[t]));
    }
}

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

template <int SUB, Addend ADDEND, bool SCALED>
struct TileStep {
    const BfloatTile& w;
    const Walk& walk;
    const Input& x;
    std::int64_t tile;
    float (*totals)[ROWS];
    template <int TOKENS>
    void operator()(int token) const {
        multiply_tile<SUB, ADDEND, SCALED, TOKENS>(w, walk, x, tile, token, totals);
    }
};

struct FloatStep {
    const FloatTile& w;
    const Input& x;
    std::int64_t tile;
    int half;
    float (*totals)[ROWS];
    template <int TOKENS>
    void operator()(int token) const {
        multiply_floats<TOKENS>(w, x, tile, half, token, totals);
    }
};

// One block of rows times one tile of tokens.
using BlockFunction = void (*)(const Layout&, const std::uint8_t*, const Table&, const Input&, float (*)[ROWS]);

template <Codes CODES, int SUB, Addend ADDEND, bool SCALED>
void multiply_block(const Layout& layout, const std::uint8_t* block, const Table& table, const Input& x,
                    float (*totals)[ROWS]) {
    Walk walk(layout, block);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        BfloatTile w;
        decode<CODES>(walk.next(), table, w);
        for_tokens(x.tokens, TileStep<SUB, ADDEND, SCALED>{w, walk, x, tile, totals});
    }
}

template <Codes CODES>
void multiply_float_block(const Layout& layout, const std::uint8_t* block, const Table& table, const Input& x,
                          float (*totals)[ROWS]) {
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        for (int half = 0; half < 2; ++half) {
            FloatTile w;
            decode_floats<CODES>(block + tile * tile_bytes(CODES) + half * tile_bytes(CODES) / 2, table, w);
            for_tokens(x.tokens, FloatStep{w, x, tile, half, totals});
        }
    }
}

struct ScaledFloatStep {
    const FloatTile& w;
    const Input& x;
    std::int64_t tile;
    int half;
    Sixteen scale;
    float (*totals)[ROWS];
    template <int TOKENS>
    void operator()(int token) const {
        Sixteen sums[TOKENS];
        dot_floats<TOKENS>(w, x.floats + (tile * x.tokens + token) * COLUMNS + half * 16, COLUMNS, sums);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            sixteen_store(totals[token + t], sixteen_fma(scale, sums[t], sixteen_load(totals[token + t])));
        }
    }
};

// Codes whose values bfloat16 would round: 16 columns at a time in float32, then the scale.
template <Codes CODES>
void multiply_wide_block(const Layout& layout, const std::uint8_t* block, const Table& table, const Input& x,
                         float (*totals)[ROWS]) {
    Walk walk(layout, block);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::uint8_t* const codes = walk.next();
        for (int half = 0; half < 2; ++half) {
            FloatTile w;
            decode_floats<CODES>(codes + half * tile_bytes(CODES) / 2, table, w);
            for_tokens(x.tokens, ScaledFloatStep{w, x, tile, half, walk.scale[layout.sub == 16 ? half : 0], totals});
        }
    }
}

template <Codes CODES, int SUB>
BlockFunction by_addend(Addend addend) {
    switch (addend) {
        case Addend::none: return multiply_block<CODES, SUB, Addend::none, true>;
        case Addend::offset: return multiply_block<CODES, SUB, Addend::offset, true>;
        case Addend::zero: return multiply_block<CODES, SUB, Addend::zero, true>;
    }
    return nullptr;
}

template <Codes CODES>
BlockFunction by_sub(const Layout& layout) {
    return layout.sub == 16 ? by_addend<CODES, 16>(layout.addend) : by_addend<CODES, 32>(layout.addend);
}

BlockFunction block_function(const Layout& layout) {
    switch (layout.codes) {
        case Codes::bits2: return by_sub<Codes::bits2>(layout);
        case Codes::bits3: return by_sub<Codes::bits3>(layout);
        case Codes::bits4: return by_sub<Codes::bits4>(layout);
        case Codes::bits5: return by_sub<Codes::bits5>(layout);
        case Codes::bits6: return by_sub<Codes::bits6>(layout);
        case Codes::bits7: return by_sub<Codes::bits7>(layout);
        case Codes::int8: return by_sub<Codes::int8>(layout);
        case Codes::uint8: return by_sub<Codes::uint8>(layout);
        case Codes::e4m3: return by_sub<Codes::e4m3>(layout);
        case Codes::wide4: return layout.addend == Addend::none ? multiply_wide_block<Codes::wide4> : nullptr;
        case Codes::bf16: return multiply_block<Codes::bf16, 32, Addend::none, false>;
        case Codes::f16: return multiply_float_block<Codes::f16>;
        case Codes::f32: return multiply_float_block<Codes::f32>;
    }
    return nullptr;
}

// Where x is laid out; one a calling thread, grown and kept.
struct Workspace {
    std::vector<std::uint16_t> bfloats;
    std::vector<float> floats;
    std::vector<float> sums;
};

// Lays out one token's row. Sums are of the rounded numbers, the ones the products see.
void lay_out(const float* row, std::int64_t columns, std::int64_t tiles, int sub, int tokens, int token,
             std::uint16_t* bfloats, float* floats, float* sums) {
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
        alignas(64) float padded[COLUMNS] = {};
        const std::int64_t left = std::min<std::int64_t>(COLUMNS, columns - tile * COLUMNS);
        if (left > 0) std::memcpy(padded, row + tile * COLUMNS, static_cast<std::size_t>(left) * sizeof(float));
        const std::int64_t place = (tile * tokens + token) * COLUMNS;
        if (floats != nullptr) {
            std::memcpy(floats + place, padded, sizeof padded);
            continue;
        }
        for (int i = 0; i < COLUMNS; ++i) {
            bfloats[place + i] = float_to_bfloat(padded[i]);
            padded[i] = bfloat_to_float(bfloats[place + i]);
        }
        for (int part = 0; part < COLUMNS / sub; ++part) {
            float* const values = padded + part * sub;
            for (int width = sub / 2; width > 0; width /= 2) {  // a fixed tree
                for (int i = 0; i < width; ++i) values[i] += values[i + width];
            }
            sums[(tile * (COLUMNS / sub) + part) * tokens + token] = values[0];
        }
    }
}

void linear(const lowbit_weight& weight, const float* x, std::int64_t tokens, std::int64_t x_stride,
            std::int64_t columns, float* out, std::int64_t out_stride) {
    const Layout layout(weight);
    const BlockFunction function = block_function(layout);
    const Table table(weight.table);
    const bool floats = is_float(layout.codes);
    static thread_local Workspace workspace;
    const std::int64_t token_tiles = (tokens + TOKEN_TILE - 1) / TOKEN_TILE;
    const auto elements = static_cast<std::size_t>(tokens * layout.tiles * COLUMNS);
    const std::int64_t parts = COLUMNS / layout.sub;
    if (floats) {
        workspace.floats.resize(std::max(workspace.floats.size(), elements));
    } else {
        workspace.bfloats.resize(std::max(workspace.bfloats.size(), elements));
        workspace.sums.resize(std::max(workspace.sums.size(), static_cast<std::size_t>(tokens * layout.tiles * parts)));
    }
    std::uint16_t* const bfloats = floats ? nullptr : workspace.bfloats.data();
    float* const wide = floats ? workspace.floats.data() : nullptr;
    float* const sums = workspace.sums.data();
    const auto tokens_of = [&](std::int64_t tile) {
        return static_cast<int>(std::min<std::int64_t>(TOKEN_TILE, tokens - tile * TOKEN_TILE));
    };
    const auto lay_out_token = [&](std::int64_t token) {
        const std::int64_t tile = token / TOKEN_TILE, first = tile * TOKEN_TILE;
        const std::int64_t base = first * layout.tiles * COLUMNS;
        lay_out(x + token * x_stride, columns, layout.tiles, layout.sub, tokens_of(tile), static_cast<int>(token - first),
                floats ? nullptr : bfloats + base, floats ? wide + base : nullptr, sums + first * layout.tiles * parts);
    };
    if (tokens < 8) {
        for (std::int64_t token = 0; token < tokens; ++token) lay_out_token(token);
    } else {
        parallel_for((tokens + 7) / 8, [&](std::int64_t task) {
            for (std::int64_t token = task * 8; token < std::min(tokens, task * 8 + 8); ++token) lay_out_token(token);
        });
    }
    // Enough tasks to share evenly, each long enough to be worth claiming.
    const std::int64_t wanted = 8 * thread_count();
    const std::int64_t together = std::max<std::int64_t>(1, layout.blocks * token_tiles / wanted);
    const std::int64_t chunk = std::min<std::int64_t>(together, layout.blocks);
    const std::int64_t chunks = (layout.blocks + chunk - 1) / chunk;
    parallel_for(chunks * token_tiles, [&](std::int64_t task) {
        const std::int64_t tile = task / chunks, first = tile * TOKEN_TILE;
        const std::int64_t base = first * layout.tiles * COLUMNS;
        Input input;
        input.tokens = tokens_of(tile);
        if (floats) {
            input.floats = wide + base;
        } else {
            input.bfloats = bfloats + base;
            input.sums = sums + first * layout.tiles * parts;
        }
        const std::int64_t last = std::min(layout.blocks, (task % chunks + 1) * chunk);
        for (std::int64_t block = task % chunks * chunk; block < last; ++block) {
            alignas(64) float totals[TOKEN_TILE][ROWS];
            std::memset(totals, 0, static_cast<std::size_t>(input.tokens) * sizeof totals[0]);
            function(layout, weight.data + block * layout.block_bytes, table, input, totals);
            const int rows = static_cast<int>(std::min<std::int64_t>(ROWS, weight.rows - block * ROWS));
            for (int token = 0; token < input.tokens; ++token) {
                float* const to = out + (first + token) * out_stride + block * ROWS;
                if (rows == ROWS) {
                    sixteen_store(to, sixteen_load(totals[token]));
                } else {
                    sixteen_store_some(to, sixteen_load(totals[token]), rows);
                }
            }
        }
    });
}

float code_value(const lowbit_weight& weight, Codes codes, const std::uint8_t* tile, int row, int column) {
    switch (codes) {
        case Codes::bits7: return bfloat_to_float(weight.table[0]) + static_cast<float>(read_code(tile, codes, row, column));
        case Codes::int8: return static_cast<float>(static_cast<std::int8_t>(tile[column / 2 * 32 + row * 2 + column % 2]));
        case Codes::uint8: return static_cast<float>(tile[column / 2 * 32 + row * 2 + column % 2]);
        case Codes::e4m3: return e4m3_to_float(tile[column / 2 * 32 + row * 2 + column % 2]);
        case Codes::wide4: {
            float value;
            const auto* const bytes = reinterpret_cast<const std::uint8_t*>(weight.table);
            std::memcpy(&value, bytes + read_code(tile, Codes::bits4, row, column) * sizeof value, sizeof value);
            return value;
        }
        case Codes::bf16: {
            std::uint16_t bits;
            std::memcpy(&bits, tile + column / 2 * 64 + row * 4 + column % 2 * 2, sizeof bits);
            return bfloat_to_float(bits);
        }
        case Codes::f16: {
            std::uint16_t bits;
            std::memcpy(&bits, tile + column * 32 + row * 2, sizeof bits);
            return _cvtsh_ss(bits);
        }
        case Codes::f32: {
            float value;
            std::memcpy(&value, tile + column * 64 + row * 4, sizeof value);
            return value;
        }
        default: return bfloat_to_float(weight.table[read_code(tile, codes, row, column)]);
    }
}

// One row of the weight in float32: (code [- zero]) * scale [+ offset], as QuantizedTensor.dequantize has it.
void dequantize_row(const lowbit_weight& weight, const Layout& layout, std::int64_t row, std::int64_t columns, float* out) {
    Walk walk(layout, weight.data + row / ROWS * layout.block_bytes);
    const int lane = static_cast<int>(row % ROWS);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::uint8_t* const codes = walk.next();
        float scale[2][ROWS], addend[2][ROWS];
        for (int part = 0; part < COLUMNS / layout.sub; ++part) {
            if (layout.scales != Scales::none) sixteen_store(scale[part], walk.scale[part]);
            if (layout.addend != Addend::none) sixteen_store(addend[part], walk.addend[part]);
        }
        const int left = static_cast<int>(std::min<std::int64_t>(COLUMNS, columns - tile * COLUMNS));
        for (int column = 0; column < left; ++column) {
            const int part = column / layout.sub;
            float value = code_value(weight, layout.codes, codes, lane, column);
            if (layout.addend == Addend::zero) value += addend[part][lane];
            if (layout.scales != Scales::none) value *= scale[part][lane];
            if (layout.addend == Addend::offset) value += addend[part][lane];
            out[tile * COLUMNS + column] = value;
        }
    }
}

// Copies 16 rows' numbers of ``size`` bytes from a (rows, groups) array; rows past the end are zero.
void put_sixteen(std::uint8_t* to, const std::uint8_t* from, std::int64_t size, std::int64_t rows, std::int64_t row,
                 std::int64_t groups, std::int64_t group) {
    for (int lane = 0; lane < ROWS; ++lane) {
        if (row + lane < rows) {
            std::memcpy(to + lane * size, from + ((row + lane) * groups + group) * size, static_cast<std::size_t>(size));
        }
    }
}

struct Sources {
    const std::uint8_t* codes;  // (rows, columns) bytes; bf16, f16, f32: the matrix
    const std::uint8_t* scales;
    const std::uint8_t* addends;
    const std::uint8_t* outer_scales;
    const std::uint8_t* outer_addends;
};

void put_tile(std::uint8_t* tile, const lowbit_weight& weight, Codes codes, const std::uint8_t* from, std::int64_t row,
              std::int64_t first_column, std::int64_t columns) {
    const int element = codes == Codes::f32 ? 4 : codes == Codes::f16 || codes == Codes::bf16 ? 2 : 1;
    const auto last = static_cast<int>(std::min<std::int64_t>(COLUMNS, columns - first_column));
    for (int lane = 0; lane < ROWS && row + lane < weight.rows; ++lane) {
        const std::uint8_t* const source = from + ((row + lane) * columns + first_column) * element;
        for (int column = 0; column < last; ++column) {
            switch (codes) {
                case Codes::int8:  // offset binary in the canonical form
                    tile[column / 2 * 32 + lane * 2 + column % 2] = static_cast<std::uint8_t>(source[column] ^ 0x80u);
                    break;
                case Codes::e4m3:
                case Codes::uint8: tile[column / 2 * 32 + lane * 2 + column % 2] = source[column]; break;
                case Codes::bf16:
                    std::memcpy(tile + column / 2 * 64 + lane * 4 + column % 2 * 2, source + column * 2, 2);
                    break;
                case Codes::f16: std::memcpy(tile + column * 32 + lane * 2, source + column * 2, 2); break;
                case Codes::f32: std::memcpy(tile + column * 64 + lane * 4, source + column * 4, 4); break;
                default: write_code(tile, codes, lane, column, source[column]);
            }
        }
    }
}

// 4-bit tiles are most of what is packed: whole words at once.
void put_nibble_tile(std::uint8_t* tile, const lowbit_weight& weight, const std::uint8_t* from, std::int64_t row,
                     std::int64_t first_column, std::int64_t columns) {
    for (int lane = 0; lane < ROWS && row + lane < weight.rows; ++lane) {
        const std::uint8_t* const source = from + (row + lane) * columns + first_column;
        for (int line = 0; line < 4; ++line) {
            for (int odd = 0; odd < 2; ++odd) {
                const std::uint8_t* const c = source + line * 8 + odd;
                const auto word = static_cast<std::uint16_t>(c[0] | c[2] << 4 | c[4] << 8 | c[6] << 12);
                std::memcpy(tile + line * 64 + (lane * 2 + odd) * 2, &word, sizeof word);
            }
        }
    }
}

void pack(const lowbit_weight& weight, std::int64_t columns, const Sources& from, std::uint8_t* to) {
    const Layout layout(weight);
    const std::int64_t groups = weight.columns / weight.group, supers = weight.columns / SUPER;
    const std::int64_t scale_size = layout.scale_bytes / ROWS, addend_size = layout.addend_bytes / ROWS;
    parallel_for(layout.blocks, [&](std::int64_t block) {
        std::uint8_t* at = to + block * layout.block_bytes;
        std::memset(at, 0, static_cast<std::size_t>(layout.block_bytes));
        const std::int64_t row = block * ROWS;
        for (std::int64_t column = 0; column < weight.columns; column += COLUMNS) {
            if (layout.super_bytes && column % SUPER == 0) {
                put_sixteen(at, from.outer_scales, 2, weight.rows, row, supers, column / SUPER);
                if (from.outer_addends) put_sixteen(at + 32, from.outer_addends, 2, weight.rows, row, supers, column / SUPER);
                at += layout.super_bytes;
            }
            if (column % layout.unit == 0) {
                for (std::int64_t header = 0; header < layout.headers; ++header) {
                    const std::int64_t group = column / weight.group + header;
                    if (scale_size) put_sixteen(at, from.scales, scale_size, weight.rows, row, groups, group);
                    at += layout.scale_bytes;
                    if (addend_size) put_sixteen(at, from.addends, addend_size, weight.rows, row, groups, group);
                    at += layout.addend_bytes;
                }
            }
            if (layout.codes == Codes::bits4 || layout.codes == Codes::wide4) {
                put_nibble_tile(at, weight, from.codes, row, column, columns);
            } else {
                put_tile(at, weight, layout.codes, from.codes, row, column, columns);
            }
            at += tile_bytes(layout.codes);
        }
    });
}

}  // namespace
}  // namespace lowbit

// Bytes of the packed weight; 0 for a description no kernel has.
LOWBIT_EXPORT std::int64_t lowbit_linear_bytes(const lowbit_weight* weight) {
    const lowbit::Layout layout(*weight);
    if (lowbit::block_function(layout) == nullptr) return 0;
    return layout.blocks * layout.block_bytes;
}

LOWBIT_EXPORT void lowbit_linear_pack(const lowbit_weight* weight, std::int64_t columns, const std::uint8_t* codes,
                                      const std::uint8_t* scales, const std::uint8_t* addends,
                                      const std::uint8_t* outer_scales, const std::uint8_t* outer_addends,
                                      std::uint8_t* to) {
    lowbit::pack(*weight, columns, {codes, scales, addends, outer_scales, outer_addends}, to);
}

// x (tokens, columns) with x_stride floats from row to row -> out (tokens, weight->rows). Returns 0, or 1
// where memory ran out.
LOWBIT_EXPORT int lowbit_linear(const lowbit_weight* weight, const float* x, std::int64_t tokens,
                                std::int64_t x_stride, std::int64_t columns, float* out, std::int64_t out_stride) {
    try {
        lowbit::linear(*weight, x, tokens, x_stride, columns, out, out_stride);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// float32 (count, columns): rows ``ids`` (int32, or int64 where ``wide``) of the weight, times row_scale (rows,),
// columns put from stored to logical places by column_order; both may be null. 0, 1 where memory ran out, or 2
// where an id is no row: then nothing is written.
LOWBIT_EXPORT int lowbit_linear_rows(const lowbit_weight* weight, std::int64_t columns, const void* ids,
                                     std::int32_t wide, std::int64_t count, const float* row_scale,
                                     const std::int64_t* column_order, float* out) {
    const auto id_at = [&](std::int64_t i) -> std::int64_t {
        return wide ? static_cast<const std::int64_t*>(ids)[i] : static_cast<const std::int32_t*>(ids)[i];
    };
    for (std::int64_t i = 0; i < count; ++i) {
        if (id_at(i) < 0 || id_at(i) >= weight->rows) return 2;
    }
    const lowbit::Layout layout(*weight);
    std::vector<float> stored;
    try {
        if (column_order != nullptr) stored.resize(static_cast<std::size_t>(count * columns));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    lowbit::parallel_for(count, [&](std::int64_t i) {
        float* const logical = out + i * columns;
        float* const row = column_order == nullptr ? logical : stored.data() + i * columns;
        lowbit::dequantize_row(*weight, layout, id_at(i), columns, row);
        for (std::int64_t column = 0; row_scale != nullptr && column < columns; ++column) {
            row[column] *= row_scale[id_at(i)];
        }
        for (std::int64_t column = 0; column_order != nullptr && column < columns; ++column) {
            logical[column_order[column]] = row[column];
        }
    });
    return 0;
}
