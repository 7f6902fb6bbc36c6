"""A map belongs to the score and to the model: the score's scale, and what is wrapped around a model or put into it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.small_models import Small, assert_close, every, made, method_named
from vlattn_fast.interpret.relevancy.methods.registry import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:A part of the map belongs to later tokens")  # of the published rollout

PRODUCTS = ("gradient", "gradient:no_normalization", "gradient:no_self_attention", "gradient:no_aggregation")
SCALED = {
    "tam": "it explains a token, and no callable",
    **dict.fromkeys((*PRODUCTS, "weighted:no_normalization"), "its layers multiply one another: each of them is below"),
}


@every("pooled", "t5", "captioner", "whisper", without=SCALED)
def test_a_row_has_the_factor_of_its_score_or_none_and_not_its_constant(method: str, model: str) -> None:
    small, chosen = made(model), method_named(method)
    target, inputs = small.options["target"], small.batch()
    plain = small.explain(inputs, chosen).relevancy
    other = small.explain(inputs, chosen, target=lambda outputs: 3 * target(outputs) + 7).relevancy
    factors = {round(float((other[tower] * row).sum() / row.square().sum()), 3) for tower, row in plain.items()}
    assert factors in ({1.0}, {3.0}), f"rows have {factors} times what they had: say in SCALED why"
    for tower, row in plain.items():
        assert_close(other[tower], row * min(factors), tower)


@pytest.mark.parametrize("method", [method for method, kind in METHODS.items() if kind.by_layer])
def test_the_map_of_a_layer_has_the_factor_of_its_score_or_none(method: str) -> None:
    small = made("pooled")
    target, inputs = small.options["target"], small.batch()
    plain, other = (
        va.explain_layers(small.model, inputs, method=method, position="mean", target=each).relevancy["tower0"]
        for each in (target, lambda outputs: 3 * target(outputs) + 7)
    )
    assert_close(other, plain * (3 if METHODS[method].needs_score else 1), "tower0")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Lora(nn.Module):
    """A linear layer with an adapter of rank 2, whose sum has the weights of `layer`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, layer.in_features, dtype=layer.weight.dtype))
        self.up = nn.Parameter(torch.randn(layer.out_features, 2, dtype=layer.weight.dtype))
        self.base = copy.deepcopy(layer)
        with torch.no_grad():
            self.base.weight -= self.up @ self.down

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.down.mT @ self.up.mT
        return out


def with_adapters(model: nn.Module) -> nn.Module:
    """Modules that call their linear layers, as torch's attention does not."""
    for module in [module for module in model.modules() if not isinstance(module, nn.MultiheadAttention)]:
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not isinstance(module, nn.TransformerEncoderLayer):
                setattr(module, name, Lora(child))
    assert any(isinstance(module, Lora) for module in model.modules())
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    """Which models do when they train, and `explain` does not."""
    name = next(
        (name for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(model, name)), None
    )
    if name is not None:  # models of transformers
        getattr(model, name)()
    return model.train()


def eager(model: nn.Module) -> nn.Module:
    """Transformers' own, whose softmax is in float32."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "DDP": nn.parallel.DistributedDataParallel,
    "LoRA": with_adapters,
    "gradient checkpointing": checkpointed,
    "frozen weights": lambda model: model.requires_grad_(False),
    "eager attention": eager,
}
CONTEXTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@every("pooled", "t5", "llava", "qwen3_next")
def test_what_is_around_a_model_changes_nothing(method: str, model: str, one_process: None) -> None:
    plain, chosen = made(model), method_named(method)
    inputs = plain.batch()
    expected = plain.explain(inputs, chosen)

    def check(small: Small, what: str, *contexts: str) -> None:
        with ExitStack() as stack:
            for name in contexts:
                stack.enter_context(CONTEXTS[name]())
            got = small.explain(inputs, chosen)
        for tower, row in expected.relevancy.items():
            dtype = torch.float32 if what == "eager attention" else row.dtype
            assert_close(
                got.relevancy[tower].to(dtype), row.to(dtype), f"{what}: {tower}", 1e-3 * float(expected.scores.abs().max())
            )
            assert not got.relevancy[tower].requires_grad, what

    for name, wrap in WRAPPERS.items():
        check(replace(plain, model=wrap(copy.deepcopy(plain.model))), name)
    for name in CONTEXTS:
        check(plain, name, name)
