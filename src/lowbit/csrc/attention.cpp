// Paged attention on a CPU: attend over the pages that attention_write.cpp fills. See attention_cache.h for
// their layout and attention_tiles.h for why results do not depend on what is computed together.
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
constexpr int STATE_ROWS = (BLOCK_ROWS + LANES - 1) / LANES * LANES;
constexpr int SHARED_ROWS = BLOCK_ROWS / 2;  // more rows of a sequence need no others beside them
constexpr int SHARED_PAGES = 4;              // fewer pages in common are not worth it
constexpr std::size_t MAX_STORED_FLOATS = std::size_t{1} << 24;  // 64 MiB of unmerged segments
constexpr std::int64_t ALONE_COST = 150'000;  // less work than waking a thread
constexpr int DIRECT_ROWS = 2 * SCORE_ROWS;  // so many rows decode narrow pages as they read them
constexpr int NONE = -1;

struct Block {
    const std::int32_t* pages;  // the sequence's row of the page table
    int first_token;            // row of q where the sequence begins
    int first_position;         // of that token
    int kv_head;
    int row_begin, row_end;
    int segment_begin, segment_end;
    int stored;  // where Workspace::stored begins for its segments, or NONE

    int rows() const { return row_end - row_begin; }
    int segments() const { return segment_end - segment_begin; }
};

// A segment of blocks that have its first `common` pages in common.
struct Part {
    int members, count;  // of Workspace::members
    int segment, common;
    std::int64_t row;  // where its rows are stored
};

// What a call plans; kept by the thread that calls, so that nothing is allocated in the end.
struct Workspace {
    std::vector<Block> blocks;
    std::vector<Part> parts;
    std::vector<int> members;           // numbers of blocks
    std::vector<std::int64_t> stored;   // by block and segment: its first row in the states below, or NONE
    std::vector<float> maximum, sum, values;
    std::vector<std::int64_t> costs;    // of what is to be run next: parts, then blocks
    std::vector<int> order, ranges;     // the costliest first; range i is ranges[i] .. ranges[i + 1] of them
    std::vector<int> alike, left, group;  // block of K/V head 0 of sequences that may share pages
};

Workspace& workspace() {
    static thread_local Workspace mine;
    return mine;
}

// Work of one thread: lives on its stack.
template <class Key>
struct alignas(64) Scratch {
    float queries[BLOCK_ROWS * MAX_K_DIM];
    float scores[BLOCK_ROWS * SEGMENT_TOKENS];
    // No multiple of 4 KiB may lie between `scores` and `folded`: stores there would hold up loads here.
    float query_sums[BLOCK_ROWS * MAX_GROUPS], starts[BLOCK_ROWS];
    float folded[BLOCK_ROWS * SEGMENT_TOKENS];  // weights for values that have scales in groups
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
          batch_(batch),
          q_(q),
          q_stride_(q_stride),
          q_heads_(q_heads),
          group_(q_heads / cache.heads),
          softmax_(softmax),
          sinks_(sinks),
          out_(out),
          work_(workspace()) {}

    Status run() {
        const Status status = plan_blocks();
        if (status != OK) return status;
        plan_parts();
        if (!work_.parts.empty()) {
            for (const Part& part : work_.parts) work_.costs.push_back(cost(part));
            run_ranges([&](int index, int next) {
                run_part(work_.parts[static_cast<std::size_t>(index)],
                         next == NONE ? nullptr : &work_.parts[static_cast<std::size_t>(next)]);
            });
        }
        for (const Block& block : work_.blocks) work_.costs.push_back(cost(block));
        run_ranges([&](int index, int next) {
            run_block(work_.blocks[static_cast<std::size_t>(index)],
                      next == NONE ? nullptr : &work_.blocks[static_cast<std::size_t>(next)]);
        });
        return OK;
    }

  private:
    int position(const Block& block, int row) const { return block.first_position + row / group_; }
    int last_position(const Block& block) const { return position(block, block.row_end - 1); }
    int first_seen(int position) const {
        return cache_.window > 0 ? std::max(position - cache_.window + 1, 0) : 0;
    }

    Status plan_blocks() {
        work_.blocks.clear();
        work_.parts.clear();
        work_.members.clear();
        work_.stored.clear();
        work_.alike.clear();
        work_.costs.clear();
        std::int64_t token = 0;
        for (int sequence = 0; sequence < batch_.sequences; ++sequence) {
            const int queries = batch_.query_lengths[sequence], context = batch_.context_lengths[sequence];
            if (queries < 0 || context < queries || token + queries > batch_.tokens) return BAD_LENGTHS;
            Block block{};
            block.pages = batch_.page_table + sequence * batch_.table_stride;
            block.first_token = static_cast<int>(token);
            block.first_position = context - queries;
            block.stored = NONE;
            const int used = first_seen(block.first_position) / PAGE_TOKENS;
            const int count = queries > 0 ? (context + PAGE_TOKENS - 1) / PAGE_TOKENS : 0;
            if (count > batch_.table_stride) return BAD_LENGTHS;
            for (int page = used; page < count; ++page) {
                if (block.pages[page] < 0 || block.pages[page] >= cache_.pages) return BAD_PAGE;
            }
            const int rows = queries * group_;
            if (rows > 0 && rows <= SHARED_ROWS) work_.alike.push_back(static_cast<int>(work_.blocks.size()));
            for (block.kv_head = 0; block.kv_head < cache_.heads; ++block.kv_head) {
                for (block.row_begin = 0; block.row_begin < rows; block.row_begin += BLOCK_ROWS) {
                    block.row_end = std::min(block.row_begin + BLOCK_ROWS, rows);
                    block.segment_begin = first_seen(position(block, block.row_begin)) / SEGMENT_TOKENS;
                    block.segment_end = last_position(block) / SEGMENT_TOKENS + 1;
                    work_.blocks.push_back(block);
                }
            }
            token += queries;
        }
        return token == batch_.tokens ? OK : BAD_LENGTHS;
    }

    Block& block_of(int number) { return work_.blocks[static_cast<std::size_t>(number)]; }
    const Block& block_of(int number) const { return work_.blocks[static_cast<std::size_t>(number)]; }
    const Block& member_of(const Part& part, int number) const {
        return block_of(work_.members[static_cast<std::size_t>(part.members + number)]);
    }

    void plan_parts() {
        std::int64_t rows = 0;
        if (work_.alike.size() > 1) find_shared(rows);
        const std::size_t few = 4 * static_cast<std::size_t>(thread_count());
        if (thread_count() > 1 && work_.blocks.size() < few) split_blocks(rows);
        const auto grow = [](std::vector<float>& numbers, std::size_t size) {
            if (numbers.size() < size) numbers.resize(size);
        };
        if (rows == 0) return;
        const auto count = static_cast<std::size_t>(rows);
        grow(work_.maximum, count + LANES);  // merged in sixteens
        grow(work_.sum, count + LANES);
        grow(work_.values, count * static_cast<std::size_t>(cache_.v_dim));
    }

    // Every segment that is not stored yet becomes a part.
    void split_blocks(std::int64_t& rows) {
        std::int64_t most = rows;
        std::size_t segments = 0;
        for (const Block& block : work_.blocks) {
            most += std::int64_t{block.rows()} * block.segments();
            segments += static_cast<std::size_t>(block.segments());
        }
        if (segments == work_.blocks.size() || too_many(most)) return;
        for (int number = 0; number < static_cast<int>(work_.blocks.size()); ++number) {
            const int end = block_of(number).segment_end;
            for (int segment = block_of(number).segment_begin; segment < end; ++segment) {
                if (stored_row(block_of(number), segment) != NONE) continue;
                const int place = static_cast<int>(work_.members.size());
                work_.members.push_back(number);
                add_part({place, 1, segment, SEGMENT_PAGES, rows}, rows);
            }
        }
    }

    bool too_many(std::int64_t rows) const {
        return static_cast<std::size_t>(rows) * static_cast<std::size_t>(cache_.v_dim) > MAX_STORED_FLOATS;
    }

    std::int64_t stored_row(const Block& block, int segment) const {
        if (block.stored == NONE) return NONE;
        return work_.stored[static_cast<std::size_t>(block.stored + segment - block.segment_begin)];
    }

    // Its rows are stored from `rows` on, which grows by them.
    void add_part(const Part& part, std::int64_t& rows) {
        work_.parts.push_back(part);
        for (int member = 0; member < part.count; ++member) {
            Block& block = block_of(work_.members[static_cast<std::size_t>(part.members + member)]);
            if (block.stored == NONE) {
                block.stored = static_cast<int>(work_.stored.size());
                work_.stored.resize(work_.stored.size() + static_cast<std::size_t>(block.segments()), NONE);
            }
            work_.stored[static_cast<std::size_t>(block.stored + part.segment - block.segment_begin)] = rows;
            rows += block.rows();
        }
    }

    // Pages of a segment all rows of a block see wholly, from the segment's beginning on; 0 where some do not
    // see that, NONE past the block's end.
    int whole_pages(const Block& block, int segment) const {
        const int base = segment * SEGMENT_TOKENS;
        const int pages = std::min((block.first_position + 1 - base) / PAGE_TOKENS, SEGMENT_PAGES);
        if (pages < (cache_.latent ? SEGMENT_PAGES : SHARED_PAGES)) return NONE;
        return first_seen(last_position(block)) <= base ? pages : 0;
    }

    // How many pages of a segment two sequences have in common, from its beginning on.
    int common_pages(int left, int right, int segment) const {
        const int count =
            std::min(whole_pages(block_of(left), segment), whole_pages(block_of(right), segment));
        const std::int32_t *mine = block_of(left).pages + segment * SEGMENT_PAGES,
                           *other = block_of(right).pages + segment * SEGMENT_PAGES;
        return static_cast<int>(std::mismatch(mine, mine + std::max(count, 0), other).first - mine);
    }

    // Parts of the sequences in `alike` that begin a segment with the same pages: first those that share all
    // of it, then of the others neighbours in the order of their pages. Without a window, whoever shares no
    // whole segment is not looked at again: pages are shared from the first on.
    void find_shared(std::int64_t& rows) {
        int segment = first_seen(last_position(block_of(work_.alike.front()))) / SEGMENT_TOKENS;
        for (const int number : work_.alike) {
            segment = std::min(segment, first_seen(last_position(block_of(number))) / SEGMENT_TOKENS);
        }
        std::vector<int>&alike = work_.alike, &left = work_.left, &group = work_.group;
        for (; alike.size() > 1; ++segment) {
            const auto past = [&](int number) { return whole_pages(block_of(number), segment) == NONE; };
            alike.erase(std::remove_if(alike.begin(), alike.end(), past), alike.end());
            const auto pages_before = [&](int one, int other) {
                const auto end = [&](const Block& block) {
                    return block.pages + segment * SEGMENT_PAGES + whole_pages(block, segment);
                };
                const Block &a = block_of(one), &b = block_of(other);
                return std::lexicographical_compare(a.pages + segment * SEGMENT_PAGES, end(a),
                                                    b.pages + segment * SEGMENT_PAGES, end(b));
            };
            std::sort(alike.begin(), alike.end(), pages_before);
            left.clear();
            std::size_t kept = 0;
            for (std::size_t begin = 0, end; begin < alike.size(); begin = end) {
                end = begin + 1;
                while (end < alike.size() &&
                       common_pages(alike[end - 1], alike[end], segment) == SEGMENT_PAGES) {
                    ++end;
                }
                if (end == begin + 1) {
                    left.push_back(alike[begin]);
                } else {
                    group.assign(alike.begin() + static_cast<std::ptrdiff_t>(begin),
                                 alike.begin() + static_cast<std::ptrdiff_t>(end));
                    if (!share(group, segment, SEGMENT_PAGES, rows)) return;
                    for (const int number : group) alike[kept++] = number;
                }
            }
            for (std::size_t begin = 0, end; begin < left.size(); begin = end) {
                int common = SEGMENT_PAGES;
                group.assign(1, left[begin]);
                for (end = begin + 1; end < left.size(); ++end) {
                    const int both = common_pages(left[end - 1], left[end], segment);
                    if (both < SHARED_PAGES) break;
                    common = std::min(common, both);
                    group.push_back(left[end]);
                }
                if (group.size() > 1 && !cache_.latent && !share(group, segment, common, rows)) return;
            }
            if (cache_.window == 0) {
                alike.resize(kept);
            }
        }
    }

    // False: no more may be stored.
    bool share(const std::vector<int>& group, int segment, int common, std::int64_t& rows) {
        int all_rows = 0;
        for (const int number : group) all_rows += block_of(number).rows();
        if (too_many(rows + std::int64_t{all_rows} * cache_.heads)) return false;
        const int wanted =
            thread_count() > 1 ? std::min(all_rows / 12, 2 * thread_count() / cache_.heads) : 1;
        const int chunks = std::max((all_rows + BLOCK_ROWS - 1) / BLOCK_ROWS, wanted);
        const int chunk_rows = (all_rows + chunks - 1) / chunks;
        for (int kv_head = 0; kv_head < cache_.heads; ++kv_head) {
            for (std::size_t begin = 0; begin < group.size();) {
                Part part{static_cast<int>(work_.members.size()), 0, segment, common, rows};
                int count = 0;
                for (; begin < group.size() && count < chunk_rows; ++begin) {
                    const int more = block_of(group[begin]).rows();
                    if (count + more > BLOCK_ROWS) break;
                    work_.members.push_back(group[begin] + kv_head);
                    count += more;
                    ++part.count;
                }
                add_part(part, rows);
            }
        }
        return true;
    }

    // Multiplications, with as many more as reading K and V may take the time of.
    std::int64_t cost(const Block& block, int begin, int end) const {
        return std::int64_t{block.rows() + 4} * std::max(end - begin, 0) * (cache_.k_dim + cache_.v_dim);
    }
    std::int64_t cost(const Part& part) const {
        std::int64_t sum = 0;
        for (int member = 0; member < part.count; ++member) {
            const Block& block = member_of(part, member);
            const int base = part.segment * SEGMENT_TOKENS;
            sum += cost(block, std::max(first_seen(position(block, block.row_begin)), base),
                        std::min(last_position(block) + 1, base + SEGMENT_TOKENS));
        }
        return sum;
    }
    std::int64_t cost(const Block& block) const {
        int stored = 0;
        const int segments = block.stored != NONE ? block.segment_end : block.segment_begin;
        for (int segment = block.segment_begin; segment < segments; ++segment) {
            stored += stored_row(block, segment) != NONE ? SEGMENT_TOKENS : 0;
        }
        const int end = last_position(block) + 1;
        const int begin = first_seen(position(block, block.row_begin));
        const std::int64_t merging = std::int64_t{block.rows()} * block.segments() * cache_.v_dim;
        return cost(block, begin + stored, end) + merging;
    }

    // Runs run(index, the index that follows or NONE) for everything in `costs`, which is cleared. A thread
    // takes ranges: large ones first, and at the end such as leave no thread waiting long.
    template <class Run>
    void run_ranges(const Run& run) {
        std::vector<std::int64_t>& costs = work_.costs;
        std::vector<int>&order = work_.order, &ranges = work_.ranges;
        const int count = static_cast<int>(costs.size());
        std::int64_t left = 0;
        order.resize(costs.size());
        for (int index = 0; index < count; ++index) {
            order[static_cast<std::size_t>(index)] = index;
            left += costs[static_cast<std::size_t>(index)];
        }
        const int threads = left > ALONE_COST ? thread_count() : 1;
        const auto cost_of = [&](int place) {
            return costs[static_cast<std::size_t>(order[static_cast<std::size_t>(place)])];
        };
        ranges.assign(1, 0);
        if (threads > 1) {
            const auto costlier = [&](int a, int b) {
                const std::int64_t mine = costs[static_cast<std::size_t>(a)],
                                   other = costs[static_cast<std::size_t>(b)];
                return mine != other ? mine > other : a < b;
            };
            if (!std::is_sorted(order.begin(), order.end(), costlier)) {
                std::sort(order.begin(), order.end(), costlier);
            }
            for (int place = 0; place < count;) {
                std::int64_t share = left / (4 * threads);
                do {
                    left -= cost_of(place);
                    share -= cost_of(place++);
                } while (place < count && share >= cost_of(place));
                ranges.push_back(place);
            }
        } else if (count > 0) {
            ranges.push_back(count);
        }
        parallel_for(static_cast<std::int64_t>(ranges.size()) - 1, [&](std::int64_t range) {
            const int begin = ranges[static_cast<std::size_t>(range)];
            const int end = ranges[static_cast<std::size_t>(range) + 1];
            for (int place = begin; place < end; ++place) {
                const std::size_t here = static_cast<std::size_t>(place);
                run(order[here], place + 1 < end ? order[here + 1] : NONE);
            }
        });
        costs.clear();
    }

    // Page `number` of the block's sequence, of its K/V head.
    static const std::uint8_t* stored_page(const Store& store, const Block& block, int number) {
        return store.page(block.pages[number], block.kv_head);
    }

    // The pages of a block's segment, to be fetched.
    Ahead ahead_of(const Store& store, const Block& block, int segment) const {
        Ahead ahead;
        const int first = first_seen(position(block, block.row_begin)) / PAGE_TOKENS;
        const int last = last_position(block) / PAGE_TOKENS;
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
                sum_query<Key>(to, cache_.k_dim, keys_.group, scratch.query_sums + (begin + row) * MAX_GROUPS);
            }
        });
    }

    States stored_states(std::int64_t row) const {
        return {work_.maximum.data() + row, work_.sum.data() + row, work_.values.data() + row * cache_.v_dim};
    }

    void run_part(const Part& part, const Part* next) const {
        Scratch<Key> scratch;
        int rows = 0;
        for (int member = 0; member < part.count; ++member) {
            const Block& block = member_of(part, member);
            scratch.members[member] = &block;
            prepare_queries(block, rows, scratch);
            rows += block.rows();
        }
        run_segment(scratch.members, part.count, part.segment, part.common,
                    next == nullptr ? nullptr : &member_of(*next, 0), next == nullptr ? 0 : next->segment,
                    scratch, stored_states(part.row));
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
            const std::int64_t row = stored_row(block, segment);
            if (row != NONE) {
                merge_segment(all, stored_states(row), block.rows(), cache_.v_dim);
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
                first[rows] = std::max(first_seen(here) - base, 0);
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
        constexpr bool PAIRS = BFLOAT_PRODUCTS<Value>;
        const auto softmax = PAIRS && weighed.group == 0 ? softmax_segment<true> : softmax_segment<false>;
        for (int row = begin; row < end; ++row) {
            softmax(scratch.scores + row * SEGMENT_TOKENS, first[row], last[row], softmax_,
                    states.maximum[row], states.sum[row]);
        }
        const int group = weighed.group > 0 ? weighed.group : cache_.v_dim;
        const auto fold = [&](int dimension, int row_begin, int row_end, float* folded) {
            Scales scales;
            for (int member = 0, row = 0; member < count; ++member) {
                const int past = row + members[member]->rows();
                const int from = std::max(row, row_begin), to = std::min(past, row_end);
                row = past;
                if (from >= to) continue;
                find_scales(weighed, *members[member], segment, first[from] / PAGE_TOKENS, pages_of(to - 1),
                            scales);
                for (int which = from; which < to; ++which) {
                    const int at = which * SEGMENT_TOKENS;
                    scratch.starts[which] = fold_scales<PAIRS>(scratch.scores + at, first[which], last[which],
                                                               scales, dimension, folded + at);
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
    const lowbit_attention_batch& batch_;
    const float* q_;
    std::int64_t q_stride_;
    int q_heads_, group_;
    Softmax softmax_;
    const float* sinks_;
    float* out_;
    Workspace& work_;
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
