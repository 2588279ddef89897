// Tokens drawn from rows of logits, and log-probabilities: what sampling does with a whole vocabulary.
//
// A row becomes weights, exp(logit / temperature) over the largest of them, which is exactly 1; beside them stand the sum
// and the largest of every 128. A draw from all tokens walks these sums. For top-k and top-p the tokens' order matters, but
// hardly any of it: tokens too small to be kept are left out by the largest of their 128, the others fall into buckets of
// equal exponent and leading bits, and of these only the two are sorted in which what is kept ends and what is drawn lies.
//
// Sums of 128 weights are float32 and all further ones float64, in an order that depends on the row alone: equal logits give
// equal tokens, on any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <optional>
#include <vector>

#include "lowbit.h"
#include "row_tasks.h"
#include "sampling.h"
#include "thread_pool.h"
#include "vector16.h"

namespace lowbit {
namespace {

constexpr int BLOCK = 128;                 // weights with a sum of their own
constexpr std::int64_t WIDEST = 1 << 30;   // tokens are 32 bits of a key
constexpr int LEADING = 20;                // bits of a weight that its bucket does not show: three of a significand are left
constexpr std::uint32_t ONE = 0x3F800000;  // 1.0f
constexpr int BUCKETS = (ONE >> LEADING) + 1;

// The first uniform number in [0, 1) of the generator Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1,
// 2, 3", 2011), ten rounds, whose key is ``seed`` and whose counter starts at ``position``: numpy's Philox(key, counter).
double uniform_number(std::uint64_t seed, std::uint64_t position) {
    std::uint64_t counter[4] = {position + 1, position + 1 == 0, 0, 0}, key[2] = {seed, 0};
    for (int round = 0; round < 10; ++round) {
        const auto first = static_cast<unsigned __int128>(counter[0]) * 0xD2E7470EE14C6C93u;
        const auto second = static_cast<unsigned __int128>(counter[2]) * 0xCA5A826395121157u;
        const std::uint64_t next[] = {
            static_cast<std::uint64_t>(second >> 64) ^ counter[1] ^ key[0], static_cast<std::uint64_t>(second),
            static_cast<std::uint64_t>(first >> 64) ^ counter[3] ^ key[1], static_cast<std::uint64_t>(first)};
        std::copy(next, next + 4, counter);
        key[0] += 0x9E3779B97F4A7C15u;
        key[1] += 0xBB67AE8584CAA73Bu;
    }
    return static_cast<double>(counter[0] >> 11) * 0x1p-53;
}

// A row's weights, zeros behind the last up to a whole block.
struct Weights {
    std::vector<float> each, peaks;  // peaks: the largest of each block
    std::vector<double> sums;        // of each block
    double total;

    // ``peak``: the largest logit. Weights below ``least`` are 0.
    void fill(const float* logits, std::int64_t width, float peak, float temperature, float least) {
        const std::size_t blocks = static_cast<std::size_t>((width + BLOCK - 1) / BLOCK);
        each.resize(blocks * BLOCK);
        peaks.resize(blocks);
        sums.resize(blocks);
        total = 0.0;
        const Vector16 heat = broadcast(temperature), top = broadcast(peak / temperature), floor = broadcast(least);
        for (std::size_t block = 0; block < blocks; ++block) {
            const auto first = static_cast<std::int64_t>(block) * BLOCK;
            float* weights = each.data() + first;
            Vector16 sum = zeros(), best = zeros();
            for (int vector = 0; vector < BLOCK / LANES; ++vector) {
                const std::int64_t column = first + vector * LANES;
                const int lanes = static_cast<int>(std::clamp<std::int64_t>(width - column, 0, LANES));
                Vector16 weight = zeros();
                if (lanes > 0) {
                    weight = exp(subtract(divide(load_some(logits + column, lanes), heat), top));
                    weight = select(less(weight, floor), zeros(), weight);
                }
                if (lanes < LANES) weight = select(lane_range(0, lanes), weight, zeros());
                store(weights + vector * LANES, weight);
                sum = add(sum, weight);
                best = maximum(best, weight);
            }
            peaks[block] = reduce_max(best);
            sums[block] = reduce_add(sum);
            total += sums[block];
        }
    }

    // The first token at which the sum of the weights so far exceeds ``target``; the last there is, where rounding keeps
    // it below.
    std::int64_t token_at(double target) const {
        double sum = 0.0;
        std::int64_t last = 0;
        for (std::size_t block = 0; block < sums.size(); ++block) {
            if (peaks[block] > 0.0f) last = static_cast<std::int64_t>(block) * BLOCK;
            if (sum + sums[block] <= target) {
                sum += sums[block];
                continue;
            }
            for (int i = 0; i < BLOCK; ++i) {
                const std::int64_t token = static_cast<std::int64_t>(block) * BLOCK + i;
                sum += each[static_cast<std::size_t>(token)];
                if (each[static_cast<std::size_t>(token)] > 0.0f && sum > target) return token;
            }
        }
        std::int64_t found = last;
        for (int i = 0; i < BLOCK; ++i) {
            if (each[static_cast<std::size_t>(last + i)] > 0.0f) found = last + i;
        }
        return found;
    }

    // Below the ``count``-th largest number: as many blocks have one that is larger.
    float bound(std::int64_t count, std::vector<float>& sorted) const {
        if (count > static_cast<std::int64_t>(peaks.size())) return MINUS_INFINITY;
        sorted = peaks;
        std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), std::greater<float>());
        return std::nextafter(sorted[static_cast<std::size_t>(count - 1)], MINUS_INFINITY);
    }
};

// found(place) for each of the numbers from ``first`` to ``end`` that is larger than ``above``.
template <class Found>
void for_larger(const float* numbers, std::int64_t first, std::int64_t end, float above, const Found& found) {
    for (std::int64_t place = first; place < end; place += LANES) {
        const int lanes = static_cast<int>(std::min<std::int64_t>(end - place, LANES));
        const Lanes larger = less(broadcast(above), load_some(numbers + place, lanes));
        if (!any(lanes < LANES ? both(larger, lane_range(0, lanes)) : larger)) continue;
        for (std::int64_t i = place; i < place + lanes; ++i) {
            if (numbers[i] > above) found(i);
        }
    }
}

// Keys sort by their upper half, of equal ones by token.
std::uint64_t key_of(std::uint32_t order, std::int64_t token) {
    return static_cast<std::uint64_t>(order) << 32 | static_cast<std::uint64_t>(token);
}
std::int64_t token_of(std::uint64_t key) { return static_cast<std::int64_t>(key & 0xFFFFFFFFu); }

// Tokens by weight, the largest first, and of equal ones the first: as far as anybody asks.
class Ranking {
  public:
    // Of the weights > ``above``, which is 0 or more. Their sum.
    double fill(const Weights& weights, float above) {
        found_.clear();
        buckets_.assign(BUCKETS, Bucket{});
        for (std::size_t block = 0; block < weights.peaks.size(); ++block) {
            if (!(weights.peaks[block] > above)) continue;
            const auto first = static_cast<std::int64_t>(block) * BLOCK;
            for_larger(weights.each.data(), first, first + BLOCK, above, [&](std::int64_t token) {
                const float weight = weights.each[static_cast<std::size_t>(token)];
                std::uint32_t bits;
                std::memcpy(&bits, &weight, sizeof bits);
                const std::uint32_t below = ONE - std::min(bits, ONE);
                found_.push_back(key_of(below, token));
                Bucket& bucket = buckets_[below >> LEADING];
                ++bucket.end;  // a count at first
                bucket.sum += weight;
            });
        }
        std::size_t end = 0;
        double sum = 0.0;
        for (Bucket& bucket : buckets_) {
            bucket.begin = end;
            end += bucket.end;
            bucket.end = bucket.begin;
            sum += bucket.sum;
        }
        keys_.resize(found_.size());
        for (const std::uint64_t key : found_) keys_[buckets_[key >> (32 + LEADING)].end++] = key;
        kept_ = keys_.size();
        return sum;
    }

    std::size_t size() const { return keys_.size(); }

    // Keeps the first tokens: until their sum is ``most`` or more, ``count`` at most, one at least. Their sum.
    double keep(double most, std::size_t count) {
        double sum = 0.0;
        std::size_t kept = 0;
        for (Bucket& bucket : buckets_) {
            if (kept == kept_) break;
            const std::size_t here = bucket.end - bucket.begin;
            if (sum + bucket.sum < most && kept + here <= std::min(count, kept_)) {
                sum += bucket.sum;
                kept += here;
                continue;
            }
            sort(bucket);
            for (std::size_t i = bucket.begin; i < bucket.end; ++i) {
                if (kept > 0 && (sum >= most || kept >= std::min(count, kept_))) {
                    kept_ = kept;
                    return sum;
                }
                sum += weight_of(keys_[i]);
                ++kept;
            }
        }
        kept_ = kept;
        return sum;
    }

    // Of the kept ones the first at which their sum exceeds ``target``; the last, where rounding keeps it below.
    std::int64_t token_at(double target) {
        double sum = 0.0;
        std::size_t passed = 0;
        std::uint64_t last = keys_[0];
        for (Bucket& bucket : buckets_) {
            const std::size_t here = bucket.end - bucket.begin;
            if (here == 0) continue;
            if (sum + bucket.sum <= target && passed + here < kept_) {
                sum += bucket.sum;
                passed += here;
                continue;
            }
            sort(bucket);
            for (std::size_t i = bucket.begin; i < bucket.end && passed < kept_; ++i, ++passed) {
                last = keys_[i];
                sum += weight_of(last);
                if (sum > target) return token_of(last);
            }
            if (passed == kept_) break;
        }
        return token_of(last);
    }

  private:
    struct Bucket {
        std::size_t begin = 0, end = 0;
        double sum = 0.0;
        bool sorted = false;
    };

    static float weight_of(std::uint64_t key) {
        const std::uint32_t bits = ONE - static_cast<std::uint32_t>(key >> 32);
        float weight;
        std::memcpy(&weight, &bits, sizeof weight);
        return weight;
    }
    void sort(Bucket& bucket) {
        const auto at = [&](std::size_t place) { return keys_.begin() + static_cast<std::ptrdiff_t>(place); };
        if (!bucket.sorted) std::sort(at(bucket.begin), at(bucket.end));
        bucket.sorted = true;
    }

    std::vector<std::uint64_t> found_, keys_;  // what a weight lacks to 1, in bits, above its token
    std::vector<Bucket> buckets_;
    std::size_t kept_ = 0;
};

// What a thread computes in, grown and kept.
struct Scratch {
    Weights weights;
    Ranking ranking;
    std::vector<float> sorted, kept;
    std::vector<std::uint64_t> keys;
};

Scratch& own_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

std::int64_t draw(const float* logits, std::int64_t width, float peak, const lowbit_draw& rule) {
    Scratch& scratch = own_scratch();
    Weights& weights = scratch.weights;
    weights.fill(logits, width, peak, rule.temperature, static_cast<float>(rule.min_p));
    const double uniform = uniform_number(rule.seed, rule.position);
    const bool limited = rule.top_k > 0 && rule.top_k < width;
    if (!limited && rule.top_p >= 1.0) return weights.token_at(uniform * weights.total);
    Ranking& ranking = scratch.ranking;
    double kept = weights.total;
    if (limited) {
        ranking.fill(weights, std::max(weights.bound(rule.top_k, scratch.sorted), 0.0f));
        constexpr double ALL = std::numeric_limits<double>::infinity();
        if (ranking.size() > 0) kept = ranking.keep(ALL, static_cast<std::size_t>(rule.top_k));
    } else {
        // All that are smaller have no more than what top-p leaves out, with room for roundings; but mostly far fewer do.
        const double wanted = rule.top_p * kept;
        const auto least = static_cast<float>(0.999 * (kept - wanted) / static_cast<double>(width));
        for (const float above : {0x1p-6f, 0x1p-10f, least}) {
            if (ranking.fill(weights, std::max(above, least)) >= wanted) break;
        }
    }
    if (ranking.size() == 0) return 0;  // of NaN
    if (rule.top_p < 1.0) kept = ranking.keep(rule.top_p * kept, ranking.size());
    return ranking.token_at(uniform * kept);
}

// A row under its changes, for as long as this lives.
class Changed {
  public:
    Changed(float* logits, const lowbit_logit_changes& changes, std::vector<float>& kept)
        : logits_(logits), changes_(changes), kept_(kept) {
        kept.resize(static_cast<std::size_t>(changes.biases + changes.said_count));
        float* before = kept.data();
        for (std::int64_t i = 0; i < changes.biases; ++i) {
            float& logit = logits[changes.biased[i]];
            *before++ = logit;
            logit += changes.bias[i];
        }
        const auto repetition = static_cast<float>(changes.repetition);
        const auto reward = static_cast<float>(1.0 / changes.repetition);
        const auto frequency = static_cast<float>(changes.frequency), presence = static_cast<float>(changes.presence);
        for (std::int64_t i = 0; i < changes.said_count; ++i) {
            float& logit = logits[changes.said[i]];
            *before++ = logit;
            if (repetition != 1.0f) logit *= logit > 0.0f ? reward : repetition;
            logit -= static_cast<float>(changes.counts[i]) * frequency;
            if (changes.counts[i] > 0) logit -= presence;
        }
    }
    ~Changed() {  // the last change first: a token may be in both lists
        const float* before = kept_.data() + kept_.size();
        for (std::int64_t i = changes_.said_count; i-- > 0;) logits_[changes_.said[i]] = *--before;
        for (std::int64_t i = changes_.biases; i-- > 0;) logits_[changes_.biased[i]] = *--before;
    }
    Changed(const Changed&) = delete;
    Changed& operator=(const Changed&) = delete;

  private:
    float* logits_;
    const lowbit_logit_changes& changes_;
    std::vector<float>& kept_;
};

std::int64_t choose(float* logits, std::int64_t width, float peak, const lowbit_draw& rule) {
    if (rule.changes == nullptr && rule.temperature > 0.0f) return draw(logits, width, peak, rule);
    std::optional<Changed> changed;
    if (rule.changes != nullptr) changed.emplace(logits, *rule.changes, own_scratch().kept);
    std::int64_t likeliest = 0;
    lowbit_row_peaks(logits, width, 1, width, &peak, &likeliest);
    return rule.temperature > 0.0f ? draw(logits, width, peak, rule) : likeliest;
}

// Numbers in the order of their bits, the largest first.
std::uint32_t descending(float number) {
    std::uint32_t bits;
    number += 0.0f;  // -0 equals 0
    std::memcpy(&bits, &number, sizeof bits);
    return (bits & 0x80000000u) != 0 ? bits : ~bits & 0x7FFFFFFFu;
}

// The ``count`` largest, of equal ones the first; false where NaN leave fewer.
bool largest(const float* logits, std::int64_t width, std::int64_t count, std::int64_t* tokens) {
    Scratch& scratch = own_scratch();
    std::vector<float>& peaks = scratch.weights.peaks;
    const std::int64_t blocks = (width + BLOCK - 1) / BLOCK;
    peaks.resize(static_cast<std::size_t>(blocks));
    for (std::int64_t block = 0; block < blocks; ++block) {
        const std::int64_t first = block * BLOCK, end = std::min(first + BLOCK, width);
        Vector16 best = broadcast(MINUS_INFINITY);
        std::int64_t column = first;
        for (; column + LANES <= end; column += LANES) best = maximum(best, load(logits + column));
        float peak = reduce_max(best);
        for (; column < end; ++column) peak = std::max(peak, logits[column]);
        peaks[static_cast<std::size_t>(block)] = peak;
    }
    const float above = scratch.weights.bound(count, scratch.sorted);
    std::vector<std::uint64_t>& keys = scratch.keys;
    keys.clear();
    for (std::int64_t block = 0; block < blocks; ++block) {
        if (!(peaks[static_cast<std::size_t>(block)] > above)) continue;
        const std::int64_t first = block * BLOCK, end = std::min(first + BLOCK, width);
        for_larger(logits, first, end, above,
                   [&](std::int64_t token) { keys.push_back(key_of(descending(logits[token]), token)); });
    }
    if (static_cast<std::int64_t>(keys.size()) < count) return false;
    const auto end = keys.begin() + static_cast<std::ptrdiff_t>(count);
    std::partial_sort(keys.begin(), end, keys.end());
    std::transform(keys.begin(), end, tokens, token_of);
    return true;
}

}  // namespace
}  // namespace lowbit

LOWBIT_EXPORT int lowbit_draw_tokens(float* logits, std::int64_t stride, std::int64_t width, const float* peaks,
                                     const lowbit_draw* draws, std::int64_t count, std::int64_t* tokens) {
    using namespace lowbit;
    if (width < 1 || width > WIDEST) return 1;
    for (std::int64_t index = 0; index < count; ++index) {
        const lowbit_logit_changes* changes = draws[index].changes;
        const auto within = [&](std::int64_t token) { return 0 <= token && token < width; };
        if (changes != nullptr && !(std::all_of(changes->biased, changes->biased + changes->biases, within) &&
                                    std::all_of(changes->said, changes->said + changes->said_count, within))) {
            return 1;
        }
    }
    try {
        parallel_for(count, [&](std::int64_t index) {
            const lowbit_draw& rule = draws[index];
            tokens[index] = choose(logits + rule.row * stride, width, peaks[rule.row], rule);
        });
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}

// The logarithm of the sum of exp(logit) of one row, whose largest, finite, is ``peak``; and its ``alternatives`` largest,
// as many as there are at most. 0, 1 and 2 as for draws, 1 also where too many are NaN.
LOWBIT_EXPORT int lowbit_rate_row(const float* logits, std::int64_t width, float peak, std::int64_t alternatives,
                                  double* normalizer, std::int64_t* tokens) {
    using namespace lowbit;
    if (width < 1 || width > WIDEST || alternatives > width) return 1;
    try {
        Weights& weights = own_scratch().weights;
        weights.fill(logits, width, peak, 1.0f, 0.0f);
        *normalizer = std::log(weights.total) + static_cast<double>(peak);
        if (alternatives > 0 && !largest(logits, width, alternatives, tokens)) return 1;
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}
