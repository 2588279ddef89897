// One emulated AMX instruction at a time, for test_amx.py; compiled together with csrc/amx_tiles.cpp.
#include "amx_tiles.h"

using namespace lowbit;

// c (rows, 16) += a (rows, 64 bytes) times b (16, 64 bytes).
extern "C" void dot(int bytes, int rows, const void* a, const void* b, void* c) {
    configure_tiles(rows);
    tile_load<0>(c, TILE_LINE);
    tile_load<4>(a, TILE_LINE);
    tile_load<6>(b, TILE_LINE);
    bytes ? tile_dot_bytes<0, 4, 6>() : tile_dot_bfloats<0, 4, 6>();
    tile_store<0>(c, TILE_LINE);
    release_tiles();
}

extern "C" void without_configuration() { tile_zero<0>(); }

extern "C" void after_release() {
    configure_tiles(16);
    release_tiles();
    tile_zero<0>();
}

extern "C" void too_many_rows() { configure_tiles(17); }

extern "C" void unlike_rows() {
    configure_tiles(5);
    tile_dot_bytes<0, 6, 7>();
}

extern "C" void same_tile() {
    configure_tiles(16);
    tile_dot_bfloats<0, 4, 4>();
}
