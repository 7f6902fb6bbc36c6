// Matrices that products read in shared memory, as their descriptors say where (wgmma, tcgen05).
#pragma once

#include "matrices.h"
#include "memory.h"

namespace ptx {

constexpr int ROW_BYTES = 32, CHUNK = 16;  // a product's row in K has 32 bytes: 16 halves or 8 of tf32

// A matrix lies in pieces of 16 bytes. Rows of the canonical layouts are swizzled in units of these: the piece's place within
// 32, 64 or 128 bytes is xor-ed with the number of the 128 bytes it lies in.
struct Descriptor {
    u32 start, leading, stride;
    int pieces;  // of a swizzled row: 2, 4 or 8; 1 without a swizzle

    Descriptor(Warp& w, u64 bits, int pieces_of_a_row)
        : start(field(bits, 0)), leading(field(bits, 16)), stride(field(bits, 32)), pieces(pieces_of_a_row) {
        if (bits >> 49 & 7) fail(w, "a matrix descriptor with a base offset");
    }
    static u32 field(u64 bits, int shift) { return static_cast<u32>(bits >> shift & 0x3fff) << 4; }

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

// A part of a matrix that a product reads: `rows` rows of M or N from `first` on. They are checked and held (begin_reading) when it
// is made; who made it ends the reading.
struct SharedMatrix {
    std::vector<u32> addresses;
    int rows;
    bool transposed;  // a piece holds neighbours in M or N

    SharedMatrix(Warp& w, const Descriptor& descriptor, int first, int row_count, int per_piece, bool along_rows)
        : rows(row_count), transposed(along_rows) {
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

    template <class Visit> void each_piece(Visit visit) const {
        for (u32 address : addresses) visit(address);
    }
    // visit(value, row, k) for all elements
    template <class T, class Visit> void each(Block& block, Visit visit) const {
        constexpr int WORDS = CHUNK / 4, PER_PIECE = WORDS * T::PER_REGISTER;
        int pieces = transposed ? rows / PER_PIECE : ROW_BYTES / CHUNK, number = 0;
        for (u32 address : addresses) {
            int line = number / pieces, first = number % pieces * PER_PIECE;
            ++number;
            u32 words[WORDS];
            memcpy(words, shared_memory(block) + address, CHUNK);
            for (int e = 0; e < PER_PIECE; ++e) {
                float value = T::value(words[e / T::PER_REGISTER], e % T::PER_REGISTER);
                if (transposed) visit(value, first + e, line);
                else visit(value, line, first + e);
            }
        }
    }
};

}  // namespace ptx
