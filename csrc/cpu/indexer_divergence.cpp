// indexer_divergence: D_i = KL(mean_h A_h || A'), A' the softmax of an indexer's scores, and the gradients of all tensors
// (divergence.h; streaming/indexer_divergence.py has the law).
//
// Query row i, key j, head h. In brackets: the names below.
//     I_ij = sum_h w_ih relu(z_hij),  z_hij = q'_ih . k'_j                                [indexer_logits: S, Z]
//     dw_ih = sum_j dI_ij relu(z_hij),  dz_hij = w_ih dI_ij where z_hij > 0               [indexer_gradients: Z]
//
// Bound: multiply-adds, as in attention_divergence. Trick: of chosen keys a tile has only those. Each of its rows has a list, from
// which it takes a slot for each key that it sees, and a slot stands for a key in all that divergence.h does. Vectors then lie
// along the numbers of a key, which is read where it lies.
// Measured in turns with streaming and the formula's compilation on a busy machine, with one thread, heads of 64 numbers in float32,
// the attention fixed: 2,048 tokens and four heads of both sides forward 4.2 and 2.6 times as fast, with gradients 4.2 and 1.0
// times; over an eighth of the keys 20 and 13, 15 and 5.1 times. 8,192 tokens and a head with four of the indexer: 6.5 and 3.5,
// 4.8 and 1.6 times; over an eighth of the keys forward 17 and 15 times.
#include "divergence.h"

namespace ISA {
namespace {

struct IndexerDivergence : Divergence {  // sides: the attention, and q' and k' with the scale 1
    StridedTensor weights, grad_weights;  // (B, Hi, N, 1)
    const int64_t* topk_indices;  // (B, N, chosen)
    Size chosen;  // -1 for all keys
    const float* lse;  // (B, H, N) of the attention, which then has no gradients; or null
    FIELDS(sides, head_mean, divergence, grad, grad_queries, grad_keys, weights, grad_weights, topk_indices, chosen, lse)
    bool chooses() const { return chosen >= 0; }
    Size slots() const { return chooses() ? least(chosen, any().M) : any().M; }
};
typedef DivergenceCall<IndexerDivergence> IndexerCall;

// ---- chosen keys

static const Size AT_ONCE = 4;  // keys, whose sums do not wait for one another

// The keys of each row of a tile. S and other tiles are (slots, width).
struct Chosen {
    Size stride, slots;  // of the tile: as many as the row with the most keys has
    int32_t* keys;  // (width, stride), filled up to a multiple of AT_ONCE
    Size* count;  // (width)
    double* added;  // (width, stride): by a mask of numbers; null without one
    double* shift;  // (width): of a float64 mask a row's largest number, as masked_by_float64 takes it
    uint8_t* taken;  // (M): whether a row has the key already
    bool is_fresh;
    void plan(const IndexerDivergence& c, Size lanes, Memory& memory) {
        const Masks& m = c.any().masks;
        const bool adds = m.mask && m.dtype != BOOL;
        stride = round_up(c.slots(), AT_ONCE), is_fresh = true;
        keys = (int32_t*)memory.take(lanes * stride), count = (Size*)memory.take(2 * lanes);
        added = adds ? memory.take_doubles(lanes * stride) : nullptr, shift = memory.take_doubles(lanes);
        taken = (uint8_t*)memory.take(round_up(c.any().M, 4) / 4);
    }
    void load(const IndexerDivergence& c, const Tile& t) {
        if (is_fresh && c.any().M > 0) memset(taken, 0, c.any().M);
        is_fresh = false, slots = 0;
        for (Size i = 0; i < t.width; ++i)
            count[i] = i < t.rows ? load_row(c, t.b, t.first + i, i) : 0, slots = most(slots, count[i]);
    }
    Size load_row(const IndexerDivergence& c, Size b, Size n, Size i) {
        const Attention& a = c.any();
        const Masks& m = a.masks;
        const int64_t* from = c.topk_indices + (b * a.N + n) * c.chosen;
        int32_t* row = keys + i * stride;
        Size some = 0;
        for (Size k = 0; k < c.chosen; ++k) {
            const Size j = from[k];
            if (j < 0 || j >= a.M || taken[j] || (m.is_causal && j > n) || (m.keys && !m.keys[b * a.M + j])) continue;
            const double mask = m.mask ? number_of_mask(m, b * m.stride_b + n * m.stride_n + j * m.stride_m) : 0;
            if (mask == -INFINITY) continue;
            if (added) added[i * stride + some] = mask;
            row[some++] = j, taken[j] = 1;
        }
        for (Size s = 0; s < some; ++s) taken[row[s]] = 0;
        for (Size s = some; some > 0 && s < round_up(some, AT_ONCE); ++s) row[s] = row[some - 1];
        shift[i] = m.mask && m.dtype == FLOAT64 ? largest_of(added + i * stride, some) : 0;
        return some;
    }
    static double number_of_mask(const Masks& m, Size at) {
        if (m.dtype == FLOAT64) return ((const double*)m.mask)[at];
        float x;
        load_mask_row(m, at, 1, &x);
        return x;
    }
    static double largest_of(const double* x, Size some) {  // 0 unless it is finite
        double largest = -INFINITY;
        for (Size s = 0; s < some; ++s) largest = x[s] > largest ? x[s] : largest;
        return fabs(largest) == INFINITY ? 0 : largest;
    }
    // S: scores become logits, and -Inf where a row has no key
    void mask(const Tile& t, float* S) const {
        for (Size i = 0; i < t.width; ++i) {
            for (Size s = 0; added && s < count[i]; ++s) {
                float* score = S + s * t.width + i;
                *score = masked_by_float64(*score, added[i * stride + s], shift[i]);
            }
            for (Size s = count[i]; s < slots; ++s) S[s * t.width + i] = -INFINITY;
        }
    }
};

// The numbers of a key from d on, of which there are n: a vector, with zeros behind them
template <Size DTYPE> INLINE Vector numbers(const void* key, Size d, Size n) {
    const auto some = [=](const auto* x) { return n >= VL ? load(x) : load_some(x, n); };
    if constexpr (DTYPE == FLOAT32) return some((const float*)key + d);
    else return widened(some((const uint16_t*)key + d), DTYPE == BFLOAT16);
}
// f(d, n) for each vector of `size` numbers from d on, the last of which may have n < VL
template <class F> INLINE void by_vectors(Size size, const F& f) {
    Size d = 0;
    for (; d + VL <= size; d += VL) f(d, VL);
    if (d < size) f(d, size - d);
}
template <class F> static void with_dtype(Size dtype, const F& f) {
    if (dtype == FLOAT32) f(Constant<FLOAT32>{});
    else if (dtype == BFLOAT16) f(Constant<BFLOAT16>{});
    else f(Constant<FLOAT16>{});
}
// Z (slots, width) = the products of rows (width, stride) with their keys, 0 where a row has no key
template <Size DTYPE>
static void products_of_chosen(const Attention& a, const Tile& t, const Chosen& chosen, const float* rows, Size stride,
                               float* Z) {
    const Size w = t.width;
    const auto key_at = [&, head = t.h / a.group()](Size j) { return element(a.key.data, DTYPE, a.key.at(t.b, head, j)); };
    memset(Z, 0, chosen.slots * w * sizeof(float));
    for (Size i = 0; i < t.rows; ++i) {
        const int32_t* list = chosen.keys + i * chosen.stride;
        for (Size s = 0; s < chosen.count[i]; s += AT_ONCE) {
            const void* key[AT_ONCE];
            Vector x[AT_ONCE] = {};
            float sums[AT_ONCE];
            for (Size k = 0; k < AT_ONCE; ++k) key[k] = key_at(list[s + k]);
            by_vectors(a.D, [&](Size d, Size n) {
                const Vector q = load(rows + i * stride + d);
#pragma GCC unroll 4
                for (Size k = 0; k < AT_ONCE; ++k) x[k] += q * numbers<DTYPE>(key[k], d, n);
            });
            sums_of_four(x, sums);
            for (Size k = 0; k < least(AT_ONCE, chosen.count[i] - s); ++k) Z[(s + k) * w + i] = sums[k];
        }
    }
}
// From G (slots, width), the gradient of these products: grad_rows (width, stride) += that of the rows, and that of key j is added to
// the row of `row` numbers from to + j * row on.
template <Size DTYPE>
static void gradients_of_chosen(const Attention& a, const Tile& t, const Chosen& chosen, const float* rows, Size stride,
                                const float* G, float* grad_rows, float* to, Size row) {
    const int MOST = 4;  // vectors of sums in registers
    const auto key_at = [&, head = t.h / a.group()](Size j) { return element(a.key.data, DTYPE, a.key.at(t.b, head, j)); };
    for (Size i = 0; i < t.rows; ++i) {
        const int32_t* list = chosen.keys + i * chosen.stride;
        for (Size chunk = 0; chunk < chosen.count[i]; chunk += SHORT_SUM)
            for (Size first = 0; first < a.D; first += MOST * VL) {
                Vector part[MOST] = {};
                for (Size s = chunk; s < least(chunk + SHORT_SUM, chosen.count[i]); ++s) {
                    const void* key = key_at(list[s]);
                    const Vector g = splat(G[s * t.width + i]);
                    float* sums = to + list[s] * row;
#pragma GCC unroll 4
                    for (int n = 0; n < MOST; ++n) {
                        const Size d = first + n * VL;
                        if (d >= a.D) break;
                        part[n] += g * numbers<DTYPE>(key, d, a.D - d);
                        store(sums + d, load(sums + d) + g * load(rows + i * stride + d));
                    }
                }
                for (Size n = 0, d = first; n < MOST && d < a.D; ++n, d += VL) {
                    float* grad = grad_rows + i * stride + d;
                    store(grad, load(grad) + part[n]);
                }
            }
    }
}

// ---- the keys of a tile: all up to the last visible one, block by block, or chosen ones

struct TileKeys {
    const Attention& a;
    Logits& l;  // with the queries of a head
    const Chosen* chosen;  // or null
    Size keys, visible;
    template <class F> void by_blocks(const F& f) const {
        if (chosen) f(0, keys);
        else ::ISA::by_blocks(a, keys, f);
    }
    void products(const Tile& t, Size j0, Size count, float* Z) const {
        if (chosen)
            return with_dtype(
                a.dtype, [&](auto dtype) { products_of_chosen<decltype(dtype)::value>(a, t, *chosen, l.rows, l.stride, Z); });
        l.keys.load(a, t, j0, least(a.key_block(), visible - j0));
        l.keys.products(t, count, l.transposed, Z, false);
    }
    void mask(const Tile& t, Size j0, Size count, float* S) const {
        if (chosen) chosen->mask(t, S);
        else mask_tile(a, t, j0, count, S, l.mask, nullptr);
    }
    void gradients(const Tile& t, Size j0, Size count, float* G, float* grad_query, float* to, Size row) const {
        if (chosen)
            return with_dtype(a.dtype, [&](auto dtype) {
                gradients_of_chosen<decltype(dtype)::value>(a, t, *chosen, l.rows, l.stride, G, grad_query, to, row);
            });
        l.keys.load(a, t, j0, count);
        l.keys.gradients(t, count, 1.f, G, nullptr, l.rows, to + j0 * row, row, true, grad_query);
    }
    void store_query(const Tile& t, float* grad_query, float* scratch, const StridedTensor& to) const {
        const float factor = l.row_factor({}, a.scale);
        if (!chosen) return store_tile(grad_query, t, a.D, factor, to, a.dtype, scratch);
        for (Size i = 0; i < t.rows; ++i) {
            float* row = grad_query + i * l.stride;
            for (Size d = 0; d < a.D; ++d) row[d] *= factor;
            narrow(row, a.D, a.dtype, (void*)element(to.data, a.dtype, to.at(t.b, t.h, t.first + i)));
        }
    }
};

// ---- the indexer

struct IndexerSide {
    Logits logits;
    float *S, *weights, *Z;  // ln A', later dI; A' r'; z of a head's keys or of a block of them, later dz
    float *grad_query, *scratch;
    void plan(const IndexerDivergence& c, Size size, Memory& memory) {
        logits.pairs = !c.chooses() && !c.grad && Logits::takes_pairs(c.sides[1], {});
        logits.plan(c.sides[1], {}, memory, false);
        S = memory.take(size), weights = memory.take(c.needs(1) ? size : 0);
        Z = c.chooses() ? memory.take(size) : logits.S;
        grad_query = memory.take(c.needs(1) ? logits.stride * LANES : 0), scratch = logits.S;
    }
};
static void load_weights(const IndexerDivergence& c, const Tile& t, float* to) {  // of a head, (LANES)
    const Size dtype = c.any().dtype;
    memset(to, 0, LANES * sizeof(float));
    for (Size i = 0; i < t.rows; ++i)
        widen(element(c.weights.data, dtype, c.weights.at(t.b, t.h, t.first + i)), dtype, 1, to + i);
}
// f(at, i) for each vector of a tile, which lies at `at` and begins with row i
template <class F> INLINE void by_tile_vectors(Size keys, Size w, const F& f) {
    for (Size j = 0; j < keys; ++j)
        for (Size i = 0; i < w; i += VL) f(j * w + i, i);
}
static void indexer_logits(const IndexerDivergence& c, IndexerSide& x, Tile t, const TileKeys& keys, float* largest) {
    const Size w = t.width;
    float weights[LANES];
    keys.by_blocks([&](Size j0, Size count) {
        float* S = x.S + j0 * w;
        memset(S, 0, count * w * sizeof(float));
        for (t.h = 0; t.h < keys.a.H; ++t.h) {
            x.logits.load_queries(keys.a, {}, t);
            load_weights(c, t, weights);
            keys.products(t, j0, count, x.Z);
            by_tile_vectors(count, w, [&](Size at, Size i) {
                store(S + at, load(S + at) + load(weights + i) * maximum(Vector{}, load(x.Z + at)));
            });
        }
        t.h = 0;
        keys.mask(t, j0, count, S);
    });
    find_top(x.S, keys.keys, w, largest);
}
// From dI in S the gradients of the indexer's queries and weights, and those of its keys added to `to`
static void indexer_gradients(const IndexerDivergence& c, IndexerSide& x, Tile t, const TileKeys& keys, float* to, Size row) {
    const Size w = t.width, dtype = keys.a.dtype;
    float weights[LANES];
    for (t.h = 0; t.h < keys.a.H; ++t.h) {
        double grad_weight[LANES] = {};
        x.logits.load_queries(keys.a, {}, t);
        load_weights(c, t, weights);
        memset(x.grad_query, 0, x.logits.stride * w * sizeof(float));
        keys.by_blocks([&](Size j0, Size count) {
            const float* S = x.S + j0 * w;
            keys.products(t, j0, count, x.Z);
            for (Size i = 0; i < w; i += VL) {
                double total[VL];
                sum_rows(count, total, [&](Size j) { return load(S + j * w + i) * maximum(Vector{}, load(x.Z + j * w + i)); });
                for (Size n = 0; n < VL; ++n) grad_weight[i + n] += total[n];
            }
            by_tile_vectors(count, w, [&](Size at, Size i) {
                const Vector z = load(x.Z + at), grad = load(S + at) * load(weights + i);
                store(x.Z + at, z <= Vector{} ? Vector{} : grad);
            });
            keys.gradients(t, j0, count, x.Z, x.grad_query, to, row);
        });
        keys.store_query(t, x.grad_query, x.scratch, c.grad_queries[1]);
        for (Size i = 0; i < t.rows; ++i) {
            const float grad = (float)grad_weight[i];
            narrow(&grad, 1, dtype, (void*)element(c.grad_weights.data, dtype, c.grad_weights.at(t.b, t.h, t.first + i)));
        }
    }
}

// ---- a tile

struct IndexerTiles {
    AttentionSide attention;
    IndexerSide indexer;
    Chosen chosen;
    void plan(const IndexerCall& call, Memory& memory) {
        const IndexerDivergence& c = call.c;
        const Size size = c.slots() * call.lanes;
        attention.plan(c, 0, size, !c.chooses(), memory), indexer.plan(c, size, memory);
        attention.lse = c.lse;
        if (c.chooses()) chosen.plan(c, call.lanes, memory);
    }
};
static void add_item(const IndexerCall& call, IndexerTiles& x, Size item, float* sums) {
    const IndexerDivergence& c = call.c;
    const Tile tile = call.tile(item);
    const Size visible = visible_keys(c.any(), tile.b);
    const Chosen* chosen = c.chooses() ? &x.chosen : nullptr;
    if (chosen) x.chosen.load(c, tile);
    const Size count = chosen ? chosen->slots : tile.keys(c.any(), visible);
    AttentionSide& own = x.attention;
    const TileKeys keys = {c.sides[0], own.logits, chosen, count, visible};
    const TileKeys index_keys = {c.sides[1], x.indexer.logits, chosen, count, visible};
    const auto logits = [&](const Tile& t, float* largest) {
        if (!chosen) return attention_logits(c.sides[0], own, t, count, visible, largest);
        own.logits.load_queries(c.sides[0], {}, t);
        keys.products(t, 0, count, own.S);
        keys.mask(t, 0, count, own.S);
        find_top(own.S, count, t.width, largest);
    };
    load_side(c, own, 0, tile, count, logits);
    load_logs(x.indexer.S, count, tile.width, nullptr,
              [&](float* largest) { indexer_logits(c, x.indexer, tile, index_keys, largest); });
    float *own_weights = c.needs(0) ? own.weights : nullptr, *index_weights = c.needs(1) ? x.indexer.weights : nullptr;
    divergence_of_tile(c, tile, count, own.compared(), x.indexer.S, own_weights, index_weights, KlTerms{});
    if (c.needs(0))
        side_gradients(c, own, 0, tile, count, logits, [&](const Tile& t) {
            float* to = call.of_key(sums, 0, t.h);
            if (!chosen) return attention_gradients(c, own, 0, t, count, to, call.row);
            memset(own.grad_query, 0, own.logits.stride * t.width * sizeof(float));
            keys.gradients(t, 0, count, own.S, own.grad_query, to, call.row);
            keys.store_query(t, own.grad_query, own.scratch, c.grad_queries[0]);
        });
    if (c.needs(1)) {
        logit_gradients<false>(c, tile, count, 1, index_weights, nullptr, x.indexer.S);
        indexer_gradients(c, x.indexer, tile, index_keys, sums + call.first[1], call.row);
    }
}

static Size indexer_divergence(const IndexerDivergence& c) {
    return compare_all<IndexerTiles>(c, c.chooses() ? GROUP : lanes_of_map(c.any()), c.slots());
}

}  // namespace
}  // namespace ISA

OPERATOR(indexer_divergence, IndexerDivergence)
