"""Our functions for transformers' attention interface, and the configs that name them for one run.

transformers looks its attention function up by the name in the config. Two names are registered:

- "vlattn" gets the masks that SDPA gets (bool, or None if the pattern is causal or complete), for models that support SDPA;
- "vlattn_additive" gets eager attention's float masks, for models that also add the mask by hand somewhere.

A config may belong to several models, so each module has a copy that names our function during the run. Names that
`nn.register_attention` registers get the masks of one or the other, by the models of the config.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn

from vlattn_fast._ground.tensors import masks_of
from vlattn_fast.attach.events import RUNNING

SDPA_NAME, ADDITIVE_NAME = "vlattn", "vlattn_additive"
CONFIG_NAME = "_attn_implementation_internal"  # where a config of transformers keeps the name
# nn.replace_attention sets on a module: the score, and whether `module.is_causal` decides without a mask.
REPLACED, RULE = "attention_score", "_attention_causal_by_module"
SCORES_BY_NAME: dict[str, Any] = {}  # what nn.register_attention has registered: a run leaves their configs
_OF_ANY_MODULE = frozenset(vars(nn.Module()))  # hooks, parameters and the like


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    causal_by_module: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: query, key, value (B, H, N, D) in, (output (B, N, H, D), None) out.

    Dropout is off except in a run that trains, since explained models run in eval mode. `causal_by_module` and `options` are
    those of `masks_of`. ValueError for a call outside of a run.
    """
    trace = RUNNING.get()
    if trace is None:
        raise ValueError(
            f"model must run inside of explain while its attention is '{SDPA_NAME}'; got {type(module).__name__} outside"
        )
    with torch._C.DisableTorchFunction():  # a run's mode would see each x.shape
        masks = masks_of(module, query, key, attention_mask, causal_by_module=causal_by_module, are_first=False, **options)
    options = {**masks, "scale": scaling, **({"dropout_p": dropout} if trace.trains else {})}
    output = trace.attend(query, key, value, options, module)
    return output.transpose(1, 2).contiguous(), None


def sdpa_function(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """`attention_function` in which `module.is_causal` decides without a mask."""
    return attention_function(*args, causal_by_module=True, **kwargs)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    for name, function, mask in ((SDPA_NAME, sdpa_function, sdpa_mask), (ADDITIVE_NAME, attention_function, eager_mask)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)


def masks_by_name(*, config: Any, **options: Any) -> Tensor | None:
    """The masks that a model of this config gets under a name of `nn.register_attention`: SDPA's or eager attention's.

    ValueError: the model writes attention out by hand, so the name would have no effect.
    """
    from transformers.masking_utils import eager_mask

    supports_sdpa, by_hand = models_of(type(config))
    if by_hand:
        raise ValueError(
            f"model must call its attention through transformers' AttentionInterface to have another by name; got {by_hand}, "
            f"which writes it out by hand, with attn_implementation={getattr(config, CONFIG_NAME)!r}. Use 'eager', and try "
            "replace_attention"
        )
    mask: Tensor | None = (sdpa_mask if supports_sdpa else eager_mask)(config=config, **options)
    return mask


def sdpa_mask(*, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **options: Any) -> Tensor | None:
    """SDPA's mask, but for a prompt in a longer static cache, where SDPA needs none. So without a mask several causal queries are
    the last tokens: Gemma 4 leaves out the first ones."""
    from transformers import masking_utils

    skips = allow_is_causal_skip and q_length in (1, kv_length)
    mask: Tensor | None = masking_utils.sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=skips, **options)
    return mask


def causal_by_module(config: Any) -> bool:
    """Whether `module.is_causal` decides without a mask, since the masks under the name in a config are SDPA's; eager ones hold
    causality."""
    name = getattr(config, CONFIG_NAME, None)
    return models_of(type(config))[0] if name in SCORES_BY_NAME else name != "eager"


def models_of(kind: type) -> tuple[bool, str]:
    """Whether all models with configs of this class, or else of the nearest base, support SDPA: others may add masks to scores by
    hand, also beside calls of the interface. And the name of one of them if none calls attention by the name in its config."""
    from transformers import PreTrainedModel

    return _models_of(kind, len(PreTrainedModel.__subclasses__()))  # as many as there are imported files, or nearly


# As by torch.compiler.assume_constant_result, which would import all of torch.compile
models_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _models_of(kind: type, imported: int) -> tuple[bool, str]:
    from transformers import PreTrainedModel

    classes: list[Any] = [PreTrainedModel]
    for each in classes:  # which grows
        classes += each.__subclasses__()
    for base in kind.__mro__:
        models = [each for each in classes if base in (get_args(each.config_class) or (each.config_class,))]
        if models:
            takes_names = any(each._can_set_attn_implementation() for each in models)
            return all(each._supports_sdpa for each in models), "" if takes_names else models[0].__name__
    return False, ""


def configs(roots: Iterable[nn.Module], keeps_sdpa: bool = False) -> Iterator[tuple[nn.Module, str, Any]]:
    """(module, attribute, copy of its config that names our function) for each module below `roots` whose model takes
    such names.

    A module follows the innermost transformers model around it. `keeps_sdpa`: configs that name SDPA stay, since modes of torch
    see its calls. It is a generator: `overridden` runs it while no other run changes configs.
    """
    names: dict[nn.Module, str] = {}
    parts: Iterator[Any] = (part for root in roots for part in root.modules())  # outermost first, so inner models decide
    for part in parts:
        if hasattr(type(part), "_can_set_attn_implementation"):  # nn.Module is slow if an attribute is absent
            takes_names = part._can_set_attn_implementation()
            name = SDPA_NAME if getattr(part, "_supports_sdpa", False) else ADDITIVE_NAME
            for module in part.modules():
                names.pop(module, None)
                if takes_names:
                    names[module] = name
    # A module may hold its config under several names. If a score is replaced, the config stays.
    named = [module for module in names if REPLACED not in vars(module) and REPLACED not in module._modules]
    attributes = ((module, key, value) for module in named for key, value in vars(module).items() if key not in _OF_ANY_MODULE)
    held = [(module, key, value) for module, key, value in attributes if hasattr(value, CONFIG_NAME)]
    chosen = {id(config): names[module] for module, _, config in held}
    if chosen:
        _register()
    for module in names:
        if RULE in vars(module):
            yield module, RULE, names[module] == SDPA_NAME
    copies: dict[int, Any] = {}
    for module, attribute, config in held:
        if not (keeps_sdpa and getattr(config, CONFIG_NAME) == "sdpa"):
            yield module, attribute, _naming_us(config, names[module], chosen, copies)


def _naming_us(config: Any, name: str, chosen: dict[int, str], copies: dict[int, Any]) -> Any:
    """A copy of `config` that names our function, with copies of its sub-configs, which models read as well; the config itself
    if it names a score, since the operator of such a score is observed anyway."""
    if getattr(config, CONFIG_NAME) in SCORES_BY_NAME:
        return config
    if id(config) not in copies:
        copies[id(config)] = copied = copy.copy(config)
        setattr(copied, CONFIG_NAME, chosen.get(id(config), name))  # the public setter would overwrite the sub-configs
        for key in getattr(config, "sub_configs", None) or ():
            if hasattr(part := getattr(config, key, None), CONFIG_NAME):
                setattr(copied, key, _naming_us(part, name, chosen, copies))
    return copies[id(config)]
