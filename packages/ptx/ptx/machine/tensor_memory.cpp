// Tensor memory (tcgen05): 128 lanes of 512 columns of 4 bytes a block, products into it, loads and stores.
//
// Products are issued by one thread and take effect later, in their order, at a random time; an mbarrier to which they are committed
// tells when they have. A store takes effect at once, but other warps, and products, may rely on it only after tcgen05.wait::st.
// A load's registers are there at once. The ISA gives them to a thread only after tcgen05.wait::ld, but LLVM moves arithmetic of
// Triton's kernels to before that wait, so that it is not checked.
// Memory is full of NaN at first: Triton's kernels load, and do not use, what no product has written where a loop has no step.
// All accesses are checked by 16 lanes of a column: who wrote and who read them, and what is in flight. The order of products and
// accesses is that of barriers and mbarriers; tcgen05.fence is not asked for, and counts for nothing.
//
// Operands: mma address of D, descriptor of A (or the address of A in tensor memory), descriptor of B, kind of product, whether D is
// added; ld registers, address (, distance of the second half); st address, (distance,) registers.
#include <algorithm>
#include <deque>
#include <memory>

#include "async_copies.h"
#include "shared_matrix.h"

namespace ptx {
namespace {

constexpr u32 ROWS = 128, COLUMNS = 512, HALF = 16, HALVES = ROWS / HALF;

// 16 lanes of a column.
struct Cell {
    u32 clock;  // of its writer, when it wrote
    u16 writer;  // warp, or the number of warps: a product
    bool storing;  // tcgen05.wait::st has not come
    u16 produced, consumed;  // products in flight that write, and that read
};

struct TensorMemory {
    std::vector<u32> values = std::vector<u32>(ROWS * COLUMNS, 0x7fffffff);
    std::vector<Cell> cells = std::vector<Cell>(HALVES * COLUMNS);
    std::vector<std::vector<u32>> reads;  // (warp or product, cell): clock of the last one
    u16 owner[COLUMNS] = {};  // 0: free; else the number of the allocation
    u16 allocations = 0;
    bool permitted = true;
    std::deque<std::function<void()>> queue;  // products and arrivals that will come, in order
    u64 done = 0;  // of these
    std::vector<bool> issuers;  // threads that have issued a product: a commit waits for those of its own thread alone

    explicit TensorMemory(size_t warps) : reads(warps + 1, std::vector<u32>(HALVES * COLUMNS)), issuers(warps * LANES) {}

    u32& value(u32 row, u32 column) { return values[row * COLUMNS + column]; }
};

TensorMemory& tensor_memory(Block& block) {
    if (!block.tensor_memory) block.tensor_memory = std::make_shared<TensorMemory>(block.warps.size());
    return *static_cast<TensorMemory*>(block.tensor_memory.get());
}

std::string address_text(u32 row, u32 column) { return "lane " + std::to_string(row) + ", column " + std::to_string(column); }

// An address has the lane in its upper half.
u32 address_of(Warp& w, const s32* operands, u32 lanes) {
    u64 addresses[LANES];
    addresses_of(w, operands, addresses);
    return static_cast<u32>(addresses[__builtin_ctz(lanes)]);
}

// ---- checks: a piece is `halves` times 16 lanes from `row` on, in columns [column, column + count)

enum class Use { LOAD, STORE, CONSUME, PRODUCE };

struct Check {
    Warp& w;
    TensorMemory& memory = tensor_memory(*w.block);
    const Clocks& known = w.scheduling->knowledge.known;
    u32 product = static_cast<u32>(w.block->warps.size());  // the number of what is no warp

    void piece(u32 row, u32 column, u32 count, u32 rows, u32 step, Use use, bool adds = true) {
        if (column + count > COLUMNS || row + rows > ROWS)
            fail(w, "out of tensor memory: " + address_text(row, column) + ", " + std::to_string(count) + " columns");
        for (u32 c = column; c < column + count; ++c) {
            if (!memory.owner[c]) fail(w, "column " + std::to_string(c) + " of tensor memory is not allocated");
            for (u32 r = row; r < row + rows; r += step) one(r, c, use, adds);
        }
    }

    void one(u32 row, u32 column, Use use, bool adds) {
        u32 number = row / HALF * COLUMNS + column;
        Cell& cell = memory.cells[number];
        auto tell = [&](const char* kind) { report(w, kind, address_text(row, column)); };
        bool reads = use == Use::LOAD || use == Use::CONSUME || (use == Use::PRODUCE && adds);
        bool by_product = use == Use::CONSUME || use == Use::PRODUCE;
        if (cell.produced && use != Use::PRODUCE) tell("tensor memory used before the product that writes it has ended");
        if (cell.consumed && (use == Use::STORE || use == Use::PRODUCE))
            tell("write to tensor memory that a product in flight reads");
        if (cell.storing && !(use == Use::STORE && cell.writer == w.number)) tell("tensor memory used before tcgen05.wait::st");
        bool in_order = cell.writer == product && by_product;  // products happen in their order
        if (!in_order && cell.clock > known[cell.writer] && cell.writer != w.number)
            tell(reads ? "race in tensor memory: read after write" : "race in tensor memory: write after write");
        if (use == Use::LOAD) memory.reads[w.number][number] = known[w.number];
        if (use == Use::STORE || use == Use::PRODUCE)
            for (u32 v = 0; v <= product; ++v)
                if (v != static_cast<u32>(w.number) && !(v == product && by_product) && memory.reads[v][number] > known[v])
                    tell("race in tensor memory: write after read");
        if (use == Use::STORE) cell = {known[w.number], static_cast<u16>(w.number), true, cell.produced, cell.consumed};
        if (use == Use::PRODUCE) ++cell.produced;
        if (use == Use::CONSUME) ++cell.consumed;
    }
};

// ---- allocation

void alloc(Warp& w, const Instruction& i, u32 lanes) {  // address of a word in shared memory, columns
    require_all_lanes(w, lanes);
    TensorMemory& memory = tensor_memory(*w.block);
    u32 count = lanes_of<u32>(w, i.operands[3])[0], column = 0, free = 0;
    if (count < 32 || count > COLUMNS || count & (count - 1)) fail(w, "tcgen05.alloc of " + std::to_string(count) + " columns");
    if (!memory.permitted) fail(w, "tcgen05.alloc after tcgen05.relinquish_alloc_permit");
    for (u32 c = 0; c < COLUMNS && free < count; ++c) {
        if (memory.owner[c]) free = 0, column = c + 1;
        else ++free;
    }
    if (free < count) fail(w, "tcgen05.alloc waits for columns that nothing gives back");
    std::fill_n(memory.owner + column, count, ++memory.allocations);
    auto* bytes = reinterpret_cast<const u8*>(&column);
    memcpy(access(w, SHARED, address_of(w, i.operands, lanes), 4, 0, Access::WRITE, bytes), bytes, 4);
    fence_proxy(
        w);  // Triton has a bulk copy write there next, behind a barrier alone; the ISA does not name the proxy of this write
}

void dealloc(Warp& w, const Instruction& i, u32 lanes) {  // address, columns
    require_all_lanes(w, lanes);
    TensorMemory& memory = tensor_memory(*w.block);
    u32 column = lanes_of<u32>(w, i.operands[0])[0] & 0xffff, count = lanes_of<u32>(w, i.operands[1])[0];
    u16 owner = column < COLUMNS ? memory.owner[column] : 0;
    if (!owner || std::count(memory.owner, memory.owner + COLUMNS, owner) != count ||
        (column && memory.owner[column - 1] == owner))
        fail(w, "tcgen05.dealloc of what was not allocated so: column " + std::to_string(column) + ", " + std::to_string(count) +
                    " columns");
    for (u32 number = 0; number < HALVES * COLUMNS; ++number) {
        u32 c = number % COLUMNS;
        if (c < column || c >= column + count) continue;
        if (memory.cells[number].produced || memory.cells[number].consumed)
            report(w, "tcgen05.dealloc under a product in flight", "column " + std::to_string(c));
        memory.cells[number] = {};
    }
    std::fill_n(memory.owner + column, count, 0);
}

void relinquish(Warp& w, const Instruction&, u32) { tensor_memory(*w.block).permitted = false; }

void check_at_exit(Warp& w) {
    auto* memory = static_cast<TensorMemory*>(w.block->tensor_memory.get());
    if (!memory || w.block->alive) return;
    if (std::any_of(memory->owner, memory->owner + COLUMNS, [](u16 owner) { return owner; }))
        report(w, "tensor memory not given back at the end", "");
}

// ---- loads and stores: lane l has lane l of its warp's 32; of 16x32bx2, lanes 16 to 31 have the same 16 lanes further right

template <bool two_halves, bool stores> void transfer(Warp& w, const Instruction& i, u32 lanes) {
    require_all_lanes(w, lanes);
    int columns = i.count - (two_halves ? 4 : 3);
    const s32* address = stores ? i.operands : i.operands + columns;
    const s32* registers = stores ? i.operands + i.count - columns : i.operands;
    u32 place = address_of(w, address, lanes), row = place >> 16, column = place & 0xffff;
    u32 distance = two_halves ? address[3] : 0, rows = two_halves ? HALF : LANES;
    if (row % rows || row / LANES != static_cast<u32>(w.number % 4))
        fail(w, "a warp reaches only its 32 lanes of tensor memory; the address is in lane " + std::to_string(row));
    Check check{w};
    for (u32 half = 0; half < (two_halves ? 2u : 1u); ++half)
        check.piece(row, column + half * distance, columns, rows, HALF, stores ? Use::STORE : Use::LOAD);
    for (int c = 0; c < columns; ++c) {
        u32* values = lanes_of<u32>(w, registers[c]);
        for (u32 l = 0; l < LANES; ++l) {
            u32& cell = check.memory.value(row + l % rows, column + c + l / rows * distance);
            if (stores) cell = values[l];
            else values[l] = cell;
        }
    }
}

void wait_loads(Warp&, const Instruction&, u32) {}

void wait_stores(Warp& w, const Instruction&, u32) {
    for (Cell& cell : tensor_memory(*w.block).cells)
        if (cell.writer == w.number) cell.storing = false;
}

// ---- products

// What the instruction descriptor says of kind::f16 and kind::tf32.
struct Kind {
    u32 bits;
    u32 type_a() const { return bits >> 7 & 7; }
    u32 type_b() const { return bits >> 10 & 7; }
    float sign() const { return (bits >> 13 & 1) != (bits >> 14 & 1) ? -1.0f : 1.0f; }
    bool transposed_a() const { return bits >> 15 & 1; }
    bool transposed_b() const { return bits >> 16 & 1; }
    u32 columns() const { return (bits >> 17 & 63) * 8; }
    u32 rows() const { return (bits >> 24 & 31) * 16; }
    // Sums in float32, nothing sparse, no saturation, A and B of one type.
    bool supported() const {
        return (bits >> 4 & 3) == 1 && !(bits & 15) && (rows() == 64 || rows() == 128) && columns() >= 8 && type_a() == type_b();
    }
};

// Row r of 64 lies in lane r % 16 of every 32, of 128 in lane r.
u32 lane_of_row(u32 row, u32 rows) { return rows == 64 ? row / 16 * 32 + row % 16 : row; }

template <class T> struct TensorProduct {
    static constexpr int DEPTH = ROW_BYTES / 4 * T::PER_REGISTER;
    static constexpr u32 LEFT_COLUMNS = ROW_BYTES / 4;  // of A, if it lies in tensor memory

    Block& block;
    Kind kind;
    bool adds;
    u32 d, a_place = 0;
    std::unique_ptr<SharedMatrix> left, right;

    void each_cell(u32 place, u32 columns, std::function<void(u32 cell)> visit) const {
        for (u32 row = 0; row < kind.rows(); row += HALF)
            for (u32 c = 0; c < columns; ++c)
                visit(((place >> 16) + lane_of_row(row, kind.rows())) / HALF * COLUMNS + (place & 0xffff) + c);
    }

    void fill(float* a, float* b) {
        TensorMemory& memory = tensor_memory(block);
        u32 columns = kind.columns();
        auto into_a = [&](float value, int row, int k) { a[row * DEPTH + k] = value; };
        auto into_b = [&](float value, int row, int k) { b[k * columns + row] = kind.sign() * value; };
        if (left) left->template each<T>(block, into_a);
        else
            for (u32 row = 0; row < kind.rows(); ++row)
                for (int k = 0; k < DEPTH; ++k) {
                    u32 column = (a_place & 0xffff) + k / T::PER_REGISTER;
                    into_a(T::value(memory.value((a_place >> 16) + lane_of_row(row, kind.rows()), column), k % T::PER_REGISTER),
                           row, k);
                }
        right->template each<T>(block, into_b);
    }

    void land() {
        TensorMemory& memory = tensor_memory(block);
        u32 columns = kind.columns(), rows = kind.rows();
        std::vector<float> a(rows * DEPTH), b(DEPTH * columns);
        fill(a.data(), b.data());
        for (u32 row = 0; row < rows; row += TILE_ROWS)
            for (u32 column = 0; column < columns; column += TILE_COLUMNS) {
                TileRow tile[TILE_ROWS] = {};
                auto each_sum = [&](auto visit) {
                    for (u32 r = 0; r < TILE_ROWS; ++r)
                        for (u32 c = 0; c < TILE_COLUMNS; ++c)
                            visit(reinterpret_cast<float*>(tile + r) + c,
                                  &memory.value((d >> 16) + lane_of_row(row + r, rows), (d & 0xffff) + column + c));
                };
                if (adds) each_sum([](float* sum, const u32* cell) { memcpy(sum, cell, 4); });
                multiply_add<DEPTH>(tile, &a[row * DEPTH], &b[column], static_cast<int>(columns));
                each_sum([](const float* sum, u32* cell) { memcpy(cell, sum, 4); });
            }
        end(memory);
    }

    void end(TensorMemory& memory) {
        u32 clock = ++block.copy_clock;
        u16 product = static_cast<u16>(block.warps.size());
        each_cell(d, kind.columns(), [&](u32 number) {
            Cell& cell = memory.cells[number];
            cell = {clock, product, false, static_cast<u16>(cell.produced - 1), cell.consumed};
        });
        if (!left)
            each_cell(a_place, LEFT_COLUMNS, [&](u32 number) {
                --memory.cells[number].consumed;
                memory.reads[product][number] = clock;
            });
        for (auto* matrix : {left.get(), right.get()})
            if (matrix) matrix->each_piece([&](u32 address) { end_reading(block, address, CHUNK); });
    }
};

// `happen` comes at a random time, after all that was put here before.
void in_order(Block& block, std::function<void()> happen) {
    TensorMemory& memory = tensor_memory(block);
    memory.queue.push_back(std::move(happen));
    u64 number = memory.done + memory.queue.size();
    later(block, [&memory, number] {
        while (memory.done < number) {
            auto next = std::move(memory.queue.front());
            memory.queue.pop_front();
            ++memory.done;
            next();
        }
    });
}

std::unique_ptr<SharedMatrix> matrix(Warp& w, u64 bits, int rows, int per_piece, bool transposed) {
    constexpr int PIECES[8] = {1, 0, 8, 0, 4, 0, 2, 0};  // by mode: none, -, 128 bytes, -, 64, -, 32
    int pieces = PIECES[bits >> 61];
    if (!pieces || bits >> 52 & 1) fail(w, "a matrix descriptor with a mode that is not emulated: " + hex(bits));
    return std::make_unique<SharedMatrix>(w, Descriptor(w, bits, pieces), 0, rows, per_piece, transposed);
}

template <class T> void issue(Warp& w, const Instruction& i, int lane, Kind kind) {
    using Product = TensorProduct<T>;
    bool from_shared = i.count == 7;
    const s32 *of_a = i.operands + 3, *rest = of_a + (from_shared ? 1 : 3);
    bool adds = predicate(w, rest[2]) >> lane & 1;
    u32 d = address_of(w, i.operands, 1u << lane), a = from_shared ? 0 : address_of(w, of_a, 1u << lane);
    auto product = std::make_shared<Product>(Product{*w.block, kind, adds, d, a, nullptr, nullptr});
    auto shared = [&](s32 operand, u32 rows, bool transposed) {
        return matrix(w, lanes_of<u64>(w, operand)[lane], rows, CHUNK / 4 * T::PER_REGISTER, transposed);
    };
    Check check{w};
    u32 rows = kind.rows(), step = rows == 64 ? LANES : HALF, extent = rows == 64 ? ROWS - LANES + HALF : ROWS;
    if (from_shared) product->left = shared(*of_a, rows, kind.transposed_a());
    else check.piece(a >> 16, a & 0xffff, Product::LEFT_COLUMNS, extent, step, Use::CONSUME);
    product->right = shared(rest[0], kind.columns(), kind.transposed_b());
    check.piece(d >> 16, d & 0xffff, kind.columns(), extent, step, Use::PRODUCE, adds);
    in_order(*w.block, [product] { product->land(); });
    tensor_memory(*w.block).issuers[w.number * LANES + lane] = true;
}

template <bool tf32> void mma(Warp& w, const Instruction& i, u32 lanes) {
    if (lanes & (lanes - 1)) fail(w, "tcgen05.mma by several lanes: each issues the whole product");
    int lane = __builtin_ctz(lanes);
    Kind kind{lanes_of<u32>(w, i.operands[i.count - 2])[lane]};
    constexpr u32 HALF_TYPE = 0, BRAIN_TYPE = 1, TF32_TYPE = 2;
    if (!kind.supported() || kind.type_a() > TF32_TYPE || (kind.type_a() == TF32_TYPE) != tf32)
        fail(w, "tcgen05.mma of a kind that is not emulated: " + hex(kind.bits));
    if (tf32) issue<TFloat32>(w, i, lane, kind);
    else if (kind.type_a() == HALF_TYPE) issue<Float16>(w, i, lane, kind);
    else if (kind.type_a() == BRAIN_TYPE) issue<BFloat16>(w, i, lane, kind);
}

void commit(Warp& w, const Instruction& i, u32 lanes) {  // address of an mbarrier
    u64 addresses[LANES];
    addresses_of(w, i.operands, addresses);
    for (int l = 0; l < LANES; ++l)
        if (lanes >> l & 1) {
            u32 address = static_cast<u32>(addresses[l]);
            mbarrier_at(w, address);
            Block& block = *w.block;
            if (tensor_memory(block).issuers[w.number * LANES + l])
                in_order(block, [&block, address] { arrive(block, address); });
            else arrive(block, address);
        }
}

const Registered HANDLERS[] = {
    {"tcgen05.alloc", alloc},
    {"tcgen05.dealloc", dealloc},
    {"tcgen05.relinquish_alloc_permit", relinquish},
    {"tcgen05.ld.32x32b", transfer<false, false>},
    {"tcgen05.ld.16x32bx2", transfer<true, false>},
    {"tcgen05.st.32x32b", transfer<false, true>},
    {"tcgen05.st.16x32bx2", transfer<true, true>},
    {"tcgen05.wait.ld", wait_loads},
    {"tcgen05.wait.st", wait_stores},
    {"tcgen05.mma.f16", mma<false>},
    {"tcgen05.mma.tf32", mma<true>},
    {"tcgen05.commit", commit},
};
const bool CHECKS = (add_at_exit(check_at_exit), true);

}  // namespace
}  // namespace ptx
