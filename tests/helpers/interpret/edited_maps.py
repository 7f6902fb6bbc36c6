"""Models in eager attention with a bias of N x M on its scores, or with changed outputs of heads, for comparison with edits."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from tests.helpers.interpret.cases import CASES, in_double, lively
from tests.helpers.interpret.decoder_cases import DECODERS
from tools.tiny_models.shrink import small_model
from tools.tiny_models.stored import in_double as default_double

# (module, number of queries, number of keys) -> what is added to the scores, broadcastable to (B, H, N, M); 0 = nothing
Bias = Callable[[nn.Module, int, int], Tensor | float]
_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of `CASES` in float64, with its inputs."""
    case = CASES[name]()
    lively(case.model).eval()
    return case.model, in_double(case)


def llama() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        max_position_embeddings=64,
    )
    model = lively(transformers.LlamaForCausalLM(config)).double().eval()
    return model, {"input_ids": torch.randint(3, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


def decoder(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of `DECODERS` in float64, with its inputs, padded on the left; it ends no text."""
    case = DECODERS[name]()
    model: Any = lively(case.model).double().eval()
    model.generation_config.eos_token_id = None
    return model, {key: x.double() if x.is_floating_point() else x for key, x in case.inputs("left").items()}


def small(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A class of transformers in float64, with words."""
    with default_double():
        return small_model(getattr(transformers, kind)), {"input_ids": torch.randint(3, 50, (2, 7))}


@contextlib.contextmanager
def biased(model: Any, bias: Bias) -> Iterator[dict[nn.Module, Tensor]]:
    """A context in which the model runs in eager attention with a bias; gives the last map of each module."""
    stored: dict[nn.Module, Tensor] = {}

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **_: Any
    ) -> Any:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[2]]
        scores = scores + bias(module, query.shape[2], key.shape[2])
        stored[module] = maps = scores.softmax(-1).nan_to_num(0.0)
        return (maps @ value).transpose(1, 2).contiguous(), maps

    before = model.config._attn_implementation
    transformers.AttentionInterface.register("biased", attention)
    AttentionMaskInterface.register("biased", eager_mask)
    model.set_attn_implementation("biased")
    try:
        yield stored
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor], heads: int) -> Iterator[None]:
    """A context in which the input (B, N, H * D) of an output projection is changed as (B, N, H, D)."""
    hook = module.register_forward_pre_hook(lambda _, args: (change(args[0].unflatten(-1, (heads, -1)).clone()).flatten(-2),))
    try:
        yield
    finally:
        hook.remove()


class Cut(TorchFunctionMode):
    """Takes the edges from `queries` (B, N) to `keys` (B, M) away, in heads 0 and 1 of each call of scaled_dot_product_attention
    of these sizes; `count` are the calls. Maps are written out."""

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        super().__init__()
        self.queries, self.keys, self.count = queries, keys, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        options = {**dict(zip(_SDPA, args, strict=False)), **(kwargs or {})}
        query, key, value, mask = (options.get(name) for name in _SDPA[:4])
        if (len(query), query.shape[2], key.shape[2]) != (*self.queries.shape, self.keys.shape[1]):
            return func(*args, **(kwargs or {}))
        self.count += 1
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * (options.get("scale") or query.shape[-1] ** -0.5)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if options.get("is_causal"):
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        cut = (self.queries[:, None, :, None] & self.keys[:, None, None]).expand_as(scores).clone()
        cut[:, 2:] = False
        return scores.masked_fill(cut, -torch.inf).softmax(-1).nan_to_num(0.0) @ value
