"""Forwards that take the place of those that write a recurrence out: the same output, and calls that are handed over."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tools.tiny_models.inputs import texts
from tools.tiny_models.shrink import small_model
from tools.tiny_models.stored import in_double
from vlattn_fast.attach.recurrences.table import FORWARDS

MODELS = {
    "MiniMaxLightningAttention": "MiniMaxForCausalLM",
    "RecurrentGemmaRecurrentBlock": "RecurrentGemmaForCausalLM",
    "RwkvFeedForward": "RwkvForCausalLM",
    "RwkvSelfAttention": "RwkvForCausalLM",
    "ZambaMambaMixer": "ZambaForCausalLM",
}


@pytest.fixture
def double() -> Iterator[None]:
    with in_double():
        yield


def test_each_forward_has_a_model() -> None:
    assert {*MODELS} == {*FORWARDS}


@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_the_models(name: str, double: None) -> None:
    import transformers

    model = small_model(getattr(transformers, MODELS[name]))
    calls: list[tuple[Any, ...]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((module, args, kwargs, output))

    for module in model.modules():
        if type(module).__name__ == name:
            module.register_forward_hook(keep, with_kwargs=True)
    model(**texts(model, "both"), use_cache=False)
    assert calls
    for module, args, kwargs, output in calls:
        handed: list[str] = []

        def hand(reader: Callable[..., Any], function: Any, handed: list[str] = handed) -> Any:
            handed.append(name)
            return function

        written = FORWARDS[name](module, hand, *args, **kwargs)
        first, expected = (x if isinstance(x, Tensor) else x[0] for x in (written, output))
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-11)
        assert len(handed) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_is_refused(name: str, double: None) -> None:
    import transformers

    model = small_model(getattr(transformers, MODELS[name]))
    model.config.use_cache = True
    for module in model.modules():
        if type(module).__name__ == name:
            vars(module)["forward"] = functools.partial(FORWARDS[name], module, lambda _, run: run)
    with pytest.raises(ValueError, match="model must run without a cache; got"):
        model(**texts(model, "both"))
