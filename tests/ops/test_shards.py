"""Operators on DTensors that two processes share: outputs and gradients are those of whole tensors, with the same placements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.two_ranks import results_of
from vlattn_fast._ground.extras import missing

pytest.importorskip("torch.distributed.tensor")
B, H, N, M, D = 3, 4, 5, 6, 8


def ways(name: str) -> tuple[str, ...]:
    return ("batch", "whole") if name == "relevancy_residual" else ("batch", "heads", "whole")


def tensors(*, keys: int = M, heads: int = H) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (B, H, N, D),
        "key": (B, heads, keys, D),
        "value": (B, heads, keys, D - 2),
        "grad_output": (B, H, N, D - 2),
    }
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def rows(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


KEY_MASK = torch.ones(B, M, dtype=torch.bool)
KEY_MASK[1, 4:] = False
ATTN_MASK = rows(B, 1, N, M)
HEAD_MASK = rows(1, H, N, M) > 0.3


def gradients(query: Any, key: Any, value: Any, **options: Any) -> tuple[Any, ...]:
    """Those of score_attention, which have gradients."""
    out, lse = va.score_attention(query, key, value, return_lse=True, **options)
    return torch.autograd.grad(out.square().sum() + lse.sin().sum(), [query, key, value], create_graph=True)


def calls() -> dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]]:
    """The operator of each call, its arguments, and which of them have a gradient."""
    maps = tensors()
    attends = {name: x for name, x in maps.items() if name != "grad_output"}
    square = {name: x for name, x in tensors(keys=N).items() if name != "grad_output"}
    grouped = {name: x for name, x in tensors(keys=N, heads=2).items() if name != "grad_output"}
    scored = {"query": maps["query"], "key": maps["key"]}
    carried = {**square, "carrier": rows(B, 2, N), "residual_weight": rows(B, N), "attention_weight": 0.7}
    of_carried, of_step = ("query", "key", "value", "carrier"), ("relevancy", *maps)
    groups = torch.tensor([0, 1, 1, 0, 2, -1])
    twice = {"score_attention, twice": (gradients, {**attends, "key_mask": KEY_MASK}, ("query", "key", "value"))}
    if missing("torch", 2, 10):  # whose DTensor has no second derivatives
        twice = {}
    return {
        "score_attention": (va.score_attention, {**attends, "key_mask": KEY_MASK, "return_lse": True}, ("query", "key", "value")),
        "score_attention, masks": (va.score_attention, {**attends, "attn_mask": HEAD_MASK}, ("query", "key", "value")),
        "score_attention, grouped": (
            va.score_attention,
            {**grouped, "enable_gqa": True, "score": "cosine"},
            ("query", "key", "value"),
        ),
        **twice,
        "score_attention, softcap and sink": (
            va.score_attention,
            {**attends, "softcap": 1.5, "sink": rows(H), "return_lse": True},
            ("query", "key", "value", "sink"),
        ),
        "relevancy_attention, softcap and sink": (
            va.relevancy_attention,
            {**carried, "softcap": 1.5, "sink": rows(H), "rule": "attention", "row_normalize": True},
            (*of_carried, "sink"),
        ),
        "attention_map, softcap and sink": (
            va.attention_map,
            {**scored, "softcap": 1.5, "sink": rows(H)},
            ("query", "key", "sink"),
        ),
        "relevancy_attention": (va.relevancy_attention, carried, of_carried),
        "relevancy_attention, normalized": (
            va.relevancy_attention,
            {**carried, "row_normalize": True, "is_causal": True},
            of_carried,
        ),
        "relevancy_attention, rollout": (
            va.relevancy_attention,
            {**grouped, "carrier": rows(B, 2, N), "rule": "attention", "enable_gqa": True},
            of_carried,
        ),
        "relevancy_step": (va.relevancy_step, {"relevancy": rows(B, 2, N), **maps, "attn_mask": ATTN_MASK}, of_step),
        "relevancy_step, normalized": (va.relevancy_step, {"relevancy": rows(B, 2, N), **maps, "row_normalize": True}, of_step),
        "attention_map": (va.attention_map, {**scored, "key_mask": KEY_MASK}, tuple(scored)),
        "attention_map, gradient": (va.attention_map, {**maps, "rule": "gradient", "row_normalize": True}, tuple(maps)),
        "attention_map, max": (
            va.attention_map,
            {**maps, "rule": "gradient", "head_reduction": "max", "row_normalize": True},
            tuple(maps),
        ),
        "attention_statistics": (
            va.attention_statistics,
            {**scored, "key_groups": groups, "num_groups": 3, "row_weight": rows(B, N)},
            ("query", "key", "row_weight"),
        ),
        "attention_statistics, softcap and sink": (
            va.attention_statistics,
            {**scored, "key_groups": groups, "num_groups": 3, "softcap": 1.5, "sink": rows(H)},
            ("query", "key", "sink"),
        ),
        **grouped_calls(attends, carried, maps, scored),
        "relevancy_residual": (
            va.relevancy_residual,
            {name: rows(B, N, N) + i for i, name in enumerate(("residual", "branch", "residual_carrier", "branch_carrier"))},
            ("residual", "branch", "residual_carrier", "branch_carrier"),
        ),
    }


def grouped_calls(attends: Any, carried: Any, maps: Any, scored: Any) -> dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]]:
    """Calls with a bias of groups and gates of heads, for each sample or for all."""
    bias = rows(B, H, 2, 3)
    bias[0, 1, 1, 2] = -torch.inf
    of_keys, of_tokens = torch.tensor([0, 1, 1, 0, 2, -1]), torch.tensor([2, 1, 0, -1, 0])
    of_queries = torch.arange(B * N).view(B, N) % 3 - 1
    groups = {"query_groups": of_queries, "key_groups": of_keys, "group_bias": bias}
    alike = {"query_groups": of_queries[0], "key_groups": of_tokens.expand(B, N), "group_bias": bias[0]}
    leaves = "query", "key", "group_bias"
    return {
        "score_attention, groups": (
            va.score_attention,
            {**attends, **groups, "head_gate": rows(H)},
            (*leaves, "value", "head_gate"),
        ),
        "relevancy_attention, groups": (
            va.relevancy_attention,
            {**carried, **alike, "head_gate": rows(B, H) + 1, "row_normalize": True},
            (*leaves, "value", "carrier", "head_gate"),
        ),
        "relevancy_step, groups": (
            va.relevancy_step,
            {"relevancy": rows(B, 2, N), **maps, **groups},
            ("relevancy", "value", "grad_output", *leaves),
        ),
        "attention_map, groups": (va.attention_map, {**scored, **groups, "head_reduction": "max"}, leaves),
        "attention_statistics, groups": (va.attention_statistics, {**scored, **groups}, leaves),
    }


def results(operator: Any, arguments: dict[str, Any], differentiable: tuple[str, ...]) -> dict[str, Tensor]:
    """Outputs, and gradients of a sum with weights of its own for each output."""
    inputs = {name: x.requires_grad_(name in differentiable) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    outputs = operator(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if differentiable:
        total = sum((x * (i + 1.5)).square().sum() for i, x in enumerate(outputs) if x.requires_grad)
        grads = torch.autograd.grad(total, [inputs[name] for name in differentiable])
        found |= {f"gradient of {name}": x for name, x in zip(differentiable, grads, strict=True)}
    return found


def on_two_ranks() -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, (operator, arguments, differentiable) in calls().items():
        for way in ways(name):
            divided = dict(arguments)
            for each, x in arguments.items():
                if isinstance(x, Tensor):
                    # only what leads the call is divided from the start; the operator cuts what is replicated
                    dim = {"batch": 0, "heads": 1, "whole": None}[way]
                    main = each in ("query", "key", "residual") and dim is not None
                    divided[each] = distribute_tensor(x.detach(), mesh, [Shard(dim) if main else Replicate()])
            for each, x in results(operator, divided, differentiable).items():
                assert isinstance(x, DTensor) and not any(p.is_partial() for p in x.placements), (name, way, each)
                if way != "whole" and each == "output 0" and operator in (va.score_attention, va.relevancy_attention):
                    assert x.placements == (Shard({"batch": 0, "heads": 1}[way]),), (name, way, x.placements)
                found[f"{name}|{way}|{each}"] = x.full_tensor()
    return found


def refused() -> dict[str, Tensor]:
    """Wrong calls; each rank checks the messages, and returns how many they were."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, x = init_device_mesh("cpu", (2,)), tensors(keys=N)

    def on(name: str, *placements: Any) -> Any:
        return distribute_tensor(x[name], mesh, placements)

    by_heads = {name: on(name, Shard(1)) for name in ("query", "key", "value")}
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (va.score_attention, {**by_heads, "query": on("query", Shard(2))}, "query must be replicated or sharded over batch or h"),
        (va.score_attention, {**by_heads, "key": on("key", Shard(0))}, "key must be replicated, or sharded like query"),
        (va.score_attention, {**by_heads, "key": x["key"]}, "key must be a DTensor, like query; got a torch.float64 tensor"),
        (va.score_attention, {**by_heads, "query": x["query"]}, "key must be a dense torch.Tensor"),
        (va.score_attention, {**by_heads, "dropout_p": 0.5}, "dropout_p must be 0 if query is a DTensor"),
        (va.score_attention, {**by_heads, "score": va.scores.Additive(torch.ones(D))}, "score must have no parameters"),
        (
            va.congruence_loss,
            {"text": (by_heads["query"],) * 2, "image": (by_heads["query"],) * 2},
            "must be a dense torch.Tensor",
        ),
        (
            va.attention_statistics,
            {
                "query": on("query", Shard(0)),
                "key": on("key", Shard(0)),
                "key_groups": distribute_tensor(torch.zeros(B, N, dtype=torch.long), mesh, [Shard(0)]),
            },
            "num_groups must be given",
        ),
    ]
    grouped = {name: tensor[:, :1] for name, tensor in x.items() if name in ("key", "value")}
    one_head = {name: distribute_tensor(tensor.repeat(1, 1, 1, 1), mesh, [Replicate()]) for name, tensor in grouped.items()}
    for operator, arguments, words in wrong:
        with pytest.raises((TypeError, ValueError), match=words):
            operator(**arguments)
    with pytest.raises(ValueError, match="key must"):
        va.attention_map(by_heads["query"], one_head["key"])
    first = distribute_tensor(x["query"][:, :1], mesh, [Shard(1)])  # the second process has none of it, and both raise
    with pytest.raises(ValueError, match="query must have heads for every process that shares them"):
        va.attention_map(first, first)
    return {"refused": torch.tensor(len(wrong) + 2)}


def one_of_each() -> dict[str, Tensor]:
    """A batch of one over two processes, of which the second has none of it, and one head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, found = init_device_mesh("cpu", (2,)), {}
    for dim in (0, 1):
        x = {name: tensor.narrow(dim, 0, 1) for name, tensor in tensors().items() if name != "grad_output"}
        key_mask = KEY_MASK.narrow(0, 1, 1) if dim == 0 else KEY_MASK
        divided = {name: distribute_tensor(tensor, mesh, [Shard(dim)]) for name, tensor in x.items()}
        options = {"key_mask": distribute_tensor(key_mask, mesh, [Replicate()])}
        outputs = results(va.score_attention, {**divided, **options}, tuple(x))
        found |= {f"{dim}|{name}": output.full_tensor() for name, output in outputs.items()}
        outputs = results(va.score_attention, {**x, "key_mask": key_mask}, tuple(x))
        found |= {f"{dim}|{name}|whole": output for name, output in outputs.items()}
    return found


def on_each_rank() -> dict[str, Tensor]:
    return refused() | on_two_ranks() | one_of_each()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """One pair of processes for all tests; what is not refused fails here."""
    return results_of(__name__, "on_each_rank", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", calls())
def test_a_divided_call_gives_what_the_whole_one_gives(name: str, ranks: list[dict[str, Tensor]]) -> None:
    operator, arguments, differentiable = calls()[name]
    for each, want in results(operator, arguments, differentiable).items():
        for way in ways(name):
            for found in ranks:
                torch.testing.assert_close(found[f"{name}|{way}|{each}"], want, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_divided_is_refused(ranks: list[dict[str, Tensor]]) -> None:
    assert [int(found["refused"]) for found in ranks] == [10, 10]


def test_a_batch_of_one_and_one_head(ranks: list[dict[str, Tensor]]) -> None:
    for found in ranks:
        for name in (name for name in found if f"{name}|whole" in found):
            torch.testing.assert_close(found[name], found[f"{name}|whole"], rtol=1e-10, atol=1e-10)
