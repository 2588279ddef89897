// Rotating one row of a layer's input or output. rotation.cpp
#pragma once

#include <cstdint>

struct lowbit_rotation;

namespace lowbit {

// x (width,) -> out (width,), which may be x; width is a multiple of the rotation's size. std::bad_alloc where a
// matrix finds no memory for a block in between.
void rotate_row(const lowbit_rotation& rotation, const float* x, std::int64_t width, float* out);

}  // namespace lowbit
