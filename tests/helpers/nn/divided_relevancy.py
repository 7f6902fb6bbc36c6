"""A training step with a loss on relevancy, of a model that two processes share by FSDP2 or copy by DDP: each has one
of the two inputs."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.interpret.parallel_cases import made, shard
from vlattn_fast.nn import RelevancyLoss, capture_relevancy

METHODS = ("gradient", "weighted", "rollout")


def step(model: nn.Module, inputs: dict[str, Any], method: str, higher_order: bool = False) -> None:
    """Leaves the gradients in the model."""
    with capture_relevancy(model, method=method, higher_order=higher_order) as captured:
        logits = model(**inputs).logits
    mask = inputs["attention_mask"].to(logits.dtype)
    relevancy = captured.relevancy(logits[:, -1, 3].sum())
    (logits.square().mean() + RelevancyLoss("mse")(relevancy, mask)).backward()


def gradients(rank: int | None = None) -> dict[str, Tensor]:
    """The gradients of all parameters, by method; with a rank, of a model that is divided."""
    grads = {}
    for method in METHODS:
        model, inputs = made("llama")
        if rank is not None:
            shard(model)
            inputs = {name: x[rank : rank + 1] for name, x in inputs.items()}
        step(model, inputs, method)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            grads[f"{method}|{name}"] = parameter.grad.full_tensor() if rank is not None else parameter.grad  # type: ignore[attr-defined]
    return grads


def of_this_rank() -> dict[str, Tensor]:
    rank = torch.distributed.get_rank()
    model, _ = made("llama")
    shard(model)
    try:
        capture_relevancy(model, higher_order=True)
    except ValueError as error:
        assert "FSDP" in str(error)
        return gradients(rank)
    raise AssertionError("higher_order=True must be refused under FSDP")


def replicated_gradients(rank: int | None = None) -> dict[str, Tensor]:
    """The gradients of all parameters, by `higher_order`; with a rank, of a model that has a copy on each."""
    grads = {}
    for higher_order in (False, True):
        model, inputs = made("llama")
        wrapped = model if rank is None else nn.parallel.DistributedDataParallel(model)
        inputs = inputs if rank is None else {name: x[rank : rank + 1] for name, x in inputs.items()}
        step(wrapped, inputs, "gradient", higher_order)
        grads |= {f"{higher_order}|{name}": parameter.grad for name, parameter in model.named_parameters()}
    return grads


def of_this_copy() -> dict[str, Tensor]:
    return replicated_gradients(torch.distributed.get_rank())
