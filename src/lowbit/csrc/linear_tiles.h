// The inner tiles of the linear kernels: 16 output rows by 32 columns, decoded once and used for many tokens.
//
// Packed weights (kernels/cpu_blocks.py draws the layout) are read 16 output rows at a time, because a row of
// results then fills a register and its scales are one multiply-add. A tile is decoded to exact bfloat16
// numbers (integer codes, table values) or floats; scales and offsets are applied in float32 afterwards.
//
// THE ORDER OF THE SUM IS FIXED, whatever the number of tokens or threads: for every sub-block (16 or 32
// columns) a fresh accumulator runs over ascending columns, then total = scale * accumulator + total, then
// total = addend * sum(x) + total. A token's result never depends on its neighbours. (AMX tiles have an order of
// their own, as fixed: linear_amx.cpp.)
#pragma once

#include "intrinsics.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define INLINE __attribute__((always_inline)) inline

namespace lowbit {

// body(0), body(1) … body(COUNT - 1), as constants: shifts and lanes are part of instructions.
template <class Body, int... NUMBERS>
INLINE void each_constant(std::integer_sequence<int, NUMBERS...>, const Body& body) {
    (body(std::integral_constant<int, NUMBERS>{}), ...);
}
template <int COUNT, class Body>
INLINE void each_constant(const Body& body) {
    each_constant(std::make_integer_sequence<int, COUNT>{}, body);
}

constexpr int ROWS = 16;     // output rows of a tile
constexpr int COLUMNS = 32;  // columns of a tile
constexpr int PAIRS = COLUMNS / 2;

// How codes are stored; whole bytes as in the canonical form (int8: offset binary). Widths below 7 look their value
// up in a table; planes are low bits first. ``bits7``: a code is worth table[0] + code; AVX-512 looks bytes of 128
// values up. ``row_vectors``: indices of vectors of several rows (linear_row_vectors.h). ``words4``: as bits4, with a table of whole numbers of 13 bits for values that bfloat16 would round
// (nf4); see linear_words.h. ``grid…``, ``e8p``: an index for 8 or 4 columns of a row; see Grid. ``halves3``: as bits3,
// but with every step from code to weight rounded to float16, and outliers; see linear_halves.h.
enum class Codes : std::int32_t {
    bits1 = 1, bits2 = 2, bits3 = 3, bits4 = 4, bits5 = 5, bits6 = 6, bits7 = 7,
    int8 = 8, uint8 = 9, e4m3 = 10, e5m2 = 11, e4m3fnuz = 12, e5m2fnuz = 13, words4 = 14,
    bf16 = 16, f16 = 17, halves3 = 18, grid2_256 = 20, grid2_512 = 21, grid2_1024 = 22, grid1_2048 = 23, grid3_256 = 24, grid3_512 = 25,
    e8p = 26,
    f32 = 32, row_vectors = 40
};

// Indices of vectors of codebooks: a vector is ``length`` columns of a row (8, 16 or 32), a weight the sum of what each of
// ``books`` codebooks of 2^bits vectors says; linear_vectors.h. Such codes are numbers of a form of their own.
constexpr std::int32_t VECTORS = 1 << 16;
struct Vectors {
    int books, bits, length;
    constexpr int index_bytes() const { return bits <= 8 ? 1 : 2; }
    constexpr int of_row() const { return COLUMNS / length; }  // in a tile
    constexpr std::int64_t bytes() const { return ROWS * of_row() * books * index_bytes(); }
};
constexpr bool is_vectors(Codes codes) { return static_cast<std::int32_t>(codes) >= VECTORS; }
constexpr Vectors vectors_of(Codes codes) {
    const std::int32_t number = static_cast<std::int32_t>(codes);
    return {number >> 8 & 255, number >> 3 & 31, 8 << (number & 7)};
}

// Trellises of 1 to 8 bits a weight, whose numbers a code book makes of 16 bits of a stream; linear_trellis.h.
constexpr std::int32_t TRELLISES = 64;
enum class TrellisBook : std::int32_t { first = 0, mcg = 1, mul1 = 2 };
struct Trellis {
    TrellisBook book;
    int bits;
};
constexpr bool is_trellis(Codes codes) {
    const std::int32_t number = static_cast<std::int32_t>(codes) - TRELLISES;
    return number >= 0 && number < 48 && number % 16 >= 1 && number % 16 <= 8;
}
constexpr Trellis trellis_of(Codes codes) {
    const std::int32_t number = static_cast<std::int32_t>(codes) - TRELLISES;
    return {static_cast<TrellisBook>(number / 16), number % 16};
}

// Codes whose values are 16-bit whole numbers, as is x.
constexpr bool is_words(Codes codes) {
    return codes == Codes::words4 || codes == Codes::row_vectors || is_vectors(codes) || is_trellis(codes);
}

// Codes that meet x in float32.
constexpr bool is_float(Codes codes) { return codes == Codes::f16 || codes == Codes::f32 || codes == Codes::halves3; }

constexpr bool is_byte_float(Codes codes) { return codes >= Codes::e4m3 && codes <= Codes::e5m2fnuz; }
constexpr bool is_byte(Codes codes) { return codes == Codes::int8 || codes == Codes::uint8 || is_byte_float(codes); }

// Codes of several columns at once (GGUF's IQ1 to IQ3): an index of ``bits`` bits says which vector of a table 8
// columns of a row hold, numbers of 2 bits, or 4 columns, of 3. Beside it stands a bit for each number, its sign; or
// where ``shifted`` one for each vector. A tile is first made one of bits3 (``numbers`` = 8) or bits5, whose last bit
// is that bit: linear_grids.h. Where ``parity`` (QuIP#'s E8P) there are both, in the room of the signs: whether their
// count is odd is the vector's own bit, and turns the first number's sign. Such a tile is made one of bits4: a number, its
// sign and the vector's bit.
struct Grid {
    int bits, numbers;
    bool shifted, parity = false;
    constexpr int vectors() const { return ROWS * COLUMNS / numbers; }  // of a tile
    constexpr Codes planes() const { return parity ? Codes::bits4 : numbers == 8 ? Codes::bits3 : Codes::bits5; }
    constexpr std::int64_t bytes() const { return vectors() / 8 * bits + (shifted ? vectors() / 8 : ROWS * COLUMNS / 8); }
};
constexpr bool is_grid(Codes codes) { return codes >= Codes::grid2_256 && codes <= Codes::e8p; }
constexpr Grid grid_of(Codes codes) {
    switch (codes) {
        case Codes::grid2_256: return {8, 8, false};
        case Codes::grid2_512: return {9, 8, false};
        case Codes::grid2_1024: return {10, 8, false};
        case Codes::grid1_2048: return {11, 8, true};
        case Codes::grid3_256: return {8, 4, false};
        case Codes::e8p: return {8, 8, false, true};
        default: return {9, 4, false};
    }
}

// Bytes of one tile's codes.
constexpr std::int64_t tile_bytes(Codes codes) {
    switch (codes) {
        case Codes::int8:
        case Codes::uint8:
        case Codes::e4m3:
        case Codes::e5m2:
        case Codes::e4m3fnuz:
        case Codes::e5m2fnuz: return ROWS * COLUMNS;
        case Codes::grid2_256:
        case Codes::grid2_512:
        case Codes::grid2_1024:
        case Codes::grid1_2048:
        case Codes::grid3_256:
        case Codes::grid3_512:
        case Codes::e8p: return grid_of(codes).bytes();
        case Codes::words4: return ROWS * COLUMNS / 2;
        case Codes::halves3: return ROWS * COLUMNS * 3 / 8;
        case Codes::bf16:
        case Codes::f16: return ROWS * COLUMNS * 2;
        case Codes::f32: return ROWS * COLUMNS * 4;
        default:
            if (is_vectors(codes)) return vectors_of(codes).bytes();
            if (is_trellis(codes)) return ROWS * COLUMNS / 8 * trellis_of(codes).bits;
            return ROWS * COLUMNS / 8 * static_cast<std::int64_t>(codes);
    }
}

inline float bfloat_to_float(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline std::uint16_t float_to_bfloat(float value) {  // round to nearest even; NaN stays NaN
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 64u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// FP8: a sign, then 4 bits of exponent and 3 of mantissa, or 5 and 2. In place as a float the rest is too small by
// 2^120 (e4m3); the product also makes subnormals right. NaN is 0x7F of e4m3, all beyond 0x7C of e5m2, which is
// infinity, and minus zero of the others.
constexpr int magnitude_shift(Codes codes) { return codes == Codes::e4m3 || codes == Codes::e4m3fnuz ? 20 : 21; }
constexpr float magnitude_factor(Codes codes) {
    switch (codes) {
        case Codes::e4m3: return 0x1p120f;
        case Codes::e4m3fnuz: return 0x1p119f;
        case Codes::e5m2: return 0x1p112f;
        default: return 0x1p111f;
    }
}

template <Codes CODES>
inline float byte_value(std::uint8_t code) {
    if constexpr (is_byte_float(CODES)) {
        const std::uint32_t magnitude = code & 0x7fu;
        std::uint32_t bits = magnitude << magnitude_shift(CODES);
        if (CODES == Codes::e4m3 ? magnitude == 0x7fu : CODES == Codes::e5m2 ? magnitude > 0x7cu : code == 0x80u) {
            bits = 0x7fc00000u;
        } else if (CODES == Codes::e5m2 && magnitude == 0x7cu) {
            bits = 0x7f800000u;
        }
        float value;
        std::memcpy(&value, &bits, sizeof value);
        value *= magnitude_factor(CODES);
        return (code & 0x80u) ? -value : value;
    }
    return static_cast<float>(code) - (CODES == Codes::int8 ? 128.0f : 0.0f);
}

// An operand of the int8 kernels is a pair of columns and the pair two further: pairs 0 and 2, 1 and 3, 4 and
// 6 … A tile has eight. Every layout keeps the two in the two bytes of a word, so that one register serves
// both kinds of product.
constexpr int OPERANDS = PAIRS / 2;
constexpr int operand_of(int pair) { return pair / 4 * 2 + pair % 2; }
constexpr int side_of(int pair) { return pair / 2 % 2; }
constexpr int pair_of(int operand, int side) { return operand / 2 * 4 + operand % 2 + side * 2; }

// Where the byte of (row, column) of a tile lies: a line of 64 for each operand. Interleaving the low and high
// halves of its 128-bit lanes with other bytes gives the two pairs as 16-bit words, a row in a 32-bit lane.
constexpr int byte_place(int row, int column) {
    const int pair = column / 2;
    return operand_of(pair) * 64 + row / 4 * 16 + side_of(pair) * 8 + row % 4 * 2 + column % 2;
}

// Where the code of (row, column) of a tile lies, for packing and single rows: a 16-bit word for each
// (row, column parity), and in it one field for each pair of columns; an operand's pairs lie in the same place
// of the word's two bytes. Planes follow each other in a tile:
//   4 bits: 4 pairs a word, 64-byte lines of 8 columns   2 bits: 8 pairs a word, lines of 16 columns
//   1 bit: 16 pairs a word, one line for the tile
struct Plane {
    int width;  // bits of a field
    int shift;  // its place in the code
    std::int64_t offset;
};

constexpr int plane_count(Codes codes) {
    if (codes == Codes::bits7) return 3;
    const bool two = codes == Codes::bits3 || codes == Codes::halves3 || codes == Codes::bits5 || codes == Codes::bits6;
    return two ? 2 : 1;
}
constexpr Plane plane(Codes codes, int index) {
    switch (codes) {
        case Codes::bits1: return {1, 0, 0};
        case Codes::bits2: return {2, 0, 0};
        case Codes::bits3:
        case Codes::halves3: return index == 0 ? Plane{2, 0, 0} : Plane{1, 2, 128};
        case Codes::bits4:
        case Codes::words4: return {4, 0, 0};
        case Codes::bits5: return index == 0 ? Plane{4, 0, 0} : Plane{1, 4, 256};
        case Codes::bits7: return index == 0 ? Plane{4, 0, 0} : index == 1 ? Plane{2, 4, 256} : Plane{1, 6, 384};
        default: return index == 0 ? Plane{4, 0, 0} : Plane{2, 4, 256};
    }
}

struct Field {
    std::int64_t byte;  // of the 16-bit word
    int shift;
};
constexpr Field field(Plane p, int row, int column) {
    const int pair = column / 2, operand = operand_of(pair), per_byte = 8 / p.width;
    const int place = operand % per_byte + per_byte * side_of(pair);
    return {p.offset + operand / per_byte * 64 + (row * 2 + column % 2) * 2, place * p.width};
}

inline unsigned read_code(const std::uint8_t* tile, Codes codes, int row, int column) {
    unsigned code = 0;
    for (int i = 0; i < plane_count(codes); ++i) {
        const Plane p = plane(codes, i);
        const Field f = field(p, row, column);
        std::uint16_t word;
        std::memcpy(&word, tile + f.byte, sizeof word);
        code |= ((static_cast<unsigned>(word) >> f.shift) & ((1u << p.width) - 1u)) << p.shift;
    }
    return code;
}

inline void write_code(std::uint8_t* tile, Codes codes, int row, int column, unsigned code) {
    for (int i = 0; i < plane_count(codes); ++i) {
        const Plane p = plane(codes, i);
        const Field f = field(p, row, column);
        std::uint16_t word;
        std::memcpy(&word, tile + f.byte, sizeof word);
        word = static_cast<std::uint16_t>(word | (((code >> p.shift) & ((1u << p.width) - 1u)) << f.shift));
        std::memcpy(tile + f.byte, &word, sizeof word);
    }
}

#if defined(__AVX512BF16__)

// ---- AVX-512 with BF16 -----------------------------------------------------------------------------------

// table: 64 bfloat16 values, repeated where codes have fewer than 6 bits.
struct Table {
    __m512i low, high;
    const std::uint8_t* behind;  // low bytes of 16-bit words, then the high ones: 128 values of bits7; vectors of grids
    explicit Table(const std::uint16_t* values)
        : low(_mm512_loadu_si512(values)),
          high(_mm512_loadu_si512(values + 32)),
          behind(reinterpret_cast<const std::uint8_t*>(values + 64)) {}
};

template <Codes CODES, int TILES>
INLINE void expand_grid(const std::uint8_t* const (&tiles)[TILES], const std::uint8_t* grid,
                        __m512i (&nibbles)[TILES][OPERANDS / 2]);

// The value of every byte as bfloat16, low and high bytes apart.
struct ByteTable {
    alignas(64) std::uint8_t low[256], high[256];
    explicit ByteTable(float (*value)(std::uint8_t)) {
        for (int code = 0; code < 256; ++code) {
            const std::uint16_t bits = float_to_bfloat(value(static_cast<std::uint8_t>(code)));
            low[code] = static_cast<std::uint8_t>(bits);
            high[code] = static_cast<std::uint8_t>(bits >> 8);
        }
    }
};

template <Codes CODES>
const ByteTable& byte_table() {
    static const ByteTable table(byte_value<CODES>);
    return table;
}

// A lookup in 256 bytes.
inline __m512i look_up(__m512i codes, __mmask64 upper, const __m512i (&table)[4]) {
    return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], codes, table[1]),
                                  _mm512_permutex2var_epi8(table[2], codes, table[3]));
}

// words, shifted right by ``right``, which may be negative.
inline __m512i shifted(__m512i words, int right) {
    return right >= 0 ? _mm512_srli_epi16(words, static_cast<unsigned>(right))
                      : _mm512_slli_epi16(words, static_cast<unsigned>(-right));
}

// mask ? a : b, bit by bit. The instruction overwrites its first operand: not the mask, which is kept.
INLINE __m512i chosen_bits(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(b, a, mask, 0xD8); }

// The lines of a tile's codes, each read where it is decoded; of a grid those of its nibbles, in registers. IN_ORDER:
// all are read first, as they lie.
template <Codes CODES, bool IN_ORDER = false>
struct CodeLines {
    static constexpr int LINES = is_grid(CODES) ? OPERANDS / 2 : static_cast<int>(tile_bytes(CODES) / 64);
    const std::uint8_t* tile;
    __m512i lines[LINES];

    INLINE __m512i line(std::int64_t byte) const {
        if constexpr (is_grid(CODES) || IN_ORDER) return lines[byte / 64];
        return _mm512_loadu_si512(tile + byte);
    }
};

// Lines of TILES tiles; next(i) says where the codes of tile i are. Grids are looked up for all of them at once.
template <Codes CODES, bool IN_ORDER, int TILES, class Next>
INLINE void read_lines(const Next& next, const Table& table, CodeLines<CODES, IN_ORDER> (&to)[TILES]) {
    UNROLL
    for (int tile = 0; tile < TILES; ++tile) {
        CodeLines<CODES, IN_ORDER>& own = to[tile];
        own.tile = next(tile);
        if constexpr (!is_grid(CODES) && IN_ORDER) {
            UNROLL
            for (int line = 0; line < own.LINES; ++line) {
                own.lines[line] = _mm512_loadu_si512(own.tile + line * 64);
                asm volatile("" : "+v"(own.lines[line]));  // the compiler leaves these in their order
            }
        }
    }
    if constexpr (is_grid(CODES)) {
        const std::uint8_t* tiles[TILES];
        __m512i nibbles[TILES][OPERANDS / 2];
        for (int tile = 0; tile < TILES; ++tile) tiles[tile] = to[tile].tile;
        expand_grid<CODES, TILES>(tiles, table.behind, nibbles);
        UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
            for (int line = 0; line < OPERANDS / 2; ++line) to[tile].lines[line] = nibbles[tile][line];
        }
    }
}

// What codes of 7 or 8 bits are looked up in, byte by byte.
template <Codes CODES>
struct ByteTables {
    __m512i low[4], high[4];
    INLINE explicit ByteTables(const Table& table) {
        if constexpr (is_byte(CODES)) {
            const ByteTable& bytes = byte_table<CODES>();
            UNROLL
            for (int part = 0; part < 4; ++part) {
                low[part] = _mm512_load_si512(bytes.low + part * 64);
                high[part] = _mm512_load_si512(bytes.high + part * 64);
            }
        } else if constexpr (CODES == Codes::bits7) {
            UNROLL
            for (int part = 0; part < 2; ++part) {
                low[part] = _mm512_loadu_si512(table.behind + part * 64);
                high[part] = _mm512_loadu_si512(table.behind + 128 + part * 64);
            }
        } else if constexpr (is_grid(CODES)) {
            // By nibbles. The table has the last bit above all 4 that a number of a grid of fours has in planes. Of e8p
            // whole numbers stand behind the others.
            low[0] = CODES == Codes::e8p ? table.high : table.low;
            if constexpr (grid_of(CODES).numbers == 4) {
                const __m512i places = _mm512_cvtepu8_epi16(_mm256_setr_epi8(
                    0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22,
                    23));
                low[0] = _mm512_permutexvar_epi16(places, table.low);
            }
        }
    }
};

// Four pairs of columns, those of operands 2 QUAD and 2 QUAD + 1: one register of 16 rows x 2 columns for each.
template <Codes CODES, int QUAD, bool IN_ORDER>
INLINE void decode_quad(const CodeLines<CODES, IN_ORDER>& tile, const Table& table, const ByteTables<CODES>& bytes, __m512i* w) {
    if constexpr (CODES == Codes::bf16) {
        UNROLL
        for (int i = 0; i < 4; ++i) w[i] = tile.line((QUAD * 4 + i) * 64);
    } else if constexpr (is_byte(CODES)) {
        UNROLL
        for (int i = 0; i < 2; ++i) {
            const __m512i codes = tile.line((QUAD * 2 + i) * 64);
            const __mmask64 upper = _mm512_movepi8_mask(codes);
            const __m512i lower = look_up(codes, upper, bytes.low), higher = look_up(codes, upper, bytes.high);
            w[i] = _mm512_unpacklo_epi8(lower, higher);
            w[i + 2] = _mm512_unpackhi_epi8(lower, higher);
        }
    } else if constexpr (CODES == Codes::bits7) {
        // A pair and the one two further at once, in the two bytes of a word: their bfloat16s' low and high bytes.
        const __m512i lower_bytes = _mm512_set1_epi16(0xff);
        UNROLL
        for (int i = 0; i < 2; ++i) {
            const int column = pair_of(QUAD * 2 + i, 0) * 2;
            const Plane a = plane(CODES, 0), b = plane(CODES, 1), c = plane(CODES, 2);
            const Field low = field(a, 0, column), middle = field(b, 0, column), high = field(c, 0, column);
            // The lookups take the lowest seven bits of a byte.
            __m512i code = chosen_bits(_mm512_set1_epi8(0x30), shifted(tile.line(middle.byte), middle.shift - b.shift),
                                       shifted(tile.line(low.byte), low.shift - a.shift));
            code = chosen_bits(_mm512_set1_epi8(0x40), shifted(tile.line(high.byte), high.shift - c.shift), code);
            const __m512i lower = _mm512_permutex2var_epi8(bytes.low[0], code, bytes.low[1]);
            const __m512i higher = _mm512_permutex2var_epi8(bytes.high[0], code, bytes.high[1]);
            w[i] = chosen_bits(lower_bytes, lower, _mm512_slli_epi16(higher, 8));
            w[i + 2] = chosen_bits(lower_bytes, _mm512_srli_epi16(lower, 8), higher);
        }
    } else if constexpr (is_grid(CODES)) {
        UNROLL
        for (int i = 0; i < 4; ++i) {
            const int operand = operand_of(QUAD * 4 + i), side = side_of(QUAD * 4 + i);
            const bool twos = grid_of(CODES).numbers == 8;  // bits of a number
            const int line = twos ? operand / 4 * 2 + operand % 2 : operand / 2;
            const int nibble = twos ? operand % 4 / 2 : operand % 2;
            w[i] = _mm512_permutexvar_epi16(shifted(tile.line(line * 64), nibble * 4 + side * 8), bytes.low[0]);
        }
    } else if constexpr (plane_count(CODES) == 1) {
        UNROLL
        for (int i = 0; i < 4; ++i) {
            const Field f = field(plane(CODES, 0), 0, (QUAD * 4 + i) * 2);
            w[i] = _mm512_permutexvar_epi16(shifted(tile.line(f.byte), f.shift), table.low);
        }
    } else {
        constexpr Plane LOW = plane(CODES, 0), HIGH = plane(CODES, 1);
        const __m512i high_bits = _mm512_set1_epi16(static_cast<short>(((1 << HIGH.width) - 1) << LOW.width));
        UNROLL
        for (int i = 0; i < 4; ++i) {
            const Field a = field(LOW, 0, (QUAD * 4 + i) * 2), b = field(HIGH, 0, (QUAD * 4 + i) * 2);
            const __m512i low = shifted(tile.line(a.byte), a.shift);
            const __m512i index = chosen_bits(high_bits, shifted(tile.line(b.byte), b.shift - LOW.width), low);
            w[i] = HIGH.width == 2 ? _mm512_permutex2var_epi16(table.low, index, table.high)
                                   : _mm512_permutexvar_epi16(index, table.low);
        }
    }
}

// One register of 16 rows x 2 columns for each pair of columns.
template <Codes CODES>
INLINE void decode(const std::uint8_t* tile, const Table& table, __m512i* w) {
    CodeLines<CODES> lines[1];
    read_lines([&](int) { return tile; }, table, lines);
    const ByteTables<CODES> bytes(table);
    each_constant<PAIRS / 4>([&](auto quad) __attribute__((always_inline)) {
        decode_quad<CODES, decltype(quad)::value>(lines[0], table, bytes, w + 4 * decltype(quad)::value);
    });
}

// 16 columns of floats.
template <Codes CODES>
INLINE void decode_floats(const std::uint8_t* tile, __m512* w) {
    UNROLL
    for (int column = 0; column < 16; ++column) {
        if constexpr (CODES == Codes::int8) {
            const int pair = column / 2, first = side_of(pair) * 8 + column % 2;  // of four rows in a lane
            const __m512i rows = _mm512_broadcast_i32x4(
                _mm_setr_epi32(first | ~0xff, (first + 2) | ~0xff, (first + 4) | ~0xff, (first + 6) | ~0xff));
            const __m512i line = _mm512_loadu_si512(tile + operand_of(pair) * 64);
            const __m512i codes = _mm512_shuffle_epi8(line, rows);
            w[column] = _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(128)));
        } else if constexpr (CODES == Codes::f32) {
            w[column] = _mm512_loadu_ps(tile + column * 64);
        } else {
            w[column] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + column * 32)));
        }
    }
}

using Sixteen = __m512;
inline Sixteen sixteen_zeros() { return _mm512_setzero_ps(); }
inline Sixteen sixteen_load(const float* from) { return _mm512_loadu_ps(from); }
inline void sixteen_store(float* to, Sixteen x) { _mm512_storeu_ps(to, x); }
inline void sixteen_store_some(float* to, Sixteen x, int count) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1u), x);
}
inline Sixteen sixteen_fma(Sixteen a, Sixteen b, Sixteen c) { return _mm512_fmadd_ps(a, b, c); }
inline Sixteen sixteen_multiply(Sixteen a, Sixteen b) { return _mm512_mul_ps(a, b); }
inline Sixteen sixteen_add(Sixteen a, Sixteen b) { return _mm512_add_ps(a, b); }
inline Sixteen sixteen_set(float x) { return _mm512_set1_ps(x); }
inline Sixteen sixteen_f16(const std::uint8_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// To float16: to nearest, ties to even.
inline void sixteen_store_f16(std::uint16_t* to, Sixteen x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline Sixteen sixteen_round_f16(Sixteen x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline Sixteen sixteen_bf16(const std::uint8_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Sixteen sixteen_int8(const std::uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
// Sixteen whole numbers of 4 bits: the low halves of 8 bytes, then the high ones.
inline Sixteen sixteen_nibbles(const std::uint8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi64(low, high)));
}
inline Sixteen sixteen_e4m3(const std::uint8_t* from) {  // scales: never NaN
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m512i magnitude = _mm512_slli_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(0x7f)), 20);
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(0x80)), 24);
    const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(0x1p120f));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
}

// Dot products of columns [FIRST, FIRST + COUNT) with COUNT_TOKENS tokens, each in an accumulator of its own.
template <int FIRST, int COUNT, int TOKENS>
INLINE void dot(const __m512i* w, const std::uint16_t* x, std::int64_t stride, Sixteen* sums) {
    for (int t = 0; t < TOKENS; ++t) sums[t] = _mm512_setzero_ps();
    UNROLL
    for (int pair = FIRST / 2; pair < (FIRST + COUNT) / 2; ++pair) {
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            std::int32_t two;
            std::memcpy(&two, x + t * stride + pair * 2, sizeof two);
            sums[t] = _mm512_dpbf16_ps(sums[t], reinterpret_cast<__m512bh>(w[pair]),
                                       reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)));
        }
    }
}

template <int TOKENS>
INLINE void dot_floats(const __m512* w, const float* x, std::int64_t stride, Sixteen* sums) {
    for (int t = 0; t < TOKENS; ++t) sums[t] = _mm512_setzero_ps();
    UNROLL
    for (int column = 0; column < 16; ++column) {
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            sums[t] = _mm512_fmadd_ps(w[column], _mm512_set1_ps(x[t * stride + column]), sums[t]);
        }
    }
}

using BfloatTile = __m512i[PAIRS];
using FloatTile = __m512[16];

template <int COLUMN>
INLINE Sixteen column_of(const BfloatTile& w) {
    const __m512i pair = w[COLUMN / 2], upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    return _mm512_castsi512_ps(COLUMN % 2 == 0 ? _mm512_slli_epi32(pair, 16) : _mm512_and_si512(pair, upper));
}

// Whether one token's tiles are multiplied two at a time. A product waits some six cycles for the one before it, and a
// tile's sixteen take longer than decoding it; two tiles' in turns fill the wait. Not where parts of a tile are sums of
// their own, but of grids, whose tables are read once for both; nor where lines of two tiles do not all find a register.
constexpr bool tiles_in_turns(Codes codes, int sub) {
    return (sub == COLUMNS && tile_bytes(codes) <= 6 * ROWS * COLUMNS / 8) || (is_grid(codes) && sub >= COLUMNS / 2);
}

// Whether one token's lines are all read first, as they lie in memory. Planes are decoded from here and there, and what
// fetches lines ahead follows those that are read in order; whole bytes are read in order anyway.
constexpr bool reads_in_order(Codes codes) { return !is_byte(codes) && codes != Codes::bf16; }

// Whether one token's tile is decoded before any of it is multiplied: where nothing is won by turns or by order.
constexpr bool decoded_whole(Codes codes, int sub) { return is_byte(codes) || (codes == Codes::bits4 && sub < COLUMNS); }

// One token times TILES tiles that follow each other, each pair of columns multiplied as soon as it is decoded: a sum
// for each SUB columns. ``next(i)`` reads what stands before the codes of tile i and says where these are.
template <Codes CODES, int SUB, int TILES, class Next>
INLINE void dot_once(const Next& next, const Table& table, const std::uint16_t* x, Sixteen (*sums)[COLUMNS / SUB]) {
    static_assert(TILES == 1 || TILES == 2);
    if constexpr (decoded_whole(CODES, SUB)) {
        __m512i w[PAIRS];
        decode<CODES>(next(0), table, w);
        each_constant<COLUMNS / SUB>([&](auto part) __attribute__((always_inline)) {
            dot<decltype(part)::value * SUB, SUB, 1>(w, x, COLUMNS, &sums[0][decltype(part)::value]);
        });
        return;
    }
    const ByteTables<CODES> bytes(table);
    CodeLines<CODES, reads_in_order(CODES)> lines[TILES];
    read_lines(next, table, lines);
    UNROLL
    for (int tile = 0; tile < TILES; ++tile) {
        for (int part = 0; part < COLUMNS / SUB; ++part) sums[tile][part] = _mm512_setzero_ps();
    }
    each_constant<PAIRS / 4>([&](auto quad) __attribute__((always_inline)) {
        constexpr int QUAD = decltype(quad)::value;
        __m512i w[TILES][4];
        UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
            decode_quad<CODES, QUAD>(lines[tile], table, bytes, w[tile]);
        }
        UNROLL
        for (int i = 0; i < 4; ++i) {
            UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                std::int32_t two;
                std::memcpy(&two, x + tile * COLUMNS + (QUAD * 4 + i) * 2, sizeof two);
                Sixteen& sum = sums[tile][(QUAD * 4 + i) * 2 / SUB];
                sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w[tile][i]),
                                       reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)));
            }
        }
    });
}

#elif defined(__AVX2__)

// ---- AVX2: the same layout, decoded to floats ------------------------------------------------------------

// Integer tables are lines: their values need no lookup.
struct Table {
    alignas(32) float values[64];
    alignas(32) std::uint8_t low[32], high[32];  // bytes of the first 16 entries, twice
    bool line = true;
    const std::uint8_t* behind;  // vectors of grids: the low bytes of all, then the high ones
    explicit Table(const std::uint16_t* from) : behind(reinterpret_cast<const std::uint8_t*>(from + 64)) {
        for (int i = 0; i < 64; ++i) values[i] = bfloat_to_float(from[i]);
        for (int i = 0; i < 32; ++i) {
            low[i] = static_cast<std::uint8_t>(from[i % 16]);
            high[i] = static_cast<std::uint8_t>(from[i % 16] >> 8);
        }
        // Short tables repeat: the first four codes tell a line from nf4-like tables, the widths do the rest.
        for (int i = 1; i < 4; ++i) line = line && values[i] == values[0] + static_cast<float>(i);
    }
};

template <Codes CODES>
inline void expand_grid(const std::uint8_t* tile, const std::uint8_t* grid, std::uint8_t* planes);

struct Sixteen {
    __m256 low, high;
};
inline Sixteen sixteen_zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Sixteen sixteen_load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void sixteen_store(float* to, Sixteen x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
inline void sixteen_store_some(float* to, Sixteen x, int count) {
    float all[ROWS];
    sixteen_store(all, x);
    std::memcpy(to, all, static_cast<std::size_t>(count) * sizeof(float));
}
inline Sixteen sixteen_fma(Sixteen a, Sixteen b, Sixteen c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Sixteen sixteen_multiply(Sixteen a, Sixteen b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Sixteen sixteen_add(Sixteen a, Sixteen b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Sixteen sixteen_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline __m128i eight_shorts(const std::uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline Sixteen sixteen_f16(const std::uint8_t* from) {
    return {_mm256_cvtph_ps(eight_shorts(from)), _mm256_cvtph_ps(eight_shorts(from + 16))};
}
// To float16: to nearest, ties to even.
inline void sixteen_store_f16(std::uint16_t* to, Sixteen x) {
    auto* const eights = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(eights, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(eights + 1, _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
inline Sixteen sixteen_round_f16(Sixteen x) {
    const auto round = [](__m256 part) { return _mm256_cvtph_ps(_mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT)); };
    return {round(x.low), round(x.high)};
}
inline __m256 eight_bf16(__m128i shorts) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(shorts), 16));
}
inline Sixteen sixteen_bf16(const std::uint8_t* from) {
    return {eight_bf16(eight_shorts(from)), eight_bf16(eight_shorts(from + 16))};
}
inline __m256 eight_int8(const std::uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Sixteen sixteen_int8(const std::uint8_t* from) { return {eight_int8(from), eight_int8(from + 8)}; }
// FP8 in 32-bit lanes -> floats, subnormals included.
template <Codes CODES>
inline __m256 eight_byte_floats(__m256i codes) {
    const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi32(0x7f));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(0x80)), 24);
    __m256i special;  // bits beside those of the value, which are an infinity's or a NaN's then
    if constexpr (CODES == Codes::e4m3) {
        special = _mm256_and_si256(_mm256_cmpeq_epi32(low, _mm256_set1_epi32(0x7f)), _mm256_set1_epi32(0x7fc00000));
    } else if constexpr (CODES == Codes::e5m2) {
        const __m256i nan = _mm256_and_si256(_mm256_cmpgt_epi32(low, _mm256_set1_epi32(0x7c)), _mm256_set1_epi32(0x400000));
        const __m256i top = _mm256_and_si256(_mm256_cmpgt_epi32(low, _mm256_set1_epi32(0x7b)), _mm256_set1_epi32(0x7f800000));
        special = _mm256_or_si256(nan, top);
    } else {
        special = _mm256_and_si256(_mm256_cmpeq_epi32(codes, _mm256_set1_epi32(0x80)), _mm256_set1_epi32(0x7fc00000));
    }
    const __m256i placed = _mm256_slli_epi32(low, magnitude_shift(CODES));
    __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(placed), _mm256_set1_ps(magnitude_factor(CODES)));
    // 1.0 … 1.75 times 2^16: their mantissa would make an infinity a NaN.
    if constexpr (CODES == Codes::e5m2) {
        value = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(low, _mm256_set1_epi32(0x7b))), value);
    }
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_or_si256(_mm256_castps_si256(value), sign), special));
}
inline __m256 eight_e4m3(__m256i codes) { return eight_byte_floats<Codes::e4m3>(codes); }
// Sixteen whole numbers of 4 bits: the low halves of 8 bytes, then the high ones.
inline Sixteen sixteen_nibbles(const std::uint8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), mask = _mm_set1_epi8(15);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_and_si128(bytes, mask))),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask)))};
}
inline Sixteen sixteen_e4m3(const std::uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {eight_e4m3(_mm256_cvtepu8_epi32(bytes)), eight_e4m3(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

struct BfloatTile {
    alignas(32) float columns[COLUMNS][ROWS];
};
struct FloatTile {
    alignas(32) float columns[16][ROWS];
};

template <int COLUMN>
INLINE Sixteen column_of(const BfloatTile& w) {
    return sixteen_load(w.columns[COLUMN]);
}

// The codes of an operand and 8 rows, a byte each: of a row the first pair's even column, the second's, and their odd
// ones. ``at``: 32 for the second 8 rows.
template <Codes CODES, int OPERAND>
INLINE __m256i operand_codes(const std::uint8_t* tile, int at) {
    if constexpr (is_byte(CODES)) {
        const __m256i order =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
        const auto* const from = reinterpret_cast<const __m256i*>(tile + OPERAND * 64 + at);
        return _mm256_shuffle_epi8(_mm256_loadu_si256(from), order);
    }
    __m256i code = _mm256_setzero_si256();
    each_constant<plane_count(CODES)>([&](auto index) __attribute__((always_inline)) {
        constexpr Plane p = plane(CODES, decltype(index)::value);
        constexpr Field f = field(p, 0, pair_of(OPERAND, 0) * 2);
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + f.byte + at));
        const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << p.width) - 1) << p.shift));
        __m256i placed = words;
        if constexpr (f.shift > p.shift) placed = _mm256_srli_epi16(words, f.shift - p.shift);
        if constexpr (f.shift < p.shift) placed = _mm256_slli_epi16(words, p.shift - f.shift);
        code = _mm256_or_si256(code, _mm256_and_si256(placed, mask));
    });
    return code;
}

// What byte BYTE of every lane stands for.
template <Codes CODES, int BYTE>
INLINE __m256 byte_values(__m256i codes, const Table& table) {
    __m256i code = codes;
    if constexpr (BYTE < 3) code = _mm256_and_si256(_mm256_srli_epi32(codes, BYTE * 8), _mm256_set1_epi32(0xff));
    if constexpr (BYTE == 3) code = _mm256_srli_epi32(codes, 24);
    if constexpr (is_byte_float(CODES)) {
        return eight_byte_floats<CODES>(code);
    } else if constexpr (is_byte(CODES)) {
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(CODES == Codes::int8 ? 128 : 0)));
    } else {
        if (CODES == Codes::bits7 || table.line) {
            return _mm256_add_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(table.values[0]));
        }
        if constexpr (plane_count(CODES) > 1) return _mm256_i32gather_ps(table.values, code, 4);
        // Both bytes of a bfloat16; an index of 0x80 and more gives 0.
        const __m256i index = _mm256_or_si256(code, _mm256_set1_epi32(static_cast<int>(0x80808000u)));
        const __m256i low = _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table.low)), index);
        const __m256i high = _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table.high)), index);
        return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(low, 16), _mm256_slli_epi32(high, 24)));
    }
}

// Into memory, and so one function for all that multiply such codes.
template <Codes CODES>
__attribute__((noinline)) void decode(const std::uint8_t* tile, const Table& table, BfloatTile& w) {
    if constexpr (is_grid(CODES)) {
        alignas(32) std::uint8_t planes[tile_bytes(grid_of(CODES).planes())];
        expand_grid<CODES>(tile, table.behind, planes);
        decode<grid_of(CODES).planes()>(planes, table, w);
    } else if constexpr (CODES == Codes::bf16) {  // a 32-bit lane holds a row's even and odd column
        for (int pair = 0; pair < PAIRS; ++pair) {
            for (int half = 0; half < 2; ++half) {
                const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + pair * 64 + half * 32));
                const __m256i odd = _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
                _mm256_store_ps(&w.columns[pair * 2][half * 8], _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)));
                _mm256_store_ps(&w.columns[pair * 2 + 1][half * 8], _mm256_castsi256_ps(odd));
            }
        }
    } else {
        each_constant<OPERANDS>([&](auto index) __attribute__((always_inline)) {
            constexpr int OPERAND = decltype(index)::value, FIRST = 2 * pair_of(OPERAND, 0), SECOND = 2 * pair_of(OPERAND, 1);
            for (int half = 0; half < 2; ++half) {
                const __m256i codes = operand_codes<CODES, OPERAND>(tile, half * 32);
                _mm256_store_ps(&w.columns[FIRST][half * 8], byte_values<CODES, 0>(codes, table));
                _mm256_store_ps(&w.columns[SECOND][half * 8], byte_values<CODES, 1>(codes, table));
                _mm256_store_ps(&w.columns[FIRST + 1][half * 8], byte_values<CODES, 2>(codes, table));
                _mm256_store_ps(&w.columns[SECOND + 1][half * 8], byte_values<CODES, 3>(codes, table));
            }
        });
    }
}

template <Codes CODES>
INLINE void decode_floats(const std::uint8_t* tile, FloatTile& w) {
    UNROLL
    for (int column = 0; column < 16; ++column) {
        if constexpr (CODES == Codes::int8) {
            const int pair = column / 2, first = side_of(pair) * 8 + column % 2;  // of four rows in a lane
            const __m256i rows = _mm256_broadcastsi128_si256(
                _mm_setr_epi32(first | ~0xff, (first + 2) | ~0xff, (first + 4) | ~0xff, (first + 6) | ~0xff));
            for (int half = 0; half < 2; ++half) {
                const std::uint8_t* const from = tile + operand_of(pair) * 64 + half * 32;
                const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
                const __m256i codes = _mm256_sub_epi32(_mm256_shuffle_epi8(line, rows), _mm256_set1_epi32(128));
                _mm256_store_ps(&w.columns[column][half * 8], _mm256_cvtepi32_ps(codes));
            }
        } else if constexpr (CODES == Codes::f32) {
            std::memcpy(w.columns[column], tile + column * 64, 64);
        } else {
            sixteen_store(w.columns[column], sixteen_f16(tile + column * 32));
        }
    }
}

template <int FIRST, int COUNT, int TOKENS>
inline void dot(const BfloatTile& w, const std::uint16_t* x, std::int64_t stride, Sixteen* sums) {
    for (int t = 0; t < TOKENS; ++t) sums[t] = sixteen_zeros();
    for (int column = FIRST; column < FIRST + COUNT; ++column) {
        const Sixteen values = sixteen_load(w.columns[column]);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            sums[t] = sixteen_fma(values, sixteen_set(bfloat_to_float(x[t * stride + column])), sums[t]);
        }
    }
}

template <int TOKENS>
INLINE void dot_floats(const FloatTile& w, const float* x, std::int64_t stride, Sixteen* sums) {
    for (int t = 0; t < TOKENS; ++t) sums[t] = sixteen_zeros();
    UNROLL
    for (int column = 0; column < 16; ++column) {
        const Sixteen values = sixteen_load(w.columns[column]);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            sums[t] = sixteen_fma(values, sixteen_set(x[t * stride + column]), sums[t]);
        }
    }
}

#endif

}  // namespace lowbit

#if defined(__ARM_NEON)
#include "linear_tiles_neon.h"
#endif
#include "linear_grids.h"

#if !defined(__AVX512BF16__)

namespace lowbit {

constexpr bool tiles_in_turns(Codes, int) { return false; }

// One token times a tile: a sum for each SUB columns. ``next(0)`` reads what stands before its codes.
template <Codes CODES, int SUB, int TILES, class Next>
INLINE void dot_once(const Next& next, const Table& table, const std::uint16_t* x, Sixteen (*sums)[COLUMNS / SUB]) {
    static_assert(TILES == 1);
    BfloatTile w;
    decode<CODES>(next(0), table, w);
    each_constant<COLUMNS / SUB>([&](auto part) __attribute__((always_inline)) {
        dot<decltype(part)::value * SUB, SUB, 1>(w, x, COLUMNS, &sums[0][decltype(part)::value]);
    });
}

}  // namespace lowbit

#endif
