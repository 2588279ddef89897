// Products with the vectors of codebooks, x as InputKind::words; see linear_vectors.h.
//
// A tile's operands are put together once and multiplied with every token. Few tokens beside many rows look products up
// that were made first, where codebooks are small (product_bytes). One token multiplies the vectors where they lie in the
// table otherwise: a register for each row, whose four sums are added up when the tile is through. Tried and slower on
// Zen 4: all offsets of 16 rows by vector instructions, through memory (1.8 times the time, with stores of 64 bytes and of
// 32); products with the vector as memory operand (1.1); fetching the next tile's vectors (1.2).

#include "linear_vectors.h"

#include <array>
#include <vector>

#include "linear_kernels.h"
#include "linear_rounded.h"
#include "linear_short_vectors.h"

namespace lowbit {
namespace {

// Numbers of a vector that are loaded at once.
constexpr int PIECE = 8;

struct Codebooks {
    explicit Codebooks(const Layout& layout, const std::int16_t* table_)
        : table(table_),
          books(vectors_of(layout.codes).books),
          numbers(static_cast<std::int64_t>(vectors_of(layout.codes).length) << vectors_of(layout.codes).bits) {}
    std::int64_t bytes() const { return books * numbers * static_cast<std::int64_t>(sizeof *table); }
    std::int64_t indices(const Layout& layout) const {
        return layout.blocks * layout.tiles * ROWS * vectors_of(layout.codes).of_row() * books;
    }

    const std::int16_t* table;
    int books;
    std::int64_t numbers;  // of a codebook
};

// each(indices of 16 rows, numbers of the table's first vector, column of the tile) for every piece of every vector.
template <int BYTES, int LENGTH, class Each>
INLINE void each_piece(const std::uint8_t* tile, const std::int16_t* book, const Each& each) {
    each_constant<COLUMNS / PIECE>([&](auto number) __attribute__((always_inline)) {
        constexpr int COLUMN = decltype(number)::value * PIECE;
        each(tile + COLUMN / LENGTH * ROWS * BYTES, book + COLUMN % LENGTH, COLUMN);
    });
}

#if defined(LOWBIT_AVX512)

INLINE __m128i bytes_at(const std::uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
INLINE __m128i piece_at(const std::int16_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

INLINE __m512i four_lanes(__m128i a, __m128i b, __m128i c, __m128i d) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Eight columns of 16 rows: lane l of register j is row 4 l + j.
template <int BYTES, int LENGTH>
INLINE void load_rows(const std::uint8_t* indices, const std::int16_t* book, __m512i (&rows)[4]) {
    UNROLL
    for (int j = 0; j < 4; ++j) {
        const auto of_lane = [&](int lane) __attribute__((always_inline)) {
            return piece_at(book + vector_index<BYTES>(indices, j * 4 + lane) * LENGTH);
        };
        rows[j] = four_lanes(of_lane(0), of_lane(1), of_lane(2), of_lane(3));
    }
}

template <int BYTES, int LENGTH>
INLINE void decode_vectors(const std::uint8_t* tile, const Codebooks& from, WordTile& w) {
    constexpr int INDICES = ROWS * COLUMNS / LENGTH * BYTES;  // bytes of a codebook's
    each_piece<BYTES, LENGTH>(tile, from.table, [&](const std::uint8_t* indices, const std::int16_t* book, int column)
                              __attribute__((always_inline)) {
        __m512i rows[4];
        load_rows<BYTES, LENGTH>(indices, book, rows);
        for (int more = 1; more < from.books; ++more) {
            __m512i added[4];
            load_rows<BYTES, LENGTH>(indices + more * INDICES, book + more * from.numbers, added);
            UNROLL
            for (int j = 0; j < 4; ++j) rows[j] = _mm512_add_epi16(rows[j], added[j]);
        }
        const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
        const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
        w[column / 2] = _mm512_unpacklo_epi64(a, c);
        w[column / 2 + 1] = _mm512_unpackhi_epi64(a, c);
        w[column / 2 + 2] = _mm512_unpacklo_epi64(b, d);
        w[column / 2 + 3] = _mm512_unpackhi_epi64(b, d);
    });
}

// sums[4 j + l] += the products of row 4 l + j.
template <int BYTES, int LENGTH, bool FIRST>
INLINE void add_book(const std::uint8_t* tile, const std::int16_t* book, const std::int16_t* x, __m128i (&sums)[ROWS]) {
    each_piece<BYTES, LENGTH>(tile, book, [&](const std::uint8_t* indices, const std::int16_t* numbers, int column)
                              __attribute__((always_inline)) {
        const __m128i eight = piece_at(x + column);
        UNROLL
        for (int place = 0; place < ROWS; ++place) {
            const __m128i sum = FIRST && column == 0 ? _mm_setzero_si128() : sums[place];
            sums[place] = _mm_dpwssd_epi32(sum, piece_at(numbers + vector_index<BYTES>(indices, place) * LENGTH), eight);
        }
    });
}

// BOOKS: 1, 2, or 0 for as many as there are.
template <int BYTES, int LENGTH, int BOOKS>
INLINE SixteenInts dot_vectors_once(const std::uint8_t* tile, const Codebooks& from, const std::int16_t* x) {
    constexpr int INDICES = ROWS * COLUMNS / LENGTH * BYTES;
    __m128i s[ROWS];
    add_book<BYTES, LENGTH, true>(tile, from.table, x, s);
    if constexpr (BOOKS == 2) add_book<BYTES, LENGTH, false>(tile + INDICES, from.table + from.numbers, x, s);
    if constexpr (BOOKS == 0) {
        for (int book = 1; book < from.books; ++book) {
            add_book<BYTES, LENGTH, false>(tile + book * INDICES, from.table + book * from.numbers, x, s);
        }
    }
    const __m512i a = four_lanes(s[0], s[1], s[2], s[3]), b = four_lanes(s[4], s[5], s[6], s[7]);
    const __m512i c = four_lanes(s[8], s[9], s[10], s[11]), d = four_lanes(s[12], s[13], s[14], s[15]);
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

#elif defined(__AVX2__)

template <int BYTES, int LENGTH>
INLINE void decode_vectors(const std::uint8_t* tile, const Codebooks& from, WordTile& w) {
    constexpr int INDICES = ROWS * COLUMNS / LENGTH * BYTES;
    const auto load_rows = [&](const std::uint8_t* indices, const std::int16_t* book, int half, __m256i (&rows)[4])
                               __attribute__((always_inline)) {
        UNROLL
        for (int j = 0; j < 4; ++j) {
            const auto of_lane = [&](int lane) __attribute__((always_inline)) {
                const std::int16_t* const at = book + vector_index<BYTES>(indices, j * 4 + half * 2 + lane) * LENGTH;
                return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
            };
            rows[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(of_lane(0)), of_lane(1), 1);
        }
    };
    each_piece<BYTES, LENGTH>(tile, from.table, [&](const std::uint8_t* indices, const std::int16_t* book, int column)
                              __attribute__((always_inline)) {
        SixteenInts* const to = w + column / 2;
        UNROLL
        for (int half = 0; half < 2; ++half) {
            __m256i rows[4];
            load_rows(indices, book, half, rows);
            for (int more = 1; more < from.books; ++more) {
                __m256i added[4];
                load_rows(indices + more * INDICES, book + more * from.numbers, half, added);
                UNROLL
                for (int j = 0; j < 4; ++j) rows[j] = _mm256_add_epi16(rows[j], added[j]);
            }
            const __m256i a = _mm256_unpacklo_epi32(rows[0], rows[1]), b = _mm256_unpackhi_epi32(rows[0], rows[1]);
            const __m256i c = _mm256_unpacklo_epi32(rows[2], rows[3]), d = _mm256_unpackhi_epi32(rows[2], rows[3]);
            const __m256i turned[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),
                                       _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
            UNROLL
            for (int pair = 0; pair < 4; ++pair) (half == 0 ? to[pair].low : to[pair].high) = turned[pair];
        }
    });
}

// sums[4 half + j] += the products of rows 8 half + j and 8 half + 4 + j, in a lane each.
template <int BYTES, int LENGTH>
INLINE void add_book(const std::uint8_t* tile, const std::int16_t* book, const std::int16_t* x, __m256i (&sums)[ROWS / 2]) {
    each_piece<BYTES, LENGTH>(tile, book, [&](const std::uint8_t* indices, const std::int16_t* numbers, int column)
                              __attribute__((always_inline)) {
        const auto piece_at = [](const std::int16_t* from) __attribute__((always_inline)) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        };
        const __m256i eight = _mm256_broadcastsi128_si256(piece_at(x + column));
        UNROLL
        for (int i = 0; i < ROWS / 2; ++i) {
            const auto row = [&](int lane) __attribute__((always_inline)) {
                return piece_at(numbers + vector_index<BYTES>(indices, i % 4 * 4 + i / 4 * 2 + lane) * LENGTH);
            };
            add_words(sums[i], _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1), eight);
        }
    });
}

// One token multiplies the vectors where they lie, as under AVX-512.
template <int BYTES, int LENGTH, int BOOKS>
INLINE SixteenInts dot_vectors_once(const std::uint8_t* tile, const Codebooks& from, const std::int16_t* x) {
    constexpr int INDICES = ROWS * COLUMNS / LENGTH * BYTES;
    __m256i s[ROWS / 2];
    UNROLL
    for (__m256i& sum : s) sum = _mm256_setzero_si256();
    add_book<BYTES, LENGTH>(tile, from.table, x, s);
    if constexpr (BOOKS == 2) add_book<BYTES, LENGTH>(tile + INDICES, from.table + from.numbers, x, s);
    if constexpr (BOOKS == 0) {
        for (int book = 1; book < from.books; ++book) {
            add_book<BYTES, LENGTH>(tile + book * INDICES, from.table + book * from.numbers, x, s);
        }
    }
    const auto four_rows = [](const __m256i* of) __attribute__((always_inline)) {
        return _mm256_hadd_epi32(_mm256_hadd_epi32(of[0], of[1]), _mm256_hadd_epi32(of[2], of[3]));
    };
    return {four_rows(s), four_rows(s + 4)};
}

#else

template <int BYTES, int LENGTH>
INLINE void decode_vectors(const std::uint8_t* tile, const Codebooks& from, WordTile& w) {
    constexpr int INDICES = ROWS * COLUMNS / LENGTH * BYTES;
    for (int book = 0; book < from.books; ++book) {
        const std::int16_t* const numbers = from.table + book * from.numbers;
        each_piece<BYTES, LENGTH>(tile + book * INDICES, numbers, [&](const std::uint8_t* indices, const std::int16_t* piece, int column) {
            for (int place = 0; place < ROWS; ++place) {
                const std::int16_t* const vector = piece + vector_index<BYTES>(indices, place) * LENGTH;
                const int row = place % 4 * 4 + place / 4;
                for (int i = 0; i < PIECE; ++i) {
                    std::int16_t& number = w.columns[column + i][row];
                    number = static_cast<std::int16_t>((book == 0 ? 0 : number) + vector[i]);
                }
            }
        });
    }
}

template <int BYTES, int LENGTH, int BOOKS>
INLINE SixteenInts dot_vectors_once(const std::uint8_t* tile, const Codebooks& from, const std::int16_t* x) {
    WordTile w;
    decode_vectors<BYTES, LENGTH>(tile, from, w);
    return dot_tile(w, x);
}

#endif

// A tile of vectors of any length.
template <int BYTES, int LENGTH>
INLINE void decode_any(const std::uint8_t* tile, const Codebooks& from, WordTile& w) {
    if constexpr (LENGTH < PIECE) decode_short<LENGTH>(tile, from.table, w);
    else decode_vectors<BYTES, LENGTH>(tile, from, w);
}

template <int BYTES, int LENGTH, int BOOKS>
INLINE SixteenInts dot_any_once(const std::uint8_t* tile, const Codebooks& from, const std::int16_t* x) {
    if constexpr (LENGTH < PIECE) {
        return dot_short_once<LENGTH>(tile, from.table, x);
    } else {
        return dot_vectors_once<BYTES, LENGTH, BOOKS>(tile, from, x);
    }
}

INLINE Sixteen scales_of(const Layout& layout, const std::uint8_t* block) {
    Sixteen scale = sixteen_zeros();
    by_kind(layout.scales, [&](auto kind) __attribute__((always_inline)) {
        constexpr Scales KIND = decltype(kind)::value;
        if constexpr (KIND != Scales::none) scale = read_sixteen<KIND>(block);
    });
    return sixteen_multiply(scale, sixteen_set(layout.factor));
}

// with(tiles, scales) for all tiles that share scales, which stand before them.
template <class With>
INLINE void each_group(const Layout& layout, const std::uint8_t* block, const With& with) {
    const std::int64_t count = layout.unit / COLUMNS, bytes = tile_bytes(layout.codes);
    for (std::int64_t first = 0; first < layout.tiles; first += count, block += layout.unit_bytes) {
        with(Tiles{block + layout.scale_bytes, bytes, first, first + count}, scales_of(layout, block));
    }
}

template <int BYTES, int LENGTH, int BOOKS>
__attribute__((noinline)) void multiply_vectors_once(const Layout& layout, const std::uint8_t* block,
                                                     const Codebooks& books, const Input& x, float* totals) {
    const auto dot = [&](const std::uint8_t* tile, const std::int16_t* columns) __attribute__((always_inline)) {
        fetch_indices(tile, vectors_of(layout.codes).bytes());
        return dot_any_once<BYTES, LENGTH, BOOKS>(tile, books, columns);
    };
    Sixteen total = sixteen_load(totals);
    each_group(layout, block, [&](const Tiles& tiles, Sixteen scale) __attribute__((always_inline)) {
        total = sixteen_fma(scale, add_tiles(sixteen_zeros(), tiles, x, dot), total);
    });
    sixteen_store(totals, total);
}

template <int BYTES, int LENGTH>
void multiply_vectors(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                      float (*totals)[ROWS]) {
    const Codebooks books(layout, decoding.vectors);
    have_near(books.table, books.bytes(), books.indices(layout));
    if (x.tokens == 1) {
        const auto once = books.books == 1   ? multiply_vectors_once<BYTES, LENGTH, 1>
                          : books.books == 2 ? multiply_vectors_once<BYTES, LENGTH, 2>
                                             : multiply_vectors_once<BYTES, LENGTH, 0>;
        return once(layout, block, books, x, totals[0]);
    }
    const auto decode = [&](const std::uint8_t* tile, WordTile& w) __attribute__((always_inline)) {
        decode_any<BYTES, LENGTH>(tile, books, w);
    };
    float sums[MOST_TOKENS][ROWS];
    each_group(layout, block, [&](const Tiles& tiles, Sixteen scale) {
        std::memset(sums, 0, static_cast<std::size_t>(x.tokens) * sizeof sums[0]);
        multiply_tiles(tiles, ROWS * COLUMNS / LENGTH * BYTES, layout, x, sums, decode);
        for (int t = 0; t < x.tokens; ++t) {
            sixteen_store(totals[t], sixteen_fma(scale, sixteen_load(sums[t]), sixteen_load(totals[t])));
        }
    });
}

#if defined(__AVX2__)

template <int BYTES, int LENGTH>
void round_vectors(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    const Codebooks books(layout, decoding.vectors);
    have_near(books.table, books.bytes(), books.indices(layout));
    PanelWriter writer(panel);
    each_group(layout, block, [&](const Tiles& tiles, Sixteen scale) {
        const std::uint8_t* at = tiles.at;
        for (std::int64_t tile = tiles.first; tile < tiles.last; ++tile, at += tiles.bytes) {
            fetch_indices(at, tiles.bytes);
            WordTile w;
            decode_any<BYTES, LENGTH>(at, books, w);
            writer.put_words(w, scale);
        }
    });
}

template <int BYTES>
RoundFunction rounded_by_length(int length) {
    if constexpr (BYTES == 1) {
        if (length == 2) return round_vectors<1, 2>;
        if (length == 4) return round_vectors<1, 4>;
    }
    switch (length) {
        case 8: return round_vectors<BYTES, 8>;
        case 16: return round_vectors<BYTES, 16>;
        case 32: return round_vectors<BYTES, 32>;
        default: return nullptr;
    }
}

#endif

#if defined(LOWBIT_AVX512)

// Whole products of 256 vectors with some columns of one token, as four planes of bytes: what 64 rows look up at once.
constexpr int VECTORS_OF_BYTE = 256;
constexpr int PRODUCT_BYTES = VECTORS_OF_BYTE * 4;
constexpr std::int64_t PRODUCTS_NEAR = 128 << 10;  // bytes that stay in L2 while many rows look theirs up

// Bytes 0 of 32 numbers in two registers, then bytes 1.
alignas(64) constexpr auto PLANES_OF_PRODUCTS = [] {
    std::array<std::uint8_t, 64> places{};
    for (int i = 0; i < 64; ++i) places[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(i % 32 * 4 + i / 32);
    return places;
}();

// The codebooks' pairs of numbers, vector by vector: (book, pair, 256), zeros where there are fewer vectors.
std::vector<std::int32_t> pairs_of(const Vectors& vectors, const Codebooks& from) {
    const int pairs = vectors.length / 2, count = 1 << vectors.bits;
    std::vector<std::int32_t> all(static_cast<std::size_t>(vectors.books * pairs * VECTORS_OF_BYTE), 0);
    for (int book = 0; book < vectors.books; ++book) {
        const auto* const numbers = reinterpret_cast<const std::uint8_t*>(from.table + book * from.numbers);
        for (int pair = 0; pair < pairs; ++pair) {
            std::int32_t* const to = all.data() + (book * pairs + pair) * VECTORS_OF_BYTE;
            for (int vector = 0; vector < count; ++vector) {
                std::memcpy(to + vector, numbers + (vector * pairs + pair) * 4, sizeof *to);
            }
        }
    }
    return all;
}

// The products of one book's vectors with some columns.
INLINE void multiply_book(const std::int32_t* pairs, int count, const std::int16_t* x, std::uint8_t* to) {
    const __m512i low = _mm512_load_si512(PLANES_OF_PRODUCTS.data()), high = _mm512_add_epi8(low, _mm512_set1_epi8(2));
    for (int quarter = 0; quarter < 4; ++quarter) {
        __m512i sums[4];
        UNROLL
        for (int i = 0; i < 4; ++i) sums[i] = _mm512_setzero_si512();
        for (int pair = 0; pair < count; ++pair) {
            std::int32_t two;
            std::memcpy(&two, x + pair * 2, sizeof two);
            const __m512i both = _mm512_set1_epi32(two);
            const std::int32_t* const from = pairs + pair * VECTORS_OF_BYTE + quarter * 64;
            UNROLL
            for (int i = 0; i < 4; ++i) sums[i] = _mm512_dpwssd_epi32(sums[i], _mm512_loadu_si512(from + i * 16), both);
        }
        const __m512i a = _mm512_permutex2var_epi8(sums[0], low, sums[1]);
        const __m512i b = _mm512_permutex2var_epi8(sums[2], low, sums[3]);
        const __m512i c = _mm512_permutex2var_epi8(sums[0], high, sums[1]);
        const __m512i d = _mm512_permutex2var_epi8(sums[2], high, sums[3]);
        std::uint8_t* const at = to + quarter * 64;
        _mm512_store_si512(at, _mm512_shuffle_i64x2(a, b, 0x44));
        _mm512_store_si512(at + 256, _mm512_shuffle_i64x2(a, b, 0xEE));
        _mm512_store_si512(at + 512, _mm512_shuffle_i64x2(c, d, 0x44));
        _mm512_store_si512(at + 768, _mm512_shuffle_i64x2(c, d, 0xEE));
    }
}

// 64 rows: four blocks', at their tiles' indices. FOURS times as many.
template <int FOURS>
INLINE void add_products(const std::uint8_t* const (&at)[4 * FOURS], std::int64_t offset, int count,
                         const std::uint8_t* products, __m512i (&sums)[FOURS][4]) {
    // Of the two low planes bytes are summed up: ``whole`` as words, ``high`` the words' high bytes. The two high planes
    // are words of the first eight rows of each block and of the others, whose sums may pass 16 bits.
    __m512i whole[FOURS][2], high[FOURS][2], top[FOURS][2];
    UNROLL
    for (int f = 0; f < FOURS; ++f) {
        for (int i = 0; i < 2; ++i) whole[f][i] = high[f][i] = top[f][i] = _mm512_setzero_si512();
    }
    for (int i = 0; i < count; ++i, offset += ROWS, products += PRODUCT_BYTES) {
        __m512i index[FOURS];
        __mmask64 upper[FOURS];
        UNROLL
        for (int f = 0; f < FOURS; ++f) {
            index[f] = four_lanes(bytes_at(at[f * 4] + offset), bytes_at(at[f * 4 + 1] + offset),
                                  bytes_at(at[f * 4 + 2] + offset), bytes_at(at[f * 4 + 3] + offset));
            upper[f] = _mm512_movepi8_mask(index[f]);
        }
        const auto plane = [&](int number, __m512i (&found)[FOURS]) __attribute__((always_inline)) {
            const std::uint8_t* const from = products + number * VECTORS_OF_BYTE;
            __m512i a = _mm512_load_si512(from), b = _mm512_load_si512(from + 64);
            __m512i c = _mm512_load_si512(from + 128), d = _mm512_load_si512(from + 192);
            asm volatile("" : "+" ZMM(a), "+" ZMM(b), "+" ZMM(c), "+" ZMM(d));  // else each is read for every 64 rows
            UNROLL
            for (int f = 0; f < FOURS; ++f) {
                found[f] = _mm512_mask_blend_epi8(upper[f], _mm512_permutex2var_epi8(a, index[f], b),
                                                  _mm512_permutex2var_epi8(c, index[f], d));
            }
        };
        __m512i found[FOURS], higher[FOURS];
        UNROLL
        for (int number = 0; number < 2; ++number) {
            plane(number, found);
            UNROLL
            for (int f = 0; f < FOURS; ++f) {
                whole[f][number] = _mm512_add_epi16(whole[f][number], found[f]);
                high[f][number] = _mm512_add_epi16(high[f][number], _mm512_srli_epi16(found[f], 8));
            }
        }
        plane(2, found);
        plane(3, higher);
        UNROLL
        for (int f = 0; f < FOURS; ++f) {
            top[f][0] = _mm512_add_epi16(top[f][0], _mm512_unpacklo_epi8(found[f], higher[f]));
            top[f][1] = _mm512_add_epi16(top[f][1], _mm512_unpackhi_epi8(found[f], higher[f]));
        }
    }
    const __m512i weights = _mm512_set1_epi32(1 | 256 << 16), none = _mm512_setzero_si512();
    UNROLL
    for (int f = 0; f < FOURS; ++f) {
        __m512i words[2][2];
        UNROLL
        for (int number = 0; number < 2; ++number) {
            const __m512i low = _mm512_sub_epi16(whole[f][number], _mm512_slli_epi16(high[f][number], 8));
            words[0][number] = _mm512_unpacklo_epi16(low, high[f][number]);
            words[1][number] = _mm512_unpackhi_epi16(low, high[f][number]);
        }
        UNROLL
        for (int half = 0; half < 2; ++half) {
            const __m512i(&w)[2] = words[half];
            sums[f][half * 2] = _mm512_dpwssd_epi32(_mm512_unpacklo_epi16(none, top[f][half]),
                                                    _mm512_unpacklo_epi16(w[0], w[1]), weights);
            sums[f][half * 2 + 1] = _mm512_dpwssd_epi32(_mm512_unpackhi_epi16(none, top[f][half]),
                                                        _mm512_unpackhi_epi16(w[0], w[1]), weights);
        }
    }
}

// Register i: places 4 i on of four blocks, row i and every fourth -> a register for each block's rows.
INLINE void into_rows(const __m512 (&from)[4], __m512 (&to)[4]) {
    const __m512i a = _mm512_castps_si512(from[0]), b = _mm512_castps_si512(from[1]);
    const __m512i c = _mm512_castps_si512(from[2]), d = _mm512_castps_si512(from[3]);
    // Lanes of two blocks each: (a, b), (c, d)
    const __m512i ab[2] = {_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xEE)};
    const __m512i cd[2] = {_mm512_shuffle_i32x4(c, d, 0x44), _mm512_shuffle_i32x4(c, d, 0xEE)};
    alignas(64) std::int32_t places[2][ROWS];
    for (int block = 0; block < 2; ++block) {
        for (int row = 0; row < ROWS; ++row) {
            places[block][row] = row % 4 / 2 * 16 + row % 2 * 8 + block * 4 + row / 4;
        }
    }
    UNROLL
    for (int block = 0; block < 4; ++block) {
        const __m512i order = _mm512_load_si512(places[block % 2]);
        to[block] = _mm512_castsi512_ps(_mm512_permutex2var_epi32(ab[block / 2], order, cd[block / 2]));
    }
}

// Tiles first to last of FOURS * 4 blocks, the last of ``count`` in the place of any behind it. What totals hold of four
// blocks is the sums of ``add_products``, in its order. ``next``: of as many blocks, which are read after these.
template <int FOURS>
__attribute__((noinline)) void look_up_tiles(const Layout& layout, const std::uint8_t* block, int count, const Input& x,
                                             int token, std::int64_t first, std::int64_t last,
                                             const std::uint8_t* products, const std::uint8_t* next,
                                             float (*totals)[ROWS]) {
    const Vectors vectors = vectors_of(layout.codes);
    const std::int64_t bytes = tile_bytes(layout.codes);
    const int lookups = vectors.books * vectors.of_row();
    const std::uint8_t* at[4 * FOURS];
    for (int i = 0; i < 4 * FOURS; ++i) {
        at[i] = block + std::min(i, count - 1) * layout.block_bytes + layout.scale_bytes;
    }
    __m512 sums[FOURS][4];
    UNROLL
    for (int f = 0; f < FOURS; ++f) {
        for (int i = 0; i < 4; ++i) sums[f][i] = _mm512_loadu_ps(totals[(f * 4 + i) * x.tokens]);
    }
    for (std::int64_t tile = first; tile < last; ++tile, next += bytes) {
        for (int i = 0; i < 4 * FOURS; ++i) {
            for (std::int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(next + i * layout.block_bytes + line);
        }
        __m512i whole[FOURS][4];
        add_products<FOURS>(at, tile * bytes, lookups, products + tile * lookups * PRODUCT_BYTES, whole);
        const __m512 scale = _mm512_set1_ps(x.scales[tile * x.tokens + token]);
        UNROLL
        for (int f = 0; f < FOURS; ++f) {
            UNROLL
            for (int i = 0; i < 4; ++i) sums[f][i] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(whole[f][i]), sums[f][i]);
        }
    }
    UNROLL
    for (int f = 0; f < FOURS; ++f) {
        for (int i = 0; i < 4; ++i) _mm512_storeu_ps(totals[(f * 4 + i) * x.tokens], sums[f][i]);
    }
}

#endif

template <int BYTES>
BlockFunction by_length(int length) {
    if constexpr (BYTES == 1) {
        if (length == 2) return multiply_vectors<1, 2>;
        if (length == 4) return multiply_vectors<1, 4>;
    }
    switch (length) {
        case 8: return multiply_vectors<BYTES, 8>;
        case 16: return multiply_vectors<BYTES, 16>;
        case 32: return multiply_vectors<BYTES, 32>;
        default: return nullptr;
    }
}

}  // namespace

BlockFunction vector_function(const Layout& layout) {
    const Vectors vectors = vectors_of(layout.codes);
    return vectors.index_bytes() == 1 ? by_length<1>(vectors.length) : by_length<2>(vectors.length);
}

#if defined(__AVX2__)

RoundFunction rounded_vectors(const Layout& layout) {
    const Vectors vectors = vectors_of(layout.codes);
    return vectors.index_bytes() == 1 ? rounded_by_length<1>(vectors.length) : rounded_by_length<2>(vectors.length);
}

#endif

void have_near(const std::int16_t* table, std::int64_t bytes, std::int64_t indices) {
    static thread_local const std::int16_t* last = nullptr;
    constexpr std::int64_t LINE = 64;
    if (last == table) return;
    last = table;
    if (indices * LINE < 4 * bytes) return;
    const auto* const first = reinterpret_cast<const char*>(table);
    for (std::int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(first + at, 0, 2);
}

#if defined(LOWBIT_AVX512)

std::int64_t product_bytes(const Layout& layout, std::int64_t tokens) {
    if (!is_vectors(layout.codes) || tokens > MOST_LOOKED_UP || layout.blocks < LEAST_LOOKED_UP) return 0;
    const Vectors vectors = vectors_of(layout.codes);
    if (vectors.index_bytes() != 1 || vectors.length < PIECE) return 0;  // short ones are faster looked up themselves
    if (layout.unit / COLUMNS != layout.tiles) return 0;                 // sums go on to the end of a row
    return tokens * layout.tiles * vectors.books * vectors.of_row() * PRODUCT_BYTES;
}

void make_products(const Layout& layout, const Decoding& decoding, const Input& x, std::int64_t first, std::int64_t last,
                   std::uint8_t* to) {
    const Vectors vectors = vectors_of(layout.codes);
    const int pairs = vectors.length / 2, of_tile = vectors.books * vectors.of_row();
    const std::vector<std::int32_t> numbers = pairs_of(vectors, Codebooks(layout, decoding.vectors));
    for (int token = 0; token < x.tokens; ++token) {
        for (std::int64_t tile = first; tile < last; ++tile) {
            std::uint8_t* at = to + (token * layout.tiles + tile) * of_tile * PRODUCT_BYTES;
            for (int book = 0; book < vectors.books; ++book) {
                for (int vector = 0; vector < vectors.of_row(); ++vector, at += PRODUCT_BYTES) {
                    const std::int16_t* const columns = x.at<std::int16_t>(tile, token) + vector * vectors.length;
                    multiply_book(numbers.data() + book * pairs * VECTORS_OF_BYTE, pairs, columns, at);
                }
            }
        }
    }
}

void look_up_products(const Layout& layout, const std::uint8_t* first, int blocks, const Input& x,
                      const std::uint8_t* products, float (*totals)[ROWS]) {
    const Vectors vectors = vectors_of(layout.codes);
    const std::int64_t of_tile = vectors.books * vectors.of_row() * PRODUCT_BYTES;
    const std::int64_t together = std::max<std::int64_t>(1, PRODUCTS_NEAR / of_tile);
    // Four blocks' sums lie among each other until all tiles are through.
    std::memset(totals, 0, static_cast<std::size_t>((blocks + 3) / 4 * 4 * x.tokens) * sizeof totals[0]);
    for (int token = 0; token < x.tokens; ++token, products += layout.tiles * of_tile, ++totals) {
        for (std::int64_t tile = 0; tile < layout.tiles; tile += together) {
            const std::int64_t last = std::min(layout.tiles, tile + together);
            for (int block = 0; block < blocks; block += LOOKED_UP_TOGETHER) {
                const int count = std::min(LOOKED_UP_TOGETHER, blocks - block);
                const bool end = block + LOOKED_UP_TOGETHER >= blocks;
                const std::uint8_t* const next = first + (end ? 0 : block + LOOKED_UP_TOGETHER) * layout.block_bytes +
                                                 layout.scale_bytes + (end ? last : tile) * tile_bytes(layout.codes);
                const auto look_up = count > 4 ? look_up_tiles<2> : look_up_tiles<1>;
                look_up(layout, first + block * layout.block_bytes, count, x, token, tile, last, products, next,
                        totals + block * x.tokens);
            }
        }
        for (int block = 0; block < blocks; block += 4) {
            __m512 sums[4], rows[4];
            for (int i = 0; i < 4; ++i) sums[i] = _mm512_loadu_ps(totals[(block + i) * x.tokens]);
            into_rows(sums, rows);
            for (int i = 0; i < 4 && block + i < blocks; ++i) {
                const Sixteen scale = scales_of(layout, first + (block + i) * layout.block_bytes);
                sixteen_store(totals[(block + i) * x.tokens], sixteen_multiply(rows[i], scale));
            }
        }
    }
}

#endif

}  // namespace lowbit
