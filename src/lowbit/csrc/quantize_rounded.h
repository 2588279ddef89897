// GGUF types whose scale follows from the largest weight of a block, without a search.
//
// One block at a time; results are those of ggml's plain C. Where 1 / scale would be infinite (weights below
// 1e-37, whose float16 scale is zero anyway) it counts as zero, as for a scale of zero.
#pragma once

#include "vector16.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "quantize_bytes.h"

namespace lowbit {
namespace {

template <int N>
float largest_magnitude(const float* x) {
    Vector16 largest = zeros();
    for (int i = 0; i < N; i += LANES) {
        const Vector16 part = load(x + i);
        largest = maximum(largest, maximum(part, subtract(zeros(), part)));
    }
    return reduce_max(largest);
}

inline float inverse_of(float scale) {
    const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
    return std::isinf(inverse) ? 0.0f : inverse;
}

inline int round_half_away(float x) {
    const float magnitude = std::fabs(x);
    int whole = static_cast<int>(magnitude);
    whole += magnitude - static_cast<float>(whole) >= 0.5f ? 1 : 0;
    return x < 0 ? -whole : whole;
}

void pack_fifth_bits(const std::uint8_t* codes, std::uint8_t* packed) {
    std::uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<std::uint32_t>(codes[i] >> 4) << i;
    std::memcpy(packed, &bits, sizeof bits);
}

// Q4_0 (half 8) and Q5_0 (half 16): the largest weight, with its sign, becomes code 0, which is -half.
void encode_symmetric(const float* x, int half, std::uint8_t* block) {
    const float magnitude = largest_magnitude<32>(x);
    float largest = 0;
    for (int i = 31; i >= 0; --i) largest = std::fabs(x[i]) == magnitude ? x[i] : largest;  // the first one
    const float scale = largest / static_cast<float>(-half);
    const float inverse = inverse_of(scale), middle = static_cast<float>(half) + 0.5f;
    std::uint8_t codes[32];
    for (int i = 0; i < 32; ++i) {
        codes[i] = static_cast<std::uint8_t>(std::min(2 * half - 1, static_cast<int>(x[i] * inverse + middle)));
    }
    put_half(block, float_to_half(scale));
    if (half == 16) pack_fifth_bits(codes, block + 2);
    pack_nibbles(codes, 16, block + (half == 16 ? 6 : 2));
}

// Q4_1 (levels 15) and Q5_1 (levels 31).
void encode_with_minimum(const float* x, int levels, std::uint8_t* block) {
    const Vector16 first = load(x), second = load(x + LANES);
    const float high = reduce_max(maximum(first, second));
    const float lowest = -reduce_max(subtract(zeros(), minimum(first, second)));
    float low = 0;
    for (int i = 31; i >= 0; --i) low = x[i] == lowest ? x[i] : low;  // the first one: 0 has two signs
    const float scale = (high - low + 0.0f) / static_cast<float>(levels), inverse = inverse_of(scale);
    std::uint8_t codes[32];
    for (int i = 0; i < 32; ++i) {
        codes[i] = static_cast<std::uint8_t>(std::min(levels, static_cast<int>((x[i] - low) * inverse + 0.5f)));
    }
    put_half(block, float_to_half(scale));
    put_half(block + 2, float_to_half(low));
    if (levels == 31) pack_fifth_bits(codes, block + 4);
    pack_nibbles(codes, 16, block + (levels == 31 ? 8 : 4));
}

void encode_q8_0(const float* x, std::uint8_t* block) {
    const float scale = largest_magnitude<32>(x) / 127.0f, inverse = inverse_of(scale);
    put_half(block, float_to_half(scale));
    for (int i = 0; i < 32; ++i) block[2 + i] = static_cast<std::uint8_t>(round_half_away(x[i] * inverse));
}

void encode_q1_0(const float* x, std::uint8_t* block) {
    float sum = 0;
    for (int i = 0; i < 128; ++i) sum += std::fabs(x[i]);
    put_half(block, float_to_half(sum / 128.0f));
    for (int byte = 0; byte < 16; ++byte) {
        unsigned bits = 0;
        for (unsigned i = 0; i < 8; ++i) bits |= (x[8 * byte + static_cast<int>(i)] >= 0 ? 1u : 0u) << i;
        block[2 + byte] = static_cast<std::uint8_t>(bits);
    }
}

std::uint16_t make_trits(const float* x, std::uint8_t* trits) {  // returns the float16 scale
    const float scale = largest_magnitude<256>(x), inverse = inverse_of(scale);
    for (int i = 0; i < 256; ++i) trits[i] = static_cast<std::uint8_t>(round_half_away(x[i] * inverse) + 1);
    return float_to_half(scale);
}

void encode_tq1_0(const float* x, std::uint8_t* block) {
    std::uint8_t trits[256];
    put_half(block + 52, make_trits(x, trits));
    // ``count`` bytes of five trits (the last four bytes: four, then a zero), the first most significant; a byte
    // is the fraction of 243 in 256ths, rounded up.
    const auto pack = [&](int first, int count, int trits_each, std::uint8_t* to) {
        for (int m = 0; m < count; ++m) {
            unsigned sum = 0;
            for (int n = 0; n < 5; ++n) sum = 3 * sum + (n < trits_each ? trits[first + m + n * count] : 0u);
            to[m] = static_cast<std::uint8_t>((sum * 256 + 242) / 243);
        }
    };
    pack(0, 32, 5, block);
    pack(160, 16, 5, block + 32);
    pack(240, 4, 4, block + 48);
}

void encode_tq2_0(const float* x, std::uint8_t* block) {
    std::uint8_t trits[256];
    put_half(block + 64, make_trits(x, trits));
    pack_two_bits(trits, block);
}

// ---- Four-bit floats with a small scale ----

constexpr float DOUBLED_E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The e2m1 code whose value times ``scale`` (which is half of what it says) is nearest; the first of equals.
template <int N>
void nearest_e2m1(const float* x, float scale, std::uint8_t* codes) {
    float best[N];
    std::int32_t found[N] = {};
    for (int i = 0; i < N; ++i) best[i] = std::fabs(0.0f - x[i]);
    for (int code = 1; code < 16; ++code) {
        const float value = DOUBLED_E2M1[code] * scale;
        for (int i = 0; i < N; ++i) {
            const float error = std::fabs(value - x[i]);
            found[i] = error < best[i] ? code : found[i];
            best[i] = error < best[i] ? error : best[i];
        }
    }
    for (int i = 0; i < N; ++i) codes[i] = static_cast<std::uint8_t>(found[i]);
}

void encode_mxfp4(const float* x, std::uint8_t* block) {
    const float largest = largest_magnitude<32>(x);
    // log2 rounded to float before the floor, as log2f gives it: just below a power of two it may round up. Below 2^-125
    // ggml's byte wraps around: 255, which is no number, for what begins there, and codes of 0 for all that is smaller.
    const int exponent =
        largest > 0 ? static_cast<int>(std::floor(static_cast<float>(std::log2(double{largest})))) + 125 : 0;
    block[0] = static_cast<std::uint8_t>(std::max(exponent, 0));
    const std::uint32_t bits = block[0] < 2 ? 0x200000u << block[0] : (block[0] - 1u) << 23;  // 2^(e - 128)
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    std::uint8_t codes[32];
    nearest_e2m1<32>(x, scale, codes);
    pack_nibbles(codes, 16, block + 1);
}

// To e4m3 without a sign, halves up. From 256 on everything is 448: ggml takes that exponent as too large.
std::uint8_t to_ue4m3(float x) {
    if (!(x > 0)) return 0;
    if (x < 0x1p-6f) return static_cast<std::uint8_t>(std::min(7, static_cast<int>(x * 512.0f + 0.5f)));
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t code = (((bits >> 19) + 1) >> 1) - ((127 - 7) << 3);  // exponent, three bits of fraction
    return static_cast<std::uint8_t>(code < 0x78 ? code : 0x7E);
}

float half_of_ue4m3(std::uint8_t code) {
    const int exponent = code >> 3;
    const float fraction = static_cast<float>(code & 7);
    return exponent == 0 ? fraction * 0x1p-10f : std::ldexp(1.0f + fraction / 8.0f, exponent - 8);
}

void encode_nvfp4(const float* x, std::uint8_t* block) {
    for (int sub = 0; sub < 4; ++sub, x += 16) {
        block[sub] = to_ue4m3(largest_magnitude<16>(x) / 6.0f);
        std::uint8_t codes[16];
        nearest_e2m1<16>(x, half_of_ue4m3(block[sub]), codes);
        pack_nibbles(codes, 8, block + 4 + 8 * sub);
    }
}

}  // namespace
}  // namespace lowbit
