// maxsim: for every query a and document b the sum over query tokens i of the largest product with a token j of the document
// (late interaction: ColBERT, ColPali), and gradients.
//
//     S_ij = q_i . d_j                                              [product]
//     place_i = the first j with the largest S_ij                   [keep_largest]
//     similarity_ab = sum_i S_i,place_i                             [store_sums]
// Back: d q_i = sum_b g_ab d_place_i;  d d_j = sum over a and i with place_i = j of g_ab q_i.
//
// Bound: multiply-adds, one product over features a pair of tokens. Tricks: a lane is a query token, so that a maximum over the
// document's tokens needs no sum over lanes; short queries share the lanes of a group. The products of a block of document tokens
// with a group stay in the first cache. The backward pass reads one token a pair of query token and document: no product at all.
// A document belongs to one thread or to several that have other queries: no sum depends on the threads. Products of bfloat16 tokens are
// those of pairs by tiles (pairs.h), where there are any.
// Measured: rows maxsim of benchmarks/results/cpu.json.
#include "pairs.h"

namespace ISA {
namespace {

static const Size BLOCK_TOKENS = 64;  // of a document at a time
static const Size LANES_OF_A_PRODUCT = 64;

// The real tokens of a side are those with a mask of 1.
struct Tokens {
    const void* data;  // (sets, tokens, D), last stride 1
    Size count, tokens, stride_set, stride_token;
    const uint8_t* mask;  // (sets, tokens); null for all
    FIELDS(data, count, tokens, stride_set, stride_token, mask)
    bool real(Size set, Size i) const { return !mask || mask[set * tokens + i]; }
    void widened(Size dtype, Size D, Size set, Size i, float* to) const {
        widen(element(data, dtype, set * stride_set + i * stride_token), dtype, D, to);
    }
};

struct Maxsim {
    Size dtype, D;
    Tokens query, document;
    float* similarity;  // (A, B)
    int32_t* places;  // (A, B, N), -1 for none; forward: null where nobody needs them
    const float* grad_similarity;  // backward (A, B)
    void *grad_query, *grad_document;  // (A, N, D), (B, M, D)
    FIELDS(dtype, D, query, document, similarity, places, grad_similarity, grad_query, grad_document)
    bool takes_pairs() const { return tiles_pay(dtype, D); }
    Size depth() const { return takes_pairs() ? half(D) : D; }  // of a product
    // A token's row as products take it: numbers, or pairs
    void load_row(const Tokens& x, Size set, Size i, float* to) const {
        if (takes_pairs()) fill_pairs(element(x.data, dtype, set * x.stride_set + i * x.stride_token), D, (Pair*)to);
        else x.widened(dtype, D, set, i, to);
    }
    int32_t* places_at(Size a, Size b) const { return places + (a * document.count + b) * query.tokens; }
    Size stride() const { return round_up(D, VL); }
};

// ---- forward

// Queries in groups whose tokens are lanes one after the other
struct Groups {
    Size queries, width, count;  // of a group: queries, lanes; groups
    explicit Groups(const Tokens& query) {
        queries = most(1, LANES_OF_A_PRODUCT / most(1, query.tokens));
        width = round_up(queries * query.tokens, GROUP);
        count = (query.count + queries - 1) / queries;
    }
};

struct MaxsimForward : Queue {
    const Maxsim& c;
    Groups groups;
    Size parts;  // of the groups, which threads take side by side
    float* packed;  // (groups, depth, width)
    explicit MaxsimForward(const Maxsim& c) : c(c), groups(c.query) {
        const Size tasks = 4 * thread_count();
        parts = most(1, least(groups.count, tasks / most(1, c.document.count)));
    }
    Size groups_of_a_part() const { return (groups.count + parts - 1) / parts; }
};

struct DocumentSpace {
    float *rows, *S;  // (BLOCK_TOKENS, stride), (BLOCK_TOKENS, LANES_OF_A_PRODUCT)
    float* largest;  // (groups of a part, width)
    int32_t *places, *index;  // as `largest`; of the block's rows in the document
    void plan(const MaxsimForward& job, Memory& memory) {
        const Size lanes = job.groups_of_a_part() * job.groups.width;
        rows = memory.take(BLOCK_TOKENS * job.c.stride()), S = memory.take(BLOCK_TOKENS * LANES_OF_A_PRODUCT);
        largest = memory.take(lanes), places = (int32_t*)memory.take(lanes), index = (int32_t*)memory.take(BLOCK_TOKENS);
    }
};

struct PackingSpace {
    float* rows;  // (width, stride)
    void plan(const MaxsimForward& job, Memory& memory) { rows = memory.take(job.groups.width * job.c.stride()); }
};
static void pack_groups(MaxsimForward& job, PackingSpace& space, Size) {
    const Maxsim& c = job.c;
    const Size width = job.groups.width, stride = c.stride();
    for (Size group = job.take(); group < job.groups.count; group = job.take()) {
        memset(space.rows, 0, width * stride * sizeof(float));
        for (Size n = 0; n < job.groups.queries * c.query.tokens; ++n) {
            const Size a = group * job.groups.queries + n / c.query.tokens, i = n % c.query.tokens;
            if (a < c.query.count && c.query.real(a, i)) c.load_row(c.query, a, i, space.rows + n * stride);
        }
        transpose(space.rows, stride, width, c.depth(), job.packed + group * c.depth() * width, width);
    }
}

// Takes up the products S (count, LANES_OF_A_PRODUCT) of `lanes` query tokens with the document tokens `index`. NaN stays.
static void keep_largest(const float* S, Size count, Size lanes, const int32_t* index, float* largest, int32_t* places) {
    for (Size i = 0; i < lanes; i += VL) {
        Vector top = load(largest + i);
        Integers place;
        memcpy(&place, places + i, sizeof place);
        for (Size n = 0; n < count; ++n) {
            const Vector s = load(S + n * LANES_OF_A_PRODUCT + i);
            const Integers takes = (s > top) | ((s != s) & (top == top));
            top = takes ? s : top;
            place = takes ? Integers{} + index[n] : place;
        }
        store(largest + i, top);
        memcpy(places + i, &place, sizeof place);
    }
}

static void store_sums(const Maxsim& c, Size a, Size b, bool empty, const float* largest, const int32_t* places) {
    double total = 0;
    for (Size i = 0; i < c.query.tokens; ++i) {
        const bool counts = !empty && c.query.real(a, i);
        if (counts) total += largest[i];
        if (c.places) c.places_at(a, b)[i] = counts ? places[i] : -1;
    }
    c.similarity[a * c.document.count + b] = (float)total;
}

// The next `BLOCK_TOKENS` real tokens of document b from token j on; returns how many, and moves j behind them.
static Size load_tokens(const Maxsim& c, Size b, Size& j, const DocumentSpace& space) {
    Size count = 0;
    for (; j < c.document.tokens && count < BLOCK_TOKENS; ++j)
        if (c.document.real(b, j)) {
            c.load_row(c.document, b, j, space.rows + count * c.stride());
            space.index[count++] = (int32_t)j;
        }
    return count;
}

static void forward_documents(MaxsimForward& job, DocumentSpace& space, Size) {
    const Maxsim& c = job.c;
    const Groups& groups = job.groups;
    const Size width = groups.width;
    for (Size item = job.take(); item < c.document.count * job.parts; item = job.take()) {
        const Size b = item / job.parts, part = item % job.parts;
        const Size first = share(groups.count, part, job.parts), some = share(groups.count, part + 1, job.parts) - first;
        bool empty = true;
        for (Size j = 0, count; (count = load_tokens(c, b, j, space)) > 0; empty = false) {
            for (Size n = 0; empty && n < some * width; ++n) space.largest[n] = -INFINITY, space.places[n] = space.index[0];
            for (Size group = 0; group < some; ++group)
                for (Size i = 0; i < width; i += LANES_OF_A_PRODUCT) {
                    const Size lanes = least(LANES_OF_A_PRODUCT, width - i), at = group * width + i;
                    const float* packed = job.packed + (first + group) * c.depth() * width + i;
                    const auto multiply = [&](const auto* rows, const auto* queries) {
                        product<false>(
                            count, lanes, c.depth(), rows, c.stride(), queries, width, space.S, LANES_OF_A_PRODUCT, false);
                    };
                    if (c.takes_pairs()) multiply((const Pair*)space.rows, (const Pair*)packed);
                    else multiply(space.rows, packed);
                    keep_largest(space.S, count, lanes, space.index, space.largest + at, space.places + at);
                }
        }
        for (Size a = first * groups.queries; a < least(c.query.count, (first + some) * groups.queries); ++a) {
            const Size at = (a / groups.queries - first) * width + a % groups.queries * c.query.tokens;
            store_sums(c, a, b, empty, space.largest + at, space.places + at);
        }
    }
}

static Size maxsim_forward(const Maxsim& c) {
    MaxsimForward job(c);
    Memory memory;
    if (!memory.place([&] { job.packed = memory.take(job.groups.count * c.depth() * job.groups.width); })) return NO_MEMORY;
    const Size threads = thread_count();
    if (run_with_space<PackingSpace>(threads, job, pack_groups) != DONE) return NO_MEMORY;
    job.next = 0;
    return run_with_space<DocumentSpace>(threads, job, forward_documents);
}

// ---- backward

struct MaxsimBackward : Queue {
    const Maxsim& c;
    explicit MaxsimBackward(const Maxsim& c) : c(c) {}
};
struct GradientSpace {
    float *grad, *row;  // (tokens, stride) of a query or document; (stride)
    void plan(const MaxsimBackward& job, Memory& memory) {
        const Size stride = job.c.stride();
        grad = memory.take(most(job.c.query.tokens, job.c.document.tokens) * stride), row = memory.take(stride);
    }
};
static void add_row(float weight, const float* row, Size stride, float* to) {
    for (Size d = 0; d < stride; d += VL) store(to + d, load(to + d) + load(row + d) * weight);
}
static void store_gradient(const Maxsim& c, const float* grad, Size tokens, void* to, Size set) {
    for (Size i = 0; i < tokens; ++i)
        narrow(grad + i * c.stride(), c.D, c.dtype, (char*)to + (set * tokens + i) * c.D * bytes_of(c.dtype));
}
// add(i, j, weight) for each token i of query a that counts and its token j of document b
template <class F> INLINE void for_chosen(const Maxsim& c, Size a, Size b, const F& add) {
    const int32_t* places = c.places_at(a, b);
    for (Size i = 0; i < c.query.tokens; ++i)
        if (places[i] >= 0) add(i, places[i], c.grad_similarity[a * c.document.count + b]);
}
// The gradient of each set of a side, to which all sets of the other side add: add(set, other set) in their order
template <class F>
static void side_gradients(MaxsimBackward& job, const GradientSpace& space, const Tokens& side, Size others, void* to,
                           const F& add) {
    const Maxsim& c = job.c;
    memset(space.row, 0, c.stride() * sizeof(float));
    for (Size set = job.take(); set < side.count; set = job.take()) {
        memset(space.grad, 0, side.tokens * c.stride() * sizeof(float));
        for (Size other = 0; other < others; ++other) add(set, other);
        store_gradient(c, space.grad, side.tokens, to, set);
    }
}
static void query_gradients(MaxsimBackward& job, GradientSpace& space, Size) {
    const Maxsim& c = job.c;
    side_gradients(job, space, c.query, c.document.count, c.grad_query, [&](Size a, Size b) {
        for_chosen(c, a, b, [&](Size i, Size j, float weight) {
            c.document.widened(c.dtype, c.D, b, j, space.row);
            add_row(weight, space.row, c.stride(), space.grad + i * c.stride());
        });
    });
}
static void document_gradients(MaxsimBackward& job, GradientSpace& space, Size) {
    const Maxsim& c = job.c;
    side_gradients(job, space, c.document, c.query.count, c.grad_document, [&](Size b, Size a) {
        for_chosen(c, a, b, [&](Size i, Size j, float weight) {
            c.query.widened(c.dtype, c.D, a, i, space.row);
            add_row(weight, space.row, c.stride(), space.grad + j * c.stride());
        });
    });
}
static Size maxsim_backward(const Maxsim& c) {
    MaxsimBackward job(c);
    const Size threads = thread_count();
    if (run_with_space<GradientSpace>(threads, job, query_gradients) != DONE) return NO_MEMORY;
    job.next = 0;
    return run_with_space<GradientSpace>(threads, job, document_gradients);
}

}  // namespace
}  // namespace ISA
OPERATOR(maxsim_forward, Maxsim)
OPERATOR(maxsim_backward, Maxsim)
