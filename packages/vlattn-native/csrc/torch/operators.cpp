// The operators of vlattn_fast on the CPU for the kernel hub, and for processes without Python: what AOTInductor and torch.export
// have packed. Attention, both divergences and congruence_loss have their backward operators; autograd, which calls them, stays
// in Python.
//
// A process that has imported vlattn_fast has the operators already. Others open libvlattn_torch.so, which registers them by
// torch's stable ABI (2.10 or newer), so one library serves every later torch. Schemas are those of vlattn_fast/ops; what a
// function does is what vlattn_fast/backends/cpu does.
#include "attention.h"

namespace {

Tensor recurrent_step(Tensor relevancy, Tensor q, Tensor k, Maybe v, Maybe g, Maybe log_decay, Maybe beta, Maybe diagonal,
                      int64_t num_heads, Word rule, bool row_normalize, Word backend) {
    check_backend(backend);
    const bool by_gradient = place("rule", rule, RULES) == 0;
    check("query", q, {ANY, ANY, ANY, ANY}, FLOATS);
    const Size batch = q.size(0), length = q.size(2), size = q.size(3);
    check("key", k, {batch, ANY, length, size}, {q.scalar_type()});
    for (const Size heads : {q.size(1), k.size(1)})
        STD_TORCH_CHECK(heads == num_heads || (heads > 0 && num_heads > 0 && num_heads % heads == 0),
                        "the numbers of heads of query and key must divide ", num_heads, "; got ", heads);
    const Sizes gates = {batch, num_heads, length};
    check("relevancy", relevancy, {batch, ANY, length}, {}), check("beta", beta, gates, {}),
        check("diagonal", diagonal, gates, {});
    const bool per_feature = log_decay && log_decay->dim() == 4;
    check("log_decay", log_decay, per_feature ? Sizes{batch, num_heads, length, size} : gates, {});
    if (by_gradient) {
        check_given("value", v), check_given("grad_output", g);
        check("value", v, {batch, num_heads, length, ANY}, {q.scalar_type()});
        check("grad_output", g, {batch, num_heads, length, v->size(3)}, {q.scalar_type()});
    }
    const Tensor query = unit_stride(q), key = unit_stride(k), rows = as(ScalarType::Float, relevancy);
    const Maybe value = by_gradient ? unit_stride(v) : std::nullopt, grad = by_gradient ? unit_stride(g) : std::nullopt;
    const Tensor result = empty(rows, sizes_of(rows));
    Call call("recurrent_step_forward");
    call.number("dtype", dtype_of(query)).number("B", batch).number("H", num_heads).number("Hq", q.size(1));
    call.number("Hk", k.size(1)).number("N", length).number("D", size).number("Dv", value ? value->size(3) : 0);
    call.number("T", rows.size(1)).number("gradient", by_gradient).number("row_normalize", row_normalize);
    call.number("decays", log_decay ? per_feature ? size : 1 : 0).strided("query", query).strided("key", key);
    call.strided("value", value).strided("grad_output", grad).pointer("log_decay", as(ScalarType::Float, log_decay));
    call.pointer("beta", as(ScalarType::Float, beta)).pointer("diagonal", as(ScalarType::Float, diagonal));
    call.pointer("relevancy", rows).pointer("result", result).run();
    return torch::stable::to(result, relevancy.scalar_type());
}

// Of each query's group its row of the table; zeros for a group out of range.
Tensor group_rows(Tensor table_in, Tensor groups_in) {
    check("table", table_in, {ANY, ANY, ANY, ANY}, {});
    check("groups", groups_in, {table_in.size(0), ANY}, {ScalarType::Long});
    const Tensor table = torch::stable::contiguous(table_in), groups = torch::stable::contiguous(groups_in);
    const Size batch = table.size(0), heads = table.size(1), count = table.size(2), queries = groups.size(1);
    const size_t bytes = table.size(3) * table.element_size();
    const Tensor rows = zeros(table, {batch, heads, queries, table.size(3)});
    const char* from = (const char*)table.const_data_ptr();
    char* to = (char*)rows.mutable_data_ptr();
    const int64_t* group = (const int64_t*)groups.const_data_ptr();
    for (Size bh = 0; bh < batch * heads; ++bh)
        for (Size n = 0; n < queries; ++n) {
            const int64_t g = group[bh / heads * queries + n];
            if (g >= 0 && g < count && bytes > 0) memcpy(to + (bh * queries + n) * bytes, from + (bh * count + g) * bytes, bytes);
        }
    return rows;
}

std::tuple<Tensor, Tensor> maxsim(Tensor queries_in, Tensor documents_in, Maybe query_mask, Maybe document_mask, bool saves,
                                  Word backend) {
    check_backend(backend);
    check("queries", queries_in, {ANY, ANY, ANY}, FLOATS);
    check("documents", documents_in, {ANY, ANY, queries_in.size(2)}, {queries_in.scalar_type()});
    check("query_mask", query_mask, {queries_in.size(0), queries_in.size(1)}, {ScalarType::Bool});
    check("document_mask", document_mask, {documents_in.size(0), documents_in.size(1)}, {ScalarType::Bool});
    const Tensor queries = unit_stride(queries_in), documents = unit_stride(documents_in);
    const Tensor similarity = empty(queries, {queries.size(0), documents.size(0)}, ScalarType::Float);
    const Sizes sizes = saves ? Sizes{queries.size(0), documents.size(0), queries.size(1)} : Sizes{0};
    const Tensor places = empty(queries, sizes, ScalarType::Int);
    Call call("maxsim_forward");
    call.number("dtype", dtype_of(queries)).number("D", queries.size(2));
    const auto side = [&](Text name, const Tensor& x, const Maybe& mask) {
        call.pointer(name + ".data", x).number(name + ".count", x.size(0)).number(name + ".tokens", x.size(1));
        call.integer(name + ".stride_set", x.stride(0))
            .integer(name + ".stride_token", x.stride(1))
            .contiguous(name + ".mask", mask);
    };
    side("query", queries, query_mask), side("document", documents, document_mask);
    call.pointer("similarity", similarity).pointer("places", saves ? Maybe(places) : std::nullopt).run();
    return {similarity, places};
}

// Queries and keys of the blocks LL, VV, LV and VL
const char* const BLOCKS[] = {"text_query", "image_query", "cross_text_query", "cross_image_query",
                              "text_key",   "image_key",   "cross_image_key",  "cross_text_key"};
using Blocks = std::array<Tensor, 8>;

void check_blocks(const Blocks& blocks, const Maybe& text_mask, const Maybe& image_mask) {
    const Tensor &text = blocks[0], &image = blocks[1];
    check(BLOCKS[0], text, {ANY, ANY, ANY, ANY}, FLOATS), check(BLOCKS[1], image, {ANY, ANY, ANY, ANY}, {});
    for (size_t i = 0; i < 8; ++i) {
        const Size tokens = (strstr(BLOCKS[i], "text") ? text : image).size(2);
        check(BLOCKS[i], blocks[i], {text.size(0), text.size(1), tokens, text.size(3)}, {text.scalar_type()});
    }
    check("text_mask", text_mask, {text.size(0), text.size(2)}, {ScalarType::Bool});
    check("image_mask", image_mask, {text.size(0), image.size(2)}, {ScalarType::Bool});
}
// How many of four blocks have gradients
Size gradients_of(Text kind) { return place("kind", kind, {"cacr", "iais_singular", "iais_distributed"}) == 2 ? 4 : 2; }

std::tuple<Tensor, Tensor> congruence_loss(Tensor text_query, Tensor image_query, Tensor cross_text_query,
                                           Tensor cross_image_query, Tensor text_key, Tensor image_key, Tensor cross_image_key,
                                           Tensor cross_text_key, Maybe text_mask, Maybe image_mask, Word kind, Word normalize,
                                           Word direction, double scale, bool saves, Word backend) {
    check_backend(backend);
    const Blocks blocks = {
        text_query, image_query, cross_text_query, cross_image_query, text_key, image_key, cross_image_key, cross_text_key};
    check_blocks(blocks, text_mask, image_mask);
    const Size batch = text_query.size(0), L = text_query.size(2), V = image_query.size(2);
    Call call("congruence_loss");
    for (size_t i = 0; i < 8; ++i)
        call.strided((i < 4 ? "queries[" : "keys[") + std::to_string(i % 4) + "]", unit_stride(blocks[i]));
    place("direction", direction, {"text", "image", "both"});
    const Tensor loss = empty(text_query, {batch}, ScalarType::Float);
    const Size numbers = gradients_of(kind) * (text_query.numel() + image_query.numel());
    const Tensor gradients = empty(text_query, {saves ? numbers : 0}, ScalarType::Float);
    call.number("dtype", dtype_of(text_query)).number("B", batch).number("H", text_query.size(1)).number("D", text_query.size(3));
    call.number("lengths[0]", L).number("lengths[1]", V).number("scale", scale);
    call.number("kind", place("kind", kind, {"cacr", "iais_singular", "iais_distributed"}));
    call.number("as_they_are", place("normalize", normalize, {"softmax", "none"}));
    call.number("directions[0]", direction != "image").number("directions[1]", direction != "text");
    call.contiguous("masks[0]", text_mask).contiguous("masks[1]", image_mask);
    call.pointer("loss", loss).pointer("gradients", gradients).run();
    return {loss, gradients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> congruence_loss_backward(
    Tensor grad_loss, Tensor saved, Tensor text_query, Tensor image_query, Tensor cross_text_query, Tensor cross_image_query,
    Tensor text_key, Tensor image_key, Tensor cross_image_key, Tensor cross_text_key, Maybe text_mask, Maybe image_mask,
    Word kind, Word normalize, Word direction, double scale, Word backend) {
    check_backend(backend);
    const Blocks blocks = {
        text_query, image_query, cross_text_query, cross_image_query, text_key, image_key, cross_image_key, cross_text_key};
    check_blocks(blocks, text_mask, image_mask);
    const Size batch = text_query.size(0), n = gradients_of(kind);
    check("grad_loss", grad_loss, {batch}, {});
    Tensor gradients = saved;
    if (saved.numel() == 0)  // torch.func.vmap saves none
        gradients = std::get<1>(congruence_loss(text_query, image_query, cross_text_query, cross_image_query, text_key, image_key,
                                                cross_image_key, cross_text_key, text_mask, image_mask, kind, normalize,
                                                direction, scale, true, backend));
    check("gradients", gradients, {n * (text_query.numel() + image_query.numel())}, {ScalarType::Float});
    const Tensor factor = torch::stable::view(as(ScalarType::Float, grad_loss), {batch, 1, 1, 1});
    Blocks grads = {empty(grad_loss, {0}), empty(grad_loss, {0}), empty(grad_loss, {0}), empty(grad_loss, {0}),
                    empty(grad_loss, {0}), empty(grad_loss, {0}), empty(grad_loss, {0}), empty(grad_loss, {0})};
    Size first = 0;
    for (Size i = 0; i < 8; ++i) {
        if (i % 4 >= n) continue;
        const Tensor& x = blocks[i];
        const Tensor part = torch::stable::view(torch::stable::narrow(gradients, 0, first, x.numel()), sizes_of(x));
        grads[i] = torch::stable::to(aten("aten::mul", "Tensor", part, factor), x.scalar_type());
        first += x.numel();
    }
    return std::tuple_cat(grads);
}

Tensor stacked_cross_attention(Tensor images_in, Tensor captions_in, Maybe caption_lengths, Maybe image_lengths, Size features,
                               Word direction, std::optional<Word> first_norm, double smooth, Word aggregation, double lambda_lse,
                               Word backend) {
    check_backend(backend);
    STD_TORCH_CHECK(0 <= features && features <= images_in.size(2), "features must be among the columns; got ", features);
    check("images", images_in, {ANY, ANY, ANY}, FLOATS);
    check("captions", captions_in, {ANY, ANY, images_in.size(2)}, {images_in.scalar_type()});
    check("caption_lengths", caption_lengths, {captions_in.size(0)}, {ScalarType::Long});
    check("image_lengths", image_lengths, {images_in.size(0)}, {ScalarType::Long});
    check_values(caption_lengths, captions_in.size(1)), check_values(image_lengths, images_in.size(1));
    place("direction", direction, {"t2i", "i2t"});
    const Tensor images = unit_stride(images_in), captions = unit_stride(captions_in);
    const Tensor similarity = empty(images, {images.size(0), captions.size(0)}, ScalarType::Float);
    const bool clips = first_norm && first_norm->rfind("clipped", 0) == 0;
    const std::string norm = !first_norm || *first_norm == "clipped" ? "" : first_norm->substr(clips ? strlen("clipped_") : 0);
    Call call("stacked_cross_attention_forward");
    call.number("dtype", dtype_of(images))
        .number("D", images.size(2) - features)
        .number("F", features)
        .number("clips", clips)
        .number("smooth", smooth);
    call.number("norm", place("first_norm", norm, {"", "softmax", "l2norm", "l1norm"})).number("lambda_lse", lambda_lse);
    call.number("aggregation", place("aggregation", aggregation, {"logsumexp", "max", "sum", "mean"}));
    const auto side = [&](Text name, Text stride, const Tensor& x, const Maybe& lengths, Size stride_of_pairs) {
        call.pointer(name + ".data", x).number(name + ".count", x.size(0)).number(name + ".rows", x.size(1));
        call.integer(name + ".stride_set", x.stride(0)).integer(name + ".stride_row", x.stride(1));
        call.contiguous(name + ".lengths", lengths).integer(stride, stride_of_pairs);
    };
    const bool captions_ask = direction == "t2i";
    side(captions_ask ? "context" : "query", captions_ask ? "stride_x" : "stride_y", images, image_lengths, similarity.stride(0));
    side(captions_ask ? "query" : "context", captions_ask ? "stride_y" : "stride_x", captions, caption_lengths,
         similarity.stride(1));
    call.pointer("similarity", similarity).run();
    return similarity;
}

}  // namespace

// VLATTN_NAMESPACE: another one where operators of several versions meet in a process. The macros of torch do not expand it.
#ifndef VLATTN_NAMESPACE
#define VLATTN_NAMESPACE vlattn
#endif
#define OPERATORS(space, m) STABLE_TORCH_LIBRARY(space, m)
#define OPERATORS_ON(space, device, m) STABLE_TORCH_LIBRARY_IMPL(space, device, m)

// tests/test_stable_operators.py holds these to the operators of vlattn_fast/ops
#define TENSORS \
    "Tensor query, Tensor key, Tensor? vector, Tensor? attn_mask, Tensor? key_mask, Tensor? row_bias, Tensor? key_groups, "
#define SCORE "str score, float parameter, float scale, "
#define OPTIONS SCORE "bool is_causal, "
OPERATORS(VLATTN_NAMESPACE, m) {
    m.def("score_attention(" TENSORS "Tensor value, Tensor? seed, Tensor? sink, " OPTIONS
          "float dropout_p, str backend) -> (Tensor out, Tensor lse)");
    m.def("score_attention_backward(Tensor grad_out, Tensor? grad_lse, " TENSORS
          "Tensor value, Tensor out, Tensor lse, Tensor? seed, " OPTIONS
          "float dropout_p, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def("relevancy_attention(" TENSORS
          "Tensor value, Tensor carrier, Tensor? residual_weight, Tensor? attention_weight, Tensor? sink, " OPTIONS
          "str rule, bool row_normalize, str backend) -> (Tensor out, Tensor carrier_out, Tensor lse, Tensor behind_sink)");
    m.def(
        "relevancy_attention_backward(Tensor? grad_out, Tensor? grad_carrier, Tensor? grad_lse, Tensor? "
        "grad_behind_sink, " TENSORS
        "Tensor value, Tensor out, Tensor lse, Tensor? residual_weight, Tensor? attention_weight, Tensor? sink, " OPTIONS
        "str rule, bool row_normalize, bool need_inputs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def("relevancy_step(Tensor relevancy, " TENSORS "Tensor? value, Tensor? grad_output, Tensor? lse, " OPTIONS
          "str rule, bool row_normalize, str backend) -> Tensor");
    m.def("relevancy_step_backward(Tensor grad, Tensor relevancy, " TENSORS
          "Tensor? value, Tensor? grad_output, Tensor? lse, " OPTIONS
          "str rule, bool row_normalize, bool need_relevancy, bool need_inputs, bool need_lse, str backend) -> "
          "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def("attention_map(" TENSORS "Tensor? value, Tensor? grad_output, Tensor? lse, " OPTIONS
          "str rule, str head_reduction, bool row_normalize, str backend) -> Tensor");
    m.def("attention_map_backward(Tensor grad, " TENSORS "Tensor? value, Tensor? grad_output, Tensor? lse, " OPTIONS
          "str rule, str head_reduction, bool row_normalize, bool need_lse, str backend) -> "
          "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def("attention_statistics(" TENSORS "Tensor? row_weight, " OPTIONS
          "SymInt num_groups, str statistics, str backend) -> (Tensor mass, Tensor entropy, "
          "Tensor maximum, Tensor argmax, Tensor received, Tensor max_logit, Tensor row_max, Tensor mean_x)");
    m.def(
        "attention_statistics_backward(Tensor? grad_mass, Tensor? grad_entropy, Tensor? grad_maximum, Tensor? "
        "grad_received, " TENSORS
        "Tensor? mass, Tensor? maximum, Tensor? argmax, Tensor? row_max, Tensor? mean_x, Tensor? row_weight, " OPTIONS
        "SymInt num_groups, str statistics, str backend) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "attention_divergence(Tensor query, Tensor key, Tensor other_query, Tensor other_key, Tensor? attn_mask, "
        "Tensor? key_mask, str kind, float beta, bool head_mean, bool is_causal, float scale, float other_scale, str backend) "
        "-> Tensor");
    m.def(
        "attention_divergence_backward(Tensor grad, Tensor query, Tensor key, Tensor other_query, Tensor other_key, "
        "Tensor? attn_mask, Tensor? key_mask, Tensor? divergence, str kind, float beta, bool head_mean, bool is_causal, "
        "float scale, float other_scale, bool need_own, bool need_other, str backend) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "indexer_divergence(Tensor query, Tensor key, Tensor? teacher_lse, Tensor index_query, Tensor index_key, "
        "Tensor index_weights, Tensor? topk_indices, Tensor? attn_mask, Tensor? key_mask, bool is_causal, float scale, "
        "SymInt key_block, str backend) -> Tensor");
    m.def(
        "indexer_divergence_backward(Tensor grad, Tensor query, Tensor key, Tensor? teacher_lse, Tensor index_query, "
        "Tensor index_key, Tensor index_weights, Tensor? topk_indices, Tensor? attn_mask, Tensor? key_mask, bool is_causal, "
        "float scale, SymInt key_block, bool need_attention, bool need_index, str backend) -> (Tensor, Tensor, Tensor, Tensor, "
        "Tensor, Tensor)");
    m.def(
        "paged_attention_statistics(Tensor query, Tensor key_cache, Tensor block_table, Tensor lengths, Tensor query_starts, "
        "Tensor? key_groups, SymInt num_groups, str statistics, SymInt window, " SCORE
        "str backend) -> (Tensor mass, Tensor entropy, Tensor maximum, Tensor received, Tensor max_logit, Tensor lse)");
    m.def(
        "recurrent_step(Tensor relevancy, Tensor query, Tensor key, Tensor? value, Tensor? grad_output, Tensor? log_decay, "
        "Tensor? beta, Tensor? diagonal, SymInt num_heads, str rule, bool row_normalize, str backend) -> Tensor");
    m.def("group_rows(Tensor table, Tensor groups) -> Tensor");
    m.def(
        "maxsim(Tensor queries, Tensor documents, Tensor? query_mask, Tensor? document_mask, bool saves, str backend) -> "
        "(Tensor similarity, Tensor places)");
    m.def(
        "congruence_loss(Tensor text_query, Tensor image_query, Tensor cross_text_query, Tensor cross_image_query, "
        "Tensor text_key, Tensor image_key, Tensor cross_image_key, Tensor cross_text_key, Tensor? text_mask, "
        "Tensor? image_mask, str kind, str normalize, str direction, float scale, bool saves, str backend) -> "
        "(Tensor loss, Tensor gradients)");
    m.def(
        "congruence_loss_backward(Tensor grad_loss, Tensor gradients, Tensor text_query, Tensor image_query, "
        "Tensor cross_text_query, Tensor cross_image_query, Tensor text_key, Tensor image_key, Tensor cross_image_key, "
        "Tensor cross_text_key, Tensor? text_mask, Tensor? image_mask, str kind, str normalize, str direction, float scale, "
        "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "stacked_cross_attention(Tensor images, Tensor captions, Tensor? caption_lengths, Tensor? image_lengths, "
        "SymInt features, str direction, str? first_norm, float smooth, str aggregation, float lambda_lse, str backend) -> "
        "Tensor");
}

OPERATORS_ON(VLATTN_NAMESPACE, CPU, m) {
    m.impl("score_attention", TORCH_BOX(&score_attention));
    m.impl("score_attention_backward", TORCH_BOX(&score_attention_backward));
    m.impl("relevancy_attention", TORCH_BOX(&relevancy_attention));
    m.impl("relevancy_attention_backward", TORCH_BOX(&relevancy_attention_backward));
    m.impl("relevancy_step", TORCH_BOX(&relevancy_step));
    m.impl("relevancy_step_backward", TORCH_BOX(&relevancy_step_backward));
    m.impl("attention_map", TORCH_BOX(&attention_map));
    m.impl("attention_map_backward", TORCH_BOX(&attention_map_backward));
    m.impl("attention_statistics", TORCH_BOX(&attention_statistics));
    m.impl("attention_statistics_backward", TORCH_BOX(&attention_statistics_backward));
    m.impl("attention_divergence", TORCH_BOX(&attention_divergence));
    m.impl("attention_divergence_backward", TORCH_BOX(&attention_divergence_backward));
    m.impl("indexer_divergence", TORCH_BOX(&indexer_divergence));
    m.impl("indexer_divergence_backward", TORCH_BOX(&indexer_divergence_backward));
    m.impl("paged_attention_statistics", TORCH_BOX(&paged_attention_statistics));
    m.impl("recurrent_step", TORCH_BOX(&recurrent_step));
    m.impl("group_rows", TORCH_BOX(&group_rows));
    m.impl("maxsim", TORCH_BOX(&maxsim));
    m.impl("congruence_loss", TORCH_BOX(&congruence_loss));
    m.impl("congruence_loss_backward", TORCH_BOX(&congruence_loss_backward));
    m.impl("stacked_cross_attention", TORCH_BOX(&stacked_cross_attention));
}
