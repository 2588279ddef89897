// The largest logits of an output head, exactly, of which only a few rows are read.
//
// Beside the head W stands a screen S: the same matrix in fewer bits, and for each row r numbers no smaller than
// |W_r - S_r| and |W_r|, |S_r| (Euclidean). A step multiplies the screen. With x what the head's kernel makes of its input
// and x' what the screen's does, the exact products differ by
//
//     |W_r x - S_r x'|  <=  |W_r - S_r| |x| + |S_r| |x - x'|                                       (Cauchy-Schwarz)
//
// and float32 sums from exact ones, in whatever order they are formed and whether each is rounded or cut, by at most
// gamma |W_r| |x| and gamma |S_r| |x'|, gamma = (2 columns + 64) 2^-24: no path through either kernel has more roundings
// than columns and a few for scales, each of 2^-23 at most. So each row has bounds; rows whose upper one is below the
// largest lower one are not the largest. The others are multiplied by the head's own kernel, in the blocks of 16 rows that
// it has, to the same bits as ever, and all that is certainly smaller is minus infinity. What is done to all logits
// afterwards, a positive scale and a cap, keeps their order but makes equal what was not: bounds are widened by that.
//
// Inputs that could overflow, or underflow more than is allowed for, meet the whole head, NaN and infinities among them:
// no row is left out then. So do steps with many candidates, and some after them without asking.

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "linear_layout.h"
#include "linear_products.h"
#include "lowbit.h"
#include "operations.h"
#include "row_tasks.h"
#include "thread_pool.h"

namespace lowbit {
namespace {

constexpr std::int64_t CHUNK = 64;             // blocks of a task
constexpr double MOST_CANDIDATES = 0.4;        // of all blocks: the screen has been read in vain
constexpr std::int32_t REST = 15;              // steps without a screen after such a one
constexpr double LARGEST = 1e37, LEAST = 0x1p-40;  // of logits; of |x|
constexpr float RELATIVE = 0x1p-20f;           // of a logit: the roundings of its bounds, of a bias and of a scale
constexpr double CAPPED = 0x1p-16;             // twice what a capped logit may be off, in caps

// What is known of a token's x.
struct Bounds {
    float size;   // no less than |x|
    float moved;  // |x - x'|, and what sums are off by
    float least;  // of any row
    float threshold;
};

// Of a row of x; false where the bounds do not hold.
bool measure(const lowbit_screened_head& head, const float* x, std::int64_t columns, Bounds& bounds) {
    double square = 0.0, moved = 0.0;
    for (std::int64_t first = 0; first < columns; first += COLUMNS) {
        const std::int64_t last = std::min(columns, first + COLUMNS);
        float found = 0.0f;
        for (std::int64_t i = first; i < last; ++i) {
            if (!(std::fabs(x[i]) <= std::numeric_limits<float>::max())) return false;
            found = std::max(found, std::fabs(x[i]));
        }
        // As linear_input.h makes int8 of them; ties to either side are as far away.
        const float scale = found / 127.0f;
        const float inverse = scale < std::numeric_limits<float>::min() ? 0.0f : 1.0f / scale;
        for (std::int64_t i = first; i < last; ++i) {
            const double here = head.rounds != 0 ? bfloat_to_float(float_to_bfloat(x[i])) : x[i];
            const double there = static_cast<double>(std::nearbyint(x[i] * inverse)) * scale;
            square += here * here;
            moved += (here - there) * (here - there);
        }
    }
    constexpr double UP = 1.0 + RELATIVE;
    const double size = std::sqrt(square) * UP;
    const double gamma = (2.0 * static_cast<double>(columns) + 64.0) * 0x1p-24;
    const double away = std::sqrt(moved) * UP;
    bounds.size = static_cast<float>(size * UP);
    bounds.moved = static_cast<float>((away + gamma * (2.0 * size + away)) * UP);
    // Numbers below 2^-126 may be taken as zero anywhere.
    bounds.least = static_cast<float>(static_cast<double>(columns) * 0x1p-110 * (1.0 + head.largest_norm + size));
    const double most = (head.largest_norm * (size + bounds.moved) + head.largest_bias) * std::max(1.0f, head.scale);
    return size >= LEAST && most <= LARGEST;
}

// The least sum whose logit may, once it is scaled, capped and rounded, equal that of ``low``.
float threshold(double low, double scale, double cap) {
    double least = low - std::fabs(low) * RELATIVE - 0x1p-120 / scale;
    if (cap > 0.0) {
        const double capped = std::tanh(low * scale / cap) - CAPPED;
        // What is minus infinity becomes -cap.
        if (capped <= CAPPED - 1.0) return MINUS_INFINITY;
        least = std::min(least, std::atanh(capped) * cap / scale);
    }
    return std::nextafter(static_cast<float>(least), MINUS_INFINITY);
}

// 16 rows' sums, and how far they may be off.
struct Sums {
    Vector16 value, error;
};

INLINE Sums sums_of(const lowbit_screened_head& head, const float* approximate, std::int64_t row, int lanes,
                    const Bounds& bounds) {
    Vector16 value = load_some(approximate + row, lanes);
    if (const float* const bias = at_column(head.head->bias, row)) value = add(value, load_some(bias, lanes));
    const Vector16 moved = multiply(load_some(head.norm + row, lanes), broadcast(bounds.moved));
    const Vector16 error = fma(load_some(head.deviation + row, lanes), broadcast(bounds.size), moved);
    const Vector16 size = maximum(value, subtract(zeros(), value));
    return {value, add(fma(size, broadcast(RELATIVE), broadcast(bounds.least)), error)};
}

struct Step {
    lowbit_screened_head& head;
    const float* x;
    std::int64_t tokens, x_stride, columns;
    float* out;
    std::int64_t out_stride;

    void whole() const {
        ++head.whole;
        const Product product{head.head->weight, x, x_stride, columns, nullptr, tokens, out, out_stride, head.head};
        multiply(&product, 1);
    }

    // Calls take(block, row, lanes) for the blocks of a task.
    template <class Take>
    void each_block(std::int64_t task, const Take& take) const {
        const std::int64_t rows = head.head->weight->rows;
        for (std::int64_t row = task * CHUNK * ROWS; row < std::min(rows, (task + 1) * CHUNK * ROWS); row += ROWS) {
            take(row / ROWS, row, static_cast<int>(std::min<std::int64_t>(ROWS, rows - row)));
        }
    }

    void run() const {
        static thread_local std::vector<Bounds> kept_bounds;
        static thread_local std::vector<float> kept_lows;
        static thread_local std::vector<std::uint8_t> kept_marks;
        std::vector<Bounds>& bounds = kept_bounds;  // tasks must see the caller's
        std::vector<float>& lows = kept_lows;
        std::vector<std::uint8_t>& marks = kept_marks;
        const std::int64_t blocks = (head.head->weight->rows + ROWS - 1) / ROWS, tasks = (blocks + CHUNK - 1) / CHUNK;
        bounds.resize(static_cast<std::size_t>(tokens));
        lows.resize(static_cast<std::size_t>(tokens * tasks));
        marks.resize(static_cast<std::size_t>(blocks));
        bool holds = head.rest == 0;
        if (head.rest > 0) --head.rest;
        for (std::int64_t t = 0; t < tokens && holds; ++t) {
            holds = measure(head, x + t * x_stride, columns, bounds[static_cast<std::size_t>(t)]);
        }
        if (!holds) return whole();
        const Product screen{head.screen, x, x_stride, columns, nullptr, tokens, out, out_stride};
        multiply(&screen, 1);
        parallel_for(tasks, [&](std::int64_t task) {
            for (std::int64_t t = 0; t < tokens; ++t) {
                Vector16 best = broadcast(MINUS_INFINITY);
                each_block(task, [&](std::int64_t, std::int64_t row, int lanes) {
                    const Sums sums = sums_of(head, out + t * out_stride, row, lanes, bounds[static_cast<std::size_t>(t)]);
                    const Vector16 low = subtract(sums.value, sums.error);
                    best = maximum(best, select(lane_range(0, lanes), low, broadcast(MINUS_INFINITY)));
                });
                lows[static_cast<std::size_t>(t * tasks + task)] = reduce_max(best);
            }
        });
        for (std::int64_t t = 0; t < tokens; ++t) {
            const float* const own = lows.data() + t * tasks;
            bounds[static_cast<std::size_t>(t)].threshold = threshold(*std::max_element(own, own + tasks), head.scale, head.cap);
        }
        parallel_for(tasks, [&](std::int64_t task) {
            each_block(task, [&](std::int64_t block, std::int64_t row, int lanes) {
                bool candidate = false;
                for (std::int64_t t = 0; t < tokens && !candidate; ++t) {
                    const Bounds& own = bounds[static_cast<std::size_t>(t)];
                    const Sums sums = sums_of(head, out + t * out_stride, row, lanes, own);
                    const Lanes below = less(add(sums.value, sums.error), broadcast(own.threshold));
                    const Vector16 above = select(below, zeros(), broadcast(-1.0f));
                    candidate = any(both(negative(above), lane_range(0, lanes)));
                }
                marks[static_cast<std::size_t>(block)] = candidate;
            });
        });
        const std::int64_t marked = std::count(marks.begin(), marks.end(), std::uint8_t{1});
        if (static_cast<double>(marked) > MOST_CANDIDATES * static_cast<double>(blocks)) {
            head.rest = REST;
            return whole();
        }
        ++head.screened;
        head.blocks += marked;
        multiply_marked(marks);
        parallel_for(tasks, [&](std::int64_t task) {
            each_block(task, [&](std::int64_t block, std::int64_t row, int lanes) {
                if (marks[static_cast<std::size_t>(block)] != 0) return;
                for (std::int64_t t = 0; t < tokens; ++t) store_some(out + t * out_stride + row, broadcast(MINUS_INFINITY), lanes);
            });
        });
    }

    // Blocks that follow each other are a weight of their own.
    void multiply_marked(const std::vector<std::uint8_t>& marks) const {
        static thread_local std::vector<lowbit_weight> weights;
        static thread_local std::vector<lowbit_layer_description> layers;
        static thread_local std::vector<Product> products;
        weights.clear();
        layers.clear();
        products.clear();
        const lowbit_weight& weight = *head.head->weight;
        const Layout layout(weight);
        std::vector<std::int64_t> firsts;
        for (std::size_t block = 0; block < marks.size(); ++block) {
            if (marks[block] == 0) continue;
            const auto first = static_cast<std::int64_t>(block);
            while (block + 1 < marks.size() && marks[block + 1] != 0) ++block;
            lowbit_weight part = weight;
            part.data += first * layout.block_bytes;
            part.rows = std::min(weight.rows, (static_cast<std::int64_t>(block) + 1) * ROWS) - first * ROWS;
            weights.push_back(part);
            firsts.push_back(first * ROWS);
        }
        for (std::size_t i = 0; i < weights.size(); ++i) {
            lowbit_layer_description layer = *head.head;
            layer.weight = &weights[i];
            layer.bias = at_column(layer.bias, firsts[i]);
            layers.push_back(layer);
        }
        for (std::size_t i = 0; i < weights.size(); ++i) {
            products.push_back({&weights[i], x, x_stride, columns, nullptr, tokens, out + firsts[i], out_stride, &layers[i]});
        }
        multiply(products.data(), static_cast<std::int64_t>(products.size()));
    }
};

}  // namespace
}  // namespace lowbit

// x (tokens, columns) -> out (tokens, rows): each row's largest logits as lowbit_layer gives them, the first of them in its
// place; others are theirs or minus infinity. 0, or 1 where memory ran out.
LOWBIT_EXPORT int lowbit_screened_logits(lowbit_screened_head* head, const float* x, std::int64_t tokens,
                                         std::int64_t x_stride, std::int64_t columns, float* out,
                                         std::int64_t out_stride) {
    try {
        lowbit::Step{*head, x, tokens, x_stride, columns, out, out_stride}.run();
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
