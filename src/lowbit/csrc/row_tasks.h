// Sharing the rows of a matrix over the threads, and walking a row sixteen floats at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "thread_pool.h"
#include "vector16.h"

namespace lowbit {

constexpr std::int64_t TASK_FLOATS = 1 << 14;  // less is not worth waking a thread

// Calls row(index) for every row, several rows a task.
template <class Row>
void for_rows(std::int64_t rows, std::int64_t width, const Row& row) {
    const std::int64_t together = std::max<std::int64_t>(TASK_FLOATS / std::max<std::int64_t>(width, 1), 1);
    const std::int64_t tasks = (rows + together - 1) / together;
    const auto task = [&](std::int64_t index) {
        const std::int64_t end = std::min((index + 1) * together, rows);
        for (std::int64_t here = index * together; here < end; ++here) row(here);
    };
    if (tasks == 1) {
        task(0);
    } else {
        parallel_for(tasks, task);
    }
}

// body(column, lanes) over a row's vectors; the last may have fewer than 16 lanes.
template <class Body>
inline void for_vectors(int width, const Body& body) {
    int column = 0;
    for (; column + LANES <= width; column += LANES) body(column, LANES);
    if (column < width) body(column, width - column);
}

inline Vector16 load_some(const float* from, int lanes) {
    return lanes == LANES ? load(from) : load_lanes(from, lanes);
}

inline void store_some(float* to, Vector16 x, int lanes) {
    if (lanes == LANES) {
        store(to, x);
    } else {
        store_lanes(to, x, lanes);
    }
}

// value * scale * factor + bias, in this order and with these roundings; what is null is left out. ``scale`` and ``bias``
// are those of the lanes, ``factor`` is the row's.
inline Vector16 affine(Vector16 value, const float* scale, const float* factor, const float* bias, int lanes) {
    if (scale != nullptr) value = multiply(value, load_some(scale, lanes));
    if (factor != nullptr) value = multiply(value, broadcast(*factor));
    if (bias != nullptr) value = add(value, load_some(bias, lanes));
    return value;
}

// Column ``column`` of what may be null.
inline const float* at_column(const float* row, std::int64_t column) { return row == nullptr ? nullptr : row + column; }

}  // namespace lowbit
