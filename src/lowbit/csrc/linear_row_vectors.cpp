// Products with vectors of rows, x as InputKind::words; see linear_row_vectors.h.

#include "linear_row_vectors.h"

#include "linear_kernels.h"
#include "linear_rounded.h"
#include "linear_vectors.h"

namespace lowbit {
namespace {

// Codebooks of some columns: of STRIDE numbers a vector; indices have MAIN bytes, those of the residual one SECOND or there
// is none.
template <int STRIDE_, int MAIN_, int SECOND_>
struct Book {
    static constexpr int STRIDE = STRIDE_, MAIN = MAIN_, SECOND = SECOND_;
    static constexpr int PIECES = ROWS / STRIDE;
    static constexpr std::int64_t SECOND_PLACE = COLUMNS * PIECES * MAIN;  // of the residual codebook's indices
    static constexpr std::int64_t BYTES = COLUMNS * PIECES * (MAIN + SECOND);
    const std::int16_t* main;
    const std::int16_t* second;
};

#if defined(__AVX2__)

template <int STRIDE, int BYTES>
INLINE __m256i vectors_at(const std::uint8_t* indices, int first, const std::int16_t* table) {
    const auto at = [&](int piece) __attribute__((always_inline)) {
        return reinterpret_cast<const __m128i*>(table + vector_index<BYTES>(indices, first + piece) * STRIDE);
    };
    if constexpr (STRIDE == 16) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at(0)));
    } else if constexpr (STRIDE == 8) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(at(0))), _mm_loadu_si128(at(1)), 1);
    } else {
        const __m128i low = _mm_unpacklo_epi64(_mm_loadl_epi64(at(0)), _mm_loadl_epi64(at(1)));
        const __m128i high = _mm_unpacklo_epi64(_mm_loadl_epi64(at(2)), _mm_loadl_epi64(at(3)));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
}

// 16 rows of a column of a tile.
template <class BOOK>
INLINE __m256i column_at(const std::uint8_t* tile, int column, const BOOK& book) {
    __m256i numbers = vectors_at<BOOK::STRIDE, BOOK::MAIN>(tile, column * BOOK::PIECES, book.main);
    if constexpr (BOOK::SECOND != 0) {
        const std::uint8_t* const indices = tile + BOOK::SECOND_PLACE;
        numbers = _mm256_add_epi16(
            numbers, vectors_at<BOOK::STRIDE, BOOK::SECOND>(indices, column * BOOK::PIECES, book.second));
    }
    return numbers;
}

#endif

#if defined(LOWBIT_AVX512)

constexpr int QUADS = COLUMNS / 4;

// Two columns' numbers in turns: of the first two of four, of the last two.
struct Turns {
    __m512i first, second;
    Turns() {
        alignas(64) std::int16_t places[2][32];
        for (int row = 0; row < ROWS; ++row) {
            for (int half = 0; half < 2; ++half) {
                places[half][2 * row] = static_cast<std::int16_t>(half * ROWS + row);
                places[half][2 * row + 1] = static_cast<std::int16_t>(32 + half * ROWS + row);
            }
        }
        first = _mm512_load_si512(places[0]);
        second = _mm512_load_si512(places[1]);
    }
};

template <class BOOK>
INLINE void four_columns(const std::uint8_t* tile, int column, const BOOK& book, const Turns& turns, __m512i& first,
                         __m512i& second) {
    const auto two = [&](int low, int high) __attribute__((always_inline)) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(column_at(tile, column + low, book)),
                                  column_at(tile, column + high, book), 1);
    };
    const __m512i even = two(0, 2), odd = two(1, 3);
    first = _mm512_permutex2var_epi16(even, turns.first, odd);
    second = _mm512_permutex2var_epi16(even, turns.second, odd);
}

template <class BOOK>
INLINE void decode_row_vectors(const std::uint8_t* tile, const BOOK& book, const Turns& turns, WordTile& w) {
    each_constant<QUADS>([&](auto quad) __attribute__((always_inline)) {
        constexpr int QUAD = decltype(quad)::value;
        four_columns(tile, QUAD * 4, book, turns, w[QUAD * 2], w[QUAD * 2 + 1]);
    });
}

template <class BOOK>
INLINE SixteenInts dot_row_vectors_once(const std::uint8_t* tile, const BOOK& book, const Turns& turns, const std::int16_t* x) {
    const auto pair = [&](int column) __attribute__((always_inline)) {
        std::int32_t two;
        std::memcpy(&two, x + column, sizeof two);
        return _mm512_set1_epi32(two);
    };
    __m512i a = _mm512_setzero_si512(), b = a;
    each_constant<QUADS>([&](auto quad) __attribute__((always_inline)) {
        constexpr int COLUMN = decltype(quad)::value * 4;
        __m512i first, second;
        four_columns(tile, COLUMN, book, turns, first, second);
        a = _mm512_dpwssd_epi32(a, first, pair(COLUMN));
        b = _mm512_dpwssd_epi32(b, second, pair(COLUMN + 2));
    });
    return _mm512_add_epi32(a, b);
}

INLINE void load_words(const std::uint8_t* tile, WordTile& w) {
    UNROLL
    for (int i = 0; i < PAIRS; ++i) w[i] = _mm512_loadu_si512(tile + i * 64);
}

#else

struct Turns {};

#if defined(__AVX2__)

template <class BOOK>
INLINE void decode_row_vectors(const std::uint8_t* tile, const BOOK& book, const Turns&, WordTile& w) {
    UNROLL
    for (int i = 0; i < PAIRS; ++i) {
        const __m256i a = column_at(tile, 2 * i, book), b = column_at(tile, 2 * i + 1, book);
        const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
        w[i].low = _mm256_permute2x128_si256(low, high, 0x20);
        w[i].high = _mm256_permute2x128_si256(low, high, 0x31);
    }
}

// From register to register; lanes of 128 bits come into order of rows at the end.
template <class BOOK>
INLINE SixteenInts dot_row_vectors_once(const std::uint8_t* tile, const BOOK& book, const Turns&, const std::int16_t* x) {
    __m256i even = _mm256_setzero_si256(), odd = even;  // four rows each of every eight
    UNROLL
    for (int column = 0; column < COLUMNS; column += 2) {
        const __m256i a = column_at(tile, column, book), b = column_at(tile, column + 1, book), two = two_words(x + column);
        add_words(even, _mm256_unpacklo_epi16(a, b), two);
        add_words(odd, _mm256_unpackhi_epi16(a, b), two);
    }
    return {_mm256_permute2x128_si256(even, odd, 0x20), _mm256_permute2x128_si256(even, odd, 0x31)};
}

INLINE void load_words(const std::uint8_t* tile, WordTile& w) {
    UNROLL
    for (int i = 0; i < PAIRS; ++i) {
        w[i].low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + i * 64));
        w[i].high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + i * 64 + 32));
    }
}

#else

template <class BOOK>
INLINE void decode_row_vectors(const std::uint8_t* tile, const BOOK& book, const Turns&, WordTile& w) {
    for (int column = 0; column < COLUMNS; ++column) {
        for (int piece = 0; piece < BOOK::PIECES; ++piece) {
            const int place = column * BOOK::PIECES + piece;
            const std::int16_t* const from = book.main + vector_index<BOOK::MAIN>(tile, place) * BOOK::STRIDE;
            std::int16_t* const to = w.columns[column] + piece * BOOK::STRIDE;
            std::memcpy(to, from, BOOK::STRIDE * sizeof *to);
            if constexpr (BOOK::SECOND != 0) {
                const std::size_t added = vector_index<BOOK::SECOND>(tile + BOOK::SECOND_PLACE, place);
                const std::int16_t* const more = book.second + added * BOOK::STRIDE;
                for (int i = 0; i < BOOK::STRIDE; ++i) to[i] = static_cast<std::int16_t>(to[i] + more[i]);
            }
        }
    }
}

INLINE void load_words(const std::uint8_t* tile, WordTile& w) {
    for (int column = 0; column < COLUMNS; ++column) {
        for (int row = 0; row < ROWS; ++row) {
            std::memcpy(&w.columns[column][row], tile + column / 2 * 64 + row * 4 + column % 2 * 2, 2);
        }
    }
}

template <class BOOK>
INLINE SixteenInts dot_row_vectors_once(const std::uint8_t* tile, const BOOK& book, const Turns& turns, const std::int16_t* x) {
    WordTile w;
    decode_row_vectors(tile, book, turns, w);
    return dot_tile(w, x);
}

#endif

#endif

template <int STRIDE, int MAIN, int SECOND>
Book<STRIDE, MAIN, SECOND> book_of(const RowVectors& vectors, const std::int16_t* table, int number) {
    const std::int16_t* const first = table + number * vectors.numbers();
    return {first, first + static_cast<std::int64_t>(vectors.centroids) * STRIDE};
}

// with(a book, its tiles) for all books in turn.
template <int STRIDE, int MAIN, int SECOND, class With>
INLINE void each_book(const Layout& layout, const RowVectors& vectors, const std::uint8_t* block, const std::int16_t* table,
                      const With& with) {
    using Codebooks = Book<STRIDE, MAIN, SECOND>;
    const std::int64_t count = vectors.book_tiles(layout.tiles), first = vectors.outlier_tiles;
    Tiles tiles{block + first * RowVectors::WORD_TILE, Codebooks::BYTES, first, first + count};
    for (int number = 0; number < vectors.books; ++number) {
        with(book_of<STRIDE, MAIN, SECOND>(vectors, table, number), tiles);
        tiles = {tiles.at + count * tiles.bytes, tiles.bytes, tiles.last, tiles.last + count};
    }
}

template <int STRIDE, int MAIN, int SECOND>
__attribute__((noinline)) void multiply_once(const Layout& layout, const RowVectors& vectors, const std::uint8_t* block,
                                             const std::int16_t* table, const Input& x, float* totals) {
    using Codebooks = Book<STRIDE, MAIN, SECOND>;
    const Turns turns;
    const auto dot_outliers = [](const std::uint8_t* tile, const std::int16_t* columns) __attribute__((always_inline)) {
        WordTile w;
        load_words(tile, w);
        return dot_tile(w, columns);
    };
    Sixteen total =
        add_tiles(sixteen_load(totals), {block, RowVectors::WORD_TILE, 0, vectors.outlier_tiles}, x, dot_outliers);
    each_book<STRIDE, MAIN, SECOND>(layout, vectors, block, table, [&](const Codebooks& book, const Tiles& tiles)
                                    __attribute__((always_inline)) {
        const auto dot = [&](const std::uint8_t* tile, const std::int16_t* columns) __attribute__((always_inline)) {
            fetch_indices(tile, Codebooks::BYTES);
            return dot_row_vectors_once(tile, book, turns, columns);
        };
        total = add_tiles(total, tiles, x, dot);
    });
    sixteen_store(totals, total);
}

// What is the same for all books is compiled once.
__attribute__((noinline)) void multiply_outliers(const Layout& layout, const RowVectors& vectors, const std::uint8_t* block,
                                                 const Input& x, float (*totals)[ROWS]) {
    multiply_tiles({block, RowVectors::WORD_TILE, 0, vectors.outlier_tiles}, 0, layout, x, totals,
                   [](const std::uint8_t* tile, WordTile& w) __attribute__((always_inline)) { load_words(tile, w); });
}

template <int STRIDE, int MAIN, int SECOND>
void multiply_many(const Layout& layout, const RowVectors& vectors, const std::uint8_t* block, const std::int16_t* table,
                   const Input& x, float (*totals)[ROWS]) {
    using Codebooks = Book<STRIDE, MAIN, SECOND>;
    const Turns turns;
    multiply_outliers(layout, vectors, block, x, totals);
    each_book<STRIDE, MAIN, SECOND>(layout, vectors, block, table, [&](const Codebooks& book, const Tiles& tiles)
                                    __attribute__((always_inline)) {
        const auto decode = [&](const std::uint8_t* tile, WordTile& w) __attribute__((always_inline)) {
            decode_row_vectors(tile, book, turns, w);
        };
        multiply_tiles(tiles, Codebooks::BYTES, layout, x, totals, decode);
    });
}

template <int STRIDE, int MAIN, int SECOND>
void multiply_row_vectors(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                          float (*totals)[ROWS]) {
    const RowVectors vectors(*layout.row_vectors);
    have_near(decoding.vectors, vectors.table_bytes(), vectors.indices(layout.blocks * layout.tiles));
    if (x.tokens == 1) {
        multiply_once<STRIDE, MAIN, SECOND>(layout, vectors, block, decoding.vectors, x, totals[0]);
    } else {
        multiply_many<STRIDE, MAIN, SECOND>(layout, vectors, block, decoding.vectors, x, totals);
    }
    if (vectors.length == STRIDE) return;
    for (int t = 0; t < x.tokens; ++t) {  // vectors that do not fill their lanes: rows one behind another
        for (int row = vectors.length; row < layout.height; ++row) totals[t][row] = totals[t][vectors.lane(row)];
    }
}

#if defined(LOWBIT_AVX512)

template <int STRIDE, int MAIN, int SECOND>
void round_row_vectors(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    using Codebooks = Book<STRIDE, MAIN, SECOND>;
    const RowVectors vectors(*layout.row_vectors);
    have_near(decoding.vectors, vectors.table_bytes(), vectors.indices(layout.blocks * layout.tiles));
    alignas(64) std::int32_t lanes[ROWS];
    for (int row = 0; row < ROWS; ++row) lanes[row] = row < layout.height ? vectors.lane(row) : 0;
    const __m512i order = _mm512_load_si512(lanes);
    const auto in_rows = [&](__m512i both) __attribute__((always_inline)) { return _mm512_permutexvar_epi32(order, both); };
    const Turns turns;
    const Sixteen one = sixteen_set(1.0f);
    PanelWriter writer(panel);
    WordTile w;
    for (std::int64_t tile = 0; tile < vectors.outlier_tiles; ++tile) {
        load_words(block + tile * RowVectors::WORD_TILE, w);
        writer.put_words(w, one, in_rows);
    }
    each_book<STRIDE, MAIN, SECOND>(layout, vectors, block, decoding.vectors, [&](const Codebooks& book, const Tiles& tiles)
                                    __attribute__((always_inline)) {
        for (std::int64_t tile = tiles.first; tile < tiles.last; ++tile) {
            const std::uint8_t* const indices = tiles.at + (tile - tiles.first) * tiles.bytes;
            fetch_indices(indices, Codebooks::BYTES);
            decode_row_vectors(indices, book, turns, w);
            writer.put_words(w, one, in_rows);
        }
    });
}

#elif defined(__AVX2__)

// Rows of vectors that do not fill their lanes.
__attribute__((noinline)) void put_in_rows(const RowVectors& vectors, WordTile& w) {
    for (SixteenInts& both : w) {
        alignas(32) std::int32_t from[ROWS], to[ROWS];
        ints_store(from, both);
        for (int row = 0; row < ROWS; ++row) to[row] = row < vectors.height() ? from[vectors.lane(row)] : from[0];
        both = ints_load(to);
    }
}

template <int STRIDE, int MAIN, int SECOND>
void round_row_vectors(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, std::uint8_t* panel) {
    using Codebooks = Book<STRIDE, MAIN, SECOND>;
    const RowVectors vectors(*layout.row_vectors);
    have_near(decoding.vectors, vectors.table_bytes(), vectors.indices(layout.blocks * layout.tiles));
    const Turns turns;
    const Sixteen one = sixteen_set(1.0f);
    const std::int64_t of_book = vectors.book_tiles(layout.tiles);
    std::int64_t next = vectors.outlier_tiles;  // tile of another book
    Codebooks book{};
    int number = 0;
    PanelWriter writer(panel);
    // One loop: what is written of a tile is most of what this takes to compile.
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        WordTile w;
        if (tile < vectors.outlier_tiles) {
            load_words(block, w);
            block += RowVectors::WORD_TILE;
        } else {
            if (tile == next) {
                book = book_of<STRIDE, MAIN, SECOND>(vectors, decoding.vectors, number++);
                next += of_book;
            }
            fetch_indices(block, Codebooks::BYTES);
            decode_row_vectors(block, book, turns, w);
            block += Codebooks::BYTES;
        }
        if (STRIDE < ROWS && vectors.length != STRIDE) put_in_rows(vectors, w);
        writer.put_words(w, one);
    }
}

#endif

#if defined(__AVX2__)

template <int STRIDE, int MAIN>
RoundFunction rounded_by_second(int bytes) {
    return bytes == 0   ? round_row_vectors<STRIDE, MAIN, 0>
           : bytes == 1 ? round_row_vectors<STRIDE, MAIN, 1>
                        : round_row_vectors<STRIDE, MAIN, 2>;
}

template <int STRIDE>
RoundFunction rounded_by_bytes(const RowVectors& vectors) {
    const int second = vectors.second_bytes();
    return vectors.main_bytes() == 1 ? rounded_by_second<STRIDE, 1>(second) : rounded_by_second<STRIDE, 2>(second);
}

#endif

template <int STRIDE, int MAIN>
BlockFunction by_second(int bytes) {
    return bytes == 0   ? multiply_row_vectors<STRIDE, MAIN, 0>
           : bytes == 1 ? multiply_row_vectors<STRIDE, MAIN, 1>
                        : multiply_row_vectors<STRIDE, MAIN, 2>;
}

template <int STRIDE>
BlockFunction by_bytes(const RowVectors& vectors) {
    const int second = vectors.second_bytes();
    return vectors.main_bytes() == 1 ? by_second<STRIDE, 1>(second) : by_second<STRIDE, 2>(second);
}

}  // namespace

BlockFunction row_vector_function(const Layout& layout) {
    const RowVectors vectors(*layout.row_vectors);
    switch (vectors.stride()) {
        case 4: return by_bytes<4>(vectors);
        case 8: return by_bytes<8>(vectors);
        default: return by_bytes<16>(vectors);
    }
}

#if defined(__AVX2__)

RoundFunction rounded_row_vectors(const Layout& layout) {
    const RowVectors vectors(*layout.row_vectors);
    switch (vectors.stride()) {
        case 4: return rounded_by_bytes<4>(vectors);
        case 8: return rounded_by_bytes<8>(vectors);
        default: return rounded_by_bytes<16>(vectors);
    }
}

#endif

float take_columns(const lowbit_row_vectors& weight, const float* row, std::int64_t columns, float* out) {
    Sixteen held = sixteen_zeros();
    for (std::int64_t column = 0; column < columns; column += 16) {
        alignas(64) float taken[16];
        for (int i = 0; i < 16; ++i) taken[i] = weight.order[column + i] < 0 ? 0.0f : row[weight.order[column + i]];
        const Sixteen x = sixteen_load(taken);
        sixteen_store(out + column, sixteen_multiply(x, sixteen_load(weight.multiplier + column)));
        if (weight.offset != nullptr) held = sixteen_fma(sixteen_load(weight.offset + column), x, held);
    }
    return sixteen_sum(held);
}

void row_of_row_vectors(const lowbit_weight& weight, const Layout& layout, std::int64_t row, float* out) {
    const lowbit_row_vectors& columns = *weight.row_vectors;
    const RowVectors vectors(columns);
    const auto* const table = reinterpret_cast<const std::int16_t*>(weight.table);
    const std::uint8_t* at = weight.data + row / layout.height * layout.block_bytes;
    const int inside = static_cast<int>(row % layout.height), piece = inside / vectors.length;
    const auto index = [&](const std::uint8_t* indices, int bytes, int column) {
        const int place = column * vectors.pieces() + piece;
        return static_cast<std::int64_t>(bytes == 1 ? vector_index<1>(indices, place) : vector_index<2>(indices, place));
    };
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const bool outliers = tile < vectors.outlier_tiles;
        const std::int64_t book = outliers ? 0 : (tile - vectors.outlier_tiles) / vectors.book_tiles(layout.tiles);
        const std::int16_t* const main = table + book * vectors.numbers() + inside % vectors.length;
        for (int column = 0; column < COLUMNS; ++column) {
            const std::int64_t stored = tile * COLUMNS + column;
            if (columns.order[stored] < 0) continue;
            int word;
            if (outliers) {
                std::int16_t number;
                std::memcpy(&number, at + column / 2 * 64 + vectors.lane(inside) * 4 + column % 2 * 2, sizeof number);
                word = number;
            } else {
                word = main[index(at, vectors.main_bytes(), column) * vectors.stride()];
                if (vectors.residual != 0) {
                    const std::uint8_t* const second = at + COLUMNS * vectors.pieces() * vectors.main_bytes();
                    const std::int64_t added = vectors.centroids + index(second, vectors.second_bytes(), column);
                    word += main[added * vectors.stride()];
                }
            }
            float value = static_cast<float>(word) * columns.multiplier[stored];
            if (columns.offset != nullptr) value += columns.offset[stored];
            out[columns.order[stored]] = value;
        }
        at += outliers ? RowVectors::WORD_TILE : vectors.tile_bytes();
    }
}

}  // namespace lowbit
