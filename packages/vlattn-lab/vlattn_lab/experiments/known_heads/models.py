"""Questions about trained models with heads whose work is known, and about planted circuits."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_lab.experiments.known_heads.cuts import Question, digits, measured, place_of
from vlattn_lab.experiments.known_heads.words import STEP, attention_rows, starts, within
from vlattn_lab.experiments.planted_circuits.mib import is_causal
from vlattn_lab.experiments.planted_circuits.models import Circuit, Samples, planted
from vlattn_lab.real import listening, reactions
from vlattn_lab.real.voice import Speech, spoken
from vlattn_lab.speech import NO_TIMESTAMPS, START, load_whisper

MAPPER = (10, 5)  # the layer and head of RXNMapper that maps atoms, as its authors published
PUBLISHED = ((1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4))  # alignment heads of Whisper tiny.en, by OpenAI
OF_TRIAL = ((1, 5), (2, 1), (3, 2))  # heads that never missed a word in a trial on seven other sentences
MARGIN = 0.1  # seconds around a word
Row = dict[str, Any]


# --- reactions ---


@cache
def chemist() -> tuple[reactions.Chemist, list[reactions.Reaction]]:
    return reactions.load(), reactions.reactions()


def of_reaction(number: int) -> Row:
    """The edges from the reactants to a masked atom that the model knows; nothing if the reaction has none."""
    of, listed = chemist()
    reaction = listed[number]
    atoms = reactions.chosen(of, reaction)
    if not atoms:
        return {"all": None}
    place, size = atoms[0]["place"], len(reaction.tokens)
    position = torch.arange(size)[None]
    groups = {"reactants": position < reaction.arrow, "atom": position == place}
    inputs, score = of.inputs(reaction, place), of.score(reaction, place)
    config = of.model.config
    heads = product(range(config.num_hidden_layers), range(config.num_attention_heads))
    places = [(layer, head, "reactants", "atom") for layer, head in heads]
    maps = va.explain_layers(of.model, inputs, per="head", method="attention", position=place, target=score)
    mass = next(iter(maps.relevancy.values()))[:, :, 0, : reaction.arrow].sum(-1)
    row = measured(Question(of.model, inputs, groups, places, score, mass=mass), number)
    number_of = MAPPER[0] * config.num_attention_heads + MAPPER[1]
    for one in row["predictions"]:
        one["place"] = place_of(one["effects"], number_of)
    alike = torch.tensor([head for _, head, *_ in places]) == torch.arange(config.num_attention_heads)[:, None]
    question = Question(of.model, inputs, groups, places, score)
    columns = torch.cat([alike, ~alike[MAPPER[1]][None]])
    facts = {"mass": round(float(mass[MAPPER]), 4), "place": place_of(row["true"], number_of)}
    return {**row, **facts, "columns": digits(question.cut(columns))}


def maps_of_reaction(number: int) -> Row:
    """For each head, on how many product atoms its most attended reactants' atom is the right one."""
    of, listed = chemist()
    reaction = listed[number]
    ids = torch.tensor([[of.words.get(token, of.words["[UNK]"]) for token in reaction.tokens]] * len(reaction.truth))
    positions = torch.nn.functional.one_hot(torch.tensor([*reaction.truth]), ids.shape[1]).float()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    asked: Row = {"per": "head", "method": "attention", "target": lambda out: out.logits[:, 0, 0]}
    maps = va.explain_layers(of.model, inputs, position=positions, **asked)
    sources = torch.tensor(reaction.sources)
    best = sources[next(iter(maps.relevancy.values()))[..., sources].argmax(-1)]  # (L, H, atoms)
    right = torch.zeros(len(reaction.truth), ids.shape[1], dtype=torch.bool)
    for n, among in enumerate(reaction.truth.values()):
        right[n, [*among]] = True
    hits = right[torch.arange(len(right)), best].sum(-1)
    return {"atoms": len(right), "hits": hits.flatten().tolist()}


def probed(numbers: list[int]) -> Row:
    """The value of each head in `va.probe`'s test of coreference: whether its attention from an atom tells the right source."""
    of, listed = chemist()
    arrow = of.words[">>"]

    def parts(inputs: Any) -> Tensor:
        ids = inputs["input_ids"][0]
        split, place = int((ids == arrow).nonzero()[0, 0]), torch.arange(len(ids))
        sides = torch.where(place < split, 1, 0)
        return sides.masked_fill((place == 0) | (place == split) | (place == len(ids) - 1), -1)

    data = []
    for reaction in (listed[number] for number in numbers):
        ids = torch.tensor([[of.words.get(token, of.words["[UNK]"]) for token in reaction.tokens]])
        phrases = [((place, place + 1), [source - 1 for source in sorted(right)]) for place, right in reaction.truth.items()]
        data.append(({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"phrases": phrases}))
    table = va.probe(of.model, data, tests=("coreference",), parts=parts).table
    values = [line["value"] for line in table if line["test"] == "coreference" and line["head"] is not None]
    return {"values": digits(torch.tensor(values))}


# --- speech ---


@cache
def listener() -> listening.Listener:
    return listening.Listener(*load_whisper())


@torch.no_grad()
def heard(number: int) -> tuple[Speech, Tensor, list[int], list[int | None]]:
    """A sentence, the encoder's outputs (1, M, D), the tokens of what was spoken, and the word of each."""
    of, speech = listener(), spoken(number)
    states = of.model.model.encoder(of.inputs(speech)["input_features"]).last_hidden_state
    text = " " + " ".join(word for word, _, _ in speech.words)
    ids = of.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return speech, states, ids, of.words(ids)


def of_word(number: int) -> Row:
    """The edges from the sound of a word to the token before it, which predicts its first token."""
    of, (speech, states, ids, words) = listener(), heard(number)
    word = 2 + 3 * number % (len(speech.words) - 2)
    first, (_, begin, end) = words.index(word), speech.words[word]
    at = (torch.arange(states.shape[1])[None] + 0.5) * STEP
    tokens = torch.tensor([[START, NO_TIMESTAMPS, *ids[:first]]])
    groups = {"sound": (begin - MARGIN <= at) & (at <= end + MARGIN), "word": torch.arange(tokens.shape[1])[None] == first + 1}
    config = of.model.config
    places = [(n, h, "sound", "word") for n in range(config.decoder_layers) for h in range(config.decoder_attention_heads)]

    def score(out: Any) -> Tensor:
        return out.logits[:, -1].log_softmax(-1)[:, ids[first]]

    inputs = {"encoder_outputs": (states,), "decoder_input_ids": tokens}
    tower = "tower0", f"context{states.shape[1]}"
    return {"word": speech.words[word][0], **measured(Question(of.model, inputs, groups, places, score, tower), number)}


def times_of_words(number: int) -> Row:
    """How well each way of weighting positions tells when the words begin."""
    of, (speech, states, ids, words) = listener(), heard(number)
    layers = of.model.model.decoder.layers
    projected: list[dict[str, Tensor]] = [{} for _ in layers]
    hooks = []
    for layer, kept in zip(layers, projected, strict=True):
        for name in ("q_proj", "k_proj"):
            module = getattr(layer.encoder_attn, name)
            hooks.append(module.register_forward_hook(lambda _, args, out, kept=kept, name=name: kept.update({name: out[0]})))
    begin = torch.tensor([[START, NO_TIMESTAMPS]])
    inputs = {"encoder_outputs": (states,), "decoder_input_ids": torch.cat([begin, torch.tensor([ids])], 1)}
    with torch.no_grad():
        of.model(**inputs)
    for hook in hooks:
        hook.remove()
    size = min(states.shape[1], round(speech.end / STEP))
    rows = torch.stack(
        [
            attention_rows(layer.encoder_attn, kept["q_proj"], kept["k_proj"])[..., :size]
            for layer, kept in zip(layers, projected, strict=True)
        ]
    )  # (L, H, T, size)
    named = [None, *words, None]  # the first row is of what comes before the words, the last one of what comes after them
    ways = {
        "published alignment heads": torch.stack([rows[place] for place in PUBLISHED]),
        "heads 1.5, 2.1 and 3.2": torch.stack([rows[place] for place in OF_TRIAL]),
        "all heads": rows.flatten(0, 1),
        **{f"head {n}.{h}": rows[n, h][None] for n in range(len(rows)) for h in range(rows.shape[1])},
    }
    explained = va.explain(of.model, {**inputs, "decoder_input_ids": begin}, answer=[ids])
    relevancy = explained.relevancy[f"context{states.shape[1]}"][0, :, :size].clamp(min=0)
    ends = torch.zeros_like(relevancy[:1])
    ways["`gradient`"] = torch.cat([ends, relevancy / relevancy.sum(-1, keepdim=True).clamp(min=1e-30), ends])[None]
    return {"ways": [{"way": name, **within(starts(each, named), speech.words)} for name, each in ways.items()]}


# --- planted circuits ---


def of_planted(circuit: str, share: float, seed: int, samples: int) -> Row:
    made = planted(circuit, share, seed)
    drawn = made.draw(samples, seed)
    places = _places(made, drawn)

    def score(out: Any) -> Tensor:
        logits = out.logits if out.logits.ndim == 2 else out.logits[:, -1]
        return logits.gather(1, drawn.answers.repeat(len(logits) // samples)[:, None])[:, 0]

    row = measured(Question(made.model, drawn.inputs, drawn.groups, places, score), seed)
    finds, _ = (places.index(edge) for edge in made.edges)
    for one in row["predictions"]:
        one["place"] = place_of(one.pop("effects"), finds)
    place = place_of(row.pop("true"), finds)
    return {**row, "place": place, "edges": len(places)}


def _places(circuit: Circuit, samples: Samples) -> list[tuple[int, int, str, str]]:
    """All edges whose query may see the key."""
    table = va.attribute_edges(circuit.model, samples.inputs, samples.groups, target=samples.answers.tolist())
    kept = [edge for edge in table if not circuit.is_causal or is_causal(samples.groups, edge)]
    return [(edge.layer, edge.head, edge.from_, edge.to) for edge in kept if edge.head is not None]
