// Products with trellises, x as InputKind::words; see linear_trellis.h.
//
// One token meets the numbers in the registers they are made in; of more, each tile is put together once, in memory.

#include "linear_trellis.h"

#include "linear_kernels.h"
#include "linear_rounded.h"

#if defined(__AVX2__) && !defined(LOWBIT_AVX512)
#include "linear_trellis_avx2.h"
#endif

namespace lowbit {
namespace {

#if defined(LOWBIT_AVX512) || !defined(__AVX2__)

// The 64 bits before plane END of every chunk hold windows of row c (low half of a lane pair) and of row c + 8. Of 7 and 8
// bits they hold two columns, of fewer all four.
constexpr int steps(int bits) { return bits > 6 ? 2 : 1; }
constexpr int end_plane(int bits, int q, int step) {
    return steps(bits) == 2 && step == 0 ? bits * q + 6 : bits * (q + 1);
}
// How far from the end of those 64 bits the window of number ``number`` of eight ends.
constexpr int shift_of(int bits, int number) {
    const int last = steps(bits) == 2 && number % 4 < 2 ? 48 : 8 * bits;
    return last - bits * (number + 1);
}
// Pair of columns COLUMNS 2 q (and 2 q + 8, FURTHER) of the first or second half of a tile.
constexpr int trellis_pair(int half, int q, int further) { return half * 8 + further * 4 + q; }

#endif

#if defined(LOWBIT_AVX512)

// Byte k of chunk c is that of the k-th plane from the last of eight.
constexpr BytePlaces straight_order() {
    BytePlaces order{};
    for (int i = 0; i < 64; ++i) order.bytes[i] = static_cast<std::uint8_t>((7 - i % 8) * CHUNKS + i / 8);
    return order;
}
// The same where fewer planes stand before: those of the chunk before take their place, which stand last. 64 on: in the
// last eight planes.
constexpr BytePlaces wrapped_order(int bits, int half, int end) {
    BytePlaces order{};
    for (int i = 0; i < 64; ++i) {
        int plane = end - 1 - i % 8, chunk = i / 8;
        if (plane < 0) plane += 4 * bits, chunk = (chunk + CHUNKS - 1) % CHUNKS;
        int place = plane * CHUNKS + chunk + (bits == 1 ? half * 32 : 0);
        if (place >= 64) place += 64 - (4 * bits - 8) * CHUNKS;
        order.bytes[i] = static_cast<std::uint8_t>(place);
    }
    return order;
}
constexpr BytePlaces STRAIGHT = straight_order();
template <int BITS, int HALF, int END>
constexpr BytePlaces WRAPPED = wrapped_order(BITS, HALF, END);

// 64 bits of every chunk that end with plane END.
template <int BITS, int HALF, int END>
INLINE __m512i chunk_bits(const std::uint8_t* tile) {
    if constexpr (BITS == 1) {
        return _mm512_permutexvar_epi8(WRAPPED<BITS, HALF, END>.load(), _mm512_loadu_si512(tile));
    } else {
        const std::uint8_t* const planes = tile + HALF * 32 * BITS;
        if constexpr (END >= 8) {
            return _mm512_permutexvar_epi8(STRAIGHT.load(), _mm512_loadu_si512(planes + (END - 8) * CHUNKS));
        } else {
            const __m512i first = _mm512_loadu_si512(planes);
            if constexpr (BITS == 2) return _mm512_permutexvar_epi8(WRAPPED<BITS, HALF, END>.load(), first);
            const __m512i last = _mm512_loadu_si512(planes + (4 * BITS - 8) * CHUNKS);
            return _mm512_permutex2var_epi8(first, WRAPPED<BITS, HALF, END>.load(), last);
        }
    }
}

template <int BITS, int COLUMN>
INLINE __m512i windows(__m512i bits) {
    constexpr long long LOW = shift_of(BITS, COLUMN), HIGH = shift_of(BITS, COLUMN + 4);
    constexpr long long PLACES = LOW | (LOW + 8) << 8 | HIGH << 32 | (HIGH + 8) << 40;
    return _mm512_maskz_multishift_epi64_epi8(0x3333333333333333ull, _mm512_set1_epi64(PLACES), bits);
}

// Windows that become numbers side by side, instruction by instruction: from one to its number takes some 35 cycles, and
// one after another they would fill the schedulers with what waits.
constexpr int TOGETHER = 8;

// Whole numbers of 16 windows each in 32-bit lanes: of mul1 as they are, else 4 times as large, and 2 more.
template <TrellisBook BOOK>
INLINE void numbers(__m512i (&of)[TOGETHER]) {
    constexpr BookNumbers book = numbers_of(BOOK);
    const auto each = [&](const auto& change) __attribute__((always_inline)) {
        UNROLL
        for (int i = 0; i < TOGETHER; ++i) of[i] = change(of[i], i);
    };
    each([&](__m512i window, int) __attribute__((always_inline)) {
        return _mm512_mullo_epi32(window, _mm512_set1_epi32(static_cast<int>(book.times)));
    });
    if constexpr (BOOK == TrellisBook::mul1) {
        each([&](__m512i product, int) __attribute__((always_inline)) {
            return _mm512_dpbusd_epi32(_mm512_set1_epi32(-LINE_ZERO), product, _mm512_set1_epi8(LINE_TIMES));
        });
        return;
    }
    if constexpr (book.plus != 0) {
        each([&](__m512i product, int) __attribute__((always_inline)) {
            return _mm512_add_epi32(product, _mm512_set1_epi32(static_cast<int>(book.plus)));
        });
    }
    // Of a half 10 bits of mantissa, and a power of two with its sign for its two bits of exponent.
    const __m512i positive = _mm512_set1_epi64(0x0002000100080004);
    const __m512i negative = _mm512_sub_epi16(_mm512_setzero_si512(), positive);
    __m512i power[TOGETHER];
    UNROLL
    for (int i = 0; i < TOGETHER; ++i) power[i] = _mm512_srli_epi16(of[i], 10);
    UNROLL
    for (int i = 0; i < TOGETHER; ++i) power[i] = _mm512_permutex2var_epi16(positive, power[i], negative);
    each([&](__m512i product, int) __attribute__((always_inline)) {
        return _mm512_ternarylogic_epi32(product, _mm512_set1_epi16(0x3FF), _mm512_set1_epi16(0x760), 0x6A);
    });
    each([&](__m512i mantissa, int i) __attribute__((always_inline)) {
        return _mm512_dpwssd_epi32(_mm512_set1_epi32(2), mantissa, power[i]);
    });
}

// An operand of 16 rows by 2 columns.
template <TrellisBook BOOK>
INLINE __m512i operand(__m512i even, __m512i odd) {
    constexpr bool LINE = BOOK == TrellisBook::mul1;
    if constexpr (!LINE) even = _mm512_srli_epi32(even, 2);
    return _mm512_mask_blend_epi16(0xAAAAAAAA, even, _mm512_slli_epi32(odd, LINE ? 16 : 14));
}

// each(number of the pair, its operand) for all pairs of columns.
template <TrellisBook BOOK, int BITS, class Each>
INLINE void each_pair(const std::uint8_t* tile, const Each& each) {
    each_constant<4>([&](auto number) __attribute__((always_inline)) {
        constexpr int HALF = decltype(number)::value / 2, Q = decltype(number)::value % 2 * 2;
        __m512i of[TOGETHER];
        each_constant<2>([&](auto next) __attribute__((always_inline)) {
            constexpr int NEXT = decltype(next)::value, FIRST = NEXT * 4;
            __m512i bits = chunk_bits<BITS, HALF, end_plane(BITS, Q + NEXT, 0)>(tile);
            of[FIRST] = windows<BITS, 0>(bits);
            of[FIRST + 1] = windows<BITS, 1>(bits);
            if constexpr (steps(BITS) == 2) bits = chunk_bits<BITS, HALF, end_plane(BITS, Q + NEXT, 1)>(tile);
            of[FIRST + 2] = windows<BITS, 2>(bits);
            of[FIRST + 3] = windows<BITS, 3>(bits);
        });
        numbers<BOOK>(of);
        each_constant<4>([&](auto pair) __attribute__((always_inline)) {
            constexpr int PAIR = decltype(pair)::value;
            constexpr int PLACE = trellis_pair(HALF, Q + PAIR / 2, PAIR % 2);
            each(std::integral_constant<int, PLACE>{}, operand<BOOK>(of[PAIR * 2], of[PAIR * 2 + 1]));
        });
    });
}

template <TrellisBook BOOK, int BITS>
__attribute__((noinline)) void decode_trellis(const std::uint8_t* tile, WordTile& w) {
    each_pair<BOOK, BITS>(tile, [&](auto pair, __m512i both) __attribute__((always_inline)) { w[decltype(pair)::value] = both; });
}

template <TrellisBook BOOK, int BITS>
INLINE SixteenInts dot_trellis_once(const std::uint8_t* tile, const std::int16_t* x) {
    __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    each_pair<BOOK, BITS>(tile, [&](auto pair, __m512i both) __attribute__((always_inline)) {
        constexpr int PAIR = decltype(pair)::value;
        std::int32_t two;
        std::memcpy(&two, x + PAIR * 2, sizeof two);
        sums[PAIR / 4 % 2] = _mm512_dpwssd_epi32(sums[PAIR / 4 % 2], both, _mm512_set1_epi32(two));
    });
    return _mm512_add_epi32(sums[0], sums[1]);
}

INLINE Sixteen by_row(Sixteen lanes) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), lanes);
}

#elif !defined(__AVX2__)

// As many lanes as a register has.
constexpr int WIDE_BYTES = 16;
typedef std::uint64_t Quads __attribute__((vector_size(WIDE_BYTES)));
typedef std::uint32_t Singles __attribute__((vector_size(WIDE_BYTES)));
constexpr int PARTS = 64 / WIDE_BYTES;

// 64 bits of every chunk from the 8 planes that end with them, the last one lowest.
INLINE void chunk_bits(const std::uint8_t* planes, std::uint64_t (&bits)[CHUNKS]) {
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        bits[chunk] = 0;
        for (int plane = 0; plane < 8; ++plane) bits[chunk] = bits[chunk] << 8 | planes[plane * CHUNKS + chunk];
    }
}

// Whole numbers of windows.
template <TrellisBook BOOK>
INLINE void numbers(const Singles& window, Singles& number) {
    constexpr BookNumbers book = numbers_of(BOOK);
    const Singles product = window * book.times + book.plus;
    if constexpr (BOOK == TrellisBook::mul1) {
        const Singles two = (product & 0x00FF00FFu) + (product >> 8 & 0x00FF00FFu);
        number = ((two & 0xFFFFu) + (two >> 16)) * static_cast<std::uint32_t>(LINE_TIMES) - static_cast<std::uint32_t>(LINE_ZERO);
    } else {
        // A half is its mantissa times a power of two for its two bits of exponent, with a sign.
        const Singles high = product >> 16;
        const Singles a = ((product & 0x3FFu) ^ 0x760u) << ((product >> 10 & 3u) ^ 2u);
        const Singles b = ((high & 0x3FFu) ^ 0x760u) << ((high >> 10 & 3u) ^ 2u);
        const Singles a_minus = 0u - (product >> 15 & 1u), b_minus = 0u - (high >> 15);
        const Singles sum = ((a ^ a_minus) - a_minus) + ((b ^ b_minus) - b_minus) + 2u;
        // Divided by 4, as a number with a sign; of more than 16 bits nothing is kept.
        number = sum >> 2;
    }
}

// Two columns of 16 lanes.
INLINE void put_pair(WordTile& w, int pair, int part, const Singles& even, const Singles& odd) {
    constexpr int LANES_EACH = WIDE_BYTES / 4;
    for (int lane = 0; lane < LANES_EACH; ++lane) {
        w.columns[pair * 2][part * LANES_EACH + lane] = static_cast<std::int16_t>(even[lane]);
        w.columns[pair * 2 + 1][part * LANES_EACH + lane] = static_cast<std::int16_t>(odd[lane]);
    }
}

template <TrellisBook BOOK, int BITS>
__attribute__((noinline)) void decode_trellis(const std::uint8_t* tile, WordTile& w) {
    for (int half = 0; half < 2; ++half) {
        // The planes behind those of the chunks before, which stand last.
        constexpr int SIZE = 4 * BITS * CHUNKS;
        std::uint8_t staged[8 * CHUNKS + SIZE] = {};
        std::uint8_t* const planes = staged + 8 * CHUNKS;
        std::memcpy(planes, tile + half * SIZE, SIZE);
        for (int plane = -2; plane < 0; ++plane) {
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                planes[plane * CHUNKS + chunk] = planes[SIZE + plane * CHUNKS + (chunk + CHUNKS - 1) % CHUNKS];
            }
        }
        for (int q = 0; q < 4; ++q) {
            std::uint64_t bits[2][CHUNKS];
            chunk_bits(planes + (end_plane(BITS, q, 0) - 8) * CHUNKS, bits[0]);
            if (steps(BITS) == 2) chunk_bits(planes + (end_plane(BITS, q, 1) - 8) * CHUNKS, bits[1]);
            for (int part = 0; part < PARTS; ++part) {
                Singles found[4];
                UNROLL
                for (int column = 0; column < 4; ++column) {
                    const int step = steps(BITS) == 2 ? column / 2 : 0;
                    Quads own;
                    std::memcpy(&own, bits[step] + part * (WIDE_BYTES / 8), sizeof own);
                    const Quads low = own >> shift_of(BITS, column) & 0xFFFFu;
                    const Quads both = low | (own >> shift_of(BITS, column + 4) & 0xFFFFu) << 32;
                    numbers<BOOK>(reinterpret_cast<Singles>(both), found[column]);
                }
                put_pair(w, trellis_pair(half, q, 0), part, found[0], found[1]);
                put_pair(w, trellis_pair(half, q, 1), part, found[2], found[3]);
            }
        }
    }
}

template <TrellisBook BOOK, int BITS>
INLINE SixteenInts dot_trellis_once(const std::uint8_t* tile, const std::int16_t* x) {
    WordTile w;
    decode_trellis<BOOK, BITS>(tile, w);
    return dot_tile(w, x);
}

INLINE Sixteen by_row(Sixteen lanes) {
    float from[ROWS], to[ROWS];
    sixteen_store(from, lanes);
    for (int row = 0; row < ROWS; ++row) to[row] = from[row % CHUNKS * 2 + row / CHUNKS];
    return sixteen_load(to);
}

#endif

INLINE Sixteen finished(const Layout& layout, Sixteen total) {
    return sixteen_multiply(by_row(total), sixteen_set(layout.factor));
}

// One function for all: what decodes is called for each tile.
void multiply_many(const Layout& layout, const std::uint8_t* block, void (*decode)(const std::uint8_t*, WordTile&),
                   const Input& x, float (*totals)[ROWS]) {
    const std::int64_t bytes = tile_bytes(layout.codes);
    multiply_tiles({block, bytes, 0, layout.tiles}, bytes, layout, x, totals, decode);
}

template <TrellisBook BOOK, int BITS>
void multiply_trellis(const Layout& layout, const std::uint8_t* block, const Decoding&, const Input& x, float (*totals)[ROWS]) {
    // Totals lie as sums do until a block is through.
    if (x.tokens == 1) {
        const Tiles tiles{block, ROWS * COLUMNS / 8 * BITS, 0, layout.tiles};
        const auto dot = [](const std::uint8_t* tile, const std::int16_t* columns) __attribute__((always_inline)) {
            return dot_trellis_once<BOOK, BITS>(tile, columns);
        };
        const Sixteen total = add_tiles(sixteen_load(totals[0]), tiles, x, dot);
        return sixteen_store(totals[0], finished(layout, total));
    }
    multiply_many(layout, block, decode_trellis<BOOK, BITS>, x, totals);
    for (int t = 0; t < x.tokens; ++t) sixteen_store(totals[t], finished(layout, sixteen_load(totals[t])));
}

#if defined(__AVX2__)

using TrellisDecoder = void (*)(const std::uint8_t*, WordTile&);

template <TrellisBook BOOK>
TrellisDecoder decoder_of_bits(int bits) {
    switch (bits) {
        case 1: return decode_trellis<BOOK, 1>;
        case 2: return decode_trellis<BOOK, 2>;
        case 3: return decode_trellis<BOOK, 3>;
        case 4: return decode_trellis<BOOK, 4>;
        case 5: return decode_trellis<BOOK, 5>;
        case 6: return decode_trellis<BOOK, 6>;
        case 7: return decode_trellis<BOOK, 7>;
        default: return decode_trellis<BOOK, 8>;
    }
}

TrellisDecoder decoder_of(const Trellis& trellis) {
    switch (trellis.book) {
        case TrellisBook::first: return decoder_of_bits<TrellisBook::first>(trellis.bits);
        case TrellisBook::mcg: return decoder_of_bits<TrellisBook::mcg>(trellis.bits);
        case TrellisBook::mul1: return decoder_of_bits<TrellisBook::mul1>(trellis.bits);
    }
    return nullptr;
}

void round_trellis(const Layout& layout, const std::uint8_t* block, const Decoding&, std::uint8_t* panel) {
    const TrellisDecoder decode = decoder_of(trellis_of(layout.codes));
    const std::int64_t bytes = tile_bytes(layout.codes);
    const Sixteen factor = sixteen_set(layout.factor);
    const auto in_rows = [](SixteenInts both) __attribute__((always_inline)) {
#if defined(LOWBIT_AVX512)
        return _mm512_castps_si512(by_row(_mm512_castsi512_ps(both)));
#else
        return both;
#endif
    };
    PanelWriter writer(panel);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        WordTile w;
        decode(block + tile * bytes, w);
        writer.put_words(w, factor, in_rows);
    }
}

#endif

template <TrellisBook BOOK>
BlockFunction by_bits(int bits) {
    switch (bits) {
        case 1: return multiply_trellis<BOOK, 1>;
        case 2: return multiply_trellis<BOOK, 2>;
        case 3: return multiply_trellis<BOOK, 3>;
        case 4: return multiply_trellis<BOOK, 4>;
        case 5: return multiply_trellis<BOOK, 5>;
        case 6: return multiply_trellis<BOOK, 6>;
        case 7: return multiply_trellis<BOOK, 7>;
        case 8: return multiply_trellis<BOOK, 8>;
        default: return nullptr;
    }
}

}  // namespace

#if defined(__AVX2__)
RoundFunction rounded_trellis(const Layout&) { return round_trellis; }
#endif

BlockFunction trellis_function(const Layout& layout) {
    const Trellis trellis = trellis_of(layout.codes);
    switch (trellis.book) {
        case TrellisBook::first: return by_bits<TrellisBook::first>(trellis.bits);
        case TrellisBook::mcg: return by_bits<TrellisBook::mcg>(trellis.bits);
        case TrellisBook::mul1: return by_bits<TrellisBook::mul1>(trellis.bits);
    }
    return nullptr;
}

}  // namespace lowbit
