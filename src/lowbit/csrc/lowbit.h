// The C ABI every native function has: plain pointers and numbers, no exceptions across it.
#pragma once

#define LOWBIT_EXPORT extern "C" __attribute__((visibility("default")))
