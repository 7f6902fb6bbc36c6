// Sums that several tasks add to, such as the gradients of a key head whose query rows are shared out.
#pragma once
#include "threads.h"

namespace ISA {
namespace {

// The items of a call in order, `unit` of which in a row add to the same sums. A unit is cut into `parts` by the sizes of a sample
// alone. Each part is summed from 0, and the parts are added in their order: neither the number of tasks nor the batch changes a bit.
// A task takes parts in a row. It adds up those of a unit that it begins; of a unit that an earlier task began it keeps each part
// until `join`.
struct SharedSums {
    const Size* start;  // (tasks + 1): task n takes the items [start[n], start[n + 1]), which are whole parts
    Size tasks, unit, parts, floats;  // floats: of the sums of one unit, whole vectors
    // of each task: the parts that it keeps, the sums of the units that it begins, and a further part of these
    float* memory = nullptr;

    Size part_of(Size item) const { return (((item % unit) + 1) * parts - 1) / unit; }
    Size end_of_part(Size item) const { return item / unit * unit + share(unit, part_of(item) + 1, parts); }
    bool goes_on(Size task) const { return start[task] % unit != 0 && start[task] < start[task + 1]; }
    bool begins(Size task) const { return round_up(start[task], unit) < start[task + 1]; }
    bool alone(Size task, Size n) const { return start[task] <= n * unit && (n + 1) * unit <= start[task + 1]; }
    bool adds(Size task) const {  // a further part to that with which a unit begins
        return begins(task) && end_of_part(round_up(start[task], unit)) < start[task + 1] && parts > 1;
    }
    Size kept(Size task) const {
        const Size last = least(start[task + 1], round_up(start[task], unit)) - 1;
        return goes_on(task) ? part_of(last) - part_of(start[task]) + 1 : 0;
    }
    Size places_before(Size task) const {
        Size count = 0;
        for (Size n = 0; n < task; ++n) count += kept(n) + begins(n) + adds(n);
        return count;
    }
    Size stride() const { return round_up(floats, 16); }
    void plan(Memory& memory_of_call) { memory = memory_of_call.take(places_before(tasks) * stride()); }
    float* place(Size task, Size n) const { return memory + (places_before(task) + n) * stride(); }

    // where the task adds up the part of the item, from 0 on
    float* at(Size task, Size item) const {
        const Size part = part_of(item);
        if (item / unit == start[task] / unit && goes_on(task)) return place(task, part - part_of(start[task]));
        return place(task, kept(task) + (part > 0));
    }
    // After the part that ends before item `end`: the sums of its unit if the task has added up all parts, else null
    float* add_part(Size task, Size end) const {
        const Size n = (end - 1) / unit;
        if (start[task] > n * unit) return nullptr;
        float* sums = place(task, kept(task));
        if (part_of(end - 1) > 0) add(sums + stride(), 0, floats, sums);
        return end == (n + 1) * unit ? sums : nullptr;
    }
    static void add(const float* part, Size first, Size last, float* sums) {
        for (Size i = first; i < last; i += VL) store(sums + i, load(sums + i) + load(part + i));
    }
    // add(item, sums) for each item of the task, to sums that are 0 at first; finish(n, sums) for each unit n that the task has
    // alone
    template <class Add, class Finish> void add_up(Size task, const Add& add, const Finish& finish) const {
        for (Size item = start[task], end; item < start[task + 1]; item = end) {
            float* part = at(task, item);
            memset(part, 0, floats * sizeof(float));
            for (end = end_of_part(item); item < end; ++item) add(item, part);
            if (const float* sums = add_part(task, end)) finish((end - 1) / unit, sums);
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
        float* sums = nullptr;  // of the unit that an earlier task began
        for (Size task = 0; task < tasks; ++task) {
            const Size n = start[task] / unit, count = kept(task);
            for (Size part = 0; part < count; ++part) add(place(task, part), first, last, sums);
            if (count > 0 && (n + 1) * unit <= start[task + 1]) finish(n, sums, first_row, last_row);
            if (begins(task)) sums = place(task, count);
        }
    }
};
// Into how many parts the rows of a unit are cut, of which a sample has `units`: enough to occupy threads, few enough that adding
// them takes little beside the products. A power of two, which most numbers of threads share.
static Size parts_of_rows(Size rows, Size units, Size least_rows = 288) {
    Size parts = 1;
    while (parts < 8 && 2 * parts * units <= 64 && 2 * parts * least_rows <= rows) parts *= 2;
    return parts;
}
struct EqualWork {
    Size operator()(Size) const { return 1; }
};
// `start` for ranges of whole parts that are about equal in work(item); null where there is not enough memory
template <class Work = EqualWork>
static const Size* cut(Size items, Size unit, Size parts, Size tasks, Memory& memory, const Work& work = {}) {
    Size *start, all = 0, before = 0, task = 0;
    if (!memory.place([&] { start = (Size*)memory.take(2 * (tasks + 1)); })) return nullptr;
    for (Size item = 0; item < items; ++item) all += work(item);
    const SharedSums sums = {start, tasks, unit, parts, 0};
    for (Size item = 0, end; item < items; item = end) {
        Size here = 0;
        for (Size i = item; i < (end = sums.end_of_part(item)); ++i) here += work(i);
        while (task < tasks && 2 * before + here > 2 * share(all, task, tasks)) start[task++] = item;  // in the part's first half
        before += here;
    }
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
