// One token's products, with the bits that AMX tiles give them and without tiles.
//
// A tile instruction takes as long for one row of A as for eight, and what it is given has to go through memory; one
// token is done sooner where codes are decoded. The order is the instruction's: a tile's even and odd columns are summed
// apart, each ascending from zero, then together, then added to what the group had; subnormal numbers are zeros. A product
// of two bfloat16 is exact in float32, so whether it is rounded before it is added makes no difference.
#include "linear_amx.h"

#if defined(LOWBIT_AMX)

#include <vector>

namespace lowbit {
namespace {

// What is summed at once: half a tile or a tile under scales of their own, or tiles to the end of a group.
enum class Sum { half, tile, group };

template <Codes CODES, int PARTS>
INLINE void sum_tile(const std::uint8_t* codes, const Table& table, const ByteTables<CODES>& bytes, const float* x,
                     Sixteen (&sums)[PARTS]) {
    CodeLines<CODES, reads_in_order(CODES)> lines[1];
    read_lines([&](int) { return codes; }, table, lines);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    Sixteen even[PARTS], odd[PARTS];
    UNROLL
    for (int part = 0; part < PARTS; ++part) even[part] = odd[part] = sixteen_zeros();
    each_constant<PAIRS / 4>([&](auto quad) __attribute__((always_inline)) {
        constexpr int QUAD = decltype(quad)::value;
        __m512i w[4];
        decode_quad<CODES, QUAD>(lines[0], table, bytes, w);
        UNROLL
        for (int i = 0; i < 4; ++i) {
            constexpr int PART = QUAD * PARTS * 4 / PAIRS;
            const float* const at = x + (QUAD * 4 + i) * 2;
            const Sixteen lower = _mm512_castsi512_ps(_mm512_slli_epi32(w[i], 16));
            const Sixteen higher = _mm512_castsi512_ps(_mm512_and_si512(w[i], upper));
            even[PART] = sixteen_fma(lower, sixteen_set(at[0]), even[PART]);
            odd[PART] = sixteen_fma(higher, sixteen_set(at[1]), odd[PART]);
        }
    });
    UNROLL
    for (int part = 0; part < PARTS; ++part) sums[part] = sixteen_add(even[part], odd[part]);
}

template <Codes CODES, Sum SUM, Addend ADDEND, bool SCALED, bool X_SCALED>
__attribute__((noinline)) void multiply_block(const Layout& layout, const std::uint8_t* block, const Decoding& decoding,
                                              const Input& x, const float* values, float* total_of_rows) {
    constexpr int PARTS = SUM == Sum::half ? 2 : 1;
    const ByteTables<CODES> bytes(decoding.table);
    Walk walk(layout, block);
    Sixteen total = sixteen_load(total_of_rows);
    const auto add = [&](Sixteen sum, int part, std::int64_t span) __attribute__((always_inline)) {
        if constexpr (!SCALED) {
            total = sixteen_add(total, sum);
            return;
        }
        const Sixteen x_sum = sixteen_set(ADDEND == Addend::none ? 0.0f : x.sums[span]);
        if constexpr (ADDEND == Addend::zero) sum = sixteen_fma(walk.addend[part], x_sum, sum);
        Sixteen scale = walk.scale[part];
        if constexpr (X_SCALED) scale = sixteen_multiply(scale, sixteen_set(x.scales[span]));
        total = sixteen_fma(scale, sum, total);
        if constexpr (ADDEND == Addend::offset) total = sixteen_fma(walk.addend[part], x_sum, total);
    };
    const auto next = [&]() __attribute__((always_inline)) {
        const std::uint8_t* const codes = walk.template next<CODES, COLUMNS / PARTS, ADDEND>();
        fetch_lines<tile_bytes(CODES) + TILE_LINE>(codes + FETCHED_BYTES_AHEAD);  // with its scales
        return codes;
    };
    Sixteen sums[PARTS];
    if constexpr (SUM != Sum::group) {
        for (std::int64_t tile = 0; tile < layout.tiles; ++tile) {
            sum_tile<CODES>(next(), decoding.table, bytes, values + tile * COLUMNS, sums);
            UNROLL
            for (int part = 0; part < PARTS; ++part) add(sums[part], part, tile * PARTS + part);
        }
    } else {
        const std::int64_t together = SCALED ? layout.unit / COLUMNS : layout.tiles;
        std::int64_t tile = 0;
        for (std::int64_t group = 0; tile < layout.tiles; ++group) {
            Sixteen sum = sixteen_zeros();
            for (const std::int64_t last = tile + together; tile < last; ++tile) {
                sum_tile<CODES>(next(), decoding.table, bytes, values + tile * COLUMNS, sums);
                sum = sixteen_add(sum, sums[0]);
            }
            add(sum, 0, group);
        }
    }
    sixteen_store(total_of_rows, total);
}

template <Codes CODES, Sum SUM, Addend ADDEND, bool SCALED = true, bool X_SCALED = false>
void multiply_once(const Layout& layout, const std::uint8_t* first, int blocks, const Decoding& decoding, const Input& x,
                   float (*totals)[TOKEN_TILE][ROWS]) {
    static thread_local std::vector<float> values;
    const std::int64_t columns = layout.tiles * COLUMNS;
    if (static_cast<std::int64_t>(values.size()) < columns) values.resize(static_cast<std::size_t>(columns));
    for (std::int64_t column = 0; column < columns; column += ROWS) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.values + 2 * column));
        sixteen_store(values.data() + column, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
    }
    const FlushSubnormals flush(CODES == Codes::bf16);
    for (int block = 0; block < blocks; ++block) {
        multiply_block<CODES, SUM, ADDEND, SCALED, X_SCALED>(layout, first + block * layout.block_bytes, decoding, x,
                                                             values.data(), totals[block][0]);
    }
}

template <Codes CODES, Addend ADDEND>
BlocksFunction by_sum(const Layout& layout) {
    if (summed_columns(layout) > COLUMNS) return multiply_once<CODES, Sum::group, ADDEND>;
    return layout.sub == COLUMNS / 2 ? multiply_once<CODES, Sum::half, ADDEND> : multiply_once<CODES, Sum::tile, ADDEND>;
}

template <Codes CODES>
BlocksFunction by_addend(const Layout& layout) {
    switch (layout.addend) {
        case Addend::none: return by_sum<CODES, Addend::none>(layout);
        case Addend::offset: return by_sum<CODES, Addend::offset>(layout);
        case Addend::zero: return by_sum<CODES, Addend::zero>(layout);
    }
    return nullptr;
}

}  // namespace

BlocksFunction exact_once(const Layout& layout) {
    return of_exact_codes<BlocksFunction>(layout.codes, [&](auto codes) -> BlocksFunction {
        constexpr Codes CODES = decltype(codes)::value;
        if constexpr (CODES == Codes::bf16) {
            return multiply_once<CODES, Sum::group, Addend::none, false>;
        } else if constexpr (has_addends(CODES)) {
            return by_addend<CODES>(layout);
        } else {
            return layout.addend == Addend::none ? by_sum<CODES, Addend::none>(layout) : nullptr;
        }
    });
}

BlocksFunction scaled_once(const Layout& layout) {
    return of_scaled_codes(layout.codes, [&](auto codes) -> BlocksFunction {
        constexpr Codes CODES = decltype(codes)::value;
        return layout.sub == COLUMNS / 2 ? multiply_once<CODES, Sum::half, Addend::none, true, true>
                                         : multiply_once<CODES, Sum::tile, Addend::none, true, true>;
    });
}

}  // namespace lowbit

#endif
