// Tiles of grid codes made tiles of planes, and single codes of them.
//
// A tile holds 64 or 128 vectors. Of 64, byte i of the first 64 bytes is the low 8 bits of vector i's index; further
// bits lie in planes of 8 bytes, a bit a vector, behind the low bytes of all. Looked up, a vector is a 16-bit word,
// its numbers the fields of a word of planes: words 0 to 31 (row * 2 + parity) of the lines of planes. Thus the two
// vectors of a row that a line holds stand where the columns of even and of odd number stood: column j of the first
// is the tile's column 2 j, column j of the second 2 j + 1, and x is laid out that way (InputShape::numbers).
//
// Of ``parity`` grids the bytes behind the indices are lines of signs, in an order of their own (parity_place).
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

// Where in the word of its row and parity the sign of a vector's number stands, ``second``: of the second line's. The
// places of operands 2 and 3 and those of 4 and 5 are exchanged, as expand_grid wants them.
constexpr int parity_place(int number, int second) {
    return side_of(number) * 8 + operand_of(number) / 2 * 4 + operand_of(number) % 2 + second * 2;
}

// The sign and above it the vector's own bit.
inline unsigned parity_bits(const std::uint8_t* signs, int row, int column) {
    const int number = column % 8, second = column / 16;
    std::uint16_t word;
    std::memcpy(&word, signs + (row * 2 + column / 8 % 2) * 2, sizeof word);
    unsigned odd = 0;
    for (int i = 0; i < 8; ++i) odd ^= static_cast<unsigned>(word) >> parity_place(i, second) & 1u;
    return ((static_cast<unsigned>(word) >> parity_place(number, second) & 1u) ^ (number == 0 ? odd : 0u)) | odd << 1;
}

// The index into the table of (row, column): a number, and above it the last bit.
inline unsigned read_grid_code(const std::uint8_t* tile, Codes codes, const std::uint8_t* words, int row, int column) {
    const Grid grid = grid_of(codes);
    const int place = grid_place_of(grid, row, column);
    const unsigned index = grid_index(grid, tile, place);
    const unsigned word = words[index] | static_cast<unsigned>(words[(1u << grid.bits) + index]) << 8;
    const Plane low = grid.parity ? Plane{2, 0, 0} : plane(grid.planes(), 0);
    const Field f = field(low, 0, column % grid.numbers * 2);
    const unsigned number = word >> f.shift & ((1u << low.width) - 1u);
    const std::uint8_t* const tail = tile + grid_tail(grid);
    if (grid.parity) return number | parity_bits(tail, row, column) << 2;
    const Field s = sign_field(grid, row, column);
    const bool last = grid.shifted ? bit_at(tail, place) : (tail[s.byte + s.shift / 8] >> (s.shift % 8) & 1) != 0;
    return number | static_cast<unsigned>(last) << sign_plane(grid).shift;
}

// ``from``: a byte a column: the last bit (of shifted grids the first column's counts), and above it 2 bits of the
// vector's index, or 3 where it has four numbers, low ones first. Grids of ``parity`` are packed by kernels/cpu_lattice.py.
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

#if defined(LOWBIT_AVX512)

// The bits of 64 indices from the eighth on, a mask each.
using IndexMasks = __mmask64[4];

// 64 lookups of each tile in 2^BITS bytes.
template <int BITS, int TILES>
INLINE void look_up_grid(const std::uint8_t* table, const __m512i (&index)[TILES], const IndexMasks (&masks)[TILES],
                         __m512i (&found)[TILES]) {
    if constexpr (BITS == 8) {
        __m512i a = _mm512_loadu_si512(table), b = _mm512_loadu_si512(table + 64);
        __m512i c = _mm512_loadu_si512(table + 128), d = _mm512_loadu_si512(table + 192);
        if constexpr (TILES > 1) asm volatile("" : "+" ZMM(a), "+" ZMM(b), "+" ZMM(c), "+" ZMM(d));  // read once for all tiles
        UNROLL
        for (int t = 0; t < TILES; ++t) {
            found[t] = _mm512_mask_blend_epi8(masks[t][0], _mm512_permutex2var_epi8(a, index[t], b),
                                              _mm512_permutex2var_epi8(c, index[t], d));
        }
    } else {
        __m512i upper[TILES];
        look_up_grid<BITS - 1, TILES>(table, index, masks, found);
        look_up_grid<BITS - 1, TILES>(table + (1 << (BITS - 1)), index, masks, upper);
        UNROLL
        for (int t = 0; t < TILES; ++t) found[t] = _mm512_mask_blend_epi8(masks[t][BITS - 8], found[t], upper[t]);
    }
}

// Bits of every byte: those of ``mask`` change places with those ``by`` higher.
INLINE __m512i exchanged(__m512i x, int mask, unsigned by) {
    const __m512i which = _mm512_set1_epi8(static_cast<char>(mask));
    // (x >> by ^ x) & which
    const __m512i changed = _mm512_ternarylogic_epi32(_mm512_srli_epi16(x, by), x, which, 0x28);
    return _mm512_ternarylogic_epi32(x, changed, _mm512_slli_epi16(changed, by), 0x96);
}

// The tiles' codes as words of nibbles, numbers with the last bit above them: of 8 columns each, where a pair and the one
// two further stand in the same nibble of a word's two bytes. Lines of numbers of 2 bits hold every second operand.
template <Codes CODES, int TILES>
INLINE void expand_grid(const std::uint8_t* const (&tiles)[TILES], const std::uint8_t* grid,
                        __m512i (&nibbles)[TILES][OPERANDS / 2]) {
    constexpr Grid GRID = grid_of(CODES);
    constexpr int VECTORS = GRID.vectors(), HIGH = GRID.bits - 8, LINES = VECTORS / 32;
    __m512i lines[TILES][LINES];
    UNROLL
    for (int first = 0; first < VECTORS; first += 64) {
        __m512i index[TILES], lower[TILES], higher[TILES];
        IndexMasks masks[TILES];
        UNROLL
        for (int t = 0; t < TILES; ++t) {
            index[t] = _mm512_loadu_si512(tiles[t] + first);
            masks[t][0] = _mm512_movepi8_mask(index[t]);
            UNROLL
            for (int bit = 0; bit < HIGH; ++bit) {
                std::uint64_t mask;
                std::memcpy(&mask, tiles[t] + VECTORS + (bit * VECTORS + first) / 8, sizeof mask);
                masks[t][1 + bit] = mask;
            }
        }
        look_up_grid<GRID.bits, TILES>(grid, index, masks, lower);
        look_up_grid<GRID.bits, TILES>(grid + (1 << GRID.bits), index, masks, higher);
        UNROLL
        for (int t = 0; t < TILES; ++t) {
            lines[t][first / 32] = _mm512_unpacklo_epi8(lower[t], higher[t]);
            lines[t][first / 32 + 1] = _mm512_unpackhi_epi8(lower[t], higher[t]);
        }
    }
    const __m512i last = _mm512_set1_epi8(GRID.numbers == 8 ? 0x44 : static_cast<char>(0x88));
    UNROLL
    for (int t = 0; t < TILES; ++t) {
        const std::uint8_t* const tail = tiles[t] + grid_tail(GRID);
        if constexpr (GRID.shifted) {
            std::uint64_t mask;
            std::memcpy(&mask, tail, sizeof mask);
            const __m512i bits = _mm512_movm_epi8(mask);
            const __m512i of_line[2] = {_mm512_unpacklo_epi8(bits, bits), _mm512_unpackhi_epi8(bits, bits)};
            UNROLL
            for (int i = 0; i < 4; ++i) {
                nibbles[t][i] = chosen_bits(last, of_line[i / 2], shifted(lines[t][i / 2], i % 2 * 2));
            }
        } else if constexpr (GRID.parity) {
            const __m512i own = _mm512_loadu_si512(tail), nibble = _mm512_set1_epi8(0x0F);
            // Both bytes of a word, then both nibbles: two bits are left of the first line's vector, two of the second's.
            __m512i odd = _mm512_ternarylogic_epi32(own, _mm512_srli_epi16(own, 8), _mm512_slli_epi16(own, 8), 0x96);
            odd = _mm512_ternarylogic_epi32(_mm512_srli_epi16(odd, 4), odd, nibble, 0x28);
            const __m512i of_line[2] = {_mm512_shuffle_epi8(_mm512_set1_epi32(0x00FFFF00), odd),
                                        _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_setr_epi32(0, -1, -1, 0)), odd)};
            // The first numbers' signs: own ^ (of_line & bit)
            __m512i signs = _mm512_ternarylogic_epi32(own, of_line[0], _mm512_set1_epi16(1), 0x78);
            signs = _mm512_ternarylogic_epi32(signs, of_line[1], _mm512_set1_epi16(4), 0x78);
            UNROLL
            for (int i = 0; i < 4; ++i) {
                const __m512i words = chosen_bits(last, shifted(signs, i - 2), shifted(lines[t][i / 2], i % 2 * 2));
                nibbles[t][i] = chosen_bits(_mm512_set1_epi8(static_cast<char>(0x88)), of_line[i / 2], words);
            }
        } else if constexpr (GRID.numbers == 8) {
            // Operands 0, 1, 4, 5, 2, 3, 6, 7: a line's two stand as far apart as their nibbles.
            const __m512i signs = exchanged(_mm512_loadu_si512(tail), 0x0C, 2);
            UNROLL
            for (int i = 0; i < 4; ++i) {
                nibbles[t][i] = chosen_bits(last, shifted(signs, i - 2), shifted(lines[t][i / 2], i % 2 * 2));
            }
        } else {
            // Operands 0, 2, 4, 6, 1, 3, 5, 7.
            const __m512i signs = exchanged(exchanged(_mm512_loadu_si512(tail), 0x22, 1), 0x0C, 2);
            UNROLL
            for (int i = 0; i < 4; ++i) nibbles[t][i] = chosen_bits(last, shifted(signs, i - 3), lines[t][i]);
        }
    }
}

#else

// Words of numbers of 2 bits become nibbles, two operands a line.
inline void expand_parity(const std::uint8_t* tile, const std::uint8_t* grid, std::uint8_t* planes) {
    constexpr int WORDS = ROWS * 2;
    std::uint16_t numbers[2][WORDS], signs[WORDS], to[4][WORDS];
    for (int line = 0; line < 2; ++line) {
        for (int word = 0; word < WORDS; ++word) {
            const unsigned index = tile[grid_place(line, word)];
            numbers[line][word] = static_cast<std::uint16_t>(grid[index] | grid[256 + index] << 8);
        }
    }
    std::memcpy(signs, tile + 64, sizeof signs);
    for (int line = 0; line < 2; ++line) {
        for (int word = 0; word < WORDS; ++word) {
            const unsigned own = static_cast<unsigned>(signs[word]) >> line * 2 & 0x3333u;
            unsigned odd = own ^ own >> 8;
            odd ^= odd >> 4;
            odd = (odd ^ odd >> 1) & 1u;
            const unsigned turned = own ^ odd, bit = odd * 0x8888u;
            for (int half = 0; half < 2; ++half) {
                const unsigned n = static_cast<unsigned>(numbers[line][word]) >> half * 4, s = turned >> half * 4;
                const unsigned nibbles = (n & 0x0303u) | (n & 0x0C0Cu) << 2 | (s & 0x0101u) << 2 | (s & 0x0202u) << 5 | bit;
                to[line * 2 + half][word] = static_cast<std::uint16_t>(nibbles);
            }
        }
    }
    std::memcpy(planes, to, sizeof to);
}

template <Codes CODES>
inline void expand_grid(const std::uint8_t* tile, const std::uint8_t* grid, std::uint8_t* planes) {
    constexpr Grid GRID = grid_of(CODES);
    constexpr int VECTORS = GRID.vectors(), HIGH = GRID.bits - 8;
    constexpr unsigned COUNT = 1u << GRID.bits;
    const std::uint8_t* const tail = tile + grid_tail(GRID);
    if constexpr (GRID.parity) return expand_parity(tile, grid, planes);
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
