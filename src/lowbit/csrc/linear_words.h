// Products of 16-bit whole numbers: x with a scale for each token and 32 columns, a weight's codes as whole numbers
// of up to 8 bits (x then has 16 bits), or a table of up to 13 (x 15). As many products an instruction as of bfloat16,
// and less is lost: of a group's largest |x| 2^-15 at most, and of a table's largest value 2^-13,
// where bfloat16 loses up to 2^-9 of every |x|. Sums of 32 columns are exact in 32 bits, in any order.
//
// Tables that bfloat16 would round (nf4) are multiplied so on every processor, and E8P, whose x was transformed and would
// be rounded; whole-number codes where it does not multiply bfloat16.
#pragma once

#include "linear_bytes.h"
#if defined(__AVX2__) && !defined(LOWBIT_AVX512)
#define LOWBIT_GRID_VECTORS
#include "linear_grids_avx2.h"
#endif

namespace lowbit {

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool CODES_AS_WORDS = false;
#else
constexpr bool CODES_AS_WORDS = true;
#endif

constexpr int LARGEST_VALUE = (1 << 12) - 1;  // of a table
#if defined(LOWBIT_AVX512)
constexpr int LARGEST_WIDE_TABLE = 64;  // of words that are looked up
#else
constexpr int LARGEST_WIDE_TABLE = 16;
#endif

// line: a code is worth base + code. bytes: base + a byte that is looked up. wide: numbers of 13 bits. trellis: numbers
// of 14 bits. pairs: numbers of two tables, added. signs (AVX2): codes of 6 bits, whose last one is a sign; the bit before it
// chooses one of two tables of 16 numbers, of which the second's are multiplied with a power of two.
enum class WordKind { none, line, bytes, wide, trellis, pairs, signs };

// The largest |x|.
constexpr int largest_word(WordKind kind) {
    return kind == WordKind::trellis ? (1 << 13) - 1 : kind == WordKind::wide ? (1 << 14) - 1 : (1 << 15) - 1;
}
constexpr int LARGEST_OF_TRELLIS = 2 * 2047 * 2;  // in units of 2^-11: two halves just below 2
static_assert(static_cast<std::int64_t>(largest_word(WordKind::trellis)) * LARGEST_OF_TRELLIS * COLUMNS < std::int64_t{1} << 31);
constexpr int LARGEST_OF_PAIR = (1 << 11) - 1;
static_assert(static_cast<std::int64_t>(largest_word(WordKind::pairs)) * LARGEST_OF_PAIR * COLUMNS < std::int64_t{1} << 31);
constexpr int LARGEST_OF_SIGNS = (1 << 11) - 1;
static_assert(static_cast<std::int64_t>(largest_word(WordKind::signs)) * LARGEST_OF_SIGNS * COLUMNS < std::int64_t{1} << 31);
static_assert(static_cast<std::int64_t>(largest_word(WordKind::wide)) * LARGEST_VALUE * COLUMNS < std::int64_t{1} << 31);
// A sum of unsigned bytes and base * sum(x), which starts it.
static_assert(static_cast<std::int64_t>(largest_word(WordKind::line)) * (255 + 256) * COLUMNS < std::int64_t{1} << 31);

#if defined(LOWBIT_GRID_VECTORS)
// As which of 4 v one of two books' numbers count: of 3/4, and of -1/4, which differ in their sign.
inline int book_share(const std::uint16_t* table) {
    return (static_cast<std::int16_t>(table[0]) + static_cast<std::int16_t>(table[4])) / 2;
}
#endif

// How a weight's codes become whole numbers: (number + base) * factor.
struct WordCodes {
    WordKind kind = WordKind::none;
    int base = 0;
    float factor = 1.0f;
    alignas(64) std::uint8_t low[64], high[64];  // of what is looked up; short tables repeat
    int times = 1;           // signs: of the second table; grids: their vectors' numbers are what codes are worth
    bool looked_up = false;  // AVX-512: there, and not in the weight's own table

    explicit WordCodes(const lowbit_weight& weight) {
        const auto codes = static_cast<Codes>(weight.codes);
        if (codes == Codes::words4) {
            kind = WordKind::wide;
            put_words(weight.table);
        } else if (codes == Codes::e8p_pair) {
            kind = WordKind::pairs;
            put_words(weight.table);
        } else if (is_trellis(codes)) {
            kind = WordKind::trellis;
        } else if (is_words(codes)) {
            kind = WordKind::wide;  // whose sums stay below 2^31 by the choice of the table's factor
        } else if (codes == Codes::e8p) {
            read(weight.table, 16);
        } else if (!CODES_AS_WORDS) {
            return;
        } else if (codes == Codes::int8 || codes == Codes::uint8) {
            kind = WordKind::line;
            base = codes == Codes::int8 ? -128 : 0;
        } else if (codes >= Codes::bits1 && codes <= Codes::bits7) {
            read(weight.table, codes == Codes::bits7 ? 1 : 1 << static_cast<int>(codes));
            looked_up = kind != WordKind::none;
#if defined(__AVX2__) && !defined(LOWBIT_AVX512)
            if (codes == Codes::bits6 && kind != WordKind::line) read_signs(weight.table);
#endif
        } else if (is_grid(codes)) {
            read(weight.table, 1 << static_cast<int>(grid_of(codes).planes()));
            looked_up = kind != WordKind::none;
        }
#if defined(LOWBIT_GRID_VECTORS)
        if (is_grid(codes) && (kind == WordKind::bytes || kind == WordKind::pairs)) take_vectors(weight, codes);
#endif
    }

#if defined(LOWBIT_GRID_VECTORS)
    const GridVectors* grid = nullptr;  // whose numbers have signs and no base
#endif

#if defined(LOWBIT_AVX512)
    // ``behind``: of the weight's own.
    Table table(const std::uint8_t* behind) const {
        alignas(64) std::uint16_t numbers[64];
        for (int i = 0; i < 64; ++i) numbers[i] = static_cast<std::uint16_t>(low[i] | high[i] << 8);
        return {numbers, behind};
    }
#endif

    // Of 16 words.
    explicit WordCodes(const std::uint16_t* words) { put_words(words); }

  private:
#if defined(LOWBIT_GRID_VECTORS)
    void take_vectors(const lowbit_weight& weight, Codes codes) {
        int values[32];
        for (int i = 0; i < 32; ++i) values[i] = static_cast<std::int16_t>(low[i] | high[i] << 8) + base;
        if (kind == WordKind::pairs) times = book_share(weight.table);
        for (int& value : values) value /= times;
        grid = grid_vectors(codes, values, reinterpret_cast<const std::uint8_t*>(weight.table + 64));
        base = 0;
    }
#endif
    void put_words(const std::uint16_t* words) {
        for (int i = 0; i < 64; ++i) put(i, words[i % 16]);
    }
    void put(int i, int value) {
        low[i] = static_cast<std::uint8_t>(value);
        high[i] = static_cast<std::uint8_t>(value >> 8);
    }

#if defined(__AVX2__) && !defined(LOWBIT_AVX512)
    // Of 64 numbers whose second half is the first one's, negative.
    void read_signs(const std::uint16_t* bfloats) {
        for (int i = 0; i < 32; ++i) {
            if (bfloat_to_float(bfloats[i + 32]) != -bfloat_to_float(bfloats[i])) return;
        }
        for (const float whole_times : {1.0f, 2.0f, 4.0f, 8.0f, 16.0f}) {
            for (int second_times = 1; second_times <= 128; second_times *= 2) {
                if (!are_signs(bfloats, whole_times, second_times)) continue;
                kind = WordKind::signs;
                base = 0;
                factor = 1.0f / whole_times;
                times = second_times;
                for (int i = 0; i < 64; ++i) {
                    const float value = bfloat_to_float(bfloats[i % 32]) * whole_times;
                    put(i, static_cast<int>(value) / (i % 32 < 16 ? 1 : times));
                }
                return;
            }
        }
    }
    static bool are_signs(const std::uint16_t* bfloats, float whole_times, int second_times) {
        for (int i = 0; i < 32; ++i) {
            const float value = bfloat_to_float(bfloats[i]) * whole_times;
            const float number = i < 16 ? value : value / static_cast<float>(second_times);
            const bool fits = std::fabs(number) <= 127.0f && std::fabs(value) <= static_cast<float>(LARGEST_OF_SIGNS);
            if (!fits || number != std::floor(number)) return false;
        }
        return true;
    }
#endif

    void read(const std::uint16_t* bfloats, int count) {
        float values[64] = {};
        for (int i = 0; i < count; ++i) values[i] = bfloat_to_float(bfloats[i]);
        bool line = values[0] == std::floor(values[0]) && std::fabs(values[0]) <= 256.0f;
        for (int i = 1; i < count; ++i) line = line && values[i] == values[0] + static_cast<float>(i);
        if (line) {
            kind = WordKind::line;
            base = static_cast<int>(values[0]);
            for (int i = 0; i < 64; ++i) put(i, i % count);
            return;
        }
        for (const float times : {1.0f, 2.0f, 4.0f, 8.0f, 16.0f}) {
            bool whole = true;
            float least = 0.0f, most = 0.0f;
            for (int i = 0; i < count; ++i) {
                const float value = values[i] * times;
                whole = whole && value == std::floor(value);
                least = std::min(least, value);
                most = std::max(most, value);
            }
            if (!whole) continue;
            const auto limit = static_cast<float>(LARGEST_VALUE);
            if (most - least <= 255.0f && least >= -256.0f) {
                kind = WordKind::bytes;
                base = static_cast<int>(least);
            } else if ((count == 16 || count == LARGEST_WIDE_TABLE) && least >= -limit && most <= limit) {
                kind = WordKind::wide;
            } else {
                return;
            }
            factor = 1.0f / times;
            for (int i = 0; i < 64; ++i) put(i, static_cast<int>(values[i % count] * times) - base);
            return;
        }
    }
};

#if defined(LOWBIT_AVX512)

// One register of 16 rows x 2 columns for each pair of columns.
using WordTile = __m512i[PAIRS];

// Whether the codes themselves are the numbers, without a lookup.
constexpr bool are_words(Codes codes) { return CODES_AS_WORDS && (is_byte(codes) || codes == Codes::bits7); }

struct NoTables {
    explicit NoTables(const Table&) {}
};
template <Codes CODES>
using WordTables = std::conditional_t<are_words(CODES), NoTables, ByteTables<CODES>>;

// Four pairs of columns as decode_quad has them.
template <Codes CODES, int QUAD, bool IN_ORDER>
INLINE void decode_word_quad(const CodeLines<CODES, IN_ORDER>& tile, const Table& table, const WordTables<CODES>& tables, __m512i* w) {
    if constexpr (!are_words(CODES)) {
        decode_quad<CODES, QUAD>(tile, table, tables, w);
    } else {
        const __m512i zero = _mm512_setzero_si512(), lower = _mm512_set1_epi16(0xff);
        UNROLL
        for (int i = 0; i < 2; ++i) {
            if constexpr (is_byte(CODES)) {
                const __m512i codes = tile.line((QUAD * 2 + i) * 64);
                w[i] = _mm512_unpacklo_epi8(codes, zero);
                w[i + 2] = _mm512_unpackhi_epi8(codes, zero);
            } else {  // a pair and the one two further, in the two bytes of a word
                const __m512i codes = _mm512_and_si512(seven_bits<QUAD * 2>(tile, i), _mm512_set1_epi8(0x7f));
                w[i] = _mm512_and_si512(codes, lower);
                w[i + 2] = _mm512_srli_epi16(codes, 8);
            }
        }
    }
}

template <Codes CODES>
INLINE void decode_words(const std::uint8_t* tile, const Table& table, __m512i* w) {
    CodeLines<CODES> lines[1];
    read_lines([&](int) { return tile; }, table, lines);
    const WordTables<CODES> tables(table);
    each_constant<PAIRS / 4>([&](auto quad) __attribute__((always_inline)) {
        decode_word_quad<CODES, decltype(quad)::value>(lines[0], table, tables, w + 4 * decltype(quad)::value);
    });
}
template <Codes CODES, WordKind>
INLINE void decode_words(const std::uint8_t* tile, const Table& table, const WordCodes&, WordTile& w) {
    decode_words<CODES>(tile, table, w);
}

// sums[t] += products of columns [FIRST, FIRST + COUNT) with token t.
template <int FIRST, int COUNT, int TOKENS>
inline void dot_words(const WordTile& w, const std::int16_t* x, std::int64_t stride, SixteenInts* sums) {
    UNROLL
    for (int pair = FIRST / 2; pair < (FIRST + COUNT) / 2; ++pair) {
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            std::int32_t two;
            std::memcpy(&two, x + t * stride + pair * 2, sizeof two);
            sums[t] = _mm512_dpwssd_epi32(sums[t], w[pair], _mm512_set1_epi32(two));
        }
    }
}

// sums[i] += the products of tile i with one token, as dot_once has them.
template <Codes CODES, int SUB, int TILES, class Next>
INLINE void dot_words_in_turns(const Next& next, const Table& table, const std::int16_t* x,
                               SixteenInts (&sums)[TILES][COLUMNS / SUB]) {
    const WordTables<CODES> tables(table);
    CodeLines<CODES, reads_in_order(CODES)> lines[TILES];
    read_lines(next, table, lines);
    each_constant<PAIRS / 4>([&](auto quad) __attribute__((always_inline)) {
        constexpr int FIRST = decltype(quad)::value * 8;
        __m512i w[TILES][4];
        UNROLL
        for (int tile = 0; tile < TILES; ++tile) decode_word_quad<CODES, decltype(quad)::value>(lines[tile], table, tables, w[tile]);
        UNROLL
        for (int i = 0; i < 4; ++i) {
            UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                std::int32_t two;
                std::memcpy(&two, x + tile * COLUMNS + FIRST + i * 2, sizeof two);
                SixteenInts& sum = sums[tile][(FIRST + i * 2) / SUB];
                sum = _mm512_dpwssd_epi32(sum, w[tile][i], _mm512_set1_epi32(two));
            }
        }
    });
}

#elif defined(__AVX2__)

using WordTile = SixteenInts[PAIRS];

// The values of 32 codes of a byte each, in a table of 2^WIDTH bytes.
template <int WIDTH>
INLINE __m256i look_up_bytes(const std::uint8_t* table, __m256i code) {
    const auto part = [&](int i) {
        const __m128i entries = _mm_load_si128(reinterpret_cast<const __m128i*>(table + i * 16));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), code);
    };
    if constexpr (WIDTH <= 4) return part(0);
    const __m256i fifth = _mm256_slli_epi16(code, 3);  // in a byte's uppermost bit
    const __m256i low = _mm256_blendv_epi8(part(0), part(1), fifth);
    if constexpr (WIDTH == 5) return low;
    return _mm256_blendv_epi8(low, _mm256_blendv_epi8(part(2), part(3), fifth), _mm256_slli_epi16(code, 2));
}

// ``words`` shifted so that bit FROM becomes bit TO; what others become is of no use.
template <int FROM, int TO>
INLINE __m256i bit_moved(__m256i words) {
    if constexpr (FROM < TO) return _mm256_slli_epi16(words, TO - FROM);
    if constexpr (FROM > TO) return _mm256_srli_epi16(words, FROM - TO);
    return words;
}

// WordKind::signs, as operand_words has them.
template <int OPERAND>
INLINE void operand_signs(const std::uint8_t* tile, int at, const WordCodes& codes, __m256i& first, __m256i& second) {
    constexpr Plane LOWER = plane(Codes::bits6, 0), UPPER = plane(Codes::bits6, 1);
    constexpr Field FOUR = field(LOWER, 0, pair_of(OPERAND, 0) * 2), TWO = field(UPPER, 0, pair_of(OPERAND, 0) * 2);
    const auto words_of = [&](Field f) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + f.byte + at)); };
    const __m256i four = _mm256_and_si256(bit_moved<FOUR.shift, 0>(words_of(FOUR)), _mm256_set1_epi8(15));
    const __m256i two = words_of(TWO);
    const __m256i is_second = bit_moved<TWO.shift, 7>(two);  // in a byte's uppermost bit
    const __m256i sign = _mm256_or_si256(bit_moved<TWO.shift + 1, 7>(two), _mm256_set1_epi8(1));
    const __m256i of_first = look_up_bytes<4>(codes.low, four), of_second = look_up_bytes<4>(codes.low + 16, four);
    const __m256i number = _mm256_sign_epi8(_mm256_blendv_epi8(of_first, of_second, is_second), sign);
    // Of two bytes one meets 0, so that the sum of both products is the other's, of 16 bits.
    const auto multiplied = [&](int shift) __attribute__((always_inline)) {
        const __m256i one = _mm256_set1_epi16(static_cast<short>(1 << shift));
        const __m256i times = _mm256_set1_epi16(static_cast<short>(codes.times << shift));
        return _mm256_maddubs_epi16(_mm256_blendv_epi8(one, times, is_second), number);
    };
    first = multiplied(0);
    second = multiplied(8);
}

// Both pairs of an operand: 8 rows by 2 columns each, as 16-bit numbers. ``at``: 32 for the second 8 rows.
template <Codes CODES, WordKind KIND, int OPERAND>
INLINE void operand_words(const std::uint8_t* tile, int at, const WordCodes& codes, __m256i& first, __m256i& second) {
    constexpr Plane PLANE = plane(CODES, 0);
    constexpr Field FIELD = field(PLANE, 0, pair_of(OPERAND, 0) * 2);
    if constexpr (is_byte(CODES)) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + OPERAND * 64 + at));
        first = _mm256_unpacklo_epi8(bytes, _mm256_setzero_si256());
        second = _mm256_unpackhi_epi8(bytes, _mm256_setzero_si256());
    } else if constexpr (KIND == WordKind::signs) {
        operand_signs<OPERAND>(tile, at, codes, first, second);
    } else if constexpr (KIND == WordKind::line && plane_count(CODES) == 1) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + FIELD.byte + at));
        const __m256i mask = _mm256_set1_epi16((1 << PLANE.width) - 1);
        first = _mm256_and_si256(FIELD.shift == 0 ? words : _mm256_srli_epi16(words, FIELD.shift), mask);
        second = _mm256_srli_epi16(words, FIELD.shift + 8);
        if constexpr (FIELD.shift + PLANE.width < 8) second = _mm256_and_si256(second, mask);
    } else {
        __m256i low = operand_codes<CODES, OPERAND>(tile, at);
        const __m256i even = _mm256_set1_epi16(0xff);
        if constexpr (KIND == WordKind::wide) {
            const __m256i high = look_up_bytes<4>(codes.high, low);
            low = look_up_bytes<4>(codes.low, low);
            first = _mm256_or_si256(_mm256_and_si256(low, even), _mm256_slli_epi16(high, 8));
            second = _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(even, high));
            return;
        }
        if constexpr (KIND == WordKind::bytes) low = look_up_bytes<static_cast<int>(CODES)>(codes.low, low);
        first = _mm256_and_si256(low, even);
        second = _mm256_srli_epi16(low, 8);
    }
}

template <Codes CODES, WordKind KIND>
INLINE void decode_words(const std::uint8_t* tile, const Table&, const WordCodes& codes, WordTile& w) {
    static_assert(!is_grid(CODES), "a GridTile's");
    each_constant<OPERANDS>([&](auto index) __attribute__((always_inline)) {
        constexpr int OPERAND = decltype(index)::value;
        SixteenInts &first = w[pair_of(OPERAND, 0)], &second = w[pair_of(OPERAND, 1)];
        operand_words<CODES, KIND, OPERAND>(tile, 0, codes, first.low, second.low);
        operand_words<CODES, KIND, OPERAND>(tile, 32, codes, first.high, second.high);
    });
}

template <Codes CODES, WordKind>
INLINE void decode_words(const GridTile<CODES>& tile, const Table&, const WordCodes& codes, WordTile& w) {
    each_grid_operand(tile, *codes.grid, [&](auto index, __m256i low, __m256i high) __attribute__((always_inline)) {
        constexpr int OPERAND = decltype(index)::value;
        w[pair_of(OPERAND, 0)] = {grid_words<0>(low), grid_words<0>(high)};
        w[pair_of(OPERAND, 1)] = {grid_words<1>(low), grid_words<1>(high)};
    });
}

INLINE __m256i two_words(const std::int16_t* from) {
    std::int32_t two;
    std::memcpy(&two, from, sizeof two);
    return _mm256_set1_epi32(two);
}
// Sums are kept in registers: else many products are made first, and wait for their sums in memory.
INLINE void add_words(__m256i& sum, __m256i words, __m256i x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, x));
    KEEP_IN_REGISTER(sum);
}
INLINE void add_words(SixteenInts& sum, __m256i low, __m256i high, __m256i x) {
    add_words(sum.low, low, x);
    add_words(sum.high, high, x);
}

template <int FIRST, int COUNT, int TOKENS>
INLINE void dot_words(const WordTile& w, const std::int16_t* x, std::int64_t stride, SixteenInts* sums) {
    UNROLL
    for (int pair = FIRST / 2; pair < (FIRST + COUNT) / 2; ++pair) {
        SixteenInts both = w[pair];
        KEEP_IN_REGISTER(both.low);
        KEEP_IN_REGISTER(both.high);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            add_words(sums[t], both.low, both.high, two_words(x + t * stride + pair * 2));
        }
    }
}

// dot_words_once of WordKind::wide. The two bytes of a number, interleaved, are words of an operand's four columns row by
// row, which takes fewer instructions than words in the order of pairs; x comes in theirs.
template <Codes CODES, int SUB>
INLINE void dot_wide_once(const std::uint8_t* tile, const WordCodes& codes, const std::int16_t* x, SixteenInts* sums) {
    const __m256i orders[] = {
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 0, 1, 8, 9, 2, 3, 10, 11)),
        _mm256_broadcastsi128_si256(_mm_setr_epi8(4, 5, 12, 13, 6, 7, 14, 15, 4, 5, 12, 13, 6, 7, 14, 15))};
    each_constant<COLUMNS / SUB>([&](auto number) __attribute__((always_inline)) {
        constexpr int PART = decltype(number)::value;
        __m256i held[4];  // two sums each of rows 0, 1, 4 and 5 of eight, of 2, 3, 6 and 7, then of the other eight
        UNROLL
        for (__m256i& sum : held) sum = _mm256_setzero_si256();
        each_constant<SUB / 4>([&](auto index) __attribute__((always_inline)) {
            constexpr int OPERAND = PART * (SUB / 4) + decltype(index)::value;
            const auto* const eight = reinterpret_cast<const __m128i*>(x + OPERAND / 2 * 8);
            const __m256i four = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(eight)), orders[OPERAND % 2]);
            UNROLL
            for (int half = 0; half < 2; ++half) {
                const __m256i code = operand_codes<CODES, OPERAND>(tile, half * 32);
                const __m256i low = look_up_bytes<4>(codes.low, code), high = look_up_bytes<4>(codes.high, code);
                add_words(held[half * 2], _mm256_unpacklo_epi8(low, high), four);
                add_words(held[half * 2 + 1], _mm256_unpackhi_epi8(low, high), four);
            }
        });
        sums[PART] = ints_add(sums[PART], {_mm256_hadd_epi32(held[0], held[1]), _mm256_hadd_epi32(held[2], held[3])});
    });
}

// A tile that is multiplied with one token only, from register to register. A sum for each SUB columns.
template <Codes CODES, WordKind KIND, int SUB>
INLINE void dot_words_once(const std::uint8_t* tile, const Table&, const WordCodes& codes, const std::int16_t* x,
                           SixteenInts* sums) {
    if constexpr (KIND == WordKind::wide) {
        dot_wide_once<CODES, SUB>(tile, codes, x, sums);
    } else each_constant<OPERANDS>([&](auto index) __attribute__((always_inline)) {
        constexpr int OPERAND = decltype(index)::value, FIRST = 2 * pair_of(OPERAND, 0), SECOND = 2 * pair_of(OPERAND, 1);
        SixteenInts first, second;
        operand_words<CODES, KIND, OPERAND>(tile, 0, codes, first.low, second.low);
        operand_words<CODES, KIND, OPERAND>(tile, 32, codes, first.high, second.high);
        add_words(sums[FIRST / SUB], first.low, first.high, two_words(x + FIRST));
        add_words(sums[SECOND / SUB], second.low, second.high, two_words(x + SECOND));
    });
}

template <Codes CODES, WordKind, int SUB>
INLINE void dot_words_once(const GridTile<CODES>& tile, const Table&, const WordCodes& codes, const std::int16_t* x,
                           SixteenInts* sums) {
    each_grid_operand(tile, *codes.grid, [&](auto index, __m256i low, __m256i high) __attribute__((always_inline)) {
        constexpr int OPERAND = decltype(index)::value, FIRST = 2 * pair_of(OPERAND, 0), SECOND = 2 * pair_of(OPERAND, 1);
        add_words(sums[FIRST / SUB], grid_words<0>(low), grid_words<0>(high), two_words(x + FIRST));
        add_words(sums[SECOND / SUB], grid_words<1>(low), grid_words<1>(high), two_words(x + SECOND));
    });
}

#endif

}  // namespace lowbit

#if defined(__ARM_NEON)
#include "linear_words_neon.h"
#endif

#if defined(__ARM_NEON)

namespace lowbit {

template <Codes CODES, WordKind KIND, int SUB>
INLINE void dot_words_once(const std::uint8_t* tile, const Table& table, const WordCodes& codes, const std::int16_t* x,
                           SixteenInts* sums) {
    WordTile w;
    decode_words<CODES, KIND>(tile, table, codes, w);
    each_constant<COLUMNS / SUB>([&](auto part) __attribute__((always_inline)) {
        constexpr int PART = decltype(part)::value;
        dot_words<PART * SUB, SUB, 1>(w, x, COLUMNS, sums + PART);
    });
}

}  // namespace lowbit

#endif
