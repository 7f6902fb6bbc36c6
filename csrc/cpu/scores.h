// The core scores of vlattn_fast/_ground/score_kinds.py on tiles: logits of a block of keys by query rows, and the way back.
//
// Dot products x = q . k are tile products and, for some, an activation: S = act(x) scale, or the cosine, S = x scale over
// max(|q| |k|, eps). Other scores are sums over hidden units,
//     S = scale sum_a u_a f(z_a),   z = q + k (additive) or q k (Hadamard)
//     f(z) = 1 - c r,   r = 1 / (1 + e^(cz)):   c = 2 is tanh, c = 1 the sigmoid
//     f'(z) = c^2 (1 - r) r,   1 - r = e^(cz) r
// Four units share one division: with d = 1 + e^(cz) of each,
//     sum_a u_a r_a = ((u_0 d_1 + u_1 d_0) d_2 d_3 + (u_2 d_3 + u_3 d_2) d_0 d_1) / (d_0 d_1 d_2 d_3)
// Here a vector holds keys, not query rows: so the gradient of a query row is summed over the keys in registers.
#pragma once
#include "attention.h"

namespace ISA {
namespace {

// The kinds by their names in Python, which asks for them (SCORE_KINDS): activations of the product, each a struct below, and sums
// over hidden units. A new kind is one more entry.
#define ACTIVATIONS(KIND)                             \
    KIND(DOT_RELU, "dot_relu", Relu)                  \
    KIND(DOT_LEAKY_RELU, "dot_leaky_relu", LeakyRelu) \
    KIND(DOT_TANH, "dot_tanh", Tanh)                  \
    KIND(DOT_SIGMOID, "dot_sigmoid", Sigmoid)         \
    KIND(DOT_SOFTCAP, "dot_softcap", Softcap)
#define UNIT_SUMS(KIND)                    \
    KIND(ADDITIVE, "additive", )           \
    KIND(HADAMARD_TANH, "hadamard_tanh", ) \
    KIND(HADAMARD_SIGMOID, "hadamard_sigmoid", )

#define NUMBER(kind, name, type) kind,
enum ScoreKind : Size { DOT, ACTIVATIONS(NUMBER) COSINE, UNIT_SUMS(NUMBER) };
#undef NUMBER

// A line for each kind, in the order of their numbers: its name, and whether it takes a vector.
#define LINE(kind, name, type) name "\n"
#define LINE_OF_UNITS(kind, name, type) name " vector\n"
constexpr char SCORE_KINDS[] = "dot\n" ACTIVATIONS(LINE) "cosine\n" UNIT_SUMS(LINE_OF_UNITS);
#undef LINE
#undef LINE_OF_UNITS

struct Score {
    Size kind;
    double parameter;  // the slope of leaky relu, the eps of cosine, the factor of the product within the tanh of a softcap
    const float* vector;  // (H, D) of the hidden units
    FIELDS(kind, parameter, vector)
    bool is_product() const { return kind < COSINE; }
    bool sums_units() const { return kind > COSINE; }
    bool bends() const { return kind != DOT; }  // the gradient needs more than P and dP
};

// ---- activations of dot products

// act(x) = value(saved(x)), where `saved` is what the way back reads: x itself, or tanh and sigmoid, which give their own slopes.
// `gradient`: g times the slope times `scale`. p is the score's parameter.
struct Relu {
    static METHOD Vector saved(Vector x, Vector) { return x; }
    static METHOD Vector value(Vector x, Vector) { return maximum(Vector{}, x); }
    static METHOD Vector gradient(Vector g, Vector x, Vector, Vector scale) {  // Inf and NaN times a slope of 0 would be NaN
        return x > Vector{} ? g * scale : Vector{};
    }
};
struct LeakyRelu {
    static METHOD Vector saved(Vector x, Vector) { return x; }
    static METHOD Vector value(Vector x, Vector p) { return x >= Vector{} ? x : x * p; }
    static METHOD Vector gradient(Vector g, Vector x, Vector p, Vector scale) {
        const Vector slope = x > Vector{} ? splat(1.f) : p;
        return g * slope * scale;
    }
};
struct Tanh {
    static METHOD Vector saved(Vector x, Vector) { return tanh_all(x); }
    static METHOD Vector value(Vector y, Vector) { return y; }
    static METHOD Vector gradient(Vector g, Vector y, Vector, Vector scale) { return g * (1.f - y * y) * scale; }
};
struct Sigmoid {
    static METHOD Vector saved(Vector x, Vector) { return sigmoid(x); }
    static METHOD Vector value(Vector y, Vector) { return y; }
    static METHOD Vector gradient(Vector g, Vector y, Vector, Vector scale) { return g * (y - y * y) * scale; }
};
struct Softcap {
    static METHOD Vector saved(Vector x, Vector p) { return tanh_all(x * p); }
    static METHOD Vector value(Vector y, Vector) { return y; }
    static METHOD Vector gradient(Vector g, Vector y, Vector p, Vector scale) { return g * ((1.f - y * y) * p) * scale; }
};
template <class F> static void with_activation(Size kind, const F& f) {
    switch (kind) {
#define CASE(kind, name, Type) \
    case kind: return f(Type());
        ACTIVATIONS(CASE)
#undef CASE
    }
}

// S = act(S) * scale; `saved` (n) is for `bend`, or null.
static void activate(const Score& score, float scale, float* S, Size n, float* saved) {
    const Vector factor = splat(scale), parameter = splat((float)score.parameter);
    with_activation(score.kind, [&](auto act) {
        for (Size i = 0; i < n; i += VL) {
            const Vector x = act.saved(load(S + i), parameter);
            if (saved) store(saved + i, x);
            store(S + i, act.value(x, parameter) * factor);
        }
    });
}
// The gradient of the raw product from that of the logits
static void bend(const Score& score, float scale, float* G, Size n, const float* saved) {
    const Vector factor = splat(scale), parameter = splat((float)score.parameter);
    with_activation(score.kind, [&](auto act) {
        for (Size i = 0; i < n; i += VL) store(G + i, act.gradient(load(G + i), load(saved + i), parameter, factor));
    });
}

// ---- cosine: q . k / max(|q| |k|, eps)

static float norm(const float* x, Size n) {  // by the largest entry, so that no square overflows or vanishes
    float top = 0;
    for (Size i = 0; i < n; ++i) top = top > fabsf(x[i]) ? top : fabsf(x[i]);
    if (!(top > 0) || top == INFINITY) return top;
    float total = 0;
    for (Size i = 0; i < n; ++i) total += (x[i] / top) * (x[i] / top);
    return top * sqrtf(total);
}
// S = S / max(|q| |k|, eps) * scale; `saved` gets the cosine, or is null
static void divide_by_norms(const Score& score, float scale, float* S, Size count, Size w, const float* query_norm,
                            const float* key_norm, float* saved) {
    const Vector eps = splat((float)score.parameter), factor = splat(scale);
    for (Size j = 0; j < count; ++j)
        for (Size i = 0; i < w; i += VL) {
            const Vector x = load(S + j * w + i) / maximum(eps, load(query_norm + i) * splat(key_norm[j]));
            if (saved) store(saved + j * w + i, x);
            store(S + j * w + i, x * factor);
        }
}
// The gradient of the product q . k from that of the logits. Where the clamp does not act the norms have gradients, too: sums of
// gradient times cosine are added to by_query (width) and, over the tile's rows, to by_key (count).
static void cosine_gradient(const Score& score, float scale, float* G, Size count, const Tile& t, const float* query_norm,
                            const float* key_norm, const float* saved, float* by_query, float* by_key) {
    const Size w = t.width;
    const Vector eps = splat((float)score.parameter), factor = splat(scale);
    for (Size j = 0; j < count; ++j) {
        Vector by = Vector{};
        for (Size i = 0; i < w; i += VL) {
            const Vector norms = load(query_norm + i) * splat(key_norm[j]), g = load(G + j * w + i) * factor;
            const Vector x = norms >= eps ? g * load(saved + j * w + i) : Vector{};
            by += first_lanes(x, t.rows - i);
            store(by_query + i, load(by_query + i) + x);
            store(G + j * w + i, g / maximum(eps, norms));
        }
        by_key[j] += sum(by);
    }
}

// ---- sums over hidden units

// How four units get f: from e^(cz) = e^(cq) e^(ck), as it is or clamped; from e^(cz) for z = q + k or z = q k, which may be
// LARGE; or, where z is small and 1 - c r would lose its digits, from the polynomial of tanh
enum Policy : uint8_t { FACTORED, CLAMPED, SUM, PRODUCT, LARGE_PRODUCT, SMALL_SUM, SMALL_PRODUCT };
static const float LARGEST_FACTOR = 2147483648.f;  // 2^31: four such factors are finite, and f(z) rounds to 1 beyond
static const float LARGEST_EXPONENT = 21.4f;  // its logarithm
static const float LARGEST_HALF = 86.f;  // e^(cq) and e^(ck) are finite up to it
static const float LARGEST_PRODUCT = 80.f;  // |cq ck| up to it needs no clamp
static const float LARGEST_SMALL = 0.5f;

INLINE constexpr bool is_product(int policy) { return policy == PRODUCT || policy == LARGE_PRODUCT || policy == SMALL_PRODUCT; }
INLINE constexpr bool is_small(int policy) { return policy == SMALL_SUM || policy == SMALL_PRODUCT; }

// Calls f with the policy as a constant
template <class F> static void with_policy(Policy policy, const F& f) {
    switch (policy) {
        case FACTORED: return f(Constant<FACTORED>());
        case CLAMPED: return f(Constant<CLAMPED>());
        case SUM: return f(Constant<SUM>());
        case PRODUCT: return f(Constant<PRODUCT>());
        case LARGE_PRODUCT: return f(Constant<LARGE_PRODUCT>());
        case SMALL_SUM: return f(Constant<SMALL_SUM>());
        case SMALL_PRODUCT: return f(Constant<SMALL_PRODUCT>());
    }
}

// e^(cz); q is e^(cq) for FACTORED and CLAMPED, as k is e^(ck), and q c log2 e for PRODUCT
template <int POLICY> INLINE Vector exponential(float q, Vector k, float c) {
    if (POLICY == FACTORED) return splat(q) * k;
    if (POLICY == CLAMPED) return minimum(splat(LARGEST_FACTOR), splat(q) * k);
    if (POLICY == PRODUCT) return minimum(splat(LARGEST_FACTOR), exp2_product(splat(q), k));
    const Vector z = is_product(POLICY) ? k * splat(q) : k + splat(q);
    return exp_bounded(maximum(splat(-80.f), minimum(splat(LARGEST_EXPONENT), z * c)));
}
// tanh z to 1 ulp for |z| <= 0.625 (Cephes' tanhf)
template <int POLICY> INLINE Vector small_tanh(float q, Vector k) {
    const Vector z = is_product(POLICY) ? k * splat(q) : k + splat(q), square = z * z;
    Vector p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    return p * square * z + z;
}

struct Units {
    Size count;  // hidden units, a multiple of 4: the rest has weight 0
    float c;  // of f
    const float* weight;
};

// total += sum of u f(z) over four units, where z is small
template <int POLICY> INLINE void add_small_units(Vector& total, const float* w, const float* q, const float* k, Size ld) {
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) total += splat(w[m]) * small_tanh<POLICY>(q[m], load(k + m * ld));
}
// total += sum of u r over four units, with one division
template <int POLICY>
INLINE void add_reciprocals(Vector& total, const float* w, const float* q, const float* k, Size ld, float c) {
    Vector d[4];  // 1 / r
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) d[m] = exponential<POLICY>(q[m], load(k + m * ld), c) + 1.f;
    const Vector n01 = splat(w[0]) * d[1] + splat(w[1]) * d[0], n23 = splat(w[2]) * d[3] + splat(w[3]) * d[2];
    const Vector d01 = d[0] * d[1], d23 = d[2] * d[3];
    total += (n01 * d23 + n23 * d01) / (d01 * d23);
}
// S (rows, keys) (+)= sum_a u_a f(z_a) over the units [first, last): q (rows, count), k (count, ld)
template <int POLICY, int VECTORS>
INLINE void unit_scores_block(const Units& u, Size first, Size last, Size rows, const float* Q, const float* K, Size ld, bool add,
                              float* S) {
    float weights = 0;
    for (Size a = first; a < last; ++a) weights += u.weight[a];
    for (Size i = 0; i < rows; ++i) {
        Vector total[VECTORS];
        for (int n = 0; n < VECTORS; ++n) total[n] = Vector{};
        const float* q = Q + i * u.count;
        for (Size a = first; a < last; a += 4) {
            const float *k = K + a * ld, *w = u.weight + a;
#pragma GCC unroll 4
            for (int n = 0; n < VECTORS; ++n) {
                if constexpr (is_small(POLICY)) add_small_units<POLICY>(total[n], w, q + a, k + n * VL, ld);
                else add_reciprocals<POLICY>(total[n], w, q + a, k + n * VL, ld, u.c);
            }
        }
        for (int n = 0; n < VECTORS; ++n) {
            float* to = S + i * ld + n * VL;
            const Vector x = is_small(POLICY) ? total[n] : weights - u.c * total[n];
            store(to, add ? load(to) + x : x);
        }
    }
}
template <int POLICY>
static void unit_scores(const Units& u, Size first, Size last, Size rows, const float* Q, const float* K, Size ld, bool add,
                        float* S) {
    Size j = 0;
    for (; j + 2 * VL <= ld; j += 2 * VL) unit_scores_block<POLICY, 2>(u, first, last, rows, Q, K + j, ld, add, S + j);
    for (; j < ld; j += VL) unit_scores_block<POLICY, 1>(u, first, last, rows, Q, K + j, ld, add, S + j);
}

static const int UNIT_ROWS = VL == 16 ? 2 : 1;  // query rows at a time in the backward pass, as the registers allow

// f(z) and f'(z) / c^2 of four units
template <int POLICY>
INLINE void values_and_slopes(const float* q, const Vector (&k)[4], float c, Vector (&f)[4], Vector (&slope)[4]) {
    if constexpr (is_small(POLICY)) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) f[n] = small_tanh<POLICY>(q[n], k[n]), slope[n] = (1.f - f[n] * f[n]) * 0.25f;  // c is 2
        return;
    }
    Vector e[4], d[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) e[n] = exponential<POLICY>(q[n], k[n], c), d[n] = e[n] + 1.f;
    const Vector d01 = d[0] * d[1], d23 = d[2] * d[3], all = 1.f / (d01 * d23), r01 = all * d23, r23 = all * d01;
    const Vector r[4] = {r01 * d[1], r01 * d[0], r23 * d[3], r23 * d[2]};
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
        // 1 - r = e r: both ends keep their digits, and with c = 2 so does f = (1 - r) - r
        const Vector rest = e[n] * r[n];
        f[n] = rest - (c - 1.f) * r[n], slope[n] = rest * r[n];
    }
}
// From G (rows, ld), the gradient of the scores, over four units from a: by_query (rows, count) gets G f'(z), times k for
// z = q k; by_key (count, ld) gets G f'(z) / c^2, times q (`rows_at`) for z = q k; by_weight (count) gets the sum of G f. `Q` is
// what `exponential` takes.
template <int POLICY, int ROWS>
INLINE void unit_gradient_rows(const Units& u, Size a, const float* Q, const float* rows_at, Size stride, const float* K, Size ld,
                               const float* G, float* by_query, float* by_key, Vector* by_weight, Size first, Size last) {
    Vector by_q[ROWS][4], by_w[4] = {};
    for (int i = 0; i < ROWS; ++i)
        for (int n = 0; n < 4; ++n) by_q[i][n] = Vector{};
    for (Size j = first; j < last; j += VL) {
        Vector k[4], by_k[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) k[n] = load(K + (a + n) * ld + j), by_k[n] = load(by_key + (a + n) * ld + j);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            const float* q = Q + i * u.count + a;
            const Vector g = load(G + i * ld + j);
            Vector f[4], slope[4];
            values_and_slopes<POLICY>(q, k, u.c, f, slope);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) {
                const Vector x = g * slope[n];
                by_w[n] += g * f[n];
                by_q[i][n] += is_product(POLICY) ? x * k[n] : x;
                by_k[n] += is_product(POLICY) ? x * splat(rows_at[i * stride + a + n]) : x;
            }
        }
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) store(by_key + (a + n) * ld + j, by_k[n]);
    }
    for (int n = 0; n < 4; ++n) by_weight[n] += by_w[n];
    for (int i = 0; i < ROWS; ++i)
        for (int n = 0; n < 4; ++n) by_query[i * u.count + a + n] += sum(by_q[i][n]) * (u.c * u.c);
}
template <int POLICY>
static void unit_gradient(const Units& u, Size a, Size rows, const float* Q, const float* rows_at, Size stride, const float* K,
                          Size ld, const float* G, float* by_query, float* by_key, float* by_weight) {
    for (Size first = 0; first < ld; first += 512) {
        Vector by_w[4] = {};
        const auto take = [&](auto at_once, Size i) {
            unit_gradient_rows<POLICY, decltype(at_once)::value>(u, a, Q + i * u.count, rows_at + i * stride, stride, K, ld,
                                                                 G + i * ld, by_query + i * u.count, by_key, by_w, first,
                                                                 least(first + 512, ld));
        };
        Size i = 0;
        for (; i + UNIT_ROWS <= rows; i += UNIT_ROWS) take(Constant<UNIT_ROWS>{}, i);
        for (; i < rows; ++i) take(Constant<1>{}, i);
        for (int n = 0; n < 4; ++n) by_weight[a + n] += sum(by_w[n]);
    }
}

// One thread's hidden units: of a block of keys, and of a tile of query rows
struct UnitTile {
    Units units;
    Size ld;  // keys of the block, rounded up to VL
    float* weight;  // (count)
    float* key;  // (count, ld): k, later e^(ck)
    float *by_key, *by_key_tile;  // (count, ld): the gradient of the tiles so far, and that of one tile: a sum of short sums
    float *key_largest, *key_least;  // (count) of k
    float *query_largest, *query_least;  // of q, up to VL more
    float* query;  // (LANES, count): what `exponential` takes
    const float* rows;  // (LANES, stride): q
    Size stride, count_rows;  // the tile's rows
    float *by_query, *by_weight;
    float* scores;  // (LANES, ld): logits or their gradient, row by row
    Policy* policies;  // (count / 4): of the tile, by four units
    uint8_t* exponentials;  // (count / 4): `key` holds e^(ck)

    static Size padded(Size units) { return round_up(units, 4); }
    void plan(const Attention& a, Memory& memory, bool backward) {
        const Size n = padded(a.D), wide = round_up(a.key_block(), VL);
        policies = (Policy*)memory.take(n), exponentials = (uint8_t*)memory.take(n);
        weight = memory.take(n), key_largest = memory.take(n), key_least = memory.take(n);
        query_largest = memory.take(n + VL), query_least = memory.take(n + VL);
        key = memory.take(n * wide), query = memory.take(LANES * n), scores = memory.take(LANES * wide);
        by_key = backward ? memory.take(n * wide) : nullptr, by_key_tile = backward ? memory.take(n * wide) : nullptr;
        by_query = backward ? memory.take(LANES * n) : nullptr;
        by_weight = backward ? memory.take(n) : nullptr;
    }
    void load_head(const Score& score, const Attention& a, Size head) {
        const float factor = score.kind == HADAMARD_SIGMOID ? 1.f : 2.f;
        for (Size n = 0; n < padded(a.D); ++n) weight[n] = n < a.D ? score.vector[head * a.D + n] : 0.f;
        units = {padded(a.D), factor, weight};
    }
    void load_keys(const Attention& a, const Keys& keys, Size count) {
        ld = round_up(count, VL);
        memset(exponentials, 0, units.count / 4);
        load_units(a, keys, count, 0, units.count);
        for (Size n = 0; n < units.count; ++n) {
            Vector top = splat(-INFINITY), least = splat(INFINITY);
            for (Size j = 0; j < ld; j += VL) widen(load(key + n * ld + j), top, least);
            key_largest[n] = largest(top), key_least[n] = -largest(-least);
        }
    }
    // `key` for the units [first, first + some). Behind the keys the last one is repeated: 0 times a query of Inf would be NaN.
    void load_units(const Attention& a, const Keys& keys, Size count, Size first, Size some) {
        memset(key + first * ld, 0, some * ld * sizeof(float));
        transpose(keys.rows + first, keys.stride, count, least(some, a.D - first), key + first * ld, ld);
        for (Size n = first; n < first + some; ++n)
            for (Size j = count; j < ld; ++j) key[n * ld + j] = key[n * ld + count - 1];
    }
    static void widen(Vector x, Vector& top, Vector& least) {  // by nothing for NaN
        top = maximum(x, top), least = minimum(x, least);
    }
    // After load_keys: takes the tile's `real` rows (rows, stride), as load_tile gives them. Each four units of the tile get a policy,
    // which the keys follow: e^(ck) is made once, and k is fetched again where a later tile wants it.
    void load_rows(const Score& score, const Attention& a, const float* rows_at, Size row_stride, Size real, const Keys& keys,
                   Size count) {
        rows = rows_at, stride = row_stride, count_rows = real;
        bound_queries();
        for (Size n = 0; n < units.count; n += 4) {
            const Policy policy = policies[n / 4] = score.kind == ADDITIVE ? policy_of_sum(n) : policy_of_product(score, n);
            const bool exponentiated = policy == FACTORED || policy == CLAMPED;
            const float factor = policy == PRODUCT ? units.c * 1.44269504f : 1.f;
            for (Size i = 0; i < count_rows; ++i)
                for (Size m = n; m < n + 4; ++m) query[i * units.count + m] = rows[i * stride + m] * factor;
            if (exponentiated) exponentiate(query + n, count_rows, units.count, units.c);
            if (exponentiated && !exponentials[n / 4]) {
                for (Size i = 0; i < 4 * ld; i += VL) store(key + n * ld + i, exp_bounded(load(key + n * ld + i) * units.c));
            } else if (!exponentiated && exponentials[n / 4]) {
                load_units(a, keys, count, n, 4);
            }
            exponentials[n / 4] = exponentiated;
        }
    }
    void bound_queries() {
        for (Size n = 0; n < units.count; n += VL) {
            Vector top = splat(-INFINITY), least = splat(INFINITY);
            for (Size i = 0; i < count_rows; ++i) widen(load(rows + i * stride + n), top, least);
            store(query_largest + n, top), store(query_least + n, least);
        }
    }
    float query_bound(Size n) const { return fmaxf(query_largest[n], -query_least[n]); }
    float key_bound(Size n) const { return fmaxf(key_largest[n], -key_least[n]); }
    // Of four units from n. A comparison with NaN fails: then no unit is small.
    Policy policy_of_sum(Size n) const {
        bool factors = true, clamps = false, small = true;
        for (Size m = n; m < n + 4; ++m) {
            // the bounds of q + k lie together where q and k cancel, as large as each may be
            const float sum = fmaxf(query_largest[m] + key_largest[m], -query_least[m] - key_least[m]);
            factors &= units.c * query_bound(m) <= LARGEST_HALF && units.c * key_bound(m) <= LARGEST_HALF;
            clamps |= !(units.c * (query_largest[m] + key_largest[m]) <= LARGEST_EXPONENT);
            small &= sum <= LARGEST_SMALL;
        }
        return small ? SMALL_SUM : !factors ? SUM : clamps ? CLAMPED : FACTORED;
    }
    Policy policy_of_product(const Score& score, Size n) const {
        bool small = score.kind != HADAMARD_SIGMOID, large = false;
        for (Size m = n; m < n + 4; ++m) {
            large |= !(units.c * query_bound(m) * key_bound(m) <= LARGEST_PRODUCT);
            small &= query_bound(m) * key_bound(m) <= LARGEST_SMALL;
        }
        return small ? SMALL_PRODUCT : large ? LARGE_PRODUCT : PRODUCT;
    }
    static void exponentiate(float* x, Size rows, Size stride, float c) {  // four columns
        float buffer[4 * LANES];
        for (Size i = 0; i < rows; ++i) memcpy(buffer + 4 * i, x + i * stride, 4 * sizeof(float));
        for (Size i = 0; i < 4 * rows; i += VL) store(buffer + i, exp_bounded(load(buffer + i) * c));
        for (Size i = 0; i < rows; ++i) memcpy(x + i * stride, buffer + 4 * i, 4 * sizeof(float));
    }
    // S (count, width) = scores * scale
    void forward(float scale, Size count, Size width, float* S) {
        const Size summed = units.count > 0 ? count_rows : 0;
        memset(scores + summed * ld, 0, (width - summed) * ld * sizeof(float));
        for (Size first = 0, last; first < units.count; first = last) {  // units of one policy
            const Policy policy = policies[first / 4];
            for (last = first; last < units.count && policies[last / 4] == policy;) last += 4;
            const bool add = first > 0;
            with_policy(policy, [&](auto each) {
                unit_scores<decltype(each)::value>(units, first, last, count_rows, query, key, ld, add, scores);
            });
        }
        transpose(scores, ld, width, count, S, width);
        for (Size i = 0; i < count * width; i += VL) store(S + i, load(S + i) * splat(scale));
    }
    // From the gradient of the logits G (count, width): by_query is set, by_key and by_weight are added to. They are as
    // unit_gradient_rows has them, but for by_key, which here has the factor c^2 as well.
    void backward(float scale, Size count, Size width, const float* G) {
        transpose(G, width, count, width, scores, ld);
        for (Size i = 0; i < count_rows; ++i) {
            for (Size j = count; j < ld; ++j) scores[i * ld + j] = 0;
            for (Size j = 0; j < ld; j += VL) store(scores + i * ld + j, load(scores + i * ld + j) * splat(scale));
        }
        memset(by_key_tile, 0, units.count * ld * sizeof(float));
        memset(by_query, 0, width * units.count * sizeof(float));
        for (Size n = 0; n < units.count; n += 4) {
            with_policy(policies[n / 4], [&](auto each) {
                unit_gradient<decltype(each)::value>(
                    units, n, count_rows, query, rows, stride, key, ld, scores, by_query, by_key_tile, by_weight);
            });
        }
        for (Size i = 0; i < units.count * ld; i += VL)
            store(by_key + i, load(by_key + i) + load(by_key_tile + i) * (units.c * units.c));
    }
};

}  // namespace
}  // namespace ISA
