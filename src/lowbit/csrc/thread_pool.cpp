#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "amx_tiles.h"
#include "intrinsics.h"
#include "lowbit.h"

namespace lowbit {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int SPINS_BEFORE_YIELD = 1000;  // about 12 microseconds of pause instructions
constexpr int SPINS_BEFORE_SLEEP = 4000;  // and before the clock is looked at
// Waking a worker that sleeps costs up to half a millisecond where other programs run meanwhile, so without work it
// stays awake for longer than what lies between two steps. Not where others want the processor: who slept gets it back
// sooner than who spun. They do where a worker that was awake went without it for a tenth of the time: what only
// interrupts it, often some ten times a second, takes less.
constexpr std::chrono::milliseconds AWAKE{2};
constexpr std::chrono::milliseconds CROWDED{100};
constexpr std::chrono::milliseconds WATCHED{20};
constexpr std::chrono::milliseconds LOST{2};
// A worker that is woken may be put on the processor that wakes it, and the two then take turns there while another one
// idles. So it leaves the caller's, no more often than this.
constexpr std::chrono::milliseconds MOVED{5};

// A wait for another value than ``seen``, which may also end early, and its end.
#if defined(__linux__)
void wait_for_change(std::atomic<std::uint32_t>& word, std::uint32_t seen) {
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void wake_all(std::atomic<std::uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
// Never destroyed, as the pool. A child process must not fork while they are held: only for an instant each.
std::mutex& sleep_mutex = *new std::mutex;
std::condition_variable& changed = *new std::condition_variable;

void wait_for_change(std::atomic<std::uint32_t>& word, std::uint32_t seen) {
    std::unique_lock<std::mutex> guard(sleep_mutex);
    changed.wait(guard, [&] { return word.load() != seen; });
}

void wake_all(std::atomic<std::uint32_t>&) {
    { const std::lock_guard<std::mutex> guard(sleep_mutex); }  // nobody is between its look and its sleep
    changed.notify_all();
}
#endif

std::chrono::nanoseconds processor_time() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

// Which of a worker's waits may be long.
class Patience {
  public:
    Patience() { watch(Clock::now(), processor_time()); }

    Clock::time_point until() {
        const auto now = Clock::now();
        const auto used = processor_time();
        const auto watched = now - since_;
        const bool crowded = watched - (used - used_) > std::max<Clock::duration>(LOST, watched / 10);
        if (crowded) crowded_until_ = now + CROWDED;
        if (crowded || watched > WATCHED) watch(now, used);
        return now < crowded_until_ ? now : now + AWAKE;
    }
    // It slept, which is no loss.
    void woke() { watch(Clock::now(), processor_time()); }

  private:
    void watch(Clock::time_point now, std::chrono::nanoseconds used) {
        since_ = now;
        used_ = used;
    }

    Clock::time_point since_{}, crowded_until_{};
    std::chrono::nanoseconds used_{};
};

#if defined(__linux__)
int current_processor() { return sched_getcpu(); }

// Goes on on another processor that this thread may use, if there is one.
void leave_processor(int processor) {
    cpu_set_t allowed;
    if (processor < 0 || processor >= CPU_SETSIZE || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    cpu_set_t others = allowed;
    CPU_CLR(processor, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
    sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
int current_processor() { return -1; }
void leave_processor(int) {}
#endif

// Whether this thread runs a task of the pool, or waits for those of its job. A mutex may not be tried by the thread that
// holds it.
thread_local bool in_a_job = false;

class ThreadPool {
  public:
    int threads() const { return threads_.load(std::memory_order_relaxed); }

    // As many as can be had: where a limit on processes or memory allows fewer, those there are.
    void resize(int count) {
        if (in_a_job) return;  // which would wait for itself
        const std::lock_guard<std::mutex> guard(mutex_);
        count = std::max(count, 1);
        if (count == threads()) return;
        stop();
        stopping_.store(false);
        try {
            for (int i = 1; i < count; ++i) workers_.emplace_back([this] { work(); });
        } catch (const std::system_error&) {
        } catch (const std::bad_alloc&) {
        }
        threads_.store(static_cast<int>(workers_.size()) + 1, std::memory_order_relaxed);
    }

    void run(std::int64_t tasks, TaskFunction function, void* context) {
        // A task that calls parallel_for itself, or a second caller, does its work alone.
        if (tasks <= 1 || tasks > INT32_MAX || in_a_job) return run_alone(tasks, function, context);
        std::unique_lock<std::mutex> guard(mutex_, std::try_to_lock);
        if (guard.owns_lock() && workers_.empty()) guard.unlock();
        if (!guard.owns_lock()) return run_alone(tasks, function, context);
        const InAJob own;
        function_.store(function, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        tasks_.store(static_cast<std::uint32_t>(tasks), std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        processor_.store(current_processor(), std::memory_order_relaxed);
        const std::uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
        ticket_.store(static_cast<std::uint64_t>(epoch) << 32 | static_cast<std::uint64_t>(tasks),
                      std::memory_order_release);
        epoch_.store(epoch, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) wake_all(epoch_);
        claim(epoch);
        for (int spins = 0; done_.load(std::memory_order_acquire) != static_cast<std::uint32_t>(tasks); ++spins) {
            if (spins < SPINS_BEFORE_YIELD) {
                spin_pause();
            } else {
                sched_yield();
            }
        }
        if (failed_.load(std::memory_order_relaxed)) {
            const std::exception_ptr error = std::move(error_);
            error_ = nullptr;
            failed_.store(false, std::memory_order_relaxed);
            std::rethrow_exception(error);
        }
    }

  private:
    struct InAJob {
        InAJob() { in_a_job = true; }
        ~InAJob() { in_a_job = false; }
        InAJob(const InAJob&) = delete;
        InAJob& operator=(const InAJob&) = delete;
    };

    static void run_alone(std::int64_t tasks, TaskFunction function, void* context) {
        for (std::int64_t task = 0; task < tasks; ++task) function(context, task);
    }

    // Takes tasks of job ``epoch`` until none are left. A ticket counts the tasks nobody has taken yet, so that
    // one of a finished job can never be won, whatever the fields of the next job already say; the fields are
    // read after a ticket is won, when they cannot change before its task is done.
    void claim(std::uint32_t epoch) {
        std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (static_cast<std::uint32_t>(ticket >> 32) == epoch) {
            const auto left = static_cast<std::uint32_t>(ticket);
            if (left == 0) return;
            if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) {
                const std::uint32_t task = tasks_.load(std::memory_order_relaxed) - left;
                if (!failed_.load(std::memory_order_relaxed)) run_task(task);
                done_.fetch_add(1, std::memory_order_release);
                ticket = ticket_.load(std::memory_order_acquire);
            }
        }
    }

    // What it throws is the caller's, once nobody uses its job any more: the first of all.
    void run_task(std::uint32_t task) {
        try {
            function_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), task);
        } catch (...) {
            if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
        }
    }

    void work() {
        in_a_job = true;
        std::uint32_t seen = epoch_.load(std::memory_order_acquire);
        // A worker born between jobs must not wait for one that is already there.
        claim(seen);
        Patience patience;
        Clock::time_point moved{};
        while (!stopping_.load(std::memory_order_acquire)) {
            std::uint32_t epoch = epoch_.load(std::memory_order_acquire);
            for (int spins = 0; epoch == seen && spins < SPINS_BEFORE_SLEEP; ++spins) {
                spin_pause();
                epoch = epoch_.load(std::memory_order_acquire);
            }
            if (epoch == seen) epoch = wait_awake(seen, patience.until());
            if (epoch == seen) {
                release_tiles();
                sleepers_.fetch_add(1, std::memory_order_seq_cst);
                if (!stopping_.load(std::memory_order_seq_cst)) wait_for_change(epoch_, seen);
                sleepers_.fetch_sub(1, std::memory_order_seq_cst);
                patience.woke();
                continue;
            }
            seen = epoch;
            const int callers = processor_.load(std::memory_order_relaxed);
            if (callers >= 0 && callers == current_processor() && Clock::now() - moved > MOVED) {
                moved = Clock::now();
                leave_processor(callers);
            }
            claim(epoch);
        }
    }

    // The epoch, once it is another than ``seen`` or time is up.
    std::uint32_t wait_awake(std::uint32_t seen, Clock::time_point end) const {
        while (Clock::now() < end) {
            for (int spins = 0; spins < SPINS_BEFORE_YIELD; ++spins) {
                spin_pause();
                const std::uint32_t epoch = epoch_.load(std::memory_order_acquire);
                if (epoch != seen) return epoch;
            }
        }
        return seen;
    }

    void stop() {
        stopping_.store(true, std::memory_order_seq_cst);
        epoch_.fetch_add(1, std::memory_order_seq_cst);  // ticket_ keeps its old epoch: nothing to claim
        wake_all(epoch_);
        for (std::thread& worker : workers_) worker.join();
        workers_.clear();
    }

    std::mutex mutex_;
    std::vector<std::thread> workers_;
    std::atomic<int> threads_{1};  // may be asked while they change
    std::atomic<bool> stopping_{false};
    std::atomic<std::uint32_t> epoch_{0};
    std::atomic<int> sleepers_{0};
    alignas(64) std::atomic<std::uint64_t> ticket_{0};  // epoch << 32 | tasks nobody has taken
    alignas(64) std::atomic<std::uint32_t> done_{0};
    std::atomic<int> processor_{-1};  // the caller's
    std::atomic<std::uint32_t> tasks_{0};
    std::atomic<TaskFunction> function_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<bool> failed_{false};  // a task of this job
    std::exception_ptr error_;         // its, written by that task alone and read when all are done
};

ThreadPool& pool() {
    // Never destroyed: worker threads may outlive main's statics.
    static ThreadPool* const made = [] {
        auto* fresh = new ThreadPool;
        static ThreadPool* shared = fresh;
        // A forked child has no workers, and the mutex may be held by a thread that it has not either: it begins anew. What
        // the old pool had is left as it is.
        pthread_atfork(nullptr, nullptr, [] { new (shared) ThreadPool; });
        return fresh;
    }();
    return *made;
}

}  // namespace

int thread_count() { return pool().threads(); }
void set_threads(int count) { pool().resize(count); }
void run_tasks(std::int64_t tasks, TaskFunction function, void* context) { pool().run(tasks, function, context); }

}  // namespace lowbit

LOWBIT_EXPORT void lowbit_set_threads(int count) { lowbit::set_threads(count); }
LOWBIT_EXPORT int lowbit_threads() { return lowbit::thread_count(); }
