// What a step may consist of: native functions that a plan (step_plan.cpp) can record and replay, and the
// structures they read. Each is called from Python by itself, too.
#pragma once

#include <cstdint>

#include "lowbit.h"

struct lowbit_weight;           // linear.cpp
struct lowbit_attention_cache;  // attention.cpp
struct lowbit_attention_batch;
struct lowbit_head_products;    // head_products.cpp
struct lowbit_delta_layer;      // delta_rule.cpp
struct lowbit_delta_batch;

// What kernels/rotation.py describes: x in blocks of ``size`` columns, each times a matrix. Either x * before, the
// Hadamard transform over ``divisor``, * after; or x @ matrix; or, with a ``head``, block i becomes the sum of matrix[i, j]
// times block j between the transform and ``after``; or, with ``steps``, column c of the whole row becomes x[c] * cosines[c]
// + x[partners[c]] * sines[c] in each of them, between ``before`` and ``after``, which have its width. rotation.cpp
struct lowbit_rotation {
    const float* before;  // (size,), or (width,) where ``wide``, or null
    const float* after;   // alike
    const float* matrix;  // (size, size) row-major, or (head, head), or null
    const std::int32_t* partners;  // (steps, width), or null; so are:
    const float* cosines;
    const float* sines;
    std::int64_t size;    // without a matrix a power of two
    float divisor;
    std::int32_t wide;    // each block has its own before and after
    std::int32_t head;    // so many blocks are all there are, a multiple of 4; or 0
    std::int32_t steps;
};

// What kernels/activation_native.py describes; field for field its ctypes struct.
struct lowbit_quantizer {
    const lowbit_rotation* rotation;  // before everything else, or null
    const float* multiplier;    // (width,), or null
    const float* static_scale;  // one number: of a static rule, or NVFP4's outer scale
    const float* static_zero;
    const float* state_scale;   // delayed: the scale in force, and the largest |x| of this step
    float* state_history;
    std::int32_t rule, format, scale, group;
    float low, high;            // the codes' range, or the largest value
    float limit;                // the value a block's largest |x| becomes
    float floor, upper_bound, outliers, round_up;
    std::int32_t bfloat_input, reciprocal;
};

struct lowbit_delayed_state {
    float* scale;
    float* history;       // (length,), slot 0 is the step in progress
    std::int64_t length;
    float largest;        // the format's largest value over 2^margin
    std::int32_t most_recent;
};

// What kernels/experts.py describes; field for field its ctypes structs.
struct lowbit_routing {
    const float* correction;  // (experts,): helps to choose, is not in the weights; or null
    std::int32_t rule, experts, k;
    std::int32_t groups, kept;  // of so many groups, so many take part
    std::int32_t renormalize;
    float scale;
};

// What kernels/native_layer.py describes: a weight, what its layer does to a row of x first (quantizer, then the
// columns in another order), and to the product after: times row_scale, times the row's factor, plus bias. With an
// activation the first half of the rows are a gate's and the result is activation(gate) * the other half.
struct lowbit_layer_description {
    const lowbit_weight* weight;
    const lowbit_quantizer* quantizer;  // or null; of a rule that treats every row alone
    const float* static_factor;         // one number instead of the quantizer's, or null
    const std::int64_t* column_order;   // (columns,), or null
    const float* row_scale;             // (rows,), or null
    const float* bias;                  // (rows,), or null
    std::int32_t factors;               // whether the quantizer makes them
    std::int32_t activation;            // enum Activation, -1: none
};

// What kernels/screened_head.py describes; screened_head.cpp. It changes from step to step.
struct lowbit_screened_head {
    const lowbit_layer_description* head;  // a weight and perhaps a bias
    const lowbit_weight* screen;           // which makes int8 of its input, in groups of 32
    const float* deviation;                // (rows,): no less than |head - screen|
    const float* norm;                     // (rows,): no less than |head| and |screen|
    float largest_norm, largest_bias;      // of all rows
    float scale, cap;                      // what all logits are multiplied with, then capped at; 0: not capped
    std::int32_t rounds;                   // whether the head rounds its input to bfloat16
    std::int32_t rest;                     // so many steps without the screen
    std::int64_t screened, blocks, whole;  // steps so far with the screen, blocks read in them; steps without
};

// What kernels/cpu_columns.py describes: rows in groups, of which each has its own scale for every column. ``weight``
// holds them group by group, each filled up to whole blocks of 16 rows.
struct lowbit_column_weight {
    const lowbit_weight* weight;
    const void* scales;               // (groups, the weight's columns), zeros behind x's last
    const void* zeros;                // alike: what is subtracted from codes; or null
    const std::int32_t* first_row;    // (groups + 1,): where each group's rows begin, not filled up
    const std::int32_t* first_block;  // (groups + 1,)
    const std::int32_t* places;       // (rows,): which output each of these rows is; null: they lie in order
    std::int64_t groups;
    std::int64_t columns;             // of x
    std::int32_t kind;                // of scales and zeros: enum Scales f16, bf16 or f32
    std::int32_t most_blocks;         // of a group
};

// What happens to an expert's rows before they meet a weight.
struct lowbit_expert_input {
    const lowbit_quantizer* quantizer;  // or null
    const float* static_factor;         // one number, or null
    const std::int64_t* column_order;   // (columns,), after everything else; or null
    const lowbit_rotation* rotation;    // after quantizing; or null
    std::int64_t rotated;               // columns of it: the row's, and zeros behind them
    std::int64_t columns;               // that the weight meets
    std::int32_t factors;               // the quantizer's: 0 none, 1 one a row, 2 one in all
};

// Some rows of an expert's matrix.
struct lowbit_expert_part {
    const lowbit_weight* weight;
    const lowbit_column_weight* by_columns;  // the weight with scales of its columns, or null
    const float* row_scale;   // (rows,), or null
    const lowbit_rotation* rotation;  // of the weight's ``whole`` rows; the part is those from ``skip`` on; or null
    const std::int64_t* places;       // (rows,), which of the matrix' rows each of them is; null: they lie in order
    std::int64_t first, rows;
    std::int64_t input;       // which of the expert's inputs it meets, -1: rows as they are
    std::int64_t skip, whole;
    std::int64_t apart;       // where the whole rows lie among those that no matrix has; -1: they are the part's own
};

// One of the two matrices (rows, columns) of all experts.
struct lowbit_expert_matrices {
    const lowbit_expert_part* parts;
    const std::int32_t* first_part;  // (experts + 1,): where each expert's begin
    const lowbit_expert_input* inputs;
    const std::int32_t* first_input;
    const float* const* biases;      // (experts,) of (rows,), or nulls
    std::int64_t rows, columns;
    std::int64_t most_columns;       // of an input while it is changed
    std::int64_t most_apart;         // rows of one expert that do not lie in the matrix
    std::int32_t most_inputs;        // of one expert
    std::int32_t most_parts;         // of one expert, where any is rotated; else 0
    std::int32_t shared;             // all meet inputs[0], which treats every row by itself
};

struct lowbit_experts {
    lowbit_expert_matrices gate_up, down;
    std::int32_t count, activation;
};

LOWBIT_EXPORT void lowbit_route_tokens(const lowbit_routing* routing, const float* logits, std::int64_t stride,
                                       std::int64_t tokens, float* scratch, std::int64_t* chosen, float* weights);
LOWBIT_EXPORT int lowbit_mix_experts(const lowbit_experts* experts, const float* x, std::int64_t x_stride,
                                     std::int64_t tokens, const std::int64_t* chosen, const float* weights,
                                     std::int32_t k, const float* added, std::int64_t added_stride, float* out,
                                     std::int64_t out_stride, std::int64_t prompts);
LOWBIT_EXPORT void lowbit_multiply_heads(const lowbit_head_products* job);

LOWBIT_EXPORT int lowbit_quantize_input(const lowbit_quantizer* quantizer, const float* x, std::int64_t x_stride,
                                        std::int64_t rows, std::int64_t width, float* out,
                                        std::int64_t out_stride, float* factors);
LOWBIT_EXPORT int lowbit_rotate(const lowbit_rotation* rotation, const float* x, std::int64_t x_stride,
                                std::int64_t rows, std::int64_t width, float* out, std::int64_t out_stride);
LOWBIT_EXPORT void lowbit_update_delayed(const lowbit_delayed_state* states, std::int64_t count);

LOWBIT_EXPORT void lowbit_rms_norm(const float* x, std::int64_t x_stride, const float* weight, float eps,
                                   std::int64_t rows, std::int32_t width, float* out,
                                   std::int64_t out_stride);
LOWBIT_EXPORT void lowbit_add_rms_norm(const float* x, std::int64_t x_stride, float* residual,
                                       std::int64_t residual_stride, const float* weight, float eps,
                                       std::int64_t rows, std::int32_t width, float* out,
                                       std::int64_t out_stride);
LOWBIT_EXPORT void lowbit_rms_norm_heads(float* x, std::int64_t x_stride, std::int32_t heads, std::int32_t dim,
                                         const float* weight, float eps, std::int64_t tokens);
LOWBIT_EXPORT void lowbit_layer_norm(const float* x, std::int64_t x_stride, const float* weight, const float* bias,
                                     std::int64_t weight_stride, float eps, std::int64_t rows, std::int32_t groups,
                                     std::int32_t width, float* out, std::int64_t out_stride);
LOWBIT_EXPORT void lowbit_add(const float* x, std::int64_t x_stride, float* sum, std::int64_t sum_stride,
                              std::int64_t rows, std::int32_t width);
LOWBIT_EXPORT void lowbit_gated_activation(const float* gate_up, std::int64_t stride, std::int32_t activation,
                                           std::int64_t rows, std::int32_t width, float* out,
                                           std::int64_t out_stride);
LOWBIT_EXPORT void lowbit_activation(const float* x, std::int64_t x_stride, std::int32_t activation,
                                     std::int64_t rows, std::int32_t width, float* out,
                                     std::int64_t out_stride);
LOWBIT_EXPORT int lowbit_rotary(float* q, std::int64_t q_stride, std::int32_t q_heads, float* k,
                                std::int64_t k_stride, std::int32_t k_heads, std::int32_t head_dim,
                                std::int32_t rotary_dim, const float* cosines, const float* sines,
                                std::int64_t table_rows, const std::int32_t* positions, std::int64_t tokens,
                                std::int32_t interleaved);
LOWBIT_EXPORT void lowbit_affine(const float* x, std::int64_t x_stride, std::int64_t rows, std::int32_t width,
                                 const float* column, const float* factor, std::int64_t factor_stride,
                                 float number, float divisor, const float* bias, float* out,
                                 std::int64_t out_stride);
LOWBIT_EXPORT void lowbit_softcap(float* x, std::int64_t stride, std::int64_t rows, std::int32_t width,
                                  float cap);
LOWBIT_EXPORT int lowbit_gather_rows(const float* x, std::int64_t x_stride, std::int64_t rows,
                                     std::int32_t width, const std::int64_t* wanted, std::int64_t count,
                                     float* out, std::int64_t out_stride);
LOWBIT_EXPORT void lowbit_gather_columns(const float* x, std::int64_t x_stride, std::int64_t rows,
                                         std::int32_t width, const std::int64_t* order, float* out,
                                         std::int64_t out_stride);
LOWBIT_EXPORT int lowbit_linear(const lowbit_weight* weight, const float* x, std::int64_t tokens,
                                std::int64_t x_stride, std::int64_t columns, float* out, std::int64_t out_stride,
                                std::int64_t prompts);
LOWBIT_EXPORT int lowbit_linear_columns(const lowbit_column_weight* weight, const float* x, std::int64_t tokens,
                                        std::int64_t x_stride, float* out, std::int64_t out_stride, std::int64_t prompts);
LOWBIT_EXPORT int lowbit_layer(const lowbit_layer_description* layer, const float* x, std::int64_t tokens,
                               std::int64_t x_stride, std::int64_t columns, float* out, std::int64_t out_stride,
                               std::int64_t prompts);
LOWBIT_EXPORT int lowbit_screened_logits(lowbit_screened_head* head, const float* x, std::int64_t tokens,
                                         std::int64_t x_stride, std::int64_t columns, float* out,
                                         std::int64_t out_stride);
LOWBIT_EXPORT int lowbit_linear_rows(const lowbit_weight* weight, std::int64_t columns, const void* ids,
                                     std::int32_t wide, std::int64_t count, const float* row_scale,
                                     const std::int64_t* column_order, float* out);
LOWBIT_EXPORT int lowbit_attention_write(const lowbit_attention_cache* cache, const float* k,
                                         std::int64_t k_stride, const float* v, std::int64_t v_stride,
                                         const std::int32_t* slots, std::int32_t tokens);
LOWBIT_EXPORT int lowbit_attention_attend(const lowbit_attention_cache* cache,
                                          const lowbit_attention_batch* batch, const float* q,
                                          std::int64_t q_stride, std::int32_t q_heads, float scale,
                                          float softcap, const float* sinks, float* out);

LOWBIT_EXPORT int lowbit_delta_convolve(const lowbit_delta_layer* layer, const lowbit_delta_batch* batch,
                                        const float* mixed, std::int64_t stride, float* convolved);
LOWBIT_EXPORT int lowbit_delta_rule(const lowbit_delta_layer* layer, const lowbit_delta_batch* batch,
                                    const float* mixed, std::int64_t stride, const float* convolved, float* out);
LOWBIT_EXPORT void lowbit_sigmoid_gate(float* x, std::int64_t x_stride, const float* gate, std::int64_t gate_stride,
                                       std::int64_t rows, std::int32_t width);

// Their numbers in a plan are their places in this list.
#define LOWBIT_OPERATIONS(X) \
    X(quantize_input)        \
    X(rotate)                \
    X(update_delayed)        \
    X(rms_norm)              \
    X(add_rms_norm)          \
    X(rms_norm_heads)        \
    X(layer_norm)            \
    X(add)                   \
    X(gated_activation)      \
    X(activation)            \
    X(rotary)                \
    X(affine)                \
    X(softcap)               \
    X(gather_rows)           \
    X(gather_columns)        \
    X(linear)                \
    X(linear_columns)        \
    X(layer)                 \
    X(screened_logits)       \
    X(linear_rows)           \
    X(route_tokens)          \
    X(mix_experts)           \
    X(multiply_heads)        \
    X(attention_write)       \
    X(attention_attend)      \
    X(delta_convolve)        \
    X(delta_rule)            \
    X(sigmoid_gate)
