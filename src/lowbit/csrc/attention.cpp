// Paged attention on a CPU: write K and V into pages, attend over them. See attention_tiles.h for the page
// layout and for why results do not depend on what is computed together.
//
// Query rows of one K/V head are (token, query head of the group), token after token; a block is up to
// BLOCK_ROWS of them. A block runs over its segments and merges them as it goes. Where there are too few
// blocks to fill the threads (decode with a long context), every (block, segment) is a task of its own and
// a second pass merges: the same functions in the same order, so the same bits.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "attention_tiles.h"
#include "lowbit.h"
#include "operations.h"
#include "thread_pool.h"

extern "C" {
// One layer's pages. elements: 0 for float32, 1 for bfloat16, 2 for e4m3. window: 0 for no limit. latent: 1
// where a value is the first v_dim numbers of its key; v is then null.
struct lowbit_attention_cache {
    void* k;
    void* v;
    std::int64_t pages;
    std::int32_t heads, k_dim, v_dim, window, elements, latent;
};

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
constexpr int MAX_K_DIM = 576, MAX_V_DIM = 512;  // a latent and its rotary part (DeepSeek-V2)
constexpr std::size_t MAX_SPLIT_FLOATS = std::size_t{1} << 24;  // 64 MiB of unmerged segments

enum Elements { FLOATS = 0, BFLOATS = 1, E4M3S = 2 };
enum Status { OK = 0, BAD_LENGTHS = 1, BAD_PAGE = 2, BAD_SLOT = 3, NO_MEMORY = 4 };

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
template <class Element>
struct alignas(64) Scratch {
    float queries[BLOCK_ROWS * MAX_K_DIM];
    float scores[BLOCK_ROWS * SEGMENT_TOKENS];
    float values[BLOCK_ROWS * MAX_V_DIM];
    float next_values[BLOCK_ROWS * MAX_V_DIM];
    Element turned[STRIP * SEGMENT_TOKENS];  // of a latent cache
    RowState states[BLOCK_ROWS], next_states[BLOCK_ROWS];
};

// Where a thread widens the e4m3 pages of a segment; grown and kept.
struct Widened {
    std::vector<Bfloat> keys, values;
};

// Element: what is computed with. E4m3 pages are widened to Bfloat first.
template <class Element>
class Attention {
  public:
    Attention(const lowbit_attention_cache& cache, const lowbit_attention_batch& batch, const float* q,
              std::int64_t q_stride, int q_heads, const Softmax& softmax, const float* sinks, float* out)
        : cache_(cache),
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

    // Page `number` of the block's sequence: the elements of its K/V head.
    const Element* head_page(const void* pages, int dim, const Block& block, int number) const {
        const std::int64_t head = std::int64_t{block.pages[number]} * cache_.heads + block.kv_head;
        return static_cast<const Element*>(pages) + head * dim * PAGE_TOKENS;
    }

    // The same of e4m3 pages, widened into place `page` of a segment's buffer.
    const Element* widened_page(const void* pages, int dim, const Block& block, int number, int page,
                                std::vector<Bfloat>& buffer) const {
        if constexpr (sizeof(Element) == sizeof(Bfloat)) {
            const std::int64_t head = std::int64_t{block.pages[number]} * cache_.heads + block.kv_head;
            const std::size_t size = static_cast<std::size_t>(dim) * PAGE_TOKENS;
            if (buffer.size() < size * SEGMENT_PAGES) buffer.resize(size * SEGMENT_PAGES);
            Bfloat* const to = buffer.data() + size * static_cast<std::size_t>(page);
            widen(static_cast<const E4m3*>(pages) + head * dim * PAGE_TOKENS, dim * PAGE_TOKENS, to);
            return to;
        } else {
            return head_page(pages, dim, block, number);
        }
    }

    void prepare_queries(const Block& block, Scratch<Element>& scratch) const {
        const int words = query_words<Element>(cache_.k_dim);
        for (int row = block.row_begin; row < block.row_end; ++row) {
            const std::int64_t token = block.first_token + row / group_;
            const float* query =
                q_ + token * q_stride_ + (block.kv_head * group_ + row % group_) * cache_.k_dim;
            prepare_query<Element>(query, cache_.k_dim, scratch.queries + (row - block.row_begin) * words);
        }
    }

    void run_block(const Block& block) const {
        Scratch<Element> scratch;
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
        Scratch<Element> scratch;
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

    // Softmax states and weighted values of the block's rows over one segment; sum 0 where a row sees none.
    void run_segment(const Block& block, int segment, Scratch<Element>& scratch, RowState* states,
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

        const int together = pages_at_once(std::min(end - begin, SCORE_ROWS));
        const int page_begin = first[begin] / PAGE_TOKENS,
                  page_end = (last[end - 1] + PAGE_TOKENS - 1) / PAGE_TOKENS;
        const int last_page = position(block, block.row_end - 1) / PAGE_TOKENS;
        const Element *keys[SEGMENT_PAGES], *keys_ahead[SEGMENT_PAGES], *page_values[SEGMENT_PAGES];
        const bool narrow = cache_.elements == E4M3S;
        static thread_local Widened widened;
        for (int page = page_begin; page < page_end; ++page) {
            const int number = base / PAGE_TOKENS + page;
            if (narrow) {
                keys[page] = keys_ahead[page] =
                    widened_page(cache_.k, cache_.k_dim, block, number, page, widened.keys);
                page_values[page] = widened_page(cache_.v, cache_.v_dim, block, number, page, widened.values);
                continue;
            }
            keys[page] = head_page(cache_.k, cache_.k_dim, block, number);
            keys_ahead[page] =
                head_page(cache_.k, cache_.k_dim, block, std::min(number + together, last_page));
            page_values[page] =
                cache_.latent ? keys[page] : head_page(cache_.v, cache_.v_dim, block, number);
        }

        const int words = query_words<Element>(cache_.k_dim);
        int from = begin, to = begin;
        for (int page = page_begin; page < page_end; page += together) {
            const int count = std::min(together, page_end - page);
            while (last[from] <= page * PAGE_TOKENS) ++from;  // rows before these pages
            while (to < end && first[to] < (page + count) * PAGE_TOKENS) ++to;
            const Prefetch<Element> prefetch{keys_ahead + page, page_values + page,
                                             cache_.latent ? 0 : cache_.v_dim / 2};
            const bool waits = rows <= SCORE_ROWS && !narrow;
            const auto score = waits ? score_pages<Element, true> : score_pages<Element, false>;
            for (int row = from; row < to; row += SCORE_ROWS) {
                score(scratch.queries + row * words, std::min(SCORE_ROWS, to - row), keys + page, count,
                      cache_.k_dim, scratch.scores + row * SEGMENT_TOKENS + page * PAGE_TOKENS, prefetch);
            }
        }
        for (int row = begin; row < end; ++row) {
            softmax_segment<Element>(scratch.scores + row * SEGMENT_TOKENS, first[row], last[row], softmax_,
                                     states[row].maximum, states[row].sum);
        }
        std::fill(values + begin * cache_.v_dim, values + end * cache_.v_dim, 0.0f);
        const int strip = cache_.latent ? STRIP : cache_.v_dim;
        for (int dimension = 0; dimension < cache_.v_dim; dimension += strip) {
            const int width = std::min(strip, cache_.v_dim - dimension);
            for (int page = page_begin; cache_.latent && page < page_end; ++page) {
                Element* turned = scratch.turned + page * PAGE_TOKENS * width;
                turn_keys(keys[page] + dimension * PAGE_TOKENS, width, turned);
                page_values[page] = turned;
            }
            for (int row = begin; row < end; row += VALUE_ROWS) {
                value_block(scratch.scores + row * SEGMENT_TOKENS, std::min(VALUE_ROWS, end - row),
                            page_values, width, first + row, last + row,
                            values + row * cache_.v_dim + dimension, cache_.v_dim);
            }
        }
    }

    const lowbit_attention_cache& cache_;
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

inline void write_token(Bfloat* k_page, Bfloat* v_page, int offset, const float* k, const float* v, int k_dim,
                        int v_dim) {
    for (int pair = 0; pair < k_dim / 2; ++pair) {
        Bfloat* to = k_page + 2 * (pair * PAGE_TOKENS + offset);
        to[0] = to_bfloat(k[2 * pair]);
        to[1] = to_bfloat(k[2 * pair + 1]);
    }
    if (v_page == nullptr) return;
    Bfloat* to = v_page + offset / 2 * 2 * v_dim + offset % 2;
    for (int dimension = 0; dimension < v_dim; ++dimension) to[2 * dimension] = to_bfloat(v[dimension]);
}

inline void write_token(E4m3* k_page, E4m3* v_page, int offset, const float* k, const float* v, int k_dim,
                        int v_dim) {
    for (int pair = 0; pair < k_dim / 2; ++pair) {
        E4m3* to = k_page + 2 * (pair * PAGE_TOKENS + offset);
        to[0] = to_e4m3(k[2 * pair]);
        to[1] = to_e4m3(k[2 * pair + 1]);
    }
    E4m3* to = v_page + offset / 2 * 2 * v_dim + offset % 2;
    for (int dimension = 0; dimension < v_dim; ++dimension) to[2 * dimension] = to_e4m3(v[dimension]);
}

inline void write_token(float* k_page, float* v_page, int offset, const float* k, const float* v, int k_dim,
                        int v_dim) {
    for (int dimension = 0; dimension < k_dim; ++dimension)
        k_page[dimension * PAGE_TOKENS + offset] = k[dimension];
    if (v_page != nullptr) std::copy_n(v, v_dim, v_page + offset * v_dim);
}

template <class Element>
void write(const lowbit_attention_cache& cache, const float* k, std::int64_t k_stride, const float* v,
           std::int64_t v_stride, const std::int32_t* slots, int tokens) {
    constexpr int TOGETHER = 32;  // tokens a task: neighbours share pages, and so cache lines
    parallel_for((tokens + TOGETHER - 1) / TOGETHER, [&](std::int64_t task) {
        const int end = std::min(static_cast<int>(task + 1) * TOGETHER, tokens);
        for (int token = static_cast<int>(task) * TOGETHER; token < end; ++token) {
            const std::int64_t page = slots[token] / PAGE_TOKENS * std::int64_t{cache.heads};
            for (int head = 0; head < cache.heads; ++head) {
                Element* v_page = nullptr;
                const float* value = nullptr;
                if (!cache.latent) {
                    v_page = static_cast<Element*>(cache.v) + (page + head) * cache.v_dim * PAGE_TOKENS;
                    value = v + token * v_stride + head * cache.v_dim;
                }
                write_token(static_cast<Element*>(cache.k) + (page + head) * cache.k_dim * PAGE_TOKENS,
                            v_page, slots[token] % PAGE_TOKENS, k + token * k_stride + head * cache.k_dim,
                            value, cache.k_dim, cache.v_dim);
            }
        }
    });
}

}  // namespace
}  // namespace lowbit

// k (tokens, heads, k_dim) and v (tokens, heads, v_dim; null for a latent cache), strides in floats between
// tokens. 0, or a Status.
LOWBIT_EXPORT int lowbit_attention_write(const lowbit_attention_cache* cache, const float* k,
                                         std::int64_t k_stride, const float* v, std::int64_t v_stride,
                                         const std::int32_t* slots, std::int32_t tokens) {
    for (int token = 0; token < tokens; ++token) {
        if (slots[token] < 0 || slots[token] / lowbit::PAGE_TOKENS >= cache->pages) return lowbit::BAD_SLOT;
    }
    if (cache->elements == lowbit::E4M3S) {
        lowbit::write<lowbit::E4m3>(*cache, k, k_stride, v, v_stride, slots, tokens);
    } else if (cache->elements == lowbit::BFLOATS) {
        lowbit::write<lowbit::Bfloat>(*cache, k, k_stride, v, v_stride, slots, tokens);
    } else {
        lowbit::write<float>(*cache, k, k_stride, v, v_stride, slots, tokens);
    }
    return lowbit::OK;
}

// q (tokens, q_heads, k_dim), q_stride floats between tokens -> out (tokens, q_heads, v_dim). sinks may be
// null. 0, or a Status.
LOWBIT_EXPORT int lowbit_attention_attend(const lowbit_attention_cache* cache,
                                          const lowbit_attention_batch* batch, const float* q,
                                          std::int64_t q_stride, std::int32_t q_heads, float scale,
                                          float softcap, const float* sinks, float* out) {
    const lowbit::Softmax softmax{scale, softcap};
    try {
        if (cache->elements != lowbit::FLOATS) {
            return lowbit::Attention<lowbit::Bfloat>(*cache, *batch, q, q_stride, q_heads, softmax, sinks,
                                                     out)
                .run();
        }
        return lowbit::Attention<float>(*cache, *batch, q, q_stride, q_heads, softmax, sinks, out).run();
    } catch (const std::bad_alloc&) {
        return lowbit::NO_MEMORY;
    }
}
