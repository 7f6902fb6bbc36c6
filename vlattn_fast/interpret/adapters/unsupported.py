"""Refusals: modules that no published rule covers, by their names where towers are found, and undefined relevancy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

# By the end of the class's name: attention that is no softmax of one map over tokens.
_ATTENTION = {
    "DeformableAttention": "which samples values at a few learnt points and takes no softmax over keys",
    "BiMultiHeadAttention": "which takes two softmaxes of one clamped score matrix, over its rows and over its columns",
    "CvtSelfAttention": "which makes queries, keys and values by convolutions over tokens",
    "NystromformerSelfAttention": "which multiplies three maps over landmarks, and adds a convolution over tokens",
}
# And what goes on beside attention.
_BESIDE = {
    "ConvBertSelfAttention": "which adds a convolution over tokens to attention",
    "ShortConvolution": "which mixes neighbouring tokens beside attention",
    "MobileBertEmbeddings": "which joins each token with its neighbours in front of attention",
    "BridgeTowerLinkTower": "which adds up two streams of the same tokens, whose relevancies no published rule joins",
}
# Modules that hand on what tokens hold by a recurrence or a short convolution, by the end of the class's name. The functions that
# they call for it are in `attach.recurrences`.
RECURRENT = (
    *("MambaMixer", "Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "MambaLayer"),
    *("GatedDeltaNet", "DeltaAttention", "LightningAttention", "RecurrentBlock", "ShortConv", "xLSTMLayer"),
    *("RwkvSelfAttention", "RwkvFeedForward"),
)


class UndefinedRelevancy(ValueError):
    """The call is right, but this model's weights give a score that is NaN, or no row beside the one that is read."""


def check_rules(model: nn.Module, parts: Sequence[str], beside: bool = True) -> None:
    """ValueError, naming the modules, if the rules for relevancy do not cover the parts of `model` at these paths: their
    attention, and what goes on `beside` it."""
    uncovered: dict[str, str] = {}
    reasons = _ATTENTION | _BESIDE if beside else _ATTENTION
    below = ((name, module) for part in parts for name, module in model.get_submodule(part).named_modules(prefix=part))
    for name, module in below:
        kind = type(module).__name__
        for ending, reason in reasons.items():
            if kind.endswith(ending) and getattr(module, "trigram_input", True):  # of MobileBERT
                uncovered.setdefault(ending, f"'{name}' ({kind}), {reason}")
    if uncovered:
        raise ValueError(
            f"model must have no modules in its towers that no rule covers; got {'; '.join(uncovered.values())}. "
            "method='input_gradient' needs no rule"
        )


def check_recurrences(ran: Mapping[str, nn.Module], called: Sequence[str]) -> None:
    """ValueError, naming the module, if a recurrence among the modules that ran is none of those that `called` one that is seen:
    beside attention in the same layer it would be left out."""
    for path, module in ran.items():
        kind = type(module).__name__
        names = (each.__name__ for each in type(module).__mro__)  # a class of a user may stand on one of them
        if any(name.endswith(RECURRENT) for name in names) and not any(f"{caller}.".startswith(f"{path}.") for caller in called):
            raise ValueError(
                f"model must recur by functions that are known; got '{path}' ({kind}), which hands on what tokens hold by a "
                "recurrence that is not seen. method='input_gradient' needs no rule"
            )
