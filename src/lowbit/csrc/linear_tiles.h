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
// values up. ``row_vectors``: indices of vectors of several rows (linear_row_vectors.h). ``words4``: as bits4, with a
// table of whole numbers of 13 bits for values that bfloat16 would round (nf4); see linear_words.h. ``grid…``, ``e8p``:
// an index for 8 or 4 columns of a row; see Grid.
enum class Codes : std::int32_t {
    bits1 = 1, bits2 = 2, bits3 = 3, bits4 = 4, bits5 = 5, bits6 = 6, bits7 = 7,
    int8 = 8, uint8 = 9, e4m3 = 10, e5m2 = 11, e4m3fnuz = 12, e5m2fnuz = 13, words4 = 14,
    bf16 = 16, f16 = 17, grid2_256 = 20, grid2_512 = 21, grid2_1024 = 22, grid1_2048 = 23, grid3_256 = 24, grid3_512 = 25,
    e8p = 26, e8p_pair = 27,
    f32 = 32, row_vectors = 40
};

// Indices of vectors of codebooks: a vector is ``length`` columns of a row (2 to 32), a weight the sum of what each of
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
    return {number >> 8 & 255, number >> 3 & 31, 2 << (number & 7)};
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
constexpr bool is_float(Codes codes) { return codes == Codes::f16 || codes == Codes::f32; }

constexpr bool is_byte_float(Codes codes) { return codes >= Codes::e4m3 && codes <= Codes::e5m2fnuz; }
constexpr bool is_byte(Codes codes) { return codes == Codes::int8 || codes == Codes::uint8 || is_byte_float(codes); }

// Codes of several columns at once (GGUF's IQ1 to IQ3): an index of ``bits`` bits says which vector of a table 8
// columns of a row hold, numbers of 2 bits, or 4 columns, of 3. Beside it stands a bit for each number, its sign; or
// where ``shifted`` one for each vector. A tile is first made one of bits3 (``numbers`` = 8) or bits5, whose last bit
// is that bit: linear_grids.h. Where ``parity`` (QuIP#'s E8P) there are both, in the room of the signs: whether their
// count is odd is the vector's own bit, and turns the first number's sign. Such a tile is made one of bits4: a number, its
// sign and the vector's bit. ``books``: tiles that stand for one together, a number of each added up.
struct Grid {
    int bits, numbers;
    bool shifted, parity = false;
    int books = 1;
    constexpr int vectors() const { return ROWS * COLUMNS / numbers; }  // of a tile
    constexpr Codes planes() const { return parity ? Codes::bits4 : numbers == 8 ? Codes::bits3 : Codes::bits5; }
    constexpr std::int64_t bytes() const {
        return books * (vectors() / 8 * bits + (shifted ? vectors() / 8 : ROWS * COLUMNS / 8));
    }
};
constexpr bool is_grid(Codes codes) { return codes >= Codes::grid2_256 && codes <= Codes::e8p_pair; }
constexpr Grid grid_of(Codes codes) {
    switch (codes) {
        case Codes::grid2_256: return {8, 8, false};
        case Codes::grid2_512: return {9, 8, false};
        case Codes::grid2_1024: return {10, 8, false};
        case Codes::grid1_2048: return {11, 8, true};
        case Codes::grid3_256: return {8, 4, false};
        case Codes::e8p: return {8, 8, false, true};
        case Codes::e8p_pair: return {8, 8, false, true, 2};
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
        case Codes::e8p:
        case Codes::e8p_pair: return grid_of(codes).bytes();
        case Codes::words4: return ROWS * COLUMNS / 2;
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
    const bool two = codes == Codes::bits3 || codes == Codes::bits5 || codes == Codes::bits6;
    return two ? 2 : 1;
}
constexpr Plane plane(Codes codes, int index) {
    switch (codes) {
        case Codes::bits1: return {1, 0, 0};
        case Codes::bits2: return {2, 0, 0};
        case Codes::bits3: return index == 0 ? Plane{2, 0, 0} : Plane{1, 2, 128};
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

}  // namespace lowbit

#if defined(LOWBIT_AVX512)
#include "linear_tiles_avx512.h"
#elif defined(__AVX2__)
#include "linear_tiles_avx2.h"
#else
#include "linear_tiles_neon.h"
#endif
#include "linear_grids.h"

#if !defined(LOWBIT_AVX512)

namespace lowbit {

constexpr bool tiles_in_turns(Codes, int) { return false; }

// One token times a tile: a sum for each SUB columns. ``next(0)`` reads what stands before its codes.
template <Codes CODES, int SUB, int TILES, class Next>
INLINE void dot_once(const Next& next, const Table& table, const Bfloat16* x, Sixteen (*sums)[COLUMNS / SUB]) {
    static_assert(TILES == 1);
    BfloatTile w;
    decode<CODES>(next(0), table, w);
    each_constant<COLUMNS / SUB>([&](auto part) __attribute__((always_inline)) {
        dot<decltype(part)::value * SUB, SUB, 1>(w, x, COLUMNS, &sums[0][decltype(part)::value]);
    });
}

}  // namespace lowbit

#endif
