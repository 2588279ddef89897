// Several matrix products in one call: their inputs are laid out together and their tasks shared by all threads.
#pragma once

#include <cstdint>

struct lowbit_column_weight;
struct lowbit_layer_description;
struct lowbit_weight;

namespace lowbit {

// out[t] = weight times row x_rows[t] of x.
struct Product {
    const lowbit_weight* weight;
    const float* x;
    std::int64_t x_stride;
    std::int64_t columns;
    const std::int32_t* x_rows;  // null: row t
    std::int64_t tokens;
    float* out;
    std::int64_t out_stride;
    const lowbit_layer_description* layer = nullptr;  // what is done to x before and to the product after
    const lowbit_column_weight* by_columns = nullptr;  // the weight with scales of its columns; no layer then, no outliers
    bool prompts = false;  // x is of prompts' tokens: the weight may be rounded to bfloat16 (linear_amx_panels.cpp)
};

// May throw std::bad_alloc.
void multiply(const Product* products, std::int64_t count);

}  // namespace lowbit
