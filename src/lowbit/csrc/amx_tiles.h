// AMX tiles: eight registers of up to 16 rows of 64 bytes, of which each thread has its own.
//
// Where LOWBIT_EMULATE_AMX is defined they are plain memory and the instructions follow the pseudocode of Intel's
// manual (amx_tiles.cpp); a use the processor would fault ends the program. One shape serves all kernels: C, the
// sums, in registers 0 to 3 and A, the tokens, in 4 and 5 have as many rows as there are tokens; B, the weight,
// in 6 and 7 has 16. Row k of B holds what a 32-bit lane of A's column k meets, a lane for each column of C.
#pragma once

namespace lowbit {

#if defined(LOWBIT_AMX)

constexpr int TILE_ROWS = 16;
constexpr int TILE_LINE = 64;  // bytes of a row

// C and A get ``rows`` rows (1 to 16). All tiles are cleared where the shape changes. What is configured is
// remembered: nothing else may configure or release tiles.
void configure_tiles(int rows);
int configured_tiles();  // the rows, or 0

// Before a thread waits or returns to its caller: what tiles hold would be saved with the thread, and a child
// process has none.
void release_tiles();

#else

inline void release_tiles() {}

#endif

// Releases them when it goes, also where memory runs out.
struct TilesReleased {
    TilesReleased() = default;
    ~TilesReleased() { release_tiles(); }
    TilesReleased(const TilesReleased&) = delete;
    TilesReleased& operator=(const TilesReleased&) = delete;
};

}  // namespace lowbit

#if defined(LOWBIT_AMX) && !defined(LOWBIT_EMULATE_AMX)

// The instructions themselves: the tile's number is part of them and may then be a template's, and unlike GCC's
// intrinsics a load here says that it reads memory.
namespace lowbit {

template <int TILE>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int TILE>
inline void tile_load(const void* from, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
// The same of what is read once: it takes no room in the first cache.
template <int TILE>
inline void tile_load_once(const void* from, long stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
// Between tile instructions: where somebody else has the core's other half, a third of their time is saved by it (Emerald
// Rapids; docs/performance.md), and nothing lost where not.
inline void tile_pause() { asm volatile("nop; nop; nop; nop; nop; nop; nop; nop"); }
template <int TILE>
inline void tile_store(void* to, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}
// C += A times B: float32 += pairs of bfloat16.
template <int C, int A, int B>
inline void tile_dot_bfloats() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// C += A times B: int32 += fours of signed bytes times unsigned ones.
template <int C, int A, int B>
inline void tile_dot_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace lowbit

#elif defined(LOWBIT_AMX)

namespace lowbit {
namespace emulated {

void zero(int tile);
void load(int tile, const void* from, long stride);
void store(int tile, void* to, long stride);
void dot_bfloats(int c, int a, int b);
void dot_bytes(int c, int a, int b);

}  // namespace emulated

template <int TILE>
inline void tile_zero() {
    emulated::zero(TILE);
}
template <int TILE>
inline void tile_load(const void* from, long stride) {
    emulated::load(TILE, from, stride);
}
template <int TILE>
inline void tile_load_once(const void* from, long stride) {
    emulated::load(TILE, from, stride);
}
inline void tile_pause() {}
template <int TILE>
inline void tile_store(void* to, long stride) {
    emulated::store(TILE, to, stride);
}
template <int C, int A, int B>
inline void tile_dot_bfloats() {
    emulated::dot_bfloats(C, A, B);
}
template <int C, int A, int B>
inline void tile_dot_bytes() {
    emulated::dot_bytes(C, A, B);
}

}  // namespace lowbit

#endif
