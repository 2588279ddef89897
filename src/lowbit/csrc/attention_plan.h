// What a call of attention computes: blocks of query rows, and of them parts that are computed before (attention.cpp).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention_softmax.h"
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

constexpr int BLOCK_ROWS = 48;  // a multiple of SCORE_ROWS and VALUE_ROWS; 48 rows of scores are 48 KiB
constexpr int STATE_ROWS = (BLOCK_ROWS + LANES - 1) / LANES * LANES;
constexpr int SHARED_ROWS = BLOCK_ROWS / 2;  // more rows of a sequence need no others beside them
constexpr int SHARED_PAGES = 4;              // fewer pages in common are not worth it
constexpr std::size_t MAX_STORED_FLOATS = std::size_t{1} << 24;  // 64 MiB of unmerged segments
constexpr std::int64_t ALONE_COST = 150'000;  // less work than waking a thread
constexpr int NONE = -1;

struct Block {
    const std::int32_t* pages;  // the sequence's row of the page table
    int first_token;            // row of q where the sequence begins
    int first_position;         // of that token
    int kv_head;
    int row_begin, row_end;
    int segment_begin, segment_end;
    int stored;  // where PlanWorkspace::stored begins for its segments, or NONE

    int rows() const { return row_end - row_begin; }
    int segments() const { return segment_end - segment_begin; }
};

// A segment of blocks that have its first `common` pages in common.
struct Part {
    int members, count;  // of PlanWorkspace::members
    int segment, common;
    std::int64_t row;  // where its rows are stored
};

// What a call plans; kept by the thread that calls, so that nothing is allocated in the end.
struct PlanWorkspace {
    std::vector<Block> blocks;
    std::vector<Part> parts;
    std::vector<int> members;           // numbers of blocks
    std::vector<std::int64_t> stored;   // by block and segment: its first row in the states below, or NONE
    std::vector<float> maximum, sum, values;
    std::vector<std::int64_t> costs;    // of what is to be run next: parts, then blocks
    std::vector<int> order, ranges;     // the costliest first; range i is ranges[i] .. ranges[i + 1] of them
    std::vector<int> alike, left, group;  // block of K/V head 0 of sequences that may share pages
};

class AttentionPlan {
  public:
    // ``group``: query heads of a K/V head.
    AttentionPlan(const lowbit_attention_cache& cache, const lowbit_attention_batch& batch, int group);

    // Finds the blocks, and then the parts.
    Status make();

    int position(const Block& block, int row) const { return block.first_position + row / group_; }
    int last_position(const Block& block) const { return position(block, block.row_end - 1); }
    int first_seen(int position) const {
        return cache_.window > 0 ? std::max(position - cache_.window + 1, 0) : 0;
    }

    const Block& member_of(const Part& part, int number) const {
        return block_of(work_.members[static_cast<std::size_t>(part.members + number)]);
    }
    // Where a block's segment is stored, or NONE.
    std::int64_t stored_row(const Block& block, int segment) const;
    States stored_states(std::int64_t row) const {
        return {work_.maximum.data() + row, work_.sum.data() + row, work_.values.data() + row * cache_.v_dim};
    }

    // run(a part, the one that this thread runs after it or null) for all of them; or a block.
    template <class Run>
    void run_parts(const Run& run) {
        run_all(work_.parts, run);
    }
    template <class Run>
    void run_blocks(const Run& run) {
        run_all(work_.blocks, run);
    }

  private:
    Block& block_of(int number) { return work_.blocks[static_cast<std::size_t>(number)]; }
    const Block& block_of(int number) const { return work_.blocks[static_cast<std::size_t>(number)]; }
    Status plan_blocks();
    void plan_parts();
    void split_blocks(std::int64_t& rows);
    bool too_many(std::int64_t rows) const;
    void add_part(const Part& part, std::int64_t& rows);
    int whole_pages(const Block& block, int segment) const;
    int common_pages(int left, int right, int segment) const;
    void find_shared(std::int64_t& rows);
    bool share(const std::vector<int>& group, int segment, int common, std::int64_t& rows);
    std::int64_t cost(const Block& block, int begin, int end) const;
    std::int64_t cost(const Part& part) const;
    std::int64_t cost(const Block& block) const;
    void order_costs();

    // A thread takes ranges: large ones first, and at the end such as leave no thread waiting long.
    template <class Item, class Run>
    void run_all(const std::vector<Item>& items, const Run& run) {
        if (items.empty()) return;
        work_.costs.clear();
        for (const Item& item : items) work_.costs.push_back(cost(item));
        order_costs();
        const PlanWorkspace& work = work_;
        parallel_for(static_cast<std::int64_t>(work.ranges.size()) - 1, [&](std::int64_t range) {
            const int begin = work.ranges[static_cast<std::size_t>(range)];
            const int end = work.ranges[static_cast<std::size_t>(range) + 1];
            const auto item = [&](int place) {
                return &items[static_cast<std::size_t>(work.order[static_cast<std::size_t>(place)])];
            };
            for (int place = begin; place < end; ++place) {
                run(*item(place), place + 1 < end ? item(place + 1) : nullptr);
            }
        });
    }

    const lowbit_attention_cache& cache_;
    const lowbit_attention_batch& batch_;
    const int group_;
    PlanWorkspace& work_;
};

}  // namespace lowbit
