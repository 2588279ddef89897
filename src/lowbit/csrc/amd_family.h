// Which of AMD's processors this is, where they differ in what is faster: those that multiply bfloat16.
#pragma once

#if defined(__AVX512BF16__)

#include <cpuid.h>

namespace lowbit {

constexpr unsigned ZEN5 = 26;
// Of the processor at hand; 0: it is no AMD's.
inline unsigned amd_family() {
#if defined(LOWBIT_EMULATED_AVX512)
    return ZEN5;  // which has use for all kernels
#else
    static const unsigned family = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (__get_cpuid(0, &a, &b, &c, &d) == 0 || b != signature_AMD_ebx || d != signature_AMD_edx) return 0u;
        if (__get_cpuid(1, &a, &b, &c, &d) == 0) return 0u;
        return (a >> 8 & 15) == 15 ? 15 + (a >> 20 & 255) : a >> 8 & 15;
    }();
    return family;
#endif
}

}  // namespace lowbit

#endif
