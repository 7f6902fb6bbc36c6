// Sums that several tasks add to, such as the gradients of a key head whose query rows are shared out.
#pragma once
#include "threads.h"

namespace ISA {
namespace {

// The items of a call in order are cut into one range for each task, and `unit` items in a row add to the same sums. A task
// writes the result of a unit that it has alone. For any other unit each task has a part, and the parts are added in the order of the
// tasks, so that a call repeats its bits.
struct SharedSums {
    const Size* start;  // (tasks + 1): task n takes the items [start[n], start[n + 1])
    Size tasks, unit, floats;  // floats: of the sums of one unit
    float* parts = nullptr;  // of each task: one for the unit that an earlier task began, one for all that begin in its range

    bool goes_on(Size task) const { return start[task] % unit != 0 && start[task] < start[task + 1]; }
    bool begins(Size task) const { return round_up(start[task], unit) < start[task + 1]; }
    bool alone(Size task, Size n) const { return start[task] <= n * unit && (n + 1) * unit <= start[task + 1]; }
    Size parts_before(Size task) const {
        Size count = 0;
        for (Size n = 0; n < task; ++n) count += goes_on(n) + begins(n);
        return count;
    }
    Size stride() const { return round_up(floats, 16); }
    void plan(Memory& memory) { parts = memory.take(parts_before(tasks) * stride()); }

    // where the task adds up the unit n
    float* at(Size task, Size n) const {
        return parts + (parts_before(task) + (goes_on(task) && n * unit >= start[task])) * stride();
    }
    // add(item, sums) for each item of the task, to sums that are 0 at first; finish(n, sums) for each unit n that the task has
    // alone
    template <class Add, class Finish> void add_up(Size task, const Add& add, const Finish& finish) const {
        float* sums = nullptr;
        for (Size item = start[task]; item < start[task + 1]; ++item) {
            const Size n = item / unit;
            if (item == start[task] || item % unit == 0) sums = at(task, n), memset(sums, 0, floats * sizeof(float));
            add(item, sums);
            if ((item + 1) % unit == 0 && alone(task, n)) finish(n, sums);
        }
    }
    bool any() const {  // sums that several tasks have, and so something to join
        for (Size task = 1; floats > 0 && task < tasks; ++task)
            if (goes_on(task)) return true;
        return false;
    }
    // finish(n, sums, first, last) for each unit n that several tasks have, with the rows [first, last) of its sums added up.
    // These rows are the share of task `sharer`; `floats` is a multiple of `rows`.
    template <class Finish> void join(Size sharer, Size rows, const Finish& finish) const {
        const Size first_row = share(rows, sharer, tasks), last_row = share(rows, sharer + 1, tasks);
        const Size first = floats / most(rows, 1) * first_row, last = floats / most(rows, 1) * last_row;
        float* sums = nullptr;  // in the place of the first part
        for (Size task = 0; task < tasks; ++task) {
            const Size n = start[task] / unit, end = start[task + 1];
            if (goes_on(task)) {
                const float* part = at(task, n);
                for (Size i = first; i < last; ++i) sums[i] += part[i];
                if ((n + 1) * unit <= end) finish(n, sums, first_row, last_row);
            }
            if (begins(task)) sums = at(task, (end - 1) / unit);
        }
    }
};
struct EqualWork {
    Size operator()(Size) const { return 1; }
};
// `start` for ranges that are equal in work(item); null where there is not enough memory
template <class Work = EqualWork> static const Size* cut(Size items, Size tasks, Memory& memory, const Work& work = {}) {
    Size *start, all = 0, before = 0, task = 0;
    if (!memory.place([&] { start = (Size*)memory.take(2 * (tasks + 1)); })) return nullptr;
    for (Size item = 0; item < items; ++item) all += work(item);
    for (Size item = 0; item < items; before += work(item++))
        while (task < tasks && before >= share(all, task, tasks)) start[task++] = item;
    while (task <= tasks) start[task++] = items;
    return start;
}
// A call that has `sums` gives add_item(call, space, item, sums), which adds an item, and write_sums(call, unit, sums, first, last),
// which takes the rows [first, last) of row_count(call) when all items of a unit are added.
template <class Space, class Call> static void add_items(Call& call, Space& space, Size task) {
    call.sums.add_up(
        task, [&](Size item, float* sums) { add_item(call, space, item, sums); },
        [&](Size unit, const float* sums) { write_sums(call, unit, sums, 0, row_count(call)); });
}
// The units that several tasks have; each task takes a range of the rows.
template <class Call> static void join_items(Call& call, Size task) {
    call.sums.join(task, row_count(call),
                   [&](Size unit, const float* sums, Size first, Size last) { write_sums(call, unit, sums, first, last); });
}
template <class Space, class Call> static Size run_and_join(Size tasks, Call& call) {
    if (run_with_space<Space>(tasks, call, add_items<Space, Call>) != DONE) return NO_MEMORY;
    if (call.sums.any()) run(tasks, call, join_items<Call>);
    return DONE;
}

}  // namespace
}  // namespace ISA
