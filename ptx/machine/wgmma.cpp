// Asynchronous products of a warpgroup (wgmma): a warp computes 16 of the 64 rows, from shared memory and registers.
//
// A product takes effect at the wait that covers its group, and not before. Shared memory is read through the async proxy: it is
// checked when the product is issued (written, followed by fence.proxy.async, initialised), and held until the wait. Registers
// are checked before the program runs, by ptx/products.py. The four warps of a warpgroup run by themselves here: that all of them
// run the same products is not checked.
//
// Operands: columns N, number of D's registers, number of A's (4, or 1: a descriptor), D, A, descriptor of B, scale-d, and as plain
// numbers the signs of A and B and, for 16-bit types, whether A (in shared memory) and B are transposed.
#include <memory>

#include "matrices.h"
#include "memory.h"

namespace ptx {
namespace {

constexpr int ROW_BYTES = 32, CHUNK = 16;  // a row in K has 32 bytes: 16 halves or 8 of tf32

// ---- matrices in shared memory

// A matrix lies in pieces of 16 bytes. Rows of the canonical layouts are swizzled in units of these: the piece's place within
// 32, 64 or 128 bytes is xor-ed with the number of the 128 bytes it lies in.
struct Descriptor {
    u32 start, leading, stride;
    int pieces;  // of a swizzled row: 2, 4 or 8; 1 without a swizzle

    explicit Descriptor(u64 bits)
        : start(field(bits, 0)), leading(field(bits, 16)), stride(field(bits, 32)), pieces(bits >> 62 ? 16 >> (bits >> 62) : 1) {}

    static u32 field(u64 bits, int shift) { return static_cast<u32>(bits >> shift & 0x3fff) << 4; }
    static bool has_base_offset(u64 bits) { return bits >> 49 & 7; }

    u32 swizzled(u32 offset) const {
        u32 address = start + offset;
        return address ^ (address >> 7 & (pieces - 1)) << 4;
    }
    // Along K: piece `piece` of row `row` in M or N. Groups of 8 rows lie `stride` apart. A row's pieces are neighbours, or
    // `leading` apart without a swizzle.
    u32 along_depth(int row, int piece) const {
        return swizzled(row % 8 * CHUNK * pieces + row / 8 * stride + piece * (pieces == 1 ? leading : CHUNK));
    }
    // Along M or N: piece `piece` of row `k` in K. The roles of both offsets change without a swizzle.
    u32 along_rows(int k, int piece) const {
        if (pieces == 1) return start + piece * stride + k % 8 * CHUNK + k / 8 * leading;
        return swizzled(piece % pieces * CHUNK + piece / pieces * leading + k % 8 * CHUNK * pieces + k / 8 * stride);
    }
};

// A part of a matrix that a product reads: `rows` rows of M or N from `first` on.
struct SharedMatrix {
    std::vector<u32> addresses;
    int rows;
    bool transposed;  // a piece holds neighbours in M or N

    SharedMatrix(Warp& w, u64 bits, int first, int row_count, int per_piece, bool along_rows)
        : rows(row_count), transposed(along_rows) {
        if (Descriptor::has_base_offset(bits)) fail(w, "wgmma: descriptors with a base offset are not supported");
        Descriptor descriptor(bits);
        if (transposed)
            for (int k = 0; k < depth(per_piece); ++k)
                for (int piece = 0; piece < rows / per_piece; ++piece)
                    addresses.push_back(descriptor.along_rows(k, first / per_piece + piece));
        else
            for (int row = 0; row < rows; ++row)
                for (int piece = 0; piece < ROW_BYTES / CHUNK; ++piece)
                    addresses.push_back(descriptor.along_depth(first + row, piece));
        for (u32 address : addresses) begin_reading(w, address, CHUNK);
    }
    static int depth(int per_piece) { return per_piece * ROW_BYTES / CHUNK; }

    void release(Warp& w) const {
        for (u32 address : addresses) end_reading(w, address, CHUNK);
    }
    // visit(value, row, k) for all elements
    template <class T, class Visit> void each(Warp& w, Visit visit) const {
        constexpr int WORDS = CHUNK / 4, PER_PIECE = WORDS * T::PER_REGISTER;
        int pieces = transposed ? rows / PER_PIECE : ROW_BYTES / CHUNK, number = 0;
        for (u32 address : addresses) {
            int line = number / pieces, first = number % pieces * PER_PIECE;
            ++number;
            u32 words[WORDS];
            memcpy(words, shared_memory(*w.block) + address, CHUNK);
            for (int e = 0; e < PER_PIECE; ++e) {
                float value = T::value(words[e / T::PER_REGISTER], e % T::PER_REGISTER);
                if (transposed) visit(value, first + e, line);
                else visit(value, line, first + e);
            }
        }
    }
};

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
        if (from_registers) unpack_left<T>(w, of_left, operands[2], a, DEPTH);
        else left = matrix(w, *of_left, 16 * (w.number % 4), 16, may_transpose && rest[4]);
        right = matrix(w, rest[0], 0, columns, may_transpose && rest[from_registers ? 4 : 5]);
    }
    static std::unique_ptr<SharedMatrix> matrix(Warp& w, s32 descriptor, int first, int rows, bool transposed) {
        return std::make_unique<SharedMatrix>(w, lanes_of<u64>(w, descriptor)[0], first, rows, PER_PIECE, transposed);
    }

    void land(Warp& w) override {
        float b[DEPTH * MOST_COLUMNS], total[16 * MOST_COLUMNS];
        if (left) left->template each<T>(w, [&](float value, int row, int k) { a[row * DEPTH + k] = value; });
        right->template each<T>(w, [&](float value, int row, int k) { b[k * columns + row] = sign * value; });
        if (adds) unpack_sums(w, sums, false, total, columns);
        else memset(total, 0, sizeof total);
        multiply_add(total, a, b, DEPTH, columns);
        pack_sums(w, sums, false, total, columns);
        if (left) left->release(w);
        right->release(w);
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

void fence(Warp&, const Instruction&, u32) {}  // it orders registers, which ptx/products.py checks

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
