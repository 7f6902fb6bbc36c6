// The CUDA C++ kernels as torch operators, on torch's stable ABI: one library serves every torch from 2.11 on. Nothing else in
// csrc/cuda/ knows torch. Each operator has the schema of its Python operator in vlattn_fast/ops/, without `backend`; there the
// arguments were checked, and vlattn_fast/cuda/ made the last strides 1 and expanded attn_mask to (B,H,N,M).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "congruence_loss.h"
#include "relevancy_attention.h"
#include "score_attention.h"

namespace ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;
using Facts = std::vector<std::pair<const char*, int64_t>>;
using namespace vlattn;

DType dtype_of(const Tensor& x) {
    if (x.scalar_type() == ScalarType::Half) return DType::FLOAT16;
    if (x.scalar_type() == ScalarType::BFloat16) return DType::BFLOAT16;
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "CUDA kernels take float16, bfloat16 and float32");
    return DType::FLOAT32;
}

Rows rows(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }
Rows rows(const Optional& x) { return x ? rows(*x) : Rows{nullptr, 0, 0, 0}; }

template <class T>
T* data(const Tensor& x) {
    return static_cast<T*>(x.data_ptr());
}
template <class T>
T* data(const Optional& x) {
    return x ? data<T>(*x) : nullptr;
}

Tensor make(const Tensor& like, const Sizes& sizes) { return torch::stable::new_empty(like, sizes); }
Tensor make_like(const Tensor& x) { return make(x, {x.size(0), x.size(1), x.size(2), x.size(3)}); }
Tensor make_float(const Tensor& like, const Sizes& sizes) { return torch::stable::new_empty(like, sizes, ScalarType::Float); }

// (B,H,rows,columns) laid out (B,rows,H,columns), as torch's attention does.
Tensor make_rows_first(const Tensor& like, int64_t heads, int64_t rows, int64_t columns, bool wide = false) {
    const Sizes sizes = {like.size(0), rows, heads, columns};
    return torch::stable::transpose(wide ? make_float(like, sizes) : make(like, sizes), 1, 2);
}

Masks masks_of(const Optional& attn_mask, const Optional& key_mask, bool is_causal) {
    Masks masks = {};
    masks.causal = is_causal;
    if (attn_mask) {
        masks.kind = attn_mask->scalar_type() == ScalarType::Bool ? Masks::BOOL : Masks::ADDED;
        masks.pairs = attn_mask->data_ptr();
        masks.batch = attn_mask->stride(0);
        masks.head = attn_mask->stride(1);
        masks.row = attn_mask->stride(2);
        masks.column = attn_mask->stride(3);
    }
    if (key_mask) {
        masks.keys = data<uint8_t>(*key_mask);
        masks.num_keys = key_mask->size(1);
    }
    return masks;
}

// The device and the stream of a call; what goes wrong at a launch is raised with the kernel's name and sizes.
class Launch {
   public:
#ifdef USE_CUDA
    explicit Launch(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {
        void* current = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &current));
        stream_ = static_cast<cudaStream_t>(current);
    }
#else
    explicit Launch(const Tensor&) {}
#endif

    template <class Call>
    void operator()(const char* kernel, cudaError_t (*run)(const Call&, cudaStream_t), const Call& call,
                    const Facts& facts) const {
        const cudaError_t status = run(call, stream_);
        if (status == cudaSuccess) return;
        std::string sizes;
        for (const auto& [name, size] : facts)
            sizes += (sizes.empty() ? "" : ", ") + std::string(name) + "=" + std::to_string(size);
        STD_TORCH_CHECK(false, kernel, "(", sizes, ") on ", DEVICE, " ", device_, ": ", error_string(status));
    }

   private:
#ifdef USE_CUDA
    static constexpr const char* DEVICE = "CUDA device";
    int32_t device_;
    torch::stable::accelerator::DeviceGuard guard_;
#else
    static constexpr const char* DEVICE = "the emulation, device";
    int32_t device_ = 0;
#endif
    cudaStream_t stream_ = nullptr;
};

// ---- score_attention

ScoreAttention describe(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& vector,
                        const Optional& attn_mask, const Optional& key_mask, const std::string& score, double scale,
                        double dropout_p, bool is_causal) {
    STD_TORCH_CHECK(score == "additive" && vector && dropout_p == 0.0, "CUDA kernels take additive scores without dropout");
    ScoreAttention call = {};
    call.dtype = dtype_of(query);
    call.B = query.size(0);
    call.H = query.size(1);
    call.N = query.size(2);
    call.A = static_cast<int>(query.size(3));
    call.key_heads = key.size(1);
    call.M = key.size(2);
    call.value_heads = value.size(1);
    call.DV = static_cast<int>(value.size(3));
    call.query = rows(query);
    call.key = rows(key);
    call.value = rows(value);
    call.vector = vector->data_ptr();
    call.masks = masks_of(attn_mask, key_mask, is_causal);
    call.scale = static_cast<float>(scale);
    return call;
}

Facts facts(const ScoreAttention& call) {
    return {{"B", call.B}, {"H", call.H}, {"N", call.N}, {"M", call.M}, {"A", call.A}, {"DV", call.DV}};
}

std::tuple<Tensor, Tensor> score_attention(Tensor query, Tensor key, Tensor value, Optional vector, Optional attn_mask,
                                           Optional key_mask, Optional, std::string score, double, double scale, double dropout_p,
                                           bool is_causal) {
    ScoreAttention call = describe(query, key, value, vector, attn_mask, key_mask, score, scale, dropout_p, is_causal);
    Launch launch(query);
    Tensor out = make_rows_first(query, call.H, call.N, call.DV), lse = make_float(query, {call.B, call.H, call.N});
    Tensor workspace = make_float(query, {score_attention_workspace(call, false)});
    call.out = rows(out);
    call.lse = data<float>(lse);
    call.workspace = data<float>(workspace);
    launch("score_attention", vlattn::score_attention_forward, call, facts(call));
    return {out, lse};
}

// A gradient with more heads than its tensor, summed over the heads that share one.
Tensor sum_heads(const Tensor& grad, const Tensor& like) {
    if (grad.size(1) == like.size(1)) return grad;
    const Sizes sizes = {grad.size(0), grad.size(2), like.size(1), grad.size(1) / like.size(1), grad.size(3)};
    Tensor parts = torch::stable::view(torch::stable::transpose(grad, 1, 2), sizes);
    Tensor sum = torch::stable::sum(parts, Sizes{3});
    return torch::stable::transpose(torch::stable::to(sum, like.scalar_type()), 1, 2);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> score_attention_backward(Tensor grad_out, Optional grad_lse, Tensor query, Tensor key,
                                                                    Tensor value, Tensor out, Tensor lse, Optional vector,
                                                                    Optional attn_mask, Optional key_mask, Optional,
                                                                    std::string score, double, double scale, double dropout_p,
                                                                    bool is_causal) {
    ScoreAttention call = describe(query, key, value, vector, attn_mask, key_mask, score, scale, dropout_p, is_causal);
    Launch launch(query);
    const int64_t heads = std::max(call.key_heads, call.value_heads);
    call.wide_grad_key = call.key_heads != heads;
    call.wide_grad_value = call.value_heads != heads;
    Tensor grad_query = make_rows_first(query, call.H, call.N, call.A);
    Tensor grad_key = make_rows_first(key, heads, call.M, call.A, call.wide_grad_key);
    Tensor grad_value = make_rows_first(value, heads, call.M, call.DV, call.wide_grad_value);
    Tensor grad_vector = make_float(query, {call.B, call.H, score_attention_blocks(call.M), call.A});
    Tensor workspace = make_float(query, {score_attention_workspace(call, true)});
    call.out = rows(out);
    call.lse = data<float>(lse);
    call.grad_out = rows(grad_out);
    call.grad_lse = data<float>(grad_lse);
    call.grad_query = rows(grad_query);
    call.grad_key = rows(grad_key);
    call.grad_value = rows(grad_value);
    call.grad_vector = data<float>(grad_vector);
    call.workspace = data<float>(workspace);
    launch("score_attention_backward", vlattn::score_attention_backward, call, facts(call));
    Tensor summed = torch::stable::to(torch::stable::sum(grad_vector, Sizes{0, 2}), vector->scalar_type());
    return {grad_query, sum_heads(grad_key, key), sum_heads(grad_value, value), summed};
}

// ---- relevancy_attention

Relevancy describe(const Tensor& query, const Tensor& key, const Optional& value, const Optional& attn_mask,
                   const Optional& key_mask, const std::string& rule, bool row_normalize, double scale, bool is_causal) {
    Relevancy call = {};
    call.dtype = dtype_of(query);
    call.B = query.size(0);
    call.H = query.size(1);
    call.N = query.size(2);
    call.D = static_cast<int>(query.size(3));
    call.key_heads = key.size(1);
    call.M = key.size(2);
    call.DV = value ? static_cast<int>(value->size(3)) : 0;
    call.query = rows(query);
    call.key = rows(key);
    call.value = rows(value);
    call.masks = masks_of(attn_mask, key_mask, is_causal);
    call.scale = static_cast<float>(scale);
    call.by_gradient = rule == "gradient";
    call.row_normalize = row_normalize;
    return call;
}

Facts facts(const Relevancy& call) {
    return {{"B", call.B}, {"H", call.H}, {"N", call.N}, {"M", call.M}, {"D", call.D}, {"DV", call.DV}, {"T", call.T}};
}

// (B,N) or (1,1)
RowWeight weight(const Optional& x) {
    if (!x) return {nullptr, 0, 0};
    return {data<float>(*x), x->size(0) == 1 ? 0 : x->stride(0), x->size(1) == 1 ? 0 : x->stride(1)};
}

std::tuple<Tensor, Tensor, Tensor> relevancy_attention(Tensor query, Tensor key, Tensor value, Tensor carrier, Optional, Optional,
                                                       Optional attn_mask, Optional key_mask, std::string rule,
                                                       bool row_normalize, double scale, bool is_causal) {
    Relevancy call = describe(query, key, value, attn_mask, key_mask, rule, row_normalize, scale, is_causal);
    Launch launch(query);
    Tensor out = make_rows_first(query, call.H, call.N, call.DV), lse = make_float(query, {call.B, call.H, call.N});
    call.out = rows(out);
    call.lse = data<float>(lse);
    launch("relevancy_attention", vlattn::relevancy_forward, call, facts(call));
    return {out, torch::stable::clone(carrier), lse};
}

// What a backward pass and a step share; relevancy is contiguous.
Tensor run_backward(const Launch& launch, const char* name, Relevancy& call, const Optional& relevancy, const Tensor& query) {
    call.T = relevancy ? relevancy->size(1) : 0;
    Tensor r_abar = make_float(query, relevancy ? Sizes{call.B, call.T, call.M} : Sizes{0});
    Tensor workspace = make_float(query, {relevancy_workspace(call)});
    call.relevancy = data<float>(relevancy);
    call.r_abar = data<float>(r_abar);
    call.workspace = data<float>(workspace);
    launch(name, vlattn::relevancy_backward, call, facts(call));
    return r_abar;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relevancy_attention_backward(Optional grad_out, Optional grad_carrier, Tensor query,
                                                                        Tensor key, Tensor value, Tensor out, Tensor lse,
                                                                        Optional residual_weight, Optional attention_weight,
                                                                        Optional attn_mask, Optional key_mask, std::string rule,
                                                                        bool row_normalize, double scale, bool is_causal,
                                                                        bool need_inputs) {
    Relevancy call = describe(query, key, value, attn_mask, key_mask, rule, row_normalize, scale, is_causal);
    Launch launch(query);
    Tensor none = make(query, {0});
    Tensor grad_query = none, grad_key = none, grad_value = none;
    call.out = rows(out);
    // in float32 a rounded lse would be half of the error: it is made again
    call.lse = call.dtype == DType::FLOAT32 ? nullptr : data<float>(lse);
    call.grad_out = rows(grad_out);
    if (need_inputs && grad_out) {
        grad_query = make_rows_first(query, call.H, call.N, call.D);
        grad_key = make_rows_first(key, call.key_heads, call.M, call.D);
        grad_value = make_rows_first(value, call.key_heads, call.M, call.DV);
        call.grad_query = rows(grad_query);
        call.grad_key = rows(grad_key);
        call.grad_value = rows(grad_value);
    }
    call.residual_weight = weight(residual_weight);
    call.attention_weight = weight(attention_weight);
    call.residual = true;
    Tensor r_abar = run_backward(launch, "relevancy_attention_backward", call, grad_carrier, query);
    return {grad_query, grad_key, grad_value, r_abar};
}

Tensor relevancy_step(Tensor relevancy, Tensor query, Tensor key, Optional value, Optional grad_output, Optional lse,
                      Optional attn_mask, Optional key_mask, std::string rule, bool row_normalize, double scale, bool is_causal) {
    Relevancy call = describe(query, key, value, attn_mask, key_mask, rule, row_normalize, scale, is_causal);
    Launch launch(query);
    call.lse = data<float>(lse);
    call.grad_out = rows(grad_output);
    return run_backward(launch, "relevancy_step", call, relevancy, query);
}

// ---- congruence_loss

// queries: text, image, cross text, cross image; keys: text, image, cross image, cross text. So blocks are LL, VV, LV, VL. The
// kernel holds them by 2 * rows + columns, 0 the text and 1 the image.
constexpr int PLACE[4] = {0, 3, 1, 2};

Congruence describe(const std::vector<Tensor>& queries, const std::vector<Tensor>& keys, const Optional& text_mask,
                    const Optional& image_mask, const std::string& kind, const std::string& direction, double scale) {
    STD_TORCH_CHECK(queries.size() == 4 && keys.size() == 4, "congruence_loss takes the queries and keys of four blocks");
    Congruence call = {};
    call.dtype = dtype_of(queries[0]);
    call.kind = kind == "cacr"            ? Congruence::CACR
                : kind == "iais_singular" ? Congruence::IAIS_SINGULAR
                                          : Congruence::IAIS_DISTRIBUTED;
    call.text = direction != "image";
    call.image = direction != "text";
    call.B = queries[0].size(0);
    call.H = queries[0].size(1);
    call.L = queries[0].size(2);
    call.V = queries[1].size(2);
    call.D = static_cast<int>(queries[0].size(3));
    for (int i = 0; i < 4; ++i) {
        call.query[PLACE[i]] = rows(queries[i]);
        call.key[PLACE[i]] = rows(keys[i]);
    }
    call.text_mask = data<uint8_t>(text_mask);
    call.image_mask = data<uint8_t>(image_mask);
    call.scale = static_cast<float>(scale);
    return call;
}

Facts facts(const Congruence& call) { return {{"B", call.B}, {"H", call.H}, {"L", call.L}, {"V", call.V}, {"D", call.D}}; }

Tensor congruence_loss(std::vector<Tensor> queries, std::vector<Tensor> keys, Optional text_mask, Optional image_mask,
                       std::string kind, std::string direction, double scale) {
    Congruence call = describe(queries, keys, text_mask, image_mask, kind, direction, scale);
    Launch launch(queries[0]);
    Tensor loss = make_float(queries[0], {call.B});
    Tensor workspace = make_float(queries[0], {congruence_loss_workspace(call, false)});
    call.loss = data<float>(loss);
    call.workspace = data<float>(workspace);
    launch("congruence_loss", vlattn::congruence_loss_forward, call, facts(call));
    return loss;
}

// Gradients of the blocks LL and VV, or of all four for "iais_distributed".
std::tuple<std::vector<Tensor>, std::vector<Tensor>> congruence_loss_backward(Tensor grad_loss, std::vector<Tensor> queries,
                                                                              std::vector<Tensor> keys, Optional text_mask,
                                                                              Optional image_mask, std::string kind,
                                                                              std::string direction, double scale) {
    Congruence call = describe(queries, keys, text_mask, image_mask, kind, direction, scale);
    Launch launch(queries[0]);
    const int num_gradients = call.kind == Congruence::IAIS_DISTRIBUTED ? 4 : 2;
    std::vector<Tensor> grad_queries, grad_keys;
    for (int i = 0; i < num_gradients; ++i) {
        grad_queries.push_back(make_like(queries[i]));
        grad_keys.push_back(make_like(keys[i]));
        call.grad_query[PLACE[i]] = rows(grad_queries[i]);
        call.grad_key[PLACE[i]] = rows(grad_keys[i]);
    }
    Tensor workspace = make_float(queries[0], {congruence_loss_workspace(call, true)});
    call.grad_loss = data<float>(grad_loss);
    call.workspace = data<float>(workspace);
    launch("congruence_loss_backward", vlattn::congruence_loss_backward, call, facts(call));
    return {grad_queries, grad_keys};
}

}  // namespace ops

STABLE_TORCH_LIBRARY(vlattn_cuda, m) {
    m.def(
        "score_attention(Tensor query, Tensor key, Tensor value, Tensor? vector, Tensor? attn_mask, Tensor? key_mask, "
        "Tensor? seed, str score, float parameter, float scale, float dropout_p, bool is_causal) -> (Tensor out, Tensor lse)");
    m.def(
        "score_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
        "Tensor lse, Tensor? vector, Tensor? attn_mask, Tensor? key_mask, Tensor? seed, str score, float parameter, float scale, "
        "float dropout_p, bool is_causal) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "relevancy_attention(Tensor query, Tensor key, Tensor value, Tensor carrier, Tensor? residual_weight, "
        "Tensor? attention_weight, Tensor? attn_mask, Tensor? key_mask, str rule, bool row_normalize, float scale, "
        "bool is_causal) -> (Tensor out, Tensor carrier_out, Tensor lse)");
    m.def(
        "relevancy_attention_backward(Tensor? grad_out, Tensor? grad_carrier, Tensor query, Tensor key, Tensor value, "
        "Tensor out, Tensor lse, Tensor? residual_weight, Tensor? attention_weight, Tensor? attn_mask, Tensor? key_mask, "
        "str rule, bool row_normalize, float scale, bool is_causal, bool need_inputs) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "relevancy_step(Tensor relevancy, Tensor query, Tensor key, Tensor? value, Tensor? grad_output, Tensor? lse, "
        "Tensor? attn_mask, Tensor? key_mask, str rule, bool row_normalize, float scale, bool is_causal) -> Tensor");
    m.def(
        "congruence_loss(Tensor[] queries, Tensor[] keys, Tensor? text_mask, Tensor? image_mask, str kind, str direction, "
        "float scale) -> Tensor");
    m.def(
        "congruence_loss_backward(Tensor grad_loss, Tensor[] queries, Tensor[] keys, Tensor? text_mask, Tensor? image_mask, "
        "str kind, str direction, float scale) -> (Tensor[] grad_queries, Tensor[] grad_keys)");
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(vlattn_cuda, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(vlattn_cuda, CPU, m) {
#endif
    m.impl("score_attention", TORCH_BOX(&ops::score_attention));
    m.impl("score_attention_backward", TORCH_BOX(&ops::score_attention_backward));
    m.impl("relevancy_attention", TORCH_BOX(&ops::relevancy_attention));
    m.impl("relevancy_attention_backward", TORCH_BOX(&ops::relevancy_attention_backward));
    m.impl("relevancy_step", TORCH_BOX(&ops::relevancy_step));
    m.impl("congruence_loss", TORCH_BOX(&ops::congruence_loss));
    m.impl("congruence_loss_backward", TORCH_BOX(&ops::congruence_loss_backward));
}
