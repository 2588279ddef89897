// Tiles of grid codes as whole numbers of a byte, in AVX2 registers: vectors are looked up as they are, eight rows of
// them turned into operands, and signs put on. Included by linear_words.h.
#pragma once

#include "linear_grids.h"

namespace lowbit {

constexpr int MOST_GRID_VECTORS = 1 << 11;

// A grid's vectors, of numbers of a byte in the order of operands (a pair of columns, and the pair two further). ``shift``
// is added to each number, or subtracted where a vector's own bit is set.
struct GridVectors {
    alignas(64) std::uint8_t vectors[MOST_GRID_VECTORS * 8 + 16];  // and what is read beyond the last
    std::int8_t shift;
};

// Of what codes are worth and a grid's vectors as Table::behind has them; made once. linear_words.cpp
const GridVectors* grid_vectors(Codes codes, const int (&values)[32], const std::uint8_t* behind);

// 32 bits, each a byte of 0 or 255.
INLINE __m256i spread_bits(const std::uint8_t* from) {
    std::uint32_t bits;
    std::memcpy(&bits, from, sizeof bits);
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte);
    return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
}

// BITS bits of a register from ``first`` on. Between its ends the compiler takes three instructions for that, up to 128 times
// a tile; this one is BMI1's, which every processor with BMI2 has.
template <int BITS>
INLINE std::size_t bits_at(std::uint64_t from, int first) {
    if (first == 0 || first + BITS == 64) return static_cast<std::size_t>(from >> first & ((1u << BITS) - 1));
    std::uint64_t bits;
    asm("bextr %2, %1, %0" : "=r"(bits) : "r"(from), "r"(static_cast<std::uint64_t>(first | BITS << 8)) : "cc");
    return bits;
}

// The indices of a tile. Those of more than 8 bits are made words, in memory: read there as soon as they were written they
// would take as long again as all else, so it is done a tile ahead.
template <Codes CODES>
class GridIndices {
    static constexpr Grid GRID = grid_of(CODES);
    static constexpr bool BYTES = GRID.bits == 8;

  public:
    INLINE void read(const std::uint8_t* tile) {
        if constexpr (BYTES) return;
        for (int first = 0; first < GRID.vectors(); first += 32) {
            const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + first));
            __m256i high = _mm256_setzero_si256();
            UNROLL
            for (int bit = 0; bit < GRID.bits - 8; ++bit) {
                const __m256i set = spread_bits(tile + GRID.vectors() + (bit * GRID.vectors() + first) / 8);
                high = _mm256_or_si256(high, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(1 << bit))));
            }
            auto* const to = reinterpret_cast<__m256i*>(words_ + first);
            _mm256_store_si256(to, _mm256_unpacklo_epi8(low, high));
            _mm256_store_si256(to + 1, _mm256_unpackhi_epi8(low, high));
        }
        asm volatile("" : "+m"(words_));  // else they are taken out of registers, which takes longer
    }

    // Of row word / 2 of 8 its first vector in a line, or its second. ``tile``: that which was read. Out of eight bytes at
    // once: loads are what there is most of.
    INLINE std::size_t at(const std::uint8_t* tile, int half, int line, int word) const {
        constexpr int BITS = BYTES ? 8 : 16, TOGETHER = 64 / BITS;
        const int first = word / TOGETHER * TOGETHER;
        std::uint64_t several;
        if constexpr (BYTES) std::memcpy(&several, tile + grid_place(line, half * 16 + first), sizeof several);
        else std::memcpy(&several, words_ + line / 2 * 64 + half * 32 + line % 2 * 16 + first, sizeof several);
        return bits_at<BITS>(several, (word - first) * BITS);
    }

  private:
    alignas(32) std::uint16_t words_[BYTES ? 1 : GRID.vectors()];
};

template <Codes CODES>
struct GridTile {
    const std::uint8_t* codes;
    const GridIndices<CODES>& indices;
};

INLINE __m256i both_halves(__m128i low, __m128i high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// The operands of 8 rows in a line. index(word): of row word / 2 its first vector, or its second.
template <int NUMBERS, class Index>
INLINE void look_up_rows(const GridVectors& grid, const Index& index, __m256i (&found)[NUMBERS / 2]) {
    const auto row = [&](int i) __attribute__((always_inline)) {
        const std::uint8_t* const first = grid.vectors + index(2 * i) * NUMBERS;
        const std::uint8_t* const second = grid.vectors + index(2 * i + 1) * NUMBERS;
        __m128i lower;
        if constexpr (NUMBERS == 8) lower = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(first));
        else {
            std::int32_t four;
            std::memcpy(&four, first, sizeof four);
            lower = _mm_cvtsi32_si128(four);
        }
        return _mm_unpacklo_epi16(lower, _mm_loadu_si128(reinterpret_cast<const __m128i*>(second)));
    };
    if constexpr (NUMBERS == 8) {
        const __m256i rows[4] = {both_halves(row(0), row(4)), both_halves(row(1), row(5)), both_halves(row(2), row(6)),
                                 both_halves(row(3), row(7))};
        const __m256i a = _mm256_unpacklo_epi32(rows[0], rows[1]), b = _mm256_unpacklo_epi32(rows[2], rows[3]);
        const __m256i c = _mm256_unpackhi_epi32(rows[0], rows[1]), d = _mm256_unpackhi_epi32(rows[2], rows[3]);
        found[0] = _mm256_unpacklo_epi64(a, b);
        found[1] = _mm256_unpackhi_epi64(a, b);
        found[2] = _mm256_unpacklo_epi64(c, d);
        found[3] = _mm256_unpackhi_epi64(c, d);
    } else {
        const auto rows = [&](int i) __attribute__((always_inline)) { return _mm_unpacklo_epi32(row(i), row(i + 1)); };
        const __m256i a = both_halves(rows(0), rows(4)), b = both_halves(rows(2), rows(6));
        found[0] = _mm256_unpacklo_epi64(a, b);
        found[1] = _mm256_unpackhi_epi64(a, b);
    }
}

// What stands beside 8 rows' indices: signs of numbers, bits of vectors.
template <Codes CODES>
struct GridBits {
    static constexpr Grid GRID = grid_of(CODES);

    INLINE GridBits(const std::uint8_t* tile, int half, const GridVectors& grid) {
        const __m256i one = _mm256_set1_epi8(1), shift = _mm256_set1_epi8(grid.shift);
        const std::uint8_t* const tail = tile + grid_tail(GRID);
        if constexpr (GRID.shifted) {
            const __m256i set = _mm256_or_si256(spread_bits(tail + half * 4), one);
            added[0] = _mm256_sign_epi8(shift, _mm256_unpacklo_epi8(set, set));
            added[1] = _mm256_sign_epi8(shift, _mm256_unpackhi_epi8(set, set));
            return;
        }
        signs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tail + half * 32));
        if constexpr (GRID.parity) {
            // Both bytes of a word, then both nibbles: two bits are left of the first line's vector, two of the second's.
            const __m256i own = signs;
            __m256i odd = _mm256_xor_si256(own, _mm256_or_si256(_mm256_srli_epi16(own, 8), _mm256_slli_epi16(own, 8)));
            odd = _mm256_and_si256(_mm256_xor_si256(odd, _mm256_srli_epi16(odd, 4)), _mm256_set1_epi8(0x0F));
            const __m256i of_line[2] = {
                _mm256_shuffle_epi8(_mm256_set1_epi32(0x00FFFF00), odd),
                _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_setr_epi32(0, -1, -1, 0)), odd)};
            UNROLL
            for (int line = 0; line < 2; ++line) {
                const __m256i first = _mm256_set1_epi16(1 << parity_place(0, line));  // whose sign the vector's bit turns
                signs = _mm256_xor_si256(signs, _mm256_and_si256(of_line[line], first));
                added[line] = _mm256_sign_epi8(shift, _mm256_or_si256(of_line[line], one));
            }
        }
        signs_and_one = _mm256_or_si256(signs, one);
    }

    // Numbers as they are in the weight.
    template <int OPERAND>
    INLINE __m256i put(__m256i numbers) const {
        constexpr int OF_LINE = GRID.numbers / 2, LINE = OPERAND / OF_LINE;
        if constexpr (!GRID.shifted) {
            constexpr int PLACE = GRID.parity ? parity_place(pair_of(OPERAND % OF_LINE, 0), LINE) : OPERAND;
            // The sign in the uppermost bit, and some bit is set.
            const __m256i one = _mm256_set1_epi8(1), placed = _mm256_slli_epi16(PLACE == 0 ? signs : signs_and_one, 7 - PLACE);
            numbers = _mm256_sign_epi8(numbers, PLACE == 0 ? _mm256_or_si256(placed, one) : placed);
        }
        if constexpr (GRID.shifted || GRID.parity) numbers = _mm256_add_epi8(numbers, added[LINE]);
        return numbers;
    }

    __m256i signs, signs_and_one, added[2];
};

// The operands of 8 rows in a line, signs still to be put on.
template <Codes CODES>
INLINE void look_up_half(const GridTile<CODES>& tile, int half, int line, const GridVectors& grid,
                         __m256i (&found)[grid_of(CODES).numbers / 2]) {
    const auto index = [&](int word) __attribute__((always_inline)) { return tile.indices.at(tile.codes, half, line, word); };
    look_up_rows<grid_of(CODES).numbers>(grid, index, found);
}

// each(operand, numbers of 8 rows, of the other 8).
template <Codes CODES, class Each>
INLINE void each_grid_operand(const GridTile<CODES>& tile, const GridVectors& grid, const Each& each) {
    constexpr int OF_LINE = grid_of(CODES).numbers / 2;
    const GridBits<CODES> bits[2] = {{tile.codes, 0, grid}, {tile.codes, 1, grid}};
    each_constant<OPERANDS / OF_LINE>([&](auto line) __attribute__((always_inline)) {
        constexpr int LINE = decltype(line)::value;
        __m256i found[2][OF_LINE];
        UNROLL
        for (int half = 0; half < 2; ++half) look_up_half(tile, half, LINE, grid, found[half]);
        each_constant<OF_LINE>([&](auto number) __attribute__((always_inline)) {
            constexpr int NUMBER = decltype(number)::value, OPERAND = LINE * OF_LINE + NUMBER;
            each(std::integral_constant<int, OPERAND>{}, bits[0].template put<OPERAND>(found[0][NUMBER]),
                 bits[1].template put<OPERAND>(found[1][NUMBER]));
        });
    });
}

// Of two books' tiles: each(operand, half, numbers of 8 rows, the other book's).
template <Codes CODES, class Each>
INLINE void each_pair_operand(const GridTile<CODES> (&books)[2], const GridVectors& grid, const Each& each) {
    constexpr int OF_LINE = grid_of(CODES).numbers / 2;
    each_constant<2>([&](auto half) __attribute__((always_inline)) {
        constexpr int HALF = decltype(half)::value;
        const GridBits<CODES> bits[2] = {{books[0].codes, HALF, grid}, {books[1].codes, HALF, grid}};
        each_constant<OPERANDS / OF_LINE>([&](auto line) __attribute__((always_inline)) {
            __m256i found[2][OF_LINE];
            UNROLL
            for (int book = 0; book < 2; ++book) look_up_half(books[book], HALF, decltype(line)::value, grid, found[book]);
            each_constant<OF_LINE>([&](auto number) __attribute__((always_inline)) {
                constexpr int NUMBER = decltype(number)::value, OPERAND = decltype(line)::value * OF_LINE + NUMBER;
                each(std::integral_constant<int, OPERAND>{}, half, bits[0].template put<OPERAND>(found[0][NUMBER]),
                     bits[1].template put<OPERAND>(found[1][NUMBER]));
            });
        });
    });
}

// ``times`` the numbers of an operand's pair as words; of ``side`` 1, of the pair two further.
template <int SIDE>
INLINE __m256i grid_words(__m256i numbers, int times = 1) {
    return _mm256_maddubs_epi16(_mm256_set1_epi16(static_cast<short>(SIDE == 0 ? times : times << 8)), numbers);
}

}  // namespace lowbit
