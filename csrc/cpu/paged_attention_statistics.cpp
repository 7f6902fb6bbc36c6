// Statistics of causal attention over keys that lie in a paged cache: mass per group of keys, entropy, largest weight, received
// attention. A server's requests come packed: request r has the tokens [starts[r], starts[r + 1]), of which the last stands at
// position lengths[r] - 1, and key j of it lies in the cache's block table[r, j / block size], at place j % block size.
//
// The formulas are those of attention_statistics.cpp (statistics.h) for the keys that a token sees.
//
// Bound: multiply-adds (D per entry), then one exponential per entry; for few tokens the reading of keys, once for all query heads
// that share a key head. Tricks: rows of a tile are tokens of one head, or, where a request has fewer than GROUP of them, those of
// all heads that share a key head. Keys are widened or copied from the cache a block at a time. The exponentials of a tile are kept
// up to MOST_KEYS keys, or MOST_KEYS_OF_FEW for few rows; beyond, mass and received attention make the logits again: D more. A
// thread takes all tokens of a head, to which the received attention adds, or, where nobody asks for that, a tile.
#include "statistics.h"

namespace ISA {
namespace {

struct PagedStatistics {
    Size dtype, T, H, Hkv, D, R, blocks, block_size, columns, window;  // of keys, 0 for none
    double scale;
    Score score;  // a function of dot products
    const void* query;  // (T, H, D), last stride 1
    Size query_stride_t, query_stride_h;
    const void* cache;  // (blocks, Hkv, block size, D)
    Size stride_block, stride_head, stride_place, stride_d;
    const int64_t *table, *lengths, *starts;  // (R, columns), (R), (R + 1)
    const int64_t* groups;  // (R, K): the group of each key, and of keys from K on none; null for none
    Size K, G;
    // (T, H, G), (T, H), (R, H, columns * block size); null where nobody asks. Rows of no request and keys behind the length stay.
    float *mass, *entropy, *maximum, *received, *max_logit, *lse;
    FIELDS(dtype, T, H, Hkv, D, R, blocks, block_size, columns, window, scale, score, query, query_stride_t, query_stride_h,
           cache, stride_block, stride_head, stride_place, stride_d, table, lengths, starts, groups, K, G, mass, entropy, maximum,
           received, max_logit, lse)
    Size group() const { return H / Hkv; }  // query heads that share a key head
    Size room() const { return columns * block_size; }
};

// The tokens of a request
struct Tokens {
    Size first, count, ahead;  // a token's number plus `ahead` is its position
    Tokens(const PagedStatistics& c, Size r) {
        first = most(0, least(c.starts[r], c.T));
        count = most(0, least(c.starts[r + 1], c.T) - first);
        ahead = c.lengths[r] - c.starts[r + 1];
    }
};
// The rows [first, first + rows) of `heads` heads of a request from `head` on, whose row x is token x % tokens of head x / tokens
struct Rows {
    Size r, head, heads, first, rows;
};

struct PagedJob : Queue {
    const PagedStatistics& c;
    Rows* items = nullptr;
    Size count = 0, longest = 0, most_heads = 1;  // keys that a request's tokens see
    explicit PagedJob(const PagedStatistics& c) : c(c) {}
    // f(rows) for each item
    template <class F> void each(const F& f) const {
        for (Size r = 0; r < c.R; ++r) {
            const Size tokens = Tokens(c, r).count, heads = tokens < GROUP ? c.group() : 1;
            const Size rows = heads * tokens, step = c.received ? rows : LANES;
            for (Size head = 0; rows > 0 && head < c.H; head += heads)
                for (Size first = 0; first < rows; first += step) f(Rows{r, head, heads, first, least(step, rows - first)});
        }
    }
    bool plan(Memory& memory) {
        each([&](const Rows& rows) {
            const Tokens tokens(c, rows.r);
            ++count, most_heads = most(most_heads, rows.heads);
            longest = most(longest, least(tokens.first + tokens.count + tokens.ahead, c.room()));
        });
        if (!memory.place([&] { items = (Rows*)memory.take(count * sizeof(Rows) / sizeof(float)); })) return false;
        Size n = 0;
        each([&](const Rows& rows) { items[n++] = rows; });
        return true;
    }
};

// One thread's tile
struct PagedTile : RowSums {
    Size *tokens, *heads, *low, *high;  // (LANES): token and head of each row, the first and the last key that it sees
    float *query, *transposed, *keys;  // (LANES, stride), (D, width), (BLOCK_KEYS, D)
    float *from, *to;  // (LANES), low and high relative to a block
    uint8_t* exists;  // (BLOCK_KEYS)
    float *mass, *some_mass;  // (G + 1, width); that of a block of keys, so that rounding does not grow with their number
    Size* group;  // (BLOCK_KEYS)
    double* received;  // (heads, longest)
    Size stride, kept;  // so many exponentials are kept
    void plan(const PagedJob& job, Memory& memory) {
        const PagedStatistics& c = job.c;
        kept =
            most(LANES * BLOCK_KEYS, most(GROUP * least(job.longest, MOST_KEYS_OF_FEW), LANES * least(job.longest, MOST_KEYS)));
        RowSums::plan(kept, memory);
        stride = round_up(c.D, VL);
        tokens = (Size*)memory.take(2 * LANES), heads = (Size*)memory.take(2 * LANES);
        low = (Size*)memory.take(2 * LANES), high = (Size*)memory.take(2 * LANES);
        query = memory.take(LANES * stride), transposed = memory.take(LANES * c.D), keys = memory.take(BLOCK_KEYS * c.D);
        from = memory.take(LANES), to = memory.take(LANES), exists = (uint8_t*)memory.take(BLOCK_KEYS / sizeof(float));
        mass = memory.take((c.G + 1) * LANES), some_mass = memory.take((c.G + 1) * LANES);
        group = (Size*)memory.take(2 * BLOCK_KEYS);
        received = memory.take_doubles(c.received ? job.most_heads * job.longest : 0);
    }
};

static void start_tile(const PagedStatistics& c, PagedTile& x, const Rows& item, const Tile& t) {
    const Tokens tokens(c, item.r);
    for (Size i = 0; i < t.rows; ++i) {
        const Size row = t.first + i, position = tokens.first + row % tokens.count + tokens.ahead;
        x.tokens[i] = tokens.first + row % tokens.count, x.heads[i] = item.head + row / tokens.count;
        x.low[i] = c.window > 0 ? most(0, position - c.window + 1) : 0, x.high[i] = position;
        float* to = x.query + i * x.stride;
        widen(element(c.query, c.dtype, x.tokens[i] * c.query_stride_t + x.heads[i] * c.query_stride_h), c.dtype, c.D, to);
        // Scores are scaled after the product where they bend, as in attention_statistics.cpp
        for (Size d = 0; !c.score.bends() && d < c.D; ++d) to[d] *= (float)c.scale;
        memset(to + c.D, 0, (x.stride - c.D) * sizeof(float));
    }
    memset(x.query + t.rows * x.stride, 0, (t.width - t.rows) * x.stride * sizeof(float));
    transpose(x.query, x.stride, t.width, c.D, x.transposed, t.width);
    x.start(t.width);
}

// Whether the cache has the block of a request, and where its first key lies. An empty cache has no address.
static bool has_block(const PagedStatistics& c, Size r, Size column) {
    const Size block = column < c.columns ? c.table[r * c.columns + column] : -1;
    return block >= 0 && block < c.blocks;
}
static const void* block_at(const PagedStatistics& c, Size r, Size key_head, Size column) {
    return element(c.cache, c.dtype, c.table[r * c.columns + column] * c.stride_block + key_head * c.stride_head);
}
// The keys [j0, j0 + count) of a request as float32 rows; zeros where the cache has no such block.
static void load_paged_keys(const PagedStatistics& c, PagedTile& x, Size r, Size key_head, Size j0, Size count) {
    float* to = x.keys;
    for (Size j = j0, last; j < j0 + count; j = last) {
        const Size column = j / c.block_size, first = column * c.block_size;
        const bool exists = has_block(c, r, column), goes_on = c.D > 0 && has_block(c, r, column + 1);
        last = least(first + c.block_size, j0 + count);
        for (Size n = 0; goes_on && n < least(c.block_size, GROUP); ++n)
            fetch(element(block_at(c, r, key_head, column + 1), c.dtype, n * c.stride_place), c.D * bytes_of(c.dtype));
        memset(x.exists + (j - j0), exists, last - j);
        if (!exists) memset(to, 0, (last - j) * c.D * sizeof(float));
        for (Size n = j; n < last; ++n, to += c.D) {
            if (!exists || c.D == 0) continue;
            const void* key = element(block_at(c, r, key_head, column), c.dtype, (n - first) * c.stride_place);
            if (c.stride_d == 1) widen(key, c.dtype, c.D, to);
            else
                for (Size d = 0; d < c.D; ++d) widen(element(key, c.dtype, d * c.stride_d), c.dtype, 1, to + d);
        }
    }
}
// Pairs that are not seen become -Inf.
static void hide_unseen(PagedTile& x, const Tile& t, Size j0, Size count, float* S) {
    bool all = true;
    for (Size i = 0; i < t.rows; ++i) all &= x.low[i] <= j0 && x.high[i] >= j0 + count - 1;
    for (Size j = 0; j < count; ++j) all &= x.exists[j] != 0;
    if (all) return;
    for (Size i = 0; i < t.width; ++i) {  // exact: a block has few keys
        x.from[i] = i < t.rows ? (float)most(-1, least(x.low[i] - j0, BLOCK_KEYS)) : -1.f;
        x.to[i] = i < t.rows ? (float)most(-1, least(x.high[i] - j0, BLOCK_KEYS)) : (float)BLOCK_KEYS;
    }
    for (Size j = 0; j < count; ++j) {
        const Vector place = splat((float)j), masked = splat(-INFINITY);
        for (Size i = 0; i < t.width; i += VL) {
            float* s = S + j * t.width + i;
            const Integers seen = (load(x.from + i) <= place) & (place <= load(x.to + i));
            store(s, x.exists[j] ? (seen ? load(s) : masked) : masked);
        }
    }
}
static void paged_logits(const PagedStatistics& c, PagedTile& x, const Rows& item, const Tile& t, Size j0, Size count, float* S) {
    load_paged_keys(c, x, item.r, item.head / c.group(), j0, count);
    tile_product<false>(t, count, c.D, x.keys, c.D, x.transposed, S, false);
    if (c.score.bends()) activate(c.score, (float)c.scale, S, count * t.width, nullptr);
    hide_unseen(x, t, j0, count, S);
    for (Size j = 0; t.rows < t.width && j < count; ++j) memset(S + j * t.width + t.rows, 0, (t.width - t.rows) * sizeof(float));
}

static void store_paged_rows(const PagedStatistics& c, const PagedTile& x, const Tile& t) {
    for (Size i = 0; i < t.rows; ++i) {
        const Size at = x.tokens[i] * c.H + x.heads[i];
        const float top = x.max_logit(i);
        if (c.entropy) c.entropy[at] = x.entropy(i);
        if (c.maximum) c.maximum[at] = x.factor[i];
        if (c.max_logit) c.max_logit[at] = top;
        if (c.lse) c.lse[at] = x.factor[i] == 0 ? -INFINITY : (float)(top + log(x.total[i]));
    }
}
static void add_paged_mass(const PagedStatistics& c, PagedTile& x, Size r, const Tile& t, Size j0, Size count, const float* E) {
    const Size w = t.width;
    for (Size j = 0; j < count; ++j) {
        const Size g = j0 + j < c.K ? c.groups[r * c.K + j0 + j] : c.G;
        x.group[j] = (g >= 0 && g < c.G ? g : c.G) * w;
    }
    memset(x.some_mass, 0, (c.G + 1) * w * sizeof(float));
    sum_by_group(E, x.group, count, w, x.some_mass);
    for (Size i = 0; i < c.G * w; i += VL) store(x.mass + i, load(x.mass + i) + load(x.some_mass + i));
}
static void store_paged_mass(const PagedStatistics& c, const PagedTile& x, const Tile& t) {
    for (Size i = 0; i < t.rows; ++i)
        for (Size g = 0; g < c.G; ++g) c.mass[(x.tokens[i] * c.H + x.heads[i]) * c.G + g] = x.mass[g * t.width + i] * x.factor[i];
}
// A row gives nothing to a key that it does not see, also where it is NaN.
static void add_paged_received(const PagedStatistics& c, PagedTile& x, const Rows& item, const Tile& t, Size longest, Size j0,
                               Size count, const float* E) {
    for (Size i = 0, last; i < t.rows; i = last) {
        for (last = i; last < t.rows && x.heads[last] == x.heads[i]; ++last) {
        }
        double* sums = x.received + (x.heads[i] - item.head) * longest + j0;
        bool is_nan = false;
        for (Size n = i; n < last; ++n) is_nan |= x.factor[n] != x.factor[n];
        for (Size j = 0; j < count; ++j) {
            const float* e = E + j * t.width;
            if (is_nan) {
                for (Size n = i; n < last && has_block(c, item.r, (j0 + j) / c.block_size); ++n)
                    if (x.low[n] <= j0 + j && j0 + j <= x.high[n]) sums[j] += e[n] * x.factor[n];
                continue;
            }
            Vector some = {};
            Size n = i;
            for (; n + VL <= last; n += VL) some += load(e + n) * load(x.factor + n);
            if (n < last) some += load_some(e + n, last - n) * load_some(x.factor + n, last - n);
            sums[j] += sum(some);
        }
    }
}

static void paged_tile(const PagedJob& job, PagedTile& x, const Rows& item, const Tile& t) {
    const PagedStatistics& c = job.c;
    const Size w = t.width;
    start_tile(c, x, item, t);
    Size low = c.room(), high = 0;
    for (Size i = 0; i < t.rows; ++i) low = least(low, x.low[i]), high = most(high, least(x.high[i] + 1, c.room()));
    const bool whole = (high - low) * w <= x.kept;
    const auto by_blocks = [&](const auto& f) {
        for (Size j0 = low; j0 < high; j0 += BLOCK_KEYS) f(j0, least(BLOCK_KEYS, high - j0), x.S + (whole ? (j0 - low) * w : 0));
    };
    by_blocks([&](Size j0, Size count, float* S) {
        paged_logits(c, x, item, t, j0, count, S);
        if (!whole) sweep(x, count, w, EntropySweep(), S);
    });
    if (whole && low < high) sweep(x, high - low, w, EntropySweep(), x.S);
    finish_sweeps(x, w);
    store_paged_rows(c, x, t);
    if (!c.mass && !c.received) return;
    memset(x.mass, 0, (c.G + 1) * w * sizeof(float));
    by_blocks([&](Size j0, Size count, float* E) {
        if (!whole) {
            paged_logits(c, x, item, t, j0, count, E);
            exponentials(x, count, w);
        }
        if (c.mass) add_paged_mass(c, x, item.r, t, j0, count, E);
        if (c.received) add_paged_received(c, x, item, t, job.longest, j0, count, E);
    });
    if (c.mass) store_paged_mass(c, x, t);
}

static void paged_items(PagedJob& job, PagedTile& x, Size) {
    const PagedStatistics& c = job.c;
    for (Size n = job.take(); n < job.count; n = job.take()) {
        const Rows& item = job.items[n];
        const Tokens tokens(c, item.r);
        const Size keys = most(0, least(tokens.first + tokens.count + tokens.ahead, c.room()));
        if (c.received) memset(x.received, 0, item.heads * job.longest * sizeof(double));
        for (Size index = 0; index < row_tiles(item.rows, LANES); ++index) {
            const RowTile rows = row_tile(item.rows, LANES, index);
            paged_tile(job, x, item, {0, 0, item.first + rows.first, rows.rows, rows.width});
        }
        for (Size h = 0; c.received && h < item.heads; ++h)
            for (Size j = 0; j < keys; ++j)
                c.received[(item.r * c.H + item.head + h) * c.room() + j] = (float)x.received[h * job.longest + j];
    }
}

static Size paged_attention_statistics_forward(const PagedStatistics& c) {
    PagedJob job(c);
    Memory memory;
    if (c.H == 0 || c.Hkv == 0) return DONE;
    if (!job.plan(memory)) return NO_MEMORY;
    return run_with_space<PagedTile>(least(thread_count(), most(job.count, 1)), job, paged_items);
}

}  // namespace
}  // namespace ISA
OPERATOR(paged_attention_statistics_forward, PagedStatistics)
