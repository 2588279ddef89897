// Paged attention on a CPU: attend over the pages that attention_write.cpp fills. See attention_cache.h for
// their layout and attention_tiles.h for why results do not depend on what is computed together.
//
// Query rows of one K/V head are (token, query head of the group), token after token; a block is up to
// BLOCK_ROWS of them. A block runs over its segments and merges them as it goes. Where there are too few
// blocks to fill the threads (decode with a long context), every (block, segment) is a task of its own and
// a second pass merges: the same functions in the same order, so the same bits.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

#include "attention_tiles.h"
#include "lowbit.h"
#include "operations.h"
#include "thread_pool.h"

extern "C" {
// A ragged batch (kernels/forward_batch.py). Row s of page_table starts at page_table + s * table_stride.
struct lowbit_attention_batch {
    const std::int32_t* query_lengths;
    const std::int32_t* context_lengths;
    const std::int32_t* page_table;
    std::int64_t table_stride;
    std::int32_t sequences, tokens;
};
}

namespace lowbit {
namespace {

constexpr int BLOCK_ROWS = 48;  // a multiple of SCORE_ROWS and VALUE_ROWS; 48 rows of scores are 48 KiB
constexpr std::size_t MAX_SPLIT_FLOATS = std::size_t{1} << 24;  // 64 MiB of unmerged segments

struct Block {
    const std::int32_t* pages;  // the sequence's row of the page table
    int first_token;            // row of q where the sequence begins
    int first_position;         // of that token
    int kv_head;
    int row_begin, row_end;
    int segment_begin, segment_end;
    std::size_t partial;  // where its unmerged rows begin, counted in rows

    int rows() const { return row_end - row_begin; }
    int segments() const { return segment_end - segment_begin; }
};

struct Item {
    int block, segment;  // segment -1: the whole block
    std::int64_t cost;
};

// Work of one thread: lives on its stack.
template <class Key>
struct alignas(64) Scratch {
    float queries[BLOCK_ROWS * MAX_K_DIM];
    float scores[BLOCK_ROWS * SEGMENT_TOKENS];
    float values[BLOCK_ROWS * MAX_V_DIM];
    float next_values[BLOCK_ROWS * MAX_V_DIM];
    Key turned[STRIP * SEGMENT_TOKENS];  // of a latent cache
    RowState states[BLOCK_ROWS], next_states[BLOCK_ROWS];
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
          batch_(batch),
          q_(q),
          q_stride_(q_stride),
          q_heads_(q_heads),
          group_(q_heads / cache.heads),
          softmax_(softmax),
          sinks_(sinks),
          out_(out) {}

    Status run() {
        const Status status = plan();
        if (status != OK) return status;
        const bool split = plan_items();
        parallel_for(static_cast<std::int64_t>(items_.size()), [&](std::int64_t index) {
            const Item& item = items_[static_cast<std::size_t>(index)];
            const Block& block = blocks_[static_cast<std::size_t>(item.block)];
            if (item.segment < 0) {
                run_block(block);
            } else {
                run_part(block, item.segment);
            }
        });
        if (split) {
            parallel_for(static_cast<std::int64_t>(blocks_.size()),
                         [&](std::int64_t index) { merge_parts(blocks_[static_cast<std::size_t>(index)]); });
        }
        return OK;
    }

  private:
    int position(const Block& block, int row) const { return block.first_position + row / group_; }
    int first_seen(int position) const {
        return cache_.window > 0 ? std::max(position - cache_.window + 1, 0) : 0;
    }

    Status plan() {
        std::int64_t token = 0;
        for (int sequence = 0; sequence < batch_.sequences; ++sequence) {
            const int queries = batch_.query_lengths[sequence], context = batch_.context_lengths[sequence];
            if (queries < 0 || context < queries || token + queries > batch_.tokens) return BAD_LENGTHS;
            Block block{};
            block.pages = batch_.page_table + sequence * batch_.table_stride;
            block.first_token = static_cast<int>(token);
            block.first_position = context - queries;
            const int used = first_seen(block.first_position) / PAGE_TOKENS;
            const int count = queries > 0 ? (context + PAGE_TOKENS - 1) / PAGE_TOKENS : 0;
            if (count > batch_.table_stride) return BAD_LENGTHS;
            for (int page = used; page < count; ++page) {
                if (block.pages[page] < 0 || block.pages[page] >= cache_.pages) return BAD_PAGE;
            }
            const int rows = queries * group_;
            for (block.kv_head = 0; block.kv_head < cache_.heads; ++block.kv_head) {
                for (block.row_begin = 0; block.row_begin < rows; block.row_begin += BLOCK_ROWS) {
                    block.row_end = std::min(block.row_begin + BLOCK_ROWS, rows);
                    block.segment_begin = first_seen(position(block, block.row_begin)) / SEGMENT_TOKENS;
                    block.segment_end = position(block, block.row_end - 1) / SEGMENT_TOKENS + 1;
                    blocks_.push_back(block);
                }
            }
            token += queries;
        }
        return token == batch_.tokens ? OK : BAD_LENGTHS;
    }

    // Tasks, the longest first. True: every segment is a task, its rows go to the partial buffers.
    bool plan_items() {
        std::size_t partial = 0, parts = 0;
        for (Block& block : blocks_) {
            block.partial = partial;
            partial += static_cast<std::size_t>(block.rows()) * static_cast<std::size_t>(block.segments());
            parts += static_cast<std::size_t>(block.segments());
        }
        const std::size_t floats = partial * static_cast<std::size_t>(cache_.v_dim);
        const bool split = thread_count() > 1 && parts > blocks_.size() && floats <= MAX_SPLIT_FLOATS &&
                           blocks_.size() < 4 * static_cast<std::size_t>(thread_count());
        if (split) {
            partial_states_.resize(partial);
            partial_values_.resize(floats);
        }
        items_.reserve(split ? parts : blocks_.size());
        for (int index = 0; index < static_cast<int>(blocks_.size()); ++index) {
            const Block& block = blocks_[static_cast<std::size_t>(index)];
            const int end = position(block, block.row_end - 1) + 1;
            const int begin = first_seen(position(block, block.row_begin));
            if (!split) items_.push_back({index, -1, std::int64_t{block.rows()} * (end - begin)});
            for (int segment = block.segment_begin; split && segment < block.segment_end; ++segment) {
                const int length =
                    std::min(end, (segment + 1) * SEGMENT_TOKENS) - std::max(begin, segment * SEGMENT_TOKENS);
                items_.push_back({index, segment, std::int64_t{block.rows()} * length});
            }
        }
        std::stable_sort(items_.begin(), items_.end(),
                         [](const Item& a, const Item& b) { return a.cost > b.cost; });
        return split;
    }

    // Page `number` of the block's sequence, of its K/V head.
    static const std::uint8_t* stored_page(const Store& store, const Block& block, int number) {
        return store.page(block.pages[number], block.kv_head);
    }

    // Pages first <= page < last of a segment as operands, by their place in it.
    template <bool KEYS, class Operand>
    void operands(const Block& block, int segment, int first, int last, const Operand** pages) const {
        const Store& store = KEYS ? keys_ : values_;
        const std::size_t size = static_cast<std::size_t>(store.dim) * PAGE_TOKENS;
        Operand* const buffer =
            store.widened() ? widened_pages<Operand, KEYS>(size * SEGMENT_PAGES) : nullptr;
        for (int page = first; page < last; ++page) {
            const int number = segment * SEGMENT_PAGES + page;
            const std::uint8_t* const stored = stored_page(store, block, number);
            if (buffer == nullptr) {
                pages[page] = reinterpret_cast<const Operand*>(stored);
                continue;
            }
            const std::uint8_t* const next =
                page + 1 < last ? stored_page(store, block, number + 1) : stored;
            Operand* const to = buffer + size * static_cast<std::size_t>(page);
            widen<KEYS>(store, stored, next, to);
            pages[page] = to;
        }
    }

    void prepare_queries(const Block& block, Scratch<Key>& scratch) const {
        const int words = query_words<Key>(cache_.k_dim);
        for (int row = block.row_begin; row < block.row_end; ++row) {
            const std::int64_t token = block.first_token + row / group_;
            const float* query =
                q_ + token * q_stride_ + (block.kv_head * group_ + row % group_) * cache_.k_dim;
            prepare_query<Key>(query, cache_.k_dim, scratch.queries + (row - block.row_begin) * words);
        }
    }

    void run_block(const Block& block) const {
        Scratch<Key> scratch;
        prepare_queries(block, scratch);
        for (int segment = block.segment_begin; segment < block.segment_end; ++segment) {
            run_segment(block, segment, scratch, scratch.next_states, scratch.next_values);
            for (int row = 0; row < block.rows(); ++row) {
                merge(scratch.states[row], scratch.values + row * cache_.v_dim, scratch.next_states[row],
                      scratch.next_values + row * cache_.v_dim);
            }
        }
        for (int row = 0; row < block.rows(); ++row) {
            finish(block, row, scratch.states[row], scratch.values + row * cache_.v_dim);
        }
    }

    void run_part(const Block& block, int segment) {
        Scratch<Key> scratch;
        prepare_queries(block, scratch);
        const std::size_t first = partial_row(block, segment, 0);
        run_segment(block, segment, scratch, partial_states_.data() + first, partial_values(first));
    }

    void merge_parts(const Block& block) {
        for (int row = 0; row < block.rows(); ++row) {
            RowState state;
            float values[MAX_V_DIM];
            for (int segment = block.segment_begin; segment < block.segment_end; ++segment) {
                const std::size_t part = partial_row(block, segment, row);
                merge(state, values, partial_states_[part], partial_values(part));
            }
            finish(block, row, state, values);
        }
    }

    std::size_t partial_row(const Block& block, int segment, int row) const {
        return block.partial + static_cast<std::size_t>((segment - block.segment_begin) * block.rows() + row);
    }
    float* partial_values(std::size_t row) {
        return partial_values_.data() + row * static_cast<std::size_t>(cache_.v_dim);
    }

    void merge(RowState& state, float* values, const RowState& next, const float* next_values) const {
        if (next.sum != 0.0f) merge_segment(state, values, next, next_values, cache_.v_dim);
    }

    void finish(const Block& block, int row, const RowState& state, const float* values) const {
        const std::int64_t token = block.first_token + (block.row_begin + row) / group_;
        const int head = block.kv_head * group_ + (block.row_begin + row) % group_;
        float* to = out_ + (token * q_heads_ + head) * cache_.v_dim;
        finish_row(state, values, cache_.v_dim, sinks_ == nullptr ? nullptr : sinks_ + head, to);
    }

    // Scores of rows begin <= row < end, which see tokens first[row] <= token < last[row] of the segment.
    void score_segment(const Block& block, int segment, const int* first, const int* last, int begin, int end,
                       const Key* const* keys, const Value* const* values, Scratch<Key>& scratch) const {
        const int together = pages_at_once(std::min(end - begin, SCORE_ROWS));
        const int page_begin = first[begin] / PAGE_TOKENS,
                  page_end = (last[end - 1] + PAGE_TOKENS - 1) / PAGE_TOKENS;
        const int last_page = position(block, block.row_end - 1) / PAGE_TOKENS;
        const bool waits = block.rows() <= SCORE_ROWS && !keys_.widened();
        const Key* keys_ahead[SEGMENT_PAGES];
        for (int page = page_begin; waits && page < page_end; ++page) {
            const int number = segment * SEGMENT_PAGES + page + together;
            keys_ahead[page] =
                reinterpret_cast<const Key*>(stored_page(keys_, block, std::min(number, last_page)));
        }
        const int value_lines = cache_.latent || values_.widened() ? 0 : cache_.v_dim / 2;
        const auto score = waits ? score_pages<Key, Value, true> : score_pages<Key, Value, false>;
        const int words = query_words<Key>(cache_.k_dim);
        int from = begin, to = begin;
        for (int page = page_begin; page < page_end; page += together) {
            const int count = std::min(together, page_end - page);
            while (last[from] <= page * PAGE_TOKENS) ++from;  // rows before these pages
            while (to < end && first[to] < (page + count) * PAGE_TOKENS) ++to;
            const Prefetch<Key, Value> prefetch{keys_ahead + page, values + page, value_lines};
            for (int row = from; row < to; row += SCORE_ROWS) {
                score(scratch.queries + row * words, std::min(SCORE_ROWS, to - row), keys + page, count,
                      cache_.k_dim, scratch.scores + row * SEGMENT_TOKENS + page * PAGE_TOKENS, prefetch);
            }
        }
    }

    // Softmax states and weighted values of the block's rows over one segment; sum 0 where a row sees none.
    void run_segment(const Block& block, int segment, Scratch<Key>& scratch, RowState* states,
                     float* values) const {
        int first[BLOCK_ROWS], last[BLOCK_ROWS];  // tokens of the segment each row sees
        const int base = segment * SEGMENT_TOKENS, rows = block.rows();
        int begin = 0, end = 0;  // rows that see any: both ends ascend with the row, so they are consecutive
        for (int row = 0; row < rows; ++row) {
            const int here = position(block, block.row_begin + row);
            first[row] = std::max(first_seen(here) - base, 0);
            last[row] = std::min(here + 1 - base, SEGMENT_TOKENS);
            states[row] = RowState{};
            if (last[row] <= 0) begin = row + 1;
            if (first[row] < SEGMENT_TOKENS) end = row + 1;
        }
        if (begin >= end) return;

        const int page_begin = first[begin] / PAGE_TOKENS,
                  page_end = (last[end - 1] + PAGE_TOKENS - 1) / PAGE_TOKENS;
        const Key* keys[SEGMENT_PAGES];
        const Value* page_values[SEGMENT_PAGES];
        operands<true>(block, segment, page_begin, page_end, keys);
        if (!cache_.latent && !values_.widened())
            operands<false>(block, segment, page_begin, page_end, page_values);
        score_segment(block, segment, first, last, begin, end, keys, page_values, scratch);
        for (int row = begin; row < end; ++row) {
            softmax_segment<Value>(scratch.scores + row * SEGMENT_TOKENS, first[row], last[row], softmax_,
                                     states[row].maximum, states[row].sum);
        }
        if (!cache_.latent && values_.widened())  // now: they are read while the core has them
            operands<false>(block, segment, page_begin, page_end, page_values);
        std::fill(values + begin * cache_.v_dim, values + end * cache_.v_dim, 0.0f);
        const int strip = cache_.latent ? STRIP : cache_.v_dim;
        for (int dimension = 0; dimension < cache_.v_dim; dimension += strip) {
            const int width = std::min(strip, cache_.v_dim - dimension);
            if constexpr (std::is_same_v<Key, Value>) {
                for (int page = page_begin; cache_.latent && page < page_end; ++page) {
                    Key* turned = scratch.turned + page * PAGE_TOKENS * width;
                    turn_keys(keys[page] + dimension * PAGE_TOKENS, width, turned);
                    page_values[page] = turned;
                }
            }
            for (int row = begin; row < end; row += VALUE_ROWS) {
                value_block(scratch.scores + row * SEGMENT_TOKENS, std::min(VALUE_ROWS, end - row),
                            page_values, width, first + row, last + row,
                            values + row * cache_.v_dim + dimension, cache_.v_dim);
            }
        }
    }

    const lowbit_attention_cache& cache_;
    const Store keys_, values_;
    const lowbit_attention_batch& batch_;
    const float* q_;
    std::int64_t q_stride_;
    int q_heads_, group_;
    Softmax softmax_;
    const float* sinks_;
    float* out_;
    std::vector<Block> blocks_;
    std::vector<Item> items_;
    std::vector<RowState> partial_states_;
    std::vector<float> partial_values_;
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
