// Rotations of activations (QuIP, QuaRot, SpinQuant, FP-Quant, ParoQuant): a row in blocks, each times a square matrix.
//
// A Hadamard matrix of Sylvester's order 2^n is never multiplied with: the fast Walsh-Hadamard transform adds and
// subtracts pairs that lie 1, 2, 4, ... size / 2 apart, in this order, and divides by a number, mostly the root of the size. These
// are the operations of numerics/rotation.py in torch, each rounded once: the bits are the same on every
// instruction set. Any other matrix is a product in float32, summed over its rows in order by fma; so is the head of
// Hadamard matrices of orders that are no power of two (numerics/hadamard.py). Steps of Givens rotations are as in torch.

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "rotation.h"

#include "lowbit.h"
#include "operations.h"
#include "row_tasks.h"

namespace lowbit {
namespace {

// Of a block smaller than a vector.
void transform_near(float* block, std::int64_t size) {
    for (std::int64_t apart = 1; apart < size; apart *= 2) {
        for (std::int64_t first = 0; first < size; first += 2 * apart) {
            for (std::int64_t i = first; i < first + apart; ++i) {
                const float a = block[i], b = block[i + apart];
                block[i] = a + b;
                block[i + apart] = a - b;
            }
        }
    }
}

// Pairs less than COUNT vectors apart, of as many: from register to register.
template <int COUNT>
void transform_vectors(float* block) {
    Vector16 x[COUNT];
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        x[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(block + i * LANES)))));
    }
    UNROLL
    for (int apart = 1; apart < COUNT; apart *= 2) {
        UNROLL
        for (int i = 0; i < COUNT; ++i) {
            if (i & apart) continue;
            const Vector16 a = x[i], b = x[i + apart];
            x[i] = add(a, b);
            x[i + apart] = subtract(a, b);
        }
    }
    UNROLL
    for (int i = 0; i < COUNT; ++i) store(block + i * LANES, x[i]);
}

void transform(float* block, std::int64_t size) {
    constexpr std::int64_t MOST = 8 * LANES;
    if (size < LANES) return transform_near(block, size);
    for (std::int64_t first = 0; first < size; first += MOST) {
        if (size == LANES) transform_vectors<1>(block);
        else if (size == 2 * LANES) transform_vectors<2>(block);
        else if (size == 4 * LANES) transform_vectors<4>(block);
        else transform_vectors<8>(block + first);
    }
    for (std::int64_t apart = MOST; apart < size; apart *= 2) {
        for (std::int64_t first = 0; first < size; first += 2 * apart) {
            for (std::int64_t i = first; i < first + apart; i += LANES) {
                const Vector16 a = load(block + i), b = load(block + i + apart);
                store(block + i, add(a, b));
                store(block + i + apart, subtract(a, b));
            }
        }
    }
}

// Without what comes after. ``first``: where the block's own signs begin.
void transform_by_signs(const lowbit_rotation& rotation, const float* x, std::int64_t first, float* out) {
    const std::int64_t size = rotation.size;
    if (rotation.before != nullptr) {
        for (std::int64_t i = 0; i < size; ++i) out[i] = x[i] * rotation.before[first + i];
    } else if (out != x) {
        std::memcpy(out, x, static_cast<std::size_t>(size) * sizeof(float));
    }
    transform(out, size);
    for (std::int64_t i = 0; i < size; ++i) out[i] = out[i] / rotation.divisor;
}

void rotate_by_signs(const lowbit_rotation& rotation, const float* x, std::int64_t first, float* out) {
    const std::int64_t size = rotation.size;
    transform_by_signs(rotation, x, first, out);
    if (rotation.after != nullptr) {
        for (std::int64_t i = 0; i < size; ++i) out[i] = out[i] * rotation.after[first + i];
    }
}

// x must not be out.
void rotate_by_matrix(const lowbit_rotation& rotation, const float* x, float* out) {
    const std::int64_t size = rotation.size;
    std::int64_t column = 0;
    for (; column + 4 * LANES <= size; column += 4 * LANES) {
        Vector16 sums[4] = {zeros(), zeros(), zeros(), zeros()};
        for (std::int64_t row = 0; row < size; ++row) {
            const float* const from = rotation.matrix + row * size + column;
            const Vector16 value = broadcast(x[row]);
            for (int part = 0; part < 4; ++part) sums[part] = fma(value, load(from + part * LANES), sums[part]);
        }
        for (int part = 0; part < 4; ++part) store(out + column + part * LANES, sums[part]);
    }
    for (; column < size; column += LANES) {
        const int lanes = static_cast<int>(std::min<std::int64_t>(LANES, size - column));
        Vector16 sum = zeros();
        for (std::int64_t row = 0; row < size; ++row) {
            sum = fma(broadcast(x[row]), load_some(rotation.matrix + row * size + column, lanes), sum);
        }
        store_some(out + column, sum, lanes);
    }
}

// Every block a sum of all blocks. x must not be out.
void mix_blocks(const lowbit_rotation& rotation, const float* x, float* out) {
    constexpr int TOGETHER = 4;
    const std::int64_t size = rotation.size, count = rotation.head;
    for (std::int64_t at = 0; at < size; at += LANES) {
        const int lanes = static_cast<int>(std::min<std::int64_t>(LANES, size - at));
        for (std::int64_t block = 0; block < count; block += TOGETHER) {
            const float* const from = rotation.matrix + block * count;
            Vector16 sums[TOGETHER] = {zeros(), zeros(), zeros(), zeros()};
            for (std::int64_t other = 0; other < count; ++other) {
                const float* const place = x + other * size + at;
                const Vector16 values = lanes == LANES ? load(place) : load_some(place, lanes);
                for (int i = 0; i < TOGETHER; ++i) sums[i] = fma(broadcast(from[i * count + other]), values, sums[i]);
            }
            for (int i = 0; i < TOGETHER; ++i) store_some(out + (block + i) * size + at, sums[i], lanes);
        }
    }
}

void rotate_with_head(const lowbit_rotation& rotation, const float* x, float* out) {
    const std::int64_t size = rotation.size, width = rotation.head * size;
    thread_local std::vector<float> kept;
    kept.resize(static_cast<std::size_t>(width));
    for (std::int64_t first = 0; first < width; first += size) {
        transform_by_signs(rotation, x + first, rotation.wide ? first : 0, kept.data() + first);
    }
    mix_blocks(rotation, kept.data(), out);
    if (rotation.after == nullptr) return;
    for (std::int64_t i = 0; i < width; ++i) out[i] = out[i] * rotation.after[rotation.wide ? i : i % size];
}

// Givens rotations of pairs of columns. x may be out.
void rotate_by_pairs(const lowbit_rotation& rotation, const float* x, std::int64_t width, float* out) {
    thread_local std::vector<float> kept;
    kept.resize(static_cast<std::size_t>(width));
    // Steps go from one of the two to the other, so that the last one ends in out.
    float* from = rotation.steps % 2 == 0 ? out : kept.data();
    float* to = rotation.steps % 2 == 0 ? kept.data() : out;
    for (std::int64_t i = 0; i < width; ++i) from[i] = rotation.before == nullptr ? x[i] : x[i] * rotation.before[i];
    for (std::int64_t step = 0; step < rotation.steps; ++step) {
        const std::int32_t* const partners = rotation.partners + step * width;
        const float* const cosines = rotation.cosines + step * width;
        const float* const sines = rotation.sines + step * width;
        for (std::int64_t i = 0; i < width; ++i) to[i] = from[i] * cosines[i] + from[partners[i]] * sines[i];
        std::swap(from, to);
    }
    if (rotation.after == nullptr) return;
    for (std::int64_t i = 0; i < width; ++i) out[i] = out[i] * rotation.after[i];
}

}  // namespace

void rotate_row(const lowbit_rotation& rotation, const float* x, std::int64_t width, float* out) {
    const std::int64_t size = rotation.size;
    if (rotation.steps != 0) return rotate_by_pairs(rotation, x, width, out);
    if (rotation.head != 0) return rotate_with_head(rotation, x, out);
    if (rotation.matrix == nullptr) {
        for (std::int64_t first = 0; first < width; first += size) {
            rotate_by_signs(rotation, x + first, rotation.wide ? first : 0, out + first);
        }
        return;
    }
    thread_local std::vector<float> kept;
    if (x == out) kept.resize(static_cast<std::size_t>(size));
    for (std::int64_t first = 0; first < width; first += size) {
        const float* from = x + first;
        if (x == out) {
            std::memcpy(kept.data(), from, static_cast<std::size_t>(size) * sizeof(float));
            from = kept.data();
        }
        rotate_by_matrix(rotation, from, out + first);
    }
}

}  // namespace lowbit

// x (rows, width) -> out (rows, width), strides in floats between rows; out may be x. 0, or 1 where memory ran out.
LOWBIT_EXPORT int lowbit_rotate(const lowbit_rotation* rotation, const float* x, std::int64_t x_stride,
                                std::int64_t rows, std::int64_t width, float* out, std::int64_t out_stride) {
    using namespace lowbit;
    try {
        // A row's cost is its width times the additions for each of its numbers.
        const std::int64_t sums = rotation->head != 0 ? rotation->head : rotation->size;
        const std::int64_t each = rotation->steps != 0 ? 2 * rotation->steps : rotation->matrix == nullptr ? 8 : sums;
        for_rows(rows, width * each, [&](std::int64_t row) {
            rotate_row(*rotation, x + row * x_stride, width, out + row * out_stride);
        });
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
