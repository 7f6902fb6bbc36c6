// relevancy_attention's backward pass and relevancy_step: r Abar with or without the gradients of queries, keys and values.
// The forward pass is that of score_attention.
//
// Bound: multiply-adds of the tile products, five with the gradients, two without. Trick: r Abar is a product of the tile
// max(P dP, 0), which the backward pass of attention holds, with r: one more row of multiply-adds beside 5 D of them.
// Measured: rows relevancy_attention of benchmarks/results/cpu.json.
#include "backward.h"

namespace ISA {
namespace {

static Size relevancy_attention_backward(const Backward& c) { return attention_backward(c); }

}  // namespace
}  // namespace ISA

OPERATOR(relevancy_attention_backward, Backward)
