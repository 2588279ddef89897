// Paged attention on a CPU: attend over the pages that attention_write.cpp fills. See attention_cache.h for
// their layout and attention_tiles.h for why results do not depend on what is computed together. What is computed,
// and when, attention_plan.cpp says.
//
// Query rows of one K/V head are (token, query head of the group), token after token; a block is up to
// BLOCK_ROWS of them. A block runs over its segments and merges them as it goes.
//
// A segment may also be computed before, as a part, and stored unmerged; the block then takes it from there,
// in its turn: the same functions in the same order, so the same bits. That is done
//   - where several sequences of a decode batch begin a segment with the same pages (a prefix they share):
//     their rows are one part, which reads those pages once;
//   - where there are too few blocks to fill the threads (decode with a long context).
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

#include "attention_plan.h"
#include "attention_softmax.h"
#include "lowbit.h"
#include "operations.h"

namespace lowbit {
namespace {

constexpr int DIRECT_ROWS = 2 * SCORE_ROWS;  // so many rows decode narrow pages as they read them

// Work of one thread: lives on its stack.
template <class Key>
struct alignas(64) Scratch {
    float queries[BLOCK_ROWS * MAX_K_DIM];
    float scores[BLOCK_ROWS * SEGMENT_TOKENS];
    // No multiple of 4 KiB may lie between `scores` and `folded`: stores there would hold up loads here.
    float query_sums[BLOCK_ROWS * MAX_GROUPS], starts[BLOCK_ROWS];
    float folded[BLOCK_ROWS * SEGMENT_TOKENS];  // weights for values that have scales in groups
    TokenScales scales;
    float values[BLOCK_ROWS * MAX_V_DIM], next_values[BLOCK_ROWS * MAX_V_DIM];
    float maximum[STATE_ROWS], sum[STATE_ROWS], next_maximum[STATE_ROWS], next_sum[STATE_ROWS];
    Key turned[STRIP * SEGMENT_TOKENS];  // of a latent cache
    const Block* members[BLOCK_ROWS];

    States all() { return {maximum, sum, values}; }
    States next() { return {next_maximum, next_sum, next_values}; }
};

// Where a thread widens a segment's pages; grown and kept.
template <class Operand, bool KEYS>
Operand* widened_pages(std::size_t size) {
    static thread_local std::vector<Operand> buffer;
    if (buffer.size() < size) buffer.resize(size);
    return buffer.data();
}

// Key and Value: the operands K and V are, or are widened to. Of a latent cache they are the same.
template <class Key, class Value>
class Attention {
  public:
    Attention(const lowbit_attention_cache& cache, const lowbit_attention_batch& batch, const float* q,
              std::int64_t q_stride, int q_heads, const Softmax& softmax, const float* sinks, float* out)
        : cache_(cache),
          keys_(key_store(cache)),
          values_(value_store(cache)),
          plan_(cache, batch, q_heads / cache.heads),
          q_(q),
          q_stride_(q_stride),
          q_heads_(q_heads),
          group_(q_heads / cache.heads),
          softmax_(softmax),
          sinks_(sinks),
          out_(out) {}

    Status run() {
        const Status status = plan_.make();
        if (status != OK) return status;
        plan_.run_parts([&](const Part& part, const Part* next) { run_part(part, next); });
        plan_.run_blocks([&](const Block& block, const Block* next) { run_block(block, next); });
        return OK;
    }

  private:
    // Page `number` of the block's sequence, of its K/V head.
    static const std::uint8_t* stored_page(const Store& store, const Block& block, int number) {
        return store.page(block.pages[number], block.kv_head);
    }

    // The pages of a block's segment, to be fetched.
    Ahead ahead_of(const Store& store, const Block& block, int segment) const {
        Ahead ahead;
        const int first = plan_.first_seen(plan_.position(block, block.row_begin)) / PAGE_TOKENS;
        const int last = plan_.last_position(block) / PAGE_TOKENS;
        for (int page = 0; page < SEGMENT_PAGES; ++page) {
            const int number = std::min(std::max(segment * SEGMENT_PAGES + page, first), last);
            ahead.pages[page] = stored_page(store, block, number);
        }
        const int bytes = static_cast<int>(store.head_bytes());
        ahead.lines = bytes / CACHE_LINE + (bytes % CACHE_LINE == 0 ? 0 : 2);  // pages then begin anywhere
        return ahead;
    }

    // Pages first <= page < last of a segment as operands or as codes, by their place in it.
    template <bool KEYS, class Element>
    void operands(const Block& block, int segment, int first, int last, const Element** pages,
                  const Ahead& ahead) const {
        const Store& store = KEYS ? keys_ : values_;
        const std::size_t size = static_cast<std::size_t>(store.dim) * PAGE_TOKENS;
        Element* buffer = nullptr;
        if constexpr (!IS_CODE<Element>) {
            if (store.widened()) buffer = widened_pages<Element, KEYS>(size * SEGMENT_PAGES);
        }
        for (int page = first; page < last; ++page) {
            const int number = segment * SEGMENT_PAGES + page;
            const std::uint8_t* const stored = stored_page(store, block, number);
            if (buffer == nullptr) {
                pages[page] = reinterpret_cast<const Element*>(stored);
                continue;
            }
            if constexpr (!IS_CODE<Element>) {
                Element* const to = buffer + size * static_cast<std::size_t>(page);
                ahead.fetch_from(page, 0);
                widen<KEYS>(store, stored, to);
                pages[page] = to;
            }
        }
    }

    // Adds the scales of these pages.
    void find_scales(const Store& store, const Block& block, int segment, int first, int last,
                     Scales& scales) const {
        scales.group = store.group;
        scales.lows = store.format == Format::INT4 && store.group > 0;
        scales.format = store.format;
        for (int page = first; page < last; ++page) {
            scales.pages[page] = store.scales(stored_page(store, block, segment * SEGMENT_PAGES + page));
        }
    }

    // Calls with(an Element of the pages of `store`): what they are read as.
    template <class Operand, class With>
    static void as_elements([[maybe_unused]] const Store& store, [[maybe_unused]] bool direct,
                            const With& with) {
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<Operand, Bfloat>) {
            if (direct && store.narrow()) return store.format == Format::INT4 ? with(Code4{}) : with(Code8{});
        }
#endif
        with(Operand{});
    }

    // Calls each(row of the block, token, query head).
    template <class Each>
    void for_rows(const Block& block, const Each& each) const {
        std::int64_t token = block.first_token + block.row_begin / group_;
        int head = block.row_begin % group_;
        for (int row = 0; row < block.rows(); ++row) {
            each(row, token, block.kv_head * group_ + head);
            if (++head == group_) {
                head = 0;
                ++token;
            }
        }
    }

    // Of a block whose rows are the scratch's from `begin` on.
    void prepare_queries(const Block& block, int begin, Scratch<Key>& scratch) const {
        const int words = query_words<Key>(cache_.k_dim);
        for_rows(block, [&](int row, std::int64_t token, int head) {
            float* const to = scratch.queries + (begin + row) * words;
            prepare_query<Key>(q_ + token * q_stride_ + head * cache_.k_dim, cache_.k_dim, to);
            if (keys_.format == Format::INT4) {
                sum_query<Key>(to, cache_.k_dim, keys_.group,
                               scratch.query_sums + (begin + row) * MAX_GROUPS);
            }
        });
    }

    void run_part(const Part& part, const Part* next) const {
        Scratch<Key> scratch;
        int rows = 0;
        for (int member = 0; member < part.count; ++member) {
            const Block& block = plan_.member_of(part, member);
            scratch.members[member] = &block;
            prepare_queries(block, rows, scratch);
            rows += block.rows();
        }
        run_segment(scratch.members, part.count, part.segment, part.common,
                    next == nullptr ? nullptr : &plan_.member_of(*next, 0), next == nullptr ? 0 : next->segment,
                    scratch, plan_.stored_states(part.row));
    }

    void run_block(const Block& block, const Block* next) const {
        Scratch<Key> scratch;
        const States all = scratch.all(), one = scratch.next();
        const Block* const members[] = {&block};
        prepare_queries(block, 0, scratch);
        // Heads lie apart in q and out: the hardware does not fetch them.
        for_rows(block, [&](int, std::int64_t token, int head) {
            fetch_lines(out_row(token, head), cache_.v_dim);
        });
        if (next != nullptr) {
            for_rows(*next, [&](int, std::int64_t token, int head) {
                fetch_lines(q_ + token * q_stride_ + head * cache_.k_dim, cache_.k_dim);
            });
        }
        std::fill_n(all.sum, block.rows(), 0.0f);
        for (int segment = block.segment_begin; segment < block.segment_end; ++segment) {
            const std::int64_t row = plan_.stored_row(block, segment);
            if (row != NONE) {
                merge_segment(all, plan_.stored_states(row), block.rows(), cache_.v_dim);
                continue;
            }
            const bool more = segment + 1 < block.segment_end;
            const Block* const then = more ? &block : next;
            const bool first = segment == block.segment_begin;
            run_segment(members, 1, segment, SEGMENT_PAGES, then,
                        more ? segment + 1 : next == nullptr ? 0 : next->segment_begin, scratch,
                        first ? all : one);
            if (!first) merge_segment(all, one, block.rows(), cache_.v_dim);
        }
        for_rows(block, [&](int row, std::int64_t token, int head) {
            finish_row(all.maximum[row], all.sum[row], all.values + row * cache_.v_dim, cache_.v_dim,
                       sinks_ == nullptr ? nullptr : sinks_ + head,
                       out_row(token, head));
        });
    }

    float* out_row(std::int64_t token, int head) const {
        return out_ + (token * q_heads_ + head) * cache_.v_dim;
    }

    // Scores of rows begin <= row < end, which see tokens first[row] <= token < last[row] of the segment,
    // with its pages page_begin <= page < page_end.
    template <class Element>
    void score_rows(const Element* const* keys, const Scales& scales, int page_begin, int page_end, int begin,
                    int end, const int* first, const int* last, Scratch<Key>& scratch,
                    const Ahead& ahead) const {
        const int together = pages_at_once(std::min(end - begin, SCORE_ROWS));
        const int words = query_words<Key>(cache_.k_dim);
        const Ahead nothing{};
        int from = begin, to = begin;
        for (int page = page_begin; page < page_end; page += together) {
            const int count = std::min(together, page_end - page);
            while (from < end && last[from] <= page * PAGE_TOKENS) ++from;  // rows before these pages
            while (to < end && first[to] < (page + count) * PAGE_TOKENS) ++to;
            for (int row = from; row < to; row += SCORE_ROWS) {
                const bool fetch = row == from && ahead.lines > 0;
                const auto score = fetch || IS_CODE<Element> ? score_pages<Element, true>
                                                             : score_pages<Element, IS_CODE<Element>>;
                score({scratch.queries + row * words, scratch.query_sums + row * MAX_GROUPS},
                      std::min(SCORE_ROWS, to - row), keys + page, count, cache_.k_dim, scales,
                      scratch.scores + row * SEGMENT_TOKENS + page * PAGE_TOKENS, fetch ? ahead : nothing,
                      page);
            }
        }
    }

    // Dimensions dim_begin <= d < dim_end of these rows' weighted values, of pages that have `width`.
    template <class Element>
    void weigh_rows(const Element* const* values, int width, int dim_begin, int dim_end, const float* weights,
                    int begin, int end, const int* first, const int* last, float* out, const float* starts,
                    const Ahead& ahead) const {
        const Ahead nothing{};
        for (int row = begin; row < end; row += VALUE_ROWS) {
            const bool fetch = row == begin && ahead.lines > 0;
            const auto weigh = fetch || IS_CODE<Element> ? value_block<Element, true>
                                                         : value_block<Element, IS_CODE<Element>>;
            weigh(weights + row * SEGMENT_TOKENS, std::min(VALUE_ROWS, end - row), values, width,
                  values_.format, first + row, last + row, dim_begin, dim_end, out + row * cache_.v_dim,
                  cache_.v_dim, starts == nullptr ? nullptr : starts + row, fetch ? ahead : nothing);
        }
    }

    // Softmax states and weighted values of the members' rows over one segment, of which they have the first
    // `common` pages in common; sum 0 where a row sees none. `next`: the block that reads segment
    // next_segment after this, or null.
    void run_segment(const Block* const* members, int count, int segment, int common, const Block* next,
                     int next_segment, Scratch<Key>& scratch, const States& states) const {
        int first[BLOCK_ROWS], last[BLOCK_ROWS];  // tokens of the segment each row sees
        const int base = segment * SEGMENT_TOKENS;
        int rows = 0;
        for (int member = 0; member < count; ++member) {
            for_rows(*members[member], [&](int, std::int64_t token, int) {
                const Block& block = *members[member];
                const int here = block.first_position + static_cast<int>(token) - block.first_token;
                first[rows] = std::max(plan_.first_seen(here) - base, 0);
                last[rows] = std::min(here + 1 - base, SEGMENT_TOKENS);
                states.maximum[rows] = MINUS_INFINITY;
                states.sum[rows++] = 0.0f;
            });
        }
        // Rows that see any: of one block both ends ascend with the row; of several, all see the common
        // pages.
        int begin = 0, end = rows;
        while (begin < end && last[begin] <= 0) ++begin;
        while (begin < end && first[end - 1] >= SEGMENT_TOKENS) --end;
        if (begin >= end) return;
        const auto pages_of = [&](int row) { return (last[row] + PAGE_TOKENS - 1) / PAGE_TOKENS; };
        const int page_begin = first[begin] / PAGE_TOKENS;
        const int page_end = count == 1 ? pages_of(end - 1) : common;
        const Block& leader = *members[0];
        // Calls each(block, its rows) for the pages that a member has alone.
        const auto alone = [&](const auto& each) {
            int row = 0;
            for (int member = 0; count > 1 && common < SEGMENT_PAGES && member < count; ++member) {
                const int past = row + members[member]->rows();
                if (pages_of(past - 1) > common) each(*members[member], row, past);
                row = past;
            }
        };

        const Ahead nothing{}, own_values = cache_.latent ? nothing : ahead_of(values_, leader, segment);
        const Ahead next_keys = next == nullptr ? nothing : ahead_of(keys_, *next, next_segment);
        const Ahead& after_keys = cache_.latent ? next_keys : own_values;
        const bool direct = end - begin <= DIRECT_ROWS && !cache_.latent;
        const Key* keys[SEGMENT_PAGES];
        as_elements<Key>(keys_, direct, [&](auto element) {
            using Element = decltype(element);
            const Element* pages[SEGMENT_PAGES];
            Scales scales;
            const bool read = !keys_.widened() || IS_CODE<Element>;  // or widened: fetched before
            const auto score = [&](const Block& block, int from, int to, int row, int past,
                                   const Ahead& ahead) {
                operands<true>(block, segment, from, to, pages, ahead);
                find_scales(keys_, block, segment, from, to, scales);
                score_rows(pages, scales, from, to, row, past, first, last, scratch, read ? ahead : nothing);
            };
            score(leader, page_begin, page_end, begin, end, after_keys);
            if constexpr (std::is_same_v<Element, Key>) std::copy_n(pages, SEGMENT_PAGES, keys);
            alone([&](const Block& block, int row, int past) {
                score(block, common, pages_of(past - 1), row, past, nothing);
            });
        });

        const Store& weighed = cache_.latent ? keys_ : values_;
        constexpr bool ROUNDED = BFLOAT_PRODUCTS<Value>;
        constexpr Weights MULTIPLIED = ROUNDED ? Weights::PAIRS : Weights::FLOATS;
        const auto softmax = weighed.group == 0 ? softmax_segment<MULTIPLIED, ROUNDED>
                                                : softmax_segment<Weights::FLOATS, ROUNDED>;
        for (int row = begin; row < end; ++row) {
            softmax(scratch.scores + row * SEGMENT_TOKENS, first[row], last[row], softmax_,
                    states.maximum[row], states.sum[row]);
        }
        const int group = weighed.group > 0 ? weighed.group : cache_.v_dim;
        const auto fold = [&](int dimension, int row_begin, int row_end, float* folded) {
            Scales stored;
            TokenScales& scales = scratch.scales;
            for (int member = 0, row = 0; member < count; ++member) {
                const int past = row + members[member]->rows();
                const int from = std::max(row, row_begin), to = std::min(past, row_end);
                row = past;
                if (from >= to) continue;
                const int page_from = first[from] / PAGE_TOKENS, page_to = pages_of(to - 1);
                find_scales(weighed, *members[member], segment, page_from, page_to, stored);
                scales.load(stored, page_from, page_to, dimension);
                const auto fold_row =
                    stored.lows ? fold_scales<MULTIPLIED, true> : fold_scales<MULTIPLIED, false>;
                for (int which = from; which < to; ++which) {
                    const int at = which * SEGMENT_TOKENS;
                    scratch.starts[which] =
                        fold_row(scratch.scores + at, first[which], last[which], scales, folded + at);
                }
            }
        };
        if (weighed.group == 0) std::fill(scratch.starts + begin, scratch.starts + end, 0.0f);
        if (weighed.group > 0 && group >= cache_.v_dim) fold(0, begin, end, scratch.scores);
        // What rows weigh the values of a group of dimensions with.
        const auto weights_of = [&](int dimension, int row_begin, int row_end) -> const float* {
            if (group >= cache_.v_dim) return scratch.scores;
            fold(dimension, row_begin, row_end, scratch.folded);
            return scratch.folded;
        };

        if (!cache_.latent) {
            as_elements<Value>(values_, direct, [&](auto element) {
                using Element = decltype(element);
                const Element* pages[SEGMENT_PAGES];
                int whole_first[BLOCK_ROWS], whole_last[BLOCK_ROWS];
                const int whole = page_end * PAGE_TOKENS;
                for (int row = begin; row < end; ++row) whole_last[row] = std::min(last[row], whole);
                const bool read = !values_.widened() || IS_CODE<Element>;
                operands<false>(leader, segment, page_begin, page_end, pages, next_keys);
                for (int from = 0; from < cache_.v_dim; from += group) {
                    const int to = std::min(from + group, cache_.v_dim);
                    weigh_rows(pages, cache_.v_dim, from, to, weights_of(from, begin, end), begin, end,
                               first, whole_last, states.values, scratch.starts, read ? next_keys : nothing);
                }
                alone([&](const Block& block, int row, int past) {
                    operands<false>(block, segment, common, pages_of(past - 1), pages, nothing);
                    std::fill(whole_first + row, whole_first + past, whole);
                    for (int from = 0; from < cache_.v_dim; from += group) {
                        const int to = std::min(from + group, cache_.v_dim);
                        weigh_rows(pages, cache_.v_dim, from, to, weights_of(from, row, past), row, past,
                                   whole_first, last, states.values, nullptr, nothing);
                    }
                });
            });
            return;
        }
        if constexpr (std::is_same_v<Key, Value>) {
            const Value* values[SEGMENT_PAGES];
            for (int from = 0; from < cache_.v_dim; from += group) {
                const int to = std::min(from + group, cache_.v_dim);
                const float* const weights = weights_of(from, begin, end);
                for (int dimension = from; dimension < to; dimension += STRIP) {
                    const int width = std::min(STRIP, to - dimension);
                    for (int page = page_begin; page < page_end; ++page) {
                        Key* turned = scratch.turned + page * PAGE_TOKENS * width;
                        turn_keys(keys[page] + dimension * PAGE_TOKENS, width, turned);
                        values[page] = turned;
                    }
                    weigh_rows(values, width, 0, width, weights, begin, end, first, last,
                               states.values + dimension, scratch.starts, nothing);
                }
            }
        }
    }

    const lowbit_attention_cache& cache_;
    const Store keys_, values_;
    AttentionPlan plan_;
    const float* q_;
    std::int64_t q_stride_;
    int q_heads_, group_;
    Softmax softmax_;
    const float* sinks_;
    float* out_;
};

}  // namespace
}  // namespace lowbit

// q (tokens, q_heads, k_dim), q_stride floats between tokens -> out (tokens, q_heads, v_dim). sinks may be
// null. 0, or a Status.
LOWBIT_EXPORT int lowbit_attention_attend(const lowbit_attention_cache* cache,
                                          const lowbit_attention_batch* batch, const float* q,
                                          std::int64_t q_stride, std::int32_t q_heads, float scale,
                                          float softcap, const float* sinks, float* out) {
    using lowbit::Attention, lowbit::Bfloat;
    const lowbit::Softmax softmax{scale, softcap};
    const bool keys = lowbit::key_store(*cache).multiplied_as_float();
    const bool values = cache->latent ? keys : lowbit::value_store(*cache).multiplied_as_float();
    try {
        const auto attend = [&](auto key, auto value) {
            return Attention<decltype(key), decltype(value)>(*cache, *batch, q, q_stride, q_heads, softmax,
                                                             sinks, out)
                .run();
        };
        if (keys) return values ? attend(float{}, float{}) : attend(float{}, Bfloat{});
        return values ? attend(Bfloat{}, float{}) : attend(Bfloat{}, Bfloat{});
    } catch (const std::bad_alloc&) {
        return lowbit::NO_MEMORY;
    }
}
