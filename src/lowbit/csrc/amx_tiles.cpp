#include "amx_tiles.h"

#if defined(LOWBIT_AMX)

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace lowbit {
namespace {

constexpr int TILES = 8;

// What LDTILECFG reads.
struct alignas(64) TileConfig {
    std::uint8_t palette = 0;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t line[16] = {};  // bytes of a row
    std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

thread_local int configured_rows = 0;

void load_config(const TileConfig& config);
void unload_config();

}  // namespace

void configure_tiles(int rows) {
    if (rows == configured_rows) return;
    TileConfig config;
    config.palette = 1;
    for (int tile = 0; tile < TILES; ++tile) {
        config.line[tile] = TILE_LINE;
        config.rows[tile] = static_cast<std::uint8_t>(tile < 6 ? rows : TILE_ROWS);
    }
    load_config(config);
    configured_rows = rows;
}

int configured_tiles() { return configured_rows; }

void release_tiles() {
    if (configured_rows == 0) return;
    unload_config();
    configured_rows = 0;
}

#if !defined(LOWBIT_EMULATE_AMX)

namespace {

// The whole struct is an operand; GCC 12's own intrinsic names its first 8 bytes alone, and the rest is not stored.
void load_config(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
void unload_config() { asm volatile("tilerelease"); }

}  // namespace

#else

namespace {

struct Tile {
    std::uint8_t bytes[TILE_ROWS][TILE_LINE];
};

struct State {
    TileConfig config;
    Tile tiles[TILES];
};

thread_local State state;

void need(bool good, const char* instruction, const char* what) {
    if (good) return;
    std::fprintf(stderr, "lowbit: emulated %s would fault: %s\n", instruction, what);
    std::abort();
}

void load_config(const TileConfig& config) {
    need(config.palette == 1, "ldtilecfg", "the palette is not 1");
    for (const std::uint8_t byte : config.reserved) need(byte == 0, "ldtilecfg", "a reserved byte is set");
    for (int tile = 0; tile < 16; ++tile) {
        const bool used = tile < TILES;
        const int rows = config.rows[tile], line = config.line[tile];
        need(used ? rows <= TILE_ROWS && line <= TILE_LINE && (rows == 0) == (line == 0) : rows == 0 && line == 0,
             "ldtilecfg", "a tile has more than 16 rows or 64 bytes a row, or only one of them");
    }
    state.config = config;
    std::memset(state.tiles, 0, sizeof state.tiles);
}

void unload_config() { state = State{}; }

int rows_of(int tile) { return state.config.rows[tile]; }
int line_of(int tile) { return state.config.line[tile]; }

void need_tile(int tile, const char* instruction) {
    need(state.config.palette == 1, instruction, "no configuration is loaded");
    need(tile >= 0 && tile < TILES && rows_of(tile) > 0, instruction, "the tile is not configured");
}

void need_product(int c, int a, int b, const char* instruction) {
    for (const int tile : {c, a, b}) need_tile(tile, instruction);
    need(c != a && a != b && c != b, instruction, "two operands are the same tile");
    need(rows_of(c) == rows_of(a), instruction, "C and A have unlike rows");
    need(line_of(c) == line_of(b), instruction, "C and B have unlike lines");
    need(line_of(a) / 4 == rows_of(b), instruction, "A's lines are no B's rows");
    need(line_of(a) % 4 == 0 && line_of(b) % 4 == 0, instruction, "lines of broken elements");
}

template <typename Element>
Element read(const Tile& tile, int row, int index) {
    Element element;
    std::memcpy(&element, tile.bytes[row] + index * static_cast<int>(sizeof element), sizeof element);
    return element;
}

// Subnormal numbers count as zeros, in operands and results.
float flushed(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

float widened(std::uint16_t bfloat) {
    const std::uint32_t bits = static_cast<std::uint32_t>(bfloat) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return flushed(x);
}

// Every write clears the rest of the register.
void write(int tile, const Tile& from) { state.tiles[tile] = from; }

}  // namespace

namespace emulated {

void zero(int tile) {
    need_tile(tile, "tilezero");
    write(tile, Tile{});
}

void load(int tile, const void* from, long stride) {
    need_tile(tile, "tileloadd");
    Tile made{};
    for (int row = 0; row < rows_of(tile); ++row) {
        std::memcpy(made.bytes[row], static_cast<const std::uint8_t*>(from) + row * stride,
                    static_cast<std::size_t>(line_of(tile)));
    }
    write(tile, made);
}

void store(int tile, void* to, long stride) {
    need_tile(tile, "tilestored");
    for (int row = 0; row < rows_of(tile); ++row) {
        std::memcpy(static_cast<std::uint8_t*>(to) + row * stride, state.tiles[tile].bytes[row],
                    static_cast<std::size_t>(line_of(tile)));
    }
}

// Even and odd columns are summed apart, each in ascending order, then together, then added to C.
void dot_bfloats(int c, int a, int b) {
    need_product(c, a, b, "tdpbf16ps");
    constexpr int LANES = TILE_LINE / 4;
    const int depth = line_of(a) / 4, width = line_of(c) / 4;
    // B once as floats, zeros where it has no lane.
    float even_b[TILE_ROWS][LANES] = {}, odd_b[TILE_ROWS][LANES] = {};
    for (int k = 0; k < depth; ++k) {
        for (int n = 0; n < width; ++n) {
            even_b[k][n] = widened(read<std::uint16_t>(state.tiles[b], k, 2 * n));
            odd_b[k][n] = widened(read<std::uint16_t>(state.tiles[b], k, 2 * n + 1));
        }
    }
    Tile made{};
    for (int m = 0; m < rows_of(c); ++m) {
        float even[LANES] = {}, odd[LANES] = {}, sums[LANES];
        for (int k = 0; k < depth; ++k) {
            const float even_a = widened(read<std::uint16_t>(state.tiles[a], m, 2 * k));
            const float odd_a = widened(read<std::uint16_t>(state.tiles[a], m, 2 * k + 1));
            for (int n = 0; n < LANES; ++n) even[n] = flushed(__builtin_fmaf(even_a, even_b[k][n], even[n]));
            for (int n = 0; n < LANES; ++n) odd[n] = flushed(__builtin_fmaf(odd_a, odd_b[k][n], odd[n]));
        }
        std::memcpy(sums, state.tiles[c].bytes[m], sizeof sums);
        for (int n = 0; n < LANES; ++n) sums[n] = flushed(flushed(sums[n]) + flushed(even[n] + odd[n]));
        std::memcpy(made.bytes[m], sums, static_cast<std::size_t>(line_of(c)));
    }
    write(c, made);
}

// Sums wrap around.
void dot_bytes(int c, int a, int b) {
    need_product(c, a, b, "tdpbsud");
    constexpr int LANES = TILE_LINE / 4;
    const int depth = line_of(a) / 4, width = line_of(c) / 4;
    int wide_b[4 * TILE_ROWS][LANES] = {};
    for (int k = 0; k < 4 * depth; ++k) {
        for (int n = 0; n < width; ++n) wide_b[k][n] = read<std::uint8_t>(state.tiles[b], k / 4, 4 * n + k % 4);
    }
    Tile made{};
    for (int m = 0; m < rows_of(c); ++m) {
        std::uint32_t sums[LANES] = {};
        std::memcpy(sums, state.tiles[c].bytes[m], static_cast<std::size_t>(line_of(c)));
        for (int k = 0; k < 4 * depth; ++k) {
            const int wide_a = read<std::int8_t>(state.tiles[a], m, k);
            for (int n = 0; n < LANES; ++n) sums[n] += static_cast<std::uint32_t>(wide_a * wide_b[k][n]);
        }
        std::memcpy(made.bytes[m], sums, static_cast<std::size_t>(line_of(c)));
    }
    write(c, made);
}

}  // namespace emulated

#endif

}  // namespace lowbit

#endif
