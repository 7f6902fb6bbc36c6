"""The five observations of VALUE (Cao et al., "Behind the Scene", ECCV 2020), on a model with one stream, UNITER, and one with
two, LXMERT, both trained on DigitScenes, with losses on where named digits are ("located") and without ("pretraining").

A seed stands for a trained model, the same model untrained, and its test scenes. Controls are the untrained model and captions of
other scenes. [CLS] and [SEP] count as neither text nor image: otherwise seven of eleven tokens would be text, and a head that
attends evenly would be cross-modal. "Best head" is chosen on other scenes than those on which it is measured.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlattn_fast import ProbeReport, probe
from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.provenance import fingerprint
from vlattn_fast.measuring.records import having, markdown, spread
from vlattn_fast.models import UNITER
from vlattn_lab import lxmert, uniter
from vlattn_lab.experiments.experiment import (
    Cell,
    Effect,
    Experiment,
    Record,
    Settings,
    Stage,
    effects_of,
    effects_table,
    spearman,
)
from vlattn_lab.probing import probe_samples
from vlattn_lab.scenes import NEGATIVES, Scenes, digit_scenes
from vlattn_lab.train.fit import seeded
from vlattn_lab.train.lxmert import train as train_lxmert
from vlattn_lab.train.uniter import train as train_uniter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = ("pretraining", "located")  # recipes of `train.uniter`; claims are those of the first
STEPS = {  # by arm and model
    ("pretraining", "UNITER"): 3000,
    ("pretraining", "LXMERT"): 3000,
    ("located", "UNITER"): 3000,
    ("located", "LXMERT"): 2000,
}
STATES = ("trained", "untrained")
OBSERVATIONS = ("i", "ii", "iii", "iv", "v")
TOKENS = {"text": 5, "image": 4, "special": 2}  # in a caption and a scene
SAMPLES, CHOOSING, SCENES = 200, 100, 500  # for the probes, for the choice of heads, and for an accuracy
OTHER_SCENES = 1000  # added to the seed
RANDOM_PAIRS = 5  # of heads, silenced at once
ALIGNED = 0.9  # accuracy of a head that tells a phrase's region
PAIRS = {
    "coreference": "the region of a phrase",
    "coreference_class": "the digit that links a phrase and its region",
    "relation_detection": "whether the caption relates two regions",
    "relation": "the relation of two regions",
    "word_relation": "the relation of two words",
}
TASKS = {
    "word_content": "whether a word is in the caption",
    "first_digit": "the first word",
    "word_order": "two exchanged neighbours",
    "odd_word": "a word that does not go with its neighbour",
    "inverted": "a caption with its digits exchanged",
}
SHOWN = (  # in the picture: arm, state, colour, and how far to the right
    (ARMS[0], "untrained", "#9a9a9a", 0.22),
    (ARMS[0], "trained", "#c2410c", 0.0),
    (ARMS[1], "trained", "#1d4ed8", -0.22),
)
ORDER = ("word_order", "odd_word", "inverted")  # tasks that need more than which words there are
HEAD_TESTS = (*PAIRS, "linguistic_heads")


class Architecture(NamedTuple):
    """An architecture as the experiment needs it.

    joins: a model's modules that join the heads of an attention, by (stream, layer). inputs: UNITER's inputs under the model's
    names. matching: a model as a function of UNITER's inputs. taken: see `taken_by_uniter`. first_taken: the same where words
    hold nothing of the image yet.
    """

    fresh: Callable[[], nn.Module]
    train: Callable[..., nn.Module]
    load: Callable[[Path], tuple[nn.Module, Any]]
    inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    matching: Callable[[Any], Callable[..., Any]]
    joins: Callable[[Any], dict[tuple[str, int], nn.Module]]
    taken: Callable[[Any, dict[str, Tensor]], list[tuple[float, float]]]
    first_taken: Callable[[Any, dict[str, Tensor]], tuple[float, float]]


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    arms = itertools.product(ARMS[:1] if settings.smoke else ARMS, ARCHITECTURES, range(settings.seeds))
    return [{"arm": arm, "model": name, "seed": seed} for arm, name, seed in arms]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    name, arm, seed = cell["model"], cell["arm"], cell["seed"]
    samples, scenes = (20, 10) if settings.smoke else (SAMPLES, SCENES)
    kind = ARCHITECTURES[name]
    untrained, model = fresh(name, seed), trained(name, arm, seed, settings)
    measured: dict[str, Any] = {"weights": fingerprint(model)}
    for state, one in zip(STATES, (model, untrained), strict=True):
        report = probe(one, named(name, samples, seed), special=False)
        measured[state] = kept(report)
        if not settings.smoke:
            report = probe(one, named(name, CHOOSING, seed + OTHER_SCENES), tests=HEAD_TESTS, special=False)
        measured[state]["chosen"] = chosen(report)
        inputs = next(probe_samples(samples, seed=seed, batch=samples))[0]
        measured[state] |= {"taken": kind.taken(one, inputs), "first taken": kind.first_taken(one, inputs)}
        if state == "trained":
            linking = ranked(report, "coreference")[:2]
    if name == "UNITER":
        tests = ("modality", "cross_modal")
        measured["other captions"] = kept(probe(model, other_captions(samples, seed), tests=tests, special=False))
    drawn = [digit_scenes(scenes, seed=seed, negative=negative) for negative in (None, *NEGATIVES)]
    matching = kind.matching(model)
    measured |= accuracy(matching, drawn)
    measured["without_head"] = []
    for (stream, layer), module in kind.joins(model).items():
        for head in range(uniter.CONFIG.num_attention_heads):
            with without_head(module, head):
                left = accuracy(matching, drawn)
            measured["without_head"].append({"stream": stream, "layer": layer, "head": head, **left})
    across = [module for (stream, _), module in kind.joins(model).items() if stream == "both"]
    heads = [*itertools.product(range(len(across)), range(uniter.CONFIG.num_attention_heads))]
    others = [place for place in heads if [*place] not in linking]
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randperm(len(others), generator=generator)[:2].tolist() for _ in range(1 if settings.smoke else RANDOM_PAIRS)]
    pairs = [linking, *([others[place] for place in draw] for draw in draws)]
    measured["without_pair"] = []
    for pair in pairs:
        with contextlib.ExitStack() as stack:
            for layer, head in pair:
                stack.enter_context(without_head(across[layer], head))
            measured["without_pair"].append({"heads": pair, **accuracy(matching, drawn)})
    return measured


def fresh(name: str, seed: int) -> nn.Module:
    """The model before its training."""
    return seeded(seed, ARCHITECTURES[name].fresh).eval()


def trained(name: str, arm: str, seed: int, settings: Settings) -> nn.Module:
    kind = ARCHITECTURES[name]
    if settings.models is not None:
        return kind.load(Path(settings.models) / arm / str(seed))[0]
    return kind.train(2 if settings.smoke else STEPS[arm, name], seed=seed, log_every=0, recipe=arm)


def named(name: str, count: int, seed: int) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """The samples, with the model's names."""
    for inputs, labels in probe_samples(count, seed=seed):
        yield ARCHITECTURES[name].inputs(inputs), labels


def other_captions(count: int, seed: int) -> Iterator[tuple[dict[str, Tensor], None]]:
    """The scenes, each with the caption of the scene before."""
    for inputs, _ in probe_samples(count, seed=seed, batch=count):
        yield {**inputs, "input_ids": inputs["input_ids"].roll(1, 0)}, None


def kept(report: ProbeReport) -> dict[str, Any]:
    """The table as it is stored: by test and task the values of heads by layer, of layers, and of all heads together."""
    stored: dict[str, Any] = {"heads": {}, "layers": {}, "whole": {}}
    for entry in report.table:
        if entry["value"] is None:
            continue
        key = entry["test"] if entry["kind"] is None else f"{entry['test']}: {entry['kind']}"
        value = round(entry["value"], 4)
        if entry["head"] is not None:
            layers = stored["heads"].setdefault(key, [])
            layers += [[] for _ in range(entry["layer"] + 1 - len(layers))]
            layers[entry["layer"]].append(value)
        else:
            control = None if entry["control"] is None else round(entry["control"], 4)
            one = {"value": value, "shuffled": control}
            if entry["layer"] is None:
                stored["whole"][key] = one
            else:
                stored["layers"].setdefault(key, []).append(one)
    return stored


def ranked(report: ProbeReport, key: str) -> list[list[int]]:
    """[layer, head], the best first, of a test or task."""
    layers = kept(report)["heads"][key]
    places = [[layer, head] for layer, row in enumerate(layers) for head in range(len(row))]
    return sorted(places, key=lambda place: -layers[place[0]][place[1]])


def chosen(report: ProbeReport) -> dict[str, list[int]]:
    """The best head of each test and task."""
    return {key: ranked(report, key)[0] for key in kept(report)["heads"]}


@torch.no_grad()
def accuracy(model: Callable[..., Any], drawn: Sequence[Scenes]) -> dict[str, float]:
    """Accuracy for each kind of wrong captions, and "accuracy", their mean; `drawn`: scenes with true captions, then with each
    kind of wrong ones."""
    true, *false = (uniter.log_odds(model(**scenes.inputs())) > 0 for scenes in drawn)
    right = true.double().mean()
    kinds = {kind: float(right + 1 - wrong.double().mean()) / 2 for kind, wrong in zip(NEGATIVES, false, strict=True)}
    return {kind: round(value, 4) for kind, value in {"accuracy": _mean([*kinds.values()]), **kinds}.items()}


def without_head(join: nn.Module, head: int) -> RemovableHandle:
    """A context in which a head adds nothing to what `join` joins."""

    def silence(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        width = inputs[0].shape[-1] // uniter.CONFIG.num_attention_heads
        heads = inputs[0].clone()
        heads[..., head * width : (head + 1) * width] = 0
        return (heads, *inputs[1:])

    return join.register_forward_pre_hook(silence)


# --- what [CLS] takes from words and from regions ---


@contextlib.contextmanager
def watched(modules: Sequence[nn.Module], what: str) -> Iterator[list[Tensor]]:
    """The first inputs, or the outputs, of modules in the order of their calls."""
    seen: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            hook = (lambda _, args, out: seen.append(args[0])) if what == "inputs" else (lambda _, args, out: seen.append(out))
            stack.enter_context(module.register_forward_hook(hook))
        yield seen


def _norm(joined: Tensor, dense: Any) -> float:
    """The mean norm of what heads (B, C) add to a state."""
    return float((joined @ dense.weight.T).norm(dim=-1).mean())


@torch.no_grad()
def taken_by_uniter(model: Any, inputs: dict[str, Tensor]) -> list[tuple[float, float]]:
    """For each layer, the mean norm of what attention adds to [CLS] from the text, and from the image. Only in the first layer
    the text holds nothing of the image."""
    taken, length = [], inputs["input_ids"].shape[1]
    for layer in model.uniter.encoder.layer:
        attention = layer.attention.self
        with watched([attention.query, attention.key, attention.value], "outputs") as seen:
            model(**inputs)
        query, key, value = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in seen)
        weights = (query[:, :, :1] @ key.mT * attention.scaling).softmax(-1)
        parts = [(weights[..., part] @ value[:, :, part]).flatten(1) for part in (slice(length), slice(length, None))]
        text, image = (_norm(part, layer.attention.output.dense) for part in parts)
        taken.append((round(text, 4), round(image, 4)))
    return taken


@torch.no_grad()
def taken_by_lxmert(model: Any, inputs: dict[str, Tensor]) -> list[tuple[float, float]]:
    """The same for each layer in which the streams attend to one another; text = from the words' attention to words, which comes
    after they have attended to the image."""
    taken = []
    for layer in model.lxmert.encoder.x_layers:
        denses = [layer.visual_attention.output.dense, layer.lang_self_att.output.dense]
        with watched(denses, "inputs") as seen:
            model(**lxmert.inputs(inputs))
        across, own = seen[0][:, 0], seen[2][:, 0]  # the second call has the regions ask
        taken.append((round(_norm(own, denses[1]), 4), round(_norm(across, denses[0]), 4)))
    return taken


@torch.no_grad()
def first_taken_by_lxmert(model: Any, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """The mean norm of what [CLS] takes from words in the last layer of their own stream, and then from the image, in the first
    layer in which it attends to the image."""
    encoder = model.lxmert.encoder
    denses = [encoder.layer[-1].attention.output.dense, encoder.x_layers[0].visual_attention.output.dense]
    with watched(denses, "inputs") as seen:
        model(**lxmert.inputs(inputs))
    text, image = (round(_norm(joined[:, 0], dense), 4) for joined, dense in zip(seen, denses, strict=False))
    return text, image


# --- the architectures ---


def _joins_of_uniter(model: Any) -> dict[tuple[str, int], nn.Module]:
    return {("both", number): layer.attention.output for number, layer in enumerate(model.uniter.encoder.layer)}


def _joins_of_lxmert(model: Any) -> dict[tuple[str, int], nn.Module]:
    """Layers count within their stream, as those of `probe`; one module joins the heads across streams, both ways."""
    encoder = model.lxmert.encoder
    text = [*(layer.attention.output for layer in encoder.layer), *(layer.lang_self_att.output for layer in encoder.x_layers)]
    image = [*(layer.attention.output for layer in encoder.r_layers), *(layer.visn_self_att.output for layer in encoder.x_layers)]
    across = [layer.visual_attention.output for layer in encoder.x_layers]
    streams = {"text": text, "image": image, "both": across}
    return {(stream, number): module for stream, modules in streams.items() for number, module in enumerate(modules)}


ARCHITECTURES = {
    "UNITER": Architecture(
        lambda: UNITER(uniter.CONFIG),
        train_uniter,
        uniter.load_uniter,
        lambda inputs: inputs,
        lambda model: model,
        _joins_of_uniter,
        taken_by_uniter,
        lambda model, inputs: taken_by_uniter(model, inputs)[0],
    ),
    "LXMERT": Architecture(
        lambda: lxmert.build(lxmert.CONFIG),
        train_lxmert,
        lxmert.load_lxmert,
        lxmert.inputs,
        lxmert.matching,
        _joins_of_lxmert,
        taken_by_lxmert,
        first_taken_by_lxmert,
    ),
}


# --- facts of the records ---


def heads_of(record: Record, state: str, key: str) -> list[float]:
    """The values of all heads."""
    return list(itertools.chain(*record[state]["heads"].get(key, [])))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _mean_of(record: Record, state: str, key: str) -> float:
    return _mean(heads_of(record, state, key))


def _after(record: Record, state: str, key: str, layer: int) -> float:
    """The value of a test of states."""
    value: float = record[state]["layers"][key][layer]["value"]
    return value


def best(record: Record, state: str, key: str) -> float:
    """The value of the head that is best on other scenes."""
    layer, head = record[state]["chosen"][key]
    return record[state]["heads"][key][layer][head]


def per_token(record: Record, state: str, layer: int | None = None) -> float:
    """[CLS]'s mean attention on a word over its attention on a region, over the heads of one layer or of all layers."""
    mass = {}
    for kind in ("text", "image"):
        layers = record[state]["heads"][f"modality: {kind}"]
        mass[kind] = _mean([*itertools.chain(*layers)] if layer is None else layers[layer])
    return (mass["text"] / TOKENS["text"]) / (mass["image"] / TOKENS["image"])


def lost(record: Record) -> dict[tuple[str, int, int], float]:
    """What accuracy loses without each head."""
    return {(one["stream"], one["layer"], one["head"]): record["accuracy"] - one["accuracy"] for one in record["without_head"]}


def facts(record: Record) -> list[tuple[str, str, dict[str, float]]]:
    """(observation, name of the measurement, value by state) of one model."""
    observed: list[tuple[str, str, dict[str, float]]] = []

    def add(observation: str, what: str, measured: Callable[[str], float], states: Sequence[str] = STATES) -> None:
        observed.append((observation, what, {state: measured(state) for state in states}))

    def one(what: str, value: float, observation: str = "ii") -> None:
        observed.append((observation, what, {"trained": value}))

    for kind in (kind for kind in ("accuracy", *NEGATIVES) if kind in record):
        of = "on true and on wrong captions" if kind == "accuracy" else f"if the {kind} is wrong"
        one(f"accuracy of the model {of}", record[kind], "")
    if record["model"] == "UNITER":
        for kind, count in TOKENS.items():
            what = f"attention of [CLS] on the {kind}, {count} tokens of 11"
            add("i", what, partial(_mean_of, record, key=f"modality: {kind}"))
        add("i", "attention on a word over attention on a region", partial(per_token, record))
        one("the same with captions of other scenes", per_token(record, "other captions"), "i")
    add("i", "norm that [CLS] takes from text over that from the image", lambda state: _taken(record, state))
    if "first taken" in record["trained"]:
        add("i", "the same before words hold anything of the image", lambda state: _first_taken(record, state))
    drops = lost(record)
    if record["model"] == "UNITER":
        crossing = "share of heads that are cross-modal in most samples"
        add("ii", crossing, lambda state: _mean([v > 0.5 for v in heads_of(record, state, "cross_modal")]))
        one("the same with captions of other scenes", _mean([v > 0.5 for v in heads_of(record, "other captions", "cross_modal")]))
        shares = record["trained"]["heads"]["cross_modal"]
        numbers = torch.tensor([(shares[layer][head], drop) for (_, layer, head), drop in drops.items()], dtype=torch.float64)
        one("rank correlation over heads: cross-modal, and what accuracy loses without the head", float(spearman(*numbers.T)))
    aligned = f"share of heads that tell the region of a phrase in {ALIGNED:.0%}"
    add("ii", aligned, lambda state: _mean([v >= ALIGNED for v in heads_of(record, state, "coreference")]))
    told = record["trained"]["heads"]["coreference"]
    linking = {place for place in drops if place[0] == "both" and told[place[1]][place[2]] >= ALIGNED}
    if linking:
        one("accuracy lost without such a head, mean", _mean([drops[place] for place in linking]))
    one("accuracy lost without another head, mean", _mean([drop for place, drop in drops.items() if place not in linking]))
    one("accuracy lost without the head that matters most", max(drops.values()))
    if "without_pair" in record:
        one("accuracy for wrong digits lost without the best head for a phrase's region", lost_without_the_best(record)[0])
        one("the same, mean of the other heads", lost_without_the_best(record)[1])
        one("accuracy for wrong digits lost without the two best heads for a phrase's region", lost_without_two(record)[0])
        one("the same, mean of random pairs of other heads", lost_without_two(record)[1])
    for number, tests in (("iii", ("coreference", "coreference_class")), ("iv", ("relation_detection", "relation"))):
        for test in tests:
            add_test(record, number, test, add)
    add_test(record, "v", "word_relation", add)
    for task, what in TASKS.items():
        key = f"linguistic: {task}"
        for layer, name in ((0, "first"), (-1, "last")):
            add("v", f"accuracy, {what}: states after the {name} layer", partial(_after, record, key=key, layer=layer))
        add("v", f"accuracy, {what}: best head's output", partial(best, record, key=f"linguistic_heads: {task}"))
    return observed


def lost_without_the_best(record: Record) -> tuple[float, float]:
    """What accuracy for wrong digits (in rows without it, for all wrong captions) loses without the head that is best at
    coreference on other scenes, and the mean over all other heads that attend across."""
    kind = "digit" if "digit" in record else "accuracy"
    layer, head = record["trained"]["chosen"]["coreference"]
    across = having(record["without_head"], stream="both")
    drops = {(one["layer"], one["head"]): record[kind] - one[kind] for one in across}
    of_best = drops.pop((layer, head))
    return of_best, _mean([*drops.values()])


def lost_without_two(record: Record) -> tuple[float, float]:
    """The same for the two best heads at once, and random pairs of others."""
    two, *random = (record["digit"] - one["digit"] for one in record["without_pair"])
    return two, _mean(random)


def add_test(record: Record, number: str, test: str, add: Callable[..., None]) -> None:
    """The facts of a test that reads two numbers of each head."""
    what = f"accuracy, {PAIRS[test]}"
    add(number, f"{what}: all heads", lambda state: record[state]["whole"][test]["value"])
    add(number, f"{what}: best head", partial(best, record, key=test))
    add(number, f"{what}: mean head", partial(_mean_of, record, key=test))
    add(number, f"{what}: all heads, shuffled labels", lambda state: record[state]["whole"][test]["shuffled"])


def _taken(record: Record, state: str, layer: int | None = None) -> float:
    """The norm that [CLS] takes from text over that from the image, over all layers or one."""
    norms = record[state]["taken"] if layer is None else [record[state]["taken"][layer]]
    return sum(text for text, _ in norms) / sum(image for _, image in norms)


def _first_taken(record: Record, state: str) -> float:
    text, image = record[state]["first taken"]
    return float(text / image)


def _doublings(record: Record, ratio: Callable[[Record, str], float]) -> float:
    """How often training doubles a ratio."""
    return math.log2(ratio(record, "trained") / ratio(record, "untrained"))


def _gain(record: Record, key: str) -> float:
    return best(record, "trained", key) - best(record, "untrained", key)


def _gain_of_all_heads(record: Record) -> float:
    one, two = (float(record[state]["whole"]["coreference"]["value"]) for state in STATES)
    return one - two


def effects(records: Sequence[Record], arm: str = ARMS[0]) -> list[Effect]:
    """Of training, and of a head that is silenced, on what the observations say."""
    found: list[tuple[str, str, list[float]]] = []
    for name, of_name in by_model(having(records, arm=arm)).items():

        def add(number: str, what: str, value: Callable[[Record], float]) -> None:
            found.append((f"({number}) {name}", what, [value(record) for record in of_name]))  # noqa: B023

        if name == "UNITER":
            add("i", "training on attention to a word over a region, log2", lambda record: _doublings(record, per_token))
        if "first taken" in of_name[0]["trained"]:
            add("i", "training on the norm from text over image, log2", lambda record: _doublings(record, _first_taken))
        add("ii", "silencing the best head, less another", lambda record: operator.sub(*lost_without_the_best(record)))
        if "without_pair" in of_name[0]:
            add("ii", "silencing the two best heads, less two others", lambda record: operator.sub(*lost_without_two(record)))
        add("iii", "training on all heads, the region of a phrase", _gain_of_all_heads)
        gains = {"iii": ["coreference"], "iv": ["relation_detection"], "v": [f"linguistic_heads: {task}" for task in ORDER]}
        for number, key in ((number, key) for number, keys in gains.items() for key in keys):
            what = PAIRS.get(key) or TASKS[key.partition(": ")[2]]
            add(number, f"training on the best head, {what}", partial(_gain, key=key))
    return effects_of(found)


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each model, of those that have some."""
    return {name: found for name in ARCHITECTURES if (found := [record for record in records if record["model"] == name])}


def tables(records: Sequence[Record]) -> Iterator[str]:
    measured = [arm for arm in ARMS if having(records, arm=arm)]
    for arm in measured[1:]:  # the page has the first
        yield effects_table(effects(records, arm))
    for arm in measured:
        yield facts_table(having(records, arm=arm), arm)
        yield layers_table(having(records, arm=arm), arm)


def facts_table(records: Sequence[Record], arm: str) -> str:
    measured: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for record in records:
        for observation, what, by_state in facts(record):
            for state, value in by_state.items():
                measured.setdefault((observation, what), {}).setdefault((record["model"], state), []).append(value)
    columns = [(name, state) for name in by_model(records) for state in STATES]
    order = sorted(measured, key=lambda key: ("", *OBSERVATIONS).index(key[0]))
    lines = [
        [
            f"({observation})" if observation else "",
            what,
            *(spread(measured[observation, what].get(column, []), none="–") for column in columns),
        ]
        for observation, what in order
    ]
    return markdown(["", f"measured, {arm}", *(f"{name}, {state}" for name, state in columns)], lines, words=(0, 1))


def layers_table(records: Sequence[Record], arm: str) -> str:
    """The trained models layer by layer; LXMERT's are those in which the streams attend to one another. Fusion: the mutual
    information of two clusters of states with text and image; low = fused."""
    lines = []
    for name, of_name in by_model(records).items():
        for layer in range(len(of_name[0]["trained"]["taken"])):
            spreads = [
                [per_token(record, "trained", layer) for record in of_name] if name == "UNITER" else [],
                [_taken(record, "trained", layer) for record in of_name],
                [max(record["trained"]["heads"]["coreference"][layer]) for record in of_name],
                *([record[state]["layers"]["fusion"][layer]["value"] for record in of_name] for state in STATES),
                [record["trained"]["layers"]["fusion"][layer]["shuffled"] for record in of_name],
            ]
            lines.append([f"{name}, {layer + 1}", *(spread(values, none="–") for values in spreads)])
    head = [f"layer, {arm}", "a word over a region", "norm from text over image", "best head for a phrase's region"]
    return markdown([*head, "fusion", "fusion, untrained", "fusion, shuffled"], lines, words=(0,))


def figure(records: Sequence[Record]) -> Figure:
    """A dot for every head: how well its two numbers tell regions and relations; trained in either way, and untrained."""
    tests = (("coreference", 0.5), ("relation_detection", 0.5), ("relation", 0.25))
    models = by_model(records)
    drawn, axes = panels(len(models), len(tests), (8.4, 2.9 * len(models)))
    for row, (name, of_name) in zip(axes, models.items(), strict=True):
        for axis, (test, chance) in zip(row, tests, strict=True):
            for arm, state, colour, shift in SHOWN:
                points = [
                    (layer + shift + 0.03 * (record["seed"] - 2), value)
                    for record in having(of_name, arm=arm)
                    for layer, row_of_heads in enumerate(record[state]["heads"][test])
                    for value in row_of_heads
                ]
                label = arm if state == "trained" else state
                if points:
                    axis.scatter(*zip(*points, strict=True), s=12, color=colour, alpha=0.7, linewidths=0, label=label)
            layers = len(of_name[0]["trained"]["heads"][test])
            axis.axhline(chance, color="black", linewidth=0.8, linestyle=":", label="chance")
            axis.set(title=f"{name}\n{PAIRS[test]}", xlabel="layer", ylim=(0, 1.02), xlim=(-0.5, layers - 0.5))
            axis.title.set_fontsize(9)
            axis.set_xticks(range(layers))
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("accuracy of one head")
    drawn.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawn


EXPERIMENT = Experiment((Stage(cells, measure),), tables, {"value": figure}, effects)
