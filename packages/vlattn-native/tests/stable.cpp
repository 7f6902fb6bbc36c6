// A program without Python: it opens the library of its first argument and calls two operators by torch's dispatcher.
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

using torch::stable::Tensor;

namespace test {

using torch::stable::detail::from;
using torch::stable::detail::to;

static Tensor tensor(std::vector<int64_t> sizes, float* numbers) {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    Tensor x = torch::stable::empty(sizes, torch::headeronly::ScalarType::Float);
    for (int64_t n = 0; n < count; ++n) ((float*)x.mutable_data_ptr())[n] = numbers[n];
    return x;
}

static int run(char** arguments) {
    if (!dlopen(arguments[1], RTLD_NOW)) return fprintf(stderr, "%s\n", dlerror()), 1;
    // maxsim of one query of two tokens and one document of three: 4 + 3
    float query[] = {1, 0, 0, 1}, document[] = {4, -1, 2, 3, -5, 2};
    std::optional<Tensor> none;
    StableIValue pairs[] = {
        from(tensor({1, 2, 2}, query)), from(tensor({1, 3, 2}, document)), from(none), from(none), from(false),
        from(std::string("cpu"))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("vlattn::maxsim", "", pairs, TORCH_ABI_VERSION));
    const float similarity = *(const float*)to<Tensor>(pairs[0]).const_data_ptr();
    to<Tensor>(pairs[1]);
    // attention of one query over two keys with logits 0 and log 3: 1/4 and 3/4 of the values 8 and 4
    float one[] = {1}, keys[] = {0, logf(3)}, values[] = {8, 4};
    StableIValue row[] = {from(tensor({1, 1, 1, 1}, one)),
                          from(tensor({1, 1, 2, 1}, keys)),
                          from(none),
                          from(none),
                          from(none),
                          from(none),
                          from(none),
                          from(tensor({1, 1, 2, 1}, values)),
                          from(none),
                          from(none),
                          from(std::string("dot")),
                          from(0.0),
                          from(1.0),
                          from(false),
                          from(0.0),
                          from(std::string("cpu"))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("vlattn::score_attention", "", row, TORCH_ABI_VERSION));
    const float out = *(const float*)to<Tensor>(row[0]).const_data_ptr();
    const double lse = *(const double*)to<Tensor>(row[1]).const_data_ptr();
    printf("%.6f %.6f %.6f\n", similarity, out, lse);
    return 0;
}

}  // namespace test

int main(int, char** arguments) { return test::run(arguments); }
