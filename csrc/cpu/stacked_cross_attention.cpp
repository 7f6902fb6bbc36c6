// stacked_cross_attention: the similarity of every set of queries (captions or images) with every set of contexts, and gradients.
//
// A pair of sets has n queries q_i and m contexts c_j. Maps are (n, m); in brackets: the names below.
//     S_ij  = q_i . c_j, or the product of features that follow the vectors in their rows  [times_contexts]
//     N_ij  = S_ij, clipped or not, over the norm of column j, or the column's softmax     [normalize]
//     P_ij  = softmax over j of smooth N_ij                                                [attend]
//     a_i   = sum_j P_ij c_j                                                               [A]
//     cos_i = q_i . a_i / max(|q_i| |a_i|, EPS)                                            [cosines]
//     similarity = ln(sum_i e^(lambda cos_i)) / lambda, or the largest, the sum or the mean of cos_i     [aggregate]
// Back, with G_X for the gradient at X, and by_dot, by_norm_q, by_norm_a for those at q . a, |q| and |a| over the norm itself:
//     G_a = by_dot q + by_norm_a a                                                         [cosine_gradients]
//     G_P = G_a C^T, and from it G_N and G_S                                               [map_gradients]
//     G_c = P^T G_a + G_S^T Q                                                              [add_to_contexts]
//     G_q = by_dot a + by_norm_q q + G_S C = by_norm_q q + (G_S + by_dot P) C              [store_for_queries, add_to_queries]
// With features G_S is multiplied by those, and gives their gradients.
//
// Bound: multiply-adds. Forward: two products over features a pair of query and context; backward: six, two of them again.
// Tricks: the real rows of all query sets lie one after the other, so that products never see padding and take many sets at once;
// a lane is a context, so what is normalised over the queries of a set needs no sum over lanes. A context set belongs to one
// thread, which finishes its gradient; what the queries' gradients need of a pair is one number a query and context, stored for a
// chunk of context sets, and summed over these in a second sweep over the query sets. So no sum depends on the threads.
// Products of bfloat16 sets are those of pairs by tiles (pairs.h). Similarities are float32 numbers: for a_i P is the sum of three
// bfloat16 numbers, in as many products. Gradients are bfloat16 numbers: for them P, G_a, G_S and sums of these are rounded.
// Measured: rows stacked_cross_attention of benchmarks/results/cpu.json.
#include "pairs.h"

namespace ISA {
namespace {

enum Norm : Size { NONE = 0, SOFTMAX = 1, L2 = 2, L1 = 3 };
enum Aggregation : Size { LOGSUMEXP = 0, MAX = 1, SUM = 2, MEAN = 3 };
static const Size BLOCK_ROWS = 48;  // rows of query sets at a time, or one set
static const Size MOST_CONTEXTS = 33 * GROUP;  // of a set at a time: transposed they stay in the second cache
static const Size LONG_BLOCK_ROWS = 128;  // where sets have more contexts, which then come through the caches less often
static const Size MOST_STORED = 1 << 22;  // numbers that are stored for the second sweep, or those of two context sets a thread
static const float EPS = 1e-8f;  // of SCAN's norms and cosine

struct Sets {
    const void* data;  // (sets, rows, D), last stride 1
    Size count, rows, stride_set, stride_row;
    const int64_t* lengths;  // (sets), how many rows are real; null for all
    FIELDS(data, count, rows, stride_set, stride_row, lengths)
};

struct StackedCrossAttention {
    Size dtype, D, F, norm, clips,
        aggregation;  // F: features in float32 behind the D numbers of each vector; 0: scores of vectors
    double smooth, lambda_lse;
    Sets query, context;
    float* similarity;  // forward: element (y, x)
    const float* grad_similarity;  // backward
    Size stride_y, stride_x;  // of either
    void *grad_query, *grad_context;  // as the inputs, contiguous
    FIELDS(dtype, D, F, norm, clips, aggregation, smooth, lambda_lse, query, context, similarity, grad_similarity, stride_y,
           stride_x, grad_query, grad_context)
};

static bool takes_pairs(const StackedCrossAttention& c) { return !c.F && tiles_pay(c.dtype, least(c.D, c.context.rows)); }

// The stride of maps: an odd number of groups where it is long, so that their rows do not fall onto one set of the cache
static Size padded(Size contexts) {
    const Size groups = (contexts + GROUP - 1) / GROUP;
    return GROUP * (contexts > MOST_CONTEXTS ? groups | 1 : groups);
}

// The real rows of a side in float32, with a stride of padded features or, where they can be read as they are, of their own
struct Rows32 {
    const float* data;
    float* copy;
    Size stride, stride_set;  // of sets where nothing was copied
    Size* first;  // (sets + 1): where a set's rows begin among all
    Size count(Size set) const { return first[set + 1] - first[set]; }
    const float* at(Size set) const { return data + (copy ? first[set] * stride : set * stride_set); }
};
// The same rows as pairs, in calls that take pairs
struct PairedRows {
    Pair* along;  // of two numbers of a row: (rows, features / 2)
    Pair* across;  // of two rows of a set of contexts: (half(rows) of each set, features)
};

struct Workspace {
    // of a block of query sets, (rows, contexts): scores, normalised scores, their softmax, the gradients at P and then at S
    float *S, *N, *P, *G;
    float* A;  // (rows, features): attended vectors, and then their gradients
    float *dot, *norm_a, *cosine, *weight;  // (rows): q . a, and then the gradient at it; |a|; see aggregate
    float* norms;  // (sets, contexts) of the columns
    // pairs of a block: of a map's numbers in a row (rows, width / 2), in two rows (half(rows), width), and the latter transposed; of A
    // likewise (rows, features / 2) and (half(rows), features); of query rows as the last
    Pair *map_along, *map_across, *map_transposed, *A_along, *A_across, *query_across;
    // of a context set
    float* CT;  // (D, contexts) from context `start` of set `set`, or pairs, or with features (columns, contexts)
    Size set, start;
    float* grad_context;
};

struct Job : Queue {
    const StackedCrossAttention& c;
    bool pairs = takes_pairs(c);
    Size threads = thread_count();
    Rows32 query, context;
    PairedRows query_pairs, context_pairs;
    Size *blocks, num_blocks;  // block b: query sets [blocks[b], blocks[b + 1])
    float* norm_q;  // of all query rows
    // for the second sweep, of a chunk of context sets: (x, rows, contexts) G_S + by_dot P, and (x, rows)
    float *context_weights, *by_norm_q;
    float* score_weights;  // with features: G_S, and the former without it
    float* grad_query;  // (rows, columns), in float32
    Workspace* workspaces;
    Size block_rows, block_sets;  // at most
    Size splits, first = 0, sets;

    explicit Job(const StackedCrossAttention& c) : c(c) {}
    Size features() const { return round_up(c.D, GROUP); }  // of vectors
    Size columns() const { return features() + round_up(c.F, GROUP); }  // of a row
    Size depth() const { return pairs ? half(c.D) : c.D; }  // of products over the features
    Size first_of_score() const { return c.F ? features() : 0; }  // the columns whose products are scores
    Size columns_of_score() const { return columns() - first_of_score(); }
    // Of a product with `rows` rows of the batch: fewer than a tile's would be multiplied, and so round, otherwise than in a larger batch.
    Size product_rows(Size rows) const { return pairs ? most(rows, TILE_SIDE) : rows; }
    const Pair* query_along(Size row) const { return query_pairs.along + row * features() / 2; }
    const Pair* context_along(Size x) const { return context_pairs.along + context.first[x] * features() / 2; }
    Pair* context_across(Size x) const { return context_pairs.across + (context.first[x] + x) / 2 * features(); }
    Size width() const { return padded(c.context.rows); }
    Size rows() const { return query.first[c.query.count]; }
    // of query row `row` and context set x, whose maps have `width` columns
    float* weights_at(float* weights, Size x, Size row, Size width) const {
        return weights + (x - first) * rows() * this->width() + row * width;
    }
    float* by_norm_q_at(Size x, Size row) const { return by_norm_q + (x - first) * rows() + row; }
};

// ---- small sums

INLINE float inner(const float* x, const float* y, Size n) {  // n is a multiple of VL
    return sum(sum_over<64>(n / VL, [=](Size i) { return load(x + i * VL) * load(y + i * VL); }));
}
INLINE Vector square_root(Vector x) {
    for (int i = 0; i < VL; ++i) x[i] = sqrtf(x[i]);
    return x;
}
INLINE float ratio(float a, float b) { return b > 0.f ? a / b : b == 0.f ? 0.f : NAN; }  // the gradient of a norm is 0 at 0

// ---- the norm of a context's column of n scores, chosen when a call begins a map (with_columns)

// x is value over norm + EPS. `gradient` makes of g, the gradient at x, the one at value; along = sum over the column of x g.
struct L2Norm {
    template <class Value> static METHOD Vector of(Size n, const Value& value) {
        return square_root(sum_over<64>(n, [&](Size i) { return value(i) * value(i); }));
    }
    static METHOD Vector divided(Vector value, Vector norm) { return value / (norm + EPS); }
    static METHOD Vector gradient(Vector x, Vector g, Vector along, Vector norm, Vector inverse) {
        return (norm > Vector{} ? g - along * (x * (norm + EPS) / norm) : g) * inverse;
    }
};
struct L1Norm {
    template <class Value> static METHOD Vector of(Size n, const Value& value) {
        return sum_over<64>(n, [&](Size i) { return absolute(value(i)); });
    }
    static METHOD Vector divided(Vector value, Vector norm) { return value / (norm + EPS); }
    static METHOD Vector gradient(Vector x, Vector g, Vector along, Vector, Vector inverse) {
        return (g - along * (x > Vector{} ? splat(1.f) : x < Vector{} ? splat(-1.f) : Vector{})) * inverse;
    }
};
struct NoNorm {
    template <class Value> static METHOD Vector of(Size, const Value&) { return splat(1.f); }
    static METHOD Vector divided(Vector value, Vector) { return value; }
    static METHOD Vector gradient(Vector, Vector g, Vector, Vector, Vector) { return g; }
};

// A norm of scores, or of clipped scores: a leaky ReLU of slope 0.1
template <class Norm, bool CLIPS> struct NormedColumns {
    static METHOD Vector clipped(Vector s) { return CLIPS ? s > Vector{} ? s : s * 0.1f : s; }
    static METHOD Vector clipped_gradient(Vector s, Vector g) { return CLIPS ? s > Vector{} ? g : g * 0.1f : g; }
    static void normalize(const float* S, Size n, Size w, float* N, float* norms) {
        for (Size j = 0; j < w; j += VL) {
            const auto value = [&](Size i) { return clipped(load(S + i * w + j)); };
            const Vector norm = Norm::of(n, value);
            store(norms + j, norm);
            for (Size i = 0; i < n; ++i) store(N + i * w + j, Norm::divided(value(i), norm));
        }
    }
    static void gradients(const float* S, const float* N, const float* norms, Size n, Size w, float* G) {
        for (Size j = 0; j < w; j += VL) {
            const Vector along = sum_over<64>(n, [=](Size i) { return load(N + i * w + j) * load(G + i * w + j); });
            const Vector norm = load(norms + j), inverse = 1.f / (norm + EPS);
            for (Size i = 0; i < n; ++i) {
                float* g = G + i * w + j;
                const Vector x = load(N + i * w + j), s = load(S + i * w + j);
                store(g, clipped_gradient(s, Norm::gradient(x, load(g), along, norm, inverse)));
            }
        }
    }
};
struct SoftmaxColumns {
    static void normalize(const float* S, Size n, Size w, float* N, float*) {
        for (Size j = 0; j < w; j += VL) {
            const Vector total = exponentials(S + j, n, w, top_of(S + j, n, w), N + j);
            for (Size i = 0; i < n; ++i) store(N + i * w + j, load(N + i * w + j) / total);
        }
    }
    static void gradients(const float*, const float* N, const float*, Size n, Size w, float* G) {
        for (Size j = 0; j < w; j += VL) {
            const Vector along = sum_over<64>(n, [=](Size i) { return load(N + i * w + j) * load(G + i * w + j); });
            for (Size i = 0; i < n; ++i) {
                float* g = G + i * w + j;
                store(g, load(N + i * w + j) * (load(g) - along));
            }
        }
    }
};
template <class F> static void with_columns(const StackedCrossAttention& c, const F& f) {
    if (c.norm == SOFTMAX) f(SoftmaxColumns());
    else if (c.norm == L2) c.clips ? f(NormedColumns<L2Norm, true>()) : f(NormedColumns<L2Norm, false>());
    else if (c.norm == L1) c.clips ? f(NormedColumns<L1Norm, true>()) : f(NormedColumns<L1Norm, false>());
    else c.clips ? f(NormedColumns<NoNorm, true>()) : f(NormedColumns<NoNorm, false>());
}

// ---- maps of one set of n queries and one of m contexts, (n, w)

// N: the scores, each context's column normalised over the queries. norms (w): those of the columns, where there are any.
static void normalize(const StackedCrossAttention& c, const float* S, Size n, Size w, float* N, float* norms) {
    with_columns(c, [&](auto columns) { columns.normalize(S, n, w, N, norms); });
}

// P: the softmax over the m contexts of smooth * N; 0 behind them
static void attend(float smooth, const float* N, Size n, Size m, Size w, float* P) {
    for (Size i = 0; i < n; ++i) {
        float* p = P + i * w;
        for (Size j = 0; j < w; j += VL) store(p + j, load(N + i * w + j) * smooth);
        for (Size j = m; j < w; ++j) p[j] = -INFINITY;
        const Vector top = splat(largest(top_of(p, w / VL, VL)));
        const float total = sum(exponentials(p, w / VL, VL, top, p));
        for (Size j = 0; j < w; j += VL) store(p + j, load(p + j) / total);
    }
}
// G, the gradient at P, becomes the one at N.
static void attend_backward(float smooth, const float* P, Size n, Size w, float* G) {
    for (Size i = 0; i < n; ++i) {
        const float* p = P + i * w;
        float* g = G + i * w;
        const float mean = inner(p, g, w);
        for (Size j = 0; j < w; j += VL) store(g + j, load(p + j) * (load(g + j) - mean) * smooth);
    }
}

// ---- one number a set: the similarity from the cosines (n), which are padded by a vector; `weight` becomes its derivatives

// ln(sum of e^(lambda cosine)) / lambda, where `top` is the largest cosine: no exponent is positive
static float aggregate_logsumexp(float lambda, float top, const float* cosine, Size n, float* weight) {
    double total = 0;
    for (Size i = 0; i < n; i += VL) store(weight + i, exp_negative((load(cosine + i) - top) * lambda));
    for (Size i = 0; i < n; ++i) total += weight[i];
    for (Size i = 0; i < n; ++i) weight[i] /= (float)total;
    return top + logf((float)total) / lambda;
}
// The derivative is shared by all that are the largest.
static float aggregate_max(float top, const float* cosine, Size n, float* weight) {
    double total = 0;
    for (Size i = 0; i < n; ++i) total += weight[i] = cosine[i] == top;
    for (Size i = 0; i < n; ++i) weight[i] /= (float)total;
    return top;
}
static float aggregate_sum(bool is_mean, const float* cosine, Size n, float* weight) {
    double total = 0;
    for (Size i = 0; i < n; ++i) total += cosine[i], weight[i] = is_mean ? 1.f / n : 1.f;
    return (float)(is_mean ? total / n : total);
}
static float aggregate(const StackedCrossAttention& c, const float* cosine, Size n, float* weight) {
    if (c.aggregation == SUM || c.aggregation == MEAN) return aggregate_sum(c.aggregation == MEAN, cosine, n, weight);
    float top = cosine[0];
    for (Size i = 1; i < n; ++i) top = top > cosine[i] || top != top ? top : cosine[i];  // NaN stays
    if (c.aggregation == MAX) return aggregate_max(top, cosine, n, weight);
    return aggregate_logsumexp((float)c.lambda_lse, top, cosine, n, weight);
}

// ---- a block of query sets and a context set

struct Block {
    Size first_set, last_set, first_row, rows;
};
INLINE Block block_at(const Job& job, Size b) {
    const Size first = job.blocks[b], last = job.blocks[b + 1], row = job.query.first[first];
    return {first, last, row, job.query.first[last] - row};
}

// CT becomes contexts [start, start + n) of set x, transposed, with zeros behind the last one. Gives n.
static Size load_contexts(const Job& job, Size x, Size start, Workspace& w) {
    const Size m = job.context.count(x), n = least(MOST_CONTEXTS, padded(m) - start), real = most(0, least(n, m - start));
    if (w.set == x && w.start == start) return n;
    w.set = x, w.start = start;
    const Size rows_of_CT = job.c.F ? job.columns() : job.depth();
    if (real < n) memset(w.CT, 0, n * rows_of_CT * sizeof(float));
    const Size stride = job.pairs ? job.features() / 2 : job.context.stride;
    const float* rows = job.pairs ? (const float*)job.context_along(x) : job.context.at(x);
    if (job.pairs) count_packed(job.depth() * n * sizeof(Pair));
    transpose(rows + start * stride, stride, real, rows_of_CT, w.CT, n);
    return n;
}
// to (rows, width) = from (rows, D), whose stride is `stride`, times the contexts of set x transposed; `from` may be pairs. Of
// contexts the columns from `first` on are taken, `depth` of them.
template <class Element>
static void times_contexts(const Job& job, Size x, Size rows, const Element* from, Size stride, Size first, Size depth, float* to,
                           Size width, Workspace& w) {
    for (Size j = 0, n; j < width; j += n) {
        n = load_contexts(job, x, j, w);
        const Element* CT = (const Element*)w.CT + first * n;
        product<false>(job.product_rows(rows), n, depth, from, stride, CT, n, to + j, width, false);
    }
}
static const int WHOLE = 3;  // bfloat16 numbers whose sum is a float32 number
// to (rows, features) = map (rows, width) times the contexts of set x. Pairs take the first `parts` of the map: it rounded, and then
// what that leaves.
static void map_times_contexts(const Job& job, Size x, Size rows, const float* map, int parts, float* to, Workspace& w) {
    const Size m = job.context.count(x), width = padded(m), features = job.features();
    const auto multiply = [&](bool adds) {
        const Size some = job.product_rows(rows);
        product<false>(some, features, half(m), w.map_along, width / 2, job.context_across(x), features, to, features, adds);
    };
    if (!job.pairs)
        return product<false>(rows, features, m, map, width, job.context.at(x), job.context.stride, to, features, false);
    for (int part = 0; part < parts; ++part) {
        for (Size n = 0; n < rows * width; n += VL) {
            Vector rest = load(map + n);
            for (int before = 0; before < part; ++before) rest -= widened(rounded(rest), true);
            store((uint16_t*)w.map_along + n, rounded(rest));
        }
        multiply(part > 0);
    }
}

// f(n, at, norms) for each set of the block that has rows: its maps begin at number `at`, and have n rows.
template <class F> INLINE void for_maps(const Job& job, const Block& b, Size width, const Workspace& w, const F& f) {
    for (Size y = b.first_set; y < b.last_set; ++y) {
        const Size n = job.query.count(y), at = (job.query.first[y] - b.first_row) * width;
        if (n > 0) f(n, at, w.norms + (y - b.first_set) * width);
    }
}
INLINE float larger_than_eps(float length) { return length < EPS ? EPS : length; }  // NaN stays

static void cosines(const Job& job, const Block& b, Workspace& w) {
    const Size features = job.features();
    for (Size i = 0; i < b.rows; ++i) {
        const float *q = job.query.at(b.first_set) + i * job.query.stride, *a = w.A + i * features;
        w.norm_a[i] = sqrtf(inner(a, a, features));
        w.dot[i] = inner(q, a, features);
        w.cosine[i] = w.dot[i] / larger_than_eps(job.norm_q[b.first_row + i] * w.norm_a[i]);
    }
}
// S, N, P, attended vectors A and cosines of the block with context set x.
static void block_forward(const Job& job, const Block& b, Size x, Workspace& w) {
    const StackedCrossAttention& c = job.c;
    const Size m = job.context.count(x), width = padded(m), first = job.first_of_score();
    if (job.pairs) {
        times_contexts(job, x, b.rows, job.query_along(b.first_row), job.features() / 2, 0, job.depth(), w.S, width, w);
    } else {
        const float* query = job.query.at(b.first_set) + first;
        times_contexts(job, x, b.rows, query, job.query.stride, first, c.F ? c.F : c.D, w.S, width, w);
    }
    for_maps(job, b, width, w, [&](Size n, Size at, float* norms) {
        normalize(c, w.S + at, n, width, w.N + at, norms);
        attend((float)c.smooth, w.N + at, n, m, width, w.P + at);
    });
    map_times_contexts(job, x, b.rows, w.P, WHOLE, w.A, w);
    cosines(job, b, w);
}

// From the gradient at the similarity with each set: `dot` becomes by_dot, A the gradient at itself, and by_norm_q is stored.
static void cosine_gradients(const Job& job, const Block& b, Size x, Workspace& w) {
    const StackedCrossAttention& c = job.c;
    const Size features = job.features();
    float* by_norm_q = job.by_norm_q_at(x, b.first_row);
    for (Size y = b.first_set; y < b.last_set; ++y) {
        const Size n = job.query.count(y), first = job.query.first[y] - b.first_row;
        if (n == 0) continue;
        aggregate(c, w.cosine + first, n, w.weight);
        const float grad = c.grad_similarity[y * c.stride_y + x * c.stride_x];
        for (Size i = first; i < first + n; ++i) {
            const float norm_q = job.norm_q[b.first_row + i], norm_a = w.norm_a[i], length = norm_q * norm_a;
            const float by_dot = grad * w.weight[i - first] / larger_than_eps(length);
            const float by_length = length < EPS ? 0.f : -by_dot * w.cosine[i], by_norm_a = ratio(by_length * norm_q, norm_a);
            by_norm_q[i] = ratio(by_length * norm_a, norm_q);
            w.dot[i] = by_dot;
            const float* q = job.query.at(b.first_set) + i * job.query.stride;
            float* a = w.A + i * features;
            for (Size d = 0; d < features; d += VL) store(a + d, load(q + d) * by_dot + load(a + d) * by_norm_a);
        }
    }
}
// G: the gradients at S, from those at A
static void map_gradients(const Job& job, const Block& b, Size x, Workspace& w) {
    const StackedCrossAttention& c = job.c;
    const Size width = padded(job.context.count(x)), features = job.features();
    if (job.pairs) {
        round_tile(w.A, features, features, b.rows, 1.f, w.A_along, w.A_across);
        times_contexts(job, x, b.rows, w.A_along, features / 2, 0, job.depth(), w.G, width, w);
    } else times_contexts(job, x, b.rows, w.A, features, 0, c.D, w.G, width, w);
    for_maps(job, b, width, w, [&](Size n, Size at, const float* norms) {
        attend_backward((float)c.smooth, w.P + at, n, width, w.G + at);
        with_columns(c, [&](auto columns) { columns.gradients(w.S + at, w.N + at, norms, n, width, w.G + at); });
    });
}
// Columns [first, first + count) of the gradient of the contexts += map^T (m, rows) times rows, which are given (rows, count) and, for
// pairs, across
static void add_map_to_contexts(const Job& job, Size rows, Size m, const float* map, const float* other, Size stride,
                                const Pair* other_across, Size first, Size count, Workspace& w) {
    const Size width = padded(m), columns = job.columns();
    if (job.pairs) round_tile(map, width, width, rows, 1.f, nullptr, w.map_across);
    for (Size j = 0; j < m; j += MOST_CONTEXTS) {
        const Size some = least(MOST_CONTEXTS, m - j), depth = half(rows);
        float* grad = w.grad_context + j * columns + first;
        if (job.pairs) {
            transpose((const float*)(w.map_across + j), width, depth, some, (float*)w.map_transposed, depth);
            product<false>(some, count, depth, w.map_transposed, depth, other_across, count, grad, columns, true);
        } else product<true>(some, count, rows, map + j, width, other, stride, grad, columns, true);
    }
}
static void add_to_contexts(const Job& job, const Block& b, Size x, Workspace& w) {
    const Size m = job.context.count(x), features = job.features();
    if (job.pairs) pair_all_rows(job.query_along(b.first_row), features / 2, b.rows, features, w.query_across, features);
    add_map_to_contexts(job, b.rows, m, w.P, w.A, features, w.A_across, 0, features, w);
    const Size first = job.first_of_score();
    const float* query = job.query.at(b.first_set) + first;
    add_map_to_contexts(job, b.rows, m, w.G, query, job.query.stride, w.query_across, first, job.columns_of_score(), w);
}
static void store_for_queries(const Job& job, const Block& b, Size x, const Workspace& w) {
    const Size width = padded(job.context.count(x));
    float *weights = job.weights_at(job.context_weights, x, b.first_row, width),
          *of_scores = job.c.F ? job.weights_at(job.score_weights, x, b.first_row, width) : nullptr;
    for (Size i = 0; i < b.rows; ++i)
        for (Size j = i * width; j < (i + 1) * width; j += VL) {
            const Vector by_score = load(w.G + j), by_dot = load(w.P + j) * w.dot[i];
            store(weights + j, of_scores ? by_dot : by_score + by_dot);
            if (of_scores) store(of_scores + j, by_score);
        }
}
// After block_forward: adds to the gradient of the contexts, and stores what those of the queries need.
static void block_backward(const Job& job, const Block& b, Size x, Workspace& w) {
    cosine_gradients(job, b, x, w);
    map_gradients(job, b, x, w);
    add_to_contexts(job, b, x, w);
    store_for_queries(job, b, x, w);
}

// ---- what the threads do

// The similarities of the block with context set x; 0 where either set is empty
static void store_similarities(const Job& job, const Block& b, Size x, Workspace& w) {
    const StackedCrossAttention& c = job.c;
    for (Size y = b.first_set; y < b.last_set; ++y) {
        const Size n = job.query.count(y);
        const bool empty = job.context.count(x) == 0 || n == 0;
        const float* cosine = w.cosine + (job.query.first[y] - b.first_row);
        c.similarity[y * c.stride_y + x * c.stride_x] = empty ? 0.f : aggregate(c, cosine, n, w.weight);
    }
}
static void forward_task(Job& job, Size task) {
    Workspace& w = job.workspaces[task];
    for (Size item = job.take(); item < job.c.context.count * job.splits; item = job.take()) {
        const Size x = item / job.splits, part = item % job.splits;
        for (Size index = share(job.num_blocks, part, job.splits); index < share(job.num_blocks, part + 1, job.splits); ++index) {
            const Block b = block_at(job, index);
            if (job.context.count(x) > 0 && b.rows > 0) block_forward(job, b, x, w);
            store_similarities(job, b, x, w);
        }
    }
}

// The gradient of a set: `count` real rows, zeros behind them
static void store_gradient(const Job& job, const float* from, Size count, const Sets& sets, Size set, void* to) {
    const StackedCrossAttention& c = job.c;
    const Size row = (c.D + c.F) * bytes_of(c.dtype), rest = (sets.rows - count) * row;
    char* rows = (char*)to + set * sets.rows * row;
    for (Size i = 0; i < count; ++i) {
        narrow(from + i * job.columns(), c.D, c.dtype, rows + i * row);
        narrow(from + i * job.columns() + job.features(), c.F, c.dtype, rows + i * row + c.D * bytes_of(c.dtype));
    }
    if (rest > 0) memset(rows + count * row, 0, rest);  // an empty tensor has no pointer
}

static void contexts_task(Job& job, Size task) {
    Workspace& w = job.workspaces[task];
    for (Size item = job.take(); item < job.sets; item = job.take()) {
        const Size x = job.first + item, m = job.context.count(x);
        memset(w.grad_context, 0, m * job.columns() * sizeof(float));
        for (Size index = 0; m > 0 && index < job.num_blocks; ++index) {
            const Block b = block_at(job, index);
            if (b.rows == 0) continue;
            block_forward(job, b, x, w);
            block_backward(job, b, x, w);
        }
        store_gradient(job, w.grad_context, m, job.c.context, x, job.c.grad_context);
    }
}

// Rows [first, first + some) of the queries' gradients += those by way of context set x
static void add_to_queries(const Job& job, Size first, Size some, Size x, Workspace& w) {
    const Size m = job.context.count(x), width = padded(m), features = job.features(), columns = job.columns();
    const float *Q = job.query.data + first * job.query.stride, *by_norm_q = job.by_norm_q_at(x, first);
    float* grad = job.grad_query + first * columns;
    for (Size i = 0; i < some; ++i)
        for (Size d = 0; d < features; d += VL) {
            float* to = grad + i * columns + d;
            store(to, load(to) + load(Q + i * job.query.stride + d) * by_norm_q[i]);
        }
    const auto add = [&](float* of, Size at, Size count) {
        const float *weights = job.weights_at(of, x, first, width), *contexts = job.context.at(x) + at;
        product<false>(some, count, m, weights, width, contexts, job.context.stride, grad + at, columns, true);
    };
    if (!job.pairs) {
        add(job.context_weights, 0, features);
        if (job.c.F) add(job.score_weights, features, columns - features);
        return;
    }
    map_times_contexts(job, x, some, job.weights_at(job.context_weights, x, first, width), 1, w.A, w);
    for (Size n = 0; n < some * features; n += VL) store(grad + n, load(grad + n) + load(w.A + n));
}
static void queries_task(Job& job, Size task) {
    const Size columns = job.columns(), rows = job.rows();
    for (Size first = job.take() * BLOCK_ROWS; first < rows; first = job.take() * BLOCK_ROWS) {
        const Size some = least(BLOCK_ROWS, rows - first);
        if (job.first == 0) memset(job.grad_query + first * columns, 0, some * columns * sizeof(float));
        for (Size x = job.first; x < job.first + job.sets; ++x)
            if (job.context.count(x) > 0) add_to_queries(job, first, some, x, job.workspaces[task]);
    }
}
static void store_task(Job& job, Size) {
    for (Size y = job.take(); y < job.c.query.count; y = job.take()) {
        const float* from = job.grad_query + job.query.first[y] * job.columns();
        store_gradient(job, from, job.query.count(y), job.c.query, y, job.c.grad_query);
    }
}

// ---- before they start

// The task's share of the sets of a side, as float32 rows where they are copied, and as pairs. norms: those of the rows, or null
static void pack_side(const Job& job, Size task, const Sets& sets, const Rows32& rows, const PairedRows& pairs, float* norms) {
    const StackedCrossAttention& c = job.c;
    const Size features = job.features(), columns = job.columns(), tasks = job.threads;
    for (Size set = share(sets.count, task, tasks); set < share(sets.count, task + 1, tasks); ++set) {
        Pair* along = pairs.along + rows.first[set] * features / 2;
        for (Size i = 0; i < rows.count(set); ++i) {
            const void* from = element(sets.data, c.dtype, set * sets.stride_set + i * sets.stride_row);
            float* to = rows.copy + (rows.first[set] + i) * columns;
            const auto copy = [&](Size first, Size count, Size at, Size end) {  // with zeros up to `end`
                widen(element(from, c.dtype, first), c.dtype, count, to + at);
                memset(to + at + count, 0, (end - at - count) * sizeof(float));
            };
            if (rows.copy) copy(0, c.D, 0, features), copy(c.D, c.F, features, columns);
            const float* row = rows.at(set) + i * rows.stride;
            if (norms) norms[rows.first[set] + i] = sqrtf(inner(row, row, features));
            if (!job.pairs) continue;
            Pair* pair = along + i * features / 2;
            memset(pair + c.D / 2, 0, (features / 2 - c.D / 2) * sizeof(Pair));
            fill_pairs(from, c.D, pair);
        }
        if (pairs.across) pair_all_rows(along, features / 2, rows.count(set), features, job.context_across(set), features);
    }
}
static void pack_task(Job& job, Size task) {
    pack_side(job, task, job.c.query, job.query, job.query_pairs, job.norm_q);
    pack_side(job, task, job.c.context, job.context, job.context_pairs, nullptr);
}

// The real rows of a side: read where they lie, or in a copy. Query sets must lie one after the other, since several are taken at a
// time; each set of contexts may lie anywhere.
static void plan_rows(const StackedCrossAttention& c, const Sets& sets, bool are_queries, Memory& memory, Rows32& rows,
                      PairedRows& pairs) {
    rows.first = (Size*)memory.take(2 * (sets.count + 1));
    Size total = 0;
    for (Size set = 0; set < sets.count; ++set) {
        const Size count = sets.lengths ? sets.lengths[set] : sets.rows;
        if (!memory.counts()) rows.first[set] = total;
        total += count;
    }
    if (!memory.counts()) rows.first[sets.count] = total;
    const bool as_it_is = c.dtype == FLOAT32 && c.D % GROUP == 0 && c.F % GROUP == 0 &&
                          (!are_queries || (total == sets.count * sets.rows && sets.stride_set == sets.rows * sets.stride_row));
    const Size features = round_up(c.D, GROUP), columns = features + round_up(c.F, GROUP);
    const bool paired = takes_pairs(c), across = paired && !are_queries;
    pairs.along = paired ? (Pair*)memory.take((total + TILE_SIDE) * features / 2) : nullptr;  // see product_rows
    pairs.across = across ? (Pair*)memory.take((total + sets.count) / 2 * features) : nullptr;
    rows.copy = as_it_is || across ? nullptr : memory.take(total * columns);
    rows.data = as_it_is ? (const float*)sets.data : rows.copy;
    rows.stride = as_it_is ? sets.stride_row : columns, rows.stride_set = sets.stride_set;
}

// Blocks of query sets, and how many sets and rows a block has at most
static void list_blocks(Job& job) {
    const Size sets = job.c.query.count, most_rows = job.c.context.rows > MOST_CONTEXTS ? LONG_BLOCK_ROWS : BLOCK_ROWS;
    job.num_blocks = job.block_rows = job.block_sets = 0;
    for (Size y = 0; y < sets;) {
        const Size first = job.blocks[job.num_blocks++] = y;
        Size rows = job.query.count(y++);
        while (y < sets && rows + job.query.count(y) <= most_rows) rows += job.query.count(y++);
        job.block_rows = most(job.block_rows, rows), job.block_sets = most(job.block_sets, y - first);
    }
    job.blocks[job.num_blocks] = sets;
}

static void plan_workspace(const Job& job, bool backward, Memory& memory, Workspace& w) {
    const Size block_rows = job.block_rows,
               rows = job.pairs ? most(block_rows, BLOCK_ROWS) : block_rows;  // as add_to_queries has
    const Size map = rows * job.width(), features = job.features();
    w.set = w.start = -1;
    w.CT = memory.take((job.c.F ? job.columns() : job.c.D) * least(job.width(), MOST_CONTEXTS)),
    w.A = memory.take(rows * features);
    w.S = memory.take(map), w.N = memory.take(map), w.P = memory.take(map), w.G = backward ? memory.take(map) : nullptr;
    if (job.pairs) {
        w.map_along = (Pair*)memory.take(map / 2), w.map_across = (Pair*)memory.take(half(rows) * job.width());
        w.map_transposed = (Pair*)memory.take(half(rows) * least(job.width(), MOST_CONTEXTS));
        w.A_along = (Pair*)memory.take(rows * features / 2), w.A_across = (Pair*)memory.take(half(rows) * features);
        w.query_across = (Pair*)memory.take(half(rows) * features);
    }
    w.norms = memory.take(job.block_sets * job.width());
    w.grad_context = backward ? memory.take(job.c.context.rows * job.columns()) : nullptr;
    w.dot = memory.take(rows + GROUP), w.norm_a = memory.take(rows + GROUP);
    w.cosine = memory.take(rows + GROUP), w.weight = memory.take(rows + GROUP);
}

static bool prepare(Job& job, Memory& lists, Memory& memory, bool backward) {
    const StackedCrossAttention& c = job.c;
    const Size threads = job.threads;
    const bool listed = lists.place([&] {
        plan_rows(c, c.query, true, lists, job.query, job.query_pairs);
        plan_rows(c, c.context, false, lists, job.context, job.context_pairs);
        job.blocks = (Size*)lists.take(2 * (c.query.count + 1));
    });
    if (!listed) return false;
    list_blocks(job);
    const Size of_a_set = job.rows() * job.width() + 1;
    job.sets = backward ? least(c.context.count, most(2 * threads, MOST_STORED / of_a_set)) : 0;
    job.splits = most(1, least(job.num_blocks, 4 * threads / most(c.context.count, 1)));
    const bool placed = memory.place([&] {
        job.norm_q = memory.take(job.rows());
        job.context_weights = memory.take(job.sets * job.rows() * job.width());
        job.score_weights = c.F ? memory.take(job.sets * job.rows() * job.width()) : nullptr;
        job.by_norm_q = memory.take(job.sets * job.rows());
        job.grad_query = backward ? memory.take(job.rows() * job.columns()) : nullptr;
        job.workspaces = memory.take_spaces<Workspace>(threads, [&](Workspace& w) { plan_workspace(job, backward, memory, w); });
    });
    if (placed) run(threads, job, pack_task);
    return placed;
}

static Size stacked_cross_attention_forward(const StackedCrossAttention& c) {
    Job job(c);
    Memory lists, memory;
    if (!prepare(job, lists, memory, false)) return NO_MEMORY;
    run_queue(job.threads, job, forward_task);
    return DONE;
}
static Size stacked_cross_attention_backward(const StackedCrossAttention& c) {
    Job job(c);
    Memory lists, memory;
    if (!prepare(job, lists, memory, true)) return NO_MEMORY;
    take_large_pages(c.grad_query, c.query.count * c.query.rows * (c.D + c.F) * bytes_of(c.dtype));
    take_large_pages(c.grad_context, c.context.count * c.context.rows * (c.D + c.F) * bytes_of(c.dtype));
    for (const Size step = job.sets;; job.first += step) {  // once without context sets: the queries' gradients are zeros
        job.sets = least(step, c.context.count - job.first);
        run_queue(job.threads, job, contexts_task);
        run_queue(job.threads, job, queries_task);
        if (job.first + job.sets >= c.context.count) break;
    }
    run_queue(job.threads, job, store_task);
    return DONE;
}

}  // namespace
}  // namespace ISA

OPERATOR(stacked_cross_attention_forward, StackedCrossAttention)
OPERATOR(stacked_cross_attention_backward, StackedCrossAttention)
