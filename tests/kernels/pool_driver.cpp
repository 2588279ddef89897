// Memory that runs out in a task of the thread pool: the caller is told, all other tasks have run, and the next
// job is like any other. Prints "ok" or what was wrong.
#include <atomic>
#include <cstdio>
#include <new>

#include "thread_pool.h"

namespace lowbit {
void release_tiles() {}
}  // namespace lowbit

namespace {

constexpr std::int64_t TASKS = 1000;

// Whether a job whose task ``bad`` finds no memory (-1: none does) ran whole and said so.
bool runs(std::int64_t bad, bool ranges) {
    std::atomic<std::int64_t> ran{0};
    const auto task = [&](std::int64_t i) {
        if (i == bad) throw std::bad_alloc();
        ran.fetch_add(1);
    };
    bool told = false;
    try {
        if (ranges) {
            lowbit::parallel_ranges(TASKS, task);
        } else {
            lowbit::parallel_for(TASKS, task);
        }
    } catch (const std::bad_alloc&) {
        told = true;
    }
    if (bad < 0) return !told && ran == TASKS;
    return told && (ranges || ran == TASKS - 1);
}

}  // namespace

int main() {
    lowbit::set_threads(3);
    for (int round = 0; round < 200; ++round) {
        for (const bool ranges : {false, true}) {
            for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{0}, std::int64_t{501}, TASKS - 1}) {
                if (!runs(bad, ranges)) {
                    std::printf("round %d, ranges %d, task %d\n", round, ranges, static_cast<int>(bad));
                    return 1;
                }
            }
        }
    }
    std::puts("ok");
    lowbit::set_threads(1);
    return 0;
}
