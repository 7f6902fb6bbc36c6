"""Does an indexer that learns from dense attention first find the keys that matter, once the attention is sparse?

The transformer of `vlattn_lab.hybrid`, trained once a seed, gets an indexer in each layer. Arm "warm-up": the indexers learn from
the dense attention of the fixed model, then the attention is sparse and both learn, each from its own loss. Arm "sparse at
once": the same number of steps, all sparse.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.provenance import fingerprint
from vlattn_fast.measuring.records import markdown, spread
from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage, band
from vlattn_lab.experiments.recipes import trained
from vlattn_lab.hybrid import caption_truth
from vlattn_lab.sparse import Indexer, with_indexers
from vlattn_lab.train.fit import seeded
from vlattn_lab.train.hybrid import losses
from vlattn_lab.train.mapper import TrainingHeads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEYS = 8  # of some 70 that a query attends to
STEPS, EVERY, SCENES = 80, 10, 100  # of each stage; steps between two measurements of recall; scenes whose captions are judged
LR = {"indexers": 3e-3, "model": 3e-4}
ARMS = ("warm-up", "sparse at once")


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"seed": seed} for seed in range(settings.seeds)]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    steps, every, count = (2, 1, 4) if settings.smoke else (STEPS, EVERY, SCENES)
    seed, whole = cell["seed"], trained(cell["seed"], settings)

    def truth(model: Any) -> float:
        return caption_truth(model, count=count, seed=seed)["true"]

    found: dict[str, Any] = {"weights": fingerprint(whole), "dense": truth(whole), "arms": {}}
    for arm in ARMS:
        model = copy.deepcopy(whole)
        training = Training(model, seeded(seed, partial(with_indexers, model)), seed, every)
        training.run(steps, sparse=arm != "warm-up")
        training.set_keys(KEYS)
        between = truth(model)
        training.run(steps, sparse=True)
        found["arms"][arm] = {"steps": training.steps, "recall": training.recalls, "between": between, "after": truth(model)}
    return found


class Training:
    """steps, recalls: of the indexers' own keys, in the mean over the layers, in the scenes of that step, before it."""

    def __init__(self, model: Any, indexers: dict[str, Indexer], seed: int, every: int) -> None:
        self.model, self.indexers, self.every = model, [*indexers.values()], every
        self.heads = seeded(seed, lambda: TrainingHeads(model.config.text_config.hidden_size))  # of losses that are left out
        self.generator = torch.Generator().manual_seed(1000 + seed)
        of_indexers = [x for indexer in self.indexers for x in indexer.parameters()]
        own = {id(x) for x in of_indexers}
        of_model = [x for x in model.parameters() if x.requires_grad and id(x) not in own]
        self.optimizer = torch.optim.AdamW(
            [{"params": of_indexers, "lr": LR["indexers"]}, {"params": of_model, "lr": LR["model"]}]
        )
        self.steps, self.recalls = list[int](), list[float]()
        self.done = 0

    def set_keys(self, keys: int | None) -> None:
        for indexer in self.indexers:
            indexer.keys = keys

    def run(self, steps: int, *, sparse: bool) -> None:
        """Dense attention leaves the model as it is."""
        self.set_keys(KEYS if sparse else None)
        for step in range(steps):
            answer = losses(self.model, self.heads, self.generator)["answer"]
            if step % self.every == 0 or step == steps - 1:
                self.steps.append(self.done)
                self.recalls.append(round(float(torch.stack([x.recall for x in self.indexers]).mean()), 4))
            total = torch.stack([x.loss for x in self.indexers]).sum() + (answer if sparse else 0.0)
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
            self.optimizer.step()
            self.done += 1


def _recalls(records: Sequence[Record], arm: str) -> list[list[float]]:
    return [[*values] for values in zip(*[record["arms"][arm]["recall"] for record in records], strict=True)]


def tables(records: Sequence[Record]) -> Iterator[str]:
    lines = []
    for arm in ARMS:
        found, mine = _recalls(records, arm), [record["arms"][arm] for record in records]
        half = len(found) // 2
        truths = [[record["dense"] for record in records], *[[record[when] for record in mine] for when in ("between", "after")]]
        places = [shown(found[place]) for place in (0, half - 1, half, -1)]
        lines.append([arm, *places, *[shown(values) for values in truths]])
    recall = [f"recall: {when}" for when in ("first step", "end of the first stage", "start of the second", "its end")]
    yield markdown(["arm", *recall, "true captions: dense, before", "between the stages, sparse", "after both, sparse"], lines)


def shown(values: Sequence[float]) -> str:
    """One seed has no spread."""
    return spread(values, ".2f") if len(values) > 1 else f"{values[0]:.2f}"


def figure(records: Sequence[Record]) -> Figure:
    drawn, ((axis,),) = panels(1, 1, (6, 3.2))
    for arm, colour in zip(ARMS, ("tab:blue", "tab:orange"), strict=True):
        band(axis, records[0]["arms"][arm]["steps"], _recalls(records, arm), color=colour, label=arm)
    axis.axvline(STEPS, color="grey", linewidth=0.8)
    axis.set(xlabel="steps", ylabel=f"recall of the {KEYS} keys", ylim=(0, 1))
    axis.legend(frameon=False)
    return drawn


EXPERIMENT = Experiment((Stage(cells, measure),), tables, {"indexer": figure})
