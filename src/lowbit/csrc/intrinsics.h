// The processor's own functions and types, and a hint to loops that wait.
#pragma once

#if defined(__x86_64__)

// GCC 12's own AVX-512 header starts "undefined" registers as x = x and then warns about it (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#else

#include <arm_neon.h>

#endif

#include <cstdint>

// AVX-512 as the linear kernels need it, VNNI and VBMI (Intel since Ice Lake, AMD since Zen 4): 32 registers of 64 bytes,
// products of whole numbers, lookups of bytes. __AVX512BF16__ beside it: products of bfloat16 too.
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define LOWBIT_AVX512
#endif

// What holds 64 bytes in an asm statement: memory where tests emulate AVX-512 (tests/kernels/emulated_avx512.h).
#if defined(LOWBIT_EMULATED_AVX512)
#define ZMM "m"
#else
#define ZMM "v"
#endif

// Unrolls the loop that follows: what a variable indexes would not stay in registers.
#if defined(__clang__)
#define UNROLL _Pragma("unroll 16")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace lowbit {

// Some ten nanoseconds in a loop that waits. ISB, because YIELD does nothing on most ARM cores.
inline void spin_pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    asm volatile("isb" ::: "memory");
#endif
}

// float16: to nearest, ties to even.
inline std::uint16_t float_to_half(float value) {
#if defined(__x86_64__)
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(value))), 0);
#endif
}
inline float half_to_float(std::uint16_t bits) {
#if defined(__x86_64__)
    return _cvtsh_ss(bits);
#else
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
#endif
}

}  // namespace lowbit
