// Tiles of indices into codebooks of vectors that run down a column (VPTQ).
//
// A vector is ``length`` rows of one column; in the table it takes up 4, 8 or 16 numbers (``stride``), zeros behind its
// own. As many as fill 16 lanes stand one below another: a block is 4, 2 or 1 vectors high, of up to 16 rows. A tile holds
// the indices of 32 columns, column by column and in each from above, those of the first codebook before those of the
// residual one. So what four columns hold makes two registers whose 16-bit numbers in turns are two operands of 16 rows
// by 2 columns.
//
//     block:  [outlier tiles: 16-bit numbers, as operands][tiles of the first book's columns][of the second's] ...
//
// Numbers are whole, of 16 bits, over a factor of each book (and of the outliers) that x takes over with the scale of its
// column: no sum of 32 columns of the weight, times x of 15 bits, passes 32 bits (kernels/cpu_row_vectors.py). Sums are
// exact, in any order. What is added to a whole column of the weight is one number a token.
#pragma once

#include "linear_layout.h"

namespace lowbit {

// x of the weight's stored columns, times what x takes over; returns what all rows of the weight have in common.
float take_columns(const lowbit_row_vectors& weight, const float* row, std::int64_t columns, float* out);

// One row of the weight in float32, columns in the input's order.
void row_of_row_vectors(const lowbit_weight& weight, const Layout& layout, std::int64_t row, float* out);

}  // namespace lowbit
