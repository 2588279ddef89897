// A packed weight: what its description says of where things lie, and the walk through a block of 16 rows.
#pragma once

#include <algorithm>

#include "linear_tiles.h"

// Of codes that are indices of vectors of rows; field for field the ctypes struct of kernels/cpu_row_vectors.py. Columns
// are stored ones, those of the outliers and of each book padded to whole tiles.
struct lowbit_row_vectors {
    const std::int32_t* order;  // (columns,): that of x and of the result's rows; -1 of padding
    const float* multiplier;    // (columns,): what x's is multiplied with
    const float* offset;        // (columns,): what is added to each number of the weight's; or null
    std::int32_t length;        // rows of a vector
    std::int32_t books;         // which share the columns behind the outliers evenly
    std::int32_t centroids, residual;  // vectors of a book; of the residual one beside it, 0 where there is none
    std::int32_t outlier_tiles;
};

// What kernels/packed_linear.py describes; field for field its ctypes struct.
struct lowbit_weight {
    const std::uint8_t* data;
    // 64 bfloat16 values, for codes of 2 to 7 bits; with a factor, 32 of them (words4: 16-bit numbers, 16 of them
    // twice) and then 16 floats, what codes of 4 bits are worth exactly; of e8p 16 values v twice and then 16-bit
    // numbers 4 v + 15, alike, of e8p_pair 16-bit numbers of each book; for grids and 7 bits, 16-bit words behind it
    // (vectors; all 128 values), the low bytes of all and then the high ones. Of codebooks (books, vectors, columns)
    // 16-bit numbers, 64 at least; those of rows (books, vectors and residual ones, 4, 8 or 16).
    const std::uint16_t* table;
    std::int64_t rows;
    std::int64_t columns;  // padded to whole tiles
    std::int32_t codes;
    std::int32_t group;   // columns that share a scale; 8, 16, or a multiple of 32
    std::int32_t scales;  // enum Scales
    std::int32_t addend;  // enum Addend
    std::int32_t input;   // enum InputKind: what x is rounded to
    float factor;         // a table's numbers times it are what codes are worth; 1 for most
    std::int32_t input_group;  // of InputKind::scaled: columns of x that share a scale; 16, or a multiple of 32
    const struct lowbit_quantizer* quantizer;  // of InputKind::scaled
    const lowbit_row_vectors* row_vectors;     // of such codes
    // Numbers added to some weights (SpQR); or null. (rows + 1,): where each row's begin among all. And these, in ascending
    // columns: the stored column in the low half, float16 in the high one.
    const std::int32_t* outlier_starts;
    const std::uint32_t* outliers;
};

namespace lowbit {

// two_level: int8 x f16 per 256; nibbles: 4 bits n x f16 per 256, offsets -n x f16; odd_nibbles: 2 n + 1 x f16
enum class Scales : std::int32_t {
    none = 0, f16 = 1, bf16 = 2, f32 = 3, two_level = 4, e4m3 = 5, nibbles = 6, odd_nibbles = 7
};
// groups: int8 with a scale for each token and 32 columns. codes: x holds whole numbers of -127 … 127 already.
// floats: not rounded, for int8 codes (LLM.int8's outliers are too large to lose their lower bits). words: 15 bits
// or 16 with a scale for each token and 32 columns, in bfloat16's place for whatever takes them (linear_words.h).
// scaled: codes of small floats, exact in bfloat16, with a scale for each token and some columns, as the layer's
// quantizer makes them.
enum class InputKind : std::int32_t { bfloat = 0, groups = 1, codes = 2, floats = 3, words = 4, scaled = 5 };
enum class Addend : std::int32_t { none = 0, offset = 1, zero = 2 };  // offset: as the scales; zero: f16 codes

constexpr int LEAST_GROUP = 8;    // columns that share a scale
constexpr int SUPER = 256;        // columns of an outer block of two-level scales

// Sizes that follow from a description of vectors of rows; linear_row_vectors.h.
struct RowVectors {
    explicit RowVectors(const lowbit_row_vectors& w)
        : length(w.length), books(w.books), centroids(w.centroids), residual(w.residual), outlier_tiles(w.outlier_tiles) {}

    static constexpr std::int64_t WORD_TILE = ROWS * COLUMNS * 2;  // bytes of a tile of outliers

    int stride() const { return length <= 4 ? 4 : length <= 8 ? 8 : 16; }  // numbers of a vector in the table
    int pieces() const { return ROWS / stride(); }                        // vectors of a column of a block
    int height() const { return pieces() * length; }
    int lane(int row) const { return row / length * stride() + row % length; }
    int main_bytes() const { return centroids <= 256 ? 1 : 2; }
    int second_bytes() const { return residual == 0 ? 0 : residual <= 256 ? 1 : 2; }
    std::int64_t tile_bytes() const { return COLUMNS * pieces() * (main_bytes() + second_bytes()); }
    std::int64_t book_tiles(std::int64_t tiles) const { return (tiles - outlier_tiles) / books; }
    std::int64_t numbers() const { return static_cast<std::int64_t>(centroids + residual) * stride(); }  // of a book
    std::int64_t table_bytes() const { return books * numbers() * static_cast<std::int64_t>(sizeof(std::int16_t)); }
    std::int64_t indices(std::int64_t tiles) const { return tiles * COLUMNS * pieces() * (residual != 0 ? 2 : 1); }

    int length, books, centroids, residual, outlier_tiles;
};

// Sizes that follow from a weight's description.
struct Layout {
    explicit Layout(const lowbit_weight& w)
        : codes(static_cast<Codes>(w.codes)),
          scales(static_cast<Scales>(w.scales)),
          addend(static_cast<Addend>(w.addend)),
          tiles(w.columns / COLUMNS),
          blocks((w.rows + ROWS - 1) / ROWS),
          sub(w.group < COLUMNS ? w.group : COLUMNS),
          factor(w.factor),
          outliers(w.outlier_starts != nullptr) {
        const bool byte_scales = scales == Scales::two_level || scales == Scales::e4m3;
        const bool nibbles = scales == Scales::nibbles || scales == Scales::odd_nibbles;
        scale_bytes = scales == Scales::none ? 0 : scales == Scales::f32 ? 64 : byte_scales ? 16 : nibbles ? 8 : 32;
        addend_bytes = addend == Addend::none ? 0 : addend == Addend::zero ? 32 : scale_bytes;
        super_bytes = scales == Scales::two_level || nibbles ? (addend == Addend::offset ? 64 : 32) : 0;
        unit = std::max(w.group, COLUMNS);
        headers = unit / w.group;
        unit_bytes = headers * (scale_bytes + addend_bytes) + unit / COLUMNS * tile_bytes(codes);
        block_bytes = w.columns / unit * unit_bytes + (super_bytes ? w.columns / SUPER * super_bytes : 0);
        if (codes == Codes::row_vectors) {
            const RowVectors vectors(*w.row_vectors);
            row_vectors = w.row_vectors;
            height = vectors.height();
            blocks = (w.rows + height - 1) / height;
            block_bytes = vectors.outlier_tiles * RowVectors::WORD_TILE + (tiles - vectors.outlier_tiles) * vectors.tile_bytes();
        }
    }

    Codes codes;
    Scales scales;
    Addend addend;
    std::int64_t tiles, blocks;
    int sub;                      // columns summed before a scale is applied
    float factor;                 // of all scales
    bool outliers;                // beside bits3 under scales and zero points of 16 columns
    std::int64_t scale_bytes, addend_bytes, super_bytes;
    std::int64_t unit;            // columns whose headers stand together, before their tiles
    std::int64_t headers;
    std::int64_t unit_bytes, block_bytes;
    int height = ROWS;  // rows of a block
    const lowbit_row_vectors* row_vectors = nullptr;
};

// Sixteen rows' scales, or offsets.
template <Scales KIND>
INLINE Sixteen read_sixteen(const std::uint8_t* from) {
    if constexpr (KIND == Scales::f16) return sixteen_f16(from);
    else if constexpr (KIND == Scales::bf16) return sixteen_bf16(from);
    else if constexpr (KIND == Scales::two_level) return sixteen_int8(from);
    else if constexpr (KIND == Scales::e4m3) return sixteen_e4m3(from);
    else if constexpr (KIND == Scales::nibbles) return sixteen_nibbles(from);
    else if constexpr (KIND == Scales::odd_nibbles) {
        const Sixteen whole = sixteen_nibbles(from);
        return sixteen_add(sixteen_add(whole, whole), sixteen_set(1.0f));
    } else {
        float values[ROWS];
        std::memcpy(values, from, sizeof values);
        return sixteen_load(values);
    }
}

constexpr bool has_outer(Scales kind) {
    return kind == Scales::two_level || kind == Scales::nibbles || kind == Scales::odd_nibbles;
}

// with(kind) as a constant.
template <class With>
INLINE void by_kind(Scales kind, const With& with) {
    switch (kind) {
        case Scales::none: return with(std::integral_constant<Scales, Scales::none>{});
        case Scales::f16: return with(std::integral_constant<Scales, Scales::f16>{});
        case Scales::bf16: return with(std::integral_constant<Scales, Scales::bf16>{});
        case Scales::f32: return with(std::integral_constant<Scales, Scales::f32>{});
        case Scales::two_level: return with(std::integral_constant<Scales, Scales::two_level>{});
        case Scales::e4m3: return with(std::integral_constant<Scales, Scales::e4m3>{});
        case Scales::nibbles: return with(std::integral_constant<Scales, Scales::nibbles>{});
        case Scales::odd_nibbles: return with(std::integral_constant<Scales, Scales::odd_nibbles>{});
    }
}

// Whether scales meet a factor of 1, too. Where it was asked for, AVX2's scales went through memory: 3 ns of nf4's 25 a tile.
#if defined(__AVX2__) && !defined(LOWBIT_AVX512)
constexpr bool ALWAYS_MULTIPLIED = true;
#else
constexpr bool ALWAYS_MULTIPLIED = false;
#endif

// Walks one block of 16 rows tile by tile and keeps the scales of the tile it stands on.
class Walk {
  public:
    Walk(const Layout& layout, const std::uint8_t* block)
        : layout_(layout), at_(block), factor_(sixteen_set(layout.factor)), minus_(sixteen_set(-1.0f / layout.factor)) {}

    // The codes of the next tile. What is known of the weight is part of the code, and all of it is inlined: a call
    // would put what the loop keeps in registers into memory, for every tile.
    template <Codes CODES, int SUB, Addend ADDEND>
    INLINE const std::uint8_t* next() {
        return next<SUB, ADDEND>(tile_bytes(CODES));
    }
    template <int SUB, Addend ADDEND>
    INLINE const std::uint8_t* next(std::int64_t bytes) {
        return step(bytes, [&](const std::uint8_t* at) __attribute__((always_inline)) {
            by_kind(layout_.scales, [&](auto kind) __attribute__((always_inline)) {
                each_constant<COLUMNS / SUB>([&](auto header) __attribute__((always_inline)) {
                    at = read_header<decltype(kind)::value, ADDEND>(at, header);
                });
            });
            return at;
        });
    }
    // Of a weight to which anything may be added: one function for all, where more is done with a tile than this asks.
    template <Codes CODES, int SUB>
    INLINE const std::uint8_t* next_of_any_addend() {
        return step(tile_bytes(CODES), [&](const std::uint8_t* at) __attribute__((always_inline)) {
            by_kind(layout_.scales, [&](auto kind) __attribute__((always_inline)) {
                constexpr Scales KIND = decltype(kind)::value;
                each_constant<COLUMNS / SUB>([&](auto header) __attribute__((always_inline)) {
                    at = read_scale<KIND>(at, header);
                    if (layout_.addend == Addend::offset) at = read_addend<KIND, Addend::offset>(at, header);
                    if (layout_.addend == Addend::zero) at = read_addend<KIND, Addend::zero>(at, header);
                });
            });
            return at;
        });
    }

    // The same of any weight.
    const std::uint8_t* next() {
        return step(tile_bytes(layout_.codes), [&](const std::uint8_t* at) {
            by_kind(layout_.scales, [&](auto kind) {
                constexpr Scales KIND = decltype(kind)::value;
                for (int header = 0; header < static_cast<int>(layout_.headers); ++header) {
                    switch (layout_.addend) {
                        case Addend::none: at = read_header<KIND, Addend::none>(at, header); break;
                        case Addend::offset: at = read_header<KIND, Addend::offset>(at, header); break;
                        case Addend::zero: at = read_header<KIND, Addend::zero>(at, header); break;
                    }
                }
            });
            return at;
        });
    }

    // Where the codes of the tile after this one are.
    INLINE const std::uint8_t* following() const {
        const std::int64_t outer = super_left_ == 0 ? layout_.super_bytes : 0;
        return at_ + outer + (unit_left_ == 0 ? layout_.headers * (layout_.scale_bytes + layout_.addend_bytes) : 0);
    }

    Sixteen scale[COLUMNS / LEAST_GROUP];
    Sixteen addend[COLUMNS / LEAST_GROUP];

  private:
    template <class ReadHeaders>
    INLINE const std::uint8_t* step(std::int64_t bytes, const ReadHeaders& read_headers) {
        const std::uint8_t* at = at_;
        if (layout_.super_bytes && super_left_-- == 0) {
            super_left_ = SUPER / COLUMNS - 1;
            outer_scale_ = sixteen_f16(at);
            if (layout_.addend == Addend::offset) outer_addend_ = sixteen_f16(at + 32);
            at += layout_.super_bytes;
        }
        if (unit_left_-- == 0) {
            unit_left_ = layout_.unit / COLUMNS - 1;
            at = read_headers(at);
        }
        at_ = at + bytes;
        return at;
    }

    // Each returns what follows.
    template <Scales KIND, Addend ADDEND>
    INLINE const std::uint8_t* read_header(const std::uint8_t* at, int header) {
        return read_addend<KIND, ADDEND>(read_scale<KIND>(at, header), header);
    }
    template <Scales KIND>
    INLINE const std::uint8_t* read_scale(const std::uint8_t* at, int header) {
        if constexpr (KIND != Scales::none) {
            Sixteen read = read_sixteen<KIND>(at);
            if constexpr (has_outer(KIND)) read = sixteen_multiply(read, outer_scale_);
            if (ALWAYS_MULTIPLIED || layout_.factor != 1.0f) read = sixteen_multiply(read, factor_);
            scale[header] = read;
        }
        return at + layout_.scale_bytes;
    }
    template <Scales KIND, Addend ADDEND>
    INLINE const std::uint8_t* read_addend(const std::uint8_t* at, int header) {
        if constexpr (ADDEND == Addend::offset) {
            Sixteen read = read_sixteen<KIND>(at);
            if constexpr (KIND == Scales::nibbles) read = sixteen_multiply(read, sixteen_set(-1.0f));
            if constexpr (has_outer(KIND)) read = sixteen_multiply(read, outer_addend_);
            addend[header] = read;
        } else if constexpr (ADDEND == Addend::zero) {
            // -zero, over the factor that scales have: what is added to a sum of a table's numbers for each unit of x
            addend[header] = sixteen_multiply(sixteen_f16(at), minus_);
        }
        return at + layout_.addend_bytes;
    }

    const Layout& layout_;
    const std::uint8_t* at_;
    std::int64_t super_left_ = 0, unit_left_ = 0;  // tiles before the next outer scales, the next scales
    const Sixteen factor_, minus_;
    Sixteen outer_scale_ = sixteen_zeros(), outer_addend_ = sixteen_zeros();
};

}  // namespace lowbit
