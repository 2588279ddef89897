// What this machine can do at most: how fast all threads read memory, and the rate of each kind of dot product.
// Benchmarks set their figures beside these; the caller takes the time. Nothing of a model uses them.
#include <cstdint>
#include <cstring>
#include <vector>

#include "amx_tiles.h"
#include "lowbit.h"
#include "thread_pool.h"
#include "vector16.h"

namespace lowbit {
namespace {

#if defined(__AVX512F__)
using Words = __m512i;
inline Words no_words() { return _mm512_setzero_si512(); }
inline Words add_words(Words sum, const std::uint8_t* from) {
    return _mm512_add_epi64(sum, _mm512_loadu_si512(from));
}
constexpr int ACCUMULATORS = 16;
#elif defined(__ARM_NEON)
using Words = uint64x2_t;
inline Words no_words() { return vdupq_n_u64(0); }
inline Words add_words(Words sum, const std::uint8_t* from) {
    return vaddq_u64(sum, vreinterpretq_u64_u8(vld1q_u8(from)));
}
constexpr int ACCUMULATORS = 16;
#else
using Words = __m256i;
inline Words no_words() { return _mm256_setzero_si256(); }
inline Words add_words(Words sum, const std::uint8_t* from) {
    return _mm256_add_epi64(sum, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
constexpr int ACCUMULATORS = 12;
#endif
constexpr std::int64_t STREAM = 8 * static_cast<std::int64_t>(sizeof(Words));

// The wrapping sum of the 64-bit words of ``bytes`` bytes, a multiple of STREAM.
std::uint64_t read(const std::uint8_t* data, std::int64_t bytes) {
    Words sums[8];
    UNROLL for (Words& sum : sums) sum = no_words();
    for (std::int64_t at = 0; at < bytes; at += STREAM) {
        UNROLL for (int i = 0; i < 8; ++i) {
            sums[i] = add_words(sums[i], data + at + i * static_cast<std::int64_t>(sizeof(Words)));
        }
    }
    std::uint64_t words[sizeof sums / 8], total = 0;
    std::memcpy(words, sums, sizeof sums);
    for (const std::uint64_t word : words) total += word;
    return total;
}

enum class Dot : std::int32_t { fma = 0, bf16 = 1, int8 = 2, tile_bf16 = 3, tile_int8 = 4 };

// What one thread does: multiply-adds in all, and what the first lanes have come to.
struct Work {
    std::int64_t multiply_adds;
    double sum;
};

// Hides a register's value from the compiler, which would otherwise take the product out of the loop.
template <class Register>
inline void hide(Register& x) {
#if defined(__ARM_NEON)
    asm volatile("" : "+w"(x));
#elif defined(LOWBIT_EMULATED_AVX512)
    asm volatile("" : "+m"(x));
#else
    asm volatile("" : "+x"(x));
#endif
}

#if defined(__AVX512F__)
constexpr int FLOATS = 16;
inline double first(__m512 x) { return static_cast<double>(_mm512_cvtss_f32(x)); }
inline double first(__m512i x) { return _mm_cvtsi128_si32(_mm512_castsi512_si128(x)); }
#elif defined(__ARM_NEON)
constexpr int FLOATS = 4;
inline double first(float32x4_t x) { return static_cast<double>(vgetq_lane_f32(x, 0)); }
inline double first(int32x4_t x) { return vgetq_lane_s32(x, 0); }
#else
constexpr int FLOATS = 8;
inline double first(__m256 x) { return static_cast<double>(_mm256_cvtss_f32(x)); }
inline double first(__m256i x) { return _mm_cvtsi128_si32(_mm256_castsi256_si128(x)); }
#endif

// ``step(accumulator, a, b)`` on independent accumulators; all numbers are one, so that every lane counts.
template <class Sum, class Operand, class Step>
Work in_registers(std::int64_t rounds, int depth, Sum zero, Operand a, Operand b, const Step& step) {
    Sum sums[ACCUMULATORS];
    UNROLL for (Sum& sum : sums) {
        sum = zero;
        hide(sum);  // or equal sums would be computed once
    }
    for (std::int64_t round = 0; round < rounds; ++round) {
        hide(a);
        UNROLL for (Sum& sum : sums) sum = step(sum, a, b);
    }
    double total = 0;
    for (const Sum& sum : sums) total += first(sum);
    return {rounds * ACCUMULATORS * FLOATS * depth, total};
}

Work fma_work(std::int64_t rounds) {
#if defined(__AVX512F__)
    const __m512 one = _mm512_set1_ps(1.0f);
    return in_registers(rounds, 1, _mm512_setzero_ps(), one, one,
                        [](__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); });
#elif defined(__ARM_NEON)
    const float32x4_t one = vdupq_n_f32(1.0f);
    return in_registers(rounds, 1, vdupq_n_f32(0.0f), one, one,
                        [](float32x4_t sum, float32x4_t a, float32x4_t b) { return vfmaq_f32(sum, a, b); });
#else
    const __m256 one = _mm256_set1_ps(1.0f);
    return in_registers(rounds, 1, _mm256_setzero_ps(), one, one,
                        [](__m256 sum, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, sum); });
#endif
}

Work bf16_work(std::int64_t rounds) {
#if defined(__AVX512BF16__)
    const __m512i ones = _mm512_set1_epi16(0x3F80);
    return in_registers(rounds, 2, _mm512_setzero_ps(), ones, ones, [](__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    });
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    uint16x8_t words = vdupq_n_u16(0x3F80);
    hide(words);  // GCC 12 makes float16 of a constant of bfloat16
    const bfloat16x8_t ones = vreinterpretq_bf16_u16(words);
    return in_registers(rounds, 2, vdupq_n_f32(0.0f), ones, ones, [](float32x4_t sum, bfloat16x8_t a, bfloat16x8_t b) {
        return vbfdotq_f32(sum, a, b);
    });
#else
    (void)rounds;
    return {0, 0};
#endif
}

Work int8_work(std::int64_t rounds) {
#if defined(__AVX512VNNI__)
    const __m512i ones = _mm512_set1_epi8(1);
    return in_registers(rounds, 4, _mm512_setzero_si512(), ones, ones, [](__m512i sum, __m512i a, __m512i b) {
#if defined(LOWBIT_EMULATED_AVX512)
        return _mm512_dpbusd_epi32(sum, a, b);
#else
        // GCC 12 copies the sums of its own function at every turn, which took an Intel core as long again.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
#endif
    });
#elif defined(__ARM_NEON)
    const int8x16_t ones = vdupq_n_s8(1);
    return in_registers(rounds, 4, vdupq_n_s32(0), ones, ones,
                        [](int32x4_t sum, int8x16_t a, int8x16_t b) { return vdotq_s32(sum, a, b); });
#else
    const __m256i ones = _mm256_set1_epi8(1);
    return in_registers(rounds, 4, _mm256_setzero_si256(), ones, ones, [](__m256i sum, __m256i a, __m256i b) {
        __m256i pairs = _mm256_maddubs_epi16(a, b);
        hide(pairs);  // each accumulator has a product of its own
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    });
#endif
}

#if defined(LOWBIT_AMX)
// Four accumulator tiles of 16 x 16, two tiles of 16 rows by 64 bytes on each side.
Work tile_work(std::int64_t rounds, bool bf16) {
    alignas(64) std::uint16_t ones[16 * 32];
    for (std::uint16_t& one : ones) one = bf16 ? 0x3F80 : 0x0101;
    configure_tiles(TILE_ROWS);
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    tile_load<4>(ones, TILE_LINE);
    tile_load<5>(ones, TILE_LINE);
    tile_load<6>(ones, TILE_LINE);
    tile_load<7>(ones, TILE_LINE);
    if (bf16) {
        for (std::int64_t round = 0; round < rounds; ++round) {
            tile_dot_bfloats<0, 4, 6>();
            tile_dot_bfloats<1, 4, 7>();
            tile_dot_bfloats<2, 5, 6>();
            tile_dot_bfloats<3, 5, 7>();
        }
    } else {
        for (std::int64_t round = 0; round < rounds; ++round) {
            tile_dot_bytes<0, 4, 6>();
            tile_dot_bytes<1, 4, 7>();
            tile_dot_bytes<2, 5, 6>();
            tile_dot_bytes<3, 5, 7>();
        }
    }
    alignas(64) std::int32_t results[4][16 * 16];
    tile_store<0>(results[0], TILE_LINE);
    tile_store<1>(results[1], TILE_LINE);
    tile_store<2>(results[2], TILE_LINE);
    tile_store<3>(results[3], TILE_LINE);
    release_tiles();
    double total = 0;
    for (const auto& result : results) {
        float number;
        std::memcpy(&number, result, sizeof number);
        total += bf16 ? static_cast<double>(number) : static_cast<double>(result[0]);
    }
    return {rounds * 4 * 16 * 16 * (bf16 ? 32 : 64), total};
}
#else
Work tile_work(std::int64_t, bool) { return {0, 0}; }
#endif

Work work(Dot kind, std::int64_t rounds) {
    switch (kind) {
        case Dot::fma: return fma_work(rounds);
        case Dot::bf16: return bf16_work(rounds);
        case Dot::int8: return int8_work(rounds);
        case Dot::tile_bf16: return tile_work(rounds, true);
        case Dot::tile_int8: return tile_work(rounds, false);
    }
    return {0, 0};
}

}  // namespace
}  // namespace lowbit

// Reads ``bytes`` bytes ``turns`` times with all threads, each a sequential part of its own: the wrapping sum of
// the 64-bit words of one turn. ``bytes`` is cut to a multiple of 512 for each part.
LOWBIT_EXPORT std::uint64_t lowbit_probe_read(const std::uint8_t* data, std::int64_t bytes, std::int64_t turns) {
    const std::int64_t parts = lowbit::thread_count();
    const std::int64_t each = bytes / parts / 512 * 512;
    std::vector<std::uint64_t> sums(static_cast<std::size_t>(parts));
    lowbit::parallel_for(parts, [&](std::int64_t part) {
        for (std::int64_t turn = 0; turn < turns; ++turn) {
            const std::uint8_t* from = data + part * each;
            asm volatile("" : "+r"(from) : : "memory");  // every turn reads
            sums[static_cast<std::size_t>(part)] = lowbit::read(from, each);
        }
    });
    std::uint64_t total = 0;
    for (const std::uint64_t sum : sums) total += sum;
    return total;
}

// ``rounds`` rounds of dot products of ones in the registers of every thread. Returns the multiply-adds done, 0
// where this library has no such instruction; ``sum`` becomes the total of all first lanes.
LOWBIT_EXPORT std::int64_t lowbit_probe_dot(std::int32_t kind, std::int64_t rounds, double* sum) {
    const std::int64_t parts = lowbit::thread_count();
    std::vector<lowbit::Work> done(static_cast<std::size_t>(parts));
    lowbit::parallel_for(parts, [&](std::int64_t part) {
        done[static_cast<std::size_t>(part)] = lowbit::work(static_cast<lowbit::Dot>(kind), rounds);
    });
    std::int64_t total = 0;
    *sum = 0;
    for (const lowbit::Work& part : done) {
        total += part.multiply_adds;
        *sum += part.sum;
    }
    return total;
}
