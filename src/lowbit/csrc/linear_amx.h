// What the kernels of the AMX library share: those on tiles (linear_amx.cpp) and those of one token (linear_amx_once.cpp),
// which have the same bits.
#pragma once

#include "linear_kernels.h"

#if defined(LOWBIT_AMX)

namespace lowbit {

// Tile instructions take subnormal numbers as zeros and make none; so does what stands beside them.
class FlushSubnormals {
  public:
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
    ~FlushSubnormals() { _mm_setcsr(before_); }
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

  private:
    const unsigned before_;
};

// exact_tiles and scaled_tiles for one token.
BlocksFunction exact_once(const Layout& layout);
BlocksFunction scaled_once(const Layout& layout);

}  // namespace lowbit

#endif
