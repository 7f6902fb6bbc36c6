"""A score function by name in transformers' attention interface: `attn_implementation="additive"`.

The model looks our function up by the name in its config, and another one that makes its masks. The parameters of a learned
score become a part of each attention module, under the name `registered.attribute`, so the model trains, moves and saves them.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_bool, check_choice, describe
from vlattn_fast.attach.session import unwrapped
from vlattn_fast.attach.transformers_interface import CONFIG_NAME, SCORES_BY_NAME, causal_by_module, masks_by_name
from vlattn_fast.nn.replace_attention import Held, attention_of, by_interface, calls_configured_attention, placed, sizes_of
from vlattn_fast.nn.score_attention import ScoreFactory, make_score
from vlattn_fast.ops import BACKEND_NAMES
from vlattn_fast.scores import Score

_RESERVED = ("sdpa", "eager", "flash", "flex_attention", "paged", "vlattn")  # transformers looks for these within a name


def register_attention(
    name: str,
    score: str | Score | ScoreFactory | None = None,
    *,
    per_head: bool = False,
    score_options: dict[str, Any] | None = None,
    backend: str = "auto",
) -> RegisteredAttention:
    """Registers a score function with transformers by `name`, for `attn_implementation=` and `set_attn_implementation`.

    Returns a handle whose `scores(model)` are the score's parameters. All attention of a model that is called by that name uses
    the score; to change only some layers, use `replace_attention`. Models that write attention out by hand, such as Bloom's, have
    no names: they raise ValueError when they ask for masks, and `scores(model)` does. The cost of a call is that of
    score_attention.

    Examples:
        >>> import vlattn_fast as va
        >>> from transformers import AutoModel, ViTConfig
        >>> additive = va.nn.register_attention("additive")
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model = AutoModel.from_config(ViTConfig(**sizes), attn_implementation="additive")
        >>> len(additive.scores(model)), sum("attention_score_additive" in name for name, _ in model.named_parameters())
        (2, 8)

    "scaled_dot" gives the outputs of "sdpa". Masks, causality, the keys that an indexer chooses, learned position biases with
    their gradients, grouped heads and dropout are those of the model. Sinks work with every score, a softcap only with dot
    products. A call with a paged cache, with a sliding window but without its mask, or with an option that no operator supports,
    raises ValueError.

    A score with parameters gets new ones in each attention module, initialised as in `ScoreAttention`, at its first call or by
    `registered.scores(model)`. Call that before you make an optimizer, load saved parameters, or compile.

    Args:
        name: a Python identifier without "sdpa", "eager", "flash", "flex_attention", "paged" and "vlattn". A later call with the
            same name replaces an earlier one.
        score: see `ScoreAttention`; or an object of `vlattn_fast.scores`, whose tensors all layers share. Default: `name`.
        per_head, score_options, backend: see `ScoreAttention`.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it).
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str; got {describe(name)}")
    if not name.isidentifier() or any(word in name for word in _RESERVED):
        raise ValueError(f"name must be a Python identifier without {', '.join(_RESERVED)}; got {name!r}")
    check_bool(per_head=per_head)
    check_choice("backend", backend, BACKEND_NAMES)
    registered = RegisteredAttention(name, name if score is None else score, per_head, score_options, backend)
    if isinstance(registered.score, Score):
        if per_head or score_options is not None:
            raise ValueError(
                f"per_head and score_options must be left out if score is an object; got {per_head}, {score_options!r}"
            )
    else:
        make_score(registered.score, 1, 8, per_head, score_options)  # raises for what no layer can make
    SCORES_BY_NAME[name] = registered

    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, registered._attend)
    AttentionMaskInterface.register(name, masks_by_name)
    return registered


class RegisteredAttention(NamedTuple):
    """Holds the result of `register_attention`.

    name: the name for transformers. score, per_head, score_options, backend: the arguments.
    """

    name: str
    score: str | Score | ScoreFactory
    per_head: bool
    score_options: dict[str, Any] | None
    backend: str

    @property
    def attribute(self) -> str:
        """Returns the name under which each attention module holds the parameters of a learned score."""
        return f"attention_score_{self.name}"

    def scores(self, model: nn.Module) -> dict[str, nn.Module]:
        """Returns path of each attention module that is called by this name -> its score's parameters.

        Creates those that are missing. Empty for a score without parameters.

        Raises:
            ValueError: if no attention of the model is called by this name.
        """
        modules: dict[str, Any] = {
            path: module for path, module in attention_of(unwrapped(model)) if calls_configured_attention(module)
        }
        named = {path: module for path, module in modules.items() if getattr(module.config, CONFIG_NAME) == self.name}
        if not named:
            raise ValueError(f"model must have attention by the name {self.name!r}: set_attn_implementation({self.name!r})")
        held = {path: self._held(module, *sizes_of(path, module)) for path, module in named.items()}
        return {path: score for path, score in held.items() if isinstance(score, nn.Module)}

    def _held(self, module: nn.Module, num_heads: int, head_dim: int) -> Held:
        """Returns the score of an attention module."""
        if isinstance(self.score, Score):
            return self.score
        held: Any = getattr(module, self.attribute, None)
        made_of = repr((self.score, self.per_head, self.score_options))
        if held is None:
            with torch.inference_mode(False):  # else its parameters could not be trained
                held = make_score(self.score, num_heads, head_dim, self.per_head, self.score_options)
                if isinstance(held, nn.Module):
                    held = placed(module, held)
                    held.made_of = made_of
                    setattr(module, self.attribute, held)
        elif held.made_of != made_of:
            raise ValueError(
                f"model must be a new one, since its parameters of {self.name!r} are of {held.made_of}; got {made_of}"
            )
        return held

    def _attend(self, module: nn.Module, query: Tensor, *call: Any, **options: Any) -> tuple[Tensor, None]:
        """Implements transformers' attention interface."""
        before = hasattr(module, self.attribute)
        held = self._held(module, query.shape[1], query.shape[3])
        if isinstance(held, nn.Module) and not before:
            if torch.compiler.is_compiling():
                raise ValueError(f"model must have the parameters of {self.name!r} before it is compiled: call scores(model)")
            warnings.warn(
                f"new parameters of {self.name!r} were initialised at the first call; call scores(model) before you make an "
                "optimizer, load saved parameters, or compile",
                stacklevel=2,
            )
        rule = causal_by_module(getattr(module, "config", None))
        options |= {"causal_by_module": rule, "are_first": False}
        return by_interface(module, query, *call, held=held, backend=self.backend, **options)
