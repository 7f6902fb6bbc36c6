"""Calls of an operator on emulated PTX, in a process whose Triton kernels are compiled."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from tests.helpers.ops import core_cases, jvp_cases
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example, Sizes
from vlattn_fast.checking.tolerance import settle
from vlattn_fast.ops import OPERATORS

# more keys than a tile of congruence_loss or attention_map has; the last tile of attention_statistics has 32 queries
LONG = Sizes(queries=20, keys=140)
MANY = Sizes(queries=530, keys=590)  # tiles are copied by tensor descriptors, and the last ones are not full
FEW = Sizes(queries=2, keys=1030)  # whose keys are split
ONE_ROW = Sizes(queries=220, keys=520, rows=1)  # of so many keys its products run ahead on sm_90
CALLED = {90: torch.bfloat16, 80: torch.float16}  # the dtype by architecture


def calls_of(operator: str, architecture: int) -> Iterator[Example]:
    """Those of `vlattn verify`, one with rows longer than a tile, one of few queries, and one with a float mask; the latter
    take kernels of their own.

    Compiling takes nearly all of the time. So sm_90 has the first third of those of `vlattn verify` and sm_80 the others, which
    launch the same kernels. Kernels of maps run in one call alone, on both, and one call has a backward pass, with all of it; the
    sink of statistics has kernels of its own, on both, too. So have a bias of groups and chosen keys.
    """
    verified = [case for case in verify.cases(operators=[operator]) if _runs(case, architecture)]
    if operator not in ("attention_map", "attention_statistics"):
        third = -(-len(verified) // 3)
        apart = [case for case in verified[third:] if "group_bias" in case.tensors or "topk_indices" in case.options]
        verified = verified[:third] + apart if architecture == 90 else verified[third:]
    for case in (*verified, *_longer(operator)):
        backward = "largest" in case.name if operator == "attention_map" else case.name != "one row"
        yield replace(case, differentiable=case.differentiable and backward)


def _runs(case: Example, architecture: int) -> bool:
    """Triton has no score of stacked_cross_attention but a dot product."""
    return not OPERATORS[case.operator].refusals("triton", case.arguments(case.in_dtype(CALLED[architecture])))


def _longer(operator: str) -> Iterator[Example]:
    case = verify.cases(sizes=LONG, operators=[operator])[0]
    yield replace(case, name=f"{case.name}, long")
    if operator in ("score_attention", "attention_statistics"):
        few = next(one for one in verify.cases(sizes=FEW, operators=[operator]) if not one.options.get("is_causal"))
        yield replace(few, name="few queries")
    if operator == "relevancy_attention":
        yield replace(verify.cases(sizes=ONE_ROW, operators=["relevancy_step"])[0], name="one row")
    if operator in ("relevancy_attention", "attention_map"):
        yield replace(case, name="float mask", options={**case.options, "attn_mask": _mask_for(case.tensors)})


def _mask_for(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    queries, keys = (tensors[name].shape[-2] for name in ("query", "key"))
    return torch.randn(queries, keys, generator=torch.Generator().manual_seed(0))


def ratios(operator: str, architecture: int, names: tuple[str, ...]) -> tuple[dict[str, float], set[str]]:
    """The worst error of each of these calls (none: of all) as a multiple of the allowed one, and the kernels that ran. A finding
    raises."""
    import tools.emulated.triton
    from tools.emulated.package import options_of_process

    torch.set_num_threads(1)
    with tools.emulated.triton.emulated(architecture, options_of_process()) as launches:
        worst: dict[str, float] = {}
        if operator == "core_scores":
            worst |= core_cases.ratios("additive" if architecture == 90 else "cosine-eps=5", CALLED[architecture])
        for case in () if operator == "core_scores" else calls_of(operator, architecture):
            if names and case.name not in names:
                continue
            errors = settle(verify._Problem(case, CALLED[architecture], "cpu").runs("triton"), enough=lambda: 1)
            worst[case.name] = max(one.ratio() for one in errors.values())
        if operator == "score_attention" and not names:
            from vlattn_fast.kernels import score_attention

            worst |= jvp_cases.ratios(score_attention, CALLED[architecture])
    return worst, {launch.name for launch in launches}


def by_descriptors(architecture: int) -> dict[str, tuple[float, bool]]:
    """Calls of many tokens: the worst error as in `ratios`, and whether instructions copied whole tiles. A finding raises."""
    import tools.emulated.triton
    from tools.emulated.package import options_of_process

    torch.set_num_threads(1)
    outcomes = {}
    with tools.emulated.triton.emulated(architecture, options_of_process()) as launches:
        for case in verify.cases(sizes=MANY, operators=["score_attention"]):
            if case.name not in ("scaled_dot causal", "softcap and sink"):
                continue
            wide = {name: torch.randn(*case.tensors[name].shape[:-1], 128) for name in ("query", "key", "value")}
            tensors = case.tensors | wide  # which alone have scores ahead
            problem = verify._Problem(replace(case, tensors=tensors, differentiable=False), torch.bfloat16, "cpu")
            errors = settle(problem.runs("triton"), enough=lambda: 1)
            program = launches[-1].program
            assert program is not None and launches[-1].name == "score_attention._forward_kernel"
            outcomes[case.name] = max(one.ratio() for one in errors.values()), "cp.async.bulk.tensor.4d" in program.text
    return outcomes


def hidden_tiles() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Out and gradients under a group bias that hides keys between others, in whole tiles of NaN values, and those expected."""
    import tools.emulated.triton
    import vlattn_fast as va
    from tools.emulated.package import options_of_process

    torch.set_num_threads(1)
    query, key, value = (torch.randn(1, 1, rows, 16).bfloat16() for rows in (20, 400, 400))
    columns = torch.bucketize(torch.arange(400), torch.tensor([64, 320]), right=True)
    table = torch.randn(1, 1, 3).index_fill(2, torch.tensor([1]), -torch.inf)
    groups = {"query_groups": torch.zeros(20, dtype=torch.int64), "key_groups": columns, "group_bias": table}
    results = []
    for operator, hidden in ((va.score_attention, torch.nan), (va.reference.score_attention, 0.0)):
        with tools.emulated.triton.emulated(90, options_of_process()):
            leaves = [x.clone().requires_grad_() for x in (query, key, value.index_fill(2, torch.arange(128, 256), hidden))]
            out = operator(*leaves, **groups, backend="triton") if operator is va.score_attention else operator(*leaves, **groups)
            results.append([x.detach().float() for x in (out, *torch.autograd.grad(out.float().square().sum(), leaves))])
    return results[0], results[1]
