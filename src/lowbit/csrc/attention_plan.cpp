// Which blocks of query rows a call of attention has, and which parts of them are computed before; see attention.cpp.

#include "attention_plan.h"

namespace lowbit {
namespace {

PlanWorkspace& workspace() {
    static thread_local PlanWorkspace mine;
    return mine;
}

}  // namespace

AttentionPlan::AttentionPlan(const lowbit_attention_cache& cache, const lowbit_attention_batch& batch, int group)
    : cache_(cache), batch_(batch), group_(group), work_(workspace()) {}

Status AttentionPlan::make() {
    const Status status = plan_blocks();
    if (status == OK) plan_parts();
    return status;
}

Status AttentionPlan::plan_blocks() {
    work_.blocks.clear();
    work_.parts.clear();
    work_.members.clear();
    work_.stored.clear();
    work_.alike.clear();
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

void AttentionPlan::plan_parts() {
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
void AttentionPlan::split_blocks(std::int64_t& rows) {
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

bool AttentionPlan::too_many(std::int64_t rows) const {
    return static_cast<std::size_t>(rows) * static_cast<std::size_t>(cache_.v_dim) > MAX_STORED_FLOATS;
}

std::int64_t AttentionPlan::stored_row(const Block& block, int segment) const {
    if (block.stored == NONE) return NONE;
    return work_.stored[static_cast<std::size_t>(block.stored + segment - block.segment_begin)];
}

// Its rows are stored from `rows` on, which grows by them.
void AttentionPlan::add_part(const Part& part, std::int64_t& rows) {
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
int AttentionPlan::whole_pages(const Block& block, int segment) const {
    const int base = segment * SEGMENT_TOKENS;
    const int pages = std::min((block.first_position + 1 - base) / PAGE_TOKENS, SEGMENT_PAGES);
    if (pages < (cache_.latent ? SEGMENT_PAGES : SHARED_PAGES)) return NONE;
    return first_seen(last_position(block)) <= base ? pages : 0;
}

// How many pages of a segment two sequences have in common, from its beginning on.
int AttentionPlan::common_pages(int left, int right, int segment) const {
    const int count =
        std::min(whole_pages(block_of(left), segment), whole_pages(block_of(right), segment));
    const std::int32_t *mine = block_of(left).pages + segment * SEGMENT_PAGES,
                       *other = block_of(right).pages + segment * SEGMENT_PAGES;
    return static_cast<int>(std::mismatch(mine, mine + std::max(count, 0), other).first - mine);
}

// Parts of the sequences in `alike` that begin a segment with the same pages: first those that share all
// of it, then of the others neighbours in the order of their pages. Without a window, whoever shares no
// whole segment is not looked at again: pages are shared from the first on.
void AttentionPlan::find_shared(std::int64_t& rows) {
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
                common = std::min(common, both / SUMMED_PAGES * SUMMED_PAGES);
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
bool AttentionPlan::share(const std::vector<int>& group, int segment, int common, std::int64_t& rows) {
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
std::int64_t AttentionPlan::cost(const Block& block, int begin, int end) const {
    return std::int64_t{block.rows() + 4} * std::max(end - begin, 0) * (cache_.k_dim + cache_.v_dim);
}
std::int64_t AttentionPlan::cost(const Part& part) const {
    std::int64_t sum = 0;
    for (int member = 0; member < part.count; ++member) {
        const Block& block = member_of(part, member);
        const int base = part.segment * SEGMENT_TOKENS;
        sum += cost(block, std::max(first_seen(position(block, block.row_begin)), base),
                    std::min(last_position(block) + 1, base + SEGMENT_TOKENS));
    }
    return sum;
}
std::int64_t AttentionPlan::cost(const Block& block) const {
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

// `order` and `ranges` of `costs`.
void AttentionPlan::order_costs() {
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
    } else {
        ranges.push_back(count);
    }
}

}  // namespace lowbit
