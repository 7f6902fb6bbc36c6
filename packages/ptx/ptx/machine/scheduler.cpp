// Runs the blocks of a grid: warps take turns at random, and so do groups of lanes that parted.
#include "scheduler.h"

#include <algorithm>
#include <numeric>

#include "async_copies.h"
#include "memory.h"

namespace ptx {

namespace {

std::vector<void (*)(Warp&)>& exit_checks() {
    static std::vector<void (*)(Warp&)> checks;
    return checks;
}

// Runs one warp for a while.
class Turn {
   public:
    Turn(Warp& warp, int budget)
        : w(warp),
          block(*warp.block),
          machine(*block.machine),
          s(*warp.scheduling),
          code(machine.program->code.data()),
          left(budget) {}

    void run() {
        while (left > 0) {
            const int group = choose();
            if (group < 0) return;
            run_group(group);
        }
    }

   private:
    Warp& w;
    Block& block;
    Machine& machine;
    Warp::Scheduling& s;
    const Instruction* code;
    int left;

    static bool runnable(const Block& block, const Group& group) {
        return group.state == State::RUNS || (group.state == State::RETRIES && group.seen_events != block.events);
    }

    int choose() {
        if (s.groups.size() == 1) return runnable(block, s.groups[0]) ? 0 : -1;
        int chosen = -1, count = 0;
        for (int n = 0; n < (int)s.groups.size(); ++n) {
            if (!runnable(block, s.groups[n])) continue;
            ++count;
            const bool take =
                machine.options.in_order ? chosen < 0 || s.groups[n].pc < s.groups[chosen].pc : machine.below(count) == 0;
            if (take) chosen = n;
        }
        return chosen;
    }

    // Which of `lanes` execute the instruction.
    u32 executing(const Instruction& i, u32 lanes) const {
        if (i.predicate < 0) return lanes;
        const u32 p = *reinterpret_cast<const u32*>(w.registers + i.predicate);
        return lanes & (i.negated ? ~p : p);
    }

    void count(const Instruction& i, u32 lanes) {
        ++machine.executed;
        ++machine.program->hits[i.number];
        if (!machine.options.counts) return;
        ++machine.executed_by_kind[i.kind];
        machine.lanes_by_kind[i.kind] += __builtin_popcount(lanes);
    }

    void run_group(int index) {
        Group* group = &s.groups[index];
        group->state = State::RUNS;
        u32 lanes = group->lanes;
        int pc = group->pc, meet = meeting_place(*group);
        while (left > 0) {
            if (pc == meet) {
                group->pc = pc;
                return leave_for_split(index);
            }
            const Instruction& i = code[pc];
            const u32 m = executing(i, lanes);
            --left;
            if (i.control == PLAIN && (!i.converged || lanes == s.running)) {
                count(i, m);
                w.at = &i;
                if (m) i.handler(w, i, m);
                ++pc;
                continue;
            }
            if (!m || (i.control == BRANCH && m == lanes)) {
                count(i, m);
                pc = m ? i.operands[0] : pc + 1;
                continue;
            }
            group->pc = pc;
            w.at = &i;
            if (!control(index, i, m)) return;
            group = &s.groups[index];
            lanes = group->lanes;
            pc = group->pc;
            meet = meeting_place(*group);
        }
        group->pc = pc;
    }

    int meeting_place(const Group& group) const { return group.split >= 0 ? s.splits[group.split].reconverge : -1; }

    // An instruction that is more than a handler. False: the group waits, has ended or was divided.
    bool control(int index, const Instruction& i, u32 m) {
        Group& group = s.groups[index];
        switch (i.control) {
            case BRANCH: count(i, m); return divide(index, m, i.operands[0], group.pc + 1, i.reconverge);
            case INDIRECT: count(i, m); return indirect(index, i, m);
            case TRAP: fail(w, "trap");
            case EXIT: count(i, m); return exit(index, m);
            case BARRIER:
            case ARRIVE:
            case BARRIER_REDUCE:
                if (!i.converged && m != group.lanes) return divide(index, m, group.pc, group.pc + 1, group.pc + 1);
                break;
            default: break;
        }
        return together(index, i, m);
    }

    // ---- lanes part and meet

    // The split at which lanes meet that part now, or -1.
    int split_for(const Group& group, int reconverge) {
        if (reconverge < 0) return group.split;  // they do not meet
        if (group.split >= 0 && s.splits[group.split].reconverge == reconverge) return group.split;
        const Split split{group.split, reconverge, group.lanes, 0};
        for (int n = 0; n < (int)s.splits.size(); ++n)
            if (!s.splits[n].remaining) return s.splits[n] = split, n;
        s.splits.push_back(split);
        return (int)s.splits.size() - 1;
    }

    bool divide(int index, u32 taken, int target, int next, int reconverge) {
        if (target == next || taken == s.groups[index].lanes) return s.groups[index].pc = target, true;
        const int split = split_for(s.groups[index], reconverge);
        Group& group = s.groups[index];
        group.split = split;
        Group branch = group;
        branch.lanes = taken;
        branch.pc = target;
        group.lanes &= ~taken;
        group.pc = next;
        s.groups.push_back(branch);
        return false;
    }

    bool indirect(int index, const Instruction& i, u32 m) {
        std::map<int, u32> by_target;
        if (m != s.groups[index].lanes) by_target[s.groups[index].pc + 1] = s.groups[index].lanes & ~m;
        const u32* chosen = lanes_of<u32>(w, i.operands[0]);
        for (int l = 0; l < LANES; ++l) {
            if (!(m >> l & 1)) continue;
            if (chosen[l] >= (u32)i.count - 1)
                fail(w, "branch to target " + std::to_string(chosen[l]) + " of " + std::to_string(i.count - 1));
            by_target[i.operands[1 + chosen[l]]] |= 1u << l;
        }
        if (by_target.size() == 1) return s.groups[index].pc = by_target.begin()->first, true;
        const int split = split_for(s.groups[index], i.reconverge);
        Group group = s.groups[index];
        group.split = split;
        s.groups.erase(s.groups.begin() + index);
        for (auto& [target, lanes] : by_target) {
            group.pc = target;
            group.lanes = lanes;
            s.groups.push_back(group);
        }
        return false;
    }

    void leave_for_split(int index) {
        const Group group = s.groups[index];
        s.groups.erase(s.groups.begin() + index);
        s.splits[group.split].waiting |= group.lanes;
        settle(group.split);
    }

    // The lanes of a split go on where all of them are there.
    void settle(int number) {
        Split& split = s.splits[number];
        if (!split.remaining || split.waiting != split.remaining) return;
        s.groups.push_back({split.waiting, split.reconverge, split.parent});
        split.remaining = split.waiting = 0;
    }

    bool exit(int index, u32 m) {
        Group& group = s.groups[index];
        s.running &= ~m;
        std::vector<int> around;
        for (int split = group.split; split >= 0; split = s.splits[split].parent) around.push_back(split);
        group.lanes &= ~m;
        ++group.pc;
        const bool goes_on = group.lanes != 0;
        if (!goes_on) s.groups.erase(s.groups.begin() + index);
        for (int split : around) s.splits[split].remaining &= ~m;
        for (int split : around) settle(split);
        for (Group& waiting : s.groups)  // fewer lanes may be needed now
            if (waiting.state == State::FOR_LANES) waiting.state = State::RUNS;
        if (!s.running) end_warp();
        check_cluster_barrier(block);
        for (auto& [id, barrier] : block.barriers)
            if (barrier.lanes && !barrier.needed && complete(barrier)) release(id, barrier);
        return goes_on && s.groups.size() == 1;
    }

    void end_warp() {
        --block.alive;
        for (auto* check : exit_checks()) check(w);
    }

    // ---- instructions of several groups of a warp

    u32 needed_lanes(const Instruction& i, u32 m) {
        u32 needed = i.converged ? s.running : 0;
        if (i.control == WARP_BARRIER || i.control == WAITS) {
            const u32* masks = lanes_of<u32>(w, i.operands[i.count - 1]);
            for (int l = 0; l < LANES; ++l)
                if (m >> l & 1) {
                    if (!(masks[l] >> l & 1)) [[unlikely]]
                        fail(w, "lane " + std::to_string(l) + " is not in its member mask " + hex(masks[l]));
                    needed |= masks[l] & s.running;
                }
        }
        return needed;
    }

    // Runs the instruction if all lanes that it needs are here, perhaps in several groups; else the group waits for them.
    bool together(int index, const Instruction& i, u32 m) {
        const u32 needed = needed_lanes(i, m);
        if (needed & s.groups[index].lanes & ~m)
            fail(w, "lanes " + hex(needed & s.groups[index].lanes & ~m) +
                        " must execute this instruction, too, and their predicate is false");
        if (i.control == WAITS && !(needed & ~m)) {
            count(i, m);
            ++s.groups[index].pc;
            i.handler(w, i, m);
            return true;
        }
        std::vector<int> meeting{index};
        u32 lanes = m;
        if (needed & ~m) {
            for (int n = 0; n < (int)s.groups.size(); ++n) {
                const Group& group = s.groups[n];
                if (n == index || group.state != State::FOR_LANES) continue;
                const Instruction& there = code[group.pc];
                if (&there != &i && !(there.control == WARP_BARRIER && i.control == WARP_BARRIER)) continue;
                const u32 coming = executing(there, group.lanes);
                if (!(coming & needed)) continue;
                meeting.push_back(n);
                lanes |= coming;
            }
            if (needed & ~lanes) {
                s.groups[index].state = State::FOR_LANES;
                s.groups[index].at = i.number;
                return false;
            }
        }
        count(i, lanes);
        for (int n : meeting) {
            s.groups[n].state = State::RUNS;
            s.groups[n].at = i.number;
            ++s.groups[n].pc;
        }
        perform(meeting, i, lanes);
        return meeting.size() == 1 && s.groups[index].state == State::RUNS;
    }

    void perform(const std::vector<int>& meeting, const Instruction& i, u32 lanes) {
        switch (i.control) {
            case WARP_BARRIER: return meet_lanes(w, lanes);
            case BARRIER:
            case ARRIVE:
            case BARRIER_REDUCE: return barrier(meeting, i, lanes);
            case RETRIES: {
                const u64 events = block.events;
                i.handler(w, i, lanes);
                if (!s.again) return;
                s.again = false;
                for (int n : meeting) {
                    --s.groups[n].pc;
                    s.groups[n].state = State::RETRIES;
                    s.groups[n].seen_events = events;
                }
                return;
            }
            default: return i.handler(w, i, lanes);
        }
    }

    // ---- barriers

    u32 uniform(s32 operand, u32 lanes, const char* what) {
        const u32* values = lanes_of<u32>(w, operand);
        const int first = __builtin_ctz(lanes);
        for (int l = first; l < LANES; ++l)
            if ((lanes >> l & 1) && values[l] != values[first])
                fail(w, std::string(what) + " of a barrier differs between lanes of a warp");
        return values[first];
    }

    void barrier(const std::vector<int>& meeting, const Instruction& i, u32 lanes) {
        const int at = i.control == BARRIER_REDUCE ? 2 : 0;
        const u32 id = uniform(i.operands[at], lanes, "the number");
        const u32 needed = i.count > at + 1 ? uniform(i.operands[at + 1], lanes, "the thread count") : 0;
        if (id > 15) fail(w, "barrier " + std::to_string(id) + ": there are 16");
        if (needed % LANES) fail(w, "barrier for " + std::to_string(needed) + " threads: not a multiple of 32");
        if (i.control == ARRIVE && !needed) fail(w, "arrival at a barrier without a thread count");
        Barrier& barrier = block.barriers[id];
        if (barrier.lanes && barrier.needed != needed)
            fail(w, "barrier " + std::to_string(id) + " for " + std::to_string(needed) + " threads, where others came for " +
                        std::to_string(barrier.needed));
        barrier.needed = needed;
        barrier.lanes += __builtin_popcount(lanes);
        barrier.threads += lanes == s.running ? LANES : __builtin_popcount(lanes);
        if (i.control == BARRIER_REDUCE) {
            const u32 p = predicate(w, i.operands[4]);
            barrier.ones += __builtin_popcount((i.operands[5] ? ~p : p) & lanes);
            barrier.voters += __builtin_popcount(lanes);
        }
        meet_lanes(w, lanes);
        release_to(w, barrier.knowledge);
        if (i.control != ARRIVE)
            for (int n : meeting) {
                s.groups[n].state = State::AT_BARRIER;
                s.groups[n].barrier = (int)id;
            }
        if (complete(barrier)) release(id, barrier);
        if (barrier.needed && barrier.threads > barrier.needed)
            fail(w, "barrier " + std::to_string(id) + ": more threads came than " + std::to_string(barrier.needed));
    }

    bool complete(const Barrier& barrier) const {
        if (barrier.needed) return barrier.threads == barrier.needed;
        u32 running = 0;
        for (const Warp::Scheduling& scheduling : block.schedulings) running += __builtin_popcount(scheduling.running);
        return barrier.lanes >= running;
    }

    void release(u32 id, Barrier& barrier) {
        if (!barrier.needed && block.shadow && block.alive == (int)block.warps.size()) ++block.shadow->epoch;
        for (Warp& warp : block.warps)
            for (Group& group : warp.scheduling->groups) {
                if (group.state != State::AT_BARRIER || group.barrier != (int)id) continue;
                group.state = State::RUNS;
                acquire_from(warp, barrier.knowledge);
                const Instruction& i = code[group.at];
                if (i.control == BARRIER_REDUCE) write_result(warp, i, group.lanes, barrier);
            }
        barrier = Barrier{};
        tell(block);
    }

    static void write_result(Warp& warp, const Instruction& i, u32 lanes, const Barrier& barrier) {
        if (i.operands[0] == 0) {
            u32 ones[LANES];
            std::fill(ones, ones + LANES, barrier.ones);
            return write_lanes(lanes_of<u32>(warp, i.operands[1]), ones, lanes);
        }
        const bool result = i.operands[0] == 1 ? barrier.ones == barrier.voters : barrier.ones > 0;
        set_predicate(warp, i.operands[1], result ? ALL : 0, lanes);
    }

   public:
    static bool can_run(const Warp& w) {
        return std::any_of(w.scheduling->groups.begin(), w.scheduling->groups.end(),
                           [&](const Group& group) { return runnable(*w.block, group); });
    }
};

// ---- special registers

u64 special(const Machine& m, const Block& b, int warp, int lane, const std::string& name) {
    const u32 thread = (u32)(LANES * warp + lane), bit = 1u << lane;
    const u32 tid[3] = {thread % m.block[0], thread / m.block[0] % m.block[1], thread / m.block[0] / m.block[1]};
    u32 clusters[3], cluster[3], in_cluster[3];
    for (int d = 0; d < 3; ++d) {
        clusters[d] = m.grid[d] / m.cluster[d];
        cluster[d] = b.place[d] / m.cluster[d];
        in_cluster[d] = b.place[d] % m.cluster[d];
    }
    const std::pair<const char*, const u32*> vectors[] = {{"%tid.", tid},
                                                          {"%ntid.", m.block},
                                                          {"%ctaid.", b.place},
                                                          {"%nctaid.", m.grid},
                                                          {"%clusterid.", cluster},
                                                          {"%nclusterid.", clusters},
                                                          {"%cluster_ctaid.", in_cluster},
                                                          {"%cluster_nctaid.", m.cluster}};
    for (auto& [start, values] : vectors)
        if (name.size() == strlen(start) + 1 && name.compare(0, strlen(start), start) == 0 && name.back() >= 'x' &&
            name.back() <= 'z')
            return values[name.back() - 'x'];
    const std::pair<const char*, u64> numbers[] = {{"%laneid", lane},
                                                   {"%warpid", warp},
                                                   {"%nwarpid", b.warps.size()},
                                                   {"%lanemask_eq", bit},
                                                   {"%lanemask_lt", bit - 1},
                                                   {"%lanemask_le", bit | (bit - 1)},
                                                   {"%lanemask_gt", ~(bit | (bit - 1))},
                                                   {"%lanemask_ge", ~(bit - 1)},
                                                   {"%smid", 0},
                                                   {"%nsmid", 1},
                                                   {"%gridid", 0},
                                                   {"%cluster_ctarank", b.rank},
                                                   {"%cluster_nctarank", m.cluster_size()},
                                                   {"%is_explicit_cluster", m.cluster_size() > 1},
                                                   {"%dynamic_smem_size", m.dynamic_shared},
                                                   {"%total_smem_size", m.shared - SHARED_BASE},
                                                   {"WARP_SZ", LANES}};
    for (auto& [known, value] : numbers)
        if (name == known) return value;
    throw std::runtime_error("@-1 special register " + name + " is not known");
}

void set_specials(Block& block) {
    Machine& machine = *block.machine;
    for (Warp& w : block.warps)
        for (const Program::Special& register_ : machine.program->specials) {
            const bool by_lane = register_.name.starts_with("%tid.") || register_.name.starts_with("%lane");
            u64 value = 0;
            for (int l = 0; l < LANES; ++l) {
                if (l == 0 || by_lane) value = special(machine, block, w.number, l, register_.name);
                if (register_.bytes == 8) lanes_of<u64>(w, register_.slot)[l] = value;
                else if (register_.bytes == 0) set_predicate(w, register_.slot, value ? ALL : 0, ALL);
                else lanes_of<u32>(w, register_.slot)[l] = (u32)value;
            }
        }
}

// A clock that goes on with each instruction and each look at it.
template <class T> void clock(Warp& w, const Instruction& i, u32 lanes) {
    Machine& machine = *w.block->machine;
    T now[LANES];
    std::fill(now, now + LANES, (T)(machine.executed + ++machine.ticks));
    write_lanes(lanes_of<T>(w, i.operands[0]), now, lanes);
}
const Registered clock32("clock.b32", clock<u32>), clock64("clock.b64", clock<u64>);

// ---- blocks

std::unique_ptr<Block> make_block(Machine& machine) {
    auto block = std::make_unique<Block>();
    const u32 threads = machine.block[0] * machine.block[1] * machine.block[2], warps = (threads + LANES - 1) / LANES;
    block->machine = &machine;
    block->schedulings.resize(warps);
    block->shared.resize(machine.shared + 16);
    if (machine.options.races) block->shadow = std::make_unique<SharedShadow>(machine.shared, (int)warps);
    block->register_file.assign((size_t)warps * machine.program->registers + 64, 0xee);
    u8* file = block->register_file.data();
    file += (64 - reinterpret_cast<u64>(file) % 64) % 64;
    for (u32 n = 0; n < warps; ++n) {
        Warp w{file + (size_t)n * machine.program->registers, machine.program->constants.data(), block.get(), (int)n};
        w.scheduling = &block->schedulings[n];
        block->warps.push_back(w);
    }
    return block;
}

void start(Block& block) {
    Machine& machine = *block.machine;
    block.barriers.clear();
    block.mbarriers.clear();
    block.tensor_memory.reset();
    block.copy_clock = 0;
    block.alive = (int)block.warps.size();
    const u32 threads = machine.block[0] * machine.block[1] * machine.block[2];
    for (Warp& w : block.warps) {
        Warp::Scheduling& s = *w.scheduling;
        s = Warp::Scheduling{};
        const u32 rest = threads - LANES * w.number;
        s.running = rest >= LANES ? ALL : (1u << rest) - 1;
        s.groups.push_back({s.running, 0, -1});
        s.knowledge.known.assign(block.warps.size() + 1, 0);
        s.knowledge.fenced = s.knowledge.known;
        s.knowledge.known[w.number] = 1;
        s.local.assign((size_t)LANES * machine.local, 0xee);
        s.local_written.assign(machine.options.races ? s.local.size() : 0, 0);
        s.copies = std::make_unique<AsyncCopies>();
        w.at = nullptr;
    }
    const u32 junk = 0x7fc00000u | (u32)(machine.draw() & 0xffff);  // NaN in most formats: numbers that nobody wrote show
    std::fill_n(reinterpret_cast<u32*>(block.shared.data()), block.shared.size() / 4, junk);
    if (block.shadow) block.shadow->clear();
    set_specials(block);
}

std::unique_ptr<Cluster> make_cluster(Machine& machine) {
    auto cluster = std::make_unique<Cluster>();
    for (u32 rank = 0; rank < machine.cluster_size(); ++rank) {
        cluster->blocks.push_back(make_block(machine));
        cluster->blocks.back()->cluster = cluster.get();
        cluster->blocks.back()->rank = rank;
    }
    return cluster;
}

void start(Cluster& cluster, u32 number) {
    cluster.arrived = cluster.phase = 0;
    cluster.arriving = cluster.complete = nullptr;
    for (auto& block : cluster.blocks) {
        const Machine& m = *block->machine;
        u32 clusters = number, rank = block->rank;
        for (int d = 0; d < 3; ++d) {
            const u32 along = m.grid[d] / m.cluster[d];
            block->place[d] = clusters % along * m.cluster[d] + rank % m.cluster[d];
            clusters /= along;
            rank /= m.cluster[d];
        }
        block->number = block->place[0] + m.grid[0] * (block->place[1] + m.grid[1] * block->place[2]);
        start(*block);
    }
}

bool run_background(Block& block) {
    if (block.background.empty()) return false;
    const size_t n = block.machine->below(block.background.size());
    auto action = std::move(block.background[n]);
    block.background[n] = std::move(block.background.back());
    block.background.pop_back();
    action();
    return true;
}

std::string lanes_text(const Warp& w, u32 lanes) { return lanes == w.scheduling->running ? "" : " lanes " + hex(lanes); }

[[noreturn]] void deadlock(Block& block) {
    std::string text = "deadlock:";
    Warp* waiting = nullptr;
    for (Warp& w : block.warps)
        for (const Group& group : w.scheduling->groups) {
            text += " warp " + std::to_string(w.number) + lanes_text(w, group.lanes);
            text += group.state == State::AT_BARRIER  ? " waits for barrier " + std::to_string(group.barrier)
                    : group.state == State::FOR_LANES ? " waits for lanes of its warp"
                                                      : " waits";
            text += " at @" + std::to_string(group.at) + ";";
            w.at = &block.machine->program->code[group.at];
            if (!waiting) waiting = &w;
        }
    fail(*waiting, text);  // a block with warps that run has groups
}

void end(Block& block) {
    while (run_background(block)) {
    }
    u64 bytes = 0;
    for (auto& [sector, touched] : block.sectors) bytes += __builtin_popcount(touched);
    block.machine->sectors_once += block.sectors.size();
    block.machine->least_once += (bytes + 31) / 32;
    block.sectors.clear();
}

// Whether a block can do something by itself.
bool goes_on(const std::unique_ptr<Block>& block) {
    return !block->background.empty() || std::any_of(block->warps.begin(), block->warps.end(), Turn::can_run);
}

// Runs some instructions of one warp of the block.
void take_turn(Block& block) {
    Machine& machine = *block.machine;
    if (!block.background.empty() && machine.below(4) == 0) run_background(block);
    int runnable[32], count = 0;
    for (Warp& w : block.warps)
        if (Turn::can_run(w)) runnable[count++] = w.number;
    if (!count) {
        if (!run_background(block) && std::none_of(block.cluster->blocks.begin(), block.cluster->blocks.end(), goes_on))
            deadlock(block);
        return;
    }
    const bool in_order = machine.options.in_order;
    Warp& w = block.warps[in_order ? runnable[0] : runnable[machine.below(count)]];
    const int budget = 1 + (int)machine.below(in_order || machine.below(4) ? 4096 : 16);
    Turn(w, budget).run();
    if (machine.executed > machine.options.limit)
        fail(w, "the limit of " + std::to_string(machine.options.limit) + " instructions");
}

}  // namespace

void run_grid(Machine& machine) {
    const u32 size = machine.cluster_size();
    for (int d = 0; d < 3; ++d)
        if (machine.grid[d] % machine.cluster[d]) throw std::runtime_error("@-1 the grid is not a multiple of the cluster");
    if (size > 16) throw std::runtime_error("@-1 a cluster has more than 16 blocks");
    const u64 total = (u64)machine.grid[0] * machine.grid[1] * machine.grid[2] / size;
    std::vector<u32> order(total);  // of the clusters
    std::iota(order.begin(), order.end(), 0);
    if (!machine.options.in_order)
        for (u64 n = total; n > 1; --n) std::swap(order[n - 1], order[machine.below(n)]);
    if (machine.options.sample && machine.options.sample < total * size) order.resize((machine.options.sample + size - 1) / size);
    std::vector<std::unique_ptr<Cluster>> resident;
    size_t next = 0;
    const size_t places = std::min<size_t>(std::max(machine.options.resident, 1), order.size());
    for (; next < places; ++next) {
        resident.push_back(make_cluster(machine));
        start(*resident.back(), order[next]);
    }
    while (!resident.empty()) {
        const size_t n = machine.below(resident.size());
        auto& blocks = resident[n]->blocks;
        Block& block = *blocks[size == 1 ? 0 : machine.below(size)];
        if (block.alive) take_turn(block);
        if (std::any_of(blocks.begin(), blocks.end(), [](auto& one) { return one->alive; })) continue;
        for (auto& one : blocks) end(*one);
        if (next < order.size()) start(*resident[n], order[next++]);
        else resident.erase(resident.begin() + n);
    }
}

void check_cluster_barrier(Block& block) {
    Cluster& cluster = *block.cluster;
    if (!cluster.arrived) return;
    u32 running = 0;
    for (auto& one : cluster.blocks)
        for (const Warp::Scheduling& scheduling : one->schedulings) running += __builtin_popcount(scheduling.running);
    if (cluster.arrived < running) return;
    cluster.arrived = 0;
    ++cluster.phase;
    cluster.complete = cluster.arriving;
    for (auto& one : cluster.blocks) tell(*one);
}

// ---- what handlers ask

u64 Machine::draw() {  // xorshift64*
    random ^= random >> 12;
    random ^= random << 25;
    random ^= random >> 27;
    return (random * 0x2545f4914f6cdd1dull) >> 11;
}

u64 random_bits(Warp& w) { return w.block->machine->draw() << 32 ^ w.block->machine->draw(); }
u64 noise_of(const Warp& w) { return w.block->machine->options.noise; }
bool checks_races(const Warp& w) { return w.block->machine->options.races; }
void try_again(Warp& w) { w.scheduling->again = true; }
void later(Block& block, std::function<void()> action) { block.background.push_back(std::move(action)); }
void add_at_exit(void (*check)(Warp&)) { exit_checks().push_back(check); }

static void join(Clocks& into, const Clocks& from) {
    if (into.size() < from.size()) into.resize(from.size(), 0);
    for (size_t v = 0; v < from.size(); ++v) into[v] = std::max(into[v], from[v]);
}

void join(std::shared_ptr<const Orders>& into, const std::shared_ptr<const Orders>& from) {
    if (!from || into == from) return;
    if (!into || from->covers(*into)) {
        into = from;
        return;
    }
    if (into->covers(*from)) return;
    auto both = std::make_shared<Orders>(*into);
    for (size_t n = 0; n < from->blocks.size(); ++n) both->add(from->blocks[n], &from->clocks[n * from->width]);
    into = both;
}

void join(Knowledge& into, const Knowledge& from) {
    join(into.known, from.known);
    join(into.fenced, from.fenced);
    join(into.orders, from.orders);
}

void advance(Warp& w) {
    if (++w.scheduling->knowledge.known[w.number] >= 1u << CLOCK_BITS)
        fail(w, "too many barriers and fences of one warp for the check of races");
}

void release_to(Warp& w, Knowledge& knowledge) {
    join(knowledge, w.scheduling->knowledge);
    advance(w);
}

void acquire_from(Warp& w, const Knowledge& knowledge) {
    Warp::Scheduling& s = *w.scheduling;
    join(s.knowledge, knowledge);
    // what comes back of the warp itself, its lanes have handed to each other
    if (w.number < (int)knowledge.known.size()) s.lanes_known = std::max(s.lanes_known, knowledge.known[w.number]);
}

void meet_lanes(Warp& w, u32 lanes) {
    Warp::Scheduling& s = *w.scheduling;
    const u32 now = s.clock(w);
    if (lanes == s.running) s.lanes_known = now;
    else {
        if (!s.pairs_known) s.pairs_known = std::make_unique<u32[]>(LANES * LANES);
        u32 best[LANES] = {};
        for (int l = 0; l < LANES; ++l)
            for (int k = 0; k < LANES; ++k)
                if (lanes >> l & 1) best[k] = std::max(best[k], lanes >> k & 1 ? now : s.pairs_known[l * LANES + k]);
        for (int l = 0; l < LANES; ++l)
            if (lanes >> l & 1) memcpy(&s.pairs_known[l * LANES], best, sizeof best);
    }
    advance(w);
}

bool lanes_ordered(const Warp& w, int lane, int earlier, u32 clock) {
    const Warp::Scheduling& s = *w.scheduling;
    return lane == earlier || clock <= s.lanes_known || (s.pairs_known && clock <= s.pairs_known[lane * LANES + earlier]);
}

std::string name_of(const Warp& w) {
    const u32* place = w.block->place;
    return "block " + std::to_string(place[0]) + "," + std::to_string(place[1]) + "," + std::to_string(place[2]) +
           ((size_t)w.number < w.block->warps.size() ? " warp " + std::to_string(w.number) : " bulk copy");
}

std::string hex(u64 number) {
    char text[32];
    snprintf(text, sizeof text, "0x%llx", (unsigned long long)number);
    return text;
}

std::string* first_finding(Warp& w, const char* kind) {
    auto& findings = w.block->machine->findings;
    const int at = w.at ? w.at->number : -1;
    auto [place, fresh] = findings.try_emplace({kind, at}, Finding{kind, "", at, 0});
    ++place->second.count;
    if (!fresh) return nullptr;
    if (findings.size() > 400) fail(w, "more than 400 findings");
    place->second.text = name_of(w) + ": ";
    return &place->second.text;
}

void report(Warp& w, const char* kind, const std::string& text) {
    if (std::string* first = first_finding(w, kind)) *first += text;
}

void fail(Warp& w, const std::string& text) {
    throw std::runtime_error("@" + std::to_string(w.at ? w.at->number : -1) + " " + name_of(w) + ": " + text);
}

}  // namespace ptx
