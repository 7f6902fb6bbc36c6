// The operators on attention, with their backward operators, as vlattn_fast/ops and vlattn_fast/backends/cpu have them.
#pragma once
#include "calls.h"

namespace {

void check_four(const Tensor& query, const Tensor& key) {  // dimensions, which other checks read
    check("query", query, {ANY, ANY, ANY, ANY}, FLOATS);
    check("key", key, {ANY, ANY, ANY, ANY}, {});
}

struct Masks {
    const Maybe &mask, &keys, &row_bias, &key_groups;
    bool is_causal;
};

// `a`: the path of the attention in the call
void set_attention(Call& call, const Tensor& query, const Tensor& key, const Maybe& value, double scale, const Masks& masks,
                   const Maybe& shifts, Text a = "a.") {
    const Size batch = query.size(0), heads = query.size(1), queries = query.size(2), keys = key.size(2);
    const Size key_heads = key.size(1), groups = masks.row_bias ? masks.row_bias->size(3) : 0;
    check("key", key, {batch, ANY, ANY, query.size(3)}, {query.scalar_type()});
    check_heads("key", key_heads, heads);
    check("value", value, {batch, key_heads, keys, ANY}, {query.scalar_type()});
    check("attn_mask", masks.mask, {batch, heads, queries, keys}, {}, true);
    check("key_mask", masks.keys, {batch, keys}, {ScalarType::Bool});
    check("row_bias", masks.row_bias, {batch, heads, queries, groups}, {});
    check("key_groups", masks.key_groups, {batch, keys}, {ScalarType::Long});
    if (masks.row_bias) check_given("key_groups", masks.key_groups);
    call.number(a + "dtype", dtype_of(query)).number(a + "B", batch).number(a + "H", heads).number(a + "Hkv", key_heads);
    call.number(a + "N", queries)
        .number(a + "M", keys)
        .number(a + "D", query.size(3))
        .number(a + "Dv", value ? value->size(3) : 0);
    call.number(a + "scale", scale).strided(a + "query", query).strided(a + "key", key).strided(a + "value", value);
    call.contiguous(a + "masks.keys", masks.keys).number(a + "masks.is_causal", masks.is_causal);
    call.pointer(a + "masks.shifts", shifts);
    if (masks.row_bias) {
        call.pointer(a + "masks.row_bias", as(ScalarType::Float, masks.row_bias))
            .contiguous(a + "masks.key_groups", masks.key_groups);
        call.number(a + "masks.groups", groups);
    }
    if (!masks.mask) return;
    call.pointer(a + "masks.mask", masks.mask).number(a + "masks.dtype", dtype_of(*masks.mask));
    const char* names[] = {"stride_b", "stride_h", "stride_n", "stride_m"};
    const Size missing = 4 - masks.mask->dim();
    for (Size n = missing; n < 4; ++n)  // broadcast: a stride of 0
        if (masks.mask->size(n - missing) != 1) call.integer(a + "masks." + names[n], masks.mask->stride(n - missing));
}

// Of a float64 mask
Maybe shifts_of(const Tensor& query, const Tensor& key, const Masks& masks) {
    if (!masks.mask || masks.mask->scalar_type() != ScalarType::Double) return std::nullopt;
    const Tensor shifts = empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Double);
    Call find("mask_shifts");
    set_attention(find, query, key, std::nullopt, 1.0, masks, std::nullopt);
    find.pointer("shifts", shifts).run();
    return shifts;
}
// A call whose first member is the attention.
Call attention_call(Text name, const Tensor& query, const Tensor& key, const Maybe& value, double scale, const Masks& masks) {
    Call call(name);
    set_attention(call, query, key, value, scale, masks, shifts_of(query, key, masks));
    return call;
}

struct ScoreKind {
    Size number;
    bool takes_vector;
    static const ScoreKind& named(Text name) {
        static const std::map<std::string, ScoreKind> kinds = all();
        const auto entry = kinds.find(name);
        STD_TORCH_CHECK(entry != kinds.end(), "the CPU kernels know no score ", name);
        return entry->second;
    }

   private:
    static std::map<std::string, ScoreKind> all() {
        std::map<std::string, ScoreKind> kinds;
        std::istringstream lines(Library::opened().text("score_kinds"));
        for (std::string line; std::getline(lines, line);) {
            const size_t end = line.find(' ');
            kinds.insert({line.substr(0, end), {(Size)kinds.size(), end != std::string::npos}});
        }
        return kinds;
    }
};

void set_score(Call& call, Text score, double parameter) {
    call.number("score.parameter", parameter).number("score.kind", ScoreKind::named(score).number);
}

// The score, its vector (H, D) if it has one, and dropout if it has a seed
void set_core(Call& call, const Tensor& query, Text score, double parameter, const Maybe& vector, const Maybe& seed,
              double dropout_p) {
    if (ScoreKind::named(score).takes_vector) check_given("vector", vector);
    check("vector", vector, {query.size(1), query.size(3)}, {});
    check("seed", seed, {}, {ScalarType::Long});
    set_score(call, score, parameter);
    call.pointer("score.vector", as(ScalarType::Float, vector));
    if (seed) call.number("dropout.probability", dropout_p).integer("dropout.seed", *(const int64_t*)seed->const_data_ptr());
}

std::tuple<Tensor, Tensor> attended(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& vector, const Masks& masks,
                                    const Maybe& seed, Text score, double parameter, double scale, double dropout_p) {
    check_four(q, k);
    check("value", v, {ANY, ANY, ANY, ANY}, {});
    const Size heads = k.size(1) > v.size(1) ? k.size(1) : v.size(1);
    const Tensor query = unit_stride(q), key = unit_stride(repeated_heads(k, heads)),
                 value = unit_stride(repeated_heads(v, heads));
    const Tensor out = empty_rows_first(query, query.size(1), query.size(2), value.size(3));
    const Tensor lse = empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Double);
    Call call = attention_call("score_attention_forward", query, key, value, scale, masks);
    set_core(call, query, score, parameter, vector, seed, dropout_p);
    call.strided("out", out).pointer("lse", lse).run();
    return {out, lse};
}

std::tuple<Tensor, Tensor> score_attention(Tensor query, Tensor key, Maybe vector, Maybe attn_mask, Maybe key_mask,
                                           Maybe row_bias, Maybe key_groups, Tensor value, Maybe seed, Maybe, Word score,
                                           double parameter, double scale, bool is_causal, double dropout_p, Word backend) {
    check_backend(backend);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    return attended(query, key, value, vector, masks, seed, score, parameter, scale, dropout_p);
}

// What a backward pass reads of its forward pass, and the gradients of what that gave
void check_outputs(const Tensor& query, const Tensor& value, const Maybe& out, const Maybe& lse, const Maybe& grad_out,
                   const Maybe& grad_lse) {
    const Sizes rows = {query.size(0), query.size(1), query.size(2)};
    const Sizes outputs = {rows[0], rows[1], rows[2], value.size(3)};
    check("out", out, outputs, {query.scalar_type()}), check("grad_out", grad_out, outputs, {query.scalar_type()});
    check("lse", lse, rows, {ScalarType::Double}), check("grad_lse", grad_lse, rows, {});
}

// Of query, key and value; zeros if there are no queries, over which the kernels run
struct Gradients {
    Tensor query, key, value;
    Maybe row_bias;

    Gradients(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& bias)
        : query(made(q, q)), key(made(k, q)), value(made(v, q)), row_bias(zeros_of(bias)) {}
    void set(Call& call) const {
        call.strided("grad_query", query).strided("grad_key", key).strided("grad_value", value);
        call.pointer("grad_row_bias", row_bias);
    }

   private:
    static Tensor made(const Tensor& x, const Tensor& query) {
        Tensor grad = empty_rows_first(x, x.size(1), x.size(2), x.size(3));
        return query.numel() ? grad : torch::stable::zero_(grad);
    }
};
Tensor or_empty(const Maybe& x, const Tensor& like) { return x ? *x : empty(like, {0}); }  // torch's dispatcher takes no None

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> score_attention_backward(Tensor g, Maybe grad_lse, Tensor q, Tensor k,
                                                                            Maybe vector, Maybe attn_mask, Maybe key_mask,
                                                                            Maybe row_bias, Maybe key_groups, Tensor v,
                                                                            Tensor out, Tensor lse, Maybe seed, Word score,
                                                                            double parameter, double scale, bool is_causal,
                                                                            double dropout_p, Word backend) {
    check_backend(backend);
    check_four(q, k);
    check("value", v, {ANY, ANY, ANY, ANY}, {});
    check_outputs(q, v, out, lse, g, grad_lse);
    const Size heads = k.size(1) > v.size(1) ? k.size(1) : v.size(1);
    const Tensor query = unit_stride(q), key = unit_stride(repeated_heads(k, heads)),
                 value = unit_stride(repeated_heads(v, heads));
    const Gradients grads(query, key, value, row_bias);
    Maybe grad_vector = zeros_of(vector);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    Call call = attention_call("score_attention_backward", query, key, value, scale, masks);
    set_core(call, query, score, parameter, vector, seed, dropout_p);
    call.strided("grad_out", unit_stride(g)).strided("out", unit_stride(out)).contiguous("lse", lse);
    call.pointer("grad_lse", as(ScalarType::Float, grad_lse)).pointer("grad_vector", grad_vector);
    grads.set(call);
    if (query.size(1) > 0) call.run();
    if (vector) grad_vector = torch::stable::to(*grad_vector, vector->scalar_type());
    return {grads.query, summed_heads(grads.key, k.size(1)), summed_heads(grads.value, v.size(1)), or_empty(grad_vector, g),
            or_empty(grads.row_bias, g)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relevancy_attention(Tensor query, Tensor key, Maybe vector, Maybe attn_mask,
                                                               Maybe key_mask, Maybe row_bias, Maybe key_groups, Tensor value,
                                                               Tensor carrier, Maybe, Maybe, Maybe sink, Word score,
                                                               double parameter, double scale, bool is_causal, Word rule, bool,
                                                               Word backend) {
    check_backend(backend);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    const auto [out, lse] = attended(query, key, value, vector, masks, std::nullopt, score, parameter, scale, 0.0);
    const bool behind = sink && rule == "gradient" && query.element_size() == 2;
    Tensor behind_sink = behind ? empty_rows_first(query, query.size(1), query.size(2), value.size(3)) : empty(query, {0});
    if (behind) torch::stable::zero_(behind_sink);
    return {out, torch::stable::clone(torch::stable::contiguous(carrier)), lse, behind_sink};
}

// Of a rule by gradients: value and the gradient of the output. The log-sum-exp is that of the forward pass.
void check_gradients(bool by_gradient, const Tensor& query, const Maybe& value, const Maybe& grad, const Maybe& lse) {
    const Size batch = query.size(0), heads = query.size(1), queries = query.size(2);
    check("lse", lse, {batch, heads, queries}, {});
    if (!by_gradient) return;
    check_given("value", value), check_given("grad_output", grad);
    check("value", value, {batch, ANY, ANY, ANY}, {});
    check("grad_output", grad, {batch, heads, queries, value->size(3)}, {query.scalar_type()});
}

const Size OWN_LSE = 0, CALLER_LSE = 1, NO_LSE = 2;  // LseSource of csrc/cpu/backward_tile.h

// Mean over the heads of relu(A * dA), or of A. Value and the gradient of the output are null where it does without dA.
struct Abar {
    Tensor query, key;
    Maybe value, grad_out;
    const Masks& masks;
    const Maybe& vector;
    Text score;
    double parameter, scale;
    bool by_gradient, row_normalize;

    static Abar of(const Tensor& q, const Tensor& k, const Maybe& v, const Maybe& g, const Maybe& lse, const Masks& masks,
                   Text rule, bool row_normalize, const Maybe& vector, Text score, double parameter, double scale) {
        const bool by_gradient = place("rule", rule, RULES) == 0;
        check_four(q, k);
        check_gradients(by_gradient, q, v, g, lse);
        const Maybe value = by_gradient ? unit_stride(v) : std::nullopt, grad = by_gradient ? unit_stride(g) : std::nullopt;
        return {unit_stride(q), unit_stride(k), value, grad, masks, vector, score, parameter, scale, by_gradient, row_normalize};
    }
    Call call(Text name, const char* grad) const {
        Call call = attention_call(name, query, key, value, scale, masks);
        set_core(call, query, score, parameter, vector, std::nullopt, 0.0);
        call.strided(grad, grad_out);
        return call;
    }
    // Sets r @ Abar + direct, and returns it; r (B, T, N) and direct (B, T, M) in the memory of a float32
    Tensor set_carried(Call& call, Text within, const Tensor& relevancy, const Maybe& direct) const {
        const Sizes sizes = {relevancy.size(0), relevancy.size(1), key.size(2)};
        const bool works = query.size(1) > 0 && query.size(2) > 0;  // else the kernels write nothing
        const Maybe added = as(ScalarType::Float, direct);
        const Tensor result = works   ? empty(relevancy, sizes, ScalarType::Float)
                              : added ? torch::stable::clone(*added)
                                      : zeros(relevancy, sizes, ScalarType::Float);
        call.pointer(within + "rows", as(ScalarType::Float, relevancy)).number(within + "T", relevancy.size(1));
        call.number(within + "row_normalize", row_normalize).pointer(within + "direct", added).pointer(within + "result", result);
        return result;
    }
    // r @ Abar + direct by one of two kernels; `lse` in float64
    Tensor carry(const Tensor& relevancy, const Maybe& direct, const Maybe& lse, Size lse_source) const {
        const auto carries_by_map = (int64_t (*)(int64_t, int64_t))Library::opened().kernel("carries_by_map");
        const bool by_map = carries_by_map(relevancy.size(1), query.size(2));
        Call one = by_map ? call("attention_map", "grad_output") : call("score_attention_backward", "grad_out");
        one.number(by_map ? "gradient" : "relevancy.is_gradient", by_gradient);
        if (!by_map || lse_source == CALLER_LSE) one.pointer("lse", lse);  // a map computes its own
        if (!by_map) one.number("lse_source", lse_source);
        const Tensor result = set_carried(one, by_map ? "" : "relevancy.", relevancy, direct);
        one.run();
        return torch::stable::to(result, relevancy.scalar_type());
    }
};

Tensor relevancy_step(Tensor relevancy, Tensor q, Tensor k, Maybe vector, Maybe attn_mask, Maybe key_mask, Maybe row_bias,
                      Maybe key_groups, Maybe v, Maybe g, Maybe lse, Word score, double parameter, double scale, bool is_causal,
                      Word rule, bool row_normalize, Word backend) {
    check_backend(backend);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    const Abar abar = Abar::of(q, k, v, g, lse, masks, rule, row_normalize, vector, score, parameter, scale);
    check("relevancy", relevancy, {q.size(0), ANY, q.size(2)}, {});
    return abar.carry(relevancy, std::nullopt, as(ScalarType::Double, lse), lse ? CALLER_LSE : NO_LSE);
}

// The gradients of query, key, value, grad_output, lse and row_bias by abar_backward, whose `call` has that of Abar
std::array<Maybe, 6> abar_gradients(const Abar& x, Call& call, const Maybe& lse, bool need_inputs, bool need_lse) {
    const Size batch = x.query.size(0), heads = x.query.size(1), queries = x.query.size(2);
    const bool works = heads > 0 && queries > 0;  // the kernel runs over them
    const auto made = [&](const Maybe& of) {
        return need_inputs && of ? Maybe((works ? empty : zeros)(*of, sizes_of(*of), std::nullopt)) : std::nullopt;
    };
    std::array<Maybe, 6> grads = {made(x.query),    made(x.key),  made(x.value),
                                  made(x.grad_out), std::nullopt, need_inputs ? zeros_of(x.masks.row_bias) : std::nullopt};
    const bool by_lse = lse && need_lse && need_inputs;
    if (by_lse) grads[4] = empty(x.query, {batch, heads, queries}, ScalarType::Float);
    call.number("gradient", x.by_gradient).number("row_normalize", x.row_normalize).pointer("lse", as(ScalarType::Double, lse));
    call.number("needs_inputs", need_inputs).strided("grad_query", grads[0]).strided("grad_key", grads[1]);
    call.strided("grad_value", grads[2]).strided("grad_grad_output", grads[3]).pointer("grad_lse", grads[4]);
    call.pointer("grad_row_bias", grads[5]);
    if (works) call.run();
    if (by_lse) grads[4] = torch::stable::to(*grads[4], lse->scalar_type());
    return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> relevancy_step_backward(
    Tensor grad, Tensor relevancy, Tensor q, Tensor k, Maybe vector, Maybe attn_mask, Maybe key_mask, Maybe row_bias,
    Maybe key_groups, Maybe v, Maybe g, Maybe lse, Word score, double parameter, double scale, bool is_causal, Word rule,
    bool row_normalize, bool need_relevancy, bool need_inputs, bool need_lse, Word backend) {
    check_backend(backend);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    const Abar abar = Abar::of(q, k, v, g, lse, masks, rule, row_normalize, vector, score, parameter, scale);
    check("relevancy", relevancy, {q.size(0), ANY, q.size(2)}, {});
    check("grad", grad, {q.size(0), relevancy.size(1), k.size(2)}, {});
    Call call = abar.call("abar_backward", "grad_output");
    Maybe by_rows;
    if (need_relevancy) by_rows = zeros_of(relevancy);
    call.pointer("rows", as(ScalarType::Float, relevancy)).pointer("grad_result", as(ScalarType::Float, grad));
    call.number("T", relevancy.size(1)).pointer("grad_rows", by_rows);
    const auto grads = abar_gradients(abar, call, lse, need_inputs, need_lse);
    if (by_rows) by_rows = torch::stable::to(*by_rows, relevancy.scalar_type());
    const auto given = [&](const Maybe& x) { return or_empty(x, grad); };
    return {given(by_rows), given(grads[0]), given(grads[1]), given(grads[2]), given(grads[3]), given(grads[4]), given(grads[5])};
}

// `carried` (B, T, N) times a weight that can be broadcast to (B, N)
Maybe weighed(Text name, const Maybe& carried, const Maybe& weight) {
    if (!carried || !weight) return carried;
    check(name, weight, {carried->size(0), carried->size(2)}, {}, true);
    return aten("aten::mul", "Tensor", *carried, torch::stable::unsqueeze(*weight, weight->dim() - 1));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> relevancy_attention_backward(
    Maybe g, Maybe grad_carrier, Maybe grad_lse, Maybe grad_behind_sink, Tensor q, Tensor k, Maybe vector, Maybe attn_mask,
    Maybe key_mask, Maybe row_bias, Maybe key_groups, Tensor v, Tensor out, Tensor lse, Maybe residual_weight,
    Maybe attention_weight, Maybe sink, Word score, double parameter, double scale, bool is_causal, Word rule, bool row_normalize,
    bool need_inputs, Word backend) {
    check_backend(backend);
    const bool by_gradient = place("rule", rule, RULES) == 0, gives_inputs = need_inputs && g;
    check_four(q, k);
    check("key", k, {q.size(0), ANY, q.size(2), q.size(3)}, {q.scalar_type()});
    check("value", v, {q.size(0), k.size(1), q.size(2), ANY}, {q.scalar_type()});
    check_outputs(q, v, out, lse, g, grad_lse);
    check_outputs(q, v, std::nullopt, std::nullopt, grad_behind_sink, std::nullopt);
    check("grad_carrier", grad_carrier, {q.size(0), ANY, q.size(2)}, {ScalarType::Float});
    check("sink", sink, {q.size(0), q.size(1), q.size(2)}, {}, true);
    const Maybe direct = weighed("residual_weight", grad_carrier, residual_weight);
    const Maybe weighted = weighed("attention_weight", grad_carrier, attention_weight);
    // autograd has multiplied dA by the share that a sink leaves to the keys, which A does not have
    const bool through_sink = sink && grad_carrier && (!by_gradient || grad_behind_sink);
    const bool carries = grad_carrier && !through_sink && (g || !by_gradient);
    const Maybe grad_out = gives_inputs || by_gradient ? unit_stride(g) : std::nullopt;
    const Maybe value = grad_out ? Maybe(unit_stride(v)) : std::nullopt;
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    const Abar abar = {
        unit_stride(q), unit_stride(k), value, grad_out, masks, vector, score, parameter, scale, by_gradient, row_normalize};
    Maybe carrier = direct ? Maybe(torch::stable::clone(torch::stable::contiguous(*direct))) : std::nullopt;
    std::optional<Gradients> grads;
    if (gives_inputs) {
        grads.emplace(q, k, v, row_bias);
        Call call = abar.call("score_attention_backward", "grad_out");
        call.strided("out", unit_stride(out)).contiguous("lse", lse).pointer("grad_lse", as(ScalarType::Float, grad_lse));
        grads->set(call);
        // the gradients also compute each head's map: computing it again pays if r passes H of them at more than that costs
        const bool at_once = carries && weighted->size(1) <= 2 * (q.size(3) + v.size(3));
        if (at_once) {
            call.number("relevancy.is_gradient", by_gradient);
            carrier = abar.set_carried(call, "relevancy.", *weighted, direct);
        }
        if (q.size(1) > 0) call.run();
        if (carries && !at_once) carrier = abar.carry(*weighted, direct, std::nullopt, NO_LSE);
    } else if (carries) carrier = abar.carry(*weighted, direct, as(ScalarType::Double, Maybe(lse)), OWN_LSE);
    if (through_sink) {
        const Tensor step =
            relevancy_step(*weighted, q, k, vector, attn_mask, key_mask, row_bias, key_groups, v, grad_behind_sink,
                           aten("aten::logaddexp", "", lse, torch::stable::to(*sink, lse.scalar_type())), score, parameter, scale,
                           is_causal, rule, row_normalize, backend);
        carrier = torch::stable::subtract(*direct, step, -1.0);  // their sum
    }
    const auto of = [&](const Tensor Gradients::* x) { return grads ? (*grads).*x : empty(q, {0}); };
    return {of(&Gradients::query), of(&Gradients::key), of(&Gradients::value), or_empty(carrier, q),
            or_empty(grads ? grads->row_bias : std::nullopt, q)};
}

Tensor attention_map(Tensor q, Tensor k, Maybe vector, Maybe attn_mask, Maybe key_mask, Maybe row_bias, Maybe key_groups, Maybe v,
                     Maybe g, Maybe lse, Word score, double parameter, double scale, bool is_causal, Word rule,
                     Word head_reduction, bool row_normalize, Word backend) {
    check_backend(backend);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    const Abar abar = Abar::of(q, k, v, g, lse, masks, rule, row_normalize, vector, score, parameter, scale);
    const Tensor map = empty(q, {q.size(0), q.size(2), k.size(2)}, ScalarType::Float);
    Call call = abar.call("attention_map", "grad_output");
    call.number("gradient", abar.by_gradient).number("row_normalize", row_normalize);
    call.number("reduction", place("head_reduction", head_reduction, REDUCTIONS));
    call.pointer("lse", as(ScalarType::Double, lse)).pointer("map", map).run();
    return map;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_map_backward(
    Tensor grad, Tensor q, Tensor k, Maybe vector, Maybe attn_mask, Maybe key_mask, Maybe row_bias, Maybe key_groups, Maybe v,
    Maybe g, Maybe lse, Word score, double parameter, double scale, bool is_causal, Word rule, Word head_reduction,
    bool row_normalize, bool need_lse, Word backend) {
    check_backend(backend);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    const Abar abar = Abar::of(q, k, v, g, lse, masks, rule, row_normalize, vector, score, parameter, scale);
    check("grad", grad, {q.size(0), q.size(2), k.size(2)}, {});
    Call call = abar.call("abar_backward", "grad_output");
    call.pointer("grad", as(ScalarType::Float, grad)).number("reduction", place("head_reduction", head_reduction, REDUCTIONS));
    const auto grads = abar_gradients(abar, call, lse, true, need_lse);
    const auto given = [&](const Maybe& x) { return or_empty(x, grad); };
    return {given(grads[0]), given(grads[1]), given(grads[2]), given(grads[3]), given(grads[4]), given(grads[5])};
}

void set_groups(Call& call, const Maybe& key_groups, Size num_groups) {
    STD_TORCH_CHECK(num_groups >= 0, "num_groups must be 0 or more; got ", num_groups);
    if (key_groups) {
        call.pointer("groups.index", key_groups).integer("groups.stride_b", key_groups->stride(0));
        call.integer("groups.stride_m", key_groups->stride(1));
    }
    call.number("groups.count", num_groups);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_statistics(
    Tensor q, Tensor k, Maybe vector, Maybe attn_mask, Maybe key_mask, Maybe row_bias, Maybe key_groups, Maybe row_weight,
    Word score, double parameter, double scale, bool is_causal, int64_t num_groups, Word statistics, Word backend) {
    check_backend(backend);
    check_four(q, k);
    check("row_weight", row_weight, {q.size(0), q.size(1), q.size(2)}, {ScalarType::Float});
    const Tensor query = unit_stride(q), key = unit_stride(k);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    const Size batch = query.size(0), heads = query.size(1), queries = query.size(2);
    const Sizes rows = {batch, heads, queries};
    const Tensor mass = empty(query, {batch, heads, queries, num_groups}, ScalarType::Float);
    const Tensor entropy = empty(query, rows, ScalarType::Float), maximum = empty(query, rows, ScalarType::Float);
    const Tensor argmax = empty(query, rows, ScalarType::Long), max_logit = empty(query, rows, ScalarType::Float);
    const Tensor received =
        (queries ? empty : zeros)(query, {batch, heads, asks(statistics, "received") ? key.size(2) : 0}, ScalarType::Float);
    Call call = attention_call("attention_statistics_forward", query, key, std::nullopt, scale, masks);
    set_core(call, query, score, parameter, vector, std::nullopt, 0.0);
    set_groups(call, key_groups, num_groups);
    call.contiguous("weight", row_weight).pointer("mass", mass).pointer("entropy", entropy);
    call.pointer("maximum", maximum).pointer("argmax", argmax).pointer("max_logit", max_logit);
    call.pointer("received", asks(statistics, "received") ? Maybe(received) : std::nullopt).run();
    const auto none = [&] { return empty(query, {0}, query.scalar_type()); };  // outputs share no memory
    return {asks(statistics, "mass") ? mass : none(),
            asks(statistics, "entropy") ? entropy : none(),
            asks(statistics, "maximum") ? maximum : none(),
            asks(statistics, "argmax") ? argmax : none(),
            asks(statistics, "received") ? received : none(),
            asks(statistics, "max_logit") ? max_logit : none(),
            none(),
            none()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_statistics_backward(
    Maybe grad_mass, Maybe grad_entropy, Maybe grad_maximum, Maybe grad_received, Tensor q, Tensor k, Maybe vector,
    Maybe attn_mask, Maybe key_mask, Maybe row_bias, Maybe key_groups, Maybe, Maybe, Maybe argmax, Maybe, Maybe, Maybe row_weight,
    Word score, double parameter, double scale, bool is_causal, int64_t num_groups, Word, Word backend) {
    check_backend(backend);
    check_four(q, k);
    const Size batch = q.size(0), heads = q.size(1), queries = q.size(2);
    const Sizes rows = {batch, heads, queries};
    check_given("argmax", argmax);
    check("argmax", argmax, rows, {ScalarType::Long}), check("row_weight", row_weight, rows, {ScalarType::Float});
    check("grad_mass", grad_mass, {batch, heads, queries, num_groups}, {ScalarType::Float});
    check("grad_entropy", grad_entropy, rows, {ScalarType::Float});
    check("grad_maximum", grad_maximum, rows, {ScalarType::Float});
    check("grad_received", grad_received, {batch, heads, k.size(2)}, {ScalarType::Float});
    const Tensor query = unit_stride(q), key = unit_stride(k);
    const bool works = heads > 0 && queries > 0;  // the kernel runs over them
    const Tensor grad_query = empty(query, sizes_of(query)), grad_key = (works ? empty : zeros)(key, sizes_of(key), std::nullopt);
    const Maybe grad_weight = zeros_of(row_weight), grad_row_bias = zeros_of(row_bias);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    Call call = attention_call("attention_statistics_backward", query, key, std::nullopt, scale, masks);
    set_core(call, query, score, parameter, vector, std::nullopt, 0.0);
    set_groups(call, key_groups, num_groups);
    call.contiguous("weight", row_weight).contiguous("argmax", argmax).contiguous("d_mass", grad_mass);
    call.contiguous("d_entropy", grad_entropy).contiguous("d_maximum", grad_maximum).contiguous("d_received", grad_received);
    call.strided("d_query", grad_query).strided("d_key", grad_key).pointer("d_weight", grad_weight);
    call.pointer("d_row_bias", grad_row_bias);
    if (works) call.run();
    return {grad_query, grad_key, or_empty(grad_weight, q), or_empty(grad_row_bias, q)};
}

// One of the divergences, forward or backward, but for its outputs
struct Divergence {
    const Tensor query, key, other_query, other_key;
    Call call;
    Divergence(Text name, const Tensor& q, const Tensor& k, const Tensor& other_q, const Tensor& other_k, const Masks& masks,
               bool head_mean, double scale, double other_scale)
        : query(unit_stride(q)),
          key(unit_stride(k)),
          other_query(unit_stride(other_q)),
          other_key(unit_stride(other_k)),
          call(name) {
        check("other_query", other_q, {q.size(0), head_mean ? ANY : q.size(1), q.size(2), ANY}, {q.scalar_type()});
        check("other_key", other_k, {q.size(0), ANY, k.size(2), other_q.size(3)}, {q.scalar_type()});
        set_attention(call, query, key, std::nullopt, scale, masks, shifts_of(query, key, masks), "sides[0].");
        set_attention(call, other_query, other_key, std::nullopt, other_scale, masks, shifts_of(other_query, other_key, masks),
                      "sides[1].");
        call.number("head_mean", head_mean);
    }
    // Of a side's query, key or other tensor, which the kernel writes if it has heads and queries to run over
    Tensor gradient(bool needed, const Tensor& x) const {
        const bool works = query.size(1) > 0 && query.size(2) > 0;
        return needed ? (works ? empty : zeros)(x, sizes_of(x), std::nullopt) : empty(x, {0});
    }
    std::array<Tensor, 2> gradients(Text side, bool needed, const Tensor& q, const Tensor& k) {
        const Tensor grad_query = gradient(needed, q), grad_key = gradient(needed, k);
        if (needed) call.strided("grad_queries[" + side + "]", grad_query).strided("grad_keys[" + side + "]", grad_key);
        return {grad_query, grad_key};
    }
};
Sizes rows_of(const Tensor& query, bool head_mean) { return {query.size(0), head_mean ? 1 : query.size(1), query.size(2)}; }
Divergence attention_divergence_call(const Tensor& query, const Tensor& key, const Tensor& other_query, const Tensor& other_key,
                                     const Masks& masks, Text kind, double beta, bool head_mean, double scale,
                                     double other_scale) {
    check_four(query, key), check_four(other_query, other_key);
    Divergence x("attention_divergence", query, key, other_query, other_key, masks, head_mean, scale, other_scale);
    x.call.number("kind", place("kind", kind, {"kl", "reverse_kl", "js", "hellinger", "total_variation"})).number("beta", beta);
    return x;
}
Tensor attention_divergence(Tensor query, Tensor key, Tensor other_query, Tensor other_key, Maybe attn_mask, Maybe key_mask,
                            Word kind, double beta, bool head_mean, bool is_causal, double scale, double other_scale,
                            Word backend) {
    check_backend(backend);
    const Masks masks = {attn_mask, key_mask, std::nullopt, std::nullopt, is_causal};
    Divergence x =
        attention_divergence_call(query, key, other_query, other_key, masks, kind, beta, head_mean, scale, other_scale);
    const Tensor divergence = empty(query, rows_of(query, head_mean), ScalarType::Float);
    x.call.pointer("divergence", divergence).run();
    return divergence;
}
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_divergence_backward(Tensor grad, Tensor query, Tensor key,
                                                                         Tensor other_query, Tensor other_key, Maybe attn_mask,
                                                                         Maybe key_mask, Maybe divergence, Word kind, double beta,
                                                                         bool head_mean, bool is_causal, double scale,
                                                                         double other_scale, bool need_own, bool need_other,
                                                                         Word backend) {
    check_backend(backend);
    const Masks masks = {attn_mask, key_mask, std::nullopt, std::nullopt, is_causal};
    Divergence x =
        attention_divergence_call(query, key, other_query, other_key, masks, kind, beta, head_mean, scale, other_scale);
    check("grad", grad, rows_of(query, head_mean), {});
    const auto own = x.gradients("0", need_own, query, key), other = x.gradients("1", need_other, other_query, other_key);
    x.call.pointer("grad", as(ScalarType::Float, grad)).run();
    return {own[0], own[1], other[0], other[1]};
}

Tensor of_a_head(const Tensor& key) { return torch::stable::unsqueeze(key, 1); }  // (B, 1, M, Di)
Tensor in_columns(const Tensor& weights) { return torch::stable::unsqueeze(weights, 3); }  // (B, Hi, N, 1)
Divergence indexer_divergence_call(const Tensor& query, const Tensor& key, const Maybe& lse, const Tensor& index_query,
                                   const Tensor& index_key, const Tensor& index_weights, const Maybe& topk_indices,
                                   const Masks& masks, double scale, int64_t key_block) {
    STD_TORCH_CHECK(key_block == 1, "key_block must be 1 for this library");
    check("teacher_lse", lse, {query.size(0), query.size(1), query.size(2)}, {ScalarType::Float});
    check_four(query, key), check_four(index_query, key);
    const Size batch = query.size(0), heads = index_query.size(1), queries = query.size(2);
    check("index_key", index_key, {batch, key.size(2), index_query.size(3)}, {query.scalar_type()});
    check("index_weights", index_weights, {batch, heads, queries}, {query.scalar_type()});
    check("topk_indices", topk_indices, {batch, queries, ANY}, {ScalarType::Int, ScalarType::Long});
    Divergence x("indexer_divergence", query, key, index_query, of_a_head(index_key), masks, true, scale, 1.0);
    x.call.strided("weights", in_columns(index_weights));
    x.call.pointer("topk_indices", as(ScalarType::Long, topk_indices))
        .number("chosen", topk_indices ? topk_indices->size(2) : -1);
    x.call.pointer("lse", as(ScalarType::Float, lse));
    return x;
}
Tensor indexer_divergence(Tensor query, Tensor key, Maybe teacher_lse, Tensor index_query, Tensor index_key, Tensor index_weights,
                          Maybe topk_indices, Maybe attn_mask, Maybe key_mask, bool is_causal, double scale, int64_t key_block,
                          Word backend) {
    check_backend(backend);
    const Masks masks = {attn_mask, key_mask, std::nullopt, std::nullopt, is_causal};
    Divergence x = indexer_divergence_call(
        query, key, teacher_lse, index_query, index_key, index_weights, topk_indices, masks, scale, key_block);
    const Tensor divergence = empty(query, {query.size(0), query.size(2)}, ScalarType::Float);
    x.call.pointer("divergence", divergence).run();
    return divergence;
}
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> indexer_divergence_backward(
    Tensor grad, Tensor query, Tensor key, Maybe teacher_lse, Tensor index_query, Tensor index_key, Tensor index_weights,
    Maybe topk_indices, Maybe attn_mask, Maybe key_mask, bool is_causal, double scale, int64_t key_block, bool need_attention,
    bool need_index, Word backend) {
    check_backend(backend);
    STD_TORCH_CHECK(!need_attention || !teacher_lse, "query and key must be detached with teacher_lse for this library");
    const Masks masks = {attn_mask, key_mask, std::nullopt, std::nullopt, is_causal};
    Divergence x = indexer_divergence_call(
        query, key, teacher_lse, index_query, index_key, index_weights, topk_indices, masks, scale, key_block);
    check("grad", grad, {query.size(0), query.size(2)}, {});
    const auto own = x.gradients("0", need_attention, query, key);
    const Tensor grad_query = x.gradient(need_index, index_query), grad_key = x.gradient(need_index, index_key);
    const Tensor grad_weights = x.gradient(need_index, index_weights);
    if (need_index) {
        x.call.strided("grad_queries[1]", grad_query).strided("grad_keys[1]", of_a_head(grad_key));
        x.call.strided("grad_weights", in_columns(grad_weights));
    }
    x.call.pointer("grad", as(ScalarType::Float, grad)).run();
    return {own[0], own[1], x.gradient(false, grad), grad_query, grad_key, grad_weights};
}

// Of T packed tokens of R requests, over keys in a paged cache.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> paged_attention_statistics(
    Tensor q, Tensor cache, Tensor block_table, Tensor lengths, Tensor query_starts, Maybe key_groups, int64_t num_groups,
    Word statistics, int64_t window, Word score, double parameter, double scale, Word backend) {
    check_backend(backend);
    check("query", q, {ANY, ANY, ANY}, FLOATS);
    check("key_cache", cache, {ANY, ANY, ANY, q.size(2)}, {q.scalar_type()});
    check("block_table", block_table, {ANY, ANY}, {ScalarType::Int, ScalarType::Long});
    check("lengths", lengths, {block_table.size(0)}, {ScalarType::Int, ScalarType::Long});
    check("query_starts", query_starts, {block_table.size(0) + 1}, {ScalarType::Int, ScalarType::Long});
    check("key_groups", key_groups, {block_table.size(0), ANY}, {ScalarType::Int, ScalarType::Long});
    check_heads("key_cache", cache.size(1), q.size(1));
    STD_TORCH_CHECK(cache.size(2) > 0 && window >= 0, "the block size must be above 0, and window 0 or more");
    const Tensor query = unit_stride(q);
    const Size tokens = query.size(0), heads = query.size(1), requests = block_table.size(0), columns = block_table.size(1);
    const Maybe groups = as(ScalarType::Long, key_groups);
    Call call("paged_attention_statistics_forward");
    call.number("dtype", dtype_of(query)).number("T", tokens).number("H", heads).number("Hkv", cache.size(1));
    call.number("D", query.size(2)).number("R", requests).number("blocks", cache.size(0)).number("block_size", cache.size(2));
    call.number("columns", columns).number("window", window).number("scale", scale).number("G", num_groups);
    set_score(call, score, parameter);
    call.pointer("query", query).integer("query_stride_t", query.stride(0)).integer("query_stride_h", query.stride(1));
    call.pointer("cache", cache).integer("stride_block", cache.stride(0)).integer("stride_head", cache.stride(1));
    call.integer("stride_place", cache.stride(2)).integer("stride_d", cache.stride(3));
    call.pointer("table", as(ScalarType::Long, block_table)).pointer("lengths", as(ScalarType::Long, lengths));
    call.pointer("starts", as(ScalarType::Long, query_starts)).pointer("groups", groups);
    call.number("K", groups ? groups->size(1) : 0);
    const auto output = [&](Text name, const Sizes& sizes, double beyond) {  // of tokens of no request, and keys behind a length
        const bool asked = asks(statistics, name);
        const Tensor x = torch::stable::fill_(empty(query, asked ? sizes : Sizes{0}, ScalarType::Float), beyond);
        call.pointer(name, asked ? Maybe(x) : std::nullopt);
        return x;
    };
    const Sizes rows = {tokens, heads};
    const Tensor mass = output("mass", {tokens, heads, num_groups}, 0), entropy = output("entropy", rows, 0);
    const Tensor maximum = output("maximum", rows, 0);
    const Tensor received = output("received", {requests, heads, columns * cache.size(2)}, 0);
    const Tensor max_logit = output("max_logit", rows, -INFINITY), lse = output("lse", rows, -INFINITY);
    call.run();
    return {mass, entropy, maximum, received, max_logit, lse};
}

}  // namespace
