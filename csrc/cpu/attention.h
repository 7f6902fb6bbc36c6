// Tiles of attention maps, for every operator that reads them.
//
// A tile is a block of keys by up to LANES query rows of one head: element (j, i) of it lies at j * width + i. So each lane of a
// vector is a query row: maxima and sums of rows need no sum over lanes, and keys and values are read where they lie, one number
// at a time.
#pragma once
#include "products.h"
#include "rows.h"

namespace ISA {
namespace {

static const Size LANES = VL == 16 ? 64 : 48;  // query rows of a tile: 4, 6 or 12 vectors
static const int PARTS = 16 / VL;  // vectors of a group
static const Size MOST_KEYS = 768;  // up to this number all keys are one block, within which rows have their whole statistics
static const Size BLOCK_KEYS = 512;  // more keys come in blocks of this size
static const Size MOST_KEYS_OF_FEW = 32768;  // up to this number the exponentials of GROUP rows (2 MB) are kept to be read again

struct Masks {
    const void* mask;  // bool (true = visible) or a number to add; null for none
    Size dtype, stride_b, stride_h, stride_n, stride_m;
    const uint8_t* keys;  // (B, M), 0 = padding; null for none
    Size is_causal;  // query i sees keys j <= i
    const double* shifts;  // (B, H, N) of a float64 mask: its largest value in each row, which softmax does not see; else null
    const float* row_bias;  // (B, H, N, groups): what is added to the logits of a row with the keys of a group; null for none
    const int64_t* key_groups;  // (B, M) beside row_bias. A number out of range is that of no group, to which nothing is added.
    Size groups;
    FIELDS(mask, dtype, stride_b, stride_h, stride_n, stride_m, keys, is_causal, shifts, row_bias, key_groups, groups)
    Size group_of(Size key) const {  // `groups` for none
        const Size g = key_groups[key];
        return g >= 0 && g < groups ? g : groups;
    }
};

struct Attention {
    Size dtype;  // of query, key, value and their gradients
    Size B, H, Hkv, N, M, D, Dv;
    double scale;
    StridedTensor query, key, value;
    Masks masks;
    FIELDS(dtype, B, H, Hkv, N, M, D, Dv, scale, query, key, value, masks)
    // of the rows from n on; null where the mask is not float64
    const double* mask_shifts(Size b, Size h, Size n) const {
        return masks.shifts ? masks.shifts + (b * H + h) * N + n : nullptr;
    }
    Size group() const { return H / Hkv; }  // query heads that share a key head
    // so many keys ahead are fetched where a head's keys are more than the second cache holds: where pages end, the processor stops
    // fetching by itself
    Size ahead() const { return M > MOST_KEYS ? 4 * MOST_ROWS : 0; }
    Size key_block() const { return M > MOST_KEYS ? BLOCK_KEYS : M > 0 ? M : 1; }
};

// f(first, count) for each block of keys
template <class F> static void by_blocks(const Attention& a, Size keys, const F& f) {
    for (Size j0 = 0; j0 < keys; j0 += a.key_block()) f(j0, least(a.key_block(), keys - j0));
}

// ---- keys

// A block of keys, or of values, as float32 rows: the tensor itself where it can be read as it is, else a copy.
struct Keys {
    const float* rows;
    Size stride;
    float* copy;
    Size b, head, first, count;  // what is loaded
    void plan(const Attention& a, Size size, Memory& memory) {
        copy = a.dtype != FLOAT32 || a.masks.keys ? memory.take(a.key_block() * size) : nullptr;
        b = head = first = -1;
    }
};

// How many keys a sample has up to its last visible one; the rest is skipped.
static Size visible_keys(const Attention& a, Size b) {
    Size count = a.M;
    if (a.masks.keys)
        while (count > 0 && !a.masks.keys[b * a.M + count - 1]) --count;
    return count;
}

// The gradient of a key or a value: zero at padding, also where a query or a cotangent is NaN.
static void store_key(const Attention& a, Size b, Size head, Size j, const float* gradient, Size size, const StridedTensor& to) {
    void* row = (void*)element(to.data, a.dtype, to.at(b, head, j));
    if (size == 0) return;  // an empty tensor has no pointer
    if (a.masks.keys && !a.masks.keys[b * a.M + j]) memset(row, 0, size * bytes_of(a.dtype));
    else if (row != gradient) narrow(gradient, size, a.dtype, row);
}

// Prefetches a row.
static void fetch_row(const StridedTensor& x, Size dtype, Size b, Size head, Size row, Size size) {
    fetch(element(x.data, dtype, x.at(b, head, row)), size * bytes_of(dtype));
}

// Whether a block has no padding; `visible` may be null.
static bool all_visible(const uint8_t* visible, Size count) {
    bool whole = true;
    for (Size j = 0; visible && j < count; ++j) whole &= visible[j] != 0;
    return whole;
}

// The keys' or values' rows [first, first + count) as float32: in place where possible, else a copy with zeros at padding, so that
// a NaN there reaches no product.
static void load_keys(const Attention& a, const StridedTensor& x, Size size, Keys& keys, Size b, Size head, Size first,
                      Size count) {
    // under the causal mask a later tile sees more keys of the same block
    if (keys.b == b && keys.head == head && keys.first == first && keys.count >= count) return;
    keys.b = b, keys.head = head, keys.first = first, keys.count = count;
    const uint8_t* visible = a.masks.keys ? a.masks.keys + b * a.M + first : nullptr;
    const bool in_place = a.dtype == FLOAT32 && all_visible(visible, count);
    keys.rows = in_place ? (const float*)x.data + x.at(b, head, first) : keys.copy, keys.stride = in_place ? x.stride_n : size;
    for (Size j = 0; !in_place && j < count; ++j) {
        fetch_row(x, a.dtype, b, head, first + j + 16, size);  // the processor stops fetching by itself where pages end
        if (visible && !visible[j]) memset(keys.copy + j * size, 0, size * sizeof(float));
        else widen(element(x.data, a.dtype, x.at(b, head, first + j)), a.dtype, size, keys.copy + j * size);
    }
}

// ---- query rows

struct Tile {
    Size b, h, first, rows, width;  // of head h, as RowTile
    // keys that the tile may see: under the causal mask none comes after its last row
    Size keys(const Attention& a, Size visible) const { return a.masks.is_causal ? least(visible, first + rows) : visible; }
};
INLINE Size tiles_of(const Attention& a, Size lanes = LANES) { return row_tiles(a.N, lanes); }
INLINE Tile tile_at(const Attention& a, Size b, Size h, Size index, Size lanes = LANES) {
    const RowTile t = row_tile(a.N, lanes, index);
    return {b, h, t.first, t.rows, t.width};
}

// The tiles of all query heads in order, those of a head one after the other
INLINE Tile tile_of_item(const Attention& a, Size item, Size lanes = LANES) {
    const Size tiles = tiles_of(a, lanes), head = item / tiles;
    return tile_at(a, head / a.H, head % a.H, item % tiles, lanes);
}

// `product` with a tile: B is (depth, width) and C (rows, width).
template <bool TRANSPOSED, class Finish = Store>
static void tile_product(const Tile& t, Size rows, Size depth, const float* A, Size lda, const float* B, float* C, bool add,
                         const Finish& finish = {}, Size ahead = 0) {
    const Size w = t.width;
    if (t.rows > MOST_FEW) return product<TRANSPOSED>(rows, w, depth, A, lda, B, w, C, w, add, finish, ahead);
    const auto some = [&](Size depth, const auto& finish) {
        if constexpr (TRANSPOSED) transposed_product_with_few(t.rows, rows, depth, A, lda, B, w, C, w, add);
        else product_with_few(t.rows, rows, depth, A, lda, B, w, C, w, add, finish);
    };
    for (; depth > DEPTH; depth -= DEPTH, A += DEPTH * (TRANSPOSED ? lda : 1), B += DEPTH * w, add = true) some(DEPTH, Store{});
    some(depth, finish);
}

// Prefetches as many rows as the tile has, from `first`.
static void fetch_rows(const StridedTensor& x, Size dtype, const Tile& t, Size first, Size size) {
    for (Size i = 0; i < t.rows; ++i) fetch_row(x, dtype, t.b, t.h, first + i, size);
}

// Rows of a tile times `factor`, into rows_at as (width, stride) with zeros beyond the rows and beyond `size`; and transposed as
// (size, width), where `transposed` is not null.
static void load_tile(const StridedTensor& x, Size dtype, const Tile& t, Size size, float factor, float* rows_at, Size stride,
                      float* transposed) {
    for (Size i = 0; i < t.rows; ++i) {
        float* row = rows_at + i * stride;
        const Size at = x.at(t.b, t.h, t.first + i);
        widen(element(x.data, dtype, at), dtype, size, row);
        for (Size d = 0; factor != 1.f && d < size; ++d) row[d] *= factor;
        memset(row + size, 0, (stride - size) * sizeof(float));
    }
    fetch_rows(x, dtype, t, t.first + t.rows, size);  // for the next tile: behind a head's last row often lies the next head
    memset(rows_at + t.rows * stride, 0, (t.width - t.rows) * stride * sizeof(float));
    if (transposed) transpose(rows_at, stride, t.width, size, transposed, t.width);
}
// The rows of a tile from (size, width), times `factor`; `scratch` holds LANES * size.
static void store_tile(const float* transposed, const Tile& t, Size size, float factor, const StridedTensor& x, Size dtype,
                       float* scratch) {
    transpose(transposed, t.width, size, t.width, scratch, size);
    for (Size i = 0; i < t.rows; ++i) {
        float* row = scratch + i * size;
        for (Size d = 0; factor != 1.f && d < size; ++d) row[d] *= factor;
        narrow(row, size, dtype, (void*)element(x.data, dtype, x.at(t.b, t.h, t.first + i)));
    }
}

// ---- biases of pairs of groups

// x + bias; -Inf masks a pair, also where the other is Inf or NaN.
INLINE Vector biased(Vector x, Vector bias) {
    const Vector masked = splat(-INFINITY);
    return bias == masked ? masked : x + bias;
}
// The sum of two biases, where -Inf of either masks the pair
INLINE double sum_of_biases(double a, double b) { return a == -INFINITY || b == -INFINITY ? -INFINITY : a + b; }

// A table (groups + 1, LANES) has a row for each group of keys, and in it a number for each query row of a tile. The last row is
// that of the keys without a group.
static Size table_size(const Attention& a) { return (a.masks.groups + 1) * LANES; }
// The tile's rows of x (B, H, N, groups), and behind them the first one again; 0 in the last row of the table
static void load_table(const Attention& a, const Tile& t, const float* x, float* table) {
    const Size G = a.masks.groups;
    transpose(x + ((t.b * a.H + t.h) * a.N + t.first) * G, G, t.rows, G, table, LANES);
    for (Size g = 0; g < G; ++g)
        for (Size i = t.rows; i < t.width; ++i) table[g * LANES + i] = table[g * LANES];
    memset(table + G * LANES, 0, LANES * sizeof(float));
}
// The gradients of row_bias in the tile's rows; 0 for a bias of -Inf, also in a row of NaN
static void store_table(const Attention& a, const Tile& t, const float* table, float* x) {
    const Size G = a.masks.groups, first = ((t.b * a.H + t.h) * a.N + t.first) * G;
    transpose(table, LANES, G, t.rows, x + first, G);
    for (Size n = first; n < first + t.rows * G; ++n)
        if (a.masks.row_bias[n] == -INFINITY) x[n] = 0;
}
// sums += the rows of X (count, w), each to the row that begins at the key's number: short sums of neighbours of one group
static void sum_by_group(const float* X, const Size* rows, Size count, Size w, float* sums) {
    for (Size i = 0; i < w; i += GROUP)
        for (Size j = 0; j < count;) {
            const Size last = least(j + SHORT_SUM, count);
            float* to = sums + rows[j] + i;
            const Size row = rows[j];
            Vector some[PARTS] = {};
            for (; j < last && rows[j] == row; ++j)
                for (int p = 0; p < PARTS; ++p) some[p] += load(X + j * w + i + p * VL);
            for (int p = 0; p < PARTS; ++p) store(to + p * VL, load(to + p * VL) + some[p]);
        }
}

// One thread's biases: of the rows of a tile, and the groups of a block of keys
struct GroupBias {
    float* table;
    Size* rows;  // (keys of the block): where each key's row of the table begins
    uint8_t *acts, *hides;  // (groups + 1): whether a row's bias is not 0, and whether it is -Inf for the whole tile
    uint8_t* holds;  // (groups + 1): whether the block has a key of it
    Size b, first, count;  // whose groups are loaded
    void plan(const Attention& a, Memory& memory) {
        const Size bytes = round_up(a.masks.groups + 1, 4) / 4;
        b = first = count = -1;
        if (!a.masks.row_bias) return;
        table = memory.take(table_size(a)), rows = (Size*)memory.take(2 * a.key_block());
        acts = (uint8_t*)memory.take(bytes), hides = (uint8_t*)memory.take(bytes), holds = (uint8_t*)memory.take(bytes);
    }
    void load_tile(const Attention& a, const Tile& t) {
        if (!a.masks.row_bias) return;
        load_table(a, t, a.masks.row_bias, table);
        const Vector none = {}, one = splat(1.f), masked = splat(-INFINITY);
        for (Size g = 0; g <= a.masks.groups; ++g) {
            Vector any = none, all = one;
            for (Size i = 0; i < t.width; i += VL) {
                const Vector x = load(table + g * LANES + i);
                any = x != none ? one : any, all = x == masked ? all : none;
            }
            acts[g] = sum(any) > 0, hides[g] = sum(all) == VL;
        }
    }
    void load_keys(const Attention& a, Size of_b, Size from, Size some) {
        if (b == of_b && first == from && count == some) return;
        b = of_b, first = from, count = some;
        memset(holds, 0, a.masks.groups + 1);
        for (Size j = 0; j < some; ++j) {
            const Size g = a.masks.group_of(b * a.M + first + j);
            rows[j] = g * LANES, holds[g] = 1;
        }
    }
    // Of the tile and the block that are loaded: whether anything is added
    bool is_added(const Attention& a) const {
        if (!a.masks.row_bias) return false;
        bool any = false;
        for (Size g = 0; g <= a.masks.groups; ++g) any |= holds[g] && acts[g];
        return any;
    }
    // Whether no row of the tile sees any of these keys, which are then loaded
    bool hides_all(const Attention& a, const Tile& t, Size j0, Size some) {
        if (!a.masks.row_bias) return false;
        load_keys(a, t.b, j0, some);
        bool all = true;
        for (Size g = 0; g <= a.masks.groups; ++g) all &= !holds[g] || hides[g];
        return all;
    }
    // x (count, w) += of each key of the block the row of its group in another table
    void add_rows(const float* other, Size w, float* x) const {
        for (Size j = 0; j < count; ++j)
            for (Size i = 0; i < w; i += VL) store(x + j * w + i, load(x + j * w + i) + load(other + rows[j] + i));
    }
    void add(Size w, float* S) const {
        const Vector masked = splat(-INFINITY);
        for (Size j = 0; j < count; ++j)
            for (Size i = 0; i < w; i += VL) {
                float* s = S + j * w + i;
                const Vector x = load(s);
                store(s, x == masked ? x : biased(x, load(table + rows[j] + i)));  // a mask has been added
            }
    }
};
// Finish of a product of keys and query rows that adds the biases
template <class Finish> struct AddBias {
    const float* table;
    const Size* rows;
    Finish finish;
    template <int ROWS, int COLUMNS>
    METHOD void operator()(Vector (&c)[ROWS][COLUMNS], Size row, Size column, float* C, Size ldc) const {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const float* bias = table + rows[row + r] + column;
#pragma GCC unroll 8
            for (int n = 0; n < COLUMNS; ++n) c[r][n] = biased(c[r][n], load(bias + n * VL));
        }
        finish(c, row, column, C, ldc);
    }
};

// ---- masks

// Whether any mask but group biases may act on a tile and the keys [j0, j0 + count).
static bool is_masked(const Attention& a, const Tile& t, Size j0, Size count) {
    return a.masks.mask || a.masks.keys || (a.masks.is_causal && j0 + count - 1 > t.first);
}

// A float64 mask is added in float64, and the row's shift is taken from the sum: so a bias keeps its digits beside an offset of the
// whole row, and scores vanish beside it where they do in float64.
INLINE float masked_by_float64(float score, double added, double shift) {
    const double sum = (double)score + added - shift;
    if (added == -INFINITY || score == -INFINITY) return -INFINITY;
    return sum < -FLT_MAX ? -FLT_MAX : (float)sum;  // a finite sum masks nothing
}
// What float32 holds of a finite number: -Inf would say that a row sees no key.
INLINE double finite_in_float32(double x) { return x < -FLT_MAX ? -FLT_MAX : x > FLT_MAX && x < INFINITY ? FLT_MAX : x; }
// `rows` holds GROUP * LANES.
static void add_float64_mask(const Attention& a, const Tile& t, Size j0, Size count, float* S, float* rows,
                             const GroupBias* bias) {
    const Masks& m = a.masks;
    const double* mask = (const double*)m.mask + t.b * m.stride_b + t.h * m.stride_h + t.first * m.stride_n + j0 * m.stride_m;
    const double* shifts = a.mask_shifts(t.b, t.h, t.first);
    for (Size j = 0; j < count; j += GROUP) {
        const Size some = least(GROUP, count - j);
        transpose(S + j * t.width, t.width, some, t.width, rows, GROUP);
        for (Size i = 0; i < t.width; ++i) {
            const double *added = mask + (i < t.rows ? i : 0) * m.stride_n + j * m.stride_m, shift = shifts[i < t.rows ? i : 0];
            float* s = rows + i * GROUP;
            for (Size n = 0; n < some; ++n) {
                const double with = bias ? (double)bias->table[bias->rows[j + n] + i] : 0.;
                s[n] = masked_by_float64(s[n], sum_of_biases(added[n * m.stride_m], with), shift);
            }
        }
        transpose(rows, GROUP, t.width, some, S + j * t.width, t.width);
    }
}

// `some` numbers of the mask from number `at` on, as float32: what is added to scores
static void load_mask_row(const Masks& m, Size at, Size some, float* row) {
    if (m.dtype == BOOL)
        for (Size n = 0; n < some; ++n) row[n] = *(const uint8_t*)element(m.mask, BOOL, at + n * m.stride_m) ? 0.f : -INFINITY;
    else if (m.stride_m == 1) widen(element(m.mask, m.dtype, at), m.dtype, some, row);
    else
        for (Size n = 0; n < some; ++n) widen(element(m.mask, m.dtype, at + n * m.stride_m), m.dtype, 1, row + n);
}
// Whether a bool mask hides nothing of GROUP keys, whose numbers in it begin at `at` in the tile's first row.
static bool hides_nothing(const Masks& m, const Tile& t, Size at) {
    uint64_t zeros = m.dtype != BOOL || m.stride_m != 1;
    for (Size i = 0; zeros == 0 && i < (m.stride_n == 0 ? 1 : t.rows); ++i) {
        uint64_t words[GROUP / 8];
        memcpy(words, element(m.mask, BOOL, at + i * m.stride_n), GROUP);
        for (const uint64_t x : words) zeros |= (x - 0x0101010101010101) & ~x & 0x8080808080808080;  // of the bytes that are 0
    }
    return zeros == 0;
}
// A mask of any other dtype. `scratch` holds 2 * GROUP * LANES.
static void add_mask(const Attention& a, const Tile& t, Size j0, Size count, float* S, float* scratch) {
    const Masks& m = a.masks;
    const Size w = t.width, base = t.b * m.stride_b + t.h * m.stride_h + t.first * m.stride_n;
    const Vector masked = splat(-INFINITY);
    float *rows = scratch, *tile = scratch + GROUP * LANES;
    for (Size j = 0; j < count; j += GROUP) {  // GROUP keys at a time, so that rows of the mask can be read along the keys
        const Size some = least(GROUP, count - j);
        if (some == GROUP && hides_nothing(m, t, base + (j0 + j) * m.stride_m)) continue;
        for (Size i = 0; i < w; ++i) {
            float* row = rows + i * GROUP;
            if (i > 0 && m.stride_n == 0) memcpy(row, rows, sizeof(float) * GROUP);
            else load_mask_row(m, base + (i < t.rows ? i : 0) * m.stride_n + (j0 + j) * m.stride_m, some, row);
        }
        transpose(rows, GROUP, w, some, tile, w);
        for (Size n = 0; n < some * w; n += VL) {
            float* s = S + j * w + n;
            const Vector x = load(tile + n);
            store(s, x == masked ? masked : load(s) + x);  // Inf and NaN plus -Inf would be NaN
        }
    }
}
static void mask_padding(const uint8_t* visible, Size count, Size w, float* S) {
    for (Size j = 0; j < count; ++j)
        for (Size i = 0; !visible[j] && i < w; i += VL) store(S + j * w + i, splat(-INFINITY));
}
// The causal mask: the keys behind the tile's first row lie on its diagonal, or are masked for all rows.
static void mask_later_keys(const Tile& t, Size j0, Size count, float* S) {
    float row[LANES];  // exact below 2^24
    for (Size i = 0; i < t.width; ++i) row[i] = (float)i;
    for (Size j = most(t.first + 1 - j0, 0); j < count; ++j)
        for (Size i = 0; i < t.width; i += VL) {
            float* s = S + j * t.width + i;
            store(s, load(row + i) < splat((float)(j0 + j - t.first)) ? splat(-INFINITY) : load(s));
        }
}

// The scores of a tile with the keys [j0, j0 + count) become logits: float masks and biases are added, masked pairs become -Inf.
// `bias` is null where a product has added it; `scratch` holds 2 * GROUP * LANES.
static void mask_tile(const Attention& a, const Tile& t, Size j0, Size count, float* S, float* scratch, const GroupBias* bias) {
    const Masks& m = a.masks;
    const GroupBias* added = bias && bias->is_added(a) ? bias : nullptr;
    if (m.dtype == FLOAT64) add_float64_mask(a, t, j0, count, S, scratch, added);
    else if (m.mask) add_mask(a, t, j0, count, S, scratch);
    if (added && m.dtype != FLOAT64) added->add(t.width, S);
    if (m.keys) mask_padding(m.keys + t.b * a.M + j0, count, t.width, S);
    if (m.is_causal && j0 + count - 1 > t.first) mask_later_keys(t, j0, count, S);
}

// S (n) where no row sees any key; `saved` is what the way back reads of the scores, or null.
static void hide_scores(Size n, float* S, float* saved) {
    for (Size i = 0; i < n; i += VL) store(S + i, splat(-INFINITY));
    if (saved) memset(saved, 0, n * sizeof(float));
}

// ---- rows of probabilities

// Two numbers of each row turn logits into probabilities: P = e^(logit - shift) * factor. A fully masked row has the factor 0.
struct Statistics {
    float *shift, *factor;  // (LANES)
};

// top = the largest logit of each query row in S (count, w).
static void find_top(const float* S, Size count, Size w, float* top) {
    const int CHAINS = VL / 4;  // as the registers allow: each maximum waits for the one before
    for (Size i = 0; i < w; i += GROUP) {
        Vector x[CHAINS][PARTS];
        for (int n = 0; n < CHAINS; ++n)
            for (int p = 0; p < PARTS; ++p) x[n][p] = splat(-INFINITY);
        Size j = 0;
        for (; j + CHAINS <= count; j += CHAINS)
            for (int n = 0; n < CHAINS; ++n)
                for (int p = 0; p < PARTS; ++p) x[n][p] = maximum(x[n][p], load(S + (j + n) * w + i + p * VL));
        for (; j < count; ++j)
            for (int p = 0; p < PARTS; ++p) x[0][p] = maximum(x[0][p], load(S + j * w + i + p * VL));
        for (int p = 0; p < PARTS; ++p) {
            for (int n = 1; n < CHAINS; ++n) x[0][p] = maximum(x[0][p], x[n][p]);
            store(top + i + p * VL, x[0][p]);
        }
    }
}
// S = the masked dot products of `count` keys from j0 with the tile's rows, and the largest of each row in `top`:
// product(finish) makes the products. `scratch` and `bias` are those of mask_tile.
template <class Product>
static void dot_logits(const Attention& a, const Tile& t, Size j0, Size count, float* S, float* scratch, const GroupBias& bias,
                       float* top, const Product& product) {
    const bool adds = !a.masks.mask && bias.is_added(a);  // to a mask the bias is added in mask_tile
    for (Size i = 0; i < t.width; i += VL) store(top + i, splat(-INFINITY));
    if (adds) product(AddBias<StoreAndTop>{bias.table, bias.rows, {top}});
    else product(StoreAndTop{top});
    if (!is_masked(a, t, j0, count)) return;
    mask_tile(a, t, j0, count, S, scratch, adds ? nullptr : &bias);
    find_top(S, count, t.width, top);
}

// One block of keys of an online softmax: updates each row's `largest` logit and `total`, the sum of e^(logit - largest).
// `top_of_block` is the block's `top`. S becomes e^(logit - largest). The caller multiplies its own earlier sums by `rescale`
// (LANES).
// Totals are float64: as many blocks of alike logits would round them all the same way.
static void online_softmax(float* S, Size count, Size w, bool first, const float* top_of_block, float* largest, double* total,
                           float* rescale) {
    for (Size i = 0; i < w; i += GROUP) {
        Vector top[PARTS], sum[PARTS];
        for (int p = 0; p < PARTS; ++p) {
            const Vector before = first ? splat(-INFINITY) : load(largest + i + p * VL);
            top[p] = maximum(before, load(top_of_block + i + p * VL)), sum[p] = Vector{};
            store(largest + i + p * VL, top[p]);
            const Vector nothing = splat(-INFINITY), shift = top[p] == nothing ? Vector{} : top[p];
            store(rescale + i + p * VL, exp_negative(before - shift));
            top[p] = shift;
        }
        for (Size chunk = 0; chunk < count; chunk += SHORT_SUM) {
            Vector part[PARTS];
            for (int p = 0; p < PARTS; ++p) part[p] = Vector{};
            for (Size j = chunk; j < least(chunk + SHORT_SUM, count); ++j)
                for (int p = 0; p < PARTS; ++p) {
                    float* s = S + j * w + i + p * VL;
                    const Vector e = exp_negative(load(s) - top[p]);
                    store(s, e);
                    part[p] += e;
                }
            for (int p = 0; p < PARTS; ++p) sum[p] += part[p];
        }
        float of_block[GROUP];
        for (int p = 0; p < PARTS; ++p) store(of_block + p * VL, sum[p]);
        for (Size n = 0; n < GROUP; ++n) total[i + n] = (first ? 0. : total[i + n] * rescale[i + n]) + of_block[n];
    }
}

// ---- Abar, the map of all heads: A, or max(A dA, 0) with dA = dO V^T, of each head, reduced over the heads

enum Reduction : Size { MEAN = 0, MAX = 1, MIN = 2 };
// Query rows of a tile that has all keys: fewer where rows are long, to stay in the second cache
INLINE Size lanes_of_map(const Attention& a) { return a.M > MOST_KEYS ? 48 : LANES; }

// A pair's part of Abar: max(P dP, 0), or P
INLINE Vector contribution(bool is_gradient, Vector p, Vector dp) { return is_gradient ? maximum(Vector{}, p * dp) : p; }

// Finish of dA, the product of values and cotangents: X, which has the tile's shape, becomes max(X dA, 0), and dA is not stored.
struct TakeGradient {
    float* X;
    Size width;
    template <int ROWS, int COLUMNS>
    METHOD void operator()(Vector (&c)[ROWS][COLUMNS], Size row, Size column, float*, Size) const {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < COLUMNS; ++n) {
                float* x = X + (row + r) * width + column + n * VL;
                store(x, maximum(Vector{}, load(x) * c[r][n]));
            }
    }
};

// The caller's log-sum-exp is a float32 at best. Up to this magnitude P = e^(logit - lse) is right to 1e-3. Beyond it rows are
// divided by the sum over the keys of this call.
static const double LARGEST_CALLER_LSE = 16384.;

// Ours is a float64. Up to 2^24 it gives P = e^(logit - lse) to 2^-29. Beyond it the statistics are computed again.
static const double LARGEST_OWN_LSE = 16777216.;

// From log-sum-exps (B, H, N) up to the magnitude `bound`: shift is lse in float32, and factor takes back what that rounds off.
// `lost`: the rows whose log-sum-exp is too large for that. Gives whether there are any.
static bool statistics_of_lse(const Attention& a, const double* lse, double bound, const Tile& t, const Statistics& s,
                              bool* lost) {
    lse += (t.b * a.H + t.h) * a.N + t.first;
    const double* mask_shifts = a.mask_shifts(t.b, t.h, t.first);
    bool any = false;
    for (Size i = 0; i < t.width; ++i) {
        double x = i < t.rows ? lse[i] : -INFINITY;
        const bool masked = fabs(x) == INFINITY;
        any |= lost[i] = !masked && fabs(x) > bound;
        if (mask_shifts && i < t.rows) x -= mask_shifts[i];
        s.shift[i] = masked ? INFINITY : (float)x;  // e^(logit - Inf) is 0 whatever the logit is
        const double rounded_by = s.shift[i] - x;  // beyond 2^24 P is 0, and this has no bound
        s.factor[i] = masked ? 0.f : fabs(rounded_by) < 1 ? (float)exp(rounded_by) : 1.f;
    }
    return any;
}

// The end of an online softmax: shift and factor of each row. `largest` may be the array of `s`.
static void finish_rows(const float* largest, const double* total, Size w, const Statistics& s) {
    for (Size i = 0; i < w; ++i) {
        const bool masked = largest[i] == -INFINITY && total[i] == 0.;
        s.shift[i] = masked ? 0.f : largest[i], s.factor[i] = masked ? 0.f : 1.f / (float)total[i];
    }
}
// The factors as the caller's log-sum-exp has them, (B, H, N) or null; it may count keys that are not here.
static void take_caller_lse(const Attention& a, const Tile& t, const double* lse, const Statistics& s) {
    const double* mask_shifts = a.mask_shifts(t.b, t.h, t.first);
    for (Size i = 0; lse && i < t.rows; ++i) {
        const double x = lse[(t.b * a.H + t.h) * a.N + t.first + i];
        if (fabs(x) == INFINITY) s.factor[i] = 0.f;  // a fully masked row
        else if (s.factor[i] != 0.f && fabs(x) <= LARGEST_CALLER_LSE)
            s.factor[i] = (float)exp(s.shift[i] + (mask_shifts ? mask_shifts[i] : 0.) - x);
    }
}

// S: logits become P.
static void probabilities(float* S, Size count, Size w, const Statistics& s) {
    for (Size i = 0; i < w; i += GROUP) {
        Vector shift[PARTS], factor[PARTS];
        for (int p = 0; p < PARTS; ++p) shift[p] = load(s.shift + i + p * VL), factor[p] = load(s.factor + i + p * VL);
        for (Size j = 0; j < count; ++j)
            for (int p = 0; p < PARTS; ++p) {
                float* x = S + j * w + i + p * VL;
                store(x, exp_all(load(x) - shift[p]) * factor[p]);
            }
    }
}

INLINE void scale_rows(float* X, Size count, Size w, const float* factor) {  // X (count, w), each lane by its factor
    for (Size j = 0; j < count; ++j)
        for (Size i = 0; i < w; i += VL) store(X + j * w + i, load(X + j * w + i) * load(factor + i));
}

}  // namespace
}  // namespace ISA
