// The thread pool by itself: tasks that throw, jobs within tasks, a child process that is made while a job runs, and a
// system that has no more threads. Prints "ok" or what was wrong.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <thread>

#include "thread_pool.h"

namespace lowbit {
void release_tiles() {}
}  // namespace lowbit

namespace {

constexpr std::int64_t TASKS = 1000;

bool within(std::chrono::seconds limit, const std::atomic<int>& number, int wanted) {
    const auto end = std::chrono::steady_clock::now() + limit;
    while (number.load() < wanted) {
        if (std::chrono::steady_clock::now() > end) return false;
        std::this_thread::yield();
    }
    return true;
}

// Whether a job whose task ``bad`` throws an Error (-1: none does) said so, and ran whole where none does.
template <class Error>
bool runs(std::int64_t bad, bool ranges) {
    std::atomic<std::int64_t> ran{0};
    const auto task = [&](std::int64_t i) {
        if (i == bad) throw Error();
        ran.fetch_add(1);
    };
    bool told = false;
    try {
        if (ranges) {
            lowbit::parallel_ranges(TASKS, task);
        } else {
            lowbit::parallel_for(TASKS, task);
        }
    } catch (const Error&) {
        told = true;
    }
    return bad < 0 ? !told && ran == TASKS : told && ran < TASKS;
}

struct Strange : std::runtime_error {
    Strange() : std::runtime_error("strange") {}
};
struct Odd {};  // no std::exception

bool all_run() {
    for (int round = 0; round < 200; ++round) {
        for (const bool ranges : {false, true}) {
            for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{0}, std::int64_t{501}, TASKS - 1}) {
                if (runs<std::bad_alloc>(bad, ranges) && runs<Strange>(bad, ranges) && runs<Odd>(bad, ranges)) {
                    continue;
                }
                std::printf("round %d, ranges %d, task %d\n", round, ranges, static_cast<int>(bad));
                return false;
            }
        }
    }
    return true;
}

// A job within each task of another one.
bool nested_runs() {
    std::atomic<std::int64_t> ran{0};
    lowbit::parallel_for(10, [&](std::int64_t) {
        lowbit::parallel_for(TASKS, [&](std::int64_t) { ran.fetch_add(1); });
        lowbit::set_threads(5);  // does nothing here
    });
    return ran == 10 * TASKS && lowbit::thread_count() == 3;
}

// One task is no job: what it starts is shared. Both wait for each other.
bool single_shares() {
    std::atomic<int> there{0};
    std::atomic<bool> met{true};
    lowbit::parallel_for(1, [&](std::int64_t) {
        lowbit::parallel_for(2, [&](std::int64_t) {
            there.fetch_add(1);
            if (!within(std::chrono::seconds(20), there, 2)) met = false;
        });
    });
    return met;
}

// A child that is made by another thread than the one whose job runs.
bool child_begins_anew() {
    std::atomic<int> begun{0};
    std::atomic<bool> go_on{false};
    std::thread caller([&] {
        lowbit::parallel_for(2, [&](std::int64_t) {
            begun.fetch_add(1);
            while (!go_on.load()) std::this_thread::yield();
        });
    });
    within(std::chrono::seconds(20), begun, 2);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        const bool alone = lowbit::thread_count() == 1 && runs<Odd>(-1, false);
        lowbit::set_threads(2);
        _exit(alone && lowbit::thread_count() == 2 && runs<Odd>(-1, true) && runs<Odd>(5, false) ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    go_on = true;
    caller.join();
    return status == 0;
}

// Stacks of 512 threads are more than this process may have.
bool takes_what_there_is() {
    rlimit before{};
    getrlimit(RLIMIT_AS, &before);
    const rlimit tight{rlim_t{1} << 29, before.rlim_max};
    setrlimit(RLIMIT_AS, &tight);
    lowbit::set_threads(512);
    const int threads = lowbit::thread_count();
    const bool right = threads >= 1 && threads < 512 && runs<Odd>(-1, false);
    setrlimit(RLIMIT_AS, &before);
    lowbit::set_threads(3);
    return right && lowbit::thread_count() == 3 && runs<Odd>(-1, true);
}

bool says(bool right, const char* what) {
    if (!right) std::printf("%s\n", what);
    return right;
}

}  // namespace

int main() {
    lowbit::set_threads(3);
    const bool right = says(all_run(), "a task throws") && says(nested_runs(), "a job within a task") &&
                       says(single_shares(), "a job within a single task") && says(child_begins_anew(), "a child process") &&
                       says(takes_what_there_is(), "no more threads");
    lowbit::set_threads(1);
    if (right) std::puts("ok");
    return right ? 0 : 1;
}
