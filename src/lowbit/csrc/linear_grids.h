// Tiles of grid codes made tiles of planes, and single codes of them.
//
// A tile holds 64 or 128 vectors. Of 64, byte i of the first 64 bytes is the low 8 bits of vector i's index; further
// bits lie in planes of 8 bytes, a bit a vector, behind the low bytes of all. Looked up, a vector is a 16-bit word,
// its numbers the fields of a word of planes: words 0 to 31 (row * 2 + parity) of the lines of planes. Thus the two
// vectors of a row that a line holds stand where the columns of even and of odd number stood: column j of the first
// is the tile's column 2 j, column j of the second 2 j + 1, and x is laid out that way (InputShape::numbers).
#pragma once

#include "linear_tiles.h"

namespace lowbit {

// Where in a tile of planes the number of a logical column stands.
constexpr int grid_column(int numbers, int column) {
    return column / (2 * numbers) * (2 * numbers) + column % numbers * 2 + column / numbers % 2;
}

// The place of a vector among the indices of a tile: ``line`` of planes, then the word in it.
constexpr int grid_place(int line, int word) { return line / 2 * 64 + word / 8 * 16 + line % 2 * 8 + word % 8; }
inline int grid_place_of(const Grid& grid, int row, int column) {
    const int per_line = 2 * grid.numbers;
    return grid_place(column / per_line, row * 2 + column / grid.numbers % 2);
}

inline bool bit_at(const std::uint8_t* bits, int place) { return (bits[place / 8] >> (place % 8) & 1) != 0; }

inline unsigned grid_index(const Grid& grid, const std::uint8_t* tile, int place) {
    unsigned index = tile[place];
    for (int bit = 8; bit < grid.bits; ++bit) {
        const std::uint8_t* const plane = tile + grid.vectors() + (bit - 8) * grid.vectors() / 8;
        index |= static_cast<unsigned>(bit_at(plane, place)) << bit;
    }
    return index;
}

// Bytes in front of the signs, or the bits of vectors.
constexpr std::int64_t grid_tail(const Grid& grid) { return grid.vectors() / 8 * grid.bits; }

constexpr Plane sign_plane(const Grid& grid) { return plane(grid.planes(), 1); }
// Of a plane of one bit that starts the tail.
constexpr Field sign_field(const Grid& grid, int row, int column) {
    return field({1, 0, 0}, row, grid_column(grid.numbers, column));
}

// The index into the table of (row, column): a number, and above it the last bit.
inline unsigned read_grid_code(const std::uint8_t* tile, Codes codes, const std::uint8_t* words, int row, int column) {
    const Grid grid = grid_of(codes);
    const int place = grid_place_of(grid, row, column);
    const unsigned index = grid_index(grid, tile, place);
    const unsigned word = words[index] | static_cast<unsigned>(words[(1u << grid.bits) + index]) << 8;
    const Plane low = plane(grid.planes(), 0);
    const Field f = field(low, 0, column % grid.numbers * 2);
    const unsigned number = word >> f.shift & ((1u << low.width) - 1u);
    const std::uint8_t* const tail = tile + grid_tail(grid);
    const Field s = sign_field(grid, row, column);
    const bool last = grid.shifted ? bit_at(tail, place) : (tail[s.byte + s.shift / 8] >> (s.shift % 8) & 1) != 0;
    return number | static_cast<unsigned>(last) << sign_plane(grid).shift;
}

// ``from``: a byte a column: the last bit (of shifted grids the first column's counts), and above it 2 bits of the
// vector's index, or 3 where it has four numbers, low ones first.
inline void write_grid_codes(std::uint8_t* tile, Codes codes, int row, int columns, const std::uint8_t* from) {
    const Grid grid = grid_of(codes);
    const int share = grid.numbers == 8 ? 2 : 3;
    std::uint8_t* const tail = tile + grid_tail(grid);
    for (int column = 0; column < columns; ++column) {
        const bool last = (from[column] & 1) != 0;
        if (!grid.shifted) {
            const Field s = sign_field(grid, row, column);
            tail[s.byte + s.shift / 8] = static_cast<std::uint8_t>(tail[s.byte + s.shift / 8] | last << s.shift % 8);
        }
        if (column % grid.numbers != 0) continue;
        const int place = grid_place_of(grid, row, column);
        if (grid.shifted) tail[place / 8] = static_cast<std::uint8_t>(tail[place / 8] | last << place % 8);
        unsigned index = 0;
        for (int i = 0; i < grid.numbers; ++i) index |= static_cast<unsigned>(from[column + i] >> 1) << (i * share);
        tile[place] = static_cast<std::uint8_t>(index);
        for (int bit = 8; bit < grid.bits; ++bit) {
            std::uint8_t* const plane = tile + grid.vectors() + (bit - 8) * grid.vectors() / 8;
            plane[place / 8] = static_cast<std::uint8_t>(plane[place / 8] | (index >> bit & 1u) << place % 8);
        }
    }
}

#if defined(__AVX512BF16__)

// 64 lookups in 2^BITS bytes; ``high``: a mask for each bit of the indices above the eighth.
template <int BITS>
INLINE __m512i look_up_grid(const std::uint8_t* table, __m512i index, __mmask64 eighth, const __mmask64* high) {
    const auto load = [&](int part) { return _mm512_loadu_si512(table + part * 64); };
    constexpr int COUNT = 1 << (BITS - 8);
    __m512i found[COUNT];
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        found[i] = _mm512_mask_blend_epi8(eighth, _mm512_permutex2var_epi8(load(i * 4), index, load(i * 4 + 1)),
                                          _mm512_permutex2var_epi8(load(i * 4 + 2), index, load(i * 4 + 3)));
    }
    UNROLL
    for (int bit = 0; bit < BITS - 8; ++bit) {
        UNROLL
        for (int i = 0; i < COUNT; i += 2 << bit) {
            found[i] = _mm512_mask_blend_epi8(high[bit], found[i], found[i + (1 << bit)]);
        }
    }
    return found[0];
}

template <Codes CODES>
INLINE void expand_grid(const std::uint8_t* tile, const std::uint8_t* grid, __m512i* lines) {
    constexpr Grid GRID = grid_of(CODES);
    constexpr int VECTORS = GRID.vectors(), HIGH = GRID.bits - 8;
    UNROLL
    for (int first = 0; first < VECTORS; first += 64) {
        const __m512i index = _mm512_loadu_si512(tile + first);
        const __mmask64 eighth = _mm512_movepi8_mask(index);
        __mmask64 high[HIGH + 1];
        UNROLL
        for (int bit = 0; bit < HIGH; ++bit) {
            std::uint64_t mask;
            std::memcpy(&mask, tile + VECTORS + (bit * VECTORS + first) / 8, sizeof mask);
            high[bit] = mask;
        }
        const __m512i lower = look_up_grid<GRID.bits>(grid, index, eighth, high);
        const __m512i higher = look_up_grid<GRID.bits>(grid + (1 << GRID.bits), index, eighth, high);
        lines[first / 32] = _mm512_unpacklo_epi8(lower, higher);
        lines[first / 32 + 1] = _mm512_unpackhi_epi8(lower, higher);
    }
    const std::uint8_t* const tail = tile + grid_tail(GRID);
    if constexpr (GRID.shifted) {
        std::uint64_t mask;
        std::memcpy(&mask, tail, sizeof mask);
        const __m512i bits = _mm512_movm_epi8(mask);
        // Fields of line 0 are the low halves of a word's bytes, those of line 1 the high ones.
        lines[VECTORS / 32] = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), _mm512_unpacklo_epi8(bits, bits),
                                                        _mm512_unpackhi_epi8(bits, bits), 0xCA);
    } else {
        lines[VECTORS / 32] = _mm512_loadu_si512(tail);
    }
}

#else

template <Codes CODES>
inline void expand_grid(const std::uint8_t* tile, const std::uint8_t* grid, std::uint8_t* planes) {
    constexpr Grid GRID = grid_of(CODES);
    constexpr int VECTORS = GRID.vectors(), HIGH = GRID.bits - 8;
    constexpr unsigned COUNT = 1u << GRID.bits;
    const std::uint8_t* const tail = tile + grid_tail(GRID);
    for (int first = 0; first < VECTORS; first += 64) {
        std::uint64_t high[HIGH + 1] = {};
        for (int bit = 0; bit < HIGH; ++bit) {
            std::memcpy(&high[bit], tile + VECTORS + (bit * VECTORS + first) / 8, sizeof high[bit]);
        }
        std::uint64_t shifts = 0;
        if (GRID.shifted) std::memcpy(&shifts, tail, sizeof shifts);
        for (int place = 0; place < 64; ++place) {
            unsigned index = tile[first + place];
            for (int bit = 0; bit < HIGH; ++bit) index |= static_cast<unsigned>(high[bit] >> place & 1u) << (8 + bit);
            const int line = place / 8 % 2, word = place / 16 * 8 + place % 8;
            std::uint8_t* const to = planes + first * 2 + line * 64 + word * 2;
            to[0] = grid[index];
            to[1] = grid[COUNT + index];
            if constexpr (GRID.shifted) {
                const auto bits = static_cast<std::uint8_t>((shifts >> place & 1u) * (line == 0 ? 0x0fu : 0xf0u));
                std::uint8_t* const last = planes + VECTORS * 2 + word * 2;
                last[0] = static_cast<std::uint8_t>(line == 0 ? bits : last[0] | bits);
                last[1] = last[0];
            }
        }
    }
    if constexpr (!GRID.shifted) std::memcpy(planes + VECTORS * 2, tail, ROWS * COLUMNS / 8);
}

#endif

}  // namespace lowbit
