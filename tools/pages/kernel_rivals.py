"""A part of docs/kernels.md: the estimates of plain dot products beside published rates."""

from __future__ import annotations

from tools.pages.kernel_times import Entry, Times, nearest, rate_of
from vlattn_fast.kernels._cudnn import LONG

WITHIN = 1.5

TORCH = """On a GPU `"auto"` takes `sdpa`, torch's own attention, for a plain dot product without log-sum-exp and dropout,
forward and backward. `relevancy_attention` and calls with `return_lse` run our forward pass, with one exception: on sm_90
output and log-sum-exp of long causal calls come from cuDNN, as torch calls it (`kernels/_cudnn.py`: 16 bits, at least {long:,}
tokens, as many keys as queries, heads of 65 to 128, no other mask, cuDNN 9.15.1 or newer, which torch prefers). On an H100 our
forward pass took 284 µs for CLIP, where cuDNN took 292, but 5,962 µs for the causal mask of 16,384 tokens, where cuDNN took
3,405; LLaVA's 704 tokens took 276 forward and backward, where cuDNN took 259. Nothing was measured between 704 and 16,384
tokens. cuDNN makes a plan for each new shape; its time was not measured, and where lengths change a limit of fewer tokens would
gain less. No device has run the exception: tests run it on a stand-in for torch's operator. `triton` in rows of such calls is
cuDNN's time since. All rates are in TFLOP/s. Ours are estimates of our kernels; the others were measured on an H100 in float16,
for the figures of FlashAttention-3's paper:

{table}

- Torch runs FlashAttention-2, and on sm_90 cuDNN from torch 2.11 on. FlashAttention-3 needs a package that is no dependency of
  torch or of ours, and so does FlexAttention's backend FLASH.
- UNITER and ViT-B/16 have 160 and 197 tokens where the rates are of 512. Their tensors alone take more than half of the
  estimates, at the rate of memory.
- The operator by which torch hands out cuDNN's log-sum-exp has a name that may change (`_scaled_dot_product_cudnn_attention`).
  Torch's own ring attention calls it, too. It has no gradient of the log-sum-exp; ours has. FlexAttention and FlashAttention-2
  took 5,364 and 6,466 µs for the 16,384 tokens, so neither is used here.
- The backward pass of `relevancy_attention` has the gradients of its inputs and of the map in the same kernels. With torch's
  kernels for the former the map would be computed once more.

An estimate leaves waits out, and a measured rate does not. `make gpu` times each of SDPA's kernels beside ours."""


def torch_section(times: dict[Entry, Times]) -> list[str]:
    lines = ["| | tokens | ours | FlashAttention-2 | cuDNN | FlashAttention-3 | at tokens |", f"| --- |{' ---: |' * 6}"]
    for entry, of_entry in times.items():
        if (rates := nearest(entry)) is not None:
            shown = f"{rates.tokens:,}{', not causal' if entry.workload.causal and not rates.causal else ''}"
            cells = f"{rate_of(entry, of_entry.estimate):.0f} | {rates.flash2} | {rates.cudnn} | {rates.flash3} | {shown}"
            lines.append(f"| {entry.what.split(', ')[-1]}, {entry.workload.name} | {entry.workload.tokens:,} | {cells} |")
    return ["## Torch's attention for plain dot products", "", *TORCH.format(table="\n".join(lines), long=LONG).splitlines(), ""]


def behind(times: dict[Entry, Times]) -> str:
    """Says which estimates are more than 1.5 times as long as FlashAttention-3 takes."""
    slower = {
        entry: rates.flash3 / rate_of(entry, of_entry.estimate)
        for entry, of_entry in times.items()
        if (rates := nearest(entry)) is not None
    }
    lines = [f"- {entry.what}, {entry.workload.name}: {ratio:.2f}" for entry, ratio in slower.items() if ratio > WITHIN]
    head = f"{len(slower) - len(lines)} of {len(slower)} estimates are at most {WITHIN} times as long as FlashAttention-3 takes"
    if not lines:
        return f"{head}."
    return "\n".join([f"{head}.", "Not so these:", "", *lines])
