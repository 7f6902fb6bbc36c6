"""Do maps and lists of edges name the cause where it is known exactly?

Two transformers have an algorithm written into their weights: an induction head, and a lookup by colour. Maps are compared with
the two tokens that an answer depends on, and lists of edges with the two planted ones. CPR and CMD measure lists of edges, for
the models of DigitScenes too. The push of the parts of a head's scores is compared with the removal of these parts.

In: options of the experiment.
Out: its records.
Imports: vlattn_lab, vlattn_lab.experiments, vlattn_lab.experiments.flow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlattn_fast import evaluate, explain
from vlattn_fast.interpret.relevancy.methods.registry import find_method
from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import having, markdown, spread
from vlattn_fast.methods import Method
from vlattn_lab.experiments.experiment import Cell, Effect, Experiment, Record, Settings, Stage, effects_of, less
from vlattn_lab.experiments.flow.samples import draw
from vlattn_lab.experiments.planted_circuits.mib import (
    FIRST_ORDER,
    HELD,
    LISTS,
    RANDOM,
    RELEVANCY,
    SHARES,
    TRUE,
    measures_on_planted,
    measures_on_scenes,
)
from vlattn_lab.experiments.planted_circuits.models import CIRCUITS, Circuit, Samples, planted
from vlattn_lab.experiments.planted_circuits.removal import KINDS, of_planted, of_scenes
from vlattn_lab.mapper import load_captioner, load_vqa

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTENTION = (0.8, 0.999)  # of a planted head, to the token that it looks for
SAMPLES, OF_SYNERGY = 64, 32  # of a planted model
SCENES = 32  # of DigitScenes, half of them to make lists
FROZEN: tuple[tuple[str, ...], ...] = ((), ("norms",), ("norms", "attention"))
GRADIENTS = ("gradient", "weighted", "gradcam", "glimpse", "input_gradient", "integrated_gradients")
OTHERS = ("attention", "rollout", "occlusion")
TRUTH = "the two causes"
MEASURES = ("pointing", "both", "content", "key")
TASKS = {"vqa": ("questions", load_vqa), "captions": ("captions", load_captioner)}


def methods() -> dict[tuple[str, str], Method]:
    """The methods by their names and by what they hold fixed in the backward pass."""
    made = {(name, ", ".join(held)): find_method(name)(freeze=held) for name in GRADIENTS for held in FROZEN}
    return {**made, **{(name, ""): find_method(name)() for name in OTHERS}}


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"circuit": c, "attention": share, "seed": s} for s in range(settings.seeds) for c in CIRCUITS for share in ATTENTION]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    circuit = planted(cell["circuit"], cell["attention"], cell["seed"])
    samples = circuit.draw(8 if settings.smoke else SAMPLES, cell["seed"])
    half = len(samples.answers) // 2
    with torch.no_grad():
        logits = circuit.model(**samples.inputs).logits
    logits = logits if logits.ndim == 2 else logits[:, -1]
    probability = logits.softmax(-1).gather(1, samples.answers[:, None])
    return {
        "right": float((logits.argmax(-1) == samples.answers).double().mean()),
        "probability": round(float(probability.mean()), 4),
        "maps": maps(circuit, samples, cell["seed"]),
        "synergy": synergy(circuit, samples.part(slice(4 if settings.smoke else OF_SYNERGY)), cell["seed"]),
        **measures_on_planted(circuit, samples.part(slice(half)), samples.part(slice(half, None)), cell["seed"]),
    }


def maps(circuit: Circuit, samples: Samples, seed: int) -> list[dict[str, Any]]:
    """The measures of each method's map and of random ones: see `measures_of_map`."""
    rows = []
    for (name, held), method in methods().items():
        (relevancy,) = explain(circuit.model, samples.inputs, target=samples.answers.tolist(), method=method).relevancy.values()
        rows.append({"method": name, "held": held, **measures_of_map(relevancy.detach(), samples)})
    chance = torch.rand(relevancy.shape, generator=torch.Generator().manual_seed(seed))
    return [*rows, {"method": RANDOM, "held": "", **measures_of_map(chance, samples)}]


def measures_of_map(relevancy: Tensor, samples: Samples) -> dict[str, float]:
    """How often the largest entry is one of the two causes, and how often the two largest are both; the shares of the positive
    mass on the content and on the key. The token that gives the answer is left out."""
    content, key, read = (samples.groups[name] for name in (samples.content, samples.key, samples.read))
    positive = relevancy.double().clamp(min=0).masked_fill(read, 0)
    largest = positive.topk(2)
    hits = (content | key).gather(1, largest.indices) & (largest.values > 0)
    mass = positive / positive.sum(1, keepdim=True).clamp(min=1e-30)
    values = hits[:, 0], hits.all(1), (mass * content).sum(1), (mass * key).sum(1)
    return {name: round(float(value.double().mean()), 4) for name, value in zip(MEASURES, values, strict=True)}


def synergy(circuit: Circuit, samples: Samples, seed: int) -> list[dict[str, Any]]:
    """Synergistic faithfulness of each method, of the map of the two causes, and of random maps; none without an image."""
    if "visual_embeds" not in samples.inputs:
        return []
    text = samples.inputs["input_ids"].shape[1]

    def truth(model: nn.Module, inputs: Mapping[str, Any], target: Any) -> Any:
        return SimpleNamespace(
            regions=samples.groups["region"][:, text:].double(), text=samples.groups["word"][:, :text].double()
        )

    named = {f"{name}|{held}": method for (name, held), method in methods().items()}
    data = [(samples.inputs, samples.answers.tolist(), None)]
    report = evaluate(circuit.model, data, methods={**named, TRUTH: truth, RANDOM: RANDOM}, tests=("synergy",), seed=seed)
    split = [(record["method"].partition("|"), record["value"]) for record in report.table]
    return [{"method": name, "held": held, "synergy": round(value, 4)} for (name, _, held), value in split]


def scenes(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"task": task, "seed": seed} for seed in range(settings.seeds) for task in [*TASKS][: 1 if settings.smoke else None]]


def measure_scenes(cell: Cell, settings: Settings) -> dict[str, Any]:
    model, _ = TASKS[cell["task"]][1]()
    asked, accuracy = draw(cell["task"], model, *((12, 4) if settings.smoke else (200, SCENES)), cell["seed"])
    return {"accuracy": accuracy, **measures_on_scenes(model, asked, cell["seed"])}


def removals(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    """Those of the earlier stages."""
    return [{"part": "removal", **cell} for cell in cells(settings, ()) + scenes(settings, ())]


def measure_removals(cell: Cell, settings: Settings) -> dict[str, Any]:
    if "circuit" in cell:
        circuit = planted(cell["circuit"], cell["attention"], cell["seed"])
        return of_planted(circuit, circuit.draw(4 if settings.smoke else SAMPLES // 2, cell["seed"])).correlations()
    model, _ = TASKS[cell["task"]][1]()
    asked, _ = draw(cell["task"], model, *((12, 2) if settings.smoke else (100, SCENES // 2)), cell["seed"])
    return of_scenes(model, asked).correlations()


def tables(records: Sequence[Record]) -> Iterator[str]:
    removed = having(records, part="removal")
    records = [record for record in records if "part" not in record]
    yield _of_models(records)
    for circuit in CIRCUITS:
        yield _of_methods(records, circuit, "maps", MEASURES)
    yield _of_methods(records, "lookup", "synergy", ("synergy",))
    yield _of_places(records)
    for fact in ("cpr", "cmd"):
        yield _of_areas(records, fact)
    yield _of_ranks(records)
    yield _of_removals(removed)


def effects(records: Sequence[Record]) -> list[Effect]:
    """What holding fixed changes of `gradient`, and how lists and orders of edges differ."""
    found = []
    kept = [record for record in records if "part" not in record]
    for name, rows in _planted(kept).items():
        both = {
            held: [having(one["maps"], method="gradient", held=held)[0]["both"] for one in rows]
            for held in map(", ".join, FROZEN)
        }
        for held in ("norms", "norms, attention"):
            found.append((f"{name}: {held} held fixed", "finds both causes", less(both[held], both[""])))
    for name, rows in _of_tasks(kept).items():
        areas = {of: [having(one["areas"], list=of)[0]["cpr"] for one in rows] for of in (TRUE, FIRST_ORDER, HELD, RELEVANCY)}
        for one, other in ((HELD, FIRST_ORDER), (RELEVANCY, TRUE)):
            found.append((f"{name}: {one} less {other}", "CPR", less(areas[one], areas[other])))
        ranks = [[row["ranks"]["edges"][by] for row in rows] for by in (HELD, FIRST_ORDER)]
        found.append((f"{name}: {HELD} less {FIRST_ORDER}", "rank correlation", less(*ranks)))
    return effects_of(found)


def _of_models(records: Sequence[Record]) -> str:
    facts = {"right answers": "right", "probability": "probability", "faithfulness of only the planted edges": "alone"}
    lines = [
        [name, *(spread([one[fact] for one in rows]) for fact in facts.values())] for name, rows in _planted(records).items()
    ]
    return markdown(["circuit, attention", *facts], lines)


def _of_methods(records: Sequence[Record], circuit: str, rows: str, facts: Sequence[str]) -> str:
    """A line for each method and what it holds fixed; for each of ATTENTION, columns of `facts`."""
    by_share = [having(records, circuit=circuit, attention=share) for share in ATTENTION]
    lines = []
    for row in by_share[0][0][rows]:
        named = {"method": row["method"], "held": row["held"]}
        same = [[having(one[rows], **named)[0] for one in rows_of_share] for rows_of_share in by_share]
        values = [spread([each[fact] for each in rows_of_share], ".2f") for rows_of_share in same for fact in facts]
        lines.append([row["method"] if row["method"] == TRUTH else f"`{row['method']}`", row["held"] or "–", *values])
    return markdown(["method", "held fixed", *(f"{fact}, {share}" for share in ATTENTION for fact in facts)], lines, words=(0, 1))


def _of_places(records: Sequence[Record]) -> str:
    """The places of the edge by which the content is found and of the one by which it is copied, from the best model's to the
    worst one's."""
    lines = []
    for name in (name for name in LISTS if name in records[0]["places"]):
        places = [[one["places"][name][number] for one in rows] for rows in _planted(records).values() for number in (0, 1)]
        lines.append([name, *(f"{min(each)} to {max(each)}" if len({*each}) > 1 else str(each[0]) for each in places)])
    return markdown(["list", *(f"{kind}: {edge}" for kind in _planted(records) for edge in ("finds", "copies"))], lines)


def _of_areas(records: Sequence[Record], fact: str) -> str:
    kinds = _planted(records) | _of_tasks(records)
    lines = []
    for name in LISTS:
        values = [[row[fact] for one in rows for row in having(one["areas"], list=name)] for rows in kinds.values()]
        lines.append([name, *(spread(each, ".2f", none="–") for each in values)])
    return markdown([fact.upper(), *kinds], lines)


def _of_ranks(records: Sequence[Record]) -> str:
    tasks = _of_tasks(records)
    lines = [
        [of, by, *(spread([one["ranks"][of][by] for one in rows], ".2f") for rows in tasks.values())]
        for of in ("edges", "heads")
        for by in (FIRST_ORDER, HELD)
    ]
    return markdown(["true effects of", "by", *tasks], lines, words=(0, 1))


def _of_removals(records: Sequence[Record]) -> str:
    """The rank correlation of what the push of a part foretells with what its removal does."""
    lines = []
    for name, rows in {**_planted(records), **_of_tasks(records)}.items():
        values = [[one[kind] for one in rows if one[kind] is not None] for kind in KINDS]
        lines.append([name, *(spread(each, ".2f", none="–") for each in values)])
    return markdown(["model", "embedding", "heads", "MLPs"], lines)


def _planted(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each planted model."""
    return {f"{c}, {share}": having(records, circuit=c, attention=share) for c in CIRCUITS for share in ATTENTION}


def _of_tasks(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each task of DigitScenes that has some."""
    by_name = {name: having(records, task=task) for task, (name, _) in TASKS.items()}
    return {name: rows for name, rows in by_name.items() if rows}


def figure(records: Sequence[Record]) -> Figure:
    """Faithfulness over the share of edges that are kept, the mean over the seeds, a panel for each model."""
    records = [record for record in records if "part" not in record]
    by_kind = _planted(records) | _of_tasks(records)
    drawn, axes = panels(2, 3, (7.8, 5.2), sharey=True)
    for axis, (kind, rows_of_kind) in zip(axes.flat, by_kind.items(), strict=False):
        for row in rows_of_kind[0]["areas"]:
            curves = [having(one["areas"], list=row["list"])[0]["signed"] for one in rows_of_kind]
            style = {"color": "black", "linestyle": "--"} if row["list"] == RANDOM else {}
            axis.plot(SHARES, torch.tensor(curves).mean(0).tolist(), marker="o", markersize=3, label=row["list"], **style)
        axis.set(title=kind, xscale="log", xlabel="share of edges kept")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("faithfulness")
    labels = dict(zip(*axes.flat[len(by_kind) - 1].get_legend_handles_labels()[::-1], strict=True))
    drawn.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, frameon=False)
    return drawn


_STAGES = Stage(cells, measure), Stage(scenes, measure_scenes), Stage(removals, measure_removals)
EXPERIMENT = Experiment(_STAGES, tables, {"planted_circuits": figure}, effects)
