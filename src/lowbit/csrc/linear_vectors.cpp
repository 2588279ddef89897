// Products with the vectors of codebooks, x as InputKind::words; see linear_vectors.h.
//
// A tile's operands are put together once and multiplied with every token. One token multiplies the vectors where they
// lie in the table: a register for each row, whose four sums are added up when the tile is through. Tried and slower on
// Zen 4: all offsets of 16 rows by vector instructions, through memory (1.8 times the time, with stores of 64 bytes and of
// 32); products with the vector as memory operand (1.1); fetching the next tile's vectors (1.2).

#include "linear_vectors.h"

#include "linear_kernels.h"

namespace lowbit {
namespace {

// Numbers of a vector that are loaded at once.
constexpr int PIECE = 8;

constexpr std::int64_t AHEAD = 2048;  // bytes of indices

struct Codebooks {
    explicit Codebooks(const Layout& layout, const std::int16_t* table_)
        : table(table_),
          books(vectors_of(layout.codes).books),
          numbers(static_cast<std::int64_t>(vectors_of(layout.codes).length) << vectors_of(layout.codes).bits) {}
    std::int64_t bytes() const { return books * numbers * static_cast<std::int64_t>(sizeof *table); }

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

#if defined(__AVX512BF16__)

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

#else

#if defined(__AVX2__)

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

#endif

template <int BYTES, int LENGTH, int BOOKS>
INLINE SixteenInts dot_vectors_once(const std::uint8_t* tile, const Codebooks& from, const std::int16_t* x) {
    WordTile w;
    decode_vectors<BYTES, LENGTH>(tile, from, w);
    SixteenInts sum[1] = {ints_set(0)};
    dot_words<0, COLUMNS, 1>(w, x, COLUMNS, sum);
    return sum[0];
}

#endif

struct VectorStep {
    const WordTile& w;
    const Input& x;
    std::int64_t tile;
    float (*totals)[ROWS];

    template <int TOKENS>
    INLINE void operator()(int token) const {
        SixteenInts sums[TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) sums[t] = ints_set(0);
        dot_words<0, COLUMNS, TOKENS>(w, x.at<std::int16_t>(tile, token), COLUMNS, sums);
        const float* const scales = x.scales + tile * x.tokens + token;
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const Sixteen total = sixteen_load(totals[token + t]);
            sixteen_store(totals[token + t], sixteen_fma(sixteen_set(scales[t]), ints_to_floats(sums[t]), total));
        }
    }
};

// Codebooks that were not used last are read from end to end: one by one, each line would be waited for. Where there are
// fewer indices than lines the lines that are needed come by themselves.
void have_near(const Layout& layout, const Codebooks& books) {
    static thread_local const std::int16_t* last = nullptr;
    constexpr std::int64_t LINE = 64;
    if (last == books.table) return;
    last = books.table;
    const Vectors vectors = vectors_of(layout.codes);
    if (layout.blocks * layout.tiles * ROWS * vectors.of_row() * vectors.books * LINE < 4 * books.bytes()) return;
    const auto* const first = reinterpret_cast<const char*>(books.table);
    for (std::int64_t at = 0; at < books.bytes(); at += LINE) __builtin_prefetch(first + at, 0, 2);
}

INLINE Sixteen scales_of(const Layout& layout, const std::uint8_t* block) {
    Sixteen scale = sixteen_zeros();
    by_kind(layout.scales, [&](auto kind) __attribute__((always_inline)) {
        constexpr Scales KIND = decltype(kind)::value;
        if constexpr (KIND != Scales::none) scale = read_sixteen<KIND>(block);
    });
    return sixteen_multiply(scale, sixteen_set(layout.factor));
}

template <int BYTES, int LENGTH, int BOOKS>
__attribute__((noinline)) void multiply_vectors_once(const Layout& layout, const std::uint8_t* block,
                                                     const Codebooks& books, const Input& x, float* totals) {
    const std::int64_t bytes = tile_bytes(layout.codes);
    const std::uint8_t* at = block + layout.scale_bytes;
    Sixteen total = sixteen_load(totals);
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile, at += bytes) {
        // Among scattered reads of the table the processor does not see that the indices are a stream.
        for (std::int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + AHEAD + line);
        const SixteenInts sum = dot_vectors_once<BYTES, LENGTH, BOOKS>(at, books, x.at<std::int16_t>(tile, 0));
        total = sixteen_fma(sixteen_set(x.scales[tile]), ints_to_floats(sum), total);
    }
    sixteen_store(totals, sixteen_multiply(total, scales_of(layout, block)));
}

template <int BYTES, int LENGTH>
void multiply_vectors(const Layout& layout, const std::uint8_t* block, const Decoding& decoding, const Input& x,
                      float (*totals)[ROWS]) {
    const Codebooks books(layout, decoding.vectors);
    have_near(layout, books);
    if (x.tokens == 1) {
        const auto once = books.books == 1   ? multiply_vectors_once<BYTES, LENGTH, 1>
                          : books.books == 2 ? multiply_vectors_once<BYTES, LENGTH, 2>
                                             : multiply_vectors_once<BYTES, LENGTH, 0>;
        return once(layout, block, books, x, totals[0]);
    }
    const std::int64_t bytes = tile_bytes(layout.codes);
    const std::uint8_t* at = block + layout.scale_bytes;
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile, at += bytes) {
        if (x.tokens >= FETCHING_TOKENS) {
            fetch_ahead<ROWS * COLUMNS / LENGTH * BYTES>(at);
            fetch_results(x, tile, layout.tiles);
        }
        WordTile w;
        decode_vectors<BYTES, LENGTH>(at, books, w);
        for_tokens(x.tokens, VectorStep{w, x, tile, totals});
    }
    const Sixteen scale = scales_of(layout, block);
    for (int t = 0; t < x.tokens; ++t) sixteen_store(totals[t], sixteen_multiply(sixteen_load(totals[t]), scale));
}

template <int BYTES>
BlockFunction by_length(int length) {
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

}  // namespace lowbit
