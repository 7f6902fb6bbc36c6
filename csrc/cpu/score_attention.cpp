// score_attention of every core score: out and the log-sum-exp, and the gradients of queries, keys, values and the units' vector.
//
// Bound: multiply-adds of the tile products (two forward, five backward) for dot products; divisions, one for four hidden units,
// for additive and Hadamard scores. Trick: query rows lie along the lanes, so softmax needs no sums over lanes, and float32 keys
// and values are read where they lie. Measured: rows score_attention of benchmarks/results/cpu.json.
#include "backward.h"

namespace ISA {
namespace {

static Size score_attention_forward(const Forward& c) { return attention_forward(c); }
static Size score_attention_backward(const Backward& c) { return attention_backward(c); }

}  // namespace
}  // namespace ISA

OPERATOR(score_attention_forward, Forward)
OPERATOR(score_attention_backward, Backward)
