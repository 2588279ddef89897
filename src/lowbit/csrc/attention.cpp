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

#include "amx_tiles.h"
#include "attention_plan.h"
#include "attention_softmax.h"
#include "lowbit.h"
#include "operations.h"

namespace lowbit {
namespace {

// So many rows decode narrow pages as they read them; tiles always do.
constexpr int DIRECT_ROWS = TILED<Bfloat> ? BLOCK_ROWS : 2 * SCORE_ROWS;
constexpr int PADDED_ROWS = BLOCK_ROWS + ROWS_OF_TILE - 1;

// A segment while it is computed, for the rows of a block, or of several that have its first `common` pages in common.
class Segment {
  public:
    Segment(const Block* const* members, int count, int number, int common)
        : members(members), count(count), number(number), common(common) {}

    const Block* const* const members;
    const int count, number, common;
    int rows = 0;                              // of all members
    int first[BLOCK_ROWS], last[BLOCK_ROWS];   // row r sees its tokens first[r] <= t < last[r]
    int begin = 0, end = 0;                    // rows that see any
    int page_begin = 0, page_end = 0;          // what is read of the first member's pages, for all rows

    const Block& leader() const { return *members[0]; }
    int pages_of(int row) const { return (last[row] + PAGE_TOKENS - 1) / PAGE_TOKENS; }

    // The next row sees these; what lies outside the segment is cut off.
    void add_row(int first_seen, int past_seen) {
        const int base = number * SEGMENT_TOKENS;
        first[rows] = std::max(first_seen - base, 0);
        last[rows++] = std::min(past_seen - base, SEGMENT_TOKENS);
    }

    // Of one block both ends ascend with the row; of several, all see the common pages.
    void find_ends() {
        begin = 0, end = rows;
        while (begin < end && last[begin] <= 0) ++begin;
        while (begin < end && first[end - 1] >= SEGMENT_TOKENS) --end;
        if (begin >= end) return;
        page_begin = first[begin] / PAGE_TOKENS;
        page_end = count == 1 ? pages_of(end - 1) : common;
    }

    // Calls each(member, its rows' begin and end).
    template <class Each>
    void for_members(const Each& each) const {
        for (int member = 0, row = 0; member < count; ++member) {
            const int past = row + members[member]->rows();
            each(*members[member], row, past);
            row = past;
        }
    }

    // The same for members that have pages alone.
    template <class Each>
    void alone(const Each& each) const {
        if (count == 1 || common >= SEGMENT_PAGES) return;
        for_members([&](const Block& block, int row, int past) {
            if (pages_of(past - 1) > common) each(block, row, past);
        });
    }
};

// Work of one thread: lives on its stack.
template <class Key>
struct alignas(64) Scratch {
    float queries[BLOCK_ROWS * MAX_K_DIM];
    float scores[PADDED_ROWS * SEGMENT_TOKENS];
    // No multiple of 4 KiB may lie between `scores` and `folded`: stores there would hold up loads here.
    float query_sums[BLOCK_ROWS * MAX_GROUPS], starts[BLOCK_ROWS];
    float folded[BLOCK_ROWS * SEGMENT_TOKENS];  // weights for values that have scales in groups, or for tiles
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
        run_segment({scratch.members, part.count, part.segment, part.common},
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
            run_segment({members, 1, segment, SEGMENT_PAGES}, then,
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

    // Softmax states and weighted values of the rows over one segment; sum 0 where a row sees none of it. `next`: the
    // block that reads segment next_segment after this, or null.
    void run_segment(Segment segment, const Block* next, int next_segment, Scratch<Key>& scratch,
                     const States& states) const {
        find_rows(segment, states);
        if (segment.begin >= segment.end) return;
        const bool direct = segment.end - segment.begin <= DIRECT_ROWS && !cache_.latent;
        const Ahead next_keys = next == nullptr ? Ahead{} : ahead_of(keys_, *next, next_segment);
        const Key* keys[SEGMENT_PAGES];
        if (cache_.latent) {
            score_keys(segment, direct, next_keys, scratch, keys);
        } else {
            score_keys(segment, direct, ahead_of(values_, segment.leader(), segment.number), scratch, keys);
        }
        take_softmax(segment, scratch, states);
        if (cache_.latent) {
            if constexpr (std::is_same_v<Key, Value>) weigh_latent(segment, keys, scratch, states.values);
        } else {
            weigh_values(segment, direct, next_keys, scratch, states.values);
        }
    }

    // What the rows see of their segment.
    void find_rows(Segment& segment, const States& states) const {
        segment.for_members([&](const Block& block, int, int) {
            for_rows(block, [&](int, std::int64_t token, int) {
                const int here = block.first_position + static_cast<int>(token) - block.first_token;
                segment.add_row(plan_.first_seen(here), here + 1);
            });
        });
        std::fill_n(states.maximum, segment.rows, MINUS_INFINITY);
        std::fill_n(states.sum, segment.rows, 0.0f);
        segment.find_ends();
    }

    // Scores. `keys`: the pages that were read for all rows, as operands (of narrow pages read directly: nothing).
    void score_keys(const Segment& segment, bool direct, const Ahead& ahead, Scratch<Key>& scratch,
                    const Key** keys) const {
        as_elements<Key>(keys_, direct, [&](auto element) {
            using Element = decltype(element);
            const Element* pages[SEGMENT_PAGES];
            Scales scales;
            const bool read = !keys_.widened() || IS_CODE<Element>;  // or widened: fetched before
            const auto score = [&](const Block& block, int from, int to, int row, int past, const Ahead& then) {
                operands<true>(block, segment.number, from, to, pages, then);
                find_scales(keys_, block, segment.number, from, to, scales);
                score_rows<Element>({scratch.queries, scratch.query_sums}, {row, past, segment.first, segment.last},
                                    pages, from, to, cache_.k_dim, scales, scratch.scores, read ? then : Ahead{});
            };
            score(segment.leader(), segment.page_begin, segment.page_end, segment.begin, segment.end, ahead);
            if constexpr (std::is_same_v<Element, Key>) {
                std::copy(pages + segment.page_begin, pages + segment.page_end, keys + segment.page_begin);
            }
            segment.alone([&](const Block& block, int row, int past) {
                score(block, segment.common, segment.pages_of(past - 1), row, past, Ahead{});
            });
        });
    }

    // Scores become weights, or what weights_of() makes them of.
    void take_softmax(const Segment& segment, Scratch<Key>& scratch, const States& states) const {
        const auto softmax = weighed().group == 0 ? softmax_segment<MULTIPLIED, ROUNDED>
                                                  : softmax_segment<Weights::FLOATS, ROUNDED>;
        for (int row = segment.begin; row < segment.end; ++row) {
            softmax(scratch.scores + row * SEGMENT_TOKENS, weights(scratch) + row * WEIGHTS_ROW<Value>,
                    segment.first[row], segment.last[row], softmax_, states.maximum[row], states.sum[row]);
        }
        if (weighed().group == 0) {
            for (int row = segment.begin; row < segment.end; ++row) {
                clear_unseen(segment, row, weights(scratch) + row * WEIGHTS_ROW<Value>);
            }
            std::fill(scratch.starts + segment.begin, scratch.starts + segment.end, 0.0f);
        } else if (one_group()) {
            fold(segment, 0, segment.begin, segment.end, weights(scratch), scratch);
        }
    }

    // Tiles weigh what any of their rows sees: the row's weights are zeros there too.
    void clear_unseen([[maybe_unused]] const Segment& segment, [[maybe_unused]] int row,
                      [[maybe_unused]] float* weights) const {
        if constexpr (TILED<Value>) {
            constexpr int TOKENS = 2 * LANES;  // of a line
            const int begin = segment.first[row] / TOKENS, end = (segment.last[row] + TOKENS - 1) / TOKENS;
            const int past = segment.count == 1 ? (segment.page_end + 1) / 2 : SEGMENT_TOKENS / TOKENS;
            for (int line = segment.page_begin / 2; line < past; ++line) {
                if (line < begin || line >= end) store(weights + line * PAIRS_LINE, zeros());
            }
        }
    }

    // folded <- weights times the scales that values have from `dimension` on, of rows begin <= row < end; their starts.
    void fold(const Segment& segment, int dimension, int begin, int end, float* folded,
              Scratch<Key>& scratch) const {
        Scales stored;
        segment.for_members([&](const Block& block, int row, int past) {
            const int from = std::max(row, begin), to = std::min(past, end);
            if (from >= to) return;
            const int page_from = segment.first[from] / PAGE_TOKENS, page_to = segment.pages_of(to - 1);
            find_scales(weighed(), block, segment.number, page_from, page_to, stored);
            scratch.scales.load(stored, page_from, page_to, dimension);
            const auto fold_row = stored.lows ? fold_scales<MULTIPLIED, true> : fold_scales<MULTIPLIED, false>;
            for (int which = from; which < to; ++which) {
                float* const to = folded + which * WEIGHTS_ROW<Value>;
                scratch.starts[which] = fold_row(scratch.scores + which * SEGMENT_TOKENS, segment.first[which],
                                                 segment.last[which], scratch.scales, to);
                clear_unseen(segment, which, to);
            }
        });
    }

    // Calls each(begin, end, what rows weigh these dimensions with): those of a group of scales.
    template <class Each>
    void for_groups(const Segment& segment, int row_begin, int row_end, Scratch<Key>& scratch,
                    const Each& each) const {
        if (one_group()) return each(0, cache_.v_dim, weights(scratch));
        for (int begin = 0; begin < cache_.v_dim; begin += weighed().group) {
            fold(segment, begin, row_begin, row_end, scratch.folded, scratch);
            each(begin, std::min(begin + weighed().group, cache_.v_dim), scratch.folded);
        }
    }

    void weigh_values(const Segment& segment, bool direct, const Ahead& ahead, Scratch<Key>& scratch,
                      float* out) const {
        as_elements<Value>(values_, direct, [&](auto element) {
            using Element = decltype(element);
            const Element* pages[SEGMENT_PAGES];
            const bool read = !values_.widened() || IS_CODE<Element>;
            const auto weigh = [&](const Rows& rows, const float* starts, const Ahead& then) {
                for_groups(segment, rows.begin, rows.end, scratch, [&](int begin, int end, const float* weights) {
                    weigh_rows<Element>(weights, rows, pages, cache_.v_dim, values_.format, begin, end, out,
                                        cache_.v_dim, starts, read ? then : Ahead{});
                });
            };
            // The pages that are read for all rows end here, what members have alone begins here.
            const int whole = segment.page_end * PAGE_TOKENS;
            int cut[BLOCK_ROWS];
            for (int row = segment.begin; row < segment.end; ++row) cut[row] = std::min(segment.last[row], whole);
            operands<false>(segment.leader(), segment.number, segment.page_begin, segment.page_end, pages, ahead);
            weigh({segment.begin, segment.end, segment.first, cut}, scratch.starts, ahead);
            segment.alone([&](const Block& block, int row, int past) {
                operands<false>(block, segment.number, segment.common, segment.pages_of(past - 1), pages, Ahead{});
                std::fill(cut + row, cut + past, whole);
                weigh({row, past, cut, segment.last}, nullptr, Ahead{});
            });
        });
    }

    // The values are the first dimensions of `keys`.
    void weigh_latent(const Segment& segment, const Key* const* keys, Scratch<Key>& scratch, float* out) const {
        const Rows rows{segment.begin, segment.end, segment.first, segment.last};
        const Value* values[SEGMENT_PAGES];
        for_groups(segment, rows.begin, rows.end, scratch, [&](int begin, int end, const float* weights) {
            for (int dimension = begin; dimension < end; dimension += STRIP) {
                const int width = std::min(STRIP, end - dimension);
                for (int page = segment.page_begin; page < segment.page_end; ++page) {
                    Key* const turned = scratch.turned + page * PAGE_TOKENS * width;
                    turn_keys(keys[page] + dimension * PAGE_TOKENS, width, turned);
                    values[page] = turned;
                }
                weigh_rows<Value>(weights, rows, values, width, values_.format, 0, width, out + dimension,
                                  cache_.v_dim, scratch.starts, Ahead{});
            }
        });
    }

    // Where weights are when there is one of each token: in the place of the scores, or for tiles in rows of their own.
    static float* weights(Scratch<Key>& scratch) { return TILED<Value> ? scratch.folded : scratch.scores; }
    // Where the values lie.
    const Store& weighed() const { return cache_.latent ? keys_ : values_; }
    // Whether all dimensions of a value share its scale, or have none.
    bool one_group() const { return weighed().group == 0 || weighed().group >= cache_.v_dim; }

    static constexpr bool ROUNDED = BFLOAT_PRODUCTS<Value>;
    static constexpr Weights MULTIPLIED = ROUNDED ? Weights::PAIRS : Weights::FLOATS;

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
    const lowbit::TilesReleased released;
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
