// Decode steps one after another: a plan is run, tokens are chosen and written where the next run reads them.
//
// What Python does between two steps takes 0.3 ms of a small model's 3.6, since the weights have driven its code and data
// out of the caches. Tokens, their order and their bits are those of steps taken singly.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "lowbit.h"
#include "sampling.h"

LOWBIT_EXPORT std::int64_t lowbit_plan_run(const std::int64_t* words, std::int64_t count, std::int32_t* status);

extern "C" {

// What kernels/decode_steps.py describes; field for field its ctypes struct.
struct lowbit_decode_steps {
    // The plan's inputs, one token of each sequence; the first step's are there.
    std::int32_t* tokens;
    std::int32_t* positions;
    std::int32_t* write_slots;
    std::int32_t* context_lengths;
    const std::int32_t* page_table;  // (sequences, pages)
    std::int64_t pages, page_size, sequences;
    // What it leaves: (sequences, width) logits.
    float* logits;
    std::int64_t stride, width;
    // How tokens are chosen; positions and what was said are the first step's.
    const lowbit_draw* draws;
    // Tokens after which a sequence ends: ``stops[stop_ends[i - 1]]`` to ``stops[stop_ends[i]]``, exclusive.
    const std::int64_t* stops;
    const std::int64_t* stop_ends;
    std::int64_t most;  // steps; all their tokens' places are in the page table
    // (steps, sequences): the tokens chosen and the largest logits.
    std::int64_t* chosen;
    float* peaks;
};

}  // extern "C"

namespace lowbit {
namespace {

constexpr std::int32_t BAD_LOGITS = -2, NO_MEMORY = -3;

// How a sequence's tokens are chosen, step by step. What it says counts for its penalties, in a copy of its lists: whoever
// keeps those learns afterwards what was said.
class Rule {
  public:
    Rule(const lowbit_draw& draw, std::int64_t most) : draw_(draw) {
        if (draw.changes == nullptr) return;
        const lowbit_logit_changes& changes = *draw.changes;
        said_.reserve(static_cast<std::size_t>(changes.said_count + most));
        said_.assign(changes.said, changes.said + changes.said_count);
        counts_.assign(changes.counts, changes.counts + changes.said_count);
        changes_ = changes;
    }

    bool takes_peak() const { return draw_.temperature == 0.0f && draw_.changes == nullptr; }

    // Valid until something is said.
    lowbit_draw next() {
        lowbit_draw draw = draw_;
        if (draw.changes != nullptr) {
            changes_.said = said_.data();
            changes_.counts = counts_.data();
            changes_.said_count = static_cast<std::int64_t>(said_.size());
            draw.changes = &changes_;
        }
        return draw;
    }

    void say(std::int64_t token) {
        ++draw_.position;
        const bool penalized = changes_.repetition != 1.0 || changes_.frequency != 0.0 || changes_.presence != 0.0;
        if (draw_.changes == nullptr || !penalized) return;
        const auto place = std::find(said_.begin(), said_.end(), token) - said_.begin();
        if (place == static_cast<std::ptrdiff_t>(said_.size())) {
            said_.push_back(token);
            counts_.push_back(0);
        }
        ++counts_[static_cast<std::size_t>(place)];
    }

  private:
    lowbit_draw draw_;
    lowbit_logit_changes changes_{};
    std::vector<std::int64_t> said_;
    std::vector<std::int32_t> counts_;
};

// 0 or a status of those above.
std::int32_t choose(const lowbit_decode_steps& steps, std::vector<Rule>& rules, std::int64_t* chosen, float* peaks) {
    if (lowbit_row_peaks(steps.logits, steps.stride, steps.sequences, steps.width, peaks, chosen) != 0) return BAD_LOGITS;
    static thread_local std::vector<lowbit_draw> drawn;
    static thread_local std::vector<std::int64_t> tokens;
    drawn.clear();
    for (std::size_t i = 0; i < rules.size(); ++i) {
        if (!rules[i].takes_peak() && std::isfinite(peaks[i])) drawn.push_back(rules[i].next());
    }
    if (drawn.empty()) return 0;
    tokens.resize(drawn.size());
    const int status = lowbit_draw_tokens(steps.logits, steps.stride, steps.width, peaks, drawn.data(),
                                          static_cast<std::int64_t>(drawn.size()), tokens.data());
    if (status != 0) return status == 2 ? NO_MEMORY : BAD_LOGITS;
    for (std::size_t i = 0; i < drawn.size(); ++i) chosen[drawn[i].row] = tokens[i];
    return 0;
}

// Whether a sequence ends with these tokens, or has none because its logits are no numbers.
bool ends(const lowbit_decode_steps& steps, const std::int64_t* chosen, const float* peaks) {
    for (std::int64_t i = 0; i < steps.sequences; ++i) {
        const std::int64_t* first = steps.stops + (i == 0 ? 0 : steps.stop_ends[i - 1]);
        const std::int64_t* last = steps.stops + steps.stop_ends[i];
        if (!std::isfinite(peaks[i]) || std::find(first, last, chosen[i]) != last) return true;
    }
    return false;
}

void advance(const lowbit_decode_steps& steps, const std::int64_t* chosen) {
    for (std::int64_t i = 0; i < steps.sequences; ++i) {
        const std::int64_t position = ++steps.positions[i];
        const std::int32_t page = steps.page_table[i * steps.pages + position / steps.page_size];
        steps.tokens[i] = static_cast<std::int32_t>(chosen[i]);
        steps.write_slots[i] = static_cast<std::int32_t>(page * steps.page_size + position % steps.page_size);
        ++steps.context_lengths[i];
    }
}

}  // namespace
}  // namespace lowbit

// Runs the plan until a sequence ends, ``most`` times at most; ``done``: how many times. -1, or the index of the operation
// that failed with ``status``; where choosing tokens failed, -2 (no logits) or -3 (no memory).
LOWBIT_EXPORT std::int64_t lowbit_plan_decode(const std::int64_t* words, std::int64_t count, std::int32_t* status,
                                              const lowbit_decode_steps* steps, std::int64_t* done) {
    using namespace lowbit;
    try {
        std::vector<Rule> rules;
        for (std::int64_t i = 0; i < steps->sequences; ++i) rules.emplace_back(steps->draws[i], steps->most);
        for (*done = 0; *done < steps->most;) {
            std::int64_t* chosen = steps->chosen + *done * steps->sequences;
            float* peaks = steps->peaks + *done * steps->sequences;
            const std::int64_t failed = lowbit_plan_run(words, count, status);
            if (failed >= 0) return failed;
            if (const std::int32_t bad = choose(*steps, rules, chosen, peaks); bad != 0) return bad;
            if (++*done == steps->most || ends(*steps, chosen, peaks)) break;
            advance(*steps, chosen);
            for (std::size_t i = 0; i < rules.size(); ++i) rules[i].say(chosen[i]);
        }
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
    return -1;
}
