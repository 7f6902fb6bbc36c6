// relevancy @ Abar through a linear recurrence (gated delta rule, scalar decay, decay per feature), whose map A is never written.
//
// The keys s are swept from the last to the first. Query t has a state z (D), q_t where the sweep reaches it. In brackets: the names
// below.
//     A_ts = w_s z . k_s,  w_s = beta_s or 1;    then  z <- (z - beta_s (z . k_s) k_s) * a_s              [sweep_lanes]
// A chunk of CHUNK keys is linear in z: the sweep over unit vectors gives a matrix X (CHUNK + D, D), of which X z are the chunk's
// columns of A and the state behind it [chunk_matrices]. Without beta the part for the state is diagonal: one row [diagonal_matrix].
//     E = relu(A * dA), dA_ts = dO_t . v_s,  or |A| / sum_s |A|                                           [make_each]
//     result_s = sum_t r_t E_ts, over the heads                                                           [carry]
//
// Bound: multiply-adds, (CHUNK + D) D / CHUNK and Dv an entry of each head; without beta D and Dv. Tricks: a lane is a query, so that
// a step of the sweep has no sum over lanes; the queries of a tile are those of one chunk, and all its products have CHUNK lanes.
// Decays are multiplied and never divided by, so none is too strong.
// A task has some tiles of some heads of a sample, and a partial result. How tiles are dealt out depends on the call's sizes alone,
// and partial results are added in their order: the bits are those of any number of threads.
// Measured: rows recurrent_step of benchmarks/results/cpu.json.
#include "products.h"
#include "rows.h"

namespace ISA {
namespace {

static const Size CHUNK = 64;  // keys of a chunk, and queries of a tile
static const Size FEW_ROWS = 4;  // so many rows of relevancy are summed by dot products
static const Size MOST_PARTS = 32, PARTS_OF_MANY_ROWS = 8;  // of the tiles of a sample; the second for more than GROUP rows

struct RecurrentStep {
    Size dtype, B, H, Hq, Hk, N, D, Dv, T;
    Size gradient, row_normalize;  // flags: rule "gradient", else "attention"
    Size decays;  // of a token: 0 for none, 1, or D
    StridedTensor query, key, value, grad_output;  // heads Hq, Hk, H and H; the last two for rule "gradient"
    const float *log_decay, *beta, *diagonal;  // (B, H, N, decays), (B, H, N), (B, H, N); null where there is none
    const float* relevancy;  // (B, T, N)
    float* result;  // (B, T, N)
    FIELDS(dtype, B, H, Hq, Hk, N, D, Dv, T, gradient, row_normalize, decays, query, key, value, grad_output, log_decay, beta,
           diagonal, relevancy, result)
    Size chunks() const { return (N + CHUNK - 1) / CHUNK; }
    Size tokens_of(Size chunk) const { return least(CHUNK, N - chunk * CHUNK); }
    Size at(Size b, Size h, Size chunk) const { return (b * H + h) * N + chunk * CHUNK; }  // in (B, H, N)
    Size stride() const { return round_up(D, GROUP); }  // of a row of D numbers
    Size columns() const { return T <= FEW_ROWS ? T : round_up(T, VL); }  // of a partial result
    // `count` rows of x, in float32 with zeros behind them
    void load_rows(const StridedTensor& x, Size b, Size h, Size first, Size count, Size size, Size ld, float* to) const {
        for (Size n = 0; n < count; ++n, to += ld) {
            if (size > 0) widen(element(x.data, dtype, x.at(b, h, first + n)), dtype, size, to);
            memset(to + size, 0, (ld - size) * sizeof(float));
        }
    }
};

// ---- chunks

struct Chunk {
    const float* keys;  // (count, stride)
    const float *beta, *decay;  // (count), (count, decays)
    Size count, D, stride, decays;
    Size of_feature() const { return decays > 1 ? 1 : 0; }
};
// to = e^x of n numbers. Where that is subnormal, exp_all gives 0: the shares of a row may all be as small.
static void exponentials(const float* x, Size n, float* to) {
    for (Size i = 0; i < n; i += VL) {
        const Vector some = n - i < VL ? load_some(x + i, n - i) : load(x + i);
        float e[VL];
        store(e, exp_all(some));
        memcpy(to + i, e, least(VL, n - i) * sizeof(float));
    }
    for (Size i = 0; i < n; ++i)
        if (x[i] < -87.f && x[i] > -104.f) to[i] = expf(x[i]);
}
static Chunk load_chunk(const RecurrentStep& c, Size b, Size h, Size chunk, float* keys, float* decay) {
    const Size count = c.tokens_of(chunk), at = c.at(b, h, chunk);
    c.load_rows(c.key, b, h / (c.H / c.Hk), chunk * CHUNK, count, c.D, c.stride(), keys);
    if (c.log_decay) exponentials(c.log_decay + at * c.decays, count * c.decays, decay);
    return {keys, c.beta ? c.beta + at : nullptr, c.log_decay ? decay : nullptr, count, c.D, c.stride(), c.decays};
}
static float dot(const float* a, const float* b, Size stride) {
    Vector total = {};
    for (Size d = 0; d < stride; d += VL) total += load(a + d) * load(b + d);
    return sum(total);
}

// The sweep over a chunk for VECTORS vectors of lanes, from `lane` on: state (D, w) of each, and A's columns (count, ldc). Where there
// are `queries` (count, stride), lane n is that of query n, which enters at key n and has 0 at later ones.
template <int VECTORS, bool DELTA, bool DECAY>
static void sweep_lanes(const Chunk& x, const float* queries, Size lane, float* state, Size w, float* columns, Size ldc) {
    const Size D = x.D, of_feature = x.of_feature();
    Vector written[VECTORS] = {};
    state += lane, columns += lane;
    for (Size s = x.count - 1; s >= 0; --s) {
        const float *key = x.keys + s * x.stride, *later = key + x.stride,
                    *decay = DECAY ? x.decay + (s + 1) * x.decays : nullptr;
        const bool moves = (DELTA || DECAY) && s + 1 < x.count;
        Vector total[VECTORS] = {};
        for (Size first = 0; first < D; first += SHORT_SUM) {
            Vector part[VECTORS] = {};
            for (Size d = first; d < least(first + SHORT_SUM, D); ++d)
#pragma GCC unroll 4
                for (int n = 0; n < VECTORS; ++n) {
                    Vector z = load(state + d * w + n * VL);
                    if (moves) {
                        if (DELTA) z -= written[n] * splat(later[d]);
                        if (DECAY) z *= splat(decay[d * of_feature]);
                        store(state + d * w + n * VL, z);
                    }
                    part[n] += z * splat(key[d]);
                }
#pragma GCC unroll 4
            for (int n = 0; n < VECTORS; ++n) total[n] += part[n];
        }
        float row[VECTORS * VL];
        for (int n = 0; n < VECTORS; ++n) store(row + n * VL, total[n]);
        const Size place = s - lane;
        if (queries && place >= 0 && place < VECTORS * VL) {  // whatever the lane held before
            const float* query = queries + s * x.stride;
            for (Size d = 0; d < D; ++d) state[d * w + place] = query[d];
            row[place] = dot(query, key, x.stride);
        }
        for (int n = 0; n < VECTORS; ++n) {
            written[n] = DELTA ? load(row + n * VL) * x.beta[s] : load(row + n * VL);
            store(columns + s * ldc + n * VL, written[n]);
        }
        if (queries) memset(columns + s * ldc, 0, most(0, least(place, VECTORS * VL)) * sizeof(float));
    }
    for (Size d = 0; (DELTA || DECAY) && d < D; ++d)
        for (int n = 0; n < VECTORS; ++n) {
            Vector z = load(state + d * w + n * VL);
            if (DELTA) z -= written[n] * splat(x.keys[d]);
            if (DECAY) z *= splat(x.decay[d * of_feature]);
            store(state + d * w + n * VL, z);
        }
}
template <bool DELTA, bool DECAY>
static void sweep_chunk(const Chunk& x, const float* queries, Size lanes, float* state, Size w, float* columns, Size ldc) {
    Size lane = 0;
    for (; lane + 4 * VL <= lanes; lane += 4 * VL) sweep_lanes<4, DELTA, DECAY>(x, queries, lane, state, w, columns, ldc);
    for (; lane < lanes; lane += VL) sweep_lanes<1, DELTA, DECAY>(x, queries, lane, state, w, columns, ldc);
}
static void sweep_chunk(const Chunk& x, const float* queries, Size lanes, float* state, Size w, float* columns, Size ldc) {
    if (x.beta && x.decay) return sweep_chunk<true, true>(x, queries, lanes, state, w, columns, ldc);
    if (x.beta) return sweep_chunk<true, false>(x, queries, lanes, state, w, columns, ldc);
    if (x.decay) return sweep_chunk<false, true>(x, queries, lanes, state, w, columns, ldc);
    return sweep_chunk<false, false>(x, queries, lanes, state, w, columns, ldc);
}

// The matrices X of all chunks but the last, through which no later query goes
struct Matrices : Queue {
    const RecurrentStep& c;
    float* data = nullptr;
    explicit Matrices(const RecurrentStep& c) : c(c) {}
    Size rows() const { return CHUNK + (c.beta ? c.D : 1); }
    Size count() const { return c.B * c.H * (c.chunks() - 1); }
    float* of(Size b, Size h, Size chunk) const {
        return data + ((b * c.H + h) * (c.chunks() - 1) + chunk) * rows() * c.stride();
    }
};
struct MatrixSpace {
    float *keys, *decay, *state;  // (CHUNK, stride), (CHUNK, decays); (D, CHUNK) of some unit vectors
    void plan(const Matrices& job, Memory& memory) {
        keys = memory.take(CHUNK * job.c.stride()), decay = memory.take(CHUNK * job.c.decays);
        state = memory.take(job.c.beta ? job.c.D * CHUNK : 0);
    }
};
static void diagonal_matrix(const Chunk& x, float* to) {
    float* state = to + CHUNK * x.stride;
    for (Size d = 0; d < x.D; ++d) state[d] = 1;
    for (Size s = x.count - 1; s >= 0; --s)
        for (Size d = 0; d < x.D; ++d) {
            to[s * x.stride + d] = state[d] * x.keys[s * x.stride + d];
            if (x.decay) state[d] *= x.decay[s * x.decays + d * x.of_feature()];
        }
}
static void chunk_matrices(Matrices& job, MatrixSpace& space, Size) {
    const RecurrentStep& c = job.c;
    const Size chunks = c.chunks() - 1, stride = c.stride();
    for (Size item = job.take(); item < job.count(); item = job.take()) {
        const Size head = item / chunks, b = head / c.H, h = head % c.H;
        const Chunk x = load_chunk(c, b, h, item % chunks, space.keys, space.decay);
        float* to = job.of(b, h, item % chunks);
        if (!c.beta) {
            diagonal_matrix(x, to);
            continue;
        }
        for (Size first = 0; first < stride; first += CHUNK) {  // so many unit vectors stay in the first cache
            const Size lanes = least(CHUNK, stride - first);
            memset(space.state, 0, c.D * lanes * sizeof(float));
            for (Size n = 0; n < lanes && first + n < c.D; ++n) space.state[(first + n) * lanes + n] = 1;
            sweep_chunk(x, nullptr, lanes, space.state, lanes, to + first, stride);
            for (Size d = 0; d < c.D; ++d)
                memcpy(to + (CHUNK + d) * stride + first, space.state + d * lanes, lanes * sizeof(float));
        }
    }
}

// ---- tiles

struct Steps : Queue {
    const RecurrentStep& c;
    const Matrices& matrices;
    double* partial = nullptr;  // (B, head_parts, parts, N, columns)
    Size parts, head_parts;
    Size adders;  // tasks that add the partial results
    explicit Steps(const RecurrentStep& c, const Matrices& matrices) : c(c), matrices(matrices) {
        parts = least(c.chunks(), c.T > GROUP ? PARTS_OF_MANY_ROWS : MOST_PARTS);
        adders = least(thread_count(), c.B * c.N);
        // heads are apart where there are few tiles, but a row is divided by its sum over all of them
        head_parts = c.row_normalize ? 1 : least(c.H, (MOST_PARTS + parts - 1) / parts);
        if (c.T > GROUP) head_parts = least(head_parts, most(1, PARTS_OF_MANY_ROWS / parts));
    }
    Size size() const { return c.N * c.columns(); }
    Size count() const { return c.B * head_parts * parts; }
};

// One thread's tile: `rows` queries from `first` on, which are those of one chunk, in `width` lanes
struct StepTile {
    float *keys, *decay;  // (CHUNK, stride), (CHUNK, decays)
    float *queries, *grad_rows, *grad_output;  // (CHUNK, stride), (CHUNK, Dv rounded up), (Dv, width)
    float* out[2];  // (CHUNK + D, width): a chunk's columns of A, and the states behind it
    float *values, *dA;  // (CHUNK, Dv), (CHUNK, width)
    float *each, *map;  // (N, width): of a head by attention; of all heads, where rows are divided by their sums
    float* carried;  // (T, CHUNK), or (CHUNK, columns) of many rows
    float* sums;  // (CHUNK, columns)
    float* divisor;  // (CHUNK)
    double* total;  // (CHUNK)
    Size b, chunk, first, rows, width;
    void plan(const Steps& job, Memory& memory) {
        const RecurrentStep& c = job.c;
        keys = memory.take(CHUNK * c.stride()), queries = memory.take(CHUNK * c.stride());
        decay = memory.take(CHUNK * c.decays);
        grad_rows = memory.take(CHUNK * round_up(c.Dv, VL)), grad_output = memory.take(c.Dv * CHUNK);
        for (float*& x : out) x = memory.take((CHUNK + c.D) * CHUNK);
        values = memory.take(CHUNK * c.Dv), dA = memory.take(CHUNK * CHUNK);
        each = memory.take(c.gradient ? 0 : c.chunks() * CHUNK * CHUNK);
        map = memory.take(c.row_normalize ? c.chunks() * CHUNK * CHUNK : 0);
        carried = memory.take(CHUNK * most(c.columns(), 1)), sums = memory.take(CHUNK * c.columns());
        divisor = memory.take(CHUNK), total = memory.take_doubles(CHUNK);
    }
    Size keys_of_tile() const { return first + rows; }
};

// E from the columns S of a chunk's keys, in place; a later key, and a lane without a query, have 0.
static void make_each(const RecurrentStep& c, StepTile& x, Size h, Size chunk, Size count, float* S) {
    const Size w = x.width;
    if (c.gradient) {
        c.load_rows(c.value, x.b, h, chunk * CHUNK, count, c.Dv, c.Dv, x.values);
        product<false>(count, w, c.Dv, x.values, c.Dv, x.grad_output, w, x.dA, w, false);
    }
    for (Size n = 0; n < count * w; n += VL)
        store(S + n, c.gradient ? maximum(Vector{}, load(S + n) * load(x.dA + n)) : absolute(load(S + n)));
    for (Size s = 0; s < count; ++s) {
        if (chunk == x.chunk) memset(S + s * w, 0, s * sizeof(float));
        memset(S + s * w + x.rows, 0, (w - x.rows) * sizeof(float));
    }
}

// The relevancy of the tile's queries; its mean over the heads where rows are not divided by their sums.
static void load_carried(const RecurrentStep& c, StepTile& x) {
    const float* from = c.relevancy + x.b * c.T * c.N + x.first;
    const float factor = c.row_normalize ? 1.f : 1.f / c.H;
    if (c.T <= FEW_ROWS) {
        memset(x.carried, 0, c.T * CHUNK * sizeof(float));
        for (Size t = 0; t < c.T; ++t)
            for (Size i = 0; i < x.rows; ++i) x.carried[t * CHUNK + i] = from[t * c.N + i] * factor;
        return;
    }
    memset(x.carried, 0, CHUNK * c.columns() * sizeof(float));
    transpose(from, c.N, c.T, x.rows, x.carried, c.columns());
    for (Size n = 0; n < x.rows * c.columns(); n += VL) store(x.carried + n, load(x.carried + n) * factor);
}
// partial (N, columns) += E of `count` keys from `key` on, times the tile's relevancy
static void carry(const RecurrentStep& c, StepTile& x, const float* E, Size key, Size count, double* partial) {
    const Size columns = c.columns(), w = x.width;
    if (c.T <= FEW_ROWS)
        for (Size s = 0; s < count; ++s)
            for (Size t = 0; t < c.T; ++t) {
                Vector total = {};
                for (Size i = 0; i < w; i += VL) total += load(E + s * w + i) * load(x.carried + t * CHUNK + i);
                x.sums[s * columns + t] = sum(total);
            }
    else product<false>(count, columns, x.rows, E, w, x.carried, columns, x.sums, columns, false);
    for (Size n = 0; n < count * columns; ++n) partial[key * columns + n] += x.sums[n];
}

// f(chunk, keys, E of them) for all keys of a tile
template <class F> static void for_chunks(const RecurrentStep& c, const StepTile& x, float* tile, const F& f) {
    for (Size chunk = 0; chunk <= x.chunk; ++chunk) f(chunk, c.tokens_of(chunk), tile + chunk * CHUNK * x.width);
}
// Divides the rows of a tile by their sums; a row of zeros stays.
static void divide_rows(const RecurrentStep& c, StepTile& x, float* tile) {
    const Size w = x.width;
    for (Size i = 0; i < w; ++i) x.total[i] = 0;
    for_chunks(c, x, tile, [&](Size, Size count, const float* E) {
        for (Size i = 0; i < w; i += VL) {
            float some[VL];
            store(some, sum_over(count, [&](Size s) { return load(E + s * w + i); }));
            for (int n = 0; n < VL; ++n) x.total[i + n] += some[n];
        }
    });
    for (Size i = 0; i < w; ++i) x.divisor[i] = x.total[i] == 0 ? 1.f : (float)x.total[i];
    for (Size s = 0; s < x.keys_of_tile(); ++s)
        for (Size i = 0; i < w; i += VL) store(tile + s * w + i, load(tile + s * w + i) / load(x.divisor + i));
}

// The tile's columns of A from the last chunk to the first, each as E; those by attention are kept until their sums are known.
static void step_head(const Steps& job, StepTile& x, Size h, bool first_head, double* partial) {
    const RecurrentStep& c = job.c;
    const Size w = x.width, stride = c.stride();
    const Chunk chunk = load_chunk(c, x.b, h, x.chunk, x.keys, x.decay);
    c.load_rows(c.query, x.b, h / (c.H / c.Hq), x.first, x.rows, c.D, stride, x.queries);
    if (c.gradient) {
        const Size ld = round_up(c.Dv, VL);
        c.load_rows(c.grad_output, x.b, h, x.first, x.rows, c.Dv, ld, x.grad_rows);
        memset(x.grad_rows + x.rows * ld, 0, (w - x.rows) * ld * sizeof(float));
        transpose(x.grad_rows, ld, w, c.Dv, x.grad_output, w);
    }
    const auto add_to_map = [&](Size at, Size count, const float* E) {
        float* map = x.map + at * CHUNK * w;
        for (Size n = 0; n < count * w; n += VL) store(map + n, first_head ? load(E + n) : load(map + n) + load(E + n));
    };
    float *S = x.out[0], *next = x.out[1];
    memset(S, 0, (CHUNK + c.D) * w * sizeof(float));
    sweep_chunk(chunk, x.queries, w, S + CHUNK * w, w, S, w);
    for (Size s = 0; c.diagonal && s < x.rows; ++s) S[s * w + s] += c.diagonal[c.at(x.b, h, x.chunk) + s];
    for (Size at = x.chunk; at >= 0; --at) {
        const Size count = c.tokens_of(at);
        float* E = S;
        if (!c.gradient) E = x.each + at * CHUNK * w, memcpy(E, S, count * w * sizeof(float));
        make_each(c, x, h, at, count, E);
        if (c.gradient && c.row_normalize) add_to_map(at, count, E);
        else if (c.gradient) carry(c, x, E, at * CHUNK, count, partial);
        if (at == 0) break;
        const float* matrix = job.matrices.of(x.b, h, at - 1);
        const Size rows = CHUNK + (c.beta && at > 1 ? c.D : 0);
        float *state = S + CHUNK * w, *behind = next + CHUNK * w;
        product<false>(rows, w, c.D, matrix, stride, state, w, next, w, false);
        for (Size d = 0; !c.beta && at > 1 && d < c.D; ++d)
            for (Size i = 0; i < w; i += VL) store(behind + d * w + i, load(state + d * w + i) * matrix[CHUNK * stride + d]);
        float* swapped = S;
        S = next, next = swapped;
    }
    if (c.gradient) return;
    divide_rows(c, x, x.each);
    for_chunks(c, x, x.each, [&](Size at, Size count, const float* E) {
        if (c.row_normalize) add_to_map(at, count, E);
        else carry(c, x, E, at * CHUNK, count, partial);
    });
}

static void step_tiles(Steps& job, StepTile& x, Size) {
    const RecurrentStep& c = job.c;
    for (Size item = job.take(); item < job.count(); item = job.take()) {
        const Size part = job.parts - 1 - item % job.parts, head_part = item / job.parts % job.head_parts;  // long ones first
        const Size first_head = share(c.H, head_part, job.head_parts), last_head = share(c.H, head_part + 1, job.head_parts);
        x.b = item / job.parts / job.head_parts;
        double* partial = job.partial + ((x.b * job.head_parts + head_part) * job.parts + part) * job.size();
        memset(partial, 0, job.size() * sizeof(double));
        for (Size round = 0; round * job.parts < c.chunks(); ++round) {  // there and back, so that parts have like work
            x.chunk = round * job.parts + (round % 2 ? job.parts - 1 - part : part);
            if (x.chunk >= c.chunks()) continue;
            x.first = x.chunk * CHUNK, x.rows = c.tokens_of(x.chunk), x.width = round_up(x.rows, GROUP);
            load_carried(c, x);
            for (Size h = first_head; h < last_head; ++h) step_head(job, x, h, h == first_head, partial);
            if (!c.row_normalize || first_head == last_head) continue;
            divide_rows(c, x, x.map);
            for_chunks(c, x, x.map, [&](Size at, Size count, const float* E) { carry(c, x, E, at * CHUNK, count, partial); });
        }
    }
}
static void add_parts(Steps& job, Size task) {
    const RecurrentStep& c = job.c;
    const Size parts = job.head_parts * job.parts;
    for (Size row = share(c.B * c.N, task, job.adders); row < share(c.B * c.N, task + 1, job.adders); ++row) {
        const Size b = row / c.N, s = row % c.N;
        for (Size t = 0; t < c.T; ++t) {
            double total = 0;
            for (Size n = 0; n < parts; ++n) total += job.partial[(b * parts + n) * job.size() + s * c.columns() + t];
            c.result[(b * c.T + t) * c.N + s] = (float)total;
        }
    }
}

static Size recurrent_step_forward(const RecurrentStep& c) {
    if (c.B * c.T * c.N == 0) return DONE;
    if (c.H == 0) {
        memset(c.result, 0, c.B * c.T * c.N * sizeof(float));
        return DONE;
    }
    Matrices matrices(c);
    Steps job(c, matrices);
    Memory memory;
    if (!memory.place([&] {
            matrices.data = memory.take(matrices.count() * matrices.rows() * c.stride());
            job.partial = memory.take_doubles(job.count() * job.size());
        }))
        return NO_MEMORY;
    const Size threads = thread_count();
    if (run_with_space<MatrixSpace>(least(threads, most(matrices.count(), 1)), matrices, chunk_matrices) != DONE)
        return NO_MEMORY;
    if (run_with_space<StepTile>(least(threads, job.count()), job, step_tiles) != DONE) return NO_MEMORY;
    run(job.adders, job, add_parts);
    return DONE;
}

}  // namespace
}  // namespace ISA
OPERATOR(recurrent_step_forward, RecurrentStep)
