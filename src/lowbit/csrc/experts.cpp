// Mixtures of experts: which experts a token goes to, and the sum of what they make of it.
//
// The pairs (token, expert) of a batch are sorted by expert, and all experts' products run as one list of tasks:
// gate and up, the activation, down. Many pairs go a few experts at a time, so that what lies between the products
// stays small. A token's result is the sum over its experts in ascending order of their numbers; every row of it
// is computed as it would be alone. Weights whose products stand between two rotations (trellises, lattices) have the
// rows of all pairs rotated together, before and behind.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "activations.h"
#include "linear_products.h"
#include "lowbit.h"
#include "operations.h"
#include "rotation.h"
#include "row_tasks.h"
#include "thread_pool.h"
#include "vector16.h"

namespace lowbit {
namespace {

enum class Rule : std::int32_t { softmax_top_k = 0, top_k_softmax = 1, group_softmax = 2, group_sigmoid = 3 };

// Larger is better: NaN is best and zeros of either sign are equal, as torch sorts.
inline std::int32_t rank_of(float score) {
    if (score != score) return INT32_MAX;
    const float plus = score + 0.0f;
    std::int32_t bits;
    std::memcpy(&bits, &plus, sizeof bits);
    return bits ^ ((bits >> 31) & INT32_MAX);
}

// The k best of some scores, best first; of equals the lower number.
void choose(const float* scores, int count, int k, std::int64_t* chosen, float* best) {
    int held = 0;
    for (int number = 0; number < count; ++number) {
        const std::int32_t rank = rank_of(scores[number]);
        if (held == k && rank <= rank_of(best[k - 1])) continue;
        int at = held < k ? held++ : k - 1;
        for (; at > 0 && rank_of(best[at - 1]) < rank; --at) {
            best[at] = best[at - 1];
            chosen[at] = chosen[at - 1];
        }
        best[at] = scores[number];
        chosen[at] = number;
    }
}

// out may be x.
void softmax(const float* x, int width, float* out) {
    const auto filled = [&](int column, int lanes) {
        return select(lane_range(0, lanes), load_some(x + column, lanes), broadcast(MINUS_INFINITY));
    };
    Vector16 largest = broadcast(MINUS_INFINITY);
    for_vectors(width, [&](int column, int lanes) { largest = maximum(largest, filled(column, lanes)); });
    const Vector16 top = broadcast(reduce_max(largest));
    Vector16 sums = zeros();
    for_vectors(width, [&](int column, int lanes) {
        const Vector16 value = exp(subtract(filled(column, lanes), top));
        sums = add(sums, value);
        store_some(out + column, value, lanes);
    });
    const Vector16 sum = broadcast(reduce_add(sums));
    for_vectors(width, [&](int column, int lanes) {
        store_some(out + column, divide(load_some(out + column, lanes), sum), lanes);
    });
}

// As a softmax over x and 0: of infinity it is NaN.
void sigmoid(const float* x, int width, float* out) {
    for_vectors(width, [&](int column, int lanes) {
        const Vector16 value = load_some(x + column, lanes);
        const Vector16 top = maximum(zeros(), value);
        const Vector16 own = exp(subtract(value, top)), other = exp(subtract(zeros(), top));
        store_some(out + column, divide(own, add(own, other)), lanes);
    });
}

// Scores outside the best groups become ``outside``.
void limit(float* scores, int size, const float* group_scores, int groups, int kept, float outside) {
    for (int group = 0; group < groups; ++group) {
        const std::int32_t own = rank_of(group_scores[group]);
        int better = 0;
        for (int other = 0; other < groups; ++other) {
            const std::int32_t theirs = rank_of(group_scores[other]);
            better += theirs > own || (theirs == own && other < group);
        }
        if (better >= kept) std::fill_n(scores + group * size, size, outside);
    }
}

// scratch (2 * experts + groups,)
void route(const lowbit_routing& routing, const float* logits, float* scratch, std::int64_t* chosen, float* weights) {
    const int experts = routing.experts, k = routing.k, size = experts / routing.groups;
    float *const scores = scratch, *const adjusted = scratch + experts, *const groups = adjusted + experts;
    float least = 0.0f;  // added to the sum that divides
    switch (static_cast<Rule>(routing.rule)) {
        case Rule::softmax_top_k:
            softmax(logits, experts, scores);
            choose(scores, experts, k, chosen, weights);
            break;
        case Rule::top_k_softmax:
            choose(logits, experts, k, chosen, weights);
            softmax(weights, k, weights);
            break;
        case Rule::group_softmax:
            softmax(logits, experts, scores);
            for (int group = 0; group < routing.groups; ++group) {
                std::int64_t place;
                choose(scores + group * size, size, 1, &place, groups + group);
            }
            limit(scores, size, groups, routing.groups, routing.kept, 0.0f);
            choose(scores, experts, k, chosen, weights);
            break;
        case Rule::group_sigmoid:
            sigmoid(logits, experts, scores);
            for (int expert = 0; expert < experts; ++expert) adjusted[expert] = scores[expert] + routing.correction[expert];
            for (int group = 0; group < routing.groups; ++group) {
                std::int64_t places[2];
                float two[2] = {0.0f, 0.0f};
                choose(adjusted + group * size, size, std::min(size, 2), places, two);
                groups[group] = two[0] + two[1];
            }
            limit(adjusted, size, groups, routing.groups, routing.kept, MINUS_INFINITY);
            choose(adjusted, experts, k, chosen, weights);
            for (int i = 0; i < k; ++i) weights[i] = scores[chosen[i]];
            least = 1e-20f;
            break;
    }
    if (routing.renormalize) {
        float sum = 0.0f;
        for (int i = 0; i < k; ++i) sum += weights[i];
        sum += least;
        for (int i = 0; i < k; ++i) weights[i] /= sum;
    }
    for (int i = 0; i < k; ++i) weights[i] *= routing.scale;
}

constexpr std::int64_t EACH_ROTATED = 8;  // what rotating a number costs, in numbers copied; as in rotation.cpp
constexpr std::int64_t FLOATS_TOGETHER = 1 << 23;  // between the products of the experts that run together

// Rows quantized for all experts.
struct Shared {
    std::vector<float> rows, factors;
};

// A calling thread's own, grown and kept.
struct Workspace {
    // Of the pairs, sorted by expert; where a token's own lie, ascending.
    std::vector<std::int32_t> tokens, experts, places;
    std::vector<float> weights;
    std::vector<std::int64_t> starts, next;  // (experts + 1,)
    std::vector<float> gate_up, inner, down;
    std::vector<float> staged, input, factors;  // rows as one expert's inputs want them
    std::vector<float> apart;                   // products that are rotated before a matrix has them
    Shared x, between;
    std::vector<Product> products;
    std::vector<std::int32_t> active;  // experts with pairs
};

template <class Element>
Element* grown(std::vector<Element>& memory, std::int64_t count) {
    if (static_cast<std::int64_t>(memory.size()) < count) {
        memory.clear();  // nothing to copy
        memory.resize(static_cast<std::size_t>(count));
    }
    return memory.data();
}

// What a matrix meets: row rows[pair] of x, or row pair where there is no list. factors: one a row of x.
struct Rows {
    const float* x;
    std::int64_t stride;
    const std::int32_t* rows;
    const float* factors;

    std::int64_t of(std::int64_t pair) const { return rows == nullptr ? pair : rows[pair]; }
};

// Quantizes all rows at once; ``from.factors`` is then set where the rule has them.
void quantize_shared(const lowbit_expert_matrices& matrices, std::int64_t count, Rows& from, Shared& own) {
    const lowbit_expert_input& input = matrices.inputs[0];
    float* const to = grown(own.rows, count * matrices.columns);
    float* const factors = grown(own.factors, count);
    if (lowbit_quantize_input(input.quantizer, from.x, from.stride, count, matrices.columns, to, matrices.columns,
                              factors) != 0) {
        throw std::bad_alloc();
    }
    if (input.static_factor != nullptr) std::fill_n(factors, count, *input.static_factor);
    from.x = to;
    from.stride = matrices.columns;
    from.factors = input.static_factor != nullptr || input.factors != 0 ? factors : nullptr;
}

// The product of one matrix of the experts ``active`` with their pairs, all of which lie from ``first`` on.
class Multiplied {
  public:
    // Pairs of tokens from ``prompts`` on are prompts'. Throws std::bad_alloc.
    Multiplied(const lowbit_expert_matrices& matrices, const Rows& from, std::int64_t first, std::int64_t pairs,
               std::int64_t prompts, Workspace& own, float* out)
        : matrices_(matrices), from_(from), own_(own), first_(first), pairs_(pairs) {
        if (!matrices.shared && matrices.most_inputs > 0) prepare();
        if (matrices.most_apart > 0) grown(own.apart, pairs * matrices.most_apart);
        own.products.clear();
        for (const std::int32_t expert : own.active) {
            const std::int64_t start = own.starts[static_cast<std::size_t>(expert)] - first;
            const std::int64_t end = own.starts[static_cast<std::size_t>(expert) + 1] - first;
            const std::int32_t* const tokens = own.tokens.data() + first;  // of an expert's pairs they ascend
            const std::int64_t middle = std::lower_bound(tokens + start, tokens + end, prompts) - tokens;
            add_products(expert, start, middle, false, out);
            add_products(expert, middle, end, true, out);
        }
        multiply(own.products.data(), static_cast<std::int64_t>(own.products.size()));
        if (matrices.most_parts > 0) rotate_results(out);
    }

    // Scales and biases of a pair's row of the product, in the order a layer by itself applies them.
    void finish(std::int64_t pair, int expert, float* row) const {
        const float* const bias = matrices_.biases[expert];
        for (int i = matrices_.first_part[expert]; i < matrices_.first_part[expert + 1]; ++i) {
            const lowbit_expert_part& part = matrices_.parts[i];
            const float* factor = nullptr;
            if (matrices_.shared) {
                if (from_.factors != nullptr) factor = from_.factors + from_.of(pair);
            } else if (part.input >= 0) {
                if (has_factors(input_at(expert, part.input))) factor = factors_of(part.input, pair);
            }
            if (part.row_scale == nullptr && factor == nullptr && bias == nullptr) continue;
            float* const to = row + part.first;
            for_vectors(static_cast<int>(part.rows), [&](int at, int lanes) {
                const float *const scale = at_column(part.row_scale, at), *const own = at_column(bias, part.first + at);
                store_some(to + at, affine(load_some(to + at, lanes), scale, factor, own, lanes), lanes);
            });
        }
    }

  private:
    // Of the pairs start <= pair < end.
    void add_products(int expert, std::int64_t start, std::int64_t end, bool prompts, float* out) {
        if (start == end) return;
        for (int i = matrices_.first_part[expert]; i < matrices_.first_part[expert + 1]; ++i) {
            const lowbit_expert_part& part = matrices_.parts[i];
            const bool prepared = !matrices_.shared && part.input >= 0;
            const float* const x = prepared                   ? input_of(part.input, start)
                                   : from_.rows == nullptr ? from_.x + start * from_.stride
                                                           : from_.x;
            const std::int32_t* const rows = prepared || from_.rows == nullptr ? nullptr : from_.rows + start;
            const std::int64_t stride = prepared ? matrices_.most_columns : from_.stride;
            const std::int64_t columns = prepared ? input_at(expert, part.input).columns : matrices_.columns;
            const std::int64_t to_stride = part.apart >= 0 ? matrices_.most_apart : matrices_.rows;
            own_.products.push_back({part.weight, x, stride, columns, rows, end - start, result_of(part, start, out),
                                     to_stride, nullptr, part.by_columns, prompts});
        }
    }
    static bool has_factors(const lowbit_expert_input& input) {
        return input.static_factor != nullptr || input.factors != 0;
    }
    const lowbit_expert_input& input_at(int expert, std::int64_t input) const {
        return matrices_.inputs[matrices_.first_input[expert] + input];
    }
    float* input_of(std::int64_t input, std::int64_t pair) const {
        return own_.input.data() + (input * pairs_ + pair) * matrices_.most_columns;
    }
    // Where a part's product of a pair is written.
    float* result_of(const lowbit_expert_part& part, std::int64_t pair, float* out) const {
        if (part.apart >= 0) return own_.apart.data() + pair * matrices_.most_apart + part.apart;
        return out + pair * matrices_.rows + part.first;
    }
    float* factors_of(std::int64_t input, std::int64_t pair) const {
        return own_.factors.data() + input * pairs_ + pair;
    }

    // Every expert's rows as its own inputs want them.
    void prepare() {
        const std::int64_t most = matrices_.most_inputs;
        grown(own_.input, most * pairs_ * matrices_.most_columns);
        grown(own_.factors, most * pairs_);
        grown(own_.staged, pairs_ * matrices_.most_columns);
        const auto of_expert = [&](std::int64_t index) {
            const int expert = own_.active[static_cast<std::size_t>(index)];
            const std::int64_t start = own_.starts[static_cast<std::size_t>(expert)] - first_;
            const std::int64_t count = own_.starts[static_cast<std::size_t>(expert) + 1] - first_ - start;
            const int first_input = matrices_.first_input[expert];
            for (int i = first_input; i < matrices_.first_input[expert + 1]; ++i) {
                prepare(matrices_.inputs[i], i - first_input, start, count);
            }
        };
        const auto experts = static_cast<std::int64_t>(own_.active.size());
        if (experts >= 2 * thread_count()) {
            parallel_for(experts, of_expert);
        } else {  // shares the rows of each instead
            for (std::int64_t index = 0; index < experts; ++index) of_expert(index);
        }
        if (matrices_.most_parts > 0) rotate_inputs();
    }

    // Gathered and quantized, and unless they are rotated then in the weight's order.
    void prepare(const lowbit_expert_input& input, std::int64_t number, std::int64_t start, std::int64_t count) {
        const std::int64_t columns = matrices_.columns, stride = matrices_.most_columns;
        const bool ordered = input.column_order != nullptr && input.rotation == nullptr;
        float* const to = input_of(number, start);
        float* const gathered = ordered ? own_.staged.data() + start * stride : to;
        for_rows(count, columns, [&](std::int64_t i) {
            std::memcpy(gathered + i * stride, from_.x + from_.of(start + i) * from_.stride,
                        static_cast<std::size_t>(columns) * sizeof(float));
        });
        float* const factors = factors_of(number, start);
        if (input.quantizer != nullptr) {
            if (lowbit_quantize_input(input.quantizer, gathered, stride, count, columns, gathered, stride,
                                      factors) != 0) {
                throw std::bad_alloc();
            }
            if (input.factors == 2) std::fill_n(factors, count, factors[0]);
        }
        if (input.static_factor != nullptr) std::fill_n(factors, count, *input.static_factor);
        if (ordered) {
            for_rows(count, columns, [&](std::int64_t i) {
                for (std::int64_t column = 0; column < columns; ++column) {
                    to[i * stride + column] = gathered[i * stride + input.column_order[column]];
                }
            });
        }
    }

    // Each row of each input that is, in place: few pairs share the threads, too.
    void rotate_inputs() {
        const std::int64_t most = matrices_.most_inputs;
        for_rows(pairs_ * most, matrices_.most_columns * EACH_ROTATED, [&](std::int64_t index) {
            const std::int64_t pair = index / most, number = index % most;
            const int expert = own_.experts[static_cast<std::size_t>(first_ + pair)];
            if (matrices_.first_input[expert] + number >= matrices_.first_input[expert + 1]) return;
            const lowbit_expert_input& input = input_at(expert, number);
            if (input.rotation == nullptr) return;
            float* const row = input_of(number, pair);
            std::fill(row + matrices_.columns, row + input.rotated, 0.0f);
            rotate_row(*input.rotation, row, input.rotated, row);
            if (input.column_order == nullptr) return;
            static thread_local std::vector<float> kept;
            kept.assign(row, row + input.rotated);
            for (std::int64_t column = 0; column < input.columns; ++column) {
                row[column] = kept[static_cast<std::size_t>(input.column_order[column])];
            }
        });
    }

    // Each part's product that is, and from where it lies apart into its matrix.
    void rotate_results(float* out) const {
        const std::int64_t most = matrices_.most_parts, width = std::max(matrices_.rows, matrices_.most_apart);
        for_rows(pairs_ * most, width / most * EACH_ROTATED, [&](std::int64_t index) {
            const std::int64_t pair = index / most;
            const int expert = own_.experts[static_cast<std::size_t>(first_ + pair)];
            const std::int64_t number = matrices_.first_part[expert] + index % most;
            if (number >= matrices_.first_part[expert + 1]) return;
            const lowbit_expert_part& part = matrices_.parts[number];
            if (part.rotation == nullptr) return;
            float* const whole = result_of(part, pair, out);
            rotate_row(*part.rotation, whole, part.whole, whole);
            if (part.apart < 0) return;
            const float* const own = whole + part.skip;
            float* const to = out + pair * matrices_.rows;
            if (part.places == nullptr) {
                std::copy(own, own + part.rows, to + part.first);
            } else {
                for (std::int64_t row = 0; row < part.rows; ++row) to[part.places[row]] = own[row];
            }
        });
    }

    const lowbit_expert_matrices& matrices_;
    const Rows from_;
    Workspace& own_;
    const std::int64_t first_, pairs_;
};

struct Mixed {
    const std::int64_t tokens;
    const std::int64_t prompts;  // from which of them on they are prompts'
    const std::int32_t k;
    const float* added;
    const std::int64_t added_stride;
    float* out;
    const std::int64_t out_stride;
};

// Sorts the pairs; false where an expert does not exist.
bool sort_pairs(const lowbit_experts& experts, const std::int64_t* chosen, const float* weights, const Mixed& mixed,
                Workspace& own) {
    const std::int64_t pairs = mixed.tokens * mixed.k;
    const auto count = static_cast<std::size_t>(experts.count);
    own.starts.assign(count + 1, 0);
    for (std::int64_t i = 0; i < pairs; ++i) {
        if (chosen[i] < 0 || chosen[i] >= experts.count) return false;
        ++own.starts[static_cast<std::size_t>(chosen[i]) + 1];
    }
    for (std::size_t expert = 0; expert < count; ++expert) own.starts[expert + 1] += own.starts[expert];
    own.next.assign(own.starts.begin(), own.starts.end());
    std::int32_t* const tokens = grown(own.tokens, pairs);
    std::int32_t* const numbers = grown(own.experts, pairs);
    std::int32_t* const places = grown(own.places, pairs);
    float* const sorted = grown(own.weights, pairs);
    for (std::int64_t token = 0; token < mixed.tokens; ++token) {
        std::int32_t* const of_token = places + token * mixed.k;
        for (std::int32_t i = 0; i < mixed.k; ++i) {
            const std::int64_t expert = chosen[token * mixed.k + i];
            const std::int64_t place = own.next[static_cast<std::size_t>(expert)]++;
            tokens[place] = static_cast<std::int32_t>(token);
            numbers[place] = static_cast<std::int32_t>(expert);
            sorted[place] = weights[token * mixed.k + i];
            of_token[i] = static_cast<std::int32_t>(place);
        }
        std::sort(of_token, of_token + mixed.k);
    }
    return true;
}

// Adds what the pairs first <= pair < end make to their tokens' rows.
void run_pairs(const lowbit_experts& experts, const Rows& x, std::int64_t first, std::int64_t end, const Mixed& mixed,
               Workspace& own) {
    const std::int64_t pairs = end - first, width = experts.down.columns, hidden = experts.down.rows;
    float* const gate_up = grown(own.gate_up, pairs * experts.gate_up.rows);
    float* const inner = grown(own.inner, pairs * width);
    float* const down = grown(own.down, pairs * hidden);
    const std::int32_t* const numbers = own.experts.data() + first;
    {
        const Multiplied product(experts.gate_up, {x.x, x.stride, own.tokens.data() + first, x.factors}, first, pairs,
                                 mixed.prompts, own, gate_up);
        for_rows(pairs, 2 * width, [&](std::int64_t pair) {
            float* const row = gate_up + pair * experts.gate_up.rows;
            product.finish(pair, numbers[pair], row);
            gate_row(row, static_cast<int>(width), static_cast<Activation>(experts.activation), inner + pair * width);
        });
    }
    Rows rows{inner, width, nullptr, nullptr};
    if (experts.down.shared) quantize_shared(experts.down, pairs, rows, own.between);
    const Multiplied product(experts.down, rows, first, pairs, mixed.prompts, own, down);
    for_rows(mixed.tokens, mixed.k * hidden, [&](std::int64_t token) {
        const std::int32_t* const places = own.places.data() + token * mixed.k;
        float* const to = mixed.out + token * mixed.out_stride;
        for (std::int32_t i = 0; i < mixed.k; ++i) {
            if (places[i] < first || places[i] >= end) continue;
            const std::int64_t pair = places[i] - first;
            float* const row = down + pair * hidden;
            product.finish(pair, numbers[pair], row);
            const Vector16 weight = broadcast(own.weights[static_cast<std::size_t>(places[i])]);
            const float* const last = i + 1 == mixed.k && mixed.added != nullptr ? mixed.added + token * mixed.added_stride
                                                                                 : nullptr;
            for_vectors(static_cast<int>(hidden), [&](int at, int lanes) {
                Vector16 sum = i == 0 ? zeros() : load_some(to + at, lanes);
                sum = add(sum, multiply(load_some(row + at, lanes), weight));
                if (last != nullptr) sum = add(sum, load_some(last + at, lanes));
                store_some(to + at, sum, lanes);
            });
        }
    });
}

void run(const lowbit_experts& experts, const float* x, std::int64_t x_stride, const Mixed& mixed, Workspace& own) {
    Rows rows{x, x_stride, nullptr, nullptr};
    if (experts.gate_up.shared) quantize_shared(experts.gate_up, mixed.tokens, rows, own.x);
    const std::int64_t floats = experts.gate_up.rows + experts.gate_up.columns + experts.gate_up.most_apart +
                                2 * experts.down.columns + experts.down.rows + experts.down.most_apart;
    const std::int64_t most = std::max<std::int64_t>(1, FLOATS_TOGETHER / floats);
    for (std::int32_t expert = 0; expert < experts.count;) {
        const std::int64_t first = own.starts[static_cast<std::size_t>(expert)];
        own.active.clear();
        std::int64_t end = first;
        for (; expert < experts.count; ++expert) {
            const std::int64_t next = own.starts[static_cast<std::size_t>(expert) + 1];
            if (next == end) continue;
            if (next - first > most && end > first) break;
            own.active.push_back(expert);
            end = next;
        }
        if (end > first) run_pairs(experts, rows, first, end, mixed, own);
    }
}

}  // namespace
}  // namespace lowbit

// logits (tokens, experts) -> chosen and weights (tokens, k). scratch (tokens, 2 * experts + groups).
LOWBIT_EXPORT void lowbit_route_tokens(const lowbit_routing* routing, const float* logits, std::int64_t stride,
                                       std::int64_t tokens, float* scratch, std::int64_t* chosen, float* weights) {
    const std::int64_t width = 2 * std::int64_t{routing->experts} + routing->groups, k = routing->k;
    lowbit::for_rows(tokens, 4 * width, [&](std::int64_t token) {
        lowbit::route(*routing, logits + token * stride, scratch + token * width, chosen + token * k,
                      weights + token * k);
    });
}

// x (tokens, hidden), chosen and weights (tokens, k), added (tokens, hidden) or null -> out (tokens, hidden).
// Tokens from ``prompts`` on are prompts', for which AMX may round the weights to bfloat16.
// 0, 1 where memory ran out, or 2 where an expert that does not exist was chosen: then nothing is written.
LOWBIT_EXPORT int lowbit_mix_experts(const lowbit_experts* experts, const float* x, std::int64_t x_stride,
                                     std::int64_t tokens, const std::int64_t* chosen, const float* weights,
                                     std::int32_t k, const float* added, std::int64_t added_stride, float* out,
                                     std::int64_t out_stride, std::int64_t prompts) {
    static thread_local lowbit::Workspace own;
    const lowbit::Mixed mixed{tokens, prompts, k, added, added_stride, out, out_stride};
    try {
        if (!lowbit::sort_pairs(*experts, chosen, weights, mixed, own)) return 2;
        lowbit::run(*experts, x, x_stride, mixed, own);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
