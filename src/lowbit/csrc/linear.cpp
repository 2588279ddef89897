// Linear layers on packed weights: y = x W^T for one token or a thousand, one routine for all of them.
//
// A task is a few blocks of 16 output rows and up to TOKEN_TILE tokens. It walks its tiles once, front to back (one
// sequential stream of weights), decodes each tile and multiplies it with every token; totals stay in L1, and what
// a layer does to them (scales, a bias, a gate) is done there.
// x is first quantized as the layer asks and rounded to what the kernel multiplies (linear_input.h).

#include "linear_products.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "activation_quant.h"
#include "activations.h"
#include "amd_family.h"
#include "amx_tiles.h"
#include "linear_columns.h"
#include "linear_kernels.h"
#include "linear_outliers.h"
#include "linear_row_vectors.h"
#include "lowbit.h"
#include "operations.h"
#include "thread_pool.h"

namespace lowbit {
namespace {

// A product with what its kernel needs, and where its input lies in the workspace.
struct Prepared {
    explicit Prepared(const Product& from) : product(&from), layout(*from.weight), decoding(*from.weight) {
        shape.tiles = layout.tiles;
        shape.columns = layout.row_vectors == nullptr ? from.columns : layout.tiles * COLUMNS;
        shape.span = summed_columns(layout);
        shape.rounded = !is_float(layout.codes);
        shape.element = shape.rounded ? static_cast<int>(sizeof(Bfloat16)) : 4;
        shape.numbers = is_grid(layout.codes) ? grid_of(layout.codes).numbers : 0;
        choose_kernel(static_cast<InputKind>(from.weight->input));
        token_tiles = (from.tokens + tile_tokens - 1) / tile_tokens;
        const lowbit_layer_description* const layer = from.layer;
        gated = layer != nullptr && layer->activation >= 0;
        height = in_panels() ? ROWS : layout.height;
        blocks = (rows() + height - 1) / height;
        has_factors = layer != nullptr && (layer->static_factor != nullptr || layer->factors != 0);
        product_size = from.by_columns == nullptr ? (product_bytes(layout, from.tokens) + 63) / 64 * 64 : 0;
        if (layout.outliers && !in_panels()) {
            const std::int64_t lanes = from.tokens == 1 ? 1 : (from.tokens + ROWS - 1) / ROWS * ROWS;
            unrounded_size = (lanes * layout.tiles * COLUMNS * static_cast<std::int64_t>(sizeof(float)) + 63) / 64 * 64;
        }
    }

    // The kernel, and what it makes of x that comes as ``kind``.
    void choose_kernel(InputKind kind) {
        if (product->prompts && product->by_columns != nullptr) {
            if (kind == InputKind::bfloat) round_columns = round_columns_function(layout);
            if (round_columns != nullptr) return take_panels();
        } else if (product->prompts && (kind == InputKind::bfloat || kind == InputKind::scaled)) {
            round = round_function(layout, decoding.words, product->layer != nullptr && product->layer->quantizer != nullptr);
            if (round == nullptr && !CODES_HAVE_TILES) take_codes();
        }
        if (round != nullptr) {
            requantized = kind == InputKind::scaled;
            return take_panels();
        }
        if (kind == InputKind::bfloat || is_words(layout.codes)) function = word_function(layout, decoding.words);
        if (kind == InputKind::scaled && takes_scaled(layout)) {
            shape.times = codes_per_unit(*product->weight->quantizer);
            if (shape.times != 0.0f) function = word_function(layout, decoding.words);
            if (function == nullptr) shape.times = 0.0f;
        }
        if (function != nullptr) {
            tiles = word_tiles(layout, decoding.words, product->tokens);
            take_words();
        } else if (kind == InputKind::floats && float_function(layout) != nullptr) {
            function = float_function(layout);
            shape.element = 4;
            shape.rounded = false;
        } else if (kind == InputKind::scaled && takes_scaled(layout)) {
            tiles = scaled_tiles(layout, product->tokens);
            function = scaled_function(layout);
            shape.kind = kind;
            shape.span = layout.sub;
            scaled = true;
        } else if (kind != InputKind::bfloat && kind != InputKind::floats && meets_bytes(layout, decoding.bytes)) {
            take_bytes(kind);
        } else {
            if (CODES_HAVE_TILES && product->tokens >= LEAST_OF_PANELS && product->by_columns == nullptr) take_codes();
            if (round != nullptr) return take_panels();
            tiles = exact_tiles(layout, product->tokens);
            function = exact_function(layout);
        }
    }
    void take_codes() {
        round = code_function(layout);
        scaled_after = round != nullptr;
    }
    void take_panels() {
        tile_tokens = ROUNDED_TOKENS / 2;     // a tile's lines lie one behind another, and in other sets of the cache
        shape.span = layout.tiles * COLUMNS;  // no sum is asked for
        shape.element = 2;
        shape.rounded = true;
        if (!WORD_PANELS) return;
        shape.kind = InputKind::words;
        shape.span = WORD_PANEL_COLUMNS;
        shape.largest = LARGEST_PANEL_INPUT;
        scaled = true;
    }
    void take_words() {
        shape.kind = InputKind::words;
        shape.element = 2;
        shape.span = layout.sub;
        shape.scaled_sums = layout.addend == Addend::offset;
        shape.largest = largest_word(decoding.words.kind);
        shape.base = decoding.words.base;
        shape.factor = decoding.words.factor;
        scaled = true;
    }
    void take_bytes(InputKind kind) {
        // Whole numbers that come as such are summed over wide groups; a factor needs a scale to go into.
        const bool wide = layout.unit == product->weight->group && layout.unit >= 2 * COLUMNS &&
                          layout.unit % BYTE_COLUMNS == 0 && layout.unit <= LARGEST_GROUP &&
                          layout.super_bytes == 0 && decoding.bytes.factor == 1.0f;
        const bool grouped = kind == InputKind::groups || !wide;
        tiles = byte_tiles(layout, decoding.bytes, grouped, product->tokens);
        function = byte_function(layout, decoding.bytes, grouped);
        shape.kind = kind;
        shape.element = 1;
        shape.span = grouped ? layout.sub : layout.unit;
        shape.scaled_sums = layout.addend == Addend::offset;
        shape.base = decoding.bytes.base + byte_base_shift(layout.codes, decoding.bytes);
        shape.factor = decoding.bytes.factor;
        scaled = grouped;
        if (product->by_columns == nullptr) {
            round = byte_code_function(layout, decoding.bytes, grouped, product->tokens);
        }
        if (round != nullptr) {
            scaled_after = true;
            tile_tokens = ROUNDED_TOKENS / 2;
        }
    }

    bool in_panels() const { return round != nullptr || round_columns != nullptr; }
    std::int64_t rows() const { return product->weight->rows / (gated ? 2 : 1); }  // of the result
    const float* row(std::int64_t token) const {
        const std::int64_t from = product->x_rows == nullptr ? token : product->x_rows[token];
        return product->x + from * product->x_stride;
    }
    // Of x as panels meet it: lines of a token, and their bytes.
    std::int64_t line_bytes() const { return shape.whole() ? BYTE_COLUMNS : COLUMNS * shape.element; }
    std::int64_t lines() const { return shape.value_bytes() / line_bytes(); }
    bool word_panels() const { return WORD_PANELS && !shape.whole(); }  // of a product with prompts' tokens
    int tokens_of(std::int64_t tile) const {
        return static_cast<int>(std::min<std::int64_t>(tile_tokens, product->tokens - tile * tile_tokens));
    }
    // Of ``unrounded``, places of token tile ``tile``; whole registers of tokens, or one token.
    int lanes_of(std::int64_t tile) const {
        return product->tokens == 1 ? 1 : (tokens_of(tile) + ROWS - 1) / ROWS * ROWS;
    }
    float* unrounded_of(std::int64_t tile) const { return unrounded + tile * tile_tokens * layout.tiles * COLUMNS; }
    std::int64_t bytes() const { return bytes(product->tokens); }
    std::int64_t bytes(std::int64_t tokens) const {
        const std::int64_t numbers = shape.spans() * (shape.based() ? 2 : 1) + (scaled ? shape.scales() : 0);
        return tokens * (shape.value_bytes() + numbers * static_cast<std::int64_t>(sizeof(float)) + 1);
    }
    // Where token tile ``tile`` lies.
    InputPlaces places(std::int64_t tile) const {
        return places(at, product->tokens, tile * tile_tokens, tokens_of(tile));
    }
    // ``count`` tokens of ``tokens`` that lie at ``start``: values, sums, bases, scales, faults.
    InputPlaces places(std::uint8_t* start, std::int64_t tokens, std::int64_t first, int count) const {
        std::uint8_t* const numbers = start + tokens * shape.value_bytes();
        auto* const sums = reinterpret_cast<float*>(numbers);
        auto* const bases = reinterpret_cast<std::int32_t*>(sums + tokens * shape.spans());
        auto* const scales = reinterpret_cast<float*>(bases + (shape.based() ? tokens * shape.spans() : 0));
        auto* const faulty = reinterpret_cast<std::uint8_t*>(scales + (scaled ? tokens * shape.scales() : 0));
        return {start + first * shape.value_bytes(), sums + first * shape.spans(),
                scaled ? scales + first * shape.scales() : nullptr, bases + first * shape.spans(), faulty + first,
                count};
    }

    const Product* product;
    Layout layout;
    Decoding decoding;
    BlocksFunction tiles = nullptr;  // if not, ``function``
    BlockFunction function = nullptr;
    RoundFunction round = nullptr;   // if not, these
    RoundColumnsFunction round_columns = nullptr;  // the same of a weight with scales of columns
    bool scaled_after = false;       // of codes alone
    bool requantized = false;        // x meets them as what its codes and scales are worth
    int tile_tokens = TOKEN_TILE;    // of which x is laid out together
    InputShape shape;
    bool scaled = false;
    bool gated = false;        // blocks are a gate's, as many more its partners
    bool has_factors = false;
    std::int64_t product_size = 0;      // bytes of the products that rows look up; 0: they multiply
    std::uint8_t* products = nullptr;
    std::int64_t unrounded_size = 0;    // bytes of x as outliers meet it; 0: there are none
    float* unrounded = nullptr;         // token tile by token tile: (column, token)
    float* factors = nullptr;  // (tokens,)
    float* offsets = nullptr;  // (tokens,): what all rows of a weight of row vectors have in common
    std::int64_t height = ROWS;  // rows of a block of the result: panels have 16, whatever the weight's have
    std::int64_t blocks = 0;     // of the result
    std::int64_t token_tiles = 0;
    std::int64_t first_tokens = 0;  // groups of LAID_TOGETHER tokens of the products before
    std::int64_t chunk = 1, chunks = 1, first_task = 0;
    std::uint8_t* at = nullptr;
};

constexpr std::int64_t LAID_TOGETHER = 16;  // tokens of a task: their sums and scales, floats side by side, fill whole lines
constexpr std::int64_t MOST_LAYER_COLUMNS = 1 << 15;  // of x where a layer changes it (kernels/native_layer.py)

// A row of x as the product's layer wants it, perhaps in ``staged``.
const float* changed_row(const Prepared& p, std::int64_t token, float (*staged)[MOST_LAYER_COLUMNS]) {
    const lowbit_layer_description* const layer = p.product->layer;
    const float* row = p.row(token);
    if (layer == nullptr) return row;
    float factor = 1.0f;
    if (layer->quantizer != nullptr) {
        factor = quantize_alone(*layer->quantizer, row, p.product->columns, staged[0]);
        row = staged[0];
    }
    if (p.has_factors) p.factors[token] = layer->static_factor != nullptr ? *layer->static_factor : factor;
    if (layer->column_order != nullptr) {
        for (std::int64_t i = 0; i < p.product->columns; ++i) staged[1][i] = row[layer->column_order[i]];
        row = staged[1];
    }
    return row;
}

// A token's x as outliers meet it, and zeros behind the last one of a token tile.
void lay_out_unrounded(const Prepared& p, const float* row, std::int64_t tile, int place) {
    float* const to = p.unrounded_of(tile);
    const int lanes = p.lanes_of(tile), last = place + 1 == p.tokens_of(tile) ? lanes : place + 1;
    for (std::int64_t column = 0; column < p.shape.columns; ++column) {
        float* const lane = to + column * lanes;
        lane[place] = row[column];
        for (int padding = place + 1; padding < last; ++padding) lane[padding] = 0.0f;
    }
}

void lay_out_tokens(const Prepared& p, std::int64_t first, std::int64_t last) {
    float staged[2][MOST_LAYER_COLUMNS];  // of which a layer touches what it needs
    static thread_local std::vector<float> codes, scales, taken;
    const lowbit_weight& weight = *p.product->weight;
    const bool quantized = p.shape.quantized() || p.requantized;
    if (quantized) {
        codes.resize(static_cast<std::size_t>(p.shape.columns));
        scales.resize(static_cast<std::size_t>((p.shape.columns + weight.input_group - 1) / weight.input_group));
    }
    for (std::int64_t token = first; token < last; ++token) {
        const std::int64_t tile = token / p.tile_tokens;
        const int place = static_cast<int>(token - tile * p.tile_tokens);
        const float* row = changed_row(p, token, staged);
        if (weight.row_vectors != nullptr) {
            taken.resize(static_cast<std::size_t>(p.shape.columns));
            p.offsets[token] = take_columns(*weight.row_vectors, row, p.shape.columns, taken.data());
            row = taken.data();
        }
        if (p.unrounded_size != 0) lay_out_unrounded(p, row, tile, place);
        if (quantized) {
            quantize_row(*weight.quantizer, row, p.shape.columns, codes.data(), scales.data());
            row = codes.data();
            if (p.requantized) {
                float* const worth = codes.data();
                for (std::int64_t i = 0; i < p.shape.columns; ++i) worth[i] *= scales.data()[i / weight.input_group];
            } else {
                lay_out_scales(scales.data(), weight.input_group, p.shape, p.places(tile), place);
            }
        }
        lay_out(row, p.shape, p.places(tile), place);
    }
}

// Totals of some blocks: of the few that tiles take together, or of as many as there is room for their tokens.
using Totals = float[BLOCKS_TOGETHER * TOKEN_TILE][ROWS];

// Block ``i`` of those in ``totals``.
inline std::int64_t place_of(const Prepared& p, const Input& input, int i) {
    return static_cast<std::int64_t>(i) * (p.tiles != nullptr ? TOKEN_TILE : input.tokens);
}

inline float add(float a, float b) { return a + b; }  // as of 16 numbers
// A row's outliers times x: times(outlier, sum) adds a product. Every other one has another sum, as a product waits for the
// one before.
template <class Sum, class Times>
INLINE Sum outlier_sum(RowOutliers outliers, Sum zero, const Times& times) {
    Sum sums[2] = {zero, zero};
    for (; outliers.at + 2 <= outliers.end; outliers.at += 2) {
        sums[0] = times(outliers.at[0], sums[0]);
        sums[1] = times(outliers.at[1], sums[1]);
    }
    if (outliers.at < outliers.end) sums[0] = times(outliers.at[0], sums[0]);
    return add(sums[0], sums[1]);
}

// A block's outliers times x of token tile ``tile``. A sum is made in one order, whatever the tokens.
void add_outliers(const Prepared& p, std::int64_t block, std::int64_t tile, int tokens, float (*totals)[ROWS]) {
    const lowbit_weight& weight = *p.product->weight;
    const int lanes = p.lanes_of(tile), rows = static_cast<int>(std::min<std::int64_t>(ROWS, weight.rows - block * ROWS));
    const float* const x = p.unrounded_of(tile);
    for (int row = 0; row < rows; ++row) {
        const RowOutliers outliers(weight, block * ROWS + row);
        if (lanes == 1) {
            totals[0][row] += outlier_sum(outliers, 0.0f, [&](std::uint32_t outlier, float sum) __attribute__((always_inline)) {
                return std::fma(outlier_number(outlier), x[outlier_column(outlier)], sum);
            });
            continue;
        }
        for (int token = 0; token < tokens; token += LANES) {
            const auto times = [&](std::uint32_t outlier, Vector16 sum) __attribute__((always_inline)) {
                return fma(broadcast(outlier_number(outlier)), load(x + outlier_column(outlier) * lanes + token), sum);
            };
            alignas(64) float sums[LANES];
            store(sums, outlier_sum(outliers, zeros(), times));
            for (int t = 0; t < LANES && token + t < tokens; ++t) totals[token + t][row] += sums[t];
        }
    }
}

// The products of some blocks that follow each other with token tile ``tile``, from nothing. ``out``: where those of the first
// will go, or null.
void multiply_blocks(const Prepared& p, std::int64_t first, int blocks, std::int64_t tile, Input input, float* out,
                     Totals& totals) {
    const std::uint8_t* const at = p.product->weight->data + first * p.layout.block_bytes;
    if (p.product_size != 0) return look_up_products(p.layout, at, blocks, input, p.products, totals);
    for (int i = 0; i < blocks; ++i) {
        float(*const own)[ROWS] = totals + place_of(p, input, i);
        std::memset(own, 0, static_cast<std::size_t>(input.tokens) * sizeof own[0]);
        if (p.tiles != nullptr) continue;
        input.out = out == nullptr ? nullptr : out + i * p.layout.height;
        p.function(p.layout, at + i * p.layout.block_bytes, p.decoding, input, own);
    }
    if (p.tiles != nullptr) {
        input.out = out;
        p.tiles(p.layout, at, blocks, p.decoding, input, reinterpret_cast<float(*)[TOKEN_TILE][ROWS]>(totals));
    }
    for (int i = 0; i < blocks && p.unrounded_size != 0; ++i) {
        add_outliers(p, first + i, tile, input.tokens, totals + place_of(p, input, i));
    }
}

// 16 totals of a token, rows ``row`` on, after what the layer does to them.
Vector16 finished(const Prepared& p, Vector16 total, std::int64_t token, std::int64_t row, int lanes) {
    const lowbit_layer_description* const layer = p.product->layer;
    if (p.layout.row_vectors != nullptr) total = add(total, broadcast(p.offsets[token]));
    if (layer == nullptr) return total;
    const float* const factor = p.has_factors ? p.factors + token : nullptr;
    return affine(total, at_column(layer->row_scale, row), factor, at_column(layer->bias, row), lanes);
}

// Writes what a block's totals of a token become. ``partner``: those of a gate's other half.
void write_result(const Prepared& p, std::int64_t token, std::int64_t block, Vector16 total, Vector16 partner) {
    const std::int64_t row = block * p.height;
    const int lanes = static_cast<int>(std::min(p.height, p.rows() - row));
    Vector16 value = finished(p, total, token, row, lanes);
    if (p.gated) {
        const auto activation = static_cast<Activation>(p.product->layer->activation);
        value = lowbit::gated(value, finished(p, partner, token, p.rows() + row, lanes), activation);
    }
    store_some(p.product->out + token * p.product->out_stride + row, value, lanes);
}

void run_task(const Prepared& p, std::int64_t task) {
    const std::int64_t tile = task / p.chunks;
    const InputPlaces places = p.places(tile);
    Input input{places.values, places.sums, places.scales, places.bases, places.tokens};
    input.out_stride = p.product->out_stride;
    const std::int64_t last = std::min(p.blocks, (task % p.chunks + 1) * p.chunk);
    alignas(64) Totals totals, partners;
    const auto write = [&](std::int64_t block, int i) {
        for (int t = 0; t < input.tokens; ++t) {
            const bool faulty = p.shape.whole() && places.faulty[t];  // whole numbers cannot say it
            const auto total = [&](const Totals& of) {
                const float nan = std::numeric_limits<float>::quiet_NaN();
                return faulty ? broadcast(nan) : load(of[place_of(p, input, i) + t]);
            };
            write_result(p, tile * TOKEN_TILE + t, block, total(totals), p.gated ? total(partners) : zeros());
        }
    };
    // A gate's rows and its partners' are two streams of weights: as much of one as there is room for, then of the
    // other. Else a block is written as soon as it is there.
    std::int64_t together = p.tiles != nullptr ? BLOCKS_TOGETHER : 1;
    if (p.gated && p.tiles == nullptr) together = TOKEN_TILE / input.tokens;
    if (p.product_size != 0) together = TOKEN_TILE / input.tokens / LOOKED_UP_TOGETHER * LOOKED_UP_TOGETHER;
    int blocks = 1;
    for (std::int64_t block = task % p.chunks * p.chunk; block < last; block += blocks) {
        blocks = static_cast<int>(std::min(together, last - block));
        if (p.gated) multiply_blocks(p, p.blocks + block, blocks, tile, input, nullptr, partners);
        float* const out = p.product->out + tile * TOKEN_TILE * p.product->out_stride + block * p.layout.height;
        multiply_blocks(p, block, blocks, tile, input, out, totals);
        for (int i = 0; i < blocks; ++i) write(block + i, i);
    }
}

// A memory block at a cache line, grown and kept.
std::uint8_t* aligned(std::vector<std::uint8_t>& memory, std::int64_t bytes) {
    const auto needed = static_cast<std::size_t>(bytes + 64 + READ_PAST);
    if (memory.size() < needed) {
        memory.clear();  // nothing to copy
        memory.resize(needed);
    }
    return reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
}

constexpr std::int64_t CACHED_INPUT = 768 << 10;  // bytes of x and of what is made of it, in a core's own cache

constexpr std::int64_t PANEL_LINE = ROWS * COLUMNS * 2;  // bytes: 16 rows of 32 columns as bfloat16, or of 64 bytes
constexpr std::int64_t ROW_BYTES = 4, ROW_LINE = ROWS * ROW_BYTES;  // of a panel's numbers and scales, side by side
constexpr std::int64_t PANELS = 1 << 20;                 // bytes of the blocks of a task, in a core's own cache
constexpr std::int64_t TOKENS_OF_PIECES = 512;           // whose sums wait for the next columns

// Of one block.
std::int64_t panel_bytes(const Prepared& p) {
    const std::int64_t scales = p.word_panels() ? p.shape.spans() * WORD_PANEL_SCALES : 0;
    return (p.lines() * p.line_bytes() * ROWS + PANEL_LINE - 1) / PANEL_LINE * PANEL_LINE + scales;
}

// Blocks of a task that rounds them for all tokens: two share what is loaded of x, and more where x comes from further
// away, but for every thread some tasks, and as many as for the others.
std::int64_t rounded_blocks(const Prepared& p) {
    const std::int64_t halves = p.gated ? 2 : 1, least = 2 / halves, threads = thread_count();
    const std::int64_t most = std::max(least, PANELS / (panel_bytes(p) * halves));
    const std::int64_t wanted = p.bytes() > CACHED_INPUT ? 8 / halves : least;
    const std::int64_t fair = std::max(least, p.blocks / (3 * threads));
    std::int64_t chosen = least, fewest = std::numeric_limits<std::int64_t>::max();
    for (std::int64_t blocks = least; blocks <= std::min({most, wanted, fair}); blocks += least) {
        const std::int64_t tasks = (p.blocks + blocks - 1) / blocks;
        const std::int64_t of_thread = (tasks + threads - 1) / threads * blocks;
        if (of_thread > fewest) continue;
        chosen = blocks;
        fewest = of_thread;
    }
    return chosen;
}

// What columns of the rows of ``group`` share.
ColumnScales scales_of(const lowbit_column_weight& w, const Layout& layout, std::int64_t group) {
    const std::int64_t first = group * layout.tiles * COLUMNS * number_bytes(static_cast<Scales>(w.kind));
    const auto of_group = [&](const void* all) { return all == nullptr ? nullptr : static_cast<const std::uint8_t*>(all) + first; };
    return {of_group(w.scales), of_group(w.zeros)};
}

// The group whose rows block ``block`` has.
std::int64_t group_of(const lowbit_column_weight& w, std::int64_t block) {
    return std::upper_bound(w.first_block, w.first_block + w.groups + 1, block) - w.first_block - 1;
}

// Writes a token's results of such a block.
void write_rows(const lowbit_column_weight& w, std::int64_t group, std::int64_t block, Vector16 total, float* out) {
    const std::int64_t row = w.first_row[group] + (block - w.first_block[group]) * ROWS;
    const int lanes = static_cast<int>(std::min<std::int64_t>(ROWS, w.first_row[group + 1] - row));
    if (w.places == nullptr) return store_some(out + row, total, lanes);
    alignas(64) float results[ROWS];
    store(results, total);
    for (int lane = 0; lane < lanes; ++lane) out[w.places[row + lane]] = results[lane];
}

// What the totals of some tokens and of two blocks that follow each other become, or those of a gate and its partner: most
// layers' may be written later, others are written here.
Unwritten write_rounded(const Prepared& p, std::int64_t token, int tokens, std::int64_t block, bool both,
                        const float (*totals)[ROUNDED_TOKENS][ROWS], bool bytes) {
    const lowbit_layer_description* const layer = p.product->layer;
    const std::int64_t row = block * p.height, stride = p.product->out_stride;
    if (const lowbit_column_weight* const w = p.product->by_columns; w != nullptr) {
        for (int k = 0; k < (both ? 2 : 1); ++k) {
            const std::int64_t group = group_of(*w, block + k);
            for (int t = 0; t < tokens; ++t) {
                write_rows(*w, group, block + k, load(totals[k][t]), p.product->out + (token + t) * stride);
            }
        }
        return {};
    }
    const bool plain = layer == nullptr || (layer->row_scale == nullptr && layer->bias == nullptr && !p.has_factors);
    const bool whole = row + (p.gated || !both ? 1 : 2) * ROWS <= p.rows();
    const bool silu = p.gated && static_cast<Activation>(layer->activation) == Activation::SILU;
    if (plain && whole && !bytes && p.layout.row_vectors == nullptr && (silu || !p.gated)) {
        return {totals, p.product->out + token * stride + row, stride, tokens, silu, both && !p.gated};
    }
    for (int t = 0; t < tokens; ++t) {
        const bool faulty = bytes && p.places((token + t) / p.tile_tokens).faulty[t % p.tile_tokens];
        const Vector16 nan = broadcast(std::numeric_limits<float>::quiet_NaN());
        const Vector16 one = faulty ? nan : load(totals[0][t]), other = faulty ? nan : load(totals[1][t]);
        write_result(p, token + t, block, one, other);
        if (!p.gated && both) write_result(p, token + t, block + 1, other, other);
    }
    return {};
}

// Panels, ``stride`` bytes from one to the next, of rows first <= row < last of a weight whose blocks have fewer than 16
// (vectors of 12 or 6 rows), so that all lanes count: blocks become panels in ``scratch``, and of each of their lines the
// 32 bits of a row go where it belongs. Blocks on a border of tasks are made twice.
void round_rows(const Prepared& p, std::int64_t first, std::int64_t last, std::uint8_t* scratch, std::uint8_t* panels,
                std::int64_t stride) {
    const std::int64_t height = p.layout.height, lines = panel_bytes(p) / ROW_LINE;
    for (std::int64_t block = first / height; block * height < last; ++block) {
        p.round(p.layout, p.product->weight->data + block * p.layout.block_bytes, p.decoding, scratch);
        const std::int64_t end = std::min(last, (block + 1) * height);
        for (std::int64_t row = std::max(first, block * height), count; row < end; row += count) {
            const std::int64_t lane = (row - first) % ROWS;
            count = std::min(ROWS - lane, end - row);
            const std::uint8_t* from = scratch + (row - block * height) * ROW_BYTES;
            std::uint8_t* to = panels + (row - first) / ROWS * stride + lane * ROW_BYTES;
            for (std::int64_t line = 0; line < lines; ++line, from += ROW_LINE, to += ROW_LINE) {
                std::memcpy(to, from, static_cast<std::size_t>(count * ROW_BYTES));
            }
        }
    }
}

void make_panel(const Prepared& p, std::int64_t block, std::uint8_t* panel) {
    const std::uint8_t* const at = p.product->weight->data + block * p.layout.block_bytes;
    if (p.round_columns == nullptr) return p.round(p.layout, at, p.decoding, panel);
    const lowbit_column_weight& w = *p.product->by_columns;
    p.round_columns(p.layout, at, p.decoding, static_cast<Scales>(w.kind), scales_of(w, p.layout, group_of(w, block)), panel);
}

// A task of a product with prompts' tokens: some blocks, and all tokens. What tokens meet at a time are panels of two
// blocks that a core's first cache holds, and for all blocks the x that its second does.
void run_rounded(const Prepared& p, std::int64_t task) {
    static thread_local std::vector<std::uint8_t> memory, waiting;
    const std::int64_t first = task * p.chunk, last = std::min(p.blocks, first + p.chunk), tokens = p.product->tokens;
    const std::int64_t lines = p.lines(), panel = panel_bytes(p), halves = p.gated ? 2 : 1;
    const std::int64_t blocks = (last - first) * halves;
    const auto block_number = [&](std::int64_t i) { return first + i / halves + i % halves * p.blocks; };
    const auto block_at = [&](std::int64_t i) { return p.product->weight->data + block_number(i) * p.layout.block_bytes; };
    const bool as_they_lie = p.layout.codes == Codes::bf16 && !WORD_PANELS, bytes = p.shape.whole();
    std::uint8_t* const panels = aligned(memory, as_they_lie ? 0 : (blocks + 1) * panel);
    if (p.layout.height != ROWS) {
        for (std::int64_t half = 0; half < halves; ++half) {
            const std::int64_t begin = half * p.rows(), end = begin + std::min(last * ROWS, p.rows());
            round_rows(p, begin + first * ROWS, end, panels + blocks * panel, panels + half * panel, halves * panel);
        }
    } else if (!as_they_lie) {
        for (std::int64_t i = 0; i < blocks; ++i) make_panel(p, block_number(i), panels + i * panel);
    }
    const std::int64_t pieces = (lines - 1) / MOST_PANEL_LINES + 1;
    // Whole spans of words' scales.
    const std::int64_t piece_lines = ((lines + pieces - 1) / pieces + WORD_PANEL_LINES - 1) / WORD_PANEL_LINES * WORD_PANEL_LINES;
    const std::int64_t together = pieces > 1 ? std::min(tokens, TOKENS_OF_PIECES) : tokens;
    using Sums = float[2][ROUNDED_TOKENS][ROWS];
    const std::int64_t tiles = (together + ROUNDED_TOKENS - 1) / ROUNDED_TOKENS;
    const std::int64_t sums_bytes = pieces > 1 ? (blocks + 1) / 2 * tiles * static_cast<std::int64_t>(sizeof(Sums)) : 0;
    auto* const sums = reinterpret_cast<Sums*>(aligned(waiting, sums_bytes));
    alignas(64) Sums own[2];
    int turn = 0;
    Unwritten unwritten;
    const auto multiply = [&](std::int64_t line, std::int64_t last_line, std::int64_t i, std::int64_t token, std::int64_t base) {
        const int count = static_cast<int>(std::min<std::int64_t>(ROUNDED_TOKENS, tokens - token));
        RoundedInput x{};
        Input input[2];
        for (int tile = 0; tile * p.tile_tokens < count; ++tile) {
            const InputPlaces places = p.places(token / p.tile_tokens + tile);
            x.line_bytes[tile] = places.tokens * p.line_bytes();
            x.tiles[tile] = places.values + line * x.line_bytes[tile];
            x.scales[tile] = p.word_panels() ? places.scales + line / WORD_PANEL_LINES * places.tokens : nullptr;
            x.tokens[tile] = places.tokens;
            input[tile] = {places.values, places.sums, places.scales, places.bases, places.tokens};
        }
        const int pair = static_cast<int>(std::min<std::int64_t>(2, blocks - i));
        const std::uint8_t* of[2] = {panels + i * panel, panels + (i + 1) * panel};
        for (int k = 0; k < pair && as_they_lie; ++k) of[k] = block_at(i + k);
        const std::int64_t before = line * p.line_bytes() * ROWS + (p.word_panels() ? line / WORD_PANEL_LINES * WORD_PANEL_SCALES : 0);
        for (const std::uint8_t*& at : of) at += before;
        Sums& totals = pieces > 1 ? sums[i / 2 * tiles + (token - base) / ROUNDED_TOKENS] : own[turn ^= 1];
        multiply_rounded(of, pair, bytes, x, count, last_line - line, line > 0, unwritten, totals);
        if (last_line < lines) return;
        for (int tile = 0; tile < 2 && p.scaled_after && input[tile].tokens != 0; ++tile) {
            for (int k = 0; k < pair; ++k) {
                scale_sums(p.layout, block_at(i + k), bytes, input[tile], totals[k] + tile * p.tile_tokens);
            }
        }
        unwritten = write_rounded(p, token, count, first + i / halves, pair > 1, totals, bytes);
    };
    for (std::int64_t base = 0; base < tokens; base += together) {
        const std::int64_t end = std::min(tokens, base + together);
        for (std::int64_t line = 0; line < lines; line += piece_lines) {
            const std::int64_t last_line = std::min(lines, line + piece_lines);
            if (p.bytes() <= CACHED_INPUT || pieces > 1) {
                for (std::int64_t i = 0; i < blocks; i += 2) {
                    for (std::int64_t token = base; token < end; token += ROUNDED_TOKENS) multiply(line, last_line, i, token, base);
                }
                continue;
            }
            for (std::int64_t token = base; token < end; token += ROUNDED_TOKENS) {
                for (std::int64_t i = 0; i < blocks; i += 2) multiply(line, last_line, i, token, base);
            }
        }
    }
    unwritten.write_all();
}

constexpr std::int64_t FEWEST_BLOCKS = 4;         // that x is laid out for, where a group has them

// A task of a weight with scales of columns: some blocks of a group times some tokens, whose x is laid out for them
// here: for all groups it would be as many times larger.
void run_columns(const Prepared& p, const lowbit_column_weight& w, std::int64_t group, std::int64_t first_block,
                 std::int64_t last_block, std::int64_t first_token, int tokens) {
    static thread_local std::vector<std::uint8_t> workspace;
    const InputPlaces places = p.places(aligned(workspace, p.bytes(tokens)), tokens, 0, tokens);
    alignas(64) float zero_sums[TOKEN_TILE];
    const float* x[TOKEN_TILE];
    for (int t = 0; t < tokens; ++t) x[t] = p.row(first_token + t);
    const ColumnRows rows{x, scales_of(w, p.layout, group), p.shape, places, zero_sums};
    lay_out_columns(static_cast<Scales>(w.kind), rows, p.layout.addend != Addend::none);
    const Input input{places.values, places.sums, places.scales, places.bases, places.tokens};
    alignas(64) Totals totals;
    const std::int64_t together = p.tiles != nullptr ? BLOCKS_TOGETHER : 1;
    int blocks = 1;
    for (std::int64_t block = first_block; block < last_block; block += blocks) {
        blocks = static_cast<int>(std::min(together, last_block - block));
        multiply_blocks(p, block, blocks, 0, input, nullptr, totals);
        for (int i = 0; i < blocks; ++i) {
            for (int t = 0; t < tokens; ++t) {
                Vector16 total = load(totals[place_of(p, input, i) + t]);
                if (w.zeros != nullptr) total = subtract(total, broadcast(zero_sums[t]));
                write_rows(w, group, block + i, total, p.product->out + (first_token + t) * p.product->out_stride);
            }
        }
    }
}

void multiply_columns(const Prepared& p) {
    const Product& product = *p.product;
    const lowbit_column_weight& w = *product.by_columns;
    std::int64_t together = TOKEN_TILE;
    while (together > TOKEN_TILE / 4 && together * p.layout.tiles * COLUMNS * 6 > CACHED_INPUT) together /= 2;
    const std::int64_t tiles = (product.tokens + together - 1) / together;
    const std::int64_t units = w.first_block[w.groups] * tiles;
    const std::int64_t chunk = std::min<std::int64_t>(
        w.most_blocks, std::max(FEWEST_BLOCKS, units / (8 * thread_count()) / BLOCKS_TOGETHER * BLOCKS_TOGETHER));
    const std::int64_t chunks = (w.most_blocks + chunk - 1) / chunk;
    const TilesReleased released;
    // All groups with some tokens, then with the next: of x and the weight x is the larger.
    parallel_ranges(tiles * w.groups * chunks, [&](std::int64_t task) {
        const std::int64_t tile = task / (w.groups * chunks), group = task / chunks % w.groups;
        const std::int64_t block = w.first_block[group] + task % chunks * chunk;
        const std::int64_t last = std::min<std::int64_t>(w.first_block[group + 1], block + chunk);
        if (block >= last) return;
        const std::int64_t first = tile * together;
        run_columns(p, w, group, block, last, first, static_cast<int>(std::min(together, product.tokens - first)));
    });
}

// The product whose range holds ``index``; ranges ascend.
template <std::int64_t Prepared::*FIRST>
const Prepared& holder(const std::vector<Prepared>& all, std::int64_t index) {
    std::size_t low = 0, high = all.size();
    while (high - low > 1) {
        const std::size_t middle = (low + high) / 2;
        (all[middle].*FIRST <= index ? low : high) = middle;
    }
    return all[low];
}

// The products of a call: their inputs are laid out first, then tasks of all of them run together.
struct Call {
    std::vector<Prepared> all;
    std::vector<std::uint8_t> workspace;
    std::vector<float> factors;
    std::int64_t bytes = 0;   // of inputs and looked-up products
    std::int64_t groups = 0;  // of LAID_TOGETHER tokens
    std::int64_t units = 0;   // blocks times token tiles
    std::int64_t tokens = 0, tasks = 0;

    // What each product needs; those with scales of columns are multiplied here, by themselves.
    void prepare(const Product* products, std::int64_t count) {
        all.clear();
        bytes = groups = units = tokens = tasks = 0;
        std::int64_t made = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            if (products[i].tokens == 0) continue;
            Prepared& p = all.emplace_back(products[i]);
            if (products[i].by_columns != nullptr && !p.in_panels()) {
                multiply_columns(p);
                all.pop_back();
                continue;
            }
            // A mixture's experts are many: what is beyond, multiplies.
            if (made + p.product_size > MOST_PRODUCTS) p.product_size = 0;
            made += p.product_size;
            p.first_tokens = groups;
            groups += (p.product->tokens + LAID_TOGETHER - 1) / LAID_TOGETHER;
            units += p.blocks * p.token_tiles;
            tokens += p.product->tokens;
            bytes += (p.bytes() + 63) / 64 * 64 + p.product_size + p.unrounded_size;
        }
    }

    // Where each has its input, and which tasks are its own: enough to share evenly, each long enough to be worth
    // claiming.
    void place() {
        auto* at = aligned(workspace, bytes);
        if (factors.size() < static_cast<std::size_t>(2 * tokens)) factors.resize(static_cast<std::size_t>(2 * tokens));
        float* factor = factors.data();
        std::int64_t together = std::max<std::int64_t>(1, units / (8 * thread_count()));
        if (together > BLOCKS_TOGETHER) together -= together % BLOCKS_TOGETHER;
        for (Prepared& p : all) {
            p.at = at;
            at += (p.bytes() + 63) / 64 * 64;
            p.products = at;
            at += p.product_size;
            p.unrounded = reinterpret_cast<float*>(at);
            at += p.unrounded_size;
            p.factors = factor;
            p.offsets = factor + p.product->tokens;
            factor += 2 * p.product->tokens;
            p.chunk = p.in_panels() ? rounded_blocks(p) : std::min(together, p.blocks);
            if (p.product_size != 0) p.chunk = (p.chunk + LOOKED_UP_TOGETHER - 1) / LOOKED_UP_TOGETHER * LOOKED_UP_TOGETHER;
            p.chunks = (p.blocks + p.chunk - 1) / p.chunk;
            p.first_task = tasks;
            tasks += p.chunks * (p.in_panels() ? 1 : p.token_tiles);
        }
    }

    void lay_out() const {
        if (tokens < LAID_TOGETHER) {
            for (const Prepared& p : all) lay_out_tokens(p, 0, p.product->tokens);
            return;
        }
        parallel_for(groups, [this](std::int64_t task) {
            const Prepared& p = holder<&Prepared::first_tokens>(all, task);
            const std::int64_t first = (task - p.first_tokens) * LAID_TOGETHER;
            lay_out_tokens(p, first, std::min(p.product->tokens, first + LAID_TOGETHER));
        });
    }

    // Those that rows look up, where they do.
    void make_products() const {
        for (const Prepared& p : all) {
            if (p.product_size == 0) continue;
            const std::int64_t pieces = std::min<std::int64_t>(p.layout.tiles, thread_count() > 1 ? 2 * thread_count() : 1);
            const InputPlaces places = p.places(0);
            const Input input{places.values, places.sums, places.scales, places.bases, places.tokens};
            parallel_for(pieces, [&](std::int64_t piece) {
                lowbit::make_products(p.layout, p.decoding, input, p.layout.tiles * piece / pieces,
                                      p.layout.tiles * (piece + 1) / pieces, p.products);
            });
        }
    }
};

}  // namespace

std::int64_t always_ahead_here() {
#if defined(__AVX512BF16__)
    return amd_family() >= ZEN5 ? 8192 : 0;
#else
    return always_ahead();
#endif
}

void multiply(const Product* products, std::int64_t count) {
    static thread_local Call call;  // a calling thread's own, grown and kept: tasks must see it by reference
    call.prepare(products, count);
    if (call.all.empty()) return;
    call.place();
    call.lay_out();
    call.make_products();
    const TilesReleased released;
    parallel_ranges(call.tasks, [&call = call](std::int64_t task) {
        const Prepared& p = holder<&Prepared::first_task>(call.all, task);
        (p.in_panels() ? run_rounded : run_task)(p, task - p.first_task);
    });
}

}  // namespace lowbit

// Rows from ``prompts`` on are prompts'.
static int multiply_one(lowbit::Product product, std::int64_t prompts) {
    lowbit::Product products[2] = {product, product};
    prompts = std::min(prompts, product.tokens);
    products[0].tokens = prompts;
    products[1].tokens -= prompts;
    products[1].x += prompts * product.x_stride;
    products[1].out += prompts * product.out_stride;
    products[1].prompts = true;
    try {
        lowbit::multiply(products, 2);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// x (tokens, columns) with x_stride floats from row to row -> out (tokens, weight->rows). Rows from ``prompts`` on are of
// prompts' tokens, for which AMX may round the weight to bfloat16. Returns 0, or 1 where memory ran out.
LOWBIT_EXPORT int lowbit_linear(const lowbit_weight* weight, const float* x, std::int64_t tokens,
                                std::int64_t x_stride, std::int64_t columns, float* out, std::int64_t out_stride,
                                std::int64_t prompts) {
    return multiply_one({weight, x, x_stride, columns, nullptr, tokens, out, out_stride}, prompts);
}

// The same of a weight whose groups of rows have scales of their own for x's columns.
LOWBIT_EXPORT int lowbit_linear_columns(const lowbit_column_weight* weight, const float* x, std::int64_t tokens,
                                        std::int64_t x_stride, float* out, std::int64_t out_stride, std::int64_t prompts) {
    return multiply_one({weight->weight, x, x_stride, weight->columns, nullptr, tokens, out, out_stride, nullptr, weight},
                        prompts);
}

// The same as lowbit_linear with what a layer does before and behind: out (tokens, weight->rows), half as wide where it is
// gated. ``columns`` are at most MOST_LAYER_COLUMNS; a gated weight has a multiple of 32 rows.
LOWBIT_EXPORT int lowbit_layer(const lowbit_layer_description* layer, const float* x, std::int64_t tokens,
                               std::int64_t x_stride, std::int64_t columns, float* out, std::int64_t out_stride,
                               std::int64_t prompts) {
    return multiply_one({layer->weight, x, x_stride, columns, nullptr, tokens, out, out_stride, layer}, prompts);
}

// Whether a weight can meet x as ``kind`` (enum InputKind): 1 or 0.
LOWBIT_EXPORT int lowbit_linear_takes(const lowbit_weight* weight, std::int32_t kind) {
    using namespace lowbit;
    if (static_cast<InputKind>(kind) == InputKind::bfloat) return 1;
    const Layout layout(*weight);
    if (static_cast<InputKind>(kind) == InputKind::floats) return float_function(layout) != nullptr;
    if (static_cast<InputKind>(kind) == InputKind::words) {
        return word_function(layout, WordCodes(*weight)) != nullptr;
    }
    if (static_cast<InputKind>(kind) == InputKind::scaled) {
        const bool groups = weight->input_group == 16 ? layout.sub == 16 : weight->input_group > 0 && weight->input_group % COLUMNS == 0;
        return groups && takes_scaled(layout);
    }
    const ByteCodes codes(*weight);
    const bool moved = MOVES_SIGNS && byte_base_shift(layout.codes, codes) != 0;
    if (static_cast<InputKind>(kind) == InputKind::codes && moved) return 0;
    return meets_bytes(layout, codes);
}
