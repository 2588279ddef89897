// How GGUF blocks hold codes and scales, and how ggml rounds to whole numbers.
#pragma once

#include "vector16.h"

#include <cstdint>
#include <cstring>

namespace lowbit {
namespace {

inline void put_half(std::uint8_t* to, std::uint16_t bits) { std::memcpy(to, &bits, sizeof bits); }

// Elements l, l + 32, l + 64, l + 96 of a 128-chunk share byte l.
void pack_two_bits(const std::uint8_t* codes, std::uint8_t* packed) {
    for (int chunk = 0; chunk < 2; ++chunk, codes += 128, packed += 32) {
        for (int l = 0; l < 32; ++l) {
            packed[l] = static_cast<std::uint8_t>((codes[l] & 3) | (codes[l + 32] & 3) << 2 |
                                                  (codes[l + 64] & 3) << 4 | (codes[l + 96] & 3) << 6);
        }
    }
}

void pack_nibbles(const std::uint8_t* codes, int half, std::uint8_t* packed) {  // e_j | e_{j+half} << 4
    for (int j = 0; j < half; ++j) {
        packed[j] = static_cast<std::uint8_t>((codes[j] & 15) | (codes[j + half] & 15) << 4);
    }
}

// As nearest_between, without limits.
inline int nearest(float value) {
    const float shifted = value + 12582912.0f;
    std::int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return (bits & 0x7FFFFF) - 0x400000;
}

}  // namespace
}  // namespace lowbit
