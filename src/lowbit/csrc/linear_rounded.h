// A block's rows as bfloat16 numbers, scales and offsets in them, for prompts' tokens (linear_amx_panels.cpp): operands
// of AMX tiles, one for each 32 columns.
#pragma once

#include "linear_kernels.h"

#if defined(__AVX512BF16__)

namespace lowbit {

constexpr std::int64_t PANEL_TILE = ROWS * COLUMNS * 2;  // bytes

class PanelWriter {
  public:
    explicit PanelWriter(std::uint8_t* panel) : at_(panel) {}

    // The next tile from pair(number): the numbers of its even column and of its odd one, in float32.
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

  private:
    static __m512i words_in_turns() {
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(ROWS)), 16));
    }
    std::uint8_t* at_;
    const __m512i in_turns_ = words_in_turns();
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
