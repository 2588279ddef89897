// A block's rows as numbers of 16 bits, scales and offsets in them, for prompts' tokens: bfloat16s, operands of AMX tiles
// (linear_amx_panels.cpp) or of vdpbf16ps, one for each 32 columns. Without BF16 they are whole numbers of 12 bits, and x
// ones of 14, whose sums of 128 columns are exact in 32 bits; 16 scales, one a row, stand before each 128 columns. Of
// random numbers that loses less than bfloat16 does, and of 128 with one much larger than the others about as much.
#pragma once

#include "linear_kernels.h"

#if defined(__AVX2__)

namespace lowbit {

constexpr std::int64_t PANEL_TILE = ROWS * COLUMNS * 2;  // bytes

constexpr int LARGEST_OF_PANEL = (1 << 11) - 1;
static_assert(static_cast<std::int64_t>(LARGEST_PANEL_INPUT) * LARGEST_OF_PANEL * WORD_PANEL_COLUMNS < std::int64_t{1} << 31);

#if defined(__AVX512BF16__)

class PanelNumbers {
  public:
    explicit PanelNumbers(std::uint8_t* panel) : at_(panel) {}

    template <class Pair>
    INLINE void put(const Pair& pair) {
        each_constant<PAIRS>([&](auto number) __attribute__((always_inline)) {
            Sixteen even, odd;
            pair(number, even, odd);
            const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
            _mm512_storeu_si512(at_ + decltype(number)::value * 64, _mm512_permutexvar_epi16(in_turns_, both));
        });
        at_ += PANEL_TILE;
    }

  private:
    static __m512i words_in_turns() {
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(ROWS)), 16));
    }
    std::uint8_t* at_;
    const __m512i in_turns_ = words_in_turns();
};

#else

// Quotients of 16 numbers; 0 where the divisor is so small that what it scales is as good as zero.
INLINE Sixteen quotients(Sixteen of, Sixteen divisor) {
    const float least = std::numeric_limits<float>::min();
#if defined(LOWBIT_AVX512)
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(divisor, sixteen_set(least), _CMP_NLT_UQ), of, divisor);
#else
    const auto quotient = [&](__m256 part, __m256 by) {
        return _mm256_and_ps(_mm256_cmp_ps(by, _mm256_set1_ps(least), _CMP_NLT_UQ), _mm256_div_ps(part, by));
    };
    return {quotient(of.low, divisor.low), quotient(of.high, divisor.high)};
#endif
}

// Two columns of 16 rows as whole numbers, ties to even: a row's two side by side.
INLINE void store_word_pairs(std::uint8_t* to, Sixteen even, Sixteen odd) {
#if defined(LOWBIT_AVX512)
    const __m512i upper = _mm512_slli_epi32(_mm512_cvtps_epi32(odd), 16);
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_cvtps_epi32(even), upper));
#else
    const auto both = [](__m256 first, __m256 second) {
        return _mm256_blend_epi16(_mm256_cvtps_epi32(first), _mm256_slli_epi32(_mm256_cvtps_epi32(second), 16), 0xAA);
    };
    auto* const halves = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(halves, both(even.low, odd.low));
    _mm256_storeu_si256(halves + 1, both(even.high, odd.high));
#endif
}

// 128 columns wait as floats until their largest ones are known.
class PanelNumbers {
  public:
    explicit PanelNumbers(std::uint8_t* panel) : at_(panel) {}
    PanelNumbers(const PanelNumbers&) = delete;
    PanelNumbers& operator=(const PanelNumbers&) = delete;
    ~PanelNumbers() {
        if (tiles_ > 0) write();
    }

    template <class Pair>
    INLINE void put(const Pair& pair) {
        float(*const to)[2][ROWS] = waiting_[tiles_];
        each_constant<PAIRS>([&](auto number) __attribute__((always_inline)) {
            Sixteen both[2];
            pair(number, both[0], both[1]);
            for (int i = 0; i < 2; ++i) {
                sixteen_store(to[decltype(number)::value][i], both[i]);
                most_ = sixteen_larger(most_, both[i]);
            }
        });
        if (++tiles_ == WORD_PANEL_COLUMNS / COLUMNS) write();
    }

  private:
    void write() {
        const Sixteen scale = quotients(most_, sixteen_set(LARGEST_OF_PANEL)), inverse = quotients(sixteen_set(1.0f), scale);
        sixteen_store(reinterpret_cast<float*>(at_), scale);
        at_ += sizeof(float) * ROWS;
        for (int tile = 0; tile < tiles_; ++tile, at_ += PANEL_TILE) {
            UNROLL
            for (int pair = 0; pair < PAIRS; ++pair) {
                const auto scaled = [&](int i) __attribute__((always_inline)) {
                    return sixteen_multiply(sixteen_load(waiting_[tile][pair][i]), inverse);
                };
                store_word_pairs(at_ + pair * 64, scaled(0), scaled(1));
            }
        }
        tiles_ = 0;
        most_ = sixteen_zeros();
    }

    std::uint8_t* at_;
    int tiles_ = 0;
    Sixteen most_ = sixteen_zeros();  // of each row, without its sign; NaN where there is one
    alignas(64) float waiting_[WORD_PANEL_COLUMNS / COLUMNS][PAIRS][2][ROWS];
};

#endif

// Of 16 rows the number in a lane's lower half and the one in its upper half.
INLINE void floats_of_words(SixteenInts both, Sixteen& lower, Sixteen& upper) {
#if defined(LOWBIT_AVX512)
    lower = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(both, 16), 16));
    upper = _mm512_cvtepi32_ps(_mm512_srai_epi32(both, 16));
#else
    const auto floats = [](__m256i words) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 16)); };
    lower = {floats(_mm256_slli_epi32(both.low, 16)), floats(_mm256_slli_epi32(both.high, 16))};
    upper = {floats(both.low), floats(both.high)};
#endif
}

// The numbers of a panel, tile by tile: put(pair), where pair(number) says those of its even column and of its odd one, in
// float32.
class PanelWriter : public PanelNumbers {
  public:
    using PanelNumbers::PanelNumbers;

    // The next tile from whole numbers of 16 bits, each row's times its scale. in_rows(numbers): their lanes in order of rows.
    template <class OfLane>
    INLINE void put_words(const WordTile& w, Sixteen scale, const OfLane& in_rows) {
        put([&](auto number, Sixteen& even, Sixteen& odd) __attribute__((always_inline)) {
            floats_of_words(in_rows(w[decltype(number)::value]), even, odd);
            even = sixteen_multiply(even, scale);
            odd = sixteen_multiply(odd, scale);
        });
    }
    // Inlined, this is most of what rounding takes to compile; only AVX-512 may have the tile in registers.
#if defined(LOWBIT_AVX512)
    INLINE
#else
    __attribute__((noinline))
#endif
    void put_words(const WordTile& w, Sixteen scale) {
        put_words(w, scale, [](SixteenInts both) __attribute__((always_inline)) { return both; });
    }
};

template <Addend ADDEND>
INLINE Sixteen weight_of(Sixteen number, Sixteen scale, Sixteen addend) {
    if constexpr (ADDEND == Addend::offset) return sixteen_fma(scale, number, addend);
    if constexpr (ADDEND == Addend::zero) return sixteen_multiply(scale, sixteen_add(number, addend));
    return sixteen_multiply(scale, number);
}

// Of codes that are whole numbers of 16 bits. Null where there is none. linear_words.cpp
RoundFunction rounded_words(const Layout& layout, const WordCodes& codes);
RoundFunction rounded_vectors(const Layout& layout);      // linear_vectors.cpp
RoundFunction rounded_row_vectors(const Layout& layout);  // linear_row_vectors.cpp
RoundFunction rounded_trellis(const Layout& layout);      // linear_trellis.cpp

constexpr int WRITTEN_AT_A_TIME = 4;  // tokens whose results are written between products

// Panels of whole numbers: some columns for all tokens, and then the next, so that a core's first cache holds their numbers.
// Step multiplies some tokens with up to WORD_PANEL_COLUMNS columns of two panels.
template <class Step>
void multiply_word_panels(const std::uint8_t* const* panels, int blocks, const RoundedInput& x, int tokens, std::int64_t lines,
                          bool goes_on, Unwritten& unwritten, float (*totals)[ROUNDED_TOKENS][ROWS]) {
    constexpr std::int64_t GROUP = WORD_PANEL_LINES, OF_TILE = ROUNDED_TOKENS / 2;
    const std::uint8_t* both[2] = {panels[0], panels[blocks - 1]};
    alignas(64) float unwanted[ROUNDED_TOKENS][ROWS];
    for (std::int64_t line = 0; line < lines; line += GROUP) {
        const std::int64_t count = std::min(GROUP, lines - line);
        for (int tile = 0; tile * OF_TILE < tokens; ++tile) {
            const std::int64_t begin = tile * OF_TILE;
            float(*const to[2])[ROWS] = {totals[0] + begin, blocks > 1 ? totals[1] + begin : unwanted};
            const float* const scales = x.scales[tile] + line / GROUP * x.tokens[tile];
            for_tokens(static_cast<int>(std::min(tokens - begin, OF_TILE)),
                       Step{both, x.tiles[tile] + line * x.line_bytes[tile], scales, x.line_bytes[tile], count, !goes_on && line == 0, to});
            for (int token = 0; token < WRITTEN_AT_A_TIME && unwritten.left > 0; ++token) unwritten.write_one();
        }
        for (const std::uint8_t*& panel : both) panel += WORD_PANEL_SCALES + count * PANEL_TILE;
    }
    unwritten.write_all();
}

// Sums of such columns on top of the totals of some tokens. ``first``: these are the first columns.
template <int TOKENS>
INLINE void add_panel_sums(const std::uint8_t* panel, const SixteenInts (&sums)[TOKENS], const float* x_scales, bool first, float (*totals)[ROWS]) {
    const Sixteen scale = sixteen_load(reinterpret_cast<const float*>(panel));
    UNROLL
    for (int t = 0; t < TOKENS; ++t) {
        const Sixteen total = first ? sixteen_zeros() : sixteen_load(totals[t]);
        const Sixteen both = sixteen_multiply(scale, sixteen_set(x_scales[t]));
        sixteen_store(totals[t], sixteen_fma(both, ints_to_floats(sums[t]), total));
    }
}

}  // namespace lowbit

#endif
