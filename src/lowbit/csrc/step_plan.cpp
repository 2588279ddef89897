// A recorded step: native calls with their arguments, run one after another in one call from Python.
//
// A plan is a row of 64-bit words. Each operation is its number in LOWBIT_OPERATIONS, the count of its arguments
// and the arguments, a word each: addresses and whole numbers as they are, a float by its bits. Whoever records
// a plan keeps the memory it names alive, and changes its inputs by writing to that memory (step_plan.py).

#include <chrono>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "lowbit.h"
#include "operations.h"

namespace lowbit {
namespace {

constexpr std::int32_t UNKNOWN_OPERATION = -1;

template <class Argument>
Argument read(std::int64_t word) {
    if constexpr (std::is_pointer_v<Argument>) {
        return reinterpret_cast<Argument>(static_cast<std::uintptr_t>(word));
    } else if constexpr (std::is_floating_point_v<Argument>) {
        static_assert(sizeof(Argument) == sizeof(std::uint32_t), "floats have 32 bits");
        const auto bits = static_cast<std::uint32_t>(word);
        Argument value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    } else {
        return static_cast<Argument>(word);
    }
}

template <class Result, class... Arguments, std::size_t... PLACE>
std::int32_t call(Result (*function)(Arguments...), const std::int64_t* words, std::index_sequence<PLACE...>) {
    if constexpr (std::is_void_v<Result>) {
        function(read<Arguments>(words[PLACE])...);
        return 0;
    } else {
        return function(read<Arguments>(words[PLACE])...);
    }
}

template <class Result, class... Arguments>
std::int32_t call(Result (*function)(Arguments...), const std::int64_t* words) {
    return call(function, words, std::index_sequence_for<Arguments...>{});
}

template <class Result, class... Arguments>
constexpr std::int32_t arguments_of(Result (*)(Arguments...)) {
    return sizeof...(Arguments);
}

#define LOWBIT_NUMBER(name) name,
enum class Operation : std::int64_t { LOWBIT_OPERATIONS(LOWBIT_NUMBER) };
#undef LOWBIT_NUMBER

std::int32_t run(Operation operation, const std::int64_t* words) {
    switch (operation) {
#define LOWBIT_CASE(name) \
    case Operation::name: return call(lowbit_##name, words);
        LOWBIT_OPERATIONS(LOWBIT_CASE)
#undef LOWBIT_CASE
    }
    return UNKNOWN_OPERATION;
}

struct Entry {
    const char* name;
    std::int32_t arguments;
};

#define LOWBIT_ENTRY(name) {#name, arguments_of(lowbit_##name)},
constexpr Entry ENTRIES[] = {LOWBIT_OPERATIONS(LOWBIT_ENTRY)};
#undef LOWBIT_ENTRY

}  // namespace
}  // namespace lowbit

// The number of the operation called ``name``, -1 where there is none; how many arguments it has.
LOWBIT_EXPORT std::int32_t lowbit_operation(const char* name, std::int32_t* arguments) {
    std::int32_t number = 0;
    for (const lowbit::Entry& entry : lowbit::ENTRIES) {
        if (std::strcmp(entry.name, name) == 0) {
            *arguments = entry.arguments;
            return number;
        }
        ++number;
    }
    return -1;
}

// Runs the plan. -1, or the index of the operation that failed; its status then says how.
LOWBIT_EXPORT std::int64_t lowbit_plan_run(const std::int64_t* words, std::int64_t count, std::int32_t* status) {
    std::int64_t index = 0;
    for (std::int64_t at = 0; at + 1 < count; at += 2 + words[at + 1], ++index) {
        *status = lowbit::run(static_cast<lowbit::Operation>(words[at]), words + at + 2);
        if (*status != 0) return index;
    }
    return -1;
}

// The same, with the nanoseconds of each operation added to ``spent``, one for each.
LOWBIT_EXPORT std::int64_t lowbit_plan_profile(const std::int64_t* words, std::int64_t count, std::int32_t* status,
                                               std::int64_t* spent) {
    std::int64_t index = 0;
    auto before = std::chrono::steady_clock::now();
    for (std::int64_t at = 0; at + 1 < count; at += 2 + words[at + 1], ++index) {
        *status = lowbit::run(static_cast<lowbit::Operation>(words[at]), words + at + 2);
        if (*status != 0) return index;
        const auto now = std::chrono::steady_clock::now();
        spent[index] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - before).count();
        before = now;
    }
    return -1;
}
