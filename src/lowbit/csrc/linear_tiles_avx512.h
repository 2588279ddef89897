// The tiles of the linear kernels in registers of AVX-512; included by linear_tiles.h.
#pragma once

#include "linear_tiles.h"

namespace lowbit {

// table: 64 bfloat16 values, repeated where codes have fewer than 6 bits.
struct Table {
    __m512i low, high;
    const std::uint8_t* behind;  // low bytes of 16-bit words, then the high ones: 128 values of bits7; vectors of grids
    explicit Table(const std::uint16_t* values)
        : low(_mm512_loadu_si512(values)),
          high(_mm512_loadu_si512(values + 32)),
          behind(reinterpret_cast<const std::uint8_t*>(values + 64)) {}
    Table(const std::uint16_t* values, const std::uint8_t* behind_)
        : low(_mm512_loadu_si512(values)), high(_mm512_loadu_si512(values + 32)), behind(behind_) {}
};

template <Codes CODES, int TILES>
INLINE void expand_grid(const std::uint8_t* const (&tiles)[TILES], const std::uint8_t* grid,
                        __m512i (&nibbles)[TILES][OPERANDS / 2]);

// The value of every byte as bfloat16, low and high bytes apart.
struct ByteTable {
    alignas(64) std::uint8_t low[256], high[256];
    explicit ByteTable(float (*value)(std::uint8_t)) {
        for (int code = 0; code < 256; ++code) {
            const std::uint16_t bits = float_to_bfloat(value(static_cast<std::uint8_t>(code)));
            low[code] = static_cast<std::uint8_t>(bits);
            high[code] = static_cast<std::uint8_t>(bits >> 8);
        }
    }
};

template <Codes CODES>
const ByteTable& byte_table() {
    static const ByteTable table(byte_value<CODES>);
    return table;
}

// Where each byte comes from.
struct BytePlaces {
    alignas(64) std::uint8_t bytes[64];
    __m512i load() const { return _mm512_load_si512(bytes); }
};

// A lookup in 256 bytes.
inline __m512i look_up(__m512i codes, __mmask64 upper, const __m512i (&table)[4]) {
    return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], codes, table[1]),
                                  _mm512_permutex2var_epi8(table[2], codes, table[3]));
}

// words, shifted right by ``right``, which may be negative.
inline __m512i shifted(__m512i words, int right) {
    return right >= 0 ? _mm512_srli_epi16(words, static_cast<unsigned>(right))
                      : _mm512_slli_epi16(words, static_cast<unsigned>(-right));
}

// mask ? a : b, bit by bit. The instruction overwrites its first operand: not the mask, which is kept.
INLINE __m512i chosen_bits(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(b, a, mask, 0xD8); }

// The lines of a tile's codes, each read where it is decoded; of a grid those of its nibbles, in registers. IN_ORDER:
// all are read first, as they lie.
template <Codes CODES, bool IN_ORDER = false>
struct CodeLines {
    static constexpr int LINES = is_grid(CODES) ? OPERANDS / 2 : static_cast<int>(tile_bytes(CODES) / 64);
    const std::uint8_t* tile;
    __m512i lines[LINES];

    INLINE __m512i line(std::int64_t byte) const {
        if constexpr (is_grid(CODES) || IN_ORDER) return lines[byte / 64];
        return _mm512_loadu_si512(tile + byte);
    }
};

// Lines of TILES tiles; next(i) says where the codes of tile i are. Grids are looked up for all of them at once.
template <Codes CODES, bool IN_ORDER, int TILES, class Next>
INLINE void read_lines(const Next& next, const Table& table, CodeLines<CODES, IN_ORDER> (&to)[TILES]) {
    UNROLL
    for (int tile = 0; tile < TILES; ++tile) {
        CodeLines<CODES, IN_ORDER>& own = to[tile];
        own.tile = next(tile);
        if constexpr (!is_grid(CODES) && IN_ORDER) {
            UNROLL
            for (int line = 0; line < own.LINES; ++line) {
                own.lines[line] = _mm512_loadu_si512(own.tile + line * 64);
                asm volatile("" : "+" ZMM(own.lines[line]));  // the compiler leaves these in their order
            }
        }
    }
    if constexpr (is_grid(CODES)) {
        const std::uint8_t* tiles[TILES];
        __m512i nibbles[TILES][OPERANDS / 2];
        for (int tile = 0; tile < TILES; ++tile) tiles[tile] = to[tile].tile;
        expand_grid<CODES, TILES>(tiles, table.behind, nibbles);
        UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
            for (int line = 0; line < OPERANDS / 2; ++line) to[tile].lines[line] = nibbles[tile][line];
        }
    }
}

// What codes of 7 or 8 bits are looked up in, byte by byte.
template <Codes CODES>
struct ByteTables {
    __m512i low[4], high[4];
    INLINE explicit ByteTables(const Table& table) {
        if constexpr (is_byte(CODES)) {
            const ByteTable& bytes = byte_table<CODES>();
            UNROLL
            for (int part = 0; part < 4; ++part) {
                low[part] = _mm512_load_si512(bytes.low + part * 64);
                high[part] = _mm512_load_si512(bytes.high + part * 64);
            }
        } else if constexpr (CODES == Codes::bits7) {
            UNROLL
            for (int part = 0; part < 2; ++part) {
                low[part] = _mm512_loadu_si512(table.behind + part * 64);
                high[part] = _mm512_loadu_si512(table.behind + 128 + part * 64);
            }
        } else if constexpr (is_grid(CODES)) {
            // By nibbles. The table has the last bit above all 4 that a number of a grid of fours has in planes. Of e8p
            // whole numbers stand behind the others.
            low[0] = CODES == Codes::e8p ? table.high : table.low;
            if constexpr (grid_of(CODES).numbers == 4) {
                const __m512i places = _mm512_cvtepu8_epi16(_mm256_setr_epi8(
                    0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22,
                    23));
                low[0] = _mm512_permutexvar_epi16(places, table.low);
            }
        }
    }
};

// Codes of 7 bits, a pair and the one two further in the two bytes of a word: those of operand OPERAND + i, and above them
// bits of others.
template <int OPERAND, bool IN_ORDER>
INLINE __m512i seven_bits(const CodeLines<Codes::bits7, IN_ORDER>& tile, int i) {
    constexpr Plane A = plane(Codes::bits7, 0), B = plane(Codes::bits7, 1), C = plane(Codes::bits7, 2);
    const int column = pair_of(OPERAND + i, 0) * 2;
    const Field low = field(A, 0, column), middle = field(B, 0, column), high = field(C, 0, column);
    const __m512i six = chosen_bits(_mm512_set1_epi8(0x30), shifted(tile.line(middle.byte), middle.shift - B.shift),
                                    shifted(tile.line(low.byte), low.shift - A.shift));
    return chosen_bits(_mm512_set1_epi8(0x40), shifted(tile.line(high.byte), high.shift - C.shift), six);
}

// Four pairs of columns, those of operands 2 QUAD and 2 QUAD + 1: one register of 16 rows x 2 columns for each.
template <Codes CODES, int QUAD, bool IN_ORDER>
INLINE void decode_quad(const CodeLines<CODES, IN_ORDER>& tile, const Table& table, const ByteTables<CODES>& bytes, __m512i* w) {
    if constexpr (CODES == Codes::bf16) {
        UNROLL
        for (int i = 0; i < 4; ++i) w[i] = tile.line((QUAD * 4 + i) * 64);
    } else if constexpr (is_byte(CODES)) {
        UNROLL
        for (int i = 0; i < 2; ++i) {
            const __m512i codes = tile.line((QUAD * 2 + i) * 64);
            const __mmask64 upper = _mm512_movepi8_mask(codes);
            const __m512i lower = look_up(codes, upper, bytes.low), higher = look_up(codes, upper, bytes.high);
            w[i] = _mm512_unpacklo_epi8(lower, higher);
            w[i + 2] = _mm512_unpackhi_epi8(lower, higher);
        }
    } else if constexpr (CODES == Codes::bits7) {
        const __m512i lower_bytes = _mm512_set1_epi16(0xff);
        UNROLL
        for (int i = 0; i < 2; ++i) {
            const __m512i code = seven_bits<QUAD * 2>(tile, i);  // the lookups take the lowest seven bits of a byte
            const __m512i lower = _mm512_permutex2var_epi8(bytes.low[0], code, bytes.low[1]);
            const __m512i higher = _mm512_permutex2var_epi8(bytes.high[0], code, bytes.high[1]);
            w[i] = chosen_bits(lower_bytes, lower, _mm512_slli_epi16(higher, 8));
            w[i + 2] = chosen_bits(lower_bytes, _mm512_srli_epi16(lower, 8), higher);
        }
    } else if constexpr (is_grid(CODES)) {
        UNROLL
        for (int i = 0; i < 4; ++i) {
            const int operand = operand_of(QUAD * 4 + i), side = side_of(QUAD * 4 + i);
            const bool twos = grid_of(CODES).numbers == 8;  // bits of a number
            const int line = twos ? operand / 4 * 2 + operand % 2 : operand / 2;
            const int nibble = twos ? operand % 4 / 2 : operand % 2;
            w[i] = _mm512_permutexvar_epi16(shifted(tile.line(line * 64), nibble * 4 + side * 8), bytes.low[0]);
        }
    } else if constexpr (plane_count(CODES) == 1) {
        UNROLL
        for (int i = 0; i < 4; ++i) {
            const Field f = field(plane(CODES, 0), 0, (QUAD * 4 + i) * 2);
            w[i] = _mm512_permutexvar_epi16(shifted(tile.line(f.byte), f.shift), table.low);
        }
    } else {
        constexpr Plane LOW = plane(CODES, 0), HIGH = plane(CODES, 1);
        const __m512i high_bits = _mm512_set1_epi16(static_cast<short>(((1 << HIGH.width) - 1) << LOW.width));
        UNROLL
        for (int i = 0; i < 4; ++i) {
            const Field a = field(LOW, 0, (QUAD * 4 + i) * 2), b = field(HIGH, 0, (QUAD * 4 + i) * 2);
            const __m512i low = shifted(tile.line(a.byte), a.shift);
            const __m512i index = chosen_bits(high_bits, shifted(tile.line(b.byte), b.shift - LOW.width), low);
            w[i] = HIGH.width == 2 ? _mm512_permutex2var_epi16(table.low, index, table.high)
                                   : _mm512_permutexvar_epi16(index, table.low);
        }
    }
}

// One register of 16 rows x 2 columns for each pair of columns.
template <Codes CODES>
INLINE void decode(const std::uint8_t* tile, const Table& table, __m512i* w) {
    CodeLines<CODES> lines[1];
    read_lines([&](int) { return tile; }, table, lines);
    const ByteTables<CODES> bytes(table);
    each_constant<PAIRS / 4>([&](auto quad) __attribute__((always_inline)) {
        decode_quad<CODES, decltype(quad)::value>(lines[0], table, bytes, w + 4 * decltype(quad)::value);
    });
}

// 16 columns of floats.
template <Codes CODES>
INLINE void decode_floats(const std::uint8_t* tile, __m512* w) {
    UNROLL
    for (int column = 0; column < 16; ++column) {
        if constexpr (CODES == Codes::int8) {
            const int pair = column / 2, first = side_of(pair) * 8 + column % 2;  // of four rows in a lane
            const __m512i rows = _mm512_broadcast_i32x4(
                _mm_setr_epi32(first | ~0xff, (first + 2) | ~0xff, (first + 4) | ~0xff, (first + 6) | ~0xff));
            const __m512i line = _mm512_loadu_si512(tile + operand_of(pair) * 64);
            const __m512i codes = _mm512_shuffle_epi8(line, rows);
            w[column] = _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(128)));
        } else if constexpr (CODES == Codes::f32) {
            w[column] = _mm512_loadu_ps(tile + column * 64);
        } else {
            w[column] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + column * 32)));
        }
    }
}

using Sixteen = __m512;
inline Sixteen sixteen_zeros() { return _mm512_setzero_ps(); }
inline Sixteen sixteen_load(const float* from) { return _mm512_loadu_ps(from); }
inline void sixteen_store(float* to, Sixteen x) { _mm512_storeu_ps(to, x); }
inline void sixteen_store_some(float* to, Sixteen x, int count) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1u), x);
}
inline Sixteen sixteen_fma(Sixteen a, Sixteen b, Sixteen c) { return _mm512_fmadd_ps(a, b, c); }
inline Sixteen sixteen_multiply(Sixteen a, Sixteen b) { return _mm512_mul_ps(a, b); }
inline Sixteen sixteen_add(Sixteen a, Sixteen b) { return _mm512_add_ps(a, b); }
inline Sixteen sixteen_set(float x) { return _mm512_set1_ps(x); }
inline Sixteen sixteen_f16(const std::uint8_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Sixteen sixteen_bf16(const std::uint8_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Sixteen sixteen_int8(const std::uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
// Sixteen whole numbers of 4 bits: the low halves of 8 bytes, then the high ones.
inline Sixteen sixteen_nibbles(const std::uint8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi64(low, high)));
}
// Scales: never NaN. Through float16, whose conversion takes subnormal numbers at its usual speed: as operands of float32
// products they cost an Intel Xeon some 180 cycles each time.
inline Sixteen sixteen_e4m3(const std::uint8_t* from) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i signs_first = _mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8);
    const __m256i halves = _mm256_and_si256(_mm256_srai_epi16(signs_first, 1), _mm256_set1_epi16(static_cast<short>(0xBF80)));
    return _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(0x1p8f));
}

// A pair of columns of 16 rows, and the sums of some tokens that it adds to.
#if defined(__AVX512BF16__)

using Bfloat16 = std::uint16_t;  // what x's bfloat16 numbers lie as
class PairOfColumns {
  public:
    INLINE explicit PairOfColumns(__m512i w) : both_(reinterpret_cast<__m512bh>(w)) {}
    INLINE Sixteen dot(const Bfloat16* x, Sixteen sum) const {
        std::int32_t two;
        std::memcpy(&two, x, sizeof two);
        return _mm512_dpbf16_ps(sum, both_, reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)));
    }

  private:
    const __m512bh both_;
};

#else

using Bfloat16 = float;
class PairOfColumns {
  public:
    INLINE explicit PairOfColumns(__m512i w)
        : even_(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))),
          odd_(_mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))) {}
    INLINE Sixteen dot(const Bfloat16* x, Sixteen sum) const {
        return _mm512_fmadd_ps(odd_, _mm512_set1_ps(x[1]), _mm512_fmadd_ps(even_, _mm512_set1_ps(x[0]), sum));
    }

  private:
    const __m512 even_, odd_;
};

#endif

// Dot products of columns [FIRST, FIRST + COUNT) with COUNT_TOKENS tokens, each in an accumulator of its own.
template <int FIRST, int COUNT, int TOKENS>
INLINE void dot(const __m512i* w, const Bfloat16* x, std::int64_t stride, Sixteen* sums) {
    for (int t = 0; t < TOKENS; ++t) sums[t] = _mm512_setzero_ps();
    UNROLL
    for (int pair = FIRST / 2; pair < (FIRST + COUNT) / 2; ++pair) {
        const PairOfColumns columns(w[pair]);
        UNROLL
        for (int t = 0; t < TOKENS; ++t) sums[t] = columns.dot(x + t * stride + pair * 2, sums[t]);
    }
}

template <int TOKENS>
INLINE void dot_floats(const __m512* w, const float* x, std::int64_t stride, Sixteen* sums) {
    for (int t = 0; t < TOKENS; ++t) sums[t] = _mm512_setzero_ps();
    UNROLL
    for (int column = 0; column < 16; ++column) {
        UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            sums[t] = _mm512_fmadd_ps(w[column], _mm512_set1_ps(x[t * stride + column]), sums[t]);
        }
    }
}

using BfloatTile = __m512i[PAIRS];
using FloatTile = __m512[16];

template <int COLUMN>
INLINE Sixteen column_of(const BfloatTile& w) {
    const __m512i pair = w[COLUMN / 2], upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    return _mm512_castsi512_ps(COLUMN % 2 == 0 ? _mm512_slli_epi32(pair, 16) : _mm512_and_si512(pair, upper));
}

// Whether one token's tiles are multiplied two at a time. A product waits some six cycles for the one before it, and a
// tile's sixteen take longer than decoding it; two tiles' in turns fill the wait. Not where parts of a tile are sums of
// their own, but of grids, whose tables are read once for both; nor where lines of two tiles do not all find a register.
constexpr bool tiles_in_turns(Codes codes, int sub) {
    return (sub == COLUMNS && tile_bytes(codes) <= 6 * ROWS * COLUMNS / 8) || (is_grid(codes) && sub >= COLUMNS / 2);
}

// Whether one token's lines are all read first, as they lie in memory. Planes are decoded from here and there, and what
// fetches lines ahead follows those that are read in order; whole bytes are read in order anyway.
constexpr bool reads_in_order(Codes codes) { return !is_byte(codes) && codes != Codes::bf16; }

// Whether one token's tile is decoded before any of it is multiplied: where nothing is won by turns or by order.
constexpr bool decoded_whole(Codes codes, int sub) { return is_byte(codes) || (codes == Codes::bits4 && sub < COLUMNS); }

// One token times TILES tiles that follow each other, each pair of columns multiplied as soon as it is decoded: a sum
// for each SUB columns. ``next(i)`` reads what stands before the codes of tile i and says where these are.
template <Codes CODES, int SUB, int TILES, class Next>
INLINE void dot_once(const Next& next, const Table& table, const Bfloat16* x, Sixteen (*sums)[COLUMNS / SUB]) {
    static_assert(TILES == 1 || TILES == 2);
    if constexpr (decoded_whole(CODES, SUB)) {
        __m512i w[PAIRS];
        decode<CODES>(next(0), table, w);
        each_constant<COLUMNS / SUB>([&](auto part) __attribute__((always_inline)) {
            dot<decltype(part)::value * SUB, SUB, 1>(w, x, COLUMNS, &sums[0][decltype(part)::value]);
        });
        return;
    }
    const ByteTables<CODES> bytes(table);
    CodeLines<CODES, reads_in_order(CODES)> lines[TILES];
    read_lines(next, table, lines);
    UNROLL
    for (int tile = 0; tile < TILES; ++tile) {
        for (int part = 0; part < COLUMNS / SUB; ++part) sums[tile][part] = _mm512_setzero_ps();
    }
    each_constant<PAIRS / 4>([&](auto quad) __attribute__((always_inline)) {
        constexpr int QUAD = decltype(quad)::value;
        __m512i w[TILES][4];
        UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
            decode_quad<CODES, QUAD>(lines[tile], table, bytes, w[tile]);
        }
        UNROLL
        for (int i = 0; i < 4; ++i) {
            UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                constexpr int FIRST = QUAD * 8;
                Sixteen& sum = sums[tile][(FIRST + i * 2) / SUB];
                sum = PairOfColumns(w[tile][i]).dot(x + tile * COLUMNS + FIRST + i * 2, sum);
            }
        }
    });
}

}  // namespace lowbit
