// x as a weight wants it that has a scale for each column, and another one for other rows: the columns of x take
// them over. q code, z zero point, s scale of a column:
//
//     sum over c of (q[r, c] - z[c]) s[c] x[c] = sum of q[r, c] X[c] - sum of z[c] X[c],  X[c] = s[c] x[c], rounded
//
// X is rounded to what the kernel multiplies, as any x is; the second sum is float32 and that of all rows of the group.
#pragma once

#include <vector>

#include "linear_kernels.h"

namespace lowbit {

// Scales, and zero points or null, of one group of rows: as many columns as whole tiles have, zeros behind the last.
struct ColumnScales {
    const std::uint8_t* scales;
    const std::uint8_t* zeros;
};

// Bytes of one.
constexpr std::int64_t number_bytes(Scales kind) { return kind == Scales::f32 ? 4 : 2; }

// A block's rows as RoundFunction has them, with such scales in them. Null where there is none for the codes.
// linear_panels.cpp
using RoundColumnsFunction = void (*)(const Layout& layout, const std::uint8_t* block, const Decoding&, Scales kind,
                                      const ColumnScales&, std::uint8_t* panel);
#if defined(__AVX2__)
RoundColumnsFunction round_columns_function(const Layout& layout);
#else
inline RoundColumnsFunction round_columns_function(const Layout&) { return nullptr; }
#endif

template <Scales KIND>
INLINE Sixteen read_columns(const std::uint8_t* numbers, std::int64_t column) {
    return read_sixteen<KIND>(numbers + column * number_bytes(KIND));
}

// Rows of x, and where they go.
struct ColumnRows {
    const float* const* x;  // (token,)
    ColumnScales of;
    const InputShape& shape;
    const InputPlaces& to;
    float* zero_sums;  // (token,)
};

// 32 columns of a row, zeros where there are none.
INLINE const float* tile_of(const float* row, std::int64_t column, std::int64_t columns, float* padded) {
    if (column + COLUMNS <= columns) return row + column;
    std::memset(padded, 0, COLUMNS * sizeof(float));
    if (column < columns) std::memcpy(padded, row + column, static_cast<std::size_t>(columns - column) * sizeof(float));
    return padded;
}

// Some tokens at once, so that a column's numbers are read once for them. bfloat16, sums of 32 columns or none.
template <Scales KIND, bool ZEROS, bool SUMS>
struct ScaledTokens {
    const ColumnRows& rows;

    template <int TOKENS>
    INLINE void operator()(int token) const {
        const InputPlaces& to = rows.to;
        Sixteen held[TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) held[t] = sixteen_zeros();
        for (std::int64_t tile = 0; tile < rows.shape.tiles; ++tile) {
            const std::int64_t column = tile * COLUMNS, at = tile * to.tokens + token;
            const Sixteen low = read_columns<KIND>(rows.of.scales, column);
            const Sixteen high = read_columns<KIND>(rows.of.scales, column + 16);
            const Sixteen low_zero = ZEROS ? read_columns<KIND>(rows.of.zeros, column) : low;
            const Sixteen high_zero = ZEROS ? read_columns<KIND>(rows.of.zeros, column + 16) : high;
            UNROLL
            for (int t = 0; t < TOKENS; ++t) {
                alignas(64) float padded[COLUMNS];
                const float* const from = tile_of(rows.x[token + t], column, rows.shape.columns, padded);
                Bfloat16* const values = reinterpret_cast<Bfloat16*>(to.values) + (at + t) * COLUMNS;
                const Sixteen a = store_bfloats(values, sixteen_multiply(sixteen_load(from), low));
                const Sixteen b = store_bfloats(values + 16, sixteen_multiply(sixteen_load(from + 16), high));
                if constexpr (ZEROS) held[t] = sixteen_fma(high_zero, b, sixteen_fma(low_zero, a, held[t]));
                if constexpr (SUMS) to.sums[at + t] = sixteen_sum(sixteen_add(a, b));
            }
        }
        if constexpr (ZEROS) {
            for (int t = 0; t < TOKENS; ++t) rows.zero_sums[token + t] = sixteen_sum(held[t]);
        }
    }
};

// The same as whole numbers of 16 bits, rounded as ``lay_out`` does it. SUMS: or a base asks for them.
template <Scales KIND, bool ZEROS, bool SUMS>
struct ScaledWords {
    const ColumnRows& rows;

    template <int TOKENS>
    INLINE void operator()(int token) const {
        const InputShape& shape = rows.shape;
        const InputPlaces& to = rows.to;
        const auto limit = static_cast<float>(shape.largest);
        Sixteen held[TOKENS];
        UNROLL
        for (int t = 0; t < TOKENS; ++t) held[t] = sixteen_zeros();
        for (std::int64_t tile = 0; tile < shape.tiles; ++tile) {
            const std::int64_t column = tile * COLUMNS, at = tile * to.tokens + token;
            const Sixteen low = read_columns<KIND>(rows.of.scales, column);
            const Sixteen high = read_columns<KIND>(rows.of.scales, column + 16);
            const Sixteen low_zero = ZEROS ? read_columns<KIND>(rows.of.zeros, column) : low;
            const Sixteen high_zero = ZEROS ? read_columns<KIND>(rows.of.zeros, column + 16) : high;
            for (int t = 0; t < TOKENS; ++t) {
                alignas(64) float padded[COLUMNS];
                const float* const from = tile_of(rows.x[token + t], column, shape.columns, padded);
                Sixteen a = sixteen_multiply(sixteen_load(from), low), b = sixteen_multiply(sixteen_load(from + 16), high);
                if constexpr (ZEROS) held[t] = sixteen_fma(high_zero, b, sixteen_fma(low_zero, a, held[t]));
                const float most = largest(a, b);
                const bool sound = most <= std::numeric_limits<float>::max();
                float scale = most / limit;
                if (shape.largest == largest_word(WordKind::line) && sound) scale = power_of_two_from(scale);
                const Sixteen inverse = inverse_of(scale);
                a = sound ? sixteen_multiply(a, inverse) : sixteen_zeros();
                b = sound ? sixteen_multiply(b, inverse) : sixteen_zeros();
                if (!sound) scale = std::numeric_limits<float>::quiet_NaN();
                std::int16_t* const values = reinterpret_cast<std::int16_t*>(to.values) + (at + t) * COLUMNS;
                a = store_words(values, a);
                b = store_words(values + 16, b);
                to.scales[at + t] = scale * shape.factor;
                to.bases[at + t] = 0;
                if constexpr (SUMS) {
                    const float sum = sixteen_sum(sixteen_add(a, b));  // whole, below 2^20
                    to.sums[at + t] = shape.scaled_sums ? sum * scale : sum;
                    to.bases[at + t] = shape.base * static_cast<std::int32_t>(sum);
                }
            }
        }
        if constexpr (ZEROS) {
            for (int t = 0; t < TOKENS; ++t) rows.zero_sums[token + t] = sixteen_sum(held[t]);
        }
    }
};

// Any other input: a row is scaled first, and then laid out as one of x.
template <Scales KIND>
void lay_out_scaled(const ColumnRows& rows) {
    static thread_local std::vector<float> staged;
    const std::int64_t width = rows.shape.tiles * COLUMNS;
    if (staged.size() < static_cast<std::size_t>(width)) staged.resize(static_cast<std::size_t>(width));
    const bool bfloats = rows.shape.kind == InputKind::bfloat && rows.shape.rounded;
    InputShape shape = rows.shape;
    shape.columns = width;
    for (int token = 0; token < rows.to.tokens; ++token) {
        Sixteen held = sixteen_zeros();
        for (std::int64_t column = 0; column < width; column += COLUMNS) {
            alignas(64) float padded[COLUMNS];
            const float* const from = tile_of(rows.x[token], column, rows.shape.columns, padded);
            for (int half = 0; half < COLUMNS; half += 16) {
                Sixteen value = sixteen_multiply(sixteen_load(from + half), read_columns<KIND>(rows.of.scales, column + half));
                Bfloat16 rounded[16];
                if (bfloats) value = store_bfloats(rounded, value);
                sixteen_store(staged.data() + column + half, value);
                if (rows.of.zeros == nullptr) continue;
                held = sixteen_fma(read_columns<KIND>(rows.of.zeros, column + half), value, held);
            }
        }
        if (rows.of.zeros != nullptr) rows.zero_sums[token] = sixteen_sum(held);
        lay_out(staged.data(), shape, rows.to, token);
    }
}

template <template <Scales, bool, bool> class Step, Scales KIND>
void lay_out_together(const ColumnRows& rows, bool sums) {
    const int tokens = rows.to.tokens;
    if (rows.of.zeros != nullptr) {
        sums ? for_tokens(tokens, Step<KIND, true, true>{rows}) : for_tokens(tokens, Step<KIND, true, false>{rows});
    } else {
        sums ? for_tokens(tokens, Step<KIND, false, true>{rows}) : for_tokens(tokens, Step<KIND, false, false>{rows});
    }
}

template <Scales KIND>
void lay_out_columns(const ColumnRows& rows, bool sums) {
    const InputShape& shape = rows.shape;
    const bool plain = shape.numbers == 0 && (!sums || shape.span == COLUMNS);
    if (plain && shape.kind == InputKind::bfloat && shape.rounded) return lay_out_together<ScaledTokens, KIND>(rows, sums);
    if (shape.kind == InputKind::words && shape.numbers == 0 && shape.span == COLUMNS) {
        return lay_out_together<ScaledWords, KIND>(rows, sums || shape.base != 0);
    }
    lay_out_scaled<KIND>(rows);
}

// with(kind of the columns' scales) as a constant.
template <class With>
INLINE void by_column_kind(Scales kind, const With& with) {
    switch (kind) {
        case Scales::f16: return with(std::integral_constant<Scales, Scales::f16>{});
        case Scales::bf16: return with(std::integral_constant<Scales, Scales::bf16>{});
        default: return with(std::integral_constant<Scales, Scales::f32>{});
    }
}

// x of all tokens of ``rows.to``. ``sums``: whether the kernel reads those of x.
inline void lay_out_columns(Scales kind, const ColumnRows& rows, bool sums) {
    by_column_kind(kind, [&](auto constant) { lay_out_columns<decltype(constant)::value>(rows, sums); });
}

}  // namespace lowbit
