// Products of small matrices by a warp (mma.sync), and the instructions that bring matrices into its registers.
//
// Operands in PTX's order: mma D, A, B, C; ldmatrix registers, address; stmatrix address, registers; movmatrix destination, source.
#include "matrices.h"

#include "memory.h"

namespace ptx {

void require_all_lanes(Warp& w, u32 lanes) {
    if (lanes != ALL) fail(w, "an instruction of the whole warp runs in lanes " + hex(lanes) + " only");
}

namespace {

// ---- mma.sync m16n8k<depth>

// B has 8 columns: the 4 lanes of a column hold neighbours in k, the second register the second half of k.
template <class T, int depth, bool half_sums, class Number> void unpack_right(Warp& w, const s32* operands, Number* b) {
    constexpr int NEIGHBOURS = 4 * T::PER_REGISTER;
    for (int q = 0; q < depth / NEIGHBOURS; ++q) {
        const auto* stored = lanes_of<typename T::Stored>(w, operands[q]);
        for (int column = 0; column < TILE_COLUMNS; ++column)
            for (int n = 0; n < NEIGHBOURS; ++n)
                b[(NEIGHBOURS * q + n) * TILE_COLUMNS + place_of_column<half_sums>(column)] =
                    T::widened(stored[column * NEIGHBOURS + n]);
    }
}

template <class Left, class Right, int depth, bool half_sums, class Number, class Row>
void multiply(Warp& w, const Instruction& i, u32 lanes) {
    require_all_lanes(w, lanes);
    constexpr int RIGHT = depth / (4 * Left::PER_REGISTER), LEFT = 2 * RIGHT, SUMS = half_sums ? 2 : 4;
    Number a[TILE_ROWS * depth], b[depth * TILE_COLUMNS];
    Row sums[TILE_ROWS];
    const s32 *left = i.operands + SUMS, *right = left + LEFT;
    unpack_left<Left, depth>(w, left, a);
    unpack_right<Right, depth, half_sums>(w, right, b);
    unpack_sums<half_sums>(w, right + RIGHT, sums);
    multiply_add<depth>(sums, a, b, TILE_COLUMNS);
    pack_sums<half_sums>(w, i.operands, sums);
}

template <class T, int depth, bool half_sums> constexpr auto mma = multiply<T, T, depth, half_sums, float, TileRow>;
template <class Left, class Right> constexpr auto mma_bytes = multiply<Byte<Left>, Byte<Right>, 32, false, u32, IntegerRow>;

const Registered PRODUCTS[] = {
    {"mma.m16n8k16.f32.bf16.bf16.f32", mma<BFloat16, 16, false>},
    {"mma.m16n8k8.f32.bf16.bf16.f32", mma<BFloat16, 8, false>},
    {"mma.m16n8k16.f32.f16.f16.f32", mma<Float16, 16, false>},
    {"mma.m16n8k8.f32.f16.f16.f32", mma<Float16, 8, false>},
    {"mma.m16n8k16.f16.f16.f16.f16", mma<Float16, 16, true>},
    {"mma.m16n8k8.f16.f16.f16.f16", mma<Float16, 8, true>},
    {"mma.m16n8k8.f32.tf32.tf32.f32", mma<TFloat32, 8, false>},
    {"mma.m16n8k4.f32.tf32.tf32.f32", mma<TFloat32, 4, false>},
    {"mma.m16n8k32.s32.u8.u8.s32", mma_bytes<u8, u8>},
    {"mma.m16n8k32.s32.s8.s8.s32", mma_bytes<s8, s8>},
    {"mma.m16n8k32.s32.u8.s8.s32", mma_bytes<u8, s8>},
    {"mma.m16n8k32.s32.s8.u8.s32", mma_bytes<s8, u8>},
};

// ---- matrices of 8 rows of 8 halves: a lane holds two neighbours in row lane / 4, or in column lane / 4 if transposed

struct Tile {
    u16 rows[8][8];

    u16& at(int lane, int half, bool transposed) {
        int row = lane / 4, column = lane % 4 * 2 + half;
        return transposed ? rows[column][row] : rows[row][column];
    }
    void from_lanes(const u32* lanes, bool transposed) {
        for (int l = 0; l < LANES; ++l)
            for (int half : {0, 1}) at(l, half, transposed) = static_cast<u16>(lanes[l] >> 16 * half);
    }
    void to_lanes(u32* lanes, bool transposed) {
        for (int l = 0; l < LANES; ++l) lanes[l] = at(l, 0, transposed) | static_cast<u32>(at(l, 1, transposed)) << 16;
    }
};

// Lane 8 q + r has the address of row r of tile q.
void count_rows(Warp& w, const u64 addresses[LANES], int tiles) {
    count_access(w, SHARED, addresses, 16, tiles == 4 ? ALL : (1u << 8 * tiles) - 1);
}

template <bool transposed> void ldmatrix(Warp& w, const Instruction& i, u32 lanes) {
    require_all_lanes(w, lanes);
    int tiles = i.count - 3;
    const s32* registers = i.operands;
    u64 addresses[LANES];
    addresses_of(w, registers + tiles, addresses);
    u64 base;
    const bool quick = read_shared(w, addresses, 16, (u32)((1ull << 8 * tiles) - 1), base);
    for (int q = 0; q < tiles; ++q) {
        Tile tile;
        for (int r = 0; r < 8; ++r) {
            int lane = 8 * q + r;
            memcpy(tile.rows[r],
                   quick ? reinterpret_cast<u8*>(base + addresses[lane])
                         : access(w, SHARED, addresses[lane], 16, lane, Access::READ),
                   16);
        }
        tile.to_lanes(lanes_of<u32>(w, registers[q]), transposed);
    }
    count_rows(w, addresses, tiles);
}

template <bool transposed> void stmatrix(Warp& w, const Instruction& i, u32 lanes) {
    require_all_lanes(w, lanes);
    int tiles = i.count - 3;
    const s32* registers = i.operands + 3;
    u64 addresses[LANES];
    addresses_of(w, i.operands, addresses);
    for (int q = 0; q < tiles; ++q) {
        Tile tile;
        tile.from_lanes(lanes_of<u32>(w, registers[q]), transposed);
        for (int r = 0; r < 8; ++r) {
            int lane = 8 * q + r;
            auto* row = reinterpret_cast<const u8*>(tile.rows[r]);
            memcpy(access(w, SHARED, addresses[lane], 16, lane, Access::WRITE, row), row, 16);
        }
    }
    count_rows(w, addresses, tiles);
}

void movmatrix(Warp& w, const Instruction& i, u32 lanes) {
    require_all_lanes(w, lanes);
    Tile tile;
    tile.from_lanes(lanes_of<u32>(w, i.operands[1]), false);
    tile.to_lanes(lanes_of<u32>(w, i.operands[0]), true);
}

const Registered MOVE("movmatrix.trans", movmatrix);
const bool COPIES = [] {
    for (std::string tiles : {".x1", ".x2", ".x4"}) {
        add_handler("ldmatrix" + tiles, ldmatrix<false>);
        add_handler("ldmatrix" + tiles + ".trans", ldmatrix<true>);
        add_handler("stmatrix" + tiles, stmatrix<false>);
        add_handler("stmatrix" + tiles + ".trans", stmatrix<true>);
    }
    return true;
}();

}  // namespace
}  // namespace ptx
