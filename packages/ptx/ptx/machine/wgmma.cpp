// Asynchronous products of a warpgroup (wgmma): a warp computes 16 of the 64 rows, from shared memory and registers.
//
// A product takes effect at the wait that covers its group, and not before. Shared memory is read through the async proxy: it is
// checked when the product is issued (written, followed by fence.proxy.async, initialised), and held until the wait. Registers
// are checked before the program runs, by ptx/reading/products.py. The four warps of a warpgroup run by themselves here: that all of them
// run the same products is not checked.
//
// Operands: columns N, number of D's registers, number of A's (4, or 1: a descriptor), D, A, descriptor of B, scale-d, and as plain
// numbers the signs of A and B and, for 16-bit types, whether A (in shared memory) and B are transposed.
#include <memory>

#include "shared_matrix.h"

namespace ptx {
namespace {

// ---- products in flight

struct Product {
    virtual ~Product() = default;
    virtual void land(Warp&) = 0;
};

template <class T> struct TypedProduct : Product {
    static constexpr int PER_PIECE = CHUNK / 4 * T::PER_REGISTER, DEPTH = 2 * PER_PIECE, MOST_COLUMNS = 256;
    int columns;
    const s32* sums;  // the operands that are registers of D
    bool adds;
    float sign;
    float a[16 * DEPTH];  // if it comes from registers, as they are at the issue
    std::unique_ptr<SharedMatrix> left, right;

    TypedProduct(Warp& w, const s32* operands) : columns(operands[0]), sums(operands + 3) {
        const s32 *of_left = sums + operands[1], *rest = of_left + operands[2];
        bool from_registers = operands[2] > 1, may_transpose = T::PER_REGISTER == 2;
        adds = predicate(w, rest[1]) & 1;
        sign = static_cast<float>(rest[2] * rest[3]);
        if (from_registers) unpack_left<T, DEPTH>(w, of_left, a);
        else left = matrix(w, *of_left, 16 * (w.number % 4), 16, may_transpose && rest[4]);
        right = matrix(w, rest[0], 0, columns, may_transpose && rest[from_registers ? 4 : 5]);
    }
    static std::unique_ptr<SharedMatrix> matrix(Warp& w, s32 operand, int first, int rows, bool transposed) {
        u64 bits = lanes_of<u64>(w, operand)[0];
        int mode = static_cast<int>(bits >> 62);  // none, 128, 64, 32 bytes
        return std::make_unique<SharedMatrix>(w, Descriptor(w, bits, mode ? 16 >> mode : 1), first, rows, PER_PIECE, transposed);
    }

    void land(Warp& w) override {
        float b[DEPTH * MOST_COLUMNS];
        if (left) left->template each<T>(*w.block, [&](float value, int row, int k) { a[row * DEPTH + k] = value; });
        right->template each<T>(
            *w.block, [&](float value, int row, int k) { b[k * columns + place_of_column<false>(row)] = sign * value; });
        for (int column = 0; column < columns; column += TILE_COLUMNS) {
            TileRow total[TILE_ROWS] = {};
            const s32* registers = sums + column / 2;
            if (adds) unpack_sums<false>(w, registers, total);
            multiply_add<DEPTH>(total, a, b + column, columns);
            pack_sums<false>(w, registers, total);
        }
        if (left) left->each_piece([&](u32 address) { end_reading(w, address, CHUNK); });
        right->each_piece([&](u32 address) { end_reading(w, address, CHUNK); });
    }
};

using ProductGroup = std::vector<std::unique_ptr<Product>>;

struct Products {
    ProductGroup open;
    std::vector<ProductGroup> committed;
};

Products& products(Warp& w) {
    auto& kept = w.scheduling->products;
    if (!kept) kept = std::make_shared<Products>();
    return *static_cast<Products*>(kept.get());
}

template <class T> void mma_async(Warp& w, const Instruction& i, u32 lanes) {
    require_all_lanes(w, lanes);
    products(w).open.push_back(std::make_unique<TypedProduct<T>>(w, i.operands));
}

void commit_group(Warp& w, const Instruction&, u32) {
    products(w).committed.push_back(std::move(products(w).open));
    products(w).open.clear();
}

void wait_group(Warp& w, const Instruction& i, u32) {
    auto& groups = products(w).committed;
    size_t kept = static_cast<size_t>(i.operands[0]);
    while (groups.size() > kept) {
        for (auto& product : groups.front()) product->land(w);
        groups.erase(groups.begin());
    }
}

void fence(Warp&, const Instruction&, u32) {}  // it orders registers, which ptx/reading/products.py checks

void check_at_exit(Warp& w) {
    if (!w.scheduling->products) return;
    bool in_flight = !products(w).open.empty();
    for (auto& group : products(w).committed) in_flight |= !group.empty();
    if (in_flight) report(w, "wgmma not waited for at the end", "");
    w.scheduling->products.reset();
}

const bool CHECKS = (add_at_exit(check_at_exit), true);
const Registered HANDLERS[] = {
    {"wgmma.mma_async.f32.bf16.bf16", mma_async<BFloat16>},
    {"wgmma.mma_async.f32.f16.f16", mma_async<Float16>},
    {"wgmma.mma_async.f32.tf32.tf32", mma_async<TFloat32>},
    {"wgmma.fence", fence},
    {"wgmma.commit_group", commit_group},
    {"wgmma.wait_group", wait_group},
};

}  // namespace
}  // namespace ptx
