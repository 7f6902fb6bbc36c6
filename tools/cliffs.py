"""Times random calls of the operators: the best backend that `auto` does not take, over `auto`.

    python -m tools.cliffs [--minutes 5] [--seed 0] [--out FOLDER]

A call is an operator with random sizes, dtype and masks, forward or forward and backward. Its baselines are every other backend
that supports the call, and the formula with whole maps, in eager torch; for dot products torch's attention is the backend `sdpa`.
All run in turns, and the smallest time counts; if `auto` is much slower, all run again. The twenty calls in which `auto` is
slowest in comparison are printed and stored. So are attention and relevancy at sizes of models in bfloat16, whose baseline is
`auto` in float32.
"""

from __future__ import annotations

import argparse
import inspect
import random
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlattn_fast._ground.origin import device_name
from vlattn_fast.benchmarks._measure import backends
from vlattn_fast.benchmarks._records import RESULTS, append, provenance, slug
from vlattn_fast.benchmarks._run import check_device
from vlattn_fast.checking.cases import Example, Sizes, cases_of
from vlattn_fast.dispatch.choice import load
from vlattn_fast.ops import OPERATORS

MINUTES, WORST, BEHIND = 5.0, 20, 1.3
SECONDS, ROUNDS = 0.3, (3, 25)  # of a variant: at most, unless it takes more than that three times
WORK = 1 << 31  # products of numbers in a head's logits, at most
MAPS = 1 << 24  # pairs of queries and keys, up to which the formula runs
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
DIMS = (16, 32, 40, 64, 64, 64, 80, 96, 128, 128, 192, 256, 257)
MASKS = ("none", "none", "none", "key", "causal", "bool", "float")
IN_FLOAT32 = "auto in float32"
# batch, heads, tokens, features of a head: CLIP, UNITER, LLaVA, and a long sequence
MODELS = ((1, 16, 577, 64), (8, 12, 160, 64), (1, 32, 704, 128), (1, 4, 4096, 64))
PASSES = (("score_attention", False), ("score_attention", True), ("relevancy_attention", True))


def draw(operator: str, dice: random.Random, device: torch.device) -> tuple[Example, dict[str, Any]]:
    """A random call of the operator, and what the record says of it. Sizes are drawn evenly by their logarithms."""

    def size(low: int, high: int) -> int:
        return round(low * (high / low) ** dice.random())

    cases = cases_of(operator)
    dtype, d, masks = dice.choice(DTYPES), dice.choice(DIMS), dice.choice(MASKS)
    b, h, n, t = size(1, 8), dice.choice((1, 2, 4, 8, 12, 16)), dice.choice((1, *(size(8, 3000) for _ in range(7)))), size(1, 300)
    m = n if dice.random() < 0.6 else size(1, 20000)
    fit = getattr(cases, "fit", lambda sizes: sizes)
    n, m = fit(Sizes(n, m))[:2]
    while b * h * n * m * d > WORK:
        b, n, m = (b, max(n // 2, 1), n // 2 if m == n else m // 2) if b == 1 else (b // 2, n, m)
        m = max(m, 1)
    sizes = fit(Sizes(n, m, d, d, batch=b, heads=h, rows=t))
    with device:
        example = cases.cliff(sizes, dice) if hasattr(cases, "cliff") else next(cases.host(sizes))
        takes_masks = "attn_mask" in inspect.signature(example.call).parameters
        options = {**example.options, **(_masks(masks, b, n, m) if takes_masks else {})}
    example = replace(example, tensors=example.in_dtype(dtype, device), options=options)
    facts = {"dtype": str(dtype).removeprefix("torch."), "B": b, "H": h, "N": n, "M": m, "D": d}
    carried = OPERATORS[operator].describe(**example.arguments(example.tensors)).sizes.get("rows")
    facts |= {"T": carried} if carried else {}
    facts |= {"mask": masks} if takes_masks else {}
    return example, facts | {name: x for name, x in example.options.items() if isinstance(x, str)}


def _masks(masks: str, b: int, n: int, m: int) -> dict[str, Any]:
    if masks == "key":
        return {"key_mask": torch.arange(m).expand(b, -1) < max(3 * m // 4, 1)}
    if masks == "causal":
        return {"is_causal": n == m}
    visible = torch.rand(b, 1, n, m) > 0.3
    floats = torch.zeros(b, 1, n, m).masked_fill(~visible, -torch.inf)
    return {"bool": {"attn_mask": visible}, "float": {"attn_mask": floats}}.get(masks, {})


def has_gradients(operator: str) -> bool:
    return hasattr(load(OPERATORS[operator].backends, "streaming"), "backward")


def runs(example: Example, both: bool) -> dict[str, Callable[[], None]]:
    """`auto` and its baselines, forward or forward and backward."""

    def run(call: Callable[..., Any]) -> None:
        if not both or not has_gradients(example.operator):
            with torch.no_grad():
                call(**example.arguments(example.tensors))
            return
        leaves = {name: x.detach().requires_grad_() for name, x in example.tensors.items()}
        out = call(**example.arguments(leaves))
        outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor) and x.requires_grad]
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(x) for x in outputs], allow_unused=True)

    _, *baselines = backends(example.operator, example.arguments(example.tensors))
    variants = {name: partial(run, partial(example.call, backend=name)) for name in ("auto", *baselines)}
    return {**variants, "reference": partial(run, OPERATORS[example.operator].formula)}


def times(variants: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds: the smallest of several rounds, in turns. A variant is dropped that takes ten times as long as the fastest."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(ROUNDS[1]):
        fastest = min((min(spent) for spent in seconds.values() if spent), default=0.0)
        for name, run in variants.items():
            slow = number > 1 and min(seconds[name]) > 10 * fastest
            if slow or (number >= ROUNDS[0] and sum(seconds[name]) > SECONDS):
                continue
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(spent) for name, spent in seconds.items()}


def measure(device: torch.device, minutes: float, seed: int) -> list[dict[str, Any]]:
    """A record for each call, the worst first."""
    dice, end = random.Random(seed), time.monotonic() + 60 * minutes
    records: list[dict[str, Any]] = []
    operators = list(OPERATORS)
    while time.monotonic() < end or not records:
        operator, both = dice.choice(operators), dice.random() < 0.5
        both = both and has_gradients(operator)
        example, facts = draw(operator, dice, device)
        variants = runs(example, both)
        pairs = facts["B"] * facts["H"] * facts["N"] * max(facts["N"], facts["M"])
        if pairs > (MAPS if operator != "recurrent_step" else MAPS // facts["D"]):  # whose formula holds a state for each pair
            del variants["reference"]
        spent = times(variants)
        if spent["auto"] > BEHIND * min(spent.values()):  # a busy moment, or a cliff
            spent = {name: min(spent[name], again) for name, again in times(variants).items()}
        auto = spent.pop("auto")
        baseline = min(spent, key=lambda name: spent[name], default="")
        if baseline:
            facts |= {"pass": "forward+backward" if both else "forward", "baseline": baseline, "auto_us": round(auto * 1e6, 1)}
            records.append({"cliff": operator, **facts, "ratio": round(auto / spent[baseline], 3)})
    return sorted(records, key=lambda record: -record["ratio"])


def beside_float32(device: torch.device) -> list[dict[str, Any]]:
    """A record for each pass of a model's attention: the call in bfloat16 over the same call in float32."""
    records = []
    for b, h, n, d in MODELS:
        for operator, both in PASSES:
            with device:
                example = next(cases_of(operator).host(Sizes(n, n, d, d, batch=b, heads=h, rows=1)))
            calls = {
                dtype: replace(example, tensors=example.in_dtype(dtype, device)) for dtype in (torch.bfloat16, torch.float32)
            }
            spent = times({str(dtype): runs(call, both)["auto"] for dtype, call in calls.items()})
            half, single = (spent[str(dtype)] for dtype in calls)
            facts = {"dtype": "bfloat16", "B": b, "H": h, "N": n, "M": n, "D": d, "mask": "none"}
            facts |= {"pass": "forward+backward" if both else "forward", "baseline": IN_FLOAT32, "auto_us": round(half * 1e6, 1)}
            records.append({"cliff": operator, **facts, "ratio": round(half / single, 3)})
    return records


def show(records: list[dict[str, Any]]) -> None:
    for record in records:
        facts = ", ".join(f"{name} {x}" for name, x in record.items() if name not in ("cliff", "ratio", "auto_us", "baseline"))
        print(f"{record['ratio']:6.2f}  {record['auto_us'] / 1e3:10.3f} ms  {record['baseline']:10}  {record['cliff']}: {facts}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.cliffs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="Device. Default: cpu.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"Time limit. Default: {MINUTES:.0f}.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the calls. Default: 0.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of cliffs-<device>.json, which records are added to")
    options = parser.parse_args(arguments)
    place = check_device(options.device)
    records = measure(place, options.minutes, options.seed)
    behind = sum(record["ratio"] > BEHIND for record in records)
    slower = f"auto takes more than {BEHIND} times the time of its best baseline in {behind}"
    print(f"{len(records)} calls; {slower}\n\nauto over baseline:")
    show(records[:WORST])
    halves = beside_float32(place)
    print("\nbfloat16 over float32:")
    show(halves)
    origin = {"device": device_name(place), "calls": len(records), "behind": behind}
    origin |= provenance(shlex.join(["python", "-m", "tools.cliffs", *arguments]))
    append([{**record, **origin} for record in records[:WORST] + halves], options.out / f"cliffs-{slug(place)}.json")


if __name__ == "__main__":
    main(sys.argv[1:])
