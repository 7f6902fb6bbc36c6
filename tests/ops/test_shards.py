"""Operators on DTensors that two processes share: outputs and gradients are those of whole tensors, with the same placements."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.two_ranks import results_of
from vlattn_fast._ground.extras import missing
from vlattn_fast.checking.cases import Example, Sizes, cases_of

pytest.importorskip("torch.distributed.tensor")
B, H, N, M, D = 3, 4, 5, 6, 8


def tensors(*, keys: int = M) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (B, H, N, D), "key": (B, H, keys, D), "value": (B, H, keys, D - 2)}
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


KEY_MASK = torch.ones(B, M, dtype=torch.bool)
KEY_MASK[1, 4:] = False
OPERATORS = (
    *("score_attention", "relevancy_attention", "relevancy_step", "attention_map", "attention_statistics"),
    "relevancy_residual",
)


def ways(name: str) -> tuple[str, ...]:
    return ("batch", "whole") if name.startswith("relevancy_residual") else ("batch", "heads", "whole")


def gradients(query: Any, key: Any, value: Any, **options: Any) -> tuple[Any, ...]:
    """Those of score_attention, which have gradients."""
    out, lse = va.score_attention(query, key, value, return_lse=True, **options)
    return torch.autograd.grad(out.square().sum() + lse.sin().sum(), [query, key, value], create_graph=True)


def calls() -> dict[str, Example]:
    """Those of `vlattn verify` without parameters of scores; with masks, heads that share keys, and second derivatives."""
    sizes, parameters = Sizes(N, M, D, D - 2, batch=B, heads=H, rows=2, features=1), {"weight", "vector", "sigma"}
    made = [call for name in OPERATORS for call in cases_of(name).verify(torch.Generator().manual_seed(0), sizes)]
    found = {call.title: call for call in made if not parameters & {*call.tensors} and "grouped" not in call.name}
    plain = found["score_attention, cosine"]
    seen = torch.rand(1, H, N, M, generator=torch.Generator().manual_seed(1)) > 0.3
    for title in ("score_attention, cosine", "relevancy_step, gradient", "attention_map, attention"):
        found[f"{title}, masks"] = replace(found[title], options={**found[title].options, "attn_mask": seen})
    shared = {name: x[:, :2] if name in ("key", "value") else x for name, x in plain.tensors.items()}
    found["score_attention, grouped"] = replace(plain, tensors=shared, options={**plain.options, "enable_gqa": True})
    if not missing("torch", 2, 10):  # before it DTensor has no second derivatives
        found["score_attention, twice"] = Example(gradients, "", tensors(), {"key_mask": KEY_MASK})
    return found


def results(call: Example, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, and gradients of a sum with weights of its own for each output."""
    inputs = {
        name: x.requires_grad_(name in call.tensors and call.differentiable) if isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }
    outputs = call.call(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    total = sum((x * (i + 1.5)).square().sum() for i, x in enumerate(outputs) if x.requires_grad)
    grads = torch.autograd.grad(total, [inputs[name] for name in call.tensors])
    return found | {f"gradient of {name}": x for name, x in zip(call.tensors, grads, strict=True)}


def on_two_ranks() -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, call in calls().items():
        for way in ways(name):
            divided = call.arguments(call.tensors)
            for each, x in [*divided.items()]:
                if isinstance(x, Tensor):
                    # only what leads the call is divided from the start; the operator cuts what is replicated
                    dim = {"batch": 0, "heads": 1, "whole": None}[way]
                    main = each in ("query", "key", "residual") and dim is not None
                    divided[each] = distribute_tensor(x.detach(), mesh, [Shard(dim) if main else Replicate()])
            for each, x in results(call, divided).items():
                assert isinstance(x, DTensor) and not any(p.is_partial() for p in x.placements), (name, way, each)
                if way != "whole" and each == "output 0" and call.call in (va.score_attention, va.relevancy_attention):
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
        x = {name: tensor.narrow(dim, 0, 1) for name, tensor in tensors().items()}
        key_mask = KEY_MASK.narrow(0, 1, 1) if dim == 0 else KEY_MASK
        divided = {name: distribute_tensor(tensor, mesh, [Shard(dim)]) for name, tensor in x.items()}
        options = {"key_mask": distribute_tensor(key_mask, mesh, [Replicate()])}
        call = Example(va.score_attention, "", x)
        outputs = results(call, {**divided, **options})
        found |= {f"{dim}|{name}": output.full_tensor() for name, output in outputs.items()}
        outputs = results(call, {**x, "key_mask": key_mask})
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
    call = calls()[name]
    for each, want in results(call, call.arguments(call.tensors)).items():
        for way in ways(name):
            for found in ranks:
                torch.testing.assert_close(found[f"{name}|{way}|{each}"], want, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_divided_is_refused(ranks: list[dict[str, Tensor]]) -> None:
    assert [int(found["refused"]) for found in ranks] == [10, 10]


def test_a_batch_of_one_and_one_head(ranks: list[dict[str, Tensor]]) -> None:
    for found in ranks:
        for name in (name for name in found if f"{name}|whole" in found):
            torch.testing.assert_close(found[name], found[f"{name}|whole"], rtol=1e-10, atol=1e-10)
