// Codes nearest to x / scale: what quantizing at load spends its time on, in one pass over the weights.
//
// Three kinds of number formats: a sorted table (thresholds between neighbours; the caller has moved those
// whose tie goes up by one float, so that one comparison decides), e4m3, and integers. A scale of 0 gives the
// code of 0.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lowbit.h"
#include "thread_pool.h"

// What kernels/encode.py describes; field for field its ctypes struct.
struct lowbit_code_format {
    const float* thresholds;    // count - 1, ascending: the code of a value is codes[how many lie below it]
    const std::uint8_t* codes;  // count
    std::int32_t kind;          // enum Kind
    std::int32_t count;
    float low, high;            // integers: the smallest and largest
};

namespace lowbit {
namespace {

enum Kind : std::int32_t { TABLE = 0, E4M3 = 1, INTEGER = 2 };

constexpr std::int64_t TASK_WEIGHTS = 1 << 15;
constexpr int CHUNK = 64;

// Nearest even, saturating at 448; NaN stays NaN.
inline std::uint8_t e4m3(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t sign = bits >> 24 & 0x80, magnitude = bits & 0x7FFFFFFF;
    float absolute;
    std::memcpy(&absolute, &magnitude, sizeof absolute);
    const auto small = static_cast<std::uint32_t>(std::rint(std::min(absolute, 1.0F) * 512.0F));
    const std::uint32_t rounded = (magnitude + 0x7FFFF + (magnitude >> 20 & 1)) >> 20;
    const std::uint32_t normal = std::min<std::uint32_t>(rounded - (120U << 3), 0x7E);
    std::uint32_t code = absolute < 0.015625F ? small : normal;
    code = magnitude >= 0x43E00000 ? 0x7E : code;  // 448
    code = magnitude > 0x7F800000 ? 0x7F : code;
    return static_cast<std::uint8_t>(code | sign);
}

void encode_steps(const float* steps, std::int64_t count, const lowbit_code_format& format, std::uint8_t* out) {
    if (format.kind == E4M3) {
        for (std::int64_t i = 0; i < count; ++i) out[i] = e4m3(steps[i]);
        return;
    }
    if (format.kind == INTEGER) {
        for (std::int64_t i = 0; i < count; ++i) {
            const float nearest = std::min(std::max(std::rint(steps[i]), format.low), format.high);
            out[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(nearest - format.low));
        }
        return;
    }
    for (std::int64_t start = 0; start < count; start += CHUNK) {
        const auto lanes = static_cast<int>(std::min<std::int64_t>(CHUNK, count - start));
        float values[CHUNK] = {};
        std::int32_t below[CHUNK] = {};
        std::memcpy(values, steps + start, static_cast<std::size_t>(lanes) * sizeof(float));
        for (int level = 0; level + 1 < format.count; ++level) {
            const float threshold = format.thresholds[level];
            for (int lane = 0; lane < CHUNK; ++lane) below[lane] += values[lane] > threshold ? 1 : 0;
        }
        for (int lane = 0; lane < lanes; ++lane) out[start + lane] = format.codes[below[lane]];
    }
}

}  // namespace
}  // namespace lowbit

// x: (rows, columns) with `stride` floats from row to row; scales: (rows, groups), one for `group` columns;
// out: (rows, columns).
LOWBIT_EXPORT void lowbit_encode(const float* x, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                                 const float* scales, std::int64_t group, const lowbit_code_format* format,
                                 std::uint8_t* out) {
    using namespace lowbit;
    const std::int64_t groups = (columns + group - 1) / group;
    const std::int64_t together = std::max<std::int64_t>(TASK_WEIGHTS / std::max<std::int64_t>(columns, 1), 1);
    parallel_for((rows + together - 1) / together, [&](std::int64_t task) {
        constexpr std::int64_t AT_ONCE = 1024;
        float steps[AT_ONCE];
        for (std::int64_t row = task * together; row < std::min((task + 1) * together, rows); ++row) {
            for (std::int64_t number = 0; number < groups; ++number) {
                const float scale = scales[row * groups + number];
                const std::int64_t end = std::min((number + 1) * group, columns);
                for (std::int64_t at = number * group; at < end; at += AT_ONCE) {
                    const std::int64_t count = std::min(AT_ONCE, end - at);
                    const float* from = x + row * stride + at;
                    for (std::int64_t i = 0; i < count; ++i) steps[i] = scale == 0.0F ? 0.0F : from[i] / scale;
                    encode_steps(steps, count, *format, out + row * columns + at);
                }
            }
        }
    });
}
