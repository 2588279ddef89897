// Linear layers on packed weights: y = x W^T for one token or a thousand, one routine for all of them.
//
// A task is a few blocks of 16 output rows and up to TOKEN_TILE tokens. It walks its tiles once, front to back (one
// sequential stream of weights), decodes each tile and multiplies it with every token; totals stay in L1.
// x is first rounded to what the kernel multiplies (linear_input.h).

#include "linear_products.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "amx_tiles.h"
#include "linear_kernels.h"
#include "quantize_row.h"
#include "lowbit.h"
#include "operations.h"
#include "thread_pool.h"

namespace lowbit {
namespace {

// A product with what its kernel needs, and where its input lies in the workspace.
struct Prepared {
    explicit Prepared(const Product& from) : product(&from), layout(*from.weight), decoding(*from.weight) {
        shape.tiles = layout.tiles;
        shape.columns = from.columns;
        shape.span = summed_columns(layout);
        shape.element = is_float(layout.codes) ? 4 : 2;
        shape.numbers = is_grid(layout.codes) ? grid_of(layout.codes).numbers : 0;
        const auto kind = static_cast<InputKind>(from.weight->input);
        if (is_words(layout.codes)) {
            function = word_function(layout);
            shape.kind = InputKind::words;
            scaled = true;
        } else if (kind == InputKind::floats && float_function(layout) != nullptr) {
            function = float_function(layout);
            shape.element = 4;
        } else if (kind == InputKind::scaled && scaled_function(layout) != nullptr) {
            function = scaled_function(layout);
            shape.kind = kind;
            shape.span = layout.sub;
            scaled = true;
        } else if (kind != InputKind::bfloat && kind != InputKind::floats && meets_bytes(layout, decoding.bytes)) {
            // Whole numbers that come as such are summed over wide groups; a factor needs a scale to go into.
            const bool wide = layout.unit == from.weight->group && layout.unit >= 2 * COLUMNS &&
                              layout.unit % BYTE_COLUMNS == 0 && layout.unit <= LARGEST_GROUP &&
                              layout.super_bytes == 0 && decoding.bytes.factor == 1.0f;
            const bool grouped = kind == InputKind::groups || !wide;
            tiles = byte_tiles(layout, decoding.bytes, grouped);
            function = byte_function(layout, decoding.bytes, grouped);
            shape.kind = kind;
            shape.element = 1;
            shape.span = grouped ? layout.sub : layout.unit;
            shape.scaled_sums = layout.addend == Addend::offset;
            shape.base = decoding.bytes.base + byte_base_shift(layout.codes, decoding.bytes);
            shape.factor = decoding.bytes.factor;
            scaled = grouped;
        } else {
            tiles = exact_tiles(layout);
            function = exact_function(layout);
        }
        token_tiles = (from.tokens + TOKEN_TILE - 1) / TOKEN_TILE;
    }

    const float* row(std::int64_t token) const {
        const std::int64_t from = product->x_rows == nullptr ? token : product->x_rows[token];
        return product->x + from * product->x_stride;
    }
    int tokens_of(std::int64_t tile) const {
        return static_cast<int>(std::min<std::int64_t>(TOKEN_TILE, product->tokens - tile * TOKEN_TILE));
    }
    std::int64_t bytes() const {
        const std::int64_t numbers = shape.spans() * (shape.whole() ? 2 : 1) + (scaled ? shape.scales() : 0);
        return product->tokens * (shape.value_bytes() + numbers * static_cast<std::int64_t>(sizeof(float)) + 1);
    }
    // Where token tile ``tile`` lies: values, sums, bases, scales, faults.
    InputPlaces places(std::int64_t tile) const {
        const std::int64_t tokens = product->tokens, first = tile * TOKEN_TILE;
        std::uint8_t* const numbers = at + tokens * shape.value_bytes();
        auto* const sums = reinterpret_cast<float*>(numbers);
        auto* const bases = reinterpret_cast<std::int32_t*>(sums + tokens * shape.spans());
        auto* const scales = reinterpret_cast<float*>(bases + (shape.whole() ? tokens * shape.spans() : 0));
        auto* const faulty = reinterpret_cast<std::uint8_t*>(scales + (scaled ? tokens * shape.scales() : 0));
        return {at + first * shape.value_bytes(), sums + first * shape.spans(),
                scaled ? scales + first * shape.scales() : nullptr, bases + first * shape.spans(), faulty + first,
                tokens_of(tile)};
    }

    const Product* product;
    Layout layout;
    Decoding decoding;
    BlocksFunction tiles = nullptr;  // if not, ``function``
    BlockFunction function = nullptr;
    InputShape shape;
    bool scaled = false;
    std::int64_t token_tiles = 0;
    std::int64_t first_tokens = 0;  // groups of LAID_TOGETHER tokens of the products before
    std::int64_t chunk = 1, chunks = 1, first_task = 0;
    std::uint8_t* at = nullptr;
};

constexpr std::int64_t LAID_TOGETHER = 8;  // tokens of a task

void lay_out_tokens(const Prepared& p, std::int64_t first, std::int64_t last) {
    static thread_local std::vector<float> codes, scales;
    if (p.shape.kind == InputKind::scaled) {
        const lowbit_weight& weight = *p.product->weight;
        codes.resize(static_cast<std::size_t>(p.shape.columns));
        scales.resize(static_cast<std::size_t>((p.shape.columns + weight.input_group - 1) / weight.input_group));
        for (std::int64_t token = first; token < last; ++token) {
            const std::int64_t tile = token / TOKEN_TILE;
            const int place = static_cast<int>(token - tile * TOKEN_TILE);
            quantize_row(*weight.quantizer, p.row(token), p.shape.columns, codes.data(), scales.data());
            lay_out(codes.data(), p.shape, p.places(tile), place);
            lay_out_scales(scales.data(), weight.input_group, p.shape, p.places(tile), place);
        }
        return;
    }
    for (std::int64_t token = first; token < last; ++token) {
        const std::int64_t tile = token / TOKEN_TILE;
        lay_out(p.row(token), p.shape, p.places(tile), static_cast<int>(token - tile * TOKEN_TILE));
    }
}

void run_task(const Prepared& p, std::int64_t task) {
    const std::int64_t tile = task / p.chunks;
    const InputPlaces places = p.places(tile);
    const Input input{places.values, places.sums, places.scales, places.bases, places.tokens};
    const lowbit_weight& weight = *p.product->weight;
    const std::int64_t last = std::min(p.layout.blocks, (task % p.chunks + 1) * p.chunk);
    const auto write = [&](std::int64_t block, const float(*totals)[ROWS]) {
        const int rows = static_cast<int>(std::min<std::int64_t>(ROWS, weight.rows - block * ROWS));
        for (int token = 0; token < input.tokens; ++token) {
            float* const to = p.product->out + (tile * TOKEN_TILE + token) * p.product->out_stride + block * ROWS;
            const bool faulty = p.shape.whole() && places.faulty[token];  // whole numbers cannot say it
            const Sixteen total =
                faulty ? sixteen_set(std::numeric_limits<float>::quiet_NaN()) : sixteen_load(totals[token]);
            if (rows == ROWS) {
                sixteen_store(to, total);
            } else {
                sixteen_store_some(to, total, rows);
            }
        }
    };
    int blocks = 1;
    for (std::int64_t block = task % p.chunks * p.chunk; block < last; block += blocks) {
        if (p.tiles != nullptr) blocks = static_cast<int>(std::min<std::int64_t>(BLOCKS_TOGETHER, last - block));
        alignas(64) float totals[BLOCKS_TOGETHER][TOKEN_TILE][ROWS];
        for (int i = 0; i < blocks; ++i) {
            std::memset(totals[i], 0, static_cast<std::size_t>(input.tokens) * sizeof totals[i][0]);
        }
        const std::uint8_t* const first = weight.data + block * p.layout.block_bytes;
        if (p.tiles != nullptr) {
            p.tiles(p.layout, first, blocks, p.decoding, input, totals);
        } else {
            p.function(p.layout, first, p.decoding, input, totals[0]);
        }
        for (int i = 0; i < blocks; ++i) write(block + i, totals[i]);
    }
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

}  // namespace

void multiply(const Product* products, std::int64_t count) {
    // A calling thread's own, grown and kept.
    static thread_local std::vector<Prepared> all;
    static thread_local std::vector<std::uint8_t> workspace;
    all.clear();
    std::int64_t bytes = 0, groups = 0, units = 0, tokens = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        if (products[i].tokens == 0) continue;
        Prepared& p = all.emplace_back(products[i]);
        p.first_tokens = groups;
        groups += (p.product->tokens + LAID_TOGETHER - 1) / LAID_TOGETHER;
        units += p.layout.blocks * p.token_tiles;
        tokens += p.product->tokens;
        bytes += (p.bytes() + 63) / 64 * 64;
    }
    if (all.empty()) return;
    const auto needed = static_cast<std::size_t>(bytes + 64 + READ_PAST);
    if (workspace.size() < needed) {
        workspace.clear();  // nothing to copy
        workspace.resize(needed);
    }
    auto* at = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(workspace.data()) + 63) / 64 * 64);
    // Enough tasks to share evenly, each long enough to be worth claiming.
    std::int64_t together = std::max<std::int64_t>(1, units / (8 * thread_count()));
    if (together > BLOCKS_TOGETHER) together -= together % BLOCKS_TOGETHER;
    std::int64_t tasks = 0;
    for (Prepared& p : all) {
        p.at = at;
        at += (p.bytes() + 63) / 64 * 64;
        p.chunk = std::min(together, p.layout.blocks);
        p.chunks = (p.layout.blocks + p.chunk - 1) / p.chunk;
        p.first_task = tasks;
        tasks += p.chunks * p.token_tiles;
    }
    if (tokens < LAID_TOGETHER) {
        for (const Prepared& p : all) lay_out_tokens(p, 0, p.product->tokens);
    } else {
        const std::vector<Prepared>& shared = all;  // thread_local: tasks must see the caller's
        parallel_for(groups, [&](std::int64_t task) {
            const Prepared& p = holder<&Prepared::first_tokens>(shared, task);
            const std::int64_t first = (task - p.first_tokens) * LAID_TOGETHER;
            lay_out_tokens(p, first, std::min(p.product->tokens, first + LAID_TOGETHER));
        });
    }
    const std::vector<Prepared>& shared = all;
    parallel_ranges(tasks, [&](std::int64_t task) {
        const Prepared& p = holder<&Prepared::first_task>(shared, task);
        run_task(p, task - p.first_task);
    });
    release_tiles();
}

}  // namespace lowbit

// x (tokens, columns) with x_stride floats from row to row -> out (tokens, weight->rows). Returns 0, or 1
// where memory ran out.
LOWBIT_EXPORT int lowbit_linear(const lowbit_weight* weight, const float* x, std::int64_t tokens,
                                std::int64_t x_stride, std::int64_t columns, float* out, std::int64_t out_stride) {
    const lowbit::Product product{weight, x, x_stride, columns, nullptr, tokens, out, out_stride};
    try {
        lowbit::multiply(&product, 1);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// Whether a weight can meet x as ``kind`` (enum InputKind): 1 or 0.
LOWBIT_EXPORT int lowbit_linear_takes(const lowbit_weight* weight, std::int32_t kind) {
    using namespace lowbit;
    if (static_cast<InputKind>(kind) == InputKind::bfloat) return 1;
    const Layout layout(*weight);
    if (static_cast<InputKind>(kind) == InputKind::floats) return float_function(layout) != nullptr;
    if (static_cast<InputKind>(kind) == InputKind::words) return is_words(layout.codes);
    if (static_cast<InputKind>(kind) == InputKind::scaled) {
        const bool groups = weight->input_group == 16 ? layout.sub == 16 : weight->input_group > 0 && weight->input_group % COLUMNS == 0;
        return groups && scaled_function(layout) != nullptr;
    }
    const ByteCodes codes(*weight);
    const bool moved = MOVES_SIGNS && byte_base_shift(layout.codes, codes) != 0;
    if (static_cast<InputKind>(kind) == InputKind::codes && moved) return 0;
    return meets_bytes(layout, codes);
}
