// The largest number of each row and where it is: what greedy sampling and the check for NaN need of logits.

#include <cstdint>
#include <limits>

#include "lowbit.h"
#include "row_tasks.h"
#include "sampling.h"
#include "vector16.h"

namespace lowbit {
namespace {

constexpr int LARGEST_WIDTH = 1 << 24;  // places are counted in float32

struct Peak {
    float value;
    std::int64_t place;
};

// Of equal numbers the first; NaN where the row holds one.
Peak peak(const float* row, int width) {
    float counted[LANES];
    for (int lane = 0; lane < LANES; ++lane) counted[lane] = static_cast<float>(lane);
    const Vector16 lanes_before = broadcast(static_cast<float>(LANES));
    Vector16 best = broadcast(MINUS_INFINITY), place = load(counted), here = place;
    Lanes numbers = lane_range(0, LANES);
    for_vectors(width, [&](int column, int lanes) {
        Vector16 value = load_some(row + column, lanes);
        numbers = both(numbers, equal(value, value));
        if (lanes < LANES) value = select(lane_range(0, lanes), value, broadcast(MINUS_INFINITY));
        const Lanes larger = less(best, value);
        best = select(larger, value, best);
        place = select(larger, here, place);
        here = add(here, lanes_before);
    });
    float values[LANES], places[LANES], whole[LANES];
    store(values, best);
    store(places, place);
    store(whole, select(numbers, broadcast(1.0f), zeros()));
    Peak found{values[0], static_cast<std::int64_t>(places[0])};
    bool all = true;
    for (int lane = 0; lane < LANES; ++lane) {
        const auto at = static_cast<std::int64_t>(places[lane]);
        if (values[lane] > found.value || (values[lane] == found.value && at < found.place)) found = {values[lane], at};
        all = all && whole[lane] == 1.0f;
    }
    if (!all) found.value = std::numeric_limits<float>::quiet_NaN();
    return found;
}

}  // namespace
}  // namespace lowbit

LOWBIT_EXPORT int lowbit_row_peaks(const float* x, std::int64_t x_stride, std::int64_t rows, std::int64_t width,
                                   float* values, std::int64_t* places) {
    using namespace lowbit;
    if (width < 1 || width > LARGEST_WIDTH) return 1;
    for_rows(rows, width, [&](std::int64_t row) {
        const Peak found = peak(x + row * x_stride, static_cast<int>(width));
        values[row] = found.value;
        places[row] = found.place;
    });
    return 0;
}
