// Softmax of attention: a segment's scores become weights, and segments are merged (attention_tiles.h says why in
// segments).
#pragma once

#include "attention_tiles.h"

namespace lowbit {

struct Softmax {
    float scale = 1.0f;  // scores are kept times log2(e): exp(x) = 2^(x log2 e)
    float softcap = 0.0f;
};

#if defined(__AVX512BF16__)
// 2^x for 0 <= x < 1: minimax polynomial, relative error 3e-6, which eight bits do not show; 1 of 0.
constexpr float POWER_OF_TWO[] = {0.0134266857f, 0.0522424728f, 0.241280213f, 0.693044841f, 1.0f};

// 2^x for x <= 0, of lanes that are seen, and 0; below 2^-126 0 as well.
__attribute__((always_inline)) inline __m512 weights_of(__m512 x, Lanes seen) {
    x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);  // NaN stays NaN
    const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 sum = _mm512_set1_ps(POWER_OF_TWO[0]);
    for (int term = 1; term < 5; ++term) {
        sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(POWER_OF_TWO[term]));
    }
    return _mm512_maskz_scalef_ps(seen, sum, x);  // times 2^floor(x)
}

// Weights of 32 tokens, 2^(score * factor - top), as pairs of bfloat16.
inline __m512bh pair_weights(const float* scores, float* pairs, __m512 factor, __m512 top, Lanes low_seen,
                             Lanes high_seen) {
    const auto weights = [&](const float* from, Lanes seen) {
        return weights_of(_mm512_fmsub_ps(load(from).lanes, factor, top), seen);
    };
    const __m512 low = weights(scores, low_seen), high = weights(scores + LANES, high_seen);
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(pairs, reinterpret_cast<__m512i>(rounded));
    return rounded;
}
#endif

// Lanes of a vector of tokens that are first <= t < last.
inline Lanes seen_lanes(int first, int last, int vector) {
    const int from = std::max(first - vector * LANES, 0), to = std::min(last - vector * LANES, LANES);
    return lane_range(std::min(from, LANES), std::max(to, 0));
}

// What weights are: pairs of bfloat16, token t in half-word t % 32 of a line, lines PAIRS_LINE words apart; or floats.
enum class Weights { PAIRS, FLOATS };

// Scores of tokens first <= t < last (of one row, one segment) become weights 2^(score - maximum), floats in their
// place, pairs in `pairs`, which may be that place. Unseen tokens of a vector (of two, where they are pairs) get 0.
// ROUNDED: they become bfloat16 in the end.
template <Weights WEIGHTS, bool ROUNDED>
inline void softmax_segment(float* scores, [[maybe_unused]] float* pairs, int first, int last, const Softmax& softmax,
                            float& maximum_score, float& sum) {
    const int begin = first / LANES, end = (last + LANES - 1) / LANES;
    const auto seen = [&](int vector) { return seen_lanes(first, last, vector); };
    float factor = softmax.scale * LOG2_E;
    if (softmax.softcap > 0 || factor < 0) {  // a maximum can only be scaled by what keeps the order
        for (int vector = begin; vector < end; ++vector) {
            float* here = scores + vector * LANES;
            if (softmax.softcap > 0) {
                const Vector16 part = multiply(load(here), broadcast(softmax.scale / softmax.softcap));
                store(here, multiply(tanh(part), broadcast(softmax.softcap * LOG2_E)));
            } else {
                store(here, multiply(load(here), broadcast(factor)));
            }
        }
        factor = 1.0f;
    }
    const int whole_begin = (first + LANES - 1) / LANES, whole_end = last / LANES;  // vectors seen wholly
    Vector16 best = broadcast(MINUS_INFINITY);
    for (int vector = begin; vector < end; ++vector) {
        Vector16 score = load(scores + vector * LANES);
        if (vector < whole_begin || vector >= whole_end) {
            score = select(seen(vector), score, broadcast(MINUS_INFINITY));
        }
        best = maximum(best, score);
    }
    maximum_score = reduce_max(best) * factor;
#if defined(__AVX512BF16__)
    if constexpr (WEIGHTS == Weights::PAIRS) {
        const __m512 top = _mm512_set1_ps(maximum_score), factors = _mm512_set1_ps(factor);
        const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
        __m512 total = _mm512_setzero_ps();
        for (int vector = begin / 2 * 2; vector < end; vector += 2) {
            const bool whole = vector >= whole_begin && vector + 2 <= whole_end;
            const Lanes all = lane_range(0, LANES);
            float* const line = pairs + vector / 2 * PAIRS_LINE;
            const __m512bh weights = pair_weights(scores + vector * LANES, line, factors, top,
                                                  whole ? all : seen(vector),
                                                  whole ? all : seen(vector + 1));
            total = _mm512_dpbf16_ps(total, weights, ones);  // of the rounded weights: they add up to one
        }
        sum = reduce_add({total});
        return;
    }
#endif
    const Vector16 top = broadcast(maximum_score), factors = broadcast(factor);
    Vector16 total = zeros();
    for (int vector = begin; vector < end; ++vector) {
        float* here = scores + vector * LANES;
        // Rounded as the maximum was, not fused: its own weight is one.
        const Vector16 power = subtract(multiply(load(here), factors), top);
        Vector16 weight;
#if defined(__AVX512BF16__)
        if constexpr (ROUNDED) {
            weight = {weights_of(power.lanes, lane_range(0, LANES))};
        } else
#endif
            weight = exp2(power);
        if (vector < whole_begin || vector >= whole_end) weight = select(seen(vector), weight, zeros());
        store(here, weight);
        total = add(total, weight);
    }
    sum = reduce_add(total);
}

// Scales, and with `lows` lowest values, of the tokens of a segment as floats.
struct TokenScales {
    float scale[SEGMENT_TOKENS], low[SEGMENT_TOKENS];

    void load(const Scales& from, int page_begin, int page_end, int dimension) {
        static_assert(LANES == PAGE_TOKENS);
        for (int page = page_begin; page < page_end; ++page) {
            const Bfloat* const mine = from.of(page, dimension);
            store(scale + page * LANES, load_bfloats(mine));
            if (from.lows) store(low + page * LANES, load_bfloats(mine + LANES));
        }
    }
};

// folded <- weights times scales of tokens first <= t < last, 0 of unseen ones beside them: floats, or pairs
// as above. Returns the sum of weights times lows. May be in place.
template <Weights FOLDED, bool LOWS>
inline float fold_scales(const float* weights, int first, int last, const TokenScales& scales,
                         float* folded) {
    const int begin = first / LANES, end = (last + LANES - 1) / LANES;
    Vector16 lows = zeros();
    const auto scaled = [&](int vector, auto whole) __attribute__((always_inline)) {
        const Vector16 here = load(weights + vector * LANES);
        const Vector16 product = multiply(here, load(scales.scale + vector * LANES));
        if (whole) {
            if (LOWS) lows = fma(here, load(scales.low + vector * LANES), lows);
            return product;
        }
        if (vector < begin || vector >= end) return zeros();
        const Lanes seen = seen_lanes(first, last, vector);
        if (LOWS) lows = select(seen, fma(here, load(scales.low + vector * LANES), lows), lows);
        return select(seen, product, zeros());
    };
    const auto fold = [&](int vector, auto whole) __attribute__((always_inline)) {
        const Vector16 lower = scaled(vector, whole), upper = scaled(vector + 1, whole);
#if defined(__AVX512BF16__)
        if constexpr (FOLDED == Weights::PAIRS) {
            const auto rounded = _mm512_cvtne2ps_pbh(upper.lanes, lower.lanes);
            _mm512_storeu_si512(folded + vector / 2 * PAIRS_LINE, reinterpret_cast<__m512i>(rounded));
            return;
        }
#endif
        store(folded + vector * LANES, lower);
        store(folded + vector * LANES + LANES, upper);
    };
    for (int vector = begin / 2 * 2; vector < end; vector += 2) {
        if (vector * LANES >= first && (vector + 2) * LANES <= last) {
            fold(vector, std::true_type{});
        } else {
            fold(vector, std::false_type{});
        }
    }
    return LOWS ? reduce_add(lows) : 0.0f;
}

// Rows' softmax over some of their tokens: weights relative to 2^maximum, their sum (0 where a row has seen
// no token: a sum that has a term has one of about 1, or is NaN), the weighted values, v_dim a row.
struct States {
    float* maximum;
    float* sum;
    float* values;
};

inline float exp2(float x) { return first_lane(exp2(broadcast(x))); }

// all <- all and the next segment's (log-sum-exp merge), for `rows` rows; states may be read and written up
// to a multiple of 16 rows.
inline void merge_segment(const States& all, const States& next, int rows, int v_dim) {
    for (int begin = 0; begin < rows; begin += LANES) {
        const Vector16 old_top = load(all.maximum + begin), next_top = load(next.maximum + begin);
        const Vector16 top = select(less(old_top, next_top), next_top, old_top);
        float kept[LANES], added[LANES], sums[LANES];
        const Vector16 keep = exp2(subtract(old_top, top)), gain = exp2(subtract(next_top, top));
        store(kept, keep);
        store(added, gain);
        store(sums, fma(load(next.sum + begin), gain, multiply(load(all.sum + begin), keep)));
        for (int row = begin; row < std::min(rows, begin + LANES); ++row) {
            if (next.sum[row] == 0.0f) continue;
            float* values = all.values + row * v_dim;
            const float* next_values = next.values + row * v_dim;
            if (all.sum[row] == 0.0f) {
                std::copy_n(next_values, v_dim, values);
                all.maximum[row] = next.maximum[row];
                all.sum[row] = next.sum[row];
                continue;
            }
            const Vector16 keep_lanes = broadcast(kept[row - begin]),
                gain_lanes = broadcast(added[row - begin]);
            for (int dimension = 0; dimension < v_dim; dimension += LANES) {
                const Vector16 old = multiply(load(values + dimension), keep_lanes);
                store(values + dimension, fma(load(next_values + dimension), gain_lanes, old));
            }
            all.sum[row] = sums[row - begin];
            if (all.maximum[row] < next.maximum[row]) all.maximum[row] = next.maximum[row];
        }
    }
}

// Softmax division; a sink is a logit that takes its share of the sum and has no value.
inline void finish_row(float maximum, float sum, const float* values, int v_dim, const float* sink,
                       float* out) {
    float kept = 1.0f;
    if (sink != nullptr) {
        const float logit = *sink * LOG2_E, top = logit > maximum ? logit : maximum;
        kept = exp2(maximum - top);
        sum = std::fma(sum, kept, exp2(logit - top));
    }
    const Vector16 share = broadcast(kept / sum);
    for (int dimension = 0; dimension < v_dim; dimension += LANES) {
        store(out + dimension, multiply(load(values + dimension), share));
    }
}

}  // namespace lowbit
