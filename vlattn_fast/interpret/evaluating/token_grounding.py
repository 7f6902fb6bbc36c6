"""`token_grounding`: what tells whether each word of an answer rests on the image, or on the sound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_bool
from vlattn_fast.attach.session import at_rest, never_compiled
from vlattn_fast.interpret.adapters.tokens import Tokens
from vlattn_fast.interpret.evaluating.grounding_table import BY_HEAD, SHARES, TokenGrounding
from vlattn_fast.interpret.explaining.answer import Answer, explained_number
from vlattn_fast.interpret.explaining.explain import explain
from vlattn_fast.interpret.explaining.inputs import packing
from vlattn_fast.interpret.explaining.request import Prompt, Request, lay_out
from vlattn_fast.interpret.relevancy.last_attention import attention_rows
from vlattn_fast.interpret.relevancy.method import LOG_PROBABILITY, Method
from vlattn_fast.interpret.relevancy.model_trace import Trace
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.ops.attention_statistics import attention_statistics


@never_compiled
def token_grounding(
    model: nn.Module, inputs: Mapping[str, Any], *, answer: Any, processor: Any = None, maps: bool = True
) -> TokenGrounding:
    """Returns, for each token of an answer, the numbers that tell whether it rests on the image, or on the sound.

    Two forward passes, one with the image or sound blanked; `maps` adds a forward pass, and a backward pass for each token. No
    map is kept.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig, GPT2Config
        >>> vision = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
        >>> text = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=2)
        >>> config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text, decoder_start_token_id=1)
        >>> model = VisionEncoderDecoderModel(config)  # random weights
        >>> table = va.token_grounding(model, {"pixel_values": torch.randn(1, 3, 16, 16)}, answer=[[5, 6, 7]])
        >>> len(table), table.by_head["diagonal"].shape  # tokens; samples, tokens, layers, heads
        (3, torch.Size([1, 3, 2, 4]))

    The numbers of a token:

    - `log_probability`, with the answer before it forced; `log_probability_blank`, the same with every pixel 0 (the mean of
      normalised images), a log-mel spectrogram at its least number or a silent wave; `gain`, the first less the second; `entropy`
      of the prediction, in nats.
    - Of the query that predicts it, in the decoder's attention to itself: `share_image`, `share_question` and `share_answer`, the
      attention on image tokens, on the other tokens of the prompt, and on the answer so far. `attention_entropy` in nats: of its
      attention to the image tokens, as parts of what they get; of an encoder-decoder, of its cross-attention. All are means over
      layers and heads; `by_head` has each, by the numbers of layers that interventions take.
    - Of the token itself: `diagonal`, its attention on itself, and `received_less_diagonal`, the mean attention that it gets from
      itself and later tokens, less that: an eigenvalue of the Laplacian of the attention's graph.
    - Of its map by method "gradient" over the image, or the sound: `compactness`, 1 less the entropy of the positive part over
      its largest possible value (1 = on a single patch, 0 = even); `near_peak`, the share of the positive part within a tenth of
      the map's longer side of its peak; `components`, the connected parts of the entries of at least half the peak.

    `log_probability` is often the best of them, and attention alone does not know which word is said: the query that predicts a
    token does not see it. A map does.

    Args:
        model, inputs, answer, processor: as in `explain`.
        maps: whether the numbers of maps are computed.

    Returns:
        A `TokenGrounding`.

    Raises:
        TypeError, ValueError: attention over a part of the keys, such as in windows, or with another score than the dot product;
            and what `explain` raises.

    Reference: Binkowski et al., "Hallucination Detection in LLMs Using Spectral Features of Attention Maps", EMNLP 2025
    (the eigenvalues).
    """
    check_bool(maps=maps)
    if answer is None:
        raise ValueError("answer must be given: token ids, a text, or what `model.generate` returned; got None")
    request = Request.check(model, inputs, method=_Looks(), answer=answer, processor=processor)
    with torch.inference_mode(False), torch.no_grad(), at_rest(request.model), packing(request.model, request.packs):
        prompt = lay_out(request)
        if prompt.empty or prompt.answer is None:
            raise ValueError("inputs must have a sample; got an empty batch")
        looks = _Looks(prompt)
        with Trace(request.model, request.adapter, looks) as trace:
            outputs = request.model(**trace.prepare(prompt.arguments))
        trace.check()
        numbers = _of_predictions(prompt, outputs)
        if blank := _blanked(prompt.arguments):
            without = _of_predictions(prompt, request.model(**{**prompt.arguments, **blank}))["log_probability"]
            numbers |= {"log_probability_blank": without, "gain": numbers["log_probability"] - without}
    real, by_head = prompt.answer.real, looks.by_head()
    numbers |= {name: values.nanmean((2, 3)) for name, values in by_head.items()}
    if maps:
        numbers |= _of_maps(explain(model, inputs, answer=answer, processor=processor, method="gradient"), real)
    numbers = {name: x.double().cpu().masked_fill(~real, torch.nan) for name, x in numbers.items()}
    tokens: list[list[Any]] = prompt.answer.ids
    if hasattr(request.tokenizer, "convert_ids_to_tokens"):
        tokens = [[str(token) for token in request.tokenizer.convert_ids_to_tokens(row)] for row in tokens]
    return TokenGrounding(tokens, numbers, by_head)


def _of_predictions(prompt: Prompt, outputs: Any) -> dict[str, Tensor]:
    """The log-probability of each token of the answer, and the entropy of its prediction, (B, T)."""
    answer, scoring = prompt.answer, prompt.request.adapter.scoring
    assert answer is not None
    rows, ids = answer.predicting(scoring.logits(outputs), prompt.arguments.get("logits_to_keep"))
    logs = rows.double().log_softmax(-1)
    entropy = -torch.where(logs.isneginf(), 0.0, logs.exp() * logs).sum(-1)
    return {"log_probability": explained_number(LOG_PROBABILITY, rows.double(), ids), "entropy": entropy}


def _blanked(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The image or sound among the arguments, with nothing in it."""
    blank = {}
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or name.endswith(("mask", "inputs_embeds", "boxes")):
            continue
        silent = float(value.min()) if name == "input_features" and value.numel() else 0.0  # a log-mel spectrogram
        blank[name] = torch.full_like(value, silent)
    return blank


class _Looks(Method):
    """Takes numbers of an answer's tokens from every call of the decoder."""

    needs_score = False
    uses_position = False
    needs_mixer_rules = False
    adds_parallel = True

    def __init__(self, prompt: Prompt | None = None) -> None:
        super().__init__()
        self._prompt = prompt
        self._found: dict[TowerTrace, list[tuple[int, dict[str, Tensor]]]] = {}

    def attend(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        if self._decodes(tower) and not call.is_mixing:
            self._see(tower, call, self._of_itself(tower, call))
        return call.computed()

    def cross(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        if self._decodes(tower):
            probs = attention_rows(call, self._places(tower)[0])
            self._see(tower, call, {"attention_entropy": torch.special.entr(probs).sum(-1)})
        return call.computed()

    def by_head(self) -> dict[str, Tensor]:
        """(B, T, L, H) of the last tower over the answer: an encoder, whose text may be as long, runs before. NaN for layers
        without such a number."""
        found = list(self._found.values())[-1] if self._found else []
        count, by_name = 1 + max((layer for layer, _ in found), default=-1), {}
        for name in BY_HEAD:
            seen = dict[int, list[Tensor]]()
            for layer, numbers in found:
                if name in numbers:
                    seen.setdefault(layer, []).append(numbers[name].double().cpu())
            if seen:
                each = {layer: torch.cat(calls, -1) for layer, calls in seen.items()}  # the heads of all calls of a layer
                nothing = torch.full_like(next(iter(each.values())), torch.nan)
                by_name[name] = torch.stack([each.get(layer, nothing) for layer in range(count)], 2)
        return by_name

    def _see(self, tower: TowerTrace, call: TracedCall, numbers: Mapping[str, Tensor]) -> None:
        turned = {name: values.transpose(1, 2) for name, values in numbers.items()}  # (B, H, T)
        self._found.setdefault(tower, []).append((call.layer, turned))

    @property
    def _answer(self) -> Answer:
        assert self._prompt is not None and self._prompt.answer is not None
        return self._prompt.answer

    def _tokens(self, tower: TowerTrace) -> Tokens:
        assert self._prompt is not None
        return tower.tokens_in(self._prompt.arguments)

    def _decodes(self, tower: TowerTrace) -> bool:
        """Whether the answer is among the tokens of a tower."""
        assert self._prompt is not None
        if tower.entry is not None and tower.entry.rule.predicts:
            return True
        return tower.shape == tuple(self._prompt.arguments[self._answer.name].shape)

    def _places(self, tower: TowerTrace) -> tuple[Tensor, Tensor]:
        """The places (B, T) of the queries that predict the answer's tokens, and of these."""
        before = self._tokens(tower).before
        predicting, answer_places = self._answer.start_positions + before, self._answer.answer_positions + before + 1
        last = answer_places.masked_fill(~self._answer.real, -1).amax(1, keepdim=True)
        return predicting, torch.minimum(answer_places, last)

    def _groups(self, tower: TowerTrace) -> Tensor:
        """int64 (B, N), the group of each token among SHARES."""
        tokens, (_, answer_places) = self._tokens(tower), self._places(tower)
        groups = torch.ones(tower.shape, dtype=torch.long)
        if tokens.image or tokens.image_ids:
            groups[tokens.image_mask().cpu()] = 0
        place = torch.arange(tower.size)
        return groups.masked_fill((place >= answer_places[:, :1]) & (place <= answer_places.amax(1, keepdim=True)), 2)

    def _of_itself(self, tower: TowerTrace, call: TracedCall) -> dict[str, Tensor]:
        """Of one call of the decoder to itself, (B, H, T)."""
        if call.part or call.columns is not None or call.token_positions is not None or call.score != "dot":
            what = call.part or "a module attends to other keys than its tokens, in another order, or with another score"
            raise ValueError(f"token_grounding does not support models in which {what}; got attention '{call.path}'")
        (predicting, answer_places), device = self._places(tower), call.query.device
        groups, places = self._groups(tower).to(device), torch.arange(tower.size)
        counted = (places <= answer_places.amax(1, keepdim=True)).to(device, torch.float32)
        real = self._tokens(tower).real()
        counted = counted if real is None else counted * real.to(counted)
        probs = attention_rows(call, predicting.to(device))
        numbers = {name: (probs * (groups == n)[:, None, None]).sum(-1) for n, name in enumerate(SHARES)}
        if bool((groups == 0).any()):
            of_image = probs * (groups == 0)[:, None, None]
            of_image = of_image / of_image.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
            numbers["attention_entropy"] = torch.special.entr(of_image).sum(-1)
        else:
            numbers["share_image"] = torch.full_like(numbers["share_image"], torch.nan)
        asked: Any = attention_statistics(
            call.query, call.key, statistics=("received", "diagonal"), row_weight=counted, **call.masks
        )
        later = counted.flip(1).cumsum(1).flip(1).clamp(min=1)  # the token itself and those after it
        diagonal, received = (
            x.gather(2, answer_places.to(device)[:, None].expand(-1, x.shape[1], -1))
            for x in (asked.diagonal, asked.received / later[:, None].to(asked.received.dtype))
        )
        return {**numbers, "diagonal": diagonal, "received_less_diagonal": received - diagonal}


def _of_maps(explanation: Explanation, real: Tensor) -> dict[str, Tensor]:
    """Numbers of the maps over the image or the sound, (B, T); none without one."""
    samples: dict[int, list[Tensor]] = {}
    if explanation.image is None:
        return {}
    for sample, of_image in zip(explanation.image_samples or range(len(explanation.image)), explanation.image, strict=True):
        samples.setdefault(sample, []).append(of_image)  # (T, h, w)
    found = torch.full((3, *real.shape), torch.nan, dtype=torch.float64)
    for sample, maps in samples.items():
        for token in range(int(real[sample].sum())):
            found[:, sample, token] = torch.tensor(map_numbers([each[token] for each in maps]), dtype=found.dtype)
    return dict(zip(("compactness", "near_peak", "components"), found, strict=True))


def map_numbers(maps: Sequence[Tensor]) -> tuple[float, float, float]:
    """Compactness, share near the peak and number of parts (see `token_grounding`) of the maps (h, w) of a sample; NaN if no
    entry is above 0."""
    positive = [x.detach().double().cpu().clamp(min=0) for x in maps]
    total, count = float(sum(x.sum() for x in positive)), sum(x.numel() for x in positive)
    if not total > 0:
        return math.nan, math.nan, math.nan
    entropy = float(sum(torch.special.entr(x / total).sum() for x in positive))
    peaks = [float(x.max()) for x in positive]
    best = positive[max(range(len(peaks)), key=peaks.__getitem__)]
    y, x = divmod(int(best.argmax()), best.shape[1])
    rows, columns = (torch.arange(size) for size in best.shape)
    near = (rows[:, None] - y) ** 2 + (columns - x) ** 2 <= max(1.0, max(best.shape) / 10) ** 2
    parts = sum(_components(each >= max(peaks) / 2) for each in positive)
    compactness = 1 - entropy / math.log(count) if count > 1 else 1.0
    return compactness, float(best[near].sum()) / total, float(parts)


def _components(marked: Tensor) -> int:
    """The connected parts of bool (h, w), by sides."""
    left, parts = {(y, x) for y, x in marked.nonzero().tolist()}, 0
    while left:
        parts, waiting = parts + 1, [left.pop()]
        while waiting:
            y, x = waiting.pop()
            beside = left & {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)}
            left -= beside
            waiting += beside
    return parts
