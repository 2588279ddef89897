// Tiles of indices into codebooks of vectors (AQLM, HIGGS).
//
// A tile holds, codebook by codebook and vector by vector of a row, the indices of its 16 rows, one or two bytes each:
// rows 0, 4, 8, 12, then 1, 5, 9, 13 and so on. What 8 columns of four rows hold then fills a register that turns into
// operands of 16 rows by 2 columns within its 128-bit lanes. Tiles that share 16 scales follow them.
//
// Vectors of 2 or 4 columns are numbered by one byte, in one codebook. It has 256, zeros where there are fewer, and behind
// them stand the numbers' bytes once more: the first bytes of all vectors' first columns, the second ones, and so on. Four
// vectors' indices lie together: of rows 0 to 3 those of the first vector, of the second and so on, then of rows 4 to 7.
// Their numbers' bytes, looked up for all 64 and interleaved within 128-bit lanes, are operands in order of rows.
//
// The table's numbers are whole, of 16 bits: a codebook's over a factor that all share, chosen so that no sum of the
// codebooks' numbers passes 16 bits and no sum of 32 columns, times x of 15 bits, passes 32 (kernels/cpu_vectors.py).
// Sums are exact, so that one token may be summed in another order than many.
#pragma once

#include "linear_layout.h"

namespace lowbit {

constexpr int LONGEST_SHORT = 4;
constexpr int VECTORS_TOGETHER = 4;  // short ones
// Among the indices of as many short vectors of 16 rows.
constexpr int short_place(int row, int vector) { return row / 4 * ROWS + vector * 4 + row % 4; }

// Among the indices of a tile.
inline int vector_place(const Vectors& vectors, int book, int row, int column) {
    const int vector = column / vectors.length;
    if (vectors.length > LONGEST_SHORT) return (book * vectors.of_row() + vector) * ROWS + row % 4 * 4 + row / 4;
    return vector / VECTORS_TOGETHER * VECTORS_TOGETHER * ROWS + short_place(row, vector % VECTORS_TOGETHER);
}

template <int BYTES>
INLINE std::size_t vector_index(const std::uint8_t* indices, int place) {
    if constexpr (BYTES == 1) return indices[place];
    std::uint16_t index;
    std::memcpy(&index, indices + place * 2, sizeof index);
    return index;
}

// The number of (row, column) of a tile.
inline int vector_word(const Vectors& vectors, const std::uint8_t* tile, const std::uint16_t* table, int row, int column) {
    int sum = 0;
    for (int book = 0; book < vectors.books; ++book) {
        const int place = vector_place(vectors, book, row, column);
        const std::size_t index = vectors.index_bytes() == 1 ? vector_index<1>(tile, place) : vector_index<2>(tile, place);
        const std::size_t vector = (static_cast<std::size_t>(book) << vectors.bits) + index;
        const std::size_t length = static_cast<std::size_t>(vectors.length);
        sum += static_cast<std::int16_t>(table[vector * length + static_cast<std::size_t>(column) % length]);
    }
    return sum;
}

}  // namespace lowbit
