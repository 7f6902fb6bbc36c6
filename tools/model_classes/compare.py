"""One model of one class: `va.explain` as it is, beside the procedure on stored maps, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tools.tiny_models.inputs import inputs_of
from tools.tiny_models.mixers import each_within
from tools.tiny_models.shrink import small_model
from tools.tiny_models.stored import Double, Maps, in_double, stored_rows, stored_rows_between
from vlattn_fast import Action, explain
from vlattn_fast.methods import Gradient

BOUND = 1e-9  # of a row's largest value beside the identity


@dataclass(frozen=True)
class Row:
    """A line of the table: its outcome is "equal", "refused", "cannot be built", "cannot be compared" or "wrong"."""

    outcome: str
    reason: str = ""


Judge = Callable[[str, nn.Module, nn.Module, dict[str, Any]], Row]


def score_of(outputs: Any, inputs: dict[str, Any]) -> Tensor:
    """The scores (B,) that are explained by default: the largest logits, or of a policy the velocity of an action."""
    return -outputs.logits[:, 0, 0] if "noise" in inputs else next_logits(outputs, inputs).max(-1).values


def last_real(mask: Tensor) -> Tensor:
    return mask.shape[1] - 1 - mask.flip(-1).argmax(-1)


def compared(mapping: str, model: nn.Module, eager: nn.Module, inputs: dict[str, Any], freeze: Sequence[str] = ()) -> Row:
    """The row of a model; `eager` is the same model with eager attention, and with constants where `freeze` names them."""
    try:
        with each_within(model, Double):
            target = Action(0, step=0) if "noise" in inputs else None
            explanation = explain(model, inputs, target=target, method=Gradient(freeze=freeze))
    except Exception as error:
        return Row("refused", described(error))
    if mapping == "zero-shot":
        return compared_pairs(eager, inputs, explanation.relevancy)
    if "decoder_input_ids" in inputs or is_encoder_decoder(model):
        return compared_between(eager, inputs, list(explanation.relevancy.values()))
    row, *others = explanation.relevancy.values()
    size = row.shape[1]
    if others:
        return compared_crossing(eager, inputs, [row, *others])
    try:
        with Maps(eager) as kept, Steps(eager) as steps:
            outputs = eager(**inputs, output_attentions=True, output_hidden_states=True)
        scores = next_logits(outputs, inputs).max(-1).values
        maps = getattr(outputs, "attentions", None) or ()
        if kept.mixes or not are_maps(maps, size, scores):  # copies, or parts of them
            maps = kept.with_size(size)
        if not maps:
            return Row("cannot be compared", "the model gives no maps of its tokens")
        if outputs.logits.ndim == 2:
            rows = read_by_head([outputs.hidden_states[-1], *steps.with_size(size)], scores)
        else:
            position = last_real(inputs["attention_mask"]) + size - inputs["input_ids"].shape[1]  # behind patches
            rows = torch.nn.functional.one_hot(position, size).double()
        stored = stored_rows(maps, scores, rows)
        beside = False
        if "input_ids" in inputs:
            position = rows.argmax(-1) - size + inputs["input_ids"].shape[1]
            beside = mixed_beside_attention(eager, inputs, position, averaged=bool((rows.amax(-1) < 1).any()))
    except Exception as error:
        return Row("cannot be compared", described(error))
    if row.shape != stored.shape:
        return Row("wrong", f"rows {tuple(row.shape)} in place of {tuple(stored.shape)}")
    return judged([(row, stored, (stored - rows).abs().amax(-1))], beside)


def compared_crossing(eager: nn.Module, inputs: dict[str, Any], got: list[Tensor]) -> Row:
    """The row of a model whose tower attends to another tower's tokens, by calls of their own or in one softmax with its own."""
    batch, size = got[0].shape
    keys = got[1].shape[1]
    try:
        with Maps(eager) as kept:
            outputs = eager(**inputs)
        maps = [one for one in kept.maps if len(one) == batch]
        if "noise" in inputs:  # behind the state
            position = torch.ones(batch, dtype=torch.long)
        else:
            position = last_real(inputs["attention_mask"])
        rows = torch.nn.functional.one_hot(position, size).double()
        kinds = {(size, size): "self", (size, keys): "cross", (size, keys + size): "before"}
        if len(kinds) < 3 or len(got) > 2:
            return Row("cannot be compared", f"the sizes {[row.shape[1] for row in got]} do not tell the towers' maps apart")
        decoder = [(kinds[one.shape[2:]], one) for one in maps if one.shape[2:] in kinds]
        encoder = [one for one in maps if one.shape[2:] == (keys, keys)]
        by_layer = bool(encoder) and decoder[0][0] == "before" and not depends(decoder[0][1], encoder[0])
        itself, others = stored_rows_between(encoder, decoder, keys, score_of(outputs, inputs), rows, by_layer)
        beside = "noise" not in inputs and mixed_beside_attention(eager, inputs, position)
    except Exception as error:
        return Row("cannot be compared", described(error))
    signal = torch.maximum(itself.abs().amax(-1), others.abs().amax(-1))
    return judged([(got[0], itself, signal), (got[1], others, signal)], beside)


def depends(tensor: Tensor, another: Tensor) -> bool:
    return torch.autograd.grad(tensor.sum(), another, retain_graph=True, allow_unused=True)[0] is not None


def are_maps(maps: Sequence[Any], size: int, scores: Tensor) -> bool:
    """Whether these are maps of all tokens from which the scores were computed."""
    for stored in maps:
        if stored is None or not stored.requires_grad or stored.shape[-2:] != (size, size) or bool((stored < 0).any()):
            return False
    gradients = torch.autograd.grad(scores.sum(), list(maps), retain_graph=True, allow_unused=True) if maps else ()
    return any(gradient is not None for gradient in gradients)


def judged(rows: list[tuple[Tensor, Tensor, Tensor]], beside: bool) -> Row:
    """The outcome of rows (B, N), as they are and as they must be, with the largest value (B,) beside the identity."""
    # A score may depend on no other token, as of padding that a recurrence leaves out.
    share = max(float(((row - stored).abs().amax(-1) / signal.masked_fill(signal == 0, 1)).max()) for row, stored, signal in rows)
    if not share <= BOUND:
        return Row("wrong", f"rows differ by {share:.1e} of their largest value")
    if beside:
        return Row("wrong", "tokens also reach one another beside attention")
    return Row("equal", f"{share:.0e}")


def compared_pairs(eager: nn.Module, inputs: dict[str, Any], relevancy: dict[str, Tensor]) -> Row:
    """The row of a model that matches pictures with texts."""
    try:
        with Maps(eager) as kept, Steps(eager) as steps:
            outputs = eager(**inputs, output_attentions=True, output_hidden_states=True)
        scores = outputs.logits_per_image.diagonal()
        heads = [one for one in kept.maps if one.shape[2] == 1]  # whose only query is learnt
        rows = list[tuple[Tensor, Tensor, Tensor]]()
        for name, got in relevancy.items():
            tower_output = getattr(outputs, f"{name}_model_output")
            size = got.shape[-1]
            pooled = [one for one in heads if one.shape[3] == size] if name == "vision" else []
            if pooled:
                (gradient,) = torch.autograd.grad(scores.sum(), pooled, retain_graph=True)
                read = (pooled[0] * gradient).clamp(min=0).mean(1)[:, 0].detach()
            else:
                read = read_by_head([tower_output.last_hidden_state, *steps.with_size(size)], scores)
            stored = stored_rows(tower_output.attentions, scores, read)
            rows.append((got, stored, (stored - read).abs().amax(-1)))
    except Exception as error:
        return Row("cannot be compared", described(error))
    return judged(rows, False)


def is_encoder_decoder(model: Any) -> bool:
    parts = (model.config, getattr(model.config, "text_config", None))
    return any(getattr(part, "is_encoder_decoder", False) for part in parts)


def compared_between(eager: nn.Module, inputs: dict[str, Any], got: list[Tensor]) -> Row:
    """The row of an encoder-decoder, from those of its decoder and of what this attends to."""
    try:
        with Maps(eager) as kept, Steps(eager) as steps:
            outputs = eager(**inputs, output_attentions=True, output_hidden_states=True)
        scores = next_logits(outputs, inputs).max(-1).values
        rows = read_by_head([(getattr(outputs, "decoder_hidden_states", None) or steps.with_size(got[0].shape[1]))[-1]], scores)
        position = rows.argmax(-1)
        maps = [getattr(outputs, f"{name}_attentions", None) or () for name in ("encoder", "decoder", "cross")]
        encoder, decoder = (
            maps[0],
            [pair for each in zip(*maps[1:], strict=False) for pair in zip(("self", "cross"), each, strict=True)],
        )
        batch, size = got[1].shape
        by_layer, joint = False, [one for one in kept.maps if one.shape[2:] == (rows.shape[1], rows.shape[1] + size)]
        if joint:  # what the model gives are parts of these
            encoder = [one for one in kept.maps if one.shape[2:] == (size, size) and len(one) == batch]
            by_layer = not depends(joint[0], encoder[0])  # of a cache, whose keys come first
            decoder = [("before" if by_layer else "behind", one) for one in joint]
        elif any(one is None or one.shape[2:] != (size, size) for one in encoder):  # of windows, in front of a convolution
            encoder = [one for one in kept.maps if one.shape[2:] == (size, size) and len(one) == batch]
        elif not encoder:
            return Row("cannot be compared", "the model gives no maps of its encoder")
        if not decoder or any(one is None or not one.requires_grad for one in (*encoder, *(one for _, one in decoder))):
            return Row("cannot be compared", "the model gives no maps of its decoder, and between this and its encoder")
        itself, others = stored_rows_between(encoder, decoder, size, scores, rows, by_layer)
        beside = mixed_beside_attention(eager, inputs, position, rows.shape[1])
    except Exception as error:
        return Row("cannot be compared", described(error))
    if [row.shape for row in got] != [itself.shape, others.shape]:
        return Row("wrong", f"rows {[tuple(row.shape) for row in got]} in place of {tuple(itself.shape)}, {tuple(others.shape)}")
    signal = torch.maximum(itself.abs().amax(-1), others.abs().amax(-1))
    return judged([(got[0], itself, signal), (got[1], others, signal)], beside)


def mixed_beside_attention(
    model: Any, inputs: dict[str, Any], position: Tensor, decoded: int | None = None, averaged: bool = False
) -> bool:
    """Whether the score depends on other tokens' embeddings than that at `position` where attention hands nothing on. An
    encoder-decoder reads one of `decoded` tokens; where tokens are `averaged`, the last state there stands for the score."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1] * 1  # models may write into it

    embeddings = [embedding_of(part) for part in ([model] if decoded is None else [model.get_encoder(), model.get_decoder()])]
    handles = [module.register_forward_hook(keep) for module in dict.fromkeys(embeddings) if module is not None]
    try:
        with Maps(model, cut=True):
            outputs = model(**inputs, output_hidden_states=averaged)
    finally:
        for handle in handles:
            handle.remove()
    if averaged:
        states = outputs.hidden_states[-1][torch.arange(len(position)), position]
        scores = (states * torch.arange(states.shape[-1])).sum(-1)
    else:
        scores = next_logits(outputs, inputs).max(-1).values
    if not scores.requires_grad:
        return False
    parts = embedded[:1] if decoded is None else embedded
    for part, gradient in zip(parts, torch.autograd.grad(scores.sum(), parts, allow_unused=True), strict=True):
        if gradient is None:
            continue
        others = gradient.clone() if gradient.shape[0] == len(position) else gradient.transpose(0, 1).clone()  # tokens come first
        is_encoders = decoded is not None and embeddings[0] is not None and part is embedded[0]
        if decoded is None or (part.shape[1] == decoded and not is_encoders):
            before = 0 if decoded is not None else others.shape[1] - inputs["input_ids"].shape[1]  # learnt tokens, in front
            others[torch.arange(len(position)), position + before] = 0
        if bool((others != 0).any()):
            return True
    return False


def embedding_of(part: Any) -> nn.Module | None:
    """The embedding of a part's tokens; None of one that sees pictures alone."""
    try:
        return part.get_input_embeddings()
    except NotImplementedError:
        return None


def outcome_of(mapping: str, name: str, judge: Judge = compared) -> Row:
    """The row of a class of transformers, by the mapping that it stands in."""
    with in_double():
        return _outcome_of(mapping, name, judge)


def _outcome_of(mapping: str, name: str, judge: Judge) -> Row:
    import transformers

    problem = ""
    for fill in (False, True):
        try:
            model = small_model(getattr(transformers, name), fill)
            eager = small_model(getattr(transformers, name), fill, "eager")
        except Exception as error:
            problem = problem or described(error)
            continue
        for make in inputs_of(mapping, model):
            try:
                if runs(model, inputs := make()):
                    return judge(mapping, model, eager, inputs)
                problem = problem or "its logits are not finite, or a picture does not change them"
            except Exception as error:
                problem = problem or described(error)
    return Row("cannot be built", problem)


def runs(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the logits that are read are finite, and follow the picture."""
    with torch.no_grad():
        logits = next_logits(model(**inputs), inputs)
        if "pixel_values" in inputs:
            if not any(_follows(model, inputs, logits, change) for change in (lambda x: x.roll(1, -1) + 0.5, lambda x: -3 * x)):
                return False
        return bool(logits.isfinite().all())


def _follows(model: nn.Module, inputs: dict[str, Any], logits: Tensor, change: Callable[[Tensor], Tensor]) -> bool:
    changed = {name: change(value) if name.endswith("pixel_values") else value for name, value in inputs.items()}
    same = (next_logits(model(**changed), inputs) == logits) & (logits > torch.finfo(logits.dtype).min)  # the least are masked
    return not bool(same.any())


def read_by_head(steps: list[Tensor], scores: Tensor) -> Tensor:
    """The weights (B, N) of the tokens that the scores are read from: of the one whose last hidden state alone they depend on, or
    of several whose states, behind one of the `steps`, are averaged."""
    gradients = torch.autograd.grad(scores.sum(), steps, retain_graph=True, allow_unused=True)
    if gradients[0] is None:  # a copy: what a module gave last comes next to the head
        gradients = [gradient for gradient in reversed(gradients) if gradient is not None]
    read = (gradients[0] != 0).any(-1)
    if bool((read.sum(-1) == 1).all()):
        return read.double()
    for gradient in gradients[1:]:
        if gradient is not None and torch.equal((gradient != 0).any(-1), read):
            mean = (gradient * read[..., None]).sum(1, keepdim=True) / read.sum(-1)[:, None, None]
            if torch.allclose(gradient[read], mean.expand_as(gradient)[read], rtol=1e-9, atol=1e-15):
                return read.double() / read.sum(-1, keepdim=True)
    raise ValueError(f"the score depends on {read.sum(-1).tolist()} hidden states")


class Steps:
    """Outputs of a model's modules for their tokens, in the order in which they end."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.outputs = model, list[Tensor]()

    def __enter__(self) -> Steps:
        self._handles = [module.register_forward_hook(self._keep) for module in self.model.modules()]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, (tuple, Mapping)) and output else output
        if isinstance(output, Tensor) and output.ndim == 3 and output.requires_grad:
            self.outputs.append(output)

    def with_size(self, size: int) -> list[Tensor]:
        return [output for output in self.outputs if output.shape[1] == size]


def next_logits(outputs: Any, inputs: dict[str, Any]) -> Tensor:
    """The logits (B, vocabulary) behind each prompt, which may begin with patches; else (B, classes) or (images, texts)."""
    if getattr(outputs, "logits_per_image", None) is not None:
        return outputs.logits_per_image
    if "noise" in inputs:
        return outputs.logits[:, 0]
    if outputs.logits.ndim == 2:
        return outputs.logits
    if "decoder_input_ids" in inputs:
        return outputs.logits[:, -1]
    position = last_real(inputs["attention_mask"]) + outputs.logits.shape[1] - inputs["input_ids"].shape[1]
    return outputs.logits[torch.arange(len(position)), position]


def described(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
