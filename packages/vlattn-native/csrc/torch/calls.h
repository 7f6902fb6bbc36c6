// Calls of the CPU kernels for operators of torch's stable ABI: the library of kernels, their structs, tensors and checks.
//
// libvlattn_torch.so opens libvlattn_cpu.so, which lies beside it or is named by VLATTN_CPU_LIBRARY, at the first call, and fills
// each kernel's struct by the names that the kernel says (csrc/layout.h of vlattn_fast).
#pragma once
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
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
        STD_TORCH_CHECK(false, path, " has no kernel ", name,
                        ": it does not fit libvlattn_torch.so, install vlattn_fast and vlattn-native again");
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
                        ": libvlattn_cpu.so does not fit libvlattn_torch.so, install vlattn_fast and vlattn-native again");
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

Sizes sizes_of(const Tensor& x) {
    Sizes sizes;
    for (Size n = 0; n < x.dim(); ++n) sizes.push_back(x.size(n));
    return sizes;
}
Tensor empty(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
    return torch::stable::new_empty(like, sizes, dtype);
}
Tensor zeros(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
    return torch::stable::new_zeros(like, sizes, dtype);
}
// Zeros that a kernel adds a gradient to
Maybe zeros_of(const Maybe& x) { return x ? Maybe(zeros(*x, sizes_of(*x), ScalarType::Float)) : x; }
// (B, H, N, D) in the memory order (B, N, H, D)
Tensor empty_rows_first(const Tensor& like, Size heads, Size length, Size size) {
    return torch::stable::transpose(empty(like, {like.size(0), length, heads, size}), 1, 2);
}
// An operator of torch
template <class... Inputs> Tensor aten(const char* name, const char* overload, const Inputs&... inputs) {
    StableIValue stack[] = {torch::stable::detail::from(inputs)...};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}
Tensor as(ScalarType dtype, const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, dtype)); }
Maybe as(ScalarType dtype, const Maybe& x) { return x ? Maybe(as(dtype, *x)) : x; }
Tensor repeated_heads(const Tensor& x, Size heads) {
    if (x.size(1) == heads) return x;
    STD_TORCH_CHECK(x.size(1) > 0 && heads % x.size(1) == 0,
                    "key and value must have equal numbers of heads, or one a divisor of the ", "other; got ", x.size(1), " and ",
                    heads);
    return aten("aten::repeat_interleave", "self_int", x, heads / x.size(1), std::optional<int64_t>(1), std::optional<int64_t>());
}
// The gradient of repeated_heads: sums over the heads that share one
Tensor summed_heads(const Tensor& grad, Size heads) {
    if (grad.size(1) == heads) return grad;
    const Tensor parts = torch::stable::view(grad, {grad.size(0), heads, grad.size(1) / heads, grad.size(2), grad.size(3)});
    const Sizes shared = {2};
    Tensor sums = empty_rows_first(grad, heads, grad.size(2), grad.size(3));
    torch::stable::copy_(sums, torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(shared)));
    return sums;
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
const std::initializer_list<const char*> RULES = {"gradient", "attention"}, REDUCTIONS = {"mean", "max", "min"};

}  // namespace
