// The forward operators of vlattn_fast on the CPU for processes without Python: what AOTInductor and torch.export have packed.
//
// A process that has imported vlattn_fast has the operators already. Others open libvlattn_torch.so, which registers them by
// torch's stable ABI (2.10 or newer), so one library serves every later torch. It opens libvlattn_cpu.so, which lies beside it or
// is named by VLATTN_CPU_LIBRARY, at the first call, and fills each kernel's struct by the names that the kernel says (layout.h).
// Schemas are those of vlattn_fast/ops; what a function does is what vlattn_fast/backends/cpu does.
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

// A string argument. torch's own conversion to std::string loses its copy at each call (2.10 to 2.13), so memory would grow.
struct Word : std::string {
    using std::string::string;
};
template <> struct torch::stable::detail::ToImpl<Word> {
    static Word call(StableIValue value, uint64_t, bool) {
        const StringHandle handle = to<StringHandle>(value);
        const char* data = nullptr;
        size_t length = 0;
        TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
        TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
        const Word word(data, length);
        TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
        return word;
    }
};

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Size = int64_t;
using Sizes = std::vector<Size>;
using Text = const std::string&;

// ---- the library of kernels

class Library {
   public:
    static const Library& opened() {
        static const Library library;
        return library;
    }
    void* find(Text name) const { return dlsym(handle, name.c_str()); }
    // of the instruction set that runs: the first that has the kernel
    void* kernel(Text name, Text behind = "") const {
        for (const std::string& set : sets)
            if (void* function = find("vlattn_" + set + "_" + name + behind)) return function;
        STD_TORCH_CHECK(false, path, " has no kernel ", name, ": it does not fit libvlattn_torch.so, install vlattn_fast again");
        return nullptr;
    }

    // what such a function writes into a buffer
    std::string text(Text name, Text behind = "") const {
        std::vector<char> buffer(1 << 14);
        ((void (*)(char*, int64_t))kernel(name, behind))(buffer.data(), buffer.size());
        return buffer.data();
    }

   private:
    std::string path;
    void* handle;
    std::vector<std::string> sets;

    Library() {
        const char *named = getenv("VLATTN_CPU_LIBRARY"), *chosen = getenv("VLATTN_CPU_ISA");
        Dl_info self;
        dladdr((const void*)&Library::opened, &self);
        const std::string file = self.dli_fname;
        path = named && *named ? named : file.substr(0, file.rfind('/') + 1) + "libvlattn_cpu.so";
        handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        STD_TORCH_CHECK(handle, "the CPU kernels cannot be loaded: ", dlerror(), ". VLATTN_CPU_LIBRARY names libvlattn_cpu.so");
        void* set_threads = find("vlattn_set_threads");
        STD_TORCH_CHECK(set_threads, path, " has no vlattn_set_threads: VLATTN_CPU_LIBRARY must name libvlattn_cpu.so");
        ((void (*)(void*, void*))set_threads)((void*)torch_parallel_for, (void*)torch_get_num_threads);
        std::istringstream words(((const char* (*)())find("vlattn_instruction_sets"))());
        for (std::string set; words >> set;)
            if (sets.size() > 0 || !chosen || !*chosen || set == chosen) sets.push_back(set);
        STD_TORCH_CHECK(!sets.empty(), "VLATTN_CPU_ISA must be an instruction set that this processor runs; got ", chosen);
    }
};

struct Kernel {
    struct Member {
        char code;
        size_t offset;
    };
    int64_t (*run)(const char*);
    std::map<std::string, Member> members;
    size_t size = 0;

    explicit Kernel(Text name) {
        const Library& library = Library::opened();
        run = (int64_t (*)(const char*))library.kernel(name);
        std::istringstream lines(library.text(name, "_fields"));
        for (std::string member, code; lines >> member >> code;) {
            if (member == "size") size = std::stoul(code);
            else lines >> members[member].offset, members[member].code = code[0];
        }
    }
    static const Kernel& named(Text name) {
        static thread_local std::map<std::string, Kernel> kernels;
        return kernels.try_emplace(name, name).first->second;
    }
};

Size dtype_of(const Tensor& x) {
    const ScalarType order[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Bool, ScalarType::Double};
    for (Size n = 0; n < 5; ++n)
        if (x.scalar_type() == order[n]) return n;
    STD_TORCH_CHECK(false, "the CPU kernels take float32, bfloat16, float16, bool or float64; got a tensor of another dtype");
    return 0;
}

// A kernel's struct, zero where nothing is set, and the tensors whose memory it names.
class Call {
   public:
    explicit Call(Text name) : name(name), kernel(Kernel::named(name)), bytes(kernel.size) {}

    Call& number(Text member, double value) {
        const Kernel::Member m = found(member);
        if (m.code == 'd') put(m, value);
        else if (m.code == 'f') put(m, (float)value);
        else if (m.code == 'q') put(m, (int64_t)value);
        else if (m.code == 'i') put(m, (int32_t)value);
        else put(m, value != 0);
        return *this;
    }
    Call& integer(Text member, int64_t value) {  // a seed has more bits than a double
        const Kernel::Member m = found(member);
        return m.code == 'q' ? put(m, value), *this : number(member, (double)value);
    }
    Call& pointer(Text member, const Maybe& x) {
        if (!x) return *this;
        put(found(member), (const void*)x->const_data_ptr());
        held.push_back(*x);
        return *this;
    }
    Call& contiguous(Text member, const Maybe& x) { return x ? pointer(member, torch::stable::contiguous(*x)) : *this; }
    Call& strided(Text member, const Maybe& x) {  // (B, H, N, *) with a last stride of 1
        if (!x) return *this;
        pointer(member + ".data", x);
        integer(member + ".stride_b", x->stride(0)), integer(member + ".stride_h", x->stride(1));
        return integer(member + ".stride_n", x->stride(2));
    }
    void run() { STD_TORCH_CHECK(kernel.run(bytes.data()) == 0, name, ": not enough memory for the kernel's workspace"); }

   private:
    std::string name;
    const Kernel& kernel;
    std::vector<char> bytes;
    std::vector<Tensor> held;

    Kernel::Member found(Text member) const {
        const auto entry = kernel.members.find(member);
        STD_TORCH_CHECK(entry != kernel.members.end(), "the kernel ", name, " has no member ", member,
                        ": libvlattn_cpu.so does not fit libvlattn_torch.so, install vlattn_fast again");
        return entry->second;
    }
    template <class Value> void put(const Kernel::Member& m, Value value) { memcpy(&bytes[m.offset], &value, sizeof value); }
};

// ---- tensors

Tensor unit_stride(const Tensor& x) {
    const Size last = x.dim() - 1;
    STD_TORCH_CHECK(last >= 0, "a tensor must have dimensions; got none");
    return x.stride(last) == 1 || x.size(last) <= 1 ? x : torch::stable::contiguous(x);
}
Maybe unit_stride(const Maybe& x) { return x ? Maybe(unit_stride(*x)) : x; }

Tensor empty(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
    return torch::stable::new_empty(like, sizes, dtype);
}
Tensor zeros(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
    return torch::stable::new_zeros(like, sizes, dtype);
}
// (B, H, N, D) in the memory order (B, N, H, D)
Tensor empty_rows_first(const Tensor& like, Size heads, Size length, Size size) {
    return torch::stable::transpose(empty(like, {like.size(0), length, heads, size}), 1, 2);
}
Maybe as(ScalarType dtype, const Maybe& x) { return x ? Maybe(torch::stable::contiguous(torch::stable::to(*x, dtype))) : x; }
Tensor repeated_heads(const Tensor& x, Size heads) {
    if (x.size(1) == heads) return x;
    STD_TORCH_CHECK(x.size(1) > 0 && heads % x.size(1) == 0,
                    "key and value must have equal numbers of heads, or one a divisor of the ", "other; got ", x.size(1), " and ",
                    heads);
    StableIValue stack[] = {torch::stable::detail::from(x), torch::stable::detail::from(heads / x.size(1)),
                            torch::stable::detail::from(std::optional<int64_t>(1)),
                            torch::stable::detail::from(std::optional<int64_t>())};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::repeat_interleave", "self_int", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}
size_t place(Text name, Text value, std::initializer_list<const char*> values) {
    size_t n = 0;
    for (const char* one : values) {
        if (value == one) return n;
        ++n;
    }
    STD_TORCH_CHECK(false, "the CPU kernels know no ", name, " ", value);
    return n;
}
// Whether the words of `statistics`, with spaces between them, name it
bool asks(Text statistics, Text name) { return (" " + statistics + " ").find(" " + name + " ") != std::string::npos; }
void check_backend(Text backend) {
    STD_TORCH_CHECK(backend == "cpu",
                    "libvlattn_torch.so has the kernels of backend='cpu' alone; this graph was exported with backend='", backend,
                    "'. Export it with backend='cpu', or VLATTN_BACKEND=cpu in the environment");
}

// ---- checks: kernels read memory by the sizes of other tensors, and a package of AOTInductor does not look at its inputs

const Size ANY = -1;
const std::initializer_list<ScalarType> FLOATS = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

std::string shape_of(const Sizes& sizes) {
    std::string text;
    for (const Size size : sizes) text += (text.empty() ? "" : ", ") + (size == ANY ? "any" : std::to_string(size));
    return "(" + text + ")";
}
Sizes sizes_of(const Tensor& x) {
    Sizes sizes;
    for (Size n = 0; n < x.dim(); ++n) sizes.push_back(x.size(n));
    return sizes;
}
// A broadcast tensor may have 1 in the place of a size, and fewer dimensions.
void check(Text name, const Maybe& x, const Sizes& sizes, std::initializer_list<ScalarType> dtypes, bool broadcast = false) {
    if (!x) return;
    const Size missing = (Size)sizes.size() - x->dim();
    bool fits = missing == 0 || (broadcast && missing > 0);
    for (Size n = 0; fits && n < x->dim(); ++n) {
        const Size size = x->size(n), expected = sizes[n + missing];
        fits = size == expected || expected == ANY || (broadcast && size == 1);
    }
    STD_TORCH_CHECK(fits, name, " must have the shape ", shape_of(sizes), "; got ", shape_of(sizes_of(*x)));
    bool known = dtypes.size() == 0;
    for (const ScalarType dtype : dtypes) known = known || x->scalar_type() == dtype;
    STD_TORCH_CHECK(known, name, " has a dtype that this call does not take");
}
void check_heads(Text name, Size key_heads, Size heads) {
    STD_TORCH_CHECK(key_heads == heads || (key_heads > 0 && heads % key_heads == 0), name,
                    "'s number of heads must divide query's ", heads, "; got ", key_heads);
}
void check_given(Text name, const Maybe& x) { STD_TORCH_CHECK(x.has_value(), name, " must be given for this call"); }
void check_values(const Maybe& lengths, Size high) {
    if (!lengths) return;
    const Tensor numbers = torch::stable::contiguous(*lengths);
    for (Size n = 0; n < numbers.numel(); ++n) {
        const int64_t length = ((const int64_t*)numbers.const_data_ptr())[n];
        STD_TORCH_CHECK(length >= 0 && length <= high, "lengths must lie from 0 to ", high, "; got ", length);
    }
}

// ---- attention

void check_four(const Tensor& query, const Tensor& key) {  // dimensions, which other checks read
    check("query", query, {ANY, ANY, ANY, ANY}, FLOATS);
    check("key", key, {ANY, ANY, ANY, ANY}, {});
}

struct Masks {
    const Maybe &mask, &keys, &row_bias, &key_groups;
    bool is_causal;
};

void set_attention(Call& call, const Tensor& query, const Tensor& key, const Maybe& value, double scale, const Masks& masks,
                   const Maybe& shifts) {
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
    call.number("a.dtype", dtype_of(query)).number("a.B", batch).number("a.H", heads).number("a.Hkv", key_heads);
    call.number("a.N", queries).number("a.M", keys).number("a.D", query.size(3)).number("a.Dv", value ? value->size(3) : 0);
    call.number("a.scale", scale).strided("a.query", query).strided("a.key", key).strided("a.value", value);
    call.contiguous("a.masks.keys", masks.keys).number("a.masks.is_causal", masks.is_causal);
    call.pointer("a.masks.shifts", shifts);
    if (masks.row_bias) {
        call.pointer("a.masks.row_bias", as(ScalarType::Float, masks.row_bias))
            .contiguous("a.masks.key_groups", masks.key_groups);
        call.number("a.masks.groups", groups);
    }
    if (!masks.mask) return;
    call.pointer("a.masks.mask", masks.mask).number("a.masks.dtype", dtype_of(*masks.mask));
    const char* names[] = {"stride_b", "stride_h", "stride_n", "stride_m"};
    const Size missing = 4 - masks.mask->dim();
    for (Size n = missing; n < 4; ++n)  // broadcast: a stride of 0
        if (masks.mask->size(n - missing) != 1) call.integer(std::string("a.masks.") + names[n], masks.mask->stride(n - missing));
}

// A call whose first member is the attention.
Call attention_call(Text name, const Tensor& query, const Tensor& key, const Maybe& value, double scale, const Masks& masks) {
    Maybe shifts;
    if (masks.mask && masks.mask->scalar_type() == ScalarType::Double) {
        shifts = empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Double);
        Call find("mask_shifts");
        set_attention(find, query, key, std::nullopt, 1.0, masks, std::nullopt);
        find.pointer("shifts", shifts).run();
    }
    Call call(name);
    set_attention(call, query, key, value, scale, masks, shifts);
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

std::tuple<Tensor, Tensor> attended(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& vector, const Masks& masks,
                                    const Maybe& seed, Text score, double parameter, double scale, double dropout_p) {
    check_four(q, k);
    check("value", v, {ANY, ANY, ANY, ANY}, {});
    const bool by_vector = ScoreKind::named(score).takes_vector;
    if (by_vector) check_given("vector", vector);
    if (by_vector) check("vector", vector, {q.size(1), q.size(3)}, {});
    check("seed", seed, {}, {ScalarType::Long});
    const Size heads = k.size(1) > v.size(1) ? k.size(1) : v.size(1);
    const Tensor query = unit_stride(q), key = unit_stride(repeated_heads(k, heads)),
                 value = unit_stride(repeated_heads(v, heads));
    const Tensor out = empty_rows_first(query, query.size(1), query.size(2), value.size(3));
    const Tensor lse = empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Double);
    Call call = attention_call("score_attention_forward", query, key, value, scale, masks);
    set_score(call, score, parameter);
    call.pointer("score.vector", as(ScalarType::Float, vector)).number("dropout.probability", dropout_p);
    if (seed) call.integer("dropout.seed", *(const int64_t*)seed->const_data_ptr());
    call.strided("out", out).pointer("lse", lse).run();
    return {out, lse};
}

std::tuple<Tensor, Tensor> score_attention(Tensor query, Tensor key, Tensor value, Maybe vector, Maybe attn_mask, Maybe key_mask,
                                           Maybe row_bias, Maybe key_groups, Maybe seed, Maybe, Word score, double parameter,
                                           double scale, double dropout_p, bool is_causal, Word backend) {
    check_backend(backend);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    return attended(query, key, value, vector, masks, seed, score, parameter, scale, dropout_p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relevancy_attention(Tensor query, Tensor key, Tensor value, Tensor carrier, Maybe,
                                                               Maybe, Maybe attn_mask, Maybe key_mask, Maybe row_bias,
                                                               Maybe key_groups, Maybe sink, Word rule, bool, Word score,
                                                               double parameter, double scale, bool is_causal, Word backend) {
    check_backend(backend);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    const auto [out, lse] = attended(query, key, value, std::nullopt, masks, std::nullopt, score, parameter, scale, 0.0);
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

const std::initializer_list<const char*> RULES = {"gradient", "attention"};
const Size NO_LSE = 2, CALLER_LSE = 1;  // LseSource of csrc/cpu/backward_tile.h
const Size FEW_ROWS = 2, FEW_QUERIES = 8;  // as vlattn_fast/backends/cpu/relevancy_attention.py chooses between two kernels

Tensor relevancy_step(Tensor relevancy, Tensor q, Tensor k, Maybe v, Maybe g, Maybe lse, Maybe attn_mask, Maybe key_mask,
                      Maybe row_bias, Maybe key_groups, Word rule, bool row_normalize, Word score, double parameter, double scale,
                      bool is_causal, Word backend) {
    check_backend(backend);
    const bool by_gradient = place("rule", rule, RULES) == 0;
    check_four(q, k);
    check_gradients(by_gradient, q, v, g, lse);
    check("relevancy", relevancy, {q.size(0), ANY, q.size(2)}, {});
    const Tensor query = unit_stride(q), key = unit_stride(k);
    const Maybe value = by_gradient ? unit_stride(v) : std::nullopt, grad = by_gradient ? unit_stride(g) : std::nullopt;
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    const Size batch = relevancy.size(0), rows = relevancy.size(1), queries = query.size(2);
    const Sizes sizes = {batch, rows, key.size(2)};
    const bool works = query.size(1) > 0 && queries > 0;
    const Tensor result = (works ? empty : zeros)(relevancy, sizes, ScalarType::Float);
    const bool by_map = rows > FEW_ROWS || queries <= FEW_QUERIES;
    const std::string within = by_map ? "" : "relevancy.";
    Call call = attention_call(by_map ? "attention_map" : "score_attention_backward", query, key, value, scale, masks);
    set_score(call, score, parameter);
    call.strided(by_map ? "grad_output" : "grad_out", grad).pointer("lse", as(ScalarType::Double, lse));
    if (!by_map) call.number("lse_source", lse ? CALLER_LSE : NO_LSE);
    call.number(by_map ? "gradient" : "relevancy.is_gradient", rule == "gradient");
    call.pointer(within + "rows", as(ScalarType::Float, relevancy)).number(within + "T", rows);
    call.number(within + "row_normalize", row_normalize).pointer(within + "result", result).run();
    return torch::stable::to(result, relevancy.scalar_type());
}

Tensor attention_map(Tensor q, Tensor k, Maybe v, Maybe g, Maybe lse, Maybe attn_mask, Maybe key_mask, Maybe row_bias,
                     Maybe key_groups, Word rule, Word head_reduction, bool row_normalize, Word score, double parameter,
                     double scale, bool is_causal, Word backend) {
    check_backend(backend);
    check_four(q, k);
    check_gradients(place("rule", rule, RULES) == 0, q, v, g, lse);
    const Tensor query = unit_stride(q), key = unit_stride(k);
    const Maybe value = unit_stride(v), grad = unit_stride(g);
    const Masks masks = {attn_mask, key_mask, row_bias, key_groups, is_causal};
    const Tensor map = empty(query, {query.size(0), query.size(2), key.size(2)}, ScalarType::Float);
    Call call = attention_call("attention_map", query, key, value, scale, masks);
    set_score(call, score, parameter);
    call.strided("grad_output", grad).number("gradient", rule == "gradient").number("row_normalize", row_normalize);
    call.number("reduction", place("head_reduction", head_reduction, {"mean", "max", "min"}));
    call.pointer("lse", as(ScalarType::Double, lse)).pointer("map", map).run();
    return map;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_statistics(
    Tensor q, Tensor k, Maybe key_groups, Maybe row_weight, Maybe attn_mask, Maybe key_mask, Maybe row_bias, int64_t num_groups,
    Word statistics, Word score, double parameter, double scale, bool is_causal, Word backend) {
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
    set_score(call, score, parameter);
    if (key_groups) {
        call.pointer("groups.index", key_groups).integer("groups.stride_b", key_groups->stride(0));
        call.integer("groups.stride_m", key_groups->stride(1));
    }
    call.number("groups.count", num_groups).contiguous("weight", row_weight).pointer("mass", mass).pointer("entropy", entropy);
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
    const Tensor query = unit_stride(q), key = unit_stride(k), rows = *as(ScalarType::Float, relevancy);
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

// ---- the other operators

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

std::tuple<Tensor, Tensor> congruence_loss(Tensor text_query, Tensor image_query, Tensor cross_text_query,
                                           Tensor cross_image_query, Tensor text_key, Tensor image_key, Tensor cross_image_key,
                                           Tensor cross_text_key, Maybe text_mask, Maybe image_mask, Word kind, Word direction,
                                           double scale, bool saves, Word backend) {
    check_backend(backend);
    check("text_query", text_query, {ANY, ANY, ANY, ANY}, FLOATS);
    check("image_query", image_query, {ANY, ANY, ANY, ANY}, {});
    const Size batch = text_query.size(0), L = text_query.size(2), V = image_query.size(2);
    Call call("congruence_loss");
    const auto block = [&](const char* kind_of, size_t n, const char* name, const Tensor& x, Size tokens) {
        check(name, x, {batch, text_query.size(1), tokens, text_query.size(3)}, {text_query.scalar_type()});
        call.strided(kind_of + ("[" + std::to_string(n) + "]"), unit_stride(x));
    };
    block("queries", 0, "text_query", text_query, L), block("keys", 0, "text_key", text_key, L);
    block("queries", 1, "image_query", image_query, V), block("keys", 1, "image_key", image_key, V);
    block("queries", 2, "cross_text_query", cross_text_query, L), block("keys", 2, "cross_image_key", cross_image_key, V);
    block("queries", 3, "cross_image_query", cross_image_query, V), block("keys", 3, "cross_text_key", cross_text_key, L);
    check("text_mask", text_mask, {batch, L}, {ScalarType::Bool});
    check("image_mask", image_mask, {batch, V}, {ScalarType::Bool});
    place("direction", direction, {"text", "image", "both"});
    const Tensor loss = empty(text_query, {batch}, ScalarType::Float);
    const Size of_blocks = kind == "iais_distributed" ? 4 : 2;
    const Tensor gradients =
        empty(text_query, {saves ? of_blocks * (text_query.numel() + image_query.numel()) : 0}, ScalarType::Float);
    call.number("dtype", dtype_of(text_query)).number("B", batch).number("H", text_query.size(1)).number("D", text_query.size(3));
    call.number("lengths[0]", L).number("lengths[1]", V).number("scale", scale);
    call.number("kind", place("kind", kind, {"cacr", "iais_singular", "iais_distributed"}));
    call.number("directions[0]", direction != "image").number("directions[1]", direction != "text");
    call.contiguous("masks[0]", text_mask).contiguous("masks[1]", image_mask);
    call.pointer("loss", loss).pointer("gradients", gradients).run();
    return {loss, gradients};
}

Tensor stacked_cross_attention(Tensor images_in, Tensor captions_in, Maybe caption_lengths, Maybe image_lengths, Word direction,
                               std::optional<Word> first_norm, double smooth, Word aggregation, double lambda_lse, Word backend) {
    check_backend(backend);
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
    call.number("dtype", dtype_of(images)).number("D", images.size(2)).number("clips", clips).number("smooth", smooth);
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

// tests/cpu/test_stable_operators.py holds these to the operators of vlattn_fast/ops
#define SCORE "str score, float parameter, float scale, "
#define MASKS "Tensor? attn_mask, Tensor? key_mask, Tensor? row_bias, "
OPERATORS(VLATTN_NAMESPACE, m) {
    m.def("score_attention(Tensor query, Tensor key, Tensor value, Tensor? vector, " MASKS
          "Tensor? key_groups, Tensor? seed, Tensor? sink, " SCORE
          "float dropout_p, bool is_causal, str backend) -> (Tensor out, Tensor lse)");
    m.def(
        "relevancy_attention(Tensor query, Tensor key, Tensor value, Tensor carrier, Tensor? residual_weight, "
        "Tensor? attention_weight, " MASKS "Tensor? key_groups, Tensor? sink, str rule, bool row_normalize, " SCORE
        "bool is_causal, str backend) -> (Tensor out, Tensor carrier_out, Tensor lse, Tensor behind_sink)");
    m.def("relevancy_step(Tensor relevancy, Tensor query, Tensor key, Tensor? value, Tensor? grad_output, Tensor? lse, " MASKS
          "Tensor? key_groups, str rule, bool row_normalize, " SCORE "bool is_causal, str backend) -> Tensor");
    m.def("attention_map(Tensor query, Tensor key, Tensor? value, Tensor? grad_output, Tensor? lse, " MASKS
          "Tensor? key_groups, str rule, str head_reduction, bool row_normalize, " SCORE
          "bool is_causal, str backend) -> Tensor");
    m.def("attention_statistics(Tensor query, Tensor key, Tensor? key_groups, Tensor? row_weight, " MASKS
          "SymInt num_groups, str statistics, " SCORE
          "bool is_causal, str backend) -> (Tensor mass, Tensor entropy, "
          "Tensor maximum, Tensor argmax, Tensor received, Tensor max_logit, Tensor row_max, Tensor mean_x)");
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
        "Tensor? image_mask, str kind, str direction, float scale, bool saves, str backend) -> "
        "(Tensor loss, Tensor gradients)");
    m.def(
        "stacked_cross_attention(Tensor images, Tensor captions, Tensor? caption_lengths, Tensor? image_lengths, "
        "str direction, str? first_norm, float smooth, str aggregation, float lambda_lse, str backend) -> Tensor");
}

OPERATORS_ON(VLATTN_NAMESPACE, CPU, m) {
    m.impl("score_attention", TORCH_BOX(&score_attention));
    m.impl("relevancy_attention", TORCH_BOX(&relevancy_attention));
    m.impl("relevancy_step", TORCH_BOX(&relevancy_step));
    m.impl("attention_map", TORCH_BOX(&attention_map));
    m.impl("attention_statistics", TORCH_BOX(&attention_statistics));
    m.impl("paged_attention_statistics", TORCH_BOX(&paged_attention_statistics));
    m.impl("recurrent_step", TORCH_BOX(&recurrent_step));
    m.impl("group_rows", TORCH_BOX(&group_rows));
    m.impl("maxsim", TORCH_BOX(&maxsim));
    m.impl("congruence_loss", TORCH_BOX(&congruence_loss));
    m.impl("stacked_cross_attention", TORCH_BOX(&stacked_cross_attention));
}
