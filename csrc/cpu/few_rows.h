// Attention of few query rows, as a decoder has them: plain dot products, and no dropout.
//
// The rows r of all query heads that share a key head meet each of its keys together. A block of keys j is one of an online
// softmax. In brackets: the names below.
//     S_rj  = scale q_r . k_j + mask_rj                                               [few_products, mask_row]
//     top'  = max(top_r, max_j S_rj),  rescale = e^(top_r - top')                     [softmax_of_keys]
//     P_rj  = e^(S_rj - top'),  total_r = rescale total_r + sum_j P_rj
//     out_r = rescale out_r + sum_j P_rj v_j                                          [few_sums]
// At the end out_r / total_r and lse_r = top_r + ln total_r                           [finish_row]
//
// Bound: keys and values are read once, in their own dtype; a tile would fill few lanes of its vectors. Here vectors run along
// the features of products and along the keys of the softmax. The values of a block are fetched during the products with its
// keys, and the next keys during the sums of values: so memory and products work at once. Where there are fewer key heads than
// threads, the keys of a head are shared out, and the parts are joined as blocks of an online softmax (join_part).
#pragma once
#include "forward.h"

namespace ISA {
namespace {

static const int ROWS_BY_FOUR = MOST_COLUMNS;  // registers hold the sums of so many rows by four keys, or vectors of values
static const int BLOCK_ROWS = 2 * ROWS_BY_FOUR;  // so many rows meet a key, or value, together; memory holds a multiple of them
static_assert(BLOCK_ROWS >= 4, "in_blocks has blocks of 4, 2 and 1 rows");
static const Size FEW_QUERIES = 8;  // so many fill half of a group's lanes
static const Size CHUNK_OF_KEYS = 64;  // so many keys or values stay in the first cache while the rows pass them

// ---- keys and values

// The rows from one on, of which `visible` masks some; null where it does not. In their place `zeros` are read.
struct RowsInPlace {
    const char* first;
    Size stride;  // in bytes
    const uint8_t* visible;
    const void* zeros;
    METHOD const void* row(Size j) const { return first + j * stride; }
    METHOD const void* visible_row(Size j) const { return visible && !visible[j] ? zeros : row(j); }
    METHOD RowsInPlace from(Size j) const { return {first + j * stride, stride, visible ? visible + j : nullptr, zeros}; }
};
// Whether rows are fetched by hand: products of several rows are too slow for the processor to look ahead far enough, and one row
// alone waits for memory where the caches do not hold the keys.
static bool fetches_rows(const Attention& a, Size rows) {
    return rows > 2 || a.B * a.Hkv * a.M * a.D * bytes_of(a.dtype) >= 1 << 22;
}
static RowsInPlace rows_in_place(const Attention& a, const StridedTensor& x, Size b, Size head, Size first) {
    const char* row = (const char*)element(x.data, a.dtype, x.at(b, head, first));
    return {row, x.stride_n * bytes_of(a.dtype), nullptr, nullptr};
}

// How a dtype's numbers are multiplied: E below is Wide, where each becomes a float32, or Paired.
template <Size DTYPE> struct Wide {
    typedef float Number;  // of a query
    typedef float Weight;  // of KEYS keys
    typedef Vector Numbers;  // STEP of a row
    static const Size STEP = VL, KEYS = 1, BYTES = bytes_of(DTYPE);
    static METHOD Vector vector(const void* row, Size n) {
        if (DTYPE == FLOAT32) return load((const float*)row + n);
        return widened(load((const uint16_t*)row + n), DTYPE == BFLOAT16);
    }
    static METHOD Vector some(const void* row, Size n, Size count) {  // and zeros
        if (DTYPE == FLOAT32) return load_some((const float*)row + n, count);
        return widened(load_some((const uint16_t*)row + n, count), DTYPE == BFLOAT16);
    }
    static METHOD Vector of_query(const float* row, Size n) { return load(row + n); }
    static void load_query(const void* row, Size size, float scale, float* to) {
        widen(row, DTYPE, size, to);
        for (Size d = 0; d < size; ++d) to[d] *= scale;
    }
    static void scale_products(float*, Size, float) {}
    template <int VECTORS>
    static METHOD void values(const RowsInPlace& rows, Size j, Size, Size d, Size count, Vector (&v)[VECTORS]) {
        const void* row = rows.visible_row(j);
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; ++n) v[n] = count < VL ? some(row, d, count) : vector(row, d + n * VL);
    }
    static void weights(float*, Size) {}
};
// Pairs of bfloat16 numbers stay so. Weights are rounded to them.
struct Paired {
    typedef uint16_t Number;
    typedef Pair Weight;
    typedef Words Numbers;
    static const Size STEP = 2 * VL, KEYS = 2, BYTES = 2;
    static METHOD Words vector(const void* row, Size n) { return load((const Pair*)((const uint16_t*)row + n)); }
    static METHOD Words some(const void* row, Size n, Size count) {
#if VL == 16
        return (Words)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), (const uint16_t*)row + n);
#else
        uint16_t x[2 * VL] = {};
        memcpy(x, (const uint16_t*)row + n, count * sizeof(uint16_t));
        return load((const Pair*)x);
#endif
    }
    static METHOD Words of_query(const uint16_t* row, Size n) { return vector(row, n); }
    static void load_query(const void* row, Size size, float, uint16_t* to) { memcpy(to, row, size * sizeof(uint16_t)); }
    static void scale_products(float* S, Size count, float scale) {  // a query times it would be rounded
        for (Size j = 0; j < count; ++j) S[j] *= scale;
    }
    // Pairs of the numbers of two keys' rows, as their two weights are one pair. Behind the last key come zeros.
    template <int VECTORS>
    static METHOD void values(const RowsInPlace& rows, Size j, Size keys, Size d, Size count, Words (&v)[VECTORS]) {
        const uint16_t* first = (const uint16_t*)rows.visible_row(j) + d;
        const uint16_t* second = (const uint16_t*)(j + 1 < keys ? rows.visible_row(j + 1) : rows.zeros) + d;
        int n = 0;
#if VL == 16
#pragma GCC unroll 8
        for (; n + 1 < VECTORS; n += 2) interleave_two(first + n * VL, second + n * VL, v[n], v[n + 1]);
#endif
#pragma GCC unroll 8
        for (; n < VECTORS; ++n) {
            const uint16_t *one = first + n * VL, *other = second + n * VL;
            if (count < VL) v[n] = interleave(load_some(one, count), load_some(other, count));
            else v[n] = interleave(load(one), load(other));
        }
    }
#if VL == 16
    // Two vectors of pairs from one load of each row: `interleave` would widen four vectors.
    static METHOD void interleave_two(const uint16_t* first, const uint16_t* second, Words& low, Words& high) {
        typedef uint16_t Lanes __attribute__((vector_size(64)));
        const Lanes order = {
            0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i one = (__m512i)vector(first, 0), other = (__m512i)vector(second, 0);
        low = (Words)_mm512_permutex2var_epi16(one, (__m512i)order, other);
        high = (Words)_mm512_permutex2var_epi16(one, (__m512i)(order + 16), other);
    }
#endif
    static void weights(float* P, Size count) {
        for (Size j = 0; j < count; j += VL) store((uint16_t*)P + j, rounded(load(P + j)));
    }
};
// f(Wide<...>() or Paired()) for the dtype of a call
template <class F> static void with_numbers(Size dtype, const F& f) {
    if (dtype == FLOAT32) return f(Wide<FLOAT32>());
    if (dtype == FLOAT16) return f(Wide<FLOAT16>());
    if constexpr (PAIRS)
        if (pairs_are_fast()) return f(Paired());
    if constexpr (!PAIRS || TILES) f(Wide<BFLOAT16>());
}

// ---- products with keys, and sums of values

// Rows that come next. The work on row j of a chunk fetches row j of these to the first cache, if it is in this block's part.
struct Fetched {
    RowsInPlace rows;
    Size parts, part;  // 0 parts where nothing is fetched, else 1 or 2
    METHOD void fetch_row(Size j, Size first, Size bytes) const {
        if (parts == 0 || (j & (parts - 1)) != part) return;
        fetch<3>((const char*)rows.row(j) + first, bytes);
    }
    METHOD Fetched from(Size j) const { return {rows.from(j), parts, part}; }
};

// f(first, Constant<rows of a block>(), its part of `fetched`) for blocks that cover the rows; the last block may reach beyond
// them. The first two blocks share the fetching: memory would be idle while the second computes.
template <class F> INLINE void in_blocks(Size rows, const RowsInPlace& fetched, const F& f) {
    const Size parts = !fetched.first ? 0 : rows > BLOCK_ROWS ? 2 : 1;
    for (Size r = 0, part = 0; r < rows; r += BLOCK_ROWS, ++part) {
        const Fetched of_block = {fetched, parts, part};
        if (rows - r > 4) f(r, Constant<BLOCK_ROWS>(), of_block);
        else if (rows - r > 2) f(r, Constant<4>(), of_block);
        else if (rows - r > 1) f(r, Constant<2>(), of_block);
        else f(r, Constant<1>(), of_block);
    }
}

// Sums over the lanes of a block (ROWS, KEYS) into S (ROWS, to_next)
template <int ROWS, int KEYS> INLINE void store_lane_sums(const Vector (&total)[ROWS][KEYS], float* S, Size to_next) {
    static const int AT_ONCE = KEYS == 2 ? 2 : 1;  // rows: sums_of_four takes four vectors
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r += AT_ONCE) {
        float* to = S + r * to_next;
        if constexpr (KEYS == 4) sums_of_four(total[r], to);
        else if constexpr (KEYS == 2) {
            float sums[4];
            sums_of_four({total[r][0], total[r][1], total[r + 1][0], total[r + 1][1]}, sums);
            memcpy(to, sums, 2 * sizeof(float)), memcpy(to + to_next, sums + 2, 2 * sizeof(float));
        } else to[0] = sum(total[r][0]);
    }
}
// S (ROWS, to_next) = rows of the query, (ROWS, stride) with zeros behind D, times KEYS keys
template <class E, int ROWS, int KEYS>
INLINE void block_of_products(const typename E::Number* query, Size stride, Size D, const RowsInPlace& keys, float* S,
                              Size to_next) {
    Vector total[ROWS][KEYS] = {};
    for (Size d = 0; d < D; d += E::STEP) {
        typename E::Numbers k[KEYS];
#pragma GCC unroll 4
        for (int j = 0; j < KEYS; ++j) k[j] = d + E::STEP <= D ? E::vector(keys.row(j), d) : E::some(keys.row(j), d, D - d);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const auto q = E::of_query(query + r * stride, d);
#pragma GCC unroll 4
            for (int j = 0; j < KEYS; ++j) add_product(total[r][j], q, k[j]);
        }
    }
    store_lane_sums(total, S, to_next);
}
template <class E, int ROWS>
static void products_of_some(const typename E::Number* query, Size stride, Size D, const RowsInPlace& keys, Size count,
                             const Fetched& fetched, float* S, Size to_next) {
    static const int KEYS = ROWS > ROWS_BY_FOUR ? 2 : 4;
    Size j = 0;
    for (; j + KEYS <= count; j += KEYS) {
        for (Size k = j; k < j + KEYS; ++k) fetched.fetch_row(k, 0, D * E::BYTES);
        block_of_products<E, ROWS, KEYS>(query, stride, D, keys.from(j), S + j, to_next);
    }
    for (; j < count; ++j) block_of_products<E, ROWS, 1>(query, stride, D, keys.from(j), S + j, to_next);
}
// S (rows, to_next) = rows of the query times `count` keys. Rows of `fetched` are fetched, as many, if they are not null.
template <class E>
static void few_products(const typename E::Number* query, Size stride, Size rows, Size D, const RowsInPlace& keys, Size count,
                         const RowsInPlace& fetched, float* S, Size to_next) {
    for (Size j = 0; j < count; j += CHUNK_OF_KEYS)
        in_blocks(rows, fetched, [&](Size r, auto some, const Fetched& part) {
            products_of_some<E, some.value>(query + r * stride, stride, D, keys.from(j), least(CHUNK_OF_KEYS, count - j),
                                            part.from(j), S + r * to_next + j, to_next);
        });
}

// out (ROWS, stride) += VECTORS vectors of the values' rows, or `numbers` of them, each times its weight P (ROWS, to_next)
template <class E, int ROWS, int VECTORS>
INLINE void block_of_sums(const typename E::Weight* P, Size to_next, const RowsInPlace& values, Size count,
                          const Fetched& fetched, Size d, Size numbers, float* out, Size stride) {
    Vector total[ROWS][VECTORS] = {};
    for (Size j = 0; j < count; j += E::KEYS) {
        typename E::Numbers v[VECTORS];
        for (Size k = j; k < j + E::KEYS; ++k) fetched.fetch_row(k, d * E::BYTES, VECTORS * VL * E::BYTES);
        E::values(values, j, count, d, numbers, v);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const auto p = splat(P[r * to_next + j / E::KEYS]);
#pragma GCC unroll 8
            for (int n = 0; n < VECTORS; ++n) add_product(total[r][n], p, v[n]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; ++n) {
            float* to = out + r * stride + d + n * VL;
            store(to, load(to) + total[r][n]);
        }
}
template <class E, int ROWS>
static void sums_of_some(const typename E::Weight* P, Size to_next, const RowsInPlace& values, Size count, const Fetched& fetched,
                         Size Dv, float* out, Size stride) {
    static const int FIT = 4 * ROWS_BY_FOUR / ROWS, MOST = FIT < 8 ? FIT : 8;  // vectors of values whose sums fit in registers
    const auto sums = [&](Size d, Size numbers, auto vectors) {
        block_of_sums<E, ROWS, vectors.value>(P, to_next, values, count, fetched, d, numbers, out, stride);
    };
    Size d = 0;
    for (; d + MOST * VL <= Dv; d += MOST * VL) sums(d, VL, Constant<MOST>());
    if constexpr (MOST > ROWS_BY_FOUR)
        for (; d + ROWS_BY_FOUR * VL <= Dv; d += ROWS_BY_FOUR * VL) sums(d, VL, Constant<ROWS_BY_FOUR>());
    for (; d < Dv; d += VL) sums(d, least(VL, Dv - d), Constant<1>());
}
// out (rows, stride) += sums of `count` values with the weights P (rows, to_next): a sum of short sums
template <class E>
static void few_sums(const typename E::Weight* P, Size to_next, Size rows, const RowsInPlace& values, Size count,
                     const RowsInPlace& fetched, Size Dv, float* out, Size stride) {
    for (Size j = 0; j < count; j += CHUNK_OF_KEYS)
        in_blocks(rows, fetched, [&](Size r, auto some, const Fetched& part) {
            sums_of_some<E, some.value>(P + r * to_next + j / E::KEYS, to_next, values.from(j), least(CHUNK_OF_KEYS, count - j),
                                        part.from(j), Dv, out + r * stride, stride);
        });
}

// ---- softmax

// `online_softmax` of one row, whose lanes are keys: all have the largest logit of the block.
static void softmax_of_keys(float* S, Size padded, bool first, float* largest_of, double* total, float* rescale) {
    float top[GROUP];
    find_top(S, padded / GROUP, GROUP, top);
    const Vector largest_of_all = splat(largest(top_of(top, GROUP / VL, VL)));
    for (Size i = 0; i < GROUP; i += VL) store(top + i, largest_of_all);
    online_softmax(S, padded / GROUP, GROUP, first, top, largest_of, total, rescale);
}

// The mask's row that begins at number `at`, added to S (count), by its dtype. A masked score is -Inf, also where it was Inf or
// NaN.
static void add_bool_row(const Masks& m, Size at, Size count, float* S) {
    const uint8_t* visible = (const uint8_t*)m.mask + at;
    if (m.stride_m == 1)  // vectors
        for (Size j = 0; j < count; ++j) S[j] = visible[j] ? S[j] : -INFINITY;
    else
        for (Size j = 0; j < count; ++j) S[j] = visible[j * m.stride_m] ? S[j] : -INFINITY;
}
static void add_float_row(const Masks& m, Size at, Size count, float* S) {
    for (Size j = 0; j < count; ++j) {
        float x;
        widen(element(m.mask, m.dtype, at + j * m.stride_m), m.dtype, 1, &x);
        S[j] = x == -INFINITY ? x : S[j] + x;
    }
}

// GroupBias of one row at a time. Without biases all pointers are null.
struct RowBias {
    int32_t* group;  // (keys rounded up to GROUP): `groups` for none
    float* row;  // (groups + 1); the last, of keys without a group, is 0
    uint8_t* hides;  // (groups + 1): whether all rows of some heads have -Inf
    bool any_hidden;  // of them
    Size b, first, last;  // the keys whose groups are loaded
    void plan(const Attention& a, Memory& memory) {
        const Size groups = a.masks.groups + 1;
        group = nullptr, row = nullptr, hides = nullptr, any_hidden = false, b = -1;
        if (!a.masks.row_bias) return;
        group = (int32_t*)memory.take(round_up(a.M, GROUP)), row = memory.take(groups);
        hides = (uint8_t*)memory.take(round_up(groups, 4) / 4);
    }
    // The rows of `heads` query heads from h, which meet the keys [from, to)
    void load_heads(const Attention& a, Size of_b, Size h, Size heads, Size from, Size to) {
        if (!row) return;
        if (b != of_b || first != from || last != to) load_keys(a, of_b, from, to);
        const Size G = a.masks.groups, rows = heads * a.N;
        const float* of_rows = a.masks.row_bias + (b * a.H + h) * a.N * G;
        any_hidden = false;
        for (Size g = 0; g <= G; ++g) hides[g] = g < G;
        for (Size r = 0; r < rows; ++r)
            for (Size g = 0; g < G; ++g) hides[g] &= of_rows[r * G + g] == -INFINITY;
        for (Size g = 0; g < G; ++g) any_hidden |= hides[g] != 0;
    }
    void load_keys(const Attention& a, Size of_b, Size from, Size to) {
        b = of_b, first = from, last = to;
        for (Size j = first; j < last; ++j) group[j - first] = (int32_t)a.masks.group_of(b * a.M + j);
        for (Size j = last; j < first + round_up(last - first, GROUP); ++j) group[j - first] = (int32_t)a.masks.groups;
    }
    // Whether none of the rows sees any of these keys
    bool hides_all(Size j0, Size count) const {
        bool all = any_hidden;
        for (Size j = j0 - first; all && j < j0 - first + count; ++j) all = hides[group[j]];
        return all;
    }
    void load_row(const Attention& a, Size h, Size n) {
        const Size G = a.masks.groups;
        if (!row) return;
        memcpy(row, a.masks.row_bias + ((b * a.H + h) * a.N + n) * G, G * sizeof(float));
        row[G] = 0;
    }
    float of_key(Size j) const { return row ? row[group[j - first]] : 0.f; }
    // Up to the next multiple of GROUP
    void add(Size j0, Size count, float* S) const {
        const Vector masked = splat(-INFINITY);
        for (Size j = 0; row && j < count; j += VL) {
            const Vector x = load(S + j);
            store(S + j, x == masked ? x : biased(x, gather(row, group + (j0 - first) + j)));
        }
    }
};
static void add_float64_row(const Masks& m, Size at, Size j0, Size count, double shift, const RowBias& bias, float* S) {
    const double* added = (const double*)m.mask + at;
    for (Size j = 0; j < count; ++j)
        S[j] = masked_by_float64(S[j], sum_of_biases(added[j * m.stride_m], bias.of_key(j0 + j)), shift);
}
// The scores S (count, rounded up to GROUP) of row n become logits: `mask_tile` of one row.
static void mask_row(const Attention& a, Size b, Size h, Size n, Size j0, Size count, RowBias& bias, float* S) {
    const Masks& m = a.masks;
    const Size at = b * m.stride_b + h * m.stride_h + n * m.stride_n + j0 * m.stride_m;
    bias.load_row(a, h, n);
    if (m.mask && m.dtype == BOOL) add_bool_row(m, at, count, S);
    else if (m.mask && m.dtype == FLOAT64) add_float64_row(m, at, j0, count, *a.mask_shifts(b, h, n), bias, S);
    else if (m.mask) add_float_row(m, at, count, S);
    if (m.dtype != FLOAT64) bias.add(j0, count, S);
    const uint8_t* visible = m.keys ? m.keys + b * a.M + j0 : nullptr;
    for (Size j = 0; visible && j < count; ++j) S[j] = visible[j] ? S[j] : -INFINITY;
    for (Size j = most(n + 1 - j0, 0); m.is_causal && j < count; ++j) S[j] = -INFINITY;
}

// ---- the forward pass

// Rows of all query heads of a key head: what a part of its keys gives
struct Part {
    float *out, *largest;  // (rows, stride), (rows, GROUP)
    double* total;  // (rows, GROUP)
};
struct FewRowsCall {
    const Forward& c;
    Size rows, stride, pieces, tasks;  // pieces: parts of a key head
    Part* parts;  // null where each key head is one
    Size space_rows() const { return round_up(rows, BLOCK_ROWS); }
    void plan(Part& part, Memory& memory) const {
        part.out = memory.take(space_rows() * stride), part.largest = memory.take(rows * GROUP);
        part.total = memory.take_doubles(rows * GROUP);
    }
};

// One thread's: rows of the query, and their products with a block of keys
struct FewRowsSpace {
    float *query, *S, *zeros;
    RowBias bias;
    Part part;
    void plan(const FewRowsCall& call, Memory& memory) {
        const Attention& a = call.c.a;
        query = memory.take(call.space_rows() * round_up(a.D, 2 * VL)), S = memory.take(call.space_rows() * BLOCK_KEYS);
        zeros = memory.take(a.Dv + VL), bias.plan(a, memory);
        if (!call.parts) call.plan(part, memory);
    }
};

// Row r of a key head is query row n of query head h.
struct QueryRow {
    Size h, n;
    QueryRow(const Attention& a, Size head, Size r) : h(head * a.group() + r / a.N), n(r % a.N) {}
};

// The rows of a key head, with zeros behind D and behind the last row, and a part that holds no key yet
template <class E>
static void start_part(const FewRowsCall& call, Size b, Size head, Size stride, typename E::Number* query, const Part& part) {
    const Attention& a = call.c.a;
    memset(query, 0, call.space_rows() * stride * sizeof(*query));
    for (Size r = 0; r < call.rows; ++r) {
        const QueryRow row(a, head, r);
        E::load_query(element(a.query.data, a.dtype, a.query.at(b, row.h, row.n)), a.D, (float)a.scale, query + r * stride);
    }
    memset(part.out, 0, call.space_rows() * call.stride * sizeof(float));
    for (Size i = 0; i < call.rows * GROUP; ++i) part.largest[i] = -INFINITY, part.total[i] = 0;
}
// Products S (count) of row r with the keys from j0 become weights as E takes them; what the part holds is rescaled.
template <class E>
static void weigh_row(const FewRowsCall& call, Size b, Size head, Size r, Size j0, Size count, bool first, RowBias& bias,
                      float* S, const Part& part) {
    const Attention& a = call.c.a;
    const QueryRow row(a, head, r);
    const Size padded = round_up(count, GROUP);
    float *out = part.out + r * call.stride, rescale[GROUP];
    E::scale_products(S, count, (float)a.scale);
    mask_row(a, b, row.h, row.n, j0, count, bias, S);
    for (Size j = count; j < padded; ++j) S[j] = -INFINITY;
    softmax_of_keys(S, padded, first, part.largest + r * GROUP, part.total + r * GROUP, rescale);
    for (Size d = 0; !first && d < a.Dv; ++d) out[d] *= rescale[0];
    E::weights(S, padded);
}
// The keys [from, to) of a key head
template <class E>
static void sum_part(const FewRowsCall& call, Size b, Size head, Size from, Size to, FewRowsSpace& x, const Part& part) {
    const Attention& a = call.c.a;
    const Size rows = call.rows, stride = round_up(a.D, E::STEP);
    const bool fetches = fetches_rows(a, rows);
    // One or two rows of 16-bit numbers wait for memory alone: of short blocks the first cache still has what was fetched.
    const Size block = rows > 2 || E::BYTES > 2 ? BLOCK_KEYS : BLOCK_KEYS / 4;
    const Size weights_to_next = BLOCK_KEYS * sizeof(float) / sizeof(typename E::Weight);
    typename E::Number* query = (typename E::Number*)x.query;
    const typename E::Weight* weights = (const typename E::Weight*)x.S;  // in the place of the products
    start_part<E>(call, b, head, stride, query, part);
    x.bias.load_heads(a, b, head * a.group(), a.group(), from, to);
    bool first = true;  // of the blocks that any row sees
    for (Size j0 = from; j0 < to; j0 += block) {
        const Size count = least(block, to - j0);
        if (x.bias.hides_all(j0, count)) continue;
        const RowsInPlace keys = rows_in_place(a, a.key, b, head, j0), next = keys.from(block), none = {};
        RowsInPlace values = rows_in_place(a, a.value, b, head, j0);
        few_products<E>(query, stride, rows, a.D, keys, count, fetches ? values : none, x.S, BLOCK_KEYS);
        for (Size r = 0; r < rows; ++r) weigh_row<E>(call, b, head, r, j0, count, first, x.bias, x.S + r * BLOCK_KEYS, part);
        first = false;
        values.visible = a.masks.keys ? a.masks.keys + b * a.M + j0 : nullptr, values.zeros = x.zeros;  // padding may hold NaN
        few_sums<E>(
            weights, weights_to_next, rows, values, count, fetches && j0 + block < to ? next : none, a.Dv, part.out, call.stride);
    }
    for (Size r = 0; r < rows; ++r)
        for (Size i = 1; i < GROUP; ++i) part.total[r * GROUP] += part.total[r * GROUP + i];
}

// Row r of `part` is taken into that of `all`, as a block of an online softmax.
static void join_part(const FewRowsCall& call, Size r, const Part& part, const Part& all) {
    float *out = all.out + r * call.stride, *top = all.largest + r * GROUP;
    double* total = all.total + r * GROUP;
    const float *from = part.out + r * call.stride, top_of_part = part.largest[r * GROUP];
    const float both = larger(top_of_part, *top), shift = both == -INFINITY ? 0.f : both;  // no visible key yet: not Inf - Inf
    const float by = expf(*top - shift), by_part = expf(top_of_part - shift);
    for (Size d = 0; d < call.c.a.Dv; ++d) out[d] = out[d] * by + from[d] * by_part;
    *total = *total * by + part.total[r * GROUP] * by_part, *top = both;
}
// Writes row r: `all` holds what all keys give.
static void finish_row(const FewRowsCall& call, Size b, Size head, Size r, const Part& all) {
    const Forward& c = call.c;
    const Attention& a = c.a;
    const QueryRow row(a, head, r);
    float *out = all.out + r * call.stride, *top = all.largest + r * GROUP, factor, unused;
    const double* total = all.total + r * GROUP;
    store_lse(a, {b, row.h, row.n, 1, GROUP}, top, total, c.lse + (b * a.H + row.h) * a.N + row.n);
    finish_rows(top, total, 1, {&unused, &factor});
    for (Size d = 0; d < a.Dv; ++d) out[d] *= factor;
    narrow(out, a.Dv, a.dtype, (void*)element(c.out.data, a.dtype, c.out.at(b, row.h, row.n)));
}
// The rows of a key head, from its parts, which are joined in the first
static void finish_head(const FewRowsCall& call, Size b, Size head, const Part* parts) {
    for (Size r = 0; r < call.rows; ++r) {
        for (Size p = 1; p < call.pieces; ++p) join_part(call, r, parts[p], parts[0]);
        finish_row(call, b, head, r, parts[0]);
    }
}

static void sum_parts_task(FewRowsCall& call, FewRowsSpace& x, Size task) {
    const Attention& a = call.c.a;
    memset(x.zeros, 0, (a.Dv + VL) * sizeof(float));
    const Size items = a.B * a.Hkv * call.pieces;
    for (Size item = share(items, task, call.tasks); item < share(items, task + 1, call.tasks); ++item) {
        const Size b = item / call.pieces / a.Hkv, head = item / call.pieces % a.Hkv, piece = item % call.pieces;
        const Size keys = a.masks.is_causal ? least(a.N, visible_keys(a, b)) : visible_keys(a, b);
        const Size first = share(keys, piece, call.pieces), last = share(keys, piece + 1, call.pieces);
        const Part& part = call.parts ? call.parts[item] : x.part;
        with_numbers(a.dtype, [&](auto e) { sum_part<decltype(e)>(call, b, head, first, last, x, part); });
        if (!call.parts) finish_head(call, b, head, &part);
    }
}

static Size few_rows_forward(const Forward& c) {
    const Attention& a = c.a;
    const Size heads = a.B * a.Hkv, pieces = most(a.M / 2048, 1);  // keys that pay for a part, on any number of threads
    if (heads == 0) return DONE;
    FewRowsCall call = {c, a.group() * a.N, round_up(a.Dv, VL), pieces, least(thread_count(), heads * pieces), nullptr};
    Memory memory;
    const auto plan = [&](Part& part) { call.plan(part, memory); };
    if (pieces > 1 && !memory.place([&] { call.parts = memory.take_spaces<Part>(heads * pieces, plan); })) return NO_MEMORY;
    const Size result = run_with_space(call.tasks, call, sum_parts_task);
    for (Size head = 0; call.parts && result == DONE && head < heads; ++head)
        finish_head(call, head / a.Hkv, head % a.Hkv, call.parts + head * pieces);
    return result;
}
// Whether a call is one
static bool is_few_rows(const Forward& c) {
    const bool few = c.a.N <= FEW_QUERIES || (VL == 16 && c.a.N * c.a.H <= 2 * FEW_QUERIES * c.a.Hkv);
    return few && c.a.N > 0 && c.score.kind == DOT && c.dropout.probability == 0;
}

}  // namespace
}  // namespace ISA
