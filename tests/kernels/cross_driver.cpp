// The functions of one native library on made-up inputs, for test_cross_build.py: the same program is built for two
// processors, and what their libraries give is compared.
//
//   cross_driver LIBRARY RESULTS
//
// RESULTS gets, for each result: its name and a newline, 'f' (float32) or 'b' (bytes), the count (int64), the numbers.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "attention_cache.h"
#include "linear_layout.h"
#include "operations.h"

using namespace lowbit;

// As their sources have them.
struct lowbit_attention_batch {
    const std::int32_t* query_lengths;
    const std::int32_t* context_lengths;
    const std::int32_t* page_table;
    std::int64_t table_stride;
    std::int32_t sequences, tokens;
};
struct lowbit_head_products {
    const float* x;
    std::int64_t x_token, x_head;
    const void* weights;
    float* y;
    std::int64_t y_token, y_head;
    std::int64_t tokens;
    std::int32_t heads, inputs, outputs, bfloat;
};
struct lowbit_code_format {
    const float* thresholds;
    const std::uint8_t* codes;
    std::int32_t kind, count;
    float low, high;
};

namespace {

using Floats = std::vector<float>;
using Octets = std::vector<std::uint8_t>;

void* library;
std::FILE* results;

// A function of the library by its name.
template <class Function>
Function* find(Function*, const char* name) {
    void* const found = dlsym(library, name);
    if (found == nullptr) {
        std::fprintf(stderr, "no %s\n", name);
        std::exit(1);
    }
    return reinterpret_cast<Function*>(found);
}
#define CALL(NAME) find(static_cast<decltype(&NAME)>(nullptr), #NAME)

std::uint64_t seed = 1;
std::uint32_t random_bits() {  // Knuth's MMIX generator
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(seed >> 33);
}
float random_float() { return static_cast<float>(random_bits() >> 8) * 0x1p-22f - 1.0f; }  // -1 to 1

// Of several sizes; with one of every 53 numbers zero, or, ``odd``, something that is not quite a number.
Floats numbers(std::int64_t count, float size, bool odd = false) {
    constexpr float INF = std::numeric_limits<float>::infinity(), NOT = std::numeric_limits<float>::quiet_NaN();
    const float unusual[] = {0.0f, -0.0f, INF, -INF, NOT, 1e-40f, -3e38f, 1e-20f};
    Floats all(static_cast<std::size_t>(count));
    for (float& number : all) {
        number = random_float() * size * (random_bits() % 16 == 0 ? 8.0f : 1.0f);
        if (random_bits() % 53 == 0) number = odd ? unusual[random_bits() % 8] : 0.0f;
    }
    return all;
}
Octets octets(std::int64_t count, int values) {
    Octets all(static_cast<std::size_t>(count));
    for (std::uint8_t& octet : all) octet = static_cast<std::uint8_t>(random_bits() % static_cast<unsigned>(values));
    return all;
}

void put(const std::string& name, char kind, std::int64_t count, const void* data) {
    std::fprintf(results, "%s\n%c", name.c_str(), kind);
    std::fwrite(&count, sizeof count, 1, results);
    std::fwrite(data, kind == 'f' ? 4 : 1, static_cast<std::size_t>(count), results);
}
void put(const std::string& name, const Floats& x) { put(name, 'f', static_cast<std::int64_t>(x.size()), x.data()); }
void put(const std::string& name, const Octets& x) { put(name, 'b', static_cast<std::int64_t>(x.size()), x.data()); }

// `count` numbers of a kind of scale, of about ``size``.
Octets scale_bytes(std::int64_t count, Scales kind, float size) {
    Octets bytes;
    for (std::int64_t i = 0; i < count; ++i) {
        const float value = size * (1.5f + random_float());
        const std::uint16_t half = kind == Scales::f16 ? float_to_half(value) : float_to_bfloat(value);
        const auto* from = reinterpret_cast<const std::uint8_t*>(&half);
        std::size_t length = 2;
        const auto octet = static_cast<std::uint8_t>(kind == Scales::e4m3 ? 0x20 + random_bits() % 0x30 : random_bits());
        if (kind == Scales::f32) from = reinterpret_cast<const std::uint8_t*>(&value), length = 4;
        if (kind == Scales::two_level || kind >= Scales::e4m3) from = &octet, length = 1;
        bytes.insert(bytes.end(), from, from + length);
    }
    return bytes;
}

using LinearBytes = std::int64_t(const lowbit_weight*);
using LinearPack = void(const lowbit_weight*, std::int64_t, const std::uint8_t*, const std::uint8_t*, const std::uint8_t*,
                        const std::uint8_t*, const std::uint8_t*, std::uint8_t*);
using LinearTakes = int(const lowbit_weight*, std::int32_t);

struct Case {
    Codes codes;
    int group;
    Scales scales;
    Addend addend;
    int table;  // 0: whole numbers in a line, 1: other whole numbers, 2: any
    bool outliers = false;
};

// A weight's rows in two groups, of 24 and 8 rows that lie apart, with scales and zero points of x's columns.
void by_columns(const lowbit_weight& weight, const Floats& rows, const Floats& x, std::int64_t columns, const std::string& name) {
    constexpr std::int32_t COUNT = 32;
    const std::int32_t first_row[] = {0, 24, COUNT}, first_block[] = {0, 2, 3};
    std::int32_t places[COUNT];
    for (std::int32_t i = 0; i < COUNT; ++i) places[i] = (i * 7 + 3) % COUNT;
    const Floats scales = numbers(2 * weight.columns, 0.5f), zeros = numbers(2 * weight.columns, 3.0f);
    const lowbit_column_weight described{&weight, scales.data(), zeros.data(), first_row, first_block, places, 2, columns,
                                         static_cast<std::int32_t>(Scales::f32), 2};
    for (const std::int64_t tokens : {1, 2, 9}) {
        Floats out(static_cast<std::size_t>(tokens * COUNT));
        if (CALL(lowbit_linear_columns)(&described, x.data(), tokens, columns, out.data(), COUNT) != 0) std::exit(1);
        const std::string result = name + " columns tokens " + std::to_string(tokens);
        put(result, out);
        for (std::int64_t token = 0; token < tokens; ++token) {
            for (std::int32_t i = 0; i < COUNT; ++i) {
                const int group = i < 24 ? 0 : 1;
                const std::int64_t packed = group == 0 ? i : i + 8;
                double size = 0;
                for (std::int64_t j = 0; j < columns; ++j) {
                    const auto at = static_cast<std::size_t>(group * weight.columns + j);
                    const double scaled = static_cast<double>(x[static_cast<std::size_t>(token * columns + j)]) * scales[at];
                    size += std::fabs(scaled) * (std::fabs(rows[static_cast<std::size_t>(packed * columns + j)]) + std::fabs(zeros[at]));
                }
                out[static_cast<std::size_t>(token * COUNT + places[i])] = static_cast<float>(size);
            }
        }
        put(result + " size", out);
    }
}

constexpr std::int64_t ROWS_OUT = 40, MANY = 9;

// All rows, and products with every kind of input that the library takes.
void multiply(lowbit_weight& weight, std::int64_t columns, const char* name) {
    std::int32_t ids[ROWS_OUT];
    for (std::int32_t row = 0; row < ROWS_OUT; ++row) ids[row] = row;
    Floats rows(static_cast<std::size_t>(ROWS_OUT * columns));
    CALL(lowbit_linear_rows)(&weight, columns, ids, 0, ROWS_OUT, nullptr, nullptr, rows.data());
    put(std::string(name) + " rows", rows);
    const std::uint64_t before = seed;
    for (std::int32_t kind = 0; kind < 4; ++kind) {
        if (find(static_cast<LinearTakes*>(nullptr), "lowbit_linear_takes")(&weight, kind) == 0) continue;
        weight.input = kind;
        seed = static_cast<std::uint64_t>(kind);  // not every library takes every kind
        Floats x = numbers(MANY * columns, 1.0f);
        if (static_cast<InputKind>(kind) == InputKind::codes) {
            for (float& number : x) number = std::nearbyint(std::min(std::max(number, -1.0f), 1.0f) * 127.0f);
        }
        x[static_cast<std::size_t>(8 * columns + 5)] = std::numeric_limits<float>::quiet_NaN();
        for (const std::int64_t tokens : {1, 2, 3, 9}) {
            Floats out(static_cast<std::size_t>(tokens * ROWS_OUT));
            CALL(lowbit_linear)(&weight, x.data(), tokens, columns, columns, out.data(), ROWS_OUT, tokens);
            const std::string result = std::string(name) + " input " + std::to_string(kind) + " tokens " + std::to_string(tokens);
            put(result, out);
            if (kind != 0) continue;
            for (std::size_t i = 0; i < out.size(); ++i) {  // |x| |w|^T
                const float* const token = x.data() + static_cast<std::int64_t>(i) / ROWS_OUT * columns;
                const float* const row = rows.data() + static_cast<std::int64_t>(i) % ROWS_OUT * columns;
                double size = 0;
                for (std::int64_t j = 0; j < columns; ++j) size += std::fabs(static_cast<double>(token[j]) * static_cast<double>(row[j]));
                out[i] = static_cast<float>(size);
            }
            put(result + " size", out);
        }
        const auto codes = static_cast<Codes>(weight.codes);
        const bool coded = is_vectors(codes) || is_trellis(codes) || weight.row_vectors != nullptr;
        if (kind == 0 && !coded && weight.outlier_starts == nullptr) by_columns(weight, rows, x, columns, name);
    }
    seed = before;
}

void linear(const Case& c) {
    const bool two_levels = c.scales == Scales::two_level || c.scales >= Scales::nibbles;
    const std::int64_t columns = two_levels ? 512 : c.group > 32 ? 2 * c.group : 150;
    const std::int64_t padded = (columns + 31) / 32 * 32, groups = padded / c.group;
    struct {
        alignas(64) std::uint16_t values[64];
        std::uint8_t grid[2 * 2048];  // or bits7's values
    } stored;
    std::uint16_t* const table = stored.values;
    const bool eights = is_grid(c.codes) && grid_of(c.codes).numbers == 8;
    const int entries = c.codes <= Codes::bits6 ? 1 << static_cast<int>(c.codes) : eights ? 8 : is_grid(c.codes) ? 32 : 64;
    for (int i = 0; i < 64; ++i) {
        const float value = c.table == 0 ? static_cast<float>(i - 8) : c.table == 1 ? static_cast<float>(i * i - 100) : random_float();
        table[i] = i < entries ? float_to_bfloat(value) : table[i % entries];  // short tables repeat
    }
    const unsigned numbers = is_grid(c.codes) && !eights ? 0x77 : 0xFF;  // of 3 bits, a nibble each
    for (std::uint8_t& octet : stored.grid) octet = static_cast<std::uint8_t>(random_bits() & numbers);
    for (int i = 0; i < 128 && c.codes == Codes::bits7; ++i) {
        const std::uint16_t value = float_to_bfloat(static_cast<float>(i - 8));
        stored.grid[i] = static_cast<std::uint8_t>(value);
        stored.grid[128 + i] = static_cast<std::uint8_t>(value >> 8);
    }
    lowbit_weight weight{};
    weight.factor = 1.0f;
    if (c.codes == Codes::words4) {  // whole numbers twice, then what they are worth
        weight.factor = 0x1p-12f;
        for (int i = 0; i < 16; ++i) {
            const auto word = static_cast<std::int16_t>(static_cast<int>(random_bits() % 8191) - 4095);
            const float worth = static_cast<float>(word) * weight.factor;
            table[i] = table[16 + i] = static_cast<std::uint16_t>(word);
            std::memcpy(table + 32 + 2 * i, &worth, sizeof worth);
        }
    }
    weight.table = table;
    weight.rows = ROWS_OUT;
    weight.columns = padded;
    weight.codes = static_cast<std::int32_t>(c.codes);
    weight.group = c.group;
    weight.scales = static_cast<std::int32_t>(c.scales);
    weight.addend = static_cast<std::int32_t>(c.addend);
    Octets codes;
    if (c.codes == Codes::bf16 || c.codes == Codes::f16 || c.codes == Codes::f32) {
        const Scales like = c.codes == Codes::f32 ? Scales::f32 : c.codes == Codes::f16 ? Scales::f16 : Scales::bf16;
        codes = scale_bytes(ROWS_OUT * columns, like, 0.5f);
    } else {
        const int bits = c.codes == Codes::words4 ? 4 : eights ? 3 : is_grid(c.codes) ? 4 : std::min(static_cast<int>(c.codes), 8);
        codes = octets(ROWS_OUT * columns, 1 << bits);
        for (std::uint8_t& code : codes) {  // neither NaN nor infinite
            if (is_byte_float(c.codes) && (code % 128 > 122 || code == 128)) code = 1;
        }
    }
    const Octets scales = scale_bytes(ROWS_OUT * groups, c.scales, 0.01f);
    const Octets addends = scale_bytes(ROWS_OUT * groups, c.addend == Addend::zero ? Scales::f16 : c.scales, 3.0f);
    const Octets outer = scale_bytes(ROWS_OUT * groups, Scales::f16, 0.001f);
    const auto bytes = find(static_cast<LinearBytes*>(nullptr), "lowbit_linear_bytes")(&weight);
    char name[96];
    std::snprintf(name, sizeof name, "linear codes %d group %d scales %d addend %d table %d", weight.codes, c.group, weight.scales,
                  weight.addend, c.table);
    if (bytes <= 0) {
        std::fprintf(stderr, "%s: no kernel\n", name);
        std::exit(1);
    }
    Octets packed(static_cast<std::size_t>(bytes) + 64);
    std::uint8_t* const data = packed.data() + 64 - reinterpret_cast<std::uintptr_t>(packed.data()) % 64;
    find(static_cast<LinearPack*>(nullptr), "lowbit_linear_pack")(&weight, columns, codes.data(), scales.data(), addends.data(),
                                                                  outer.data(), outer.data(), data);
    weight.data = data;
    Octets kept(data, data + bytes);
    put(std::string(name) + " packed", kept);
    // Three outliers a row, in its first tile and the last column.
    std::vector<std::int32_t> starts{0};
    std::vector<std::uint32_t> outliers;
    for (std::int64_t row = 0; row < ROWS_OUT; ++row) {
        for (const std::int64_t column : {row % 7, 7 + row % 20, columns - 1}) {
            outliers.push_back(static_cast<std::uint32_t>(float_to_half(random_float())) << 16 | static_cast<std::uint32_t>(column));
        }
        starts.push_back(static_cast<std::int32_t>(outliers.size()));
    }
    weight.outlier_starts = c.outliers ? starts.data() : nullptr;
    weight.outliers = outliers.data();
    const std::string said = std::string(name) + (c.outliers ? " outliers" : "");
    multiply(weight, columns, said.c_str());
}

// Sums of codebooks' vectors: a block's scales, then indices of any tile.
void vectors(int books, int bits, int length, Scales scales, int group = 160) {
    constexpr std::int64_t COLUMNS_IN = 160;
    int shift = 0;
    while (2 << shift < length) ++shift;
    // Of 2 or 4 numbers 256 vectors, and their bytes plane by plane.
    const bool is_short = length < 8;
    std::vector<std::uint16_t> table(is_short ? static_cast<std::size_t>(length) * 512 : static_cast<std::size_t>(books * length) << bits);
    for (std::uint16_t& number : table) number = static_cast<std::uint16_t>(static_cast<int>(random_bits() % 2001) - 1000);
    auto* const octets_of_table = reinterpret_cast<std::uint8_t*>(table.data());
    for (int i = 0; is_short && i < 512 * length; ++i) {
        octets_of_table[512 * length + i % (2 * length) * 256 + i / (2 * length)] = octets_of_table[i];
    }
    lowbit_weight weight{};
    weight.factor = 0x1p-9f;
    weight.table = table.data();
    weight.rows = ROWS_OUT;
    weight.columns = COLUMNS_IN;
    weight.codes = VECTORS | books << 8 | bits << 3 | shift;
    weight.group = group;
    weight.scales = static_cast<std::int32_t>(scales);
    const Layout layout(weight);
    Octets data;
    for (std::int64_t unit = 0; unit < layout.blocks * COLUMNS_IN / group; ++unit) {
        const Octets own = scale_bytes(ROWS, scales, 0.01f);
        Octets indices = octets(group / COLUMNS * tile_bytes(layout.codes), 256);
        for (std::size_t i = 1; bits > 8 && i < indices.size(); i += 2) indices[i] = static_cast<std::uint8_t>(indices[i] & ((1 << (bits - 8)) - 1));
        data.insert(data.end(), own.begin(), own.end());
        data.insert(data.end(), indices.begin(), indices.end());
    }
    weight.data = data.data();
    char name[96];
    std::snprintf(name, sizeof name, "linear vectors %dx%d of %d scales %d of %d", books, bits, length, weight.scales, group);
    if (find(static_cast<LinearBytes*>(nullptr), "lowbit_linear_bytes")(&weight) != static_cast<std::int64_t>(data.size())) {
        std::fprintf(stderr, "%s: no kernel\n", name);
        std::exit(1);
    }
    multiply(weight, COLUMNS_IN, name);
}

// The same of vectors of rows: a tile or none of outliers, then indices of each book's tiles.
void row_vectors(int length, int books, int centroids, int residual, int outlier_tiles, bool offsets) {
    constexpr std::int64_t COLUMNS_IN = 150, PADDED = 160;
    std::vector<std::int32_t> order(PADDED, -1);
    for (std::int64_t i = 0; i < COLUMNS_IN; ++i) order[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i * 7 % COLUMNS_IN);
    Floats multiplier(PADDED), offset(PADDED);
    for (float& value : multiplier) value = random_float() * 0x1p-9f;
    for (float& value : offset) value = random_float();
    lowbit_row_vectors described{};
    described.order = order.data();
    described.multiplier = multiplier.data();
    described.offset = offsets ? offset.data() : nullptr;
    described.length = length;
    described.books = books;
    described.centroids = centroids;
    described.residual = residual;
    described.outlier_tiles = outlier_tiles;
    const RowVectors sizes(described);
    std::vector<std::uint16_t> table(static_cast<std::size_t>(std::max<std::int64_t>(64, books * sizes.numbers())));
    const auto word = [&] { return static_cast<std::uint16_t>(static_cast<int>(random_bits() % 2001) - 1000); };
    for (std::uint16_t& number : table) number = word();
    lowbit_weight weight{};
    weight.factor = 1.0f;
    weight.table = table.data();
    weight.rows = ROWS_OUT;
    weight.columns = PADDED;
    weight.codes = static_cast<std::int32_t>(Codes::row_vectors);
    weight.group = PADDED;
    weight.row_vectors = &described;
    const Layout layout(weight);
    Octets data;
    const auto put_number = [&](std::uint32_t number, int bytes) {
        for (int byte = 0; byte < bytes; ++byte) data.push_back(static_cast<std::uint8_t>(number >> 8 * byte));
    };
    for (std::int64_t block = 0; block < layout.blocks; ++block) {
        for (int i = 0; i < outlier_tiles * ROWS * COLUMNS; ++i) put_number(word(), 2);
        for (std::int64_t tile = outlier_tiles; tile < layout.tiles; ++tile) {
            const int indices = COLUMNS * sizes.pieces();
            for (int i = 0; i < indices; ++i) put_number(random_bits() % static_cast<unsigned>(centroids), sizes.main_bytes());
            for (int i = 0; i < indices && residual != 0; ++i) {
                put_number(random_bits() % static_cast<unsigned>(residual), sizes.second_bytes());
            }
        }
    }
    weight.data = data.data();
    char name[96];
    std::snprintf(name, sizeof name, "linear vectors of %d rows, %d books of %d + %d", length, books, centroids, residual);
    if (find(static_cast<LinearBytes*>(nullptr), "lowbit_linear_bytes")(&weight) != static_cast<std::int64_t>(data.size())) {
        std::fprintf(stderr, "%s: no kernel\n", name);
        std::exit(1);
    }
    multiply(weight, COLUMNS_IN, name);
}

// Trellises: any bits.
void trellises(TrellisBook book, int bits) {
    constexpr std::int64_t COLUMNS_IN = 160;
    const std::vector<std::uint16_t> table(64);
    lowbit_weight weight{};
    weight.factor = 0x1p-11f;
    weight.table = table.data();
    weight.rows = ROWS_OUT;
    weight.columns = COLUMNS_IN;
    weight.codes = TRELLISES + 16 * static_cast<std::int32_t>(book) + bits;
    weight.group = COLUMNS_IN;
    const Layout layout(weight);
    const Octets data = octets(layout.blocks * layout.block_bytes, 256);
    weight.data = data.data();
    char name[96];
    std::snprintf(name, sizeof name, "linear trellis book %d of %d bits", static_cast<int>(book), bits);
    if (find(static_cast<LinearBytes*>(nullptr), "lowbit_linear_bytes")(&weight) != static_cast<std::int64_t>(data.size())) {
        std::fprintf(stderr, "%s: no kernel\n", name);
        std::exit(1);
    }
    multiply(weight, COLUMNS_IN, name);
}

// Two codes of a lattice's vectors, of any table of them.
void lattice_pairs() {
    constexpr std::int64_t COLUMNS_IN = 160;
    std::vector<std::uint16_t> table(64 + 256);  // behind the numbers of both books the vectors, of any
    for (int i = 0; i < 32; ++i) {  // times 69, or 20, as kernels/cpu_lattice.py has them
        const int size = i % 4 == 1 ? -3 : i % 4 * 2 + 1, shift = i % 16 < 8 ? 1 : -1;
        const auto number = static_cast<std::uint16_t>((2 * size * (i % 8 < 4 ? 1 : -1) + shift) * (i < 16 ? 69 : 20));
        const int at = i / 16 * 32 + i % 16;
        table[static_cast<std::size_t>(at)] = table[static_cast<std::size_t>(at + 16)] = number;
    }
    for (std::size_t i = 64; i < table.size(); ++i) table[i] = static_cast<std::uint16_t>(random_bits());
    lowbit_weight weight{};
    weight.factor = 0x1p-8f;
    weight.table = table.data();
    weight.rows = ROWS_OUT;
    weight.columns = COLUMNS_IN;
    weight.codes = static_cast<std::int32_t>(Codes::e8p_pair);
    weight.group = COLUMNS_IN;
    const Layout layout(weight);
    const Octets data = octets(layout.blocks * layout.block_bytes, 256);
    weight.data = data.data();
    multiply(weight, COLUMNS_IN, "linear lattice pairs");
}

void all_linear() {
    for (const Codes codes : {Codes::bits1, Codes::bits2, Codes::bits3, Codes::bits4, Codes::bits5, Codes::bits6, Codes::bits7,
                              Codes::int8, Codes::uint8}) {
        for (const int group : {16, 32, 128}) {
            linear({codes, group, Scales::f16, Addend::none, 0});
            linear({codes, group, Scales::f32, Addend::offset, 0});
            linear({codes, group, Scales::bf16, Addend::zero, 0});
        }
    }
    for (const Codes codes : {Codes::bits2, Codes::bits3, Codes::bits4, Codes::bits5, Codes::bits6}) {
        linear({codes, 32, Scales::f16, Addend::none, 2});
    }
    linear({Codes::bits4, 32, Scales::f16, Addend::none, 1});
    linear({Codes::bits4, 16, Scales::e4m3, Addend::none, 2});
    linear({Codes::bits4, 32, Scales::two_level, Addend::offset, 0});
    linear({Codes::bits6, 16, Scales::two_level, Addend::none, 0});
    linear({Codes::words4, 16, Scales::f32, Addend::none, 0});
    linear({Codes::words4, 64, Scales::f16, Addend::none, 0});
    for (const Codes codes : {Codes::e4m3, Codes::e5m2, Codes::e4m3fnuz, Codes::e5m2fnuz}) {
        linear({codes, 128, Scales::f32, Addend::none, 0});
    }
    for (const Codes codes : {Codes::grid2_256, Codes::grid2_512, Codes::grid2_1024, Codes::grid1_2048, Codes::grid3_256, Codes::grid3_512}) {
        linear({codes, 32, Scales::odd_nibbles, Addend::none, 0});
        linear({codes, 16, Scales::odd_nibbles, Addend::none, 2});
    }
    linear({Codes::bits2, 16, Scales::nibbles, Addend::offset, 0});
    linear({Codes::bf16, 32, Scales::none, Addend::none, 0});
    linear({Codes::f16, 32, Scales::none, Addend::none, 0});
    linear({Codes::bits3, 16, Scales::f16, Addend::zero, 0, true});
    linear({Codes::f32, 32, Scales::none, Addend::none, 0});
    vectors(1, 16, 8, Scales::f16);
    vectors(2, 8, 8, Scales::bf16);
    vectors(3, 12, 16, Scales::f32);
    vectors(4, 8, 32, Scales::f16);
    vectors(1, 8, 2, Scales::f16, 32);
    vectors(1, 8, 4, Scales::bf16);
    row_vectors(8, 1, 300, 0, 0, true);
    row_vectors(8, 2, 256, 256, 1, false);
    row_vectors(4, 1, 100, 300, 3, true);
    row_vectors(6, 5, 20, 0, 0, false);
    row_vectors(16, 1, 500, 20, 0, true);
    for (int bits = 1; bits <= 8; ++bits) trellises(static_cast<TrellisBook>(bits % 3), bits);
    lattice_pairs();
}

// Two sequences, of 300 and 5 keys, of which the last 3 and 2 ask.
void attention(Format format, int k_group, int v_group, int k_dim, int v_dim, bool latent, float softcap) {
    constexpr int HEADS = 2, Q_HEADS = 8, PAGES = 24, TOKENS = 305;
    lowbit_attention_cache cache{};
    cache.pages = PAGES;
    cache.heads = HEADS;
    cache.k_dim = k_dim;
    cache.v_dim = v_dim;
    cache.window = softcap > 0 ? 40 : 0;
    cache.k_format = cache.v_format = static_cast<std::int32_t>(format);
    cache.k_group = k_group;
    cache.v_group = v_group;
    cache.latent = latent;
    const auto room = [&](const Store& store) { return Octets(store.head_bytes() * PAGES * HEADS); };
    Octets k = room(key_store(cache)), v = room(value_store(cache));
    cache.k = k.data();
    cache.v = latent ? nullptr : v.data();
    std::vector<std::int32_t> slots, pages(2 * 20);
    for (int i = 0; i < 19; ++i) pages[static_cast<std::size_t>(i)] = (i * 7 + 3) % PAGES;
    pages[20] = (19 * 7 + 3) % PAGES;
    for (int i = 0; i < TOKENS; ++i) {
        const int at = i < 300 ? i : i - 300;
        slots.push_back(pages[static_cast<std::size_t>((i < 300 ? 0 : 20) + at / 16)] * 16 + at % 16);
    }
    const Floats keys = numbers(TOKENS * HEADS * k_dim, 1.0f), values = numbers(TOKENS * HEADS * v_dim, 1.0f);
    CALL(lowbit_attention_write)(&cache, keys.data(), HEADS * k_dim, latent ? nullptr : values.data(), HEADS * v_dim, slots.data(), TOKENS);
    char name[96];
    std::snprintf(name, sizeof name, "attention format %d groups %d %d dims %d %d latent %d cap %g", cache.k_format, k_group,
                  v_group, k_dim, v_dim, latent, static_cast<double>(softcap));
    put(std::string(name) + " keys", k);
    put(std::string(name) + " values", v);
    const std::int32_t queries[] = {3, 2}, contexts[] = {300, 5};
    const lowbit_attention_batch batch{queries, contexts, pages.data(), 20, 2, 5};
    const Floats q = numbers(5 * Q_HEADS * k_dim, 1.0f), sinks = numbers(Q_HEADS, 1.0f);
    Floats out(static_cast<std::size_t>(5 * Q_HEADS * v_dim));
    const int fault = CALL(lowbit_attention_attend)(&cache, &batch, q.data(), Q_HEADS * k_dim, Q_HEADS, 0.125f, softcap,
                                                    softcap > 0 ? sinks.data() : nullptr, out.data());
    if (fault != 0) std::exit(1);
    put(name, out);
}

void all_attention() {
    for (const Format format : {Format::F32, Format::BF16, Format::F16}) {
        attention(format, 0, 0, 64, 64, false, 0.0f);
        attention(format, 0, 0, 96, 48, false, 20.0f);
        attention(format, 0, 0, 96, 64, true, 0.0f);
    }
    for (const Format format : {Format::E4M3, Format::E5M2, Format::INT8, Format::INT4}) {
        attention(format, 32, 32, 64, 64, false, 0.0f);
        attention(format, 64, 64, 96, 64, true, 0.0f);
    }
    attention(Format::E4M3, 0, 0, 64, 64, false, 0.0f);
}

void elementwise() {
    constexpr int WIDTH = 77, COUNT = 5;
    const Floats x = numbers(COUNT * WIDTH * 2, 4.0f, true), weight = numbers(WIDTH, 1.0f), clean = numbers(COUNT * WIDTH * 2, 4.0f);
    Floats out(COUNT * WIDTH), residual(clean.begin(), clean.begin() + COUNT * WIDTH);
    CALL(lowbit_rms_norm)(clean.data(), WIDTH, weight.data(), 1e-5f, COUNT, WIDTH, out.data(), WIDTH);
    put("rms_norm", out);
    CALL(lowbit_add_rms_norm)(clean.data() + 9, WIDTH, residual.data(), WIDTH, weight.data(), 1e-5f, COUNT, WIDTH, out.data(), WIDTH);
    put("add_rms_norm", out);
    put("add_rms_norm residual", residual);
    for (std::int32_t activation = 0; activation < 4; ++activation) {
        CALL(lowbit_gated_activation)(x.data(), 2 * WIDTH, activation, COUNT, WIDTH, out.data(), WIDTH);
        put("gated_activation " + std::to_string(activation), out);
    }
    Floats capped = x;
    CALL(lowbit_softcap)(capped.data(), WIDTH, 2 * COUNT, WIDTH, 30.0f);
    put("softcap", capped);
    CALL(lowbit_affine)(x.data(), WIDTH, COUNT, WIDTH, weight.data(), clean.data(), 1, 0.5f, 3.0f, clean.data() + 50, out.data(), WIDTH);
    put("affine", out);
    const Floats angles = numbers(8 * 24, 1.0f);
    const std::int32_t positions[] = {0, 7, 3};
    for (const int interleaved : {0, 1}) {
        Floats q = numbers(3 * 4 * 64, 1.0f), k = numbers(3 * 2 * 64, 1.0f);
        CALL(lowbit_rotary)(q.data(), 256, 4, k.data(), 128, 2, 64, 48, angles.data(), angles.data(), 8, positions, 3, interleaved);
        put("rotary q " + std::to_string(interleaved), q);
        put("rotary k " + std::to_string(interleaved), k);
    }
    for (const std::int32_t bfloat : {0, 1}) {
        const Floats heads = numbers(5 * 3 * 24, 1.0f);
        const Octets weights = scale_bytes(3 * 24 * 48, bfloat ? Scales::bf16 : Scales::f32, 0.2f);
        Floats y(5 * 3 * 40);
        const lowbit_head_products job{heads.data(), 72, 24, weights.data(), y.data(), 120, 40, 5, 3, 24, 40, bfloat};
        CALL(lowbit_multiply_heads)(&job);
        put("multiply_heads " + std::to_string(bfloat), y);
    }
    Floats peaks(2 * COUNT);
    std::int64_t places[2 * COUNT];
    using Peaks = int(const float*, std::int64_t, std::int64_t, std::int64_t, float*, std::int64_t*);
    find(static_cast<Peaks*>(nullptr), "lowbit_row_peaks")(x.data(), WIDTH, 2 * COUNT, WIDTH, peaks.data(), places);
    put("row_peaks", peaks);
    put("row_peaks places", 'b', sizeof places, places);
    for (std::int32_t rule = 0; rule < 4; ++rule) {
        const lowbit_routing routing{weight.data(), rule, 16, 4, rule < 2 ? 1 : 4, rule < 2 ? 1 : 2, 1, 2.5f};
        Floats scratch(COUNT * (2 * 16 + 4)), weights(COUNT * 4);
        std::int64_t chosen[COUNT * 4];
        CALL(lowbit_route_tokens)(&routing, clean.data(), 16, COUNT, scratch.data(), chosen, weights.data());
        put("route_tokens " + std::to_string(rule), weights);
        put("route_tokens chosen " + std::to_string(rule), 'b', sizeof chosen, chosen);
    }
}

void quantizers() {
    constexpr int WIDTH = 96, COUNT = 6;
    const float fixed = 0.02f, zero = 3.0f;
    // integer, e4m3, e5m2, e2m1, e2m3, e3m2
    const float largest[] = {127.0f, 448.0f, 57344.0f, 6.0f, 7.5f, 28.0f};
    for (std::int32_t rule = 1; rule < 8; ++rule) {
        if (rule == 5) continue;  // delayed: the same arithmetic with a state
        for (std::int32_t format = 0; format < 6; ++format) {
            for (const std::int32_t scale : {0, 1, 2, 3, 4}) {
                if ((scale != 0 && rule != 6) || (rule == 3 && format != 0)) continue;
                for (const std::int32_t reciprocal : {0, 1}) {
                    lowbit_quantizer q{};
                    q.static_scale = &fixed;
                    q.static_zero = format == 0 ? &zero : nullptr;
                    q.rule = rule;
                    q.format = format;
                    q.scale = scale;
                    q.group = 32;
                    q.high = q.limit = largest[format];
                    q.low = -q.high;
                    q.outliers = 6.0f;
                    q.reciprocal = reciprocal;
                    q.bfloat_input = format % 2;
                    const Floats x = numbers(COUNT * WIDTH, 2.0f, rule != 3);
                    Floats out(COUNT * WIDTH), factors(COUNT);
                    CALL(lowbit_quantize_input)(&q, x.data(), WIDTH, COUNT, WIDTH, out.data(), WIDTH, factors.data());
                    const std::string name = "quantize_input rule " + std::to_string(rule) + " format " + std::to_string(format) +
                                             " scale " + std::to_string(scale) + " reciprocal " + std::to_string(reciprocal);
                    put(name, out);
                    put(name + " factors", factors);
                }
            }
        }
    }
}

void encoding() {
    constexpr int WIDTH = 150, COUNT = 4, GROUP = 32, GROUPS = 5;
    const Floats x = numbers(COUNT * WIDTH, 2.0f);
    Floats scales = numbers(COUNT * GROUPS, 0.1f), thresholds;
    for (float& scale : scales) scale = std::fabs(scale);
    Octets codes;
    for (int i = 0; i < 16; ++i) codes.push_back(static_cast<std::uint8_t>(i * 3 % 16));
    for (int i = 0; i < 15; ++i) thresholds.push_back(static_cast<float>(i * i - 100) * 0.1f);
    using Encode = void(const float*, std::int64_t, std::int64_t, std::int64_t, const float*, std::int64_t, const lowbit_code_format*,
                        std::uint8_t*);
    for (std::int32_t kind = 0; kind < 3; ++kind) {
        const lowbit_code_format format{thresholds.data(), codes.data(), kind, 16, -8.0f, 7.0f};
        Octets out(COUNT * WIDTH);
        find(static_cast<Encode*>(nullptr), "lowbit_encode")(x.data(), COUNT, WIDTH, WIDTH, scales.data(), GROUP, &format, out.data());
        put("encode " + std::to_string(kind), out);
    }
    using Blocks = int(std::int32_t, std::int32_t, const void*, std::int64_t, std::uint8_t*);
    for (std::int32_t type = 0; type < 48; ++type) {
        for (std::int32_t source = 0; source < 3; ++source) {
            const Octets weights = scale_bytes(1024, source == 0 ? Scales::f32 : source == 1 ? Scales::f16 : Scales::bf16, 0.1f);
            Octets out(8192);
            if (find(static_cast<Blocks*>(nullptr), "lowbit_quantize_blocks")(type, source, weights.data(), 4, out.data()) == 0) {
                put("quantize_blocks type " + std::to_string(type) + " source " + std::to_string(source), out);
            }
        }
    }
}

}  // namespace

int main(int, char** arguments) {
    library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    results = std::fopen(arguments[2], "wb");
    if (results == nullptr) return 1;
    using SetThreads = void(int);
    find(static_cast<SetThreads*>(nullptr), "lowbit_set_threads")(2);
    all_linear();
    all_attention();
    elementwise();
    quantizers();
    encoding();
    return std::fclose(results);
}
