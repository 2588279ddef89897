// Tiles of trellises (EXL3): a weight is what a code book makes of 16 bits of a stream, its own K bits and those before.
//
// A tile is two of the file's, of 16 inputs each, one behind the other. The stream of one is a ring of 8 chunks of 4 K
// bytes; chunk c has the numbers of rows c and c + 8, in turns of four: columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of row
// c, then of row c + 8, for q = 0 to 3. A tile holds the first byte of every chunk, the second of every chunk and so on
// (*planes* of 8 bytes): 64 bytes that follow each other turn into what 8 chunks have in a row, 64 bits each, and those
// are the windows of four columns of 16 rows. Sums lie as these do: row c in lane 2 c, row c + 8 in the next.
//
// Numbers are float16: two halves of a product, added. As whole numbers of 14 bits, over 2^11, they are that sum rounded
// once, before float16 would round it; of ``mul1``, whose numbers are a line in the sum of four bytes, points of the line.
// Sums of 32 columns, times x of 14 bits, are exact, so that one token may be summed in another order than many.
#pragma once

#include "linear_layout.h"

namespace lowbit {

constexpr int CHUNKS = 8;

struct BookNumbers {
    std::uint32_t times, plus;  // 16 bits times, plus this, is what is cut into halves or bytes
    float factor;               // of the whole numbers
};
constexpr BookNumbers numbers_of(TrellisBook book) {
    switch (book) {
        case TrellisBook::mcg: return {0xCBAC1FEDu, 0, 0x1p-11f};
        case TrellisBook::mul1: return {0x83DCD12Du, 0, 0.00676727294921875f / 15.0f};
        default: return {89226354u, 64248484u, 0x1p-11f};
    }
}

// mul1: LINE_TIMES times the sum of the bytes, less this; the line's zero lies at a sum of 510.268.
constexpr int LINE_TIMES = 15, LINE_ZERO = 7654;

// The 16 bits of (row, column) of a tile.
inline std::uint32_t trellis_window(int bits, const std::uint8_t* tile, int row, int column) {
    const int i = column % 16, number = i % 8 / 2 * 8 + i % 2 + i / 8 * 2 + row / 8 * 4;
    const int end = bits * (number + 1), last = (end - 1) / 8;
    const std::uint8_t* const planes = tile + column / 16 * 32 * bits;
    std::uint32_t found = 0;
    for (int plane = last - 2; plane <= last; ++plane) {
        const int place = plane < 0 ? (plane + 4 * bits) * 8 + (row + 7) % 8 : plane * 8 + row % 8;
        found = found << 8 | planes[place];
    }
    return found >> ((last + 1) * 8 - end) & 0xFFFFu;
}

// The float16 that a code book has for 16 bits.
inline float trellis_number(TrellisBook book, std::uint32_t window) {
    const std::uint32_t product = window * numbers_of(book).times + numbers_of(book).plus;
    if (book == TrellisBook::mul1) {
        const std::uint32_t sum = (product & 255u) + (product >> 8 & 255u) + (product >> 16 & 255u) + (product >> 24);
        return half_to_float(float_to_half(static_cast<float>(1024 + sum) * 0.00676727294921875f - 10.3828125f));
    }
    const std::uint32_t halves = (product & 0x8FFF8FFFu) ^ 0x3B603B60u;
    const float low = half_to_float(static_cast<std::uint16_t>(halves));
    return half_to_float(float_to_half(low + half_to_float(static_cast<std::uint16_t>(halves >> 16))));
}

}  // namespace lowbit
