"""Edits of models that two processes share, and of the same models in one process."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret import cases, parallel_cases
from tests.helpers.releases import OLDER
from tools.tiny_models.stored import in_double

ACROSS = ("language", "vision")  # of mllama
Made = tuple[Any, dict[str, Any]]


def one_key_head() -> Made:
    """Each process has the only head of keys."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**cases.LLAMA | {"num_key_value_heads": 1}))
    return cases.lively(model).eval().double(), {"input_ids": torch.randint(5, 50, (2, 7))}


def gptj() -> Made:
    """Its attention takes the softmax itself."""
    torch.manual_seed(0)
    config = transformers.GPTJConfig(n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=64, vocab_size=60)
    model = transformers.GPTJForCausalLM(config)
    return cases.lively(model).eval().double(), {"input_ids": torch.randint(5, 50, (2, 7))}


MODELS: dict[str, Callable[[], Made]] = {
    **{name: functools.partial(parallel_cases.made, name) for name in ("llama", "llava", "mllama")},
    "one key head": one_key_head,
    "gptj": gptj,
}
# of each model: queries, keys, and the tower that they are in
EDGES: dict[str, tuple[Any, Any, Any]] = {
    "llama": ((4, 7), [(0, 2), (3, 4)], None),
    "llava": ("last", "image", None),
    "mllama": (None, (0, 9), ACROSS),
    "one key head": ((4, 7), (0, 2), None),
    "gptj": ((4, 7), (0, 2), None),
}


def outcomes(name: str, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What each call gives for a model, by name."""
    with in_double() if name == "gptj" else contextlib.nullcontext():  # it casts its queries to float32
        return {f"{name}|{key}": x for key, x in _outcomes(name, model, inputs).items()}


def _outcomes(name: str, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    queries, keys, tower = EDGES[name]
    itself = tower if tower is None else tower[0]
    run = va.record_heads(model, {**inputs, "input_ids": inputs["input_ids"].flip(0)}, tower=itself)
    assert run.outputs is not None
    results = {f"outputs of layer {layer}": x for layer, x in run.outputs.items()}
    first, *_, last = run.outputs
    some: dict[str, Any] = {"queries": queries, "keys": keys, "tower": tower}
    edits = [
        va.Knockout(**some, heads=[1, 2]),
        va.Steer(**some, heads=[0, 3], weight=4.0),
        va.ScaleHeads({first: [0, 3]}, 0.25, tower=itself),
        va.ScaleHeads({first: [1]}, 0.5, mean=run, tower=itself),
        va.Patch(run, {last: [1, 2]}, tower=itself),
    ]
    with torch.no_grad(), va.intervene(model, inputs, edits):
        results["logits"] = model(**inputs).logits
        if name == "llama":
            results["answer"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    groups = {"some": (0, 3), "others": (3, 7)} if name == "mllama" else {"from": keys, "to": queries}
    table = va.attribute_edges(model, inputs, groups, tower=tower, target=None if name == "mllama" else 7)
    results |= {"first order": table.effects, "means": torch.tensor([edge.effect for edge in table])}
    if name == "llava":
        results["true"] = va.intervene_each(model, inputs, table[2:5]).effects
        results["flow"] = va.information_flow(model, [(inputs, None)], window=2, **{**some, "heads": [0, 3]}).probability
        with va.intervene(model, inputs, edits):
            results["explained"] = va.explain(model, inputs).relevancy["language"]
    return results


def divided(model: nn.Module, mesh: Any) -> None:
    """By torch's own styles; the only head of keys stays whole in each process, which has a part of its gradient."""
    whole = ("k_proj", "v_proj") if getattr(model.config, "num_key_value_heads", None) == 1 else ()
    parallel_cases.divided(model, mesh, whole)
    for name, module in model.named_modules():
        if type(module).__name__ == "GPTJAttention":
            module.num_attention_heads //= 2
        if whole and hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups //= 2
        if whole and name.endswith(whole):
            module.register_forward_hook(sum_gradients)


def sum_gradients(module: nn.Module, args: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(summed)


def summed(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    torch.distributed.all_reduce(total)
    return total


def sharded(model: nn.Module, mesh: Any) -> None:
    parallel_cases.shard(model)


WAYS: dict[Callable[[Any, Any], None], tuple[str, ...]] = {
    divided: tuple(MODELS),
    **({} if OLDER else {parallel_cases.planned: ("llama",)}),
    sharded: ("llava",),
}


def each_way() -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh, results = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), {}
    for way, names in WAYS.items():
        for name in names:
            model, inputs = MODELS[name]()
            way(model, mesh)
            results |= {f"{way.__name__}|{key}": x for key, x in outcomes(name, model, inputs).items()}
    return results


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    return outcomes(name, *MODELS[name]())
