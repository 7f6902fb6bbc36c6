// Numbers that probes read off attention maps row by row: mass per group of keys, entropy, largest weight, received attention (VALUE,
// ECCV 2020). Forward and backward.
//
// Query row i, key j, group g. In brackets: the names below.
//     x_ij = S_ij - max_j S_ij,  e_ij = e^x_ij,  P_ij = e_ij / sum_j e_ij          [sweep: largest, total, factor]
//     mass_ig = sum of P_ij over the keys of g                                     [add_block_mass]
//     entropy_i = log(sum_j e_ij) - (sum_j e_ij x_ij) / (sum_j e_ij)               [weighted; store_rows]
//     maximum_i = P_ij for j = argmax_i, which is 1 / sum_j e_ij; max_logit_i = max_j S_ij
//     received_j = sum_i weight_i P_ij                                             [add_received]
// Back, with d_ for the cotangents, and but for what a whole row has in common:
//     dP_ij = d_mass_ig - d_entropy_i x_ij + weight_i d_received_j, and d_maximum_i for j = argmax_i [StatisticsCotangents]
//     dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij)                                      [mean; logit_gradients]
//
// Bound: multiply-adds (D per entry forward, 3 D backward), then one exponential per entry. The entropy needs no logarithm per
// entry. Backward, the one number that a row's softmax needs is a weighted sum of e, too, so that the tile is read twice. Products of
// bfloat16 are those of pairs (pairs.h), for which the gradients of the logits are rounded. Received attention and the gradients of keys are
// sums over rows: see SharedSums. Forward keeps the exponentials of a tile up to MOST_KEYS keys, or of one with few rows up to
// MOST_KEYS_OF_FEW, where reading the keys is what takes time. Beyond, and backward beyond MOST_KEYS, the logits are made twice:
// D more. Few queries would leave lanes of a tile empty: vectors run along the keys there, which are read once for all query heads
// of an item (FewStatistics), in their own dtype.
// Measured: rows attention_statistics of benchmarks/results/cpu.json.
#include "few_rows.h"
#include "shared_sums.h"
#include "statistics.h"

namespace ISA {
namespace {

// ---- sums over rows

// Pass has: `a`; heads() of a sample whose rows have sums of their own, and floats() of them; the items are the tiles of all heads; a Space with plan(call, memory);
// add(space, tile, sums); finish(unit, sums, first key, last key).
template <class Pass> struct StatisticsCall {
    const Pass& pass;
    SharedSums sums;
};
template <class Pass> static Size row_count(const StatisticsCall<Pass>& call) { return call.pass.a.M; }
template <class Pass>
static void add_item(const StatisticsCall<Pass>& call, typename Pass::Space& space, Size item, float* sums) {
    call.pass.add(space, tile_of_item(call.pass.a, item), sums);
}
template <class Pass>
static void write_sums(const StatisticsCall<Pass>& call, Size unit, const float* sums, Size first, Size last) {
    call.pass.finish(unit, sums, first, last);
}
template <class Pass> static Size run_pass(const Pass& pass) {
    const Attention& a = pass.a;
    const Size items = a.B * a.H * tiles_of(a);
    if (items == 0) return DONE;
    const Size heads = pass.heads(), unit = a.H / heads * tiles_of(a);
    const Size parts = pass.floats() > 0 ? least(unit, parts_of_rows(a.H / heads * a.N, heads)) : unit;
    const Size tasks = least(thread_count(), a.B * heads * parts);
    Memory starts, memory;
    Size b = -1, visible = 0;
    const Size* start = cut(
        items, unit, parts, tasks, starts, [&](Size item) {  // under the causal mask and with padding some tiles have few keys
            const Tile t = tile_of_item(a, item);
            if (t.b != b) b = t.b, visible = visible_keys(a, b);
            return t.width * (t.keys(a, visible) + 1);
        });
    StatisticsCall<Pass> call = {pass, {start, tasks, unit, parts, pass.floats()}};
    if (!start || !memory.place([&] { call.sums.plan(memory); })) return NO_MEMORY;
    return run_and_join<typename Pass::Space>(tasks, call);
}

// ---- what forward and backward share

struct KeyGroups {
    const int64_t* index;  // (B, M); null for none. An index out of range belongs to no group.
    Size stride_b, stride_m, count;
    FIELDS(index, stride_b, stride_m, count)
    // where the rows of the keys' groups begin in a matrix of `width` columns; its last row, number `count`, is that of no group
    void rows(Size b, Size j0, Size keys, Size width, Size* to) const {
        for (Size j = 0; j < keys; ++j) {
            const Size g = index ? index[b * stride_b + (j0 + j) * stride_m] : count;
            to[j] = (g >= 0 && g < count ? g : count) * width;
        }
    }
};

// One thread's logits of a tile, and what its rows sum up
struct StatisticsRows : RowSums {
    KeyRows keys;
    // (LANES, stride): query rows times the scale where the score does not bend; (D, width). As pairs: forward.h
    float *query, *transposed;
    Pair *scratch, *rounded_tile;  // of load_pairs; backward, of KeyRows::gradients
    GroupBias bias;
    float *mask, *saved;  // saved: backward, what `bend` reads of the keys of a block, where the score bends
    float* mean;  // (LANES), backward: sum P dP
    Size* group;  // (keys of a block)
    Size stride;
    // Whether forward S holds the exponentials of all keys
    static bool holds_all_keys(const Attention& a) { return a.M <= (a.N <= GROUP ? MOST_KEYS_OF_FEW : MOST_KEYS); }
    void plan(const Attention& a, const Score& score, bool backward, Memory& memory) {
        const bool pairs = takes_pairs(a, score, a.D), saves = backward && score.bends();
        const Size of_all_keys = holds_all_keys(a) ? least(LANES, round_up(a.N, GROUP)) * a.M : 0;
        keys.plan(a, a.key, a.D, pairs, backward, memory);
        scratch = pairs ? (Pair*)memory.take(LANES * half(a.D)) : nullptr;
        rounded_tile = pairs && backward ? (Pair*)memory.take(LANES * a.key_block() / 2) : nullptr;
        stride = round_up(a.D, VL);
        query = memory.take(LANES * stride), transposed = memory.take(LANES * a.D);
        RowSums::plan(most(LANES * a.key_block(), of_all_keys), memory), mask = memory.take(2 * GROUP * LANES);
        saved = saves ? memory.take(LANES * a.key_block()) : nullptr, bias.plan(a, memory);
        mean = memory.take(LANES), group = (Size*)memory.take(2 * a.key_block());
    }
    // w: weights of rows (B, H, N), or null for 1
    void start(const Attention& a, const Score& score, const Tile& t, const float* w) {
        // Scores are scaled after the product, as the formula has them: queries times the scale would break ties of the maximum.
        if (keys.pairs) load_pairs(a.query, t, a.D, (Pair*)transposed, (Pair*)query, stride, scratch);
        else load_tile(a.query, a.dtype, t, a.D, 1.f, query, stride, transposed);
        bias.load_tile(a, t);
        if (!score.bends() && !keys.pairs)
            for (Size i = 0; i < t.rows * stride; i += VL) store(query + i, load(query + i) * splat((float)a.scale));
        if (w) w += (t.b * a.H + t.h) * a.N + t.first;
        RowSums::start(t.width);
        for (Size i = 0; i < t.width; ++i) weight[i] = i >= t.rows ? 0.f : w ? w[i] : 1.f;
    }
    // The logits of the keys [j0, j0 + count), into S or a place in it; 0 beyond the tile's rows, so that no NaN of theirs reaches
    // a sum over rows
    void logits(const Attention& a, const Score& score, const Tile& t, Size j0, Size count, float* to) {
        keys.load(a, t, j0, count);
        if (bias.hides_all(a, t, j0, count)) return hide_scores(count * t.width, to, saved);
        keys.products(t, count, transposed, to, false);
        if (score.bends()) activate(score, (float)a.scale, to, count * t.width, saved);
        else
            for (Size i = 0; i < count * t.width; i += VL) store(to + i, load(to + i) * splat((float)a.scale));
        mask_tile(a, t, j0, count, to, mask, &bias);
        for (Size j = 0; t.rows < t.width && j < count; ++j)
            memset(to + j * t.width + t.rows, 0, (t.width - t.rows) * sizeof(float));
    }
};

// The gradients of the probabilities of a tile
struct StatisticsCotangents {
    float *mass, *slope;  // (groups + 1, width), minus that of the entropy (LANES)
    const float* received;  // (keys of the block)
    // but for a number that is the same for a whole row, which softmax's gradient does not see
    Vector at(Size group, Size i, Size j, Vector x, Vector weight) const {
        return load(slope + i) * x + load(mass + group + i) + weight * splat(received[j]);
    }
};

// Backward the weight of e is the gradient of its probability.
struct BackwardSweep {
    const StatisticsCotangents& d;
    const Size* group;
    Vector weight;  // of the rows
    METHOD void start(const RowSums& r, Size i) { weight = load(r.weight + i); }
    METHOD Vector drift(Size i, Vector moved) const { return load(d.slope + i) * moved; }
    METHOD void take(Size i, Size j, Vector, Vector bounded, Vector e, SweepSums& sums) const {
        sums.weighted += e * d.at(group[j], i, j, bounded, weight);
        sums.received += e * splat(d.received[j]);
    }
    METHOD void finish(const RowSums&, Size, Vector, Vector) const {}
};

// ---- forward

struct StatisticsForward {
    Attention a;
    Score score;  // a function of dot products
    KeyGroups groups;
    const float* weight;  // (B, H, N) of rows; null: 1
    // (B, H, N, G), (B, H, M) received, and (B, H, N) the others; null for what nobody asks for
    float *mass, *entropy, *maximum;
    int64_t* argmax;
    float *received, *max_logit;
    FIELDS(a, score, groups, weight, mass, entropy, maximum, argmax, received, max_logit)

    struct Space {
        StatisticsRows lanes;
        float *mass, *some_mass;  // (G + 1, width); that of a block of keys, so that rounding does not grow with their number
        void plan(const StatisticsCall<StatisticsForward>& call, Memory& memory) {
            const StatisticsForward& c = call.pass;
            lanes.plan(c.a, c.score, false, memory);
            mass = memory.take((c.groups.count + 1) * LANES);
            some_mass = memory.take((c.groups.count + 1) * LANES);
        }
    };
    // received attention: for each key a vector, whose lanes are added at the end, and how much it is too large
    Size heads() const { return a.H; }
    Size floats() const { return received ? a.M * 2 * VL : 0; }
    void finish(Size head, const float* x, Size first, Size last) const {
        for (Size j = first; received && j < last; ++j)
            received[head * a.M + j] = sum(load(x + j * 2 * VL) - load(x + j * 2 * VL + VL));
    }
    void add(Space& space, const Tile& t, float* sums) const;
};

// The largest logit of row number `at`, whose shift by a float64 mask it does not have yet
static float shifted_back(const Attention& a, Size at, float logit) {
    return a.masks.shifts && logit != -INFINITY ? (float)finite_in_float32(logit + a.masks.shifts[at]) : logit;
}
// Entropy, largest weight, where it is and its logit, of row i, which is number `at` of all rows
static void store_row(const StatisticsForward& c, const RowSums& r, Size i, Size at) {
    const float factor = r.factor[i];
    if (c.entropy) c.entropy[at] = r.entropy(i);
    if (c.maximum) c.maximum[at] = factor;
    if (c.max_logit) c.max_logit[at] = shifted_back(c.a, at, r.max_logit(i));
    if (c.argmax) c.argmax[at] = factor == 0 ? -1 : factor != factor ? 0 : r.argmax[i];  // of NaN the first
}
static void add_block_mass(const KeyGroups& groups, StatisticsForward::Space& x, const Tile& t, Size j0, Size count,
                           const float* E) {
    const Size w = t.width;
    groups.rows(t.b, j0, count, w, x.lanes.group);
    memset(x.some_mass, 0, (groups.count + 1) * w * sizeof(float));
    sum_by_group(E, x.lanes.group, count, w, x.some_mass);
    for (Size i = 0; i < groups.count * w; i += VL) store(x.mass + i, load(x.mass + i) + load(x.some_mass + i));
}
// sums (keys, 2, VL) += e times the row's weight. Kahan's sum, so that rounding does not grow with the number of tiles: it goes
// one way where rows are alike.
static void add_received(const float* E, Size count, Size w, const float* weight, float* sums) {
    for (Size j = 0; j < count; ++j, sums += 2 * VL) {
        const Vector before = load(sums);
        Vector some = -load(sums + VL);
        for (Size i = 0; i < w; i += VL) some += load(E + j * w + i) * load(weight + i);
        const Vector after = before + some, excess = (after - before) - some;
        store(sums, after);
        store(sums + VL, excess == excess ? excess : Vector{});  // Inf stays Inf
    }
}

void StatisticsForward::add(Space& space, const Tile& t, float* sums) const {
    StatisticsRows& r = space.lanes;
    const Size w = t.width, keys = t.keys(a, visible_keys(a, t.b));
    const bool whole = r.holds_all_keys(a);
    r.start(a, score, t, weight);
    by_blocks(a, keys, [&](Size j0, Size count) {
        r.logits(a, score, t, j0, count, r.S + (whole ? j0 * w : 0));
        if (!whole) sweep(r, count, w, ForwardSweep(j0), r.S);
    });
    if (whole) sweep(r, keys, w, ForwardSweep(0), r.S);
    finish_sweeps(r, w);
    for (Size i = 0; i < t.rows; ++i) store_row(*this, r, i, (t.b * a.H + t.h) * a.N + t.first + i);
    for (Size i = 0; i < w; ++i) r.weight[i] *= r.factor[i];
    memset(space.mass, 0, (groups.count + 1) * w * sizeof(float));
    by_blocks(a, groups.count > 0 || received ? keys : 0, [&](Size j0, Size count) {
        float* E = r.S + (whole ? j0 * w : 0);
        if (!whole) {
            r.logits(a, score, t, j0, count, E);
            exponentials(r, count, w);
        }
        if (groups.count > 0) add_block_mass(groups, space, t, j0, count, E);
        if (received) add_received(E, count, w, r.weight, sums + j0 * 2 * VL);
    });
    if (groups.count == 0) return;
    scale_rows(space.mass, groups.count, w, r.factor);
    transpose(space.mass, w, groups.count, t.rows, mass + ((t.b * a.H + t.h) * a.N + t.first) * groups.count, groups.count);
}

// ---- forward of few queries, with the products of few_rows.h. The logits of all keys stay.

// An item has all rows of one query head, or of some that share a key head: up to MOST_ROWS_AT_ONCE.
static const Size MOST_ROWS_AT_ONCE = 16;
struct FewStatistics {
    const StatisticsForward& c;
    Size heads, parts, items, tasks;  // query heads of an item; items of a key head
    explicit FewStatistics(const StatisticsForward& c) : c(c) {
        heads = most(least(c.a.group(), MOST_ROWS_AT_ONCE / c.a.N), 1);
        parts = (c.a.group() + heads - 1) / heads, items = c.a.B * c.a.Hkv * parts, tasks = least(thread_count(), items);
    }
    static bool takes(const Attention& a) {
        const Size few = VL == 16 ? MOST_ROWS_AT_ONCE : FEW_QUERIES;
        return a.N > 0 && a.N <= few && a.M <= MOST_KEYS_OF_FEW && a.H > 0;
    }
};
struct FewStatisticsSpace : RowSums {
    Size stride;  // of S
    float* query;
    RowBias bias;
    Size* group;
    double* mass;
    void plan(const FewStatistics& call, Memory& memory) {
        const Attention& a = call.c.a;
        const Size rows = round_up(call.heads * a.N, BLOCK_ROWS);
        stride = round_up(a.M, GROUP);
        RowSums::plan(rows * stride, memory), query = memory.take(rows * round_up(a.D, 2 * VL)), bias.plan(a, memory);
        group = (Size*)memory.take(2 * a.M), mass = memory.take_doubles(call.c.groups.count + 1);
    }
};

// S = the products of `rows` rows of the query, from head h on, with `keys` keys
template <class E> static void few_raw_scores(const Attention& a, FewStatisticsSpace& x, Size b, Size h, Size rows, Size keys) {
    const Size stride = round_up(a.D, E::STEP);
    const bool fetches = fetches_rows(a, rows);
    typename E::Number* query = (typename E::Number*)x.query;
    memset(query, 0, round_up(rows, BLOCK_ROWS) * stride * sizeof(*query));
    for (Size r = 0; r < rows; ++r)
        E::load_query(element(a.query.data, a.dtype, a.query.at(b, h + r / a.N, r % a.N)), a.D, 1.f, query + r * stride);
    const auto products = [&](Size j0, Size count, bool fetches) {
        const RowsInPlace block = rows_in_place(a, a.key, b, h / a.group(), j0);
        const RowsInPlace next = fetches ? block.from(BLOCK_KEYS) : RowsInPlace{};
        few_products<E>(query, stride, rows, a.D, block, count, next, x.S + j0, x.stride);
    };
    const Size whole = keys < 4 ? keys : keys / 4 * 4;
    for (Size j0 = 0; j0 < whole; j0 += BLOCK_KEYS)
        products(j0, least(BLOCK_KEYS, whole - j0), fetches && j0 + BLOCK_KEYS < whole);
    if (whole < keys) products(keys - 4, 4, false);  // by fours, so that products with alike keys are equal
}
// The products of row i, a row of head h, become e^(logit - largest), and its sums are taken. Behind the keys they are 0.
static void sweep_row(const StatisticsForward& c, FewStatisticsSpace& x, Size b, Size h, Size i, Size keys) {
    const Attention& a = c.a;
    const Size padded = round_up(keys, GROUP);
    float* S = x.S + i * x.stride;
    if (c.score.bends()) activate(c.score, (float)a.scale, S, padded, nullptr);
    else
        for (Size j = 0; j < padded; j += VL) store(S + j, load(S + j) * splat((float)a.scale));
    mask_row(a, b, h, i % a.N, 0, keys, x.bias, S);
    for (Size j = keys; j < padded; ++j) S[j] = -INFINITY;
    const float top = largest(larger_than_all(splat(-INFINITY), S, padded / VL, VL)), shift = top == -INFINITY ? 0.f : top;
    for (Size j = 0; c.argmax && x.argmax[i] < 0 && j < keys; ++j)
        if (S[j] == top) x.argmax[i] = (int32_t)j;
    for (Size chunk = 0; chunk < padded; chunk += SHORT_SUM * VL) {
        Vector total = {}, weighted = {};
        for (Size j = chunk; j < least(chunk + SHORT_SUM * VL, padded); j += VL) {
            const Vector d = load(S + j) - splat(shift), e = exp_negative(d);
            store(S + j, e);
            total += e, weighted += e * maximum(splat(LOWEST), d);
        }
        x.total[i] += sum(total), x.weighted[i] += sum(weighted);
    }
    x.largest[i] = top;
}
// The sum of n numbers
static float sum_of(const float* x, Size n) {
    Vector total = {};
    Size j = 0;
    for (; j + VL <= n; j += VL) total += load(x + j);
    return sum(j < n ? total + load_some(x + j, n - j) : total);
}
// Runs of keys of one group are summed at once.
static void store_row_mass(const StatisticsForward& c, FewStatisticsSpace& x, Size i, Size keys, float* mass) {
    const float* E = x.S + i * x.stride;
    for (Size g = 0; g <= c.groups.count; ++g) x.mass[g] = 0;
    for (Size j = 0, last; j < keys; j = last) {
        for (last = j + 1; last < least(j + SHORT_SUM * VL, keys) && x.group[last] == x.group[j];) ++last;
        x.mass[x.group[j]] += sum_of(E + j, last - j);
    }
    for (Size g = 0; g < c.groups.count; ++g) mass[g] = (float)x.mass[g] * x.factor[i];
}
// What the keys receive from the rows of a head: from row i on, whose number among all rows is `at`. It takes the place of row i.
static void store_received(const StatisticsForward& c, FewStatisticsSpace& x, Size i, Size at, Size keys, float* received) {
    float* E = x.S + i * x.stride;
    for (Size j = 0; j < keys; j += VL) {
        Vector some = {};
        for (Size n = 0; n < c.a.N; ++n)
            some += load(E + n * x.stride + j) * splat((c.weight ? c.weight[at + n] : 1.f) * x.factor[i + n]);
        store(E + j, some);
    }
    if (keys > 0) memcpy(received, E, keys * sizeof(float));
    if (keys < c.a.M) memset(received + keys, 0, (c.a.M - keys) * sizeof(float));
}
static void few_statistics_task(FewStatistics& call, FewStatisticsSpace& x, Size task) {
    const StatisticsForward& c = call.c;
    const Attention& a = c.a;
    for (Size item = share(call.items, task, call.tasks); item < share(call.items, task + 1, call.tasks); ++item) {
        const Size head = item / call.parts, b = head / a.Hkv, before = item % call.parts * call.heads;
        const Size heads = least(call.heads, a.group() - before), h = head % a.Hkv * a.group() + before, rows = heads * a.N;
        const Size visible = visible_keys(a, b), keys = a.masks.is_causal ? least(a.N, visible) : visible;
        with_numbers(a.dtype, [&](auto e) { few_raw_scores<decltype(e)>(a, x, b, h, rows, keys); });
        if (c.groups.count > 0) c.groups.rows(b, 0, keys, 1, x.group);
        x.bias.load_heads(a, b, h, heads, 0, keys);
        x.start(rows);
        for (Size i = 0; i < rows; ++i) sweep_row(c, x, b, h + i / a.N, i, keys);
        finish_sweeps(x, rows);
        for (Size i = 0; i < rows; ++i) {
            const Size at = (b * a.H + h) * a.N + i;
            store_row(c, x, i, at);
            if (c.groups.count > 0) store_row_mass(c, x, i, keys, c.mass + at * c.groups.count);
        }
        for (Size n = 0; c.received && n < heads; ++n)
            store_received(c, x, n * a.N, (b * a.H + h + n) * a.N, keys, c.received + (b * a.H + h + n) * a.M);
    }
}

static Size attention_statistics_forward(const StatisticsForward& c) {
    if (!FewStatistics::takes(c.a)) return run_pass(c);
    FewStatistics call(c);
    return call.items == 0 ? DONE : run_with_space(call.tasks, call, few_statistics_task);
}

// ---- backward

struct StatisticsBackward {
    Attention a;
    Score score;
    KeyGroups groups;
    const float* weight;
    const int64_t* argmax;  // (B, H, N)
    const float *d_mass, *d_entropy, *d_maximum, *d_received;  // as the outputs; null for none
    StridedTensor d_query, d_key;
    float* d_weight;  // (B, H, N); null for none
    float* d_row_bias;  // as row_bias, or null
    FIELDS(a, score, groups, weight, argmax, d_mass, d_entropy, d_maximum, d_received, d_query, d_key, d_weight, d_row_bias)

    struct Space {
        StatisticsRows lanes;
        float *mass, *slope;  // StatisticsCotangents
        float *maximum, *zeros;  // (LANES), (keys of a block)
        float *E, *d_query;  // (keys, width), (D, width)
        float* by_bias;  // a table (attention.h)
        void plan(const StatisticsCall<StatisticsBackward>& call, Memory& memory) {
            const StatisticsBackward& c = call.pass;
            lanes.plan(c.a, c.score, true, memory);
            mass = memory.take((c.groups.count + 1) * LANES), slope = memory.take(LANES);
            maximum = memory.take(LANES), zeros = memory.take(c.a.key_block());
            E = memory.take(LANES * c.a.key_block()), d_query = memory.take(LANES * c.a.D);
            by_bias = memory.take(c.d_row_bias ? table_size(c.a) : 0);
        }
    };
    Size stride() const { return round_up(a.D, VL); }
    Size heads() const { return a.Hkv; }
    Size floats() const { return a.M * stride(); }
    void finish(Size head, const float* x, Size first, Size last) const {
        for (Size j = first; j < last; ++j) store_key(a, head / a.Hkv, head % a.Hkv, j, x + j * stride(), a.D, d_key);
    }
    void add(Space& space, const Tile& t, float* sums) const;
};

static void load_cotangents(const StatisticsBackward& c, StatisticsBackward::Space& x, const Tile& t) {
    const Size at = (t.b * c.a.H + t.h) * c.a.N + t.first, G = c.groups.count;
    for (Size i = 0; i < t.width; ++i) {
        x.slope[i] = c.d_entropy && i < t.rows ? -c.d_entropy[at + i] : 0.f;
        x.maximum[i] = c.d_maximum && i < t.rows ? c.d_maximum[at + i] : 0.f;
    }
    memset(x.mass, 0, (G + 1) * t.width * sizeof(float));
    if (c.d_mass) transpose(c.d_mass + at * G, G, t.rows, G, x.mass, t.width);
    memset(x.zeros, 0, c.a.key_block() * sizeof(float));
}
// E = the gradient of the logits, from E = e^(logit - largest), which is made once more with AGAIN.
template <bool AGAIN>
static void logit_gradients(const StatisticsRows& r, Size count, Size w, const StatisticsCotangents& d, float* E) {
    const Vector lowest = splat(LOWEST);
    for (Size i = 0; i < w; i += VL) {
        const Vector shift = load(r.largest + i), factor = load(r.factor + i), mean = load(r.mean + i),
                     weight = load(r.weight + i);
        const Integers masked = factor == Vector{};
        for (Size j = 0; j < count; ++j) {
            const Vector x = load(r.S + j * w + i) - shift, e = AGAIN ? exp_negative(x) : load(E + j * w + i);
            const Vector gradient = e * factor * (d.at(r.group[j], i, j, maximum(lowest, x), weight) - mean);
            store(E + j * w + i, masked ? Vector{} : gradient);
        }
    }
}

// After the last sweep: sum P dP of each row, to which its largest weight, which is `factor`, adds; and the weights' gradients
static void finish_means(const StatisticsBackward& c, StatisticsBackward::Space& x, const Tile& t) {
    const StatisticsRows& r = x.lanes;
    float* d_weight = c.d_weight ? c.d_weight + (t.b * c.a.H + t.h) * c.a.N + t.first : nullptr;
    for (Size i = 0; i < t.width; ++i) {
        r.mean[i] = (float)((r.weighted[i] + x.maximum[i]) * r.factor[i]);
        if (d_weight && i < t.rows) d_weight[i] = r.factor[i] == 0 ? 0.f : (float)(r.received[i] * r.factor[i]);
    }
}
// The gradients of the logits that are the largest of a row, among the keys [j0, j0 + count)
static void largest_logit_gradients(const StatisticsBackward& c, StatisticsBackward::Space& x, const Tile& t, Size j0, Size count,
                                    const StatisticsCotangents& d) {
    const StatisticsRows& r = x.lanes;
    const int64_t* argmax = c.argmax + (t.b * c.a.H + t.h) * c.a.N + t.first;
    for (Size i = 0; i < t.rows; ++i) {
        const Size j = argmax[i] - j0;
        if (j < 0 || j >= count) continue;
        // x is 0 here. dP is made whole before `weighted` is subtracted, so that a row with one key gets 0 exactly.
        const float rest = x.mass[r.group[j] + i] + r.weight[i] * d.received[j];
        x.E[j * t.width + i] = r.factor[i] * (rest + x.maximum[i] - r.mean[i]);
    }
}
void StatisticsBackward::add(Space& space, const Tile& t, float* sums) const {
    StatisticsRows& r = space.lanes;
    const Size w = t.width, keys = t.keys(a, visible_keys(a, t.b)), head = t.b * a.H + t.h;
    const float factor = score.bends() ? 1.f : (float)a.scale;  // still to come to the gradients of the products
    StatisticsCotangents d = {space.mass, space.slope, nullptr};
    const auto take = [&](Size j0, Size count) {  // the logits and the cotangents of the keys [j0, j0 + count)
        r.logits(a, score, t, j0, count, r.S);
        groups.rows(t.b, j0, count, w, r.group);
        d.received = d_received ? d_received + head * a.M + j0 : space.zeros;
    };
    r.start(a, score, t, weight);
    load_cotangents(*this, space, t);
    by_blocks(a, keys, [&](Size j0, Size count) {
        take(j0, count);
        sweep(r, count, w, BackwardSweep{d, r.group, {}}, space.E);
    });
    finish_sweeps(r, w);
    finish_means(*this, space, t);
    memset(space.d_query, 0, a.D * w * sizeof(float));
    if (d_row_bias) memset(space.by_bias, 0, table_size(a) * sizeof(float));
    by_blocks(a, keys, [&](Size j0, Size count) {
        const bool again = a.M > MOST_KEYS;  // the block that the sweep has left behind is another one
        if (again) take(j0, count);
        if (again) logit_gradients<true>(r, count, w, d, space.E);
        else logit_gradients<false>(r, count, w, d, space.E);
        largest_logit_gradients(*this, space, t, j0, count, d);
        if (d_row_bias) r.bias.load_keys(a, t.b, j0, count);
        if (d_row_bias) sum_by_group(space.E, r.bias.rows, count, w, space.by_bias);
        if (score.bends()) bend(score, (float)a.scale, space.E, count * w, r.saved);
        r.keys.gradients(t, count, factor, space.E, r.rounded_tile, r.query, sums + j0 * stride(), stride(), true, space.d_query);
    });
    if (d_row_bias) store_table(a, t, space.by_bias, d_row_bias);
    store_tile(space.d_query, t, a.D, r.keys.pairs ? 1.f : factor, d_query, a.dtype, r.query);
}

static Size attention_statistics_backward(const StatisticsBackward& c) { return run_pass(c); }

}  // namespace
}  // namespace ISA
OPERATOR(attention_statistics_forward, StatisticsForward)
OPERATOR(attention_statistics_backward, StatisticsBackward)
