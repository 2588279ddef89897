// A block's rows as numbers of 16 bits, scales and offsets in them, for prompts' tokens: bfloat16s, operands of AMX tiles
// (linear_amx_panels.cpp) or of vdpbf16ps, one for each 32 columns. Without BF16 they are whole numbers of 12 bits, and x
// ones of 14, whose sums of 128 columns are exact in 32 bits; 16 scales, one a row, stand before each 128 columns. Of
// random numbers that loses less than bfloat16 does, and of 128 with one much larger than the others about as much.
#pragma once

#include "linear_kernels.h"

#if defined(LOWBIT_AVX512)

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
        const __m512i size = _mm512_set1_epi32(0x7fffffff);
        float(*const to)[2][ROWS] = waiting_[tiles_];
        each_constant<PAIRS>([&](auto number) __attribute__((always_inline)) {
            Sixteen both[2];
            pair(number, both[0], both[1]);
            for (int i = 0; i < 2; ++i) {
                sixteen_store(to[decltype(number)::value][i], both[i]);
                // As bits, of which NaN's are the largest.
                most_ = _mm512_max_epi32(most_, _mm512_and_si512(_mm512_castps_si512(both[i]), size));
            }
        });
        if (++tiles_ == WORD_PANEL_COLUMNS / COLUMNS) write();
    }

  private:
    void write() {
        const Sixteen most = _mm512_castsi512_ps(most_), least = sixteen_set(std::numeric_limits<float>::min());
        const Sixteen scale = _mm512_div_ps(most, sixteen_set(LARGEST_OF_PANEL));
        const __mmask16 scaled = _mm512_cmp_ps_mask(scale, least, _CMP_NLT_UQ);  // else all are as good as zero
        const Sixteen inverse = _mm512_maskz_div_ps(scaled, sixteen_set(1.0f), scale);
        sixteen_store(reinterpret_cast<float*>(at_), scale);
        at_ += sizeof(float) * ROWS;
        for (int tile = 0; tile < tiles_; ++tile, at_ += PANEL_TILE) {
            UNROLL
            for (int pair = 0; pair < PAIRS; ++pair) {
                const auto whole = [&](int i) __attribute__((always_inline)) {
                    return _mm512_cvtps_epi32(sixteen_multiply(sixteen_load(waiting_[tile][pair][i]), inverse));
                };
                const __m512i both = _mm512_mask_blend_epi16(0xAAAAAAAAu, whole(0), _mm512_slli_epi32(whole(1), 16));
                _mm512_storeu_si512(at_ + pair * 64, both);
            }
        }
        tiles_ = 0;
        most_ = _mm512_setzero_si512();
    }

    std::uint8_t* at_;
    int tiles_ = 0;
    __m512i most_ = _mm512_setzero_si512();
    alignas(64) float waiting_[WORD_PANEL_COLUMNS / COLUMNS][PAIRS][2][ROWS];
};

#endif

// The numbers of a panel, tile by tile: put(pair), where pair(number) says those of its even column and of its odd one, in
// float32.
class PanelWriter : public PanelNumbers {
  public:
    using PanelNumbers::PanelNumbers;

    // The next tile from whole numbers of 16 bits, each row's times its scale. in_rows(register): its lanes in order of rows.
    template <class OfLane>
    INLINE void put_words(const __m512i (&w)[PAIRS], Sixteen scale, const OfLane& in_rows) {
        put([&](auto number, Sixteen& even, Sixteen& odd) __attribute__((always_inline)) {
            const __m512i both = in_rows(w[decltype(number)::value]);
            even = sixteen_multiply(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(both, 16), 16)), scale);
            odd = sixteen_multiply(_mm512_cvtepi32_ps(_mm512_srai_epi32(both, 16)), scale);
        });
    }
    INLINE void put_words(const __m512i (&w)[PAIRS], Sixteen scale) {
        put_words(w, scale, [](__m512i both) __attribute__((always_inline)) { return both; });
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

}  // namespace lowbit

#endif
