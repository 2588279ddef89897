// A persistent thread pool: parallel_for(tasks, function) runs function(task) for every task in 0..tasks.
//
// The caller is worker 0. Tasks are claimed one by one, so which thread runs a task is not fixed: a task's
// result must not depend on it. Workers spin for the next job, which a decode step issues every few microseconds
// and the next step within a millisecond, and then sleep on a futex; soon, where others want the processor.
// Where a task throws, the caller gets that exception (of several the first) once no task of its job runs any more; tasks
// that had not begun are left out.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace lowbit {

using TaskFunction = void (*)(void* context, std::int64_t task);

// Threads that work, the caller included: as many as were set, or fewer where the system has no more.
int thread_count();
void set_threads(int count);

// Runs tasks on the pool; inline where there is one task, one thread, or another caller holds the pool, and within a task.
void run_tasks(std::int64_t tasks, TaskFunction function, void* context);

template <typename Function>
void parallel_for(std::int64_t tasks, Function&& function) {
    using Plain = std::remove_reference_t<Function>;
    run_tasks(
        tasks, [](void* context, std::int64_t task) { (*static_cast<Plain*>(context))(task); },
        const_cast<void*>(static_cast<const void*>(&function)));
}

// The same, but that every thread walks a range of consecutive tasks, so that what they read is one stream, and
// then helps with what is left of the others'.
template <typename Function>
void parallel_ranges(std::int64_t tasks, Function&& function) {
    constexpr std::int64_t MOST = 64;
    struct alignas(64) Range {
        std::atomic<std::int64_t> next;
        std::int64_t end;
    };
    Range ranges[MOST];
    const std::int64_t count = std::min<std::int64_t>({thread_count(), tasks, MOST});
    for (std::int64_t i = 0; i < count; ++i) {
        ranges[i].next.store(tasks * i / count, std::memory_order_relaxed);
        ranges[i].end = tasks * (i + 1) / count;
    }
    parallel_for(count, [&](std::int64_t own) {
        for (std::int64_t i = 0; i < count; ++i) {
            Range& range = ranges[(own + i) % count];
            for (;;) {
                const std::int64_t task = range.next.fetch_add(1, std::memory_order_relaxed);
                if (task >= range.end) break;
                function(task);
            }
        }
    });
}

}  // namespace lowbit
