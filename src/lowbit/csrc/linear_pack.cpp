// Packing weights into the layout of the linear kernels, and reading single rows of them.

#include <algorithm>
#include <vector>

#include "linear_layout.h"
#include "linear_outliers.h"
#include "linear_row_vectors.h"
#include "linear_trellis.h"
#include "linear_vectors.h"
#include "lowbit.h"
#include "operations.h"
#include "thread_pool.h"

namespace lowbit {
namespace {

// Whether some kernel multiplies such a weight.
bool known(const Layout& layout) {
    if (layout.outliers && !takes_outliers(layout)) return false;
    if (layout.sub == LEAST_GROUP) {
        const bool here = layout.codes == Codes::bits2 || layout.codes == Codes::bits3 || layout.codes == Codes::bits4;
        if (is_byte_float(layout.codes)) return layout.addend == Addend::none;
        return here || layout.codes == Codes::int8 || layout.codes == Codes::uint8;
    }
    if (is_vectors(layout.codes)) return layout.addend == Addend::none && layout.scales != Scales::none;
    if (is_trellis(layout.codes)) return layout.addend == Addend::none && layout.scales == Scales::none;
    switch (layout.codes) {
        case Codes::grid2_256:
        case Codes::grid2_512:
        case Codes::grid2_1024:
        case Codes::grid1_2048:
        case Codes::grid3_256:
        case Codes::grid3_512: return layout.addend == Addend::none;
        case Codes::e8p: return layout.addend == Addend::none && layout.sub == COLUMNS;
        case Codes::e8p_pair: return layout.addend == Addend::none && layout.scales == Scales::none;
        case Codes::words4:
        case Codes::bits1:
        case Codes::bits2:
        case Codes::bits3:
        case Codes::bits4:
        case Codes::bits5:
        case Codes::bits6:
        case Codes::bits7:
        case Codes::int8:
        case Codes::uint8:
        case Codes::e4m3:
        case Codes::e5m2:
        case Codes::e4m3fnuz:
        case Codes::e5m2fnuz:
        case Codes::bf16:
        case Codes::f16:
        case Codes::f32:
        case Codes::row_vectors: return true;
    }
    return false;
}

// What a code is worth, exactly, factor included.
float code_value(const lowbit_weight& weight, Codes codes, const std::uint8_t* tile, int row, int column) {
    if (is_vectors(codes)) {
        return static_cast<float>(vector_word(vectors_of(codes), tile, weight.table, row, column)) * weight.factor;
    }
    if (is_trellis(codes)) {
        const Trellis trellis = trellis_of(codes);
        return trellis_number(trellis.book, trellis_window(trellis.bits, tile, row, column));
    }
    const auto* const words = reinterpret_cast<const std::uint8_t*>(weight.table + 64);
    if (codes == Codes::e8p_pair) {
        int sum = 0;
        for (int book = 0; book < 2; ++book) {
            const unsigned code = read_grid_code(tile + book * tile_bytes(Codes::e8p), Codes::e8p, words, row, column);
            sum += static_cast<std::int16_t>(weight.table[book * 32 + static_cast<int>(code)]);
        }
        return static_cast<float>(sum) * weight.factor;
    }
    if (weight.factor != 1.0f) {
        float value;
        std::memcpy(&value, reinterpret_cast<const float*>(weight.table + 32) + read_code(tile, codes, row, column), sizeof value);
        return value;
    }
    if (is_grid(codes)) return bfloat_to_float(weight.table[read_grid_code(tile, codes, words, row, column)]);
    switch (codes) {
        case Codes::bits7: return bfloat_to_float(weight.table[0]) + static_cast<float>(read_code(tile, codes, row, column));
        case Codes::int8: return byte_value<Codes::int8>(tile[byte_place(row, column)]);
        case Codes::uint8: return byte_value<Codes::uint8>(tile[byte_place(row, column)]);
        case Codes::e4m3: return byte_value<Codes::e4m3>(tile[byte_place(row, column)]);
        case Codes::e5m2: return byte_value<Codes::e5m2>(tile[byte_place(row, column)]);
        case Codes::e4m3fnuz: return byte_value<Codes::e4m3fnuz>(tile[byte_place(row, column)]);
        case Codes::e5m2fnuz: return byte_value<Codes::e5m2fnuz>(tile[byte_place(row, column)]);
        case Codes::bf16: {
            std::uint16_t bits;
            std::memcpy(&bits, tile + column / 2 * 64 + row * 4 + column % 2 * 2, sizeof bits);
            return bfloat_to_float(bits);
        }
        case Codes::f16: {
            std::uint16_t bits;
            std::memcpy(&bits, tile + column * 32 + row * 2, sizeof bits);
            return half_to_float(bits);
        }
        case Codes::f32: {
            float value;
            std::memcpy(&value, tile + column * 64 + row * 4, sizeof value);
            return value;
        }
        default: return bfloat_to_float(weight.table[read_code(tile, codes, row, column)]);
    }
}

// One row of the weight in float32: (code [- zero]) * scale [+ offset] [+ outlier], as QuantizedTensor.dequantize has it; with
// outliers every result is rounded to float16.
void dequantize_row(const lowbit_weight& weight, const Layout& layout, std::int64_t row, std::int64_t columns, float* out) {
    Walk walk(layout, weight.data + row / ROWS * layout.block_bytes);
    const int lane = static_cast<int>(row % ROWS);
    const auto rounded = [&](float value) { return layout.outliers ? half_to_float(float_to_half(value)) : value; };
    for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
        const std::uint8_t* const codes = walk.next();
        float scale[COLUMNS / LEAST_GROUP][ROWS], addend[COLUMNS / LEAST_GROUP][ROWS];
        for (int part = 0; part < COLUMNS / layout.sub; ++part) {
            if (layout.scales != Scales::none) sixteen_store(scale[part], walk.scale[part]);
            if (layout.addend != Addend::none) sixteen_store(addend[part], walk.addend[part]);
        }
        const int left = static_cast<int>(std::min<std::int64_t>(COLUMNS, columns - tile * COLUMNS));
        for (int column = 0; column < left; ++column) {
            const int part = column / layout.sub;
            float value = code_value(weight, layout.codes, codes, lane, column);
            if (layout.addend == Addend::zero) value = rounded(value + addend[part][lane]);
            if (layout.scales != Scales::none) value = rounded(value * scale[part][lane]);
            if (layout.addend == Addend::offset) value += addend[part][lane];
            out[tile * COLUMNS + column] = value;
        }
    }
    if (!layout.outliers) return;
    for (RowOutliers outliers(weight, row); outliers.at < outliers.end; ++outliers.at) {
        float& value = out[outlier_column(*outliers.at)];
        value = rounded(value + outlier_number(*outliers.at));
    }
}

// Copies 16 rows' numbers of ``size`` bytes from a (rows, groups) array; rows past the end are zero.
void put_sixteen(std::uint8_t* to, const std::uint8_t* from, std::int64_t size, std::int64_t rows, std::int64_t row,
                 std::int64_t groups, std::int64_t group) {
    for (int lane = 0; lane < ROWS; ++lane) {
        if (row + lane < rows) {
            std::memcpy(to + lane * size, from + ((row + lane) * groups + group) * size, static_cast<std::size_t>(size));
        }
    }
}

// The same for numbers of 4 bits that come in bytes.
void put_nibbles(std::uint8_t* to, const std::uint8_t* from, std::int64_t rows, std::int64_t row, std::int64_t groups,
                 std::int64_t group) {
    for (int lane = 0; lane < ROWS; ++lane) {
        if (row + lane >= rows) return;
        const auto nibble = static_cast<unsigned>(from[(row + lane) * groups + group]) & 15u;
        to[lane % 8] = static_cast<std::uint8_t>(to[lane % 8] | nibble << lane / 8 * 4);
    }
}

struct Sources {
    const std::uint8_t* codes;  // (rows, columns) bytes; bf16, f16, f32: the matrix
    const std::uint8_t* scales;
    const std::uint8_t* addends;
    const std::uint8_t* outer_scales;
    const std::uint8_t* outer_addends;
};

void put_tile(std::uint8_t* tile, const lowbit_weight& weight, Codes codes, const std::uint8_t* from, std::int64_t row,
              std::int64_t first_column, std::int64_t columns) {
    const int element = codes == Codes::f32 ? 4 : codes == Codes::f16 || codes == Codes::bf16 ? 2 : 1;
    const auto last = static_cast<int>(std::min<std::int64_t>(COLUMNS, columns - first_column));
    for (int lane = 0; lane < ROWS && row + lane < weight.rows; ++lane) {
        const std::uint8_t* const source = from + ((row + lane) * columns + first_column) * element;
        if (is_grid(codes)) {
            write_grid_codes(tile, codes, lane, last, source);
            continue;
        }
        for (int column = 0; column < last; ++column) {
            switch (codes) {
                case Codes::int8:
                case Codes::e4m3:
                case Codes::e5m2:
                case Codes::e4m3fnuz:
                case Codes::e5m2fnuz:
                case Codes::uint8: tile[byte_place(lane, column)] = source[column]; break;
                case Codes::bf16:
                    std::memcpy(tile + column / 2 * 64 + lane * 4 + column % 2 * 2, source + column * 2, 2);
                    break;
                case Codes::f16: std::memcpy(tile + column * 32 + lane * 2, source + column * 2, 2); break;
                case Codes::f32: std::memcpy(tile + column * 64 + lane * 4, source + column * 4, 4); break;
                case Codes::words4: write_code(tile, Codes::bits4, lane, column, source[column]); break;
                default: write_code(tile, codes, lane, column, source[column]);
            }
        }
    }
}

// 4-bit tiles are most of what is packed: whole words at once.
void put_nibble_tile(std::uint8_t* tile, const lowbit_weight& weight, const std::uint8_t* from, std::int64_t row,
                     std::int64_t first_column, std::int64_t columns) {
    for (int lane = 0; lane < ROWS && row + lane < weight.rows; ++lane) {
        const std::uint8_t* const source = from + (row + lane) * columns + first_column;
        for (int line = 0; line < 4; ++line) {
            for (int odd = 0; odd < 2; ++odd) {
                const std::uint8_t* const c = source + line * 8 + odd;
                const auto word = static_cast<std::uint16_t>(c[0] | c[2] << 4 | c[4] << 8 | c[6] << 12);
                std::memcpy(tile + line * 64 + (lane * 2 + odd) * 2, &word, sizeof word);
            }
        }
    }
}

void pack(const lowbit_weight& weight, std::int64_t columns, const Sources& from, std::uint8_t* to) {
    const Layout layout(weight);
    const std::int64_t groups = weight.columns / weight.group, supers = weight.columns / SUPER;
    const std::int64_t scale_size = layout.scale_bytes / ROWS, addend_size = layout.addend_bytes / ROWS;
    const bool nibbles = weight.scales == static_cast<std::int32_t>(Scales::nibbles) ||
                         weight.scales == static_cast<std::int32_t>(Scales::odd_nibbles);
    parallel_for(layout.blocks, [&](std::int64_t block) {
        std::uint8_t* at = to + block * layout.block_bytes;
        std::memset(at, 0, static_cast<std::size_t>(layout.block_bytes));
        const std::int64_t row = block * ROWS;
        for (std::int64_t column = 0; column < weight.columns; column += COLUMNS) {
            if (layout.super_bytes && column % SUPER == 0) {
                put_sixteen(at, from.outer_scales, 2, weight.rows, row, supers, column / SUPER);
                if (from.outer_addends) put_sixteen(at + 32, from.outer_addends, 2, weight.rows, row, supers, column / SUPER);
                at += layout.super_bytes;
            }
            if (column % layout.unit == 0) {
                for (std::int64_t header = 0; header < layout.headers; ++header) {
                    const std::int64_t group = column / weight.group + header;
                    if (nibbles) put_nibbles(at, from.scales, weight.rows, row, groups, group);
                    if (scale_size) put_sixteen(at, from.scales, scale_size, weight.rows, row, groups, group);
                    at += layout.scale_bytes;
                    if (nibbles && from.addends) put_nibbles(at, from.addends, weight.rows, row, groups, group);
                    if (addend_size) put_sixteen(at, from.addends, addend_size, weight.rows, row, groups, group);
                    at += layout.addend_bytes;
                }
            }
            const bool whole = column + COLUMNS <= columns;
            if (whole && (layout.codes == Codes::bits4 || layout.codes == Codes::words4)) {
                put_nibble_tile(at, weight, from.codes, row, column, columns);
            } else {
                put_tile(at, weight, layout.codes, from.codes, row, column, columns);
            }
            at += tile_bytes(layout.codes);
        }
    });
}

}  // namespace
}  // namespace lowbit

// Bytes of the packed weight; 0 for a description no kernel has.
LOWBIT_EXPORT std::int64_t lowbit_linear_bytes(const lowbit_weight* weight) {
    const lowbit::Layout layout(*weight);
    if (!lowbit::known(layout)) return 0;
    return layout.blocks * layout.block_bytes;
}

LOWBIT_EXPORT void lowbit_linear_pack(const lowbit_weight* weight, std::int64_t columns, const std::uint8_t* codes,
                                      const std::uint8_t* scales, const std::uint8_t* addends,
                                      const std::uint8_t* outer_scales, const std::uint8_t* outer_addends,
                                      std::uint8_t* to) {
    lowbit::pack(*weight, columns, {codes, scales, addends, outer_scales, outer_addends}, to);
}

// float32 (count, columns): rows ``ids`` (int32, or int64 where ``wide``) of the weight, times row_scale (rows,),
// columns put from stored to logical places by column_order; both may be null. 0, 1 where memory ran out, or 2
// where an id is no row: then nothing is written.
LOWBIT_EXPORT int lowbit_linear_rows(const lowbit_weight* weight, std::int64_t columns, const void* ids,
                                     std::int32_t wide, std::int64_t count, const float* row_scale,
                                     const std::int64_t* column_order, float* out) {
    const auto id_at = [&](std::int64_t i) -> std::int64_t {
        return wide ? static_cast<const std::int64_t*>(ids)[i] : static_cast<const std::int32_t*>(ids)[i];
    };
    for (std::int64_t i = 0; i < count; ++i) {
        if (id_at(i) < 0 || id_at(i) >= weight->rows) return 2;
    }
    lowbit::Layout layout(*weight);
    layout.factor = 1.0f;  // code_value has it
    std::vector<float> stored;
    try {
        if (column_order != nullptr) stored.resize(static_cast<std::size_t>(count * columns));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    lowbit::parallel_for(count, [&](std::int64_t i) {
        float* const logical = out + i * columns;
        float* const row = column_order == nullptr ? logical : stored.data() + i * columns;
        if (layout.codes == lowbit::Codes::row_vectors) {
            lowbit::row_of_row_vectors(*weight, layout, id_at(i), row);
        } else {
            lowbit::dequantize_row(*weight, layout, id_at(i), columns, row);
        }
        for (std::int64_t column = 0; row_scale != nullptr && column < columns; ++column) {
            row[column] *= row_scale[id_at(i)];
        }
        for (std::int64_t column = 0; column_order != nullptr && column < columns; ++column) {
            logical[column_order[column]] = row[column];
        }
    });
    return 0;
}
