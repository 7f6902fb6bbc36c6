// What Python calls (ptx/running/library.py): loads a program, launches it, and gives back counts and findings.
#include <algorithm>
#include <cstddef>
#include <sstream>
#include <unordered_map>

#include "memory.h"
#include "scheduler.h"

namespace ptx {

const char* const KIND_NAMES[KINDS] = {"integer",   "float",     "special",   "convert",   "move",     "predicate",
                                       "ld.global", "st.global", "ld.shared", "st.shared", "ldmatrix", "cp.async",
                                       "mma",       "shuffle",   "barrier",   "branch",    "other"};

namespace {

std::unordered_map<std::string, Handler>& handlers() {
    static std::unordered_map<std::string, Handler> all;
    return all;
}

// A launch. Python lists the members again, by name (ptx/running/launch.py), and compares their places at the first call.
struct Call {
    const u8* parameters;
    s64 parameter_bytes, grid_x, grid_y, grid_z, block_x, block_y, block_z, cluster_x, cluster_y, cluster_z, shared,
        dynamic_shared, local;
    s64 ranges;  // how many; then a number each
    const u64 *begins, *ends;
    const s64* writable;
    u8* const* initialised;  // bytes, or null
    const char* names;       // a line each
    s64 seed, races, noise, counts, resident, in_order, limit, sample;
    char* text;  // findings and the error; longer ones are cut
    s64 text_bytes;
    u64* by_kind;         // (kinds, 2): instructions, lanes
    u64* total;           // instructions, wavefronts, least wavefronts, sectors, least sectors, these two once a block
    u64* by_instruction;  // (instructions, 4): the second to the fifth of these
};

#define MEMBER(name) {#name, offsetof(Call, name)}
const std::pair<const char*, size_t> MEMBERS[] = {
    MEMBER(parameters),     MEMBER(parameter_bytes), MEMBER(grid_x),      MEMBER(grid_y),
    MEMBER(grid_z),         MEMBER(block_x),         MEMBER(block_y),     MEMBER(block_z),
    MEMBER(cluster_x),      MEMBER(cluster_y),       MEMBER(cluster_z),   MEMBER(shared),
    MEMBER(dynamic_shared), MEMBER(local),           MEMBER(ranges),      MEMBER(begins),
    MEMBER(ends),           MEMBER(writable),        MEMBER(initialised), MEMBER(names),
    MEMBER(seed),           MEMBER(races),           MEMBER(noise),       MEMBER(counts),
    MEMBER(resident),       MEMBER(in_order),        MEMBER(limit),       MEMBER(sample),
    MEMBER(text),           MEMBER(text_bytes),      MEMBER(by_kind),     MEMBER(total),
    MEMBER(by_instruction)};
#undef MEMBER

void read_instruction(Program& program, const std::string& line, std::vector<size_t>& starts,
                      std::map<std::string, int>& missing) {
    std::istringstream in(line);
    std::string name, kind;
    int control, converged, negated, count;
    Instruction i{};
    in >> name >> kind >> control >> converged >> i.predicate >> negated >> i.reconverge >> count;
    const auto kinds = std::find(KIND_NAMES, KIND_NAMES + KINDS, kind);
    if (!in || kinds == KIND_NAMES + KINDS) throw std::runtime_error("the machine cannot read: " + line);
    i.kind = (u8)(kinds - KIND_NAMES);
    i.control = (u8)control;
    i.converged = converged;
    i.negated = negated;
    i.count = count;
    i.number = (int)program.code.size();
    if (control == PLAIN || control == WAITS || control == RETRIES) {
        auto place = handlers().find(name);
        if (place == handlers().end()) ++missing[name];
        else i.handler = place->second;
    }
    starts.push_back(program.operands.size());
    for (s32 operand; (int)(program.operands.size() - starts.back()) < count && in >> operand;)
        program.operands.push_back(operand);
    if ((int)(program.operands.size() - starts.back()) != count) throw std::runtime_error("operands are missing: " + line);
    program.code.push_back(i);
}

void read_program(Program& program, const char* text, const char* specials) {
    std::istringstream in(text);
    std::string line;
    std::vector<size_t> starts;
    std::map<std::string, int> missing;
    while (std::getline(in, line))
        if (!line.empty()) read_instruction(program, line, starts, missing);
    for (size_t n = 0; n < starts.size(); ++n) program.code[n].operands = program.operands.data() + starts[n];
    for (auto& [name, count] : missing) program.error += name + " (" + std::to_string(count) + ") ";
    std::istringstream registers(specials);
    while (std::getline(registers, line)) {
        std::istringstream words(line);
        Program::Special special{"", 0, 4};
        if (!(words >> special.name >> special.slot)) continue;
        if (int bytes; words >> bytes) special.bytes = bytes;
        program.specials.push_back(special);
    }
    program.hits.resize(program.code.size());
}

void read_ranges(Machine& machine, const Call& call) {
    std::istringstream names(call.names);
    for (s64 n = 0; n < call.ranges; ++n) {
        Range range{call.begins[n], call.ends[n], call.writable[n] != 0, "", call.initialised[n]};
        std::getline(names, range.name);
        machine.ranges.push_back(range);
    }
    std::sort(machine.ranges.begin(), machine.ranges.end(), [](const Range& a, const Range& b) { return a.end < b.end; });
}

void read_call(Machine& machine, const Call& call) {
    machine.parameters = call.parameters;
    machine.parameter_bytes = call.parameter_bytes;
    const s64 sizes[] = {call.grid_x,  call.grid_y,    call.grid_z,    call.block_x,  call.block_y,
                         call.block_z, call.cluster_x, call.cluster_y, call.cluster_z};
    u32* const kept[] = {machine.grid, machine.block, machine.cluster};
    for (int n = 0; n < 9; ++n) {
        if (sizes[n] < 1 || sizes[n] > 0x7fffffff)
            throw std::runtime_error("@-1 a grid, block or cluster has size " + std::to_string(sizes[n]));
        kept[n / 3][n % 3] = (u32)sizes[n];
    }
    if (call.block_x * call.block_y * call.block_z > 1024) throw std::runtime_error("@-1 a block has more than 1024 threads");
    machine.shared = (u32)std::max<s64>(call.shared, SHARED_BASE);
    machine.dynamic_shared = (u32)call.dynamic_shared;
    machine.local = (u32)call.local;
    machine.options = {(u64)call.seed,  (u64)call.noise,  (u64)call.limit,    (u64)call.sample,
                       call.races != 0, call.counts != 0, call.in_order != 0, (int)call.resident};
    machine.random = ((u64)call.seed + 1) * 0x9e3779b97f4a7c15ull;
    for (int n = 0; n < 8; ++n) machine.draw();
    machine.by_instruction.resize(machine.program->code.size());
    read_ranges(machine, call);
}

void write_results(const Machine& machine, const Call& call, std::string text) {
    for (auto& [key, finding] : machine.findings)
        text += finding.kind + "\t@" + std::to_string(finding.instruction) + " " + finding.text + "\t" +
                std::to_string(finding.count) + "\n";
    const size_t length = std::min<size_t>(text.size(), call.text_bytes - 1);
    memcpy(call.text, text.data(), length);
    call.text[length] = 0;
    auto write = [](u64* to, const Counts& c) {
        const u64 numbers[] = {c.wavefronts, c.least_wavefronts, c.sectors, c.least_sectors};
        memcpy(to, numbers, sizeof numbers);
    };
    for (int kind = 0; kind < KINDS; ++kind) {
        call.by_kind[2 * kind] = machine.executed_by_kind[kind];
        call.by_kind[2 * kind + 1] = machine.lanes_by_kind[kind];
    }
    call.total[0] = machine.executed;
    write(call.total + 1, machine.total);
    call.total[5] = machine.sectors_once;
    call.total[6] = machine.least_once;
    if (call.by_instruction)
        for (size_t n = 0; n < machine.by_instruction.size(); ++n) write(call.by_instruction + 4 * n, machine.by_instruction[n]);
}

}  // namespace

void add_handler(const std::string& name, Handler handler) {
    if (!handlers().emplace(name, handler).second) throw std::logic_error("two handlers named " + name);
}

}  // namespace ptx

using namespace ptx;

extern "C" {

void* ptx_load(const char* text, int registers, const void* constants, int64_t constant_bytes, const char* specials) {
    auto program = std::make_unique<Program>();
    program->registers = registers;
    const u8* bytes = static_cast<const u8*>(constants);
    program->constants.assign(bytes, bytes + constant_bytes);
    try {
        read_program(*program, text, specials);
    } catch (const std::exception& error) {
        program->error = error.what();
    }
    return program.release();
}

void ptx_free(void* program) { delete static_cast<Program*>(program); }

const char* ptx_error(void* program) { return static_cast<Program*>(program)->error.c_str(); }

const uint64_t* ptx_hits(void* program) { return static_cast<Program*>(program)->hits.data(); }

const char* ptx_handlers() {
    static std::string names;
    names.clear();
    for (auto& [name, handler] : handlers()) names += name + "\n";
    return names.c_str();
}

const char* ptx_kinds() {
    static std::string names;
    names.clear();
    for (const char* name : KIND_NAMES) names += std::string(name) + "\n";
    return names.c_str();
}

// The members of Call and where they lie, a line each; the last line has the size.
const char* ptx_call_members() {
    static std::string lines;
    lines.clear();
    for (auto& [name, offset] : MEMBERS) lines += std::string(name) + " " + std::to_string(offset) + "\n";
    lines += "size " + std::to_string(sizeof(Call)) + "\n";
    return lines.c_str();
}

// 0, or 1 where an error ended the launch: the first line of the text.
int ptx_launch(void* program, const void* arguments) {
    const Call& call = *static_cast<const Call*>(arguments);
    Machine machine;
    machine.program = static_cast<Program*>(program);
    std::string text;
    try {
        read_call(machine, call);
        run_grid(machine);
    } catch (const std::exception& error) {
        text = std::string("error\t") + error.what() + "\t1\n";
    }
    write_results(machine, call, text);
    return !text.empty();
}
}
