"""A part of build/compiled/kernels.md: the estimates of plain dot products, compared with published rates."""

from __future__ import annotations

from tools.pages.kernel_times import Entry, Times, nearest, rate_of

WITHIN = 1.5

TORCH = """All rates are in TFLOP/s. Ours are estimates of our kernels; the others were measured on an H100 in float16, for the
figures of FlashAttention-3's paper:

{table}

UNITER and ViT-B/16 have 160 and 197 tokens, and the rates are of 512. Reading and writing their tensors takes more than half of
the estimates, at the rate of memory. An estimate leaves waits out, and a measured rate does not."""


def torch_section(times: dict[Entry, Times]) -> list[str]:
    lines = ["| | tokens | ours | FlashAttention-2 | cuDNN | FlashAttention-3 | at tokens |", f"| --- |{' ---: |' * 6}"]
    for entry, times_of_entry in times.items():
        if (rates := nearest(entry)) is not None:
            shown = f"{rates.tokens:,}{', not causal' if entry.workload.causal and not rates.causal else ''}"
            cells = f"{rate_of(entry, times_of_entry.estimate):.0f} | {rates.flash2} | {rates.cudnn} | {rates.flash3} | {shown}"
            lines.append(f"| {entry.what.split(', ')[-1]}, {entry.workload.name} | {entry.workload.tokens:,} | {cells} |")
    return ["## Torch's attention for plain dot products", "", *TORCH.format(table="\n".join(lines)).splitlines(), ""]


def slower_estimates(times: dict[Entry, Times]) -> str:
    """Says which estimates are more than 1.5 times as long as FlashAttention-3 takes."""
    slower = {
        entry: rates.flash3 / rate_of(entry, times_of_entry.estimate)
        for entry, times_of_entry in times.items()
        if (rates := nearest(entry)) is not None
    }
    lines = [f"- {entry.what}, {entry.workload.name}: {ratio:.2f}" for entry, ratio in slower.items() if ratio > WITHIN]
    head = f"{len(slower) - len(lines)} of {len(slower)} estimates are at most {WITHIN} times as long as FlashAttention-3 takes"
    if not lines:
        return f"{head}."
    return "\n".join([f"{head}.", "These take longer:", "", *lines])
