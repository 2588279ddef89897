// Numbers of trellises in AVX2 registers; included by linear_trellis.cpp.
//
// A register has two columns of 8 rows, a chunk's row in each 32-bit lane: its windows are cut from the 32 bits of the
// stream that end with the odd column's.
#pragma once

#include "linear_trellis.h"

#include "linear_kernels.h"

namespace lowbit {

struct alignas(32) ChunkOrder {
    std::uint8_t bytes[32];
    INLINE __m256i load() const { return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes)); }
};
// Of four planes, each half of which stands in a half of a register, plane ``last`` in byte ``to`` of every chunk's 32 bits
// and those before it in the bytes above; zeros elsewhere.
constexpr ChunkOrder bytes_of_chunks(int last, int to) {
    ChunkOrder order{};
    for (int i = 0; i < 32; ++i) {
        const int plane = last - (i % 4 - to), chunk = i % 16 / 4;
        order.bytes[i] = static_cast<std::uint8_t>(i % 4 < to || plane < 0 ? 0x80 : plane * 4 + chunk);
    }
    return order;
}
template <int LAST, int TO>
constexpr ChunkOrder BYTES_OF_CHUNKS = bytes_of_chunks(LAST, TO);

// Planes FIRST to FIRST + 3, as bytes_of_chunks has them.
template <int FIRST, int LAST, int TO>
INLINE __m256i chunk_bytes(const std::uint8_t* planes) {
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes + FIRST * CHUNKS));
    const __m256i halves = _mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    return _mm256_shuffle_epi8(halves, BYTES_OF_CHUNKS<LAST, TO>.load());
}

// The windows of numbers NUMBER and NUMBER + 1 of every chunk.
template <int BITS, int NUMBER>
INLINE void two_windows(const std::uint8_t* planes, __m256i& even, __m256i& odd) {
    constexpr int END = BITS * (NUMBER + 2), PLANES_BEFORE = (END + 7) / 8, BEHIND = PLANES_BEFORE * 8 - END;
    constexpr int NEEDED = (16 + BITS + BEHIND + 7) / 8;
    // Where three planes are enough, others begin there, too.
    constexpr int FIRST = std::max(0, NEEDED > 3 ? PLANES_BEFORE - 4 : (PLANES_BEFORE - 3) / 2 * 2);
    __m256i bits = chunk_bytes<FIRST, PLANES_BEFORE - 1 - FIRST, 0>(planes);
    if constexpr (PLANES_BEFORE < NEEDED) {  // they begin in the chunk before
        const __m256i last = chunk_bytes<4 * BITS - 4, 3, PLANES_BEFORE>(planes);
        bits = _mm256_or_si256(bits, _mm256_permutevar8x32_epi32(last, _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6)));
    }
    const __m256i window = _mm256_set1_epi32(0xFFFF);
    even = _mm256_and_si256(_mm256_srli_epi32(bits, BEHIND + BITS), window);
    odd = _mm256_and_si256(BEHIND == 0 ? bits : _mm256_srli_epi32(bits, BEHIND), window);
}

template <TrellisBook BOOK>
INLINE __m256i products(__m256i windows) {
    constexpr BookNumbers book = numbers_of(BOOK);
    const __m256i product = _mm256_mullo_epi32(windows, _mm256_set1_epi32(static_cast<int>(book.times)));
    if constexpr (book.plus == 0) return product;
    return _mm256_add_epi32(product, _mm256_set1_epi32(static_cast<int>(book.plus)));
}

// Powers of two in the upper bytes of words, by what sum_of_halves looks up.
constexpr int POWER_BITS = 11;
INLINE __m256i power_table() {
    return _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -8, 0, 64, 0, -16, 0, 32, 0, -32, 0, 16, 0, -64, 0, 8));
}

// Of a product both halves, each a mantissa of 11 bits times a power of two for its two bits of exponent, with a sign:
// their sum, times 2^POWER_BITS.
INLINE __m256i sum_of_halves(__m256i product) {
    // The power's byte has the sign above, two changing bits of exponent and two that are set: less than zero these become
    // 01, so that the lower four bits alone tell the power and its sign. The lower byte finds a zero.
    const __m256i upper = _mm256_and_si256(product, _mm256_set1_epi16(static_cast<short>(0xFC00)));
    const __m256i power = _mm256_xor_si256(upper, _mm256_set1_epi16(0x760));
    const __m256i mantissa = _mm256_xor_si256(product, power);
    return _mm256_madd_epi16(mantissa, _mm256_shuffle_epi8(power_table(), _mm256_abs_epi8(power)));
}

// Two columns of 8 rows as whole numbers.
template <TrellisBook BOOK>
INLINE __m256i two_columns(__m256i even, __m256i odd) {
    even = products<BOOK>(even), odd = products<BOOK>(odd);
    if constexpr (BOOK == TrellisBook::mul1) {
        const auto bytes = [](__m256i product) __attribute__((always_inline)) {
            return _mm256_madd_epi16(_mm256_maddubs_epi16(product, _mm256_set1_epi8(LINE_TIMES)), _mm256_set1_epi16(1));
        };
        const __m256i both = _mm256_or_si256(bytes(even), _mm256_slli_epi32(bytes(odd), 16));
        return _mm256_sub_epi16(both, _mm256_set1_epi16(LINE_ZERO));
    } else {
        even = _mm256_srli_epi32(sum_of_halves(even), POWER_BITS);
        odd = _mm256_slli_epi32(sum_of_halves(odd), 16 - POWER_BITS);
        const __m256i both = _mm256_blend_epi16(even, odd, 0xAA);
        return _mm256_mulhrs_epi16(both, _mm256_set1_epi16(1 << 13));  // divided by 4, to nearest
    }
}

// each(number of the pair, its operand) for all pairs of columns.
template <TrellisBook BOOK, int BITS, class Each>
INLINE void each_pair(const std::uint8_t* tile, const Each& each) {
    each_constant<PAIRS / 2>([&](auto number) __attribute__((always_inline)) {
        constexpr int HALF = decltype(number)::value / 4, Q = decltype(number)::value % 4, PAIR = HALF * 8 + Q;
        const std::uint8_t* const planes = tile + HALF * 4 * BITS * CHUNKS;
        __m256i even[4], odd[4];
        each_constant<4>([&](auto i) __attribute__((always_inline)) {
            constexpr int I = decltype(i)::value;
            two_windows<BITS, Q * 8 + I * 2>(planes, even[I], odd[I]);
        });
        const SixteenInts first{two_columns<BOOK>(even[0], odd[0]), two_columns<BOOK>(even[2], odd[2])};
        each(std::integral_constant<int, PAIR>{}, first);
        const SixteenInts second{two_columns<BOOK>(even[1], odd[1]), two_columns<BOOK>(even[3], odd[3])};
        each(std::integral_constant<int, PAIR + 4>{}, second);
    });
}

template <TrellisBook BOOK, int BITS>
__attribute__((noinline)) void decode_trellis(const std::uint8_t* tile, WordTile& w) {
    each_pair<BOOK, BITS>(tile, [&](auto pair, SixteenInts both) __attribute__((always_inline)) {
        w[decltype(pair)::value] = both;
    });
}

template <TrellisBook BOOK, int BITS>
INLINE SixteenInts dot_trellis_once(const std::uint8_t* tile, const std::int16_t* x) {
    SixteenInts sums{_mm256_setzero_si256(), _mm256_setzero_si256()};
    each_pair<BOOK, BITS>(tile, [&](auto pair, SixteenInts both) __attribute__((always_inline)) {
        add_words(sums, both.low, both.high, two_words(x + decltype(pair)::value * 2));
        KEEP_IN_REGISTER(sums.low);  // else all products are made first, and wait for their sums in memory
        KEEP_IN_REGISTER(sums.high);
    });
    return sums;
}

INLINE Sixteen by_row(Sixteen lanes) { return lanes; }

}  // namespace lowbit
