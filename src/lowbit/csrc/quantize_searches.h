// Sixteen sub-blocks of a GGUF type at once, and the searches for their scales.
//
// Each lane adds up its own sums in the order of its elements, as ggml's plain C does with one sub-block, and
// a product is never fused with a sum: so the codes are ggml's, on every instruction set.
#pragma once

#include "vector16.h"

#include <cmath>
#include <cstdint>

namespace lowbit {
namespace {

constexpr float TINY = 1e-15f;  // a sub-block whose largest weight is below this is zero

// x[i][lane]: weight i of the sub-block in that lane; codes the same way, as floats.
template <int N>
struct Unit {
    alignas(64) float x[N][LANES];
    alignas(64) float codes[N][LANES];

    Vector16 weight(int i) const { return load(x[i]); }
    Vector16 code(int i) const { return load(codes[i]); }
    void set_code(int i, Vector16 value) { store(codes[i], value); }
    void keep_codes(Lanes which, const float (&better)[N][LANES]) {
        for (int i = 0; i < N; ++i) set_code(i, select(which, load(better[i]), code(i)));
    }
};

inline Vector16 absolute(Vector16 x) { return maximum(x, subtract(zeros(), x)); }
inline Vector16 negate(Vector16 x) { return subtract(zeros(), x); }

// ---- Searches: one scale (and minimum) for each lane, codes in the unit ----

struct ScaleAndMin {
    Vector16 scale, min;  // value = scale * code - min
};

struct OffsetSearch {  // of make_offset_codes
    int levels;        // codes 0..levels
    float first, step;
    int steps;
    bool absolute_error;
};

// Codes 0..levels with an offset: starting from the range of the weights, tries step widths around it, solves
// for scale and minimum by weighted least squares for each, and keeps what has the smallest error.
template <int N>
ScaleAndMin make_offset_codes(Unit<N>& unit, const float (&weights)[N][LANES], const OffsetSearch& search) {
    alignas(64) float tried[N][LANES];
    Vector16 min = unit.weight(0), max = min;
    Vector16 sum_w = load(weights[0]), sum_x = multiply(sum_w, unit.weight(0));
    for (int i = 1; i < N; ++i) {
        const Vector16 x = unit.weight(i), w = load(weights[i]);
        min = minimum(x, min);
        max = maximum(x, max);
        sum_w = add(sum_w, w);
        sum_x = add(sum_x, multiply(w, x));
    }
    min = select(less(zeros(), min), zeros(), min);
    const Lanes flat = equal(max, min);
    const Vector16 first_min = min;
    const auto error_of = [&](const float(&codes)[N][LANES], Vector16 scale, Vector16 low) {
        Vector16 error = zeros();
        for (int i = 0; i < N; ++i) {
            const Vector16 off = subtract(add(multiply(scale, load(codes[i])), low), unit.weight(i));
            const Vector16 loss = search.absolute_error ? absolute(off) : multiply(off, off);
            error = add(error, multiply(load(weights[i]), loss));
        }
        return error;
    };

    Vector16 inverse = divide(broadcast(static_cast<float>(search.levels)), subtract(max, min));
    Vector16 scale = divide(broadcast(1.0f), inverse);
    for (int i = 0; i < N; ++i) {
        unit.set_code(i, nearest_between(multiply(inverse, subtract(unit.weight(i), min)), 0, search.levels));
    }
    Vector16 best = error_of(unit.codes, scale, min);
    for (int step = 0; step <= search.steps; ++step) {
        const float numerator =
            search.first + search.step * static_cast<float>(step) + static_cast<float>(search.levels);
        inverse = divide(broadcast(numerator), subtract(max, min));
        Vector16 sum_l = zeros(), sum_l2 = zeros(), sum_xl = zeros();
        for (int i = 0; i < N; ++i) {
            const Vector16 x = unit.weight(i);
            const Vector16 code = nearest_between(multiply(inverse, subtract(x, min)), 0, search.levels);
            store(tried[i], code);
            const Vector16 weighted = multiply(load(weights[i]), code);
            sum_l = add(sum_l, weighted);
            sum_l2 = add(sum_l2, multiply(weighted, code));
            sum_xl = add(sum_xl, multiply(weighted, x));
        }
        const Vector16 determinant = subtract(multiply(sum_w, sum_l2), multiply(sum_l, sum_l));
        Vector16 new_scale =
            divide(subtract(multiply(sum_w, sum_xl), multiply(sum_x, sum_l)), determinant);
        Vector16 new_min = divide(subtract(multiply(sum_l2, sum_x), multiply(sum_l, sum_xl)), determinant);
        const Lanes above = less(zeros(), new_min);
        new_scale = select(above, divide(sum_xl, sum_l2), new_scale);
        new_min = select(above, zeros(), new_min);
        const Vector16 error = error_of(tried, new_scale, new_min);
        const Lanes better = both(less(zeros(), determinant), less(error, best));
        if (!any(better)) continue;
        unit.keep_codes(better, tried);
        best = select(better, error, best);
        scale = select(better, new_scale, scale);
        min = select(better, new_min, min);
    }
    for (int i = 0; i < N; ++i) unit.set_code(i, select(flat, zeros(), unit.code(i)));
    return {select(flat, zeros(), scale), negate(select(flat, first_min, min))};
}

struct Largest {
    Vector16 magnitude, value;
};

template <int N>
Largest largest_of(const Unit<N>& unit) {  // the first of equal magnitudes
    Largest found = {zeros(), zeros()};
    for (int i = 0; i < N; ++i) {
        const Vector16 x = unit.weight(i), magnitude = absolute(x);
        const Lanes larger = less(found.magnitude, magnitude);
        found.magnitude = select(larger, magnitude, found.magnitude);
        found.value = select(larger, x, found.value);
    }
    return found;
}

struct Sums {
    Vector16 xl, l2;  // sum of w x l, sum of w l l
};

inline Lanes is_better(const Sums& sums, Vector16 best) {
    return both(less(zeros(), sums.l2), less(multiply(best, sums.l2), multiply(sums.xl, sums.xl)));
}

// Symmetric codes -32..31 (stored + 32) with weights x^2: nineteen step widths around the one that puts the
// largest weight on -32.
Vector16 make_symmetric_codes(Unit<16>& unit) {
    constexpr int half = 32;
    alignas(64) float tried[16][LANES];
    const Largest largest = largest_of(unit);
    const auto sums_for = [&](Vector16 inverse) {
        Sums sums = {zeros(), zeros()};
        for (int i = 0; i < 16; ++i) {
            const Vector16 x = unit.weight(i);
            const Vector16 code = nearest_between(multiply(inverse, x), -half, half - 1);
            store(tried[i], add(code, broadcast(half)));
            const Vector16 w = multiply(x, x);
            sums.xl = add(sums.xl, multiply(multiply(w, x), code));
            sums.l2 = add(sums.l2, multiply(multiply(w, code), code));
        }
        return sums;
    };
    const Sums start = sums_for(divide(broadcast(-half), largest.value));
    for (int i = 0; i < 16; ++i) unit.set_code(i, load(tried[i]));
    Vector16 scale = select(equal(start.l2, zeros()), zeros(), divide(start.xl, start.l2));
    Vector16 best = multiply(scale, start.xl);
    for (int step = -9; step <= 9; ++step) {
        if (step == 0) continue;
        const float numerator = -(half + 0.1f * static_cast<float>(step));
        const Sums sums = sums_for(divide(broadcast(numerator), largest.value));
        const Lanes better = is_better(sums, best);
        if (!any(better)) continue;
        unit.keep_codes(better, tried);
        scale = select(better, divide(sums.xl, sums.l2), scale);
        best = select(better, multiply(scale, sums.xl), best);
    }
    const Lanes zero = less(largest.magnitude, broadcast(TINY));
    for (int i = 0; i < 16; ++i) unit.set_code(i, select(zero, zeros(), unit.code(i)));
    return select(zero, zeros(), scale);
}

// Codes -4..3 (stored + 4) with weights x^2: up to five sweeps, each giving one element after the other the
// code that is best for the scale without it.
Vector16 make_q3_codes(Unit<16>& unit) {
    constexpr int half = 4;
    const Largest largest = largest_of(unit);
    const Vector16 inverse = divide(broadcast(-half), largest.value);
    Sums sums = {zeros(), zeros()};
    for (int i = 0; i < 16; ++i) {
        const Vector16 x = unit.weight(i), w = multiply(x, x);
        const Vector16 code = nearest_between(multiply(inverse, x), -half, half - 1);
        unit.set_code(i, code);
        sums.xl = add(sums.xl, multiply(multiply(w, x), code));
        sums.l2 = add(sums.l2, multiply(multiply(w, code), code));
    }
    for (int sweep = 0; sweep < 5; ++sweep) {
        bool changed = false;
        for (int i = 0; i < 16; ++i) {
            const Vector16 x = unit.weight(i), w = multiply(x, x), old = unit.code(i);
            const Vector16 wx = multiply(w, x);
            Vector16 xl = subtract(sums.xl, multiply(wx, old));
            Vector16 l2 = subtract(sums.l2, multiply(multiply(w, old), old));
            const Lanes positive = less(zeros(), xl);
            const Vector16 code = nearest_between(divide(multiply(x, l2), xl), -half, half - 1);
            xl = add(xl, multiply(wx, code));
            l2 = add(l2, multiply(multiply(w, code), code));
            const Lanes rises = less(multiply(multiply(sums.xl, sums.xl), l2), multiply(multiply(xl, xl), sums.l2));
            // The same code can change a sum's last bit, and must not: only another code counts.
            const Lanes other = both(less(zeros(), absolute(subtract(code, old))), less(zeros(), l2));
            const Lanes better = both(both(positive, other), rises);
            if (!any(better)) continue;
            changed = true;
            unit.set_code(i, select(better, code, old));
            sums.xl = select(better, xl, sums.xl);
            sums.l2 = select(better, l2, sums.l2);
        }
        if (!changed) break;
    }
    const Lanes zero = less(largest.magnitude, broadcast(TINY));
    for (int i = 0; i < 16; ++i) {
        unit.set_code(i, select(zero, zeros(), add(unit.code(i), broadcast(half))));
    }
    const Vector16 scale = select(less(zeros(), sums.l2), divide(sums.xl, sums.l2), zeros());
    return select(zero, zeros(), scale);
}

constexpr float NON_LINEAR[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// The nearest entry of NON_LINEAR: what values[k] becomes for a weight between the k-th and the next middle.
inline Vector16 nearest_entry(Vector16 x, const float (&values)[16]) {
    Vector16 found = broadcast(values[0]);
    for (int k = 0; k < 15; ++k) {
        const float middle = 0.5f * (NON_LINEAR[k] + NON_LINEAR[k + 1]);  // exact; a tie goes up
        found = select(less(x, broadcast(middle)), found, broadcast(values[k + 1]));
    }
    return found;
}

inline Vector16 nearest_entry_index(Vector16 x) {
    constexpr float indices[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return nearest_entry(x, indices);
}

// The scale of IQ4_NL and IQ4_XS with weights x^2; codes follow once it is rounded.
Vector16 make_non_linear_scale(const Unit<32>& unit) {
    const Largest largest = largest_of(unit);
    const auto sums_for = [&](Vector16 inverse) {
        Sums sums = {zeros(), zeros()};
        for (int i = 0; i < 32; ++i) {
            const Vector16 x = unit.weight(i);
            const Vector16 value = nearest_entry(multiply(inverse, x), NON_LINEAR);
            const Vector16 weighted = multiply(multiply(x, x), value);
            sums.xl = add(sums.xl, multiply(weighted, x));
            sums.l2 = add(sums.l2, multiply(weighted, value));
        }
        return sums;
    };
    const Vector16 first = divide(negate(largest.value), broadcast(NON_LINEAR[0]));
    const Sums start = sums_for(divide(broadcast(1.0f), first));
    Vector16 scale = select(less(zeros(), start.l2), divide(start.xl, start.l2), zeros());
    Vector16 best = multiply(scale, start.xl);
    for (int step = -7; step <= 7; ++step) {
        const Sums sums = sums_for(divide(broadcast(static_cast<float>(step) + NON_LINEAR[0]), largest.value));
        const Lanes better = is_better(sums, best);
        scale = select(better, divide(sums.xl, sums.l2), scale);
        best = select(better, multiply(scale, sums.xl), best);
    }
    return select(less(largest.magnitude, broadcast(TINY)), zeros(), scale);
}

}  // namespace
}  // namespace lowbit
