"""The passes whose times are estimated, and the sizes of models at which they are."""

from __future__ import annotations

from tools.pages.kernel_times import Entry, Workload

CLIP = Workload("CLIP ViT-L/14@336, batch of 64", 64, 16, 577, 64)
UNITER = Workload("UNITER, batch of 256", 256, 12, 160, 64)
VIT = Workload("ViT-B/16, batch of 64", 64, 12, 197, 64)
LLAVA = Workload("LLaVA-7B, batch of 4", 4, 32, 704, 128, causal=True)
HIGHRES = Workload("16,384 tokens, 32 heads of 128", 1, 32, 16384, 128, causal=True)

FORWARD, BACKWARD = {"_forward_kernel": 4}, {"_backward_q_kernel": 6, "_backward_kv_kernel": 6}
WHOLE_FORWARD, WHOLE_BACKWARD = {"_whole_forward_kernel": 4}, {"_backward_kv_kernel": 8}  # programs of all keys of a head
# with the exponentials of each side in float32; the backward pass reads and writes sums of dQ for each block of keys
UNITS_FORWARD, UNITS_BACKWARD = {"_forward_kernel": 8}, {"_units_backward_kernel": 11}
LONG = {"relevancy_rows_kernel": 2, "relevancy_long_kernel": 9}  # with sums of dQ in float32
ROWS, OF_A_MAP, OF_A_GRADIENT = {"_rows_kernel": 2}, {"_map_kernel": 2}, {"_map_kernel": 4}
# a batch has too few programs, so that parts of the keys are programs of their own
DECODING = [
    Workload(f"A decoder's step, batch of {batch}, 32 heads of which 8 share each of 4 keys", batch, 4, 8192, 128, few_queries=8)
    for batch in (1, 8)
]
TWO_TOKENS = Workload("A decoder's step of two tokens, 32 heads with keys of their own", 1, 32, 8192, 128, few_queries=2)


def _scores() -> list[Entry]:
    entries = []
    for kind, special in (("dot", 1), ("cosine", 1), ("dot_relu", 1), ("dot_tanh", 2), ("dot_sigmoid", 2)):
        call = f"score_attention {kind} bf16 64"
        entries.append(Entry(f"score_attention, {kind}, forward", CLIP, call, FORWARD, 2, 4, special))
        entries.append(Entry(f"score_attention, {kind}, backward", CLIP, call, BACKWARD, 5, 8, special))
    # two hidden units share a reciprocal, or each takes a tanh; backward repeats this, as it recomputes products of q and k
    for kind, special in (("additive", 32.0), ("hadamard_tanh", 64.0)):
        call = f"score_attention {kind} bf16 64"
        entries.append(Entry(f"score_attention, {kind}, forward", CLIP, call, UNITS_FORWARD, 1, 4, special))
        entries.append(Entry(f"score_attention, {kind}, backward", CLIP, call, UNITS_BACKWARD, 2, 8, 2 * special))
    for workload, call, forward, backward in (
        (UNITER, "score_attention dot padded bf16 160 64", WHOLE_FORWARD, WHOLE_BACKWARD),
        (VIT, "score_attention dot bf16 197 64", WHOLE_FORWARD, WHOLE_BACKWARD),
        (LLAVA, "score_attention dot causal bf16 704 128", FORWARD, BACKWARD),
        (HIGHRES, "score_attention dot causal bf16 4096 128", FORWARD, BACKWARD),
    ):
        entries.append(Entry("score_attention, dot, forward", workload, call, forward, 2, 4))
        entries.append(Entry("score_attention, dot, backward", workload, call, backward, 5, 8))
    for workload in DECODING:
        call, kernels = f"score_attention dot decoding {workload.batch} bf16 128", {"_forward_kernel": 2, "_join_kernel": 0}
        entries.append(Entry("score_attention, dot of few queries, forward", workload, call, kernels, 2, 2))
    call = "score_attention dot fp32 64"  # each product is six of bfloat16, and tensors have twice the bytes
    forward, backward = ({kernel: 2 * tensors for kernel, tensors in kernels.items()} for kernels in (FORWARD, BACKWARD))
    entries.append(Entry("score_attention, dot in float32, forward", CLIP, call, forward, 6 * 2, 2 * 4))
    entries.append(Entry("score_attention, dot in float32, backward", CLIP, call, backward, 6 * 5, 2 * 8))
    return entries


ENTRIES = [
    *_scores(),
    Entry("relevancy_attention, backward", CLIP, "relevancy_attention backward bf16 64", BACKWARD, 5, 8),
    Entry("relevancy_attention, backward", UNITER, "relevancy_attention backward 1 rows of 160 bf16 64", WHOLE_BACKWARD, 5, 8),
    Entry("relevancy_attention, backward", LLAVA, "relevancy_attention backward causal bf16 704 128", BACKWARD, 5, 8),
    Entry("relevancy_attention, backward", HIGHRES, "relevancy_attention backward causal bf16 4096 128", BACKWARD, 5, 8),
    *(
        Entry(
            "relevancy_attention, backward in CUDA C++", workload, f"relevancy_attention cuda sm_90 backward {call}", LONG, 5, 8
        )
        for workload, call in ((LLAVA, "causal bf16 704 128"), (HIGHRES, "causal bf16 4096 128"))
    ),
    Entry("relevancy_step, lse given", CLIP, "relevancy_attention step bf16 64", {"_step_kernel": 4}, 2, 4),
    Entry("attention_map, attention", CLIP, "attention_map attention bf16 577 64", ROWS | OF_A_MAP, 1, 2),
    Entry("attention_map, gradient", CLIP, "attention_map gradient bf16 577 64", ROWS | OF_A_GRADIENT, 2, 4),
    Entry("attention_map, attention", UNITER, "attention_map attention bf16 160 64", OF_A_MAP, 1, 2),
    Entry("attention_map, gradient", UNITER, "attention_map gradient bf16 160 64", ROWS | OF_A_GRADIENT, 2, 4),
    Entry("attention_map, log-sum-exp alone", CLIP, "attention_map attention bf16 577 64", ROWS, 1, 2),
    Entry("attention_map, attention, lse given", CLIP, "attention_map attention lse bf16 577 64", OF_A_MAP, 1, 2),
    Entry("attention_map, gradient, lse given", CLIP, "attention_map gradient lse bf16 577 64", OF_A_GRADIENT, 2, 4),
    *(
        entry
        for workload, call in (
            (CLIP, "attention_statistics 2 groups bf16 64"),
            (UNITER, "attention_statistics 2 groups bf16 160 64"),
        )
        for entry in (
            Entry("attention_statistics, 2 groups, forward", workload, call, ROWS | {"_received_kernel": 2}, 1, 2),
            Entry(
                "attention_statistics, 2 groups, backward",
                workload,
                call,
                {"_backward_q_kernel": 3, "_backward_kv_kernel": 3},
                3,
                4,
            ),
        )
    ),
    Entry(
        "attention_statistics, 2 groups, forward",
        TWO_TOKENS,
        "attention_statistics 2 groups decoding bf16 128",
        {"_rows_kernel": 1, "_join_kernel": 0, "_received_kernel": 1},
        1,
        1,
    ),
]
