"""`logit_parts`: what each head, each MLP and each token writes into a logit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_choice
from vlattn_fast.attach.session import at_rest, never_compiled
from vlattn_fast.interpret.explaining.inputs import packing
from vlattn_fast.interpret.intervening.asking import Asked, check_scores
from vlattn_fast.interpret.intervening.part_table import PartTable, bars
from vlattn_fast.interpret.intervening.plans import Plans, check_once
from vlattn_fast.interpret.intervening.stream_leaves import PARTS, Leaves, constant_options, run_with_leaves
from vlattn_fast.ops.score_attention import score_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class LogitParts(PartTable):
    """The result of `va.logit_parts`; `print` shows the largest numbers, `plot` draws them.

    Args:
        names: the parts: "embedding", "head 0.3" or "attention 0", "mlp 0", ...; the last is "rest": biases, what the model adds
            to the stream between layers, and what is not linear after the last layer.
        parts: (B, P), the share of each part in the score; they sum to `scores`.
        sources: layer -> (B, H, N), the shares of the heads by the token that they attend to. Layers whose attention is written
            out by hand have none.
        scores: (B,).
    """

    parts: Tensor
    sources: Mapping[int, Tensor]
    scores: Tensor

    def _kinds(self) -> dict[str, Tensor]:
        return {"share": self.parts}

    def __repr__(self) -> str:
        return "\n".join([f"{len(self.names)} parts of {self.scores.mean():.4g}", *self._lines(None, 10)])

    def plot(self, count: int = 20) -> Figure:
        """Draws the parts with the largest shares, the mean over the samples. ModuleNotFoundError without matplotlib."""
        return bars(self.names, self._mean(None)[1], f"parts of {self.scores.mean():.4g}", count)


@never_compiled
def logit_parts(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Any = None,
    *,
    answer: Any = None,
    parts: str = "heads",
    tower: str | None = None,
    processor: Any = None,
) -> LogitParts:
    """Splits a logit into what each head, each MLP and the embeddings write into it: direct logit attribution.

    Returns a `LogitParts`. It takes three forward passes and one backward pass, through norms and output projections only.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> table = va.logit_parts(model, {"input_ids": torch.randint(50, (1, 12))}, 7)
        >>> table.names
        ('embedding', 'head 0.0', 'head 0.1', 'mlp 0', 'head 1.0', 'head 1.1', 'mlp 1', 'rest')
        >>> torch.allclose(table.parts.sum(1), table.scores.double(), atol=1e-5)
        True

    The residual stream is the sum of the parts, and norms divide by constants. A share is direct: what a part changes in later
    heads and MLPs counts there. `sources` splits the share of a head further, by the token that it attends to. After the last
    layer a share is first order: a head of several layers, or another tower that reads this one, leaves much in "rest".

    Args:
        model: a model that `explain` supports, whose layers add to a residual stream (`Residual` and `Mlp` find it).
        inputs: the model's keyword arguments.
        target: as in `explain`: the score is a logit, or the result of a callable.
        answer: as in `explain`, instead of a target: the score is the sum of the logits of its tokens.
        parts: "heads", or "layers" for all heads of a layer in one part.
        tower: the name of the tower whose stream is split; None = the only one.
        processor: as in `explain`.

    Raises:
        TypeError, ValueError: an argument is invalid; an unknown tower; several samples in a tower that packs their tokens; a
            model whose residual stream is not found, or gets something else that is not linear, or with a norm that cannot be
            held fixed; a score that is NaN, or does not depend on the stream; and what `explain` raises.
    """
    check_choice("parts", parts, PARTS)
    of = None if callable(target) else "logit"
    asked = Asked.check(model, inputs, target=target, answer=answer, processor=processor, tower=tower, of=of)
    plans = Plans(asked.traced)
    pair = plans.self_pair("logit_parts", tower)
    check_once(plans.layers([pair], None), "logits are split")
    tower_tokens, model = pair[0], asked.traced.model
    with at_rest(model), packing(model, asked.request.packs):
        leaves = run_with_leaves(plans, tower_tokens, "logit_parts")
        with torch.enable_grad():
            scores, _ = asked.scores(leaves.outputs)
        check_scores(scores)
        if not scores.requires_grad:
            raise ValueError(f"target must give scores that depend on the stream of tower '{tower_tokens.name}'; got others")
        gradients = leaves.gradients(scores, torch.ones_like(scores))
        shares = leaves.shares(gradients, scores.detach(), parts)
        return LogitParts((*leaves.part_names(parts), "rest"), shares, _sources(leaves, gradients), scores.detach())


def _sources(leaves: Leaves, gradients: list[Tensor]) -> dict[int, Tensor]:
    """sum_t A_ts (v_s . g_t) for each head of the self-attention of a layer, with the gradients g at its outputs."""
    sources = dict[int, Tensor]()
    for leaf, gradient in zip(leaves.leaves, gradients, strict=True):
        event = None if leaf.call is None or leaf.call.crosses else leaves.events.get(leaf.call)
        if event is None or event.value is None or event.masks is None or event.written is not None or event.inputs is not None:
            continue
        assert leaf.call is not None
        heads = event.query.shape[1]
        query, key, value = (x.detach().repeat_interleave(heads // x.shape[1], 1) for x in (event.query, event.key, event.value))
        options = {name: option for name, option in constant_options(event).items() if name != "enable_gqa"}
        with torch.enable_grad():
            output = score_attention(query, key, value.requires_grad_(), **options)
            (by_value,) = torch.autograd.grad(output, value, gradient)
        by_token = (by_value.double() * value.detach().double()).sum(-1)
        if leaf.call.columns is not None:  # keys that are no tokens, e.g. of a prefix
            by_token = by_token[..., leaf.call.columns.to(by_token.device)]
        sources[leaf.call.layer] = by_token
    return sources
