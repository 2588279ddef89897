// What the kernels of the AMX library share: those on tiles (linear_amx.cpp) and those of one token (linear_amx_once.cpp),
// which have the same bits.
#pragma once

#include <type_traits>

#include "amx_tiles.h"
#include "linear_kernels.h"

#if defined(LOWBIT_AMX)

namespace lowbit {

// Tile instructions make no subnormal numbers, and nor does what stands beside them. They take those they are given as zeros:
// ``inputs`` does too. Only bfloat16 weights are such numbers, and small e4m3 scales are read by way of them.
class FlushSubnormals {
  public:
    explicit FlushSubnormals(bool inputs) : before_(_mm_getcsr()) {
        _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | (inputs ? _MM_DENORMALS_ZERO_ON : 0u));
    }
    ~FlushSubnormals() { _mm_setcsr(before_); }
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

  private:
    const unsigned before_;
};

// How far ahead of what is decoded weights are asked for: one token gets 8 % more from memory that way, and 18 % more from
// the last cache, on an Intel Xeon (Emerald Rapids).
constexpr std::int64_t FETCHED_BYTES_AHEAD = 4096;
template <std::int64_t BYTES>
INLINE void fetch_lines(const std::uint8_t* from) {
    for (std::int64_t at = 0; at < BYTES; at += TILE_LINE) _mm_prefetch(reinterpret_cast<const char*>(from) + at, _MM_HINT_T0);
}

// Some lines of columns.
struct Chunk {
    std::int64_t line;  // the first
    std::int64_t span;  // the first of the spans of sums, one for each B
    int slots;
    std::int64_t asked_lines = 0;  // of the weight that follows, which each B's products ask for
};

inline const std::uint8_t* line_of(const Input& x, std::int64_t line, int token) {
    return x.values + (line * x.tokens + token) * TILE_LINE;
}

// with(codes) of what meets x that has scales of its own; else null.
template <typename With>
BlocksFunction of_scaled_codes(Codes codes, const With& with) {
    switch (codes) {
        case Codes::bits4: return with(std::integral_constant<Codes, Codes::bits4>());
        case Codes::bits6: return with(std::integral_constant<Codes, Codes::bits6>());
        case Codes::int8: return with(std::integral_constant<Codes, Codes::int8>());
        case Codes::e4m3: return with(std::integral_constant<Codes, Codes::e4m3>());
        case Codes::e5m2: return with(std::integral_constant<Codes, Codes::e5m2>());
        default: return nullptr;
    }
}

// exact_tiles and scaled_tiles for one token.
BlocksFunction exact_once(const Layout& layout);
BlocksFunction scaled_once(const Layout& layout);

}  // namespace lowbit

#endif
