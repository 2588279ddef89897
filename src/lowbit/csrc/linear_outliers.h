// Numbers that are added to some weights (SpQR).
//
// By its definition float16 arithmetic makes a weight:
//
//     weight = (code - zero) * scale [+ outlier]
//
// with every result rounded to float16, by at most 2^-11 of it, and so does a row that is looked up. Products leave these
// roundings out, half of what bfloat16 costs x: codes meet x as any others do under scales and zero points, and outliers, a
// few in a hundred weights, meet x in float32 beside them.
#pragma once

#include "linear_layout.h"

namespace lowbit {

// The codes that they may stand beside.
inline bool takes_outliers(const Layout& layout) {
    return layout.codes == Codes::bits3 && layout.sub == COLUMNS / 2 && layout.scales == Scales::f16 && layout.addend == Addend::zero;
}

// Those of a row, in the order of their columns.
struct RowOutliers {
    RowOutliers(const lowbit_weight& weight, std::int64_t row)
        : at(weight.outliers + weight.outlier_starts[row]), end(weight.outliers + weight.outlier_starts[row + 1]) {}

    const std::uint32_t *at, *end;
};
INLINE std::int64_t outlier_column(std::uint32_t outlier) { return outlier & 0xFFFFu; }
INLINE float outlier_number(std::uint32_t outlier) { return half_to_float(static_cast<std::uint16_t>(outlier >> 16)); }

}  // namespace lowbit
